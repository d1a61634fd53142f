// Every torch.ops.zebra operator, one schema each: the table of contents.
//
// Dimensions (zebra/ops/__init__.py has the full legend): B batch, T new tokens, H heads, C
// channels. A `(a!)` argument is mutated.  An output of shape [0] stands for "not produced".
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(zebra, m) {
  // y = w * s / sqrt(mean(s^2) + eps), s = x + residual
  m.def(
      "rms_norm(Tensor x, Tensor weight, Tensor? residual=None, float eps=1e-05)"
      " -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor weight, Tensor rstd)"
      " -> (Tensor dx, Tensor dweight)");

  // y[t] = act(bias + sum_w weight[w] x[t - (W-1) + w]), channels last
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None,"
      " Tensor? cu_seqlens=None, str activation='silu') -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? "
      "bias,"
      " Tensor? initial_state, Tensor? cu_seqlens, str activation)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias=None,"
      " str activation='silu', Tensor? state_indices=None) -> Tensor");

  // S_t = exp(A d_t) S_{t-1} + d_t x_t B_t^T,  y_t = S_t C_t + D x_t, gate, per-head norm
  m.def(
      "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None,"
      " Tensor? dt_bias=None, Tensor? norm_weight=None, Tensor? initial_state=None,"
      " Tensor? cu_seqlens=None, bool dt_softplus=True, float norm_eps=1e-05)"
      " -> (Tensor y, Tensor final_state)");
  // For the CUDA registration of ssd_scan: what its kernels do not take, in PyTorch operations
  m.def(
      "_ssd_scan_composite(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None,"
      " Tensor? dt_bias=None, Tensor? norm_weight=None, Tensor? initial_state=None,"
      " Tensor? cu_seqlens=None, bool dt_softplus=True, float norm_eps=1e-05)"
      " -> (Tensor y, Tensor final_state)");
  m.def(
      "ssd_scan_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B,"
      " Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? norm_weight,"
      " Tensor? initial_state, Tensor? cu_seqlens, bool dt_softplus, float norm_eps)"
      " -> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz,"
      " Tensor ddt_bias, Tensor dnorm_weight, Tensor dinitial_state)");

  // One token of a Mamba2 mixer between its two projections: conv, SSM update, gate, norm
  m.def(
      "mamba2_step(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor conv_weight,"
      " Tensor? conv_bias, Tensor dt_bias, Tensor A, Tensor D, Tensor? norm_weight, int n_groups,"
      " Tensor? state_indices=None, float norm_eps=1e-05, bool A_is_log=False) -> Tensor");

  // q = W_qb W_qa x, [c | k_rope] = W_kva x, rope parts rotated; latent = [c | k_rope]
  m.def(
      "mla_project(Tensor hidden, Tensor? q_a_weight, Tensor q_b_weight, Tensor kv_a_weight,"
      " Tensor cos, Tensor sin, Tensor positions, int num_heads, Tensor? q_a_norm_weight=None,"
      " Tensor? kv_a_norm_weight=None, float norm_eps=1e-06) -> (Tensor q, Tensor latent)");
  // mla_project where a gradient follows, which needs c_q = W_qa x
  m.def(
      "mla_project_training(Tensor hidden, Tensor q_a_weight, Tensor q_b_weight,"
      " Tensor kv_a_weight, Tensor cos, Tensor sin, Tensor positions, int num_heads, Tensor? "
      "q_a_norm_weight,"
      " Tensor? kv_a_norm_weight, float norm_eps) -> (Tensor q, Tensor latent, Tensor c_q)");
  m.def(
      "mla_project_backward(Tensor dq, Tensor dlatent, Tensor hidden, Tensor? q_a_weight,"
      " Tensor q_b_weight, Tensor kv_a_weight, Tensor cos, Tensor sin, Tensor positions,"
      " int num_heads, Tensor? q_a_norm_weight, Tensor? kv_a_norm_weight, float norm_eps,"
      " Tensor? c_q)"
      " -> (Tensor dhidden, Tensor dq_a_weight, Tensor dq_b_weight, Tensor dkv_a_weight,"
      " Tensor dq_a_norm_weight, Tensor dkv_a_norm_weight)");
  m.def(
      "mla_project_append(Tensor hidden, Tensor? q_a_weight, Tensor q_b_weight, Tensor kv_a_weight,"
      " Tensor cos, Tensor sin, Tensor positions, int num_heads, Tensor(a!) cache,"
      " Tensor slot_mapping, Tensor? q_a_norm_weight=None, Tensor? kv_a_norm_weight=None,"
      " float norm_eps=1e-06, Tensor? input_norm_weight=None, float input_norm_eps=1e-05)"
      " -> (Tensor q, Tensor latent)");

  // o = softmax(scale q [k_nope | k_rope]^T) v, grouped heads, for training and prefill
  m.def(
      "mla_attention(Tensor q, Tensor kv, Tensor k_rope, float scale, Tensor? cu_seqlens=None,"
      " bool causal=True) -> (Tensor o, Tensor lse)");
  m.def(
      "mla_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor kv, Tensor k_rope, Tensor "
      "o,"
      " Tensor lse, float scale, Tensor? cu_seqlens, bool causal)"
      " -> (Tensor dq, Tensor dkv, Tensor dk_rope)");

  // For the CUDA implementation of mla_attention: the keys that torch's attention takes, and kv's
  // and k_rope's gradients from theirs
  m.def("_mla_attention_keys(Tensor kv, Tensor k_rope, int nope_dim) -> Tensor");
  m.def(
      "_mla_attention_key_gradients(Tensor dkey, Tensor dvalue, int nope_dim)"
      " -> (Tensor dkv, Tensor dk_rope)");

  // The absorbed form over the paged latent cache, for decoding
  m.def(
      "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, float scale,"
      " Tensor? kv_b_weight=None, int num_kv_heads=0, int kv_lora_rank=0, int split_size=0)"
      " -> (Tensor o, Tensor lse)");
  // For the CUDA registration of mla_decode: what its kernel does not take, in PyTorch operations
  m.def(
      "_mla_decode_composite(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, float "
      "scale,"
      " Tensor? kv_b_weight=None, int num_kv_heads=0, int kv_lora_rank=0, int split_size=0)"
      " -> (Tensor o, Tensor lse)");

  // y = act(W norm(x) + b) + residual for few rows of x
  m.def(
      "linear_decode(Tensor x, Tensor weight, Tensor? norm_weight=None, Tensor? bias=None,"
      " Tensor? residual=None, str activation='none', float norm_eps=1e-05,"
      " Tensor? up_weight=None) -> Tensor");

  // KL(teacher || student) of every token from hidden states and output weights
  m.def(
      "fused_kl_div(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden,"
      " Tensor teacher_weight, float temperature=1.0, int kept_tokens=0)"
      " -> (Tensor kl, Tensor student_lse, Tensor teacher_lse, Tensor dlogits)");
  m.def(
      "fused_kl_div_backward(Tensor dkl, Tensor student_hidden, Tensor student_weight,"
      " Tensor teacher_hidden, Tensor teacher_weight, Tensor student_lse, Tensor teacher_lse,"
      " Tensor dlogits, float temperature) -> (Tensor dstudent_hidden, Tensor dstudent_weight)");
}
