// mla_attention: argument checks and output allocation, the same for every device.
#pragma once

#include <tuple>

#include "common/torch_check.h"
#include "mla_attention/mla_attention.h"

namespace zebra {

inline MlaAttentionShape mla_attention_shape(const Check& check, const Tensor& q, const Tensor& kv,
                                             const Tensor& k_rope, double scale,
                                             const OptTensor& cu_seqlens, bool causal) {
  MlaAttentionShape p{};
  p.dtype = check.floating("q", q);
  check.that(q.dim() == 4 && q.size(2) > 0 && q.size(3) > 0, "q", describe(q),
             "[B, T, H, Dn + E] with H >= 1");
  p.B = q.size(0), p.T = q.size(1), p.H = q.size(2);
  check.last_dim_contiguous("q", q);
  check.like("k_rope", k_rope, q, "q");
  check.shape("k_rope", k_rope, {p.B, -1, -1}, "[B, S, E]");
  check.last_dim_contiguous("k_rope", k_rope);
  p.S = k_rope.size(1), p.E = k_rope.size(2), p.nope = q.size(3) - p.E;
  check.that(p.nope >= 0, "k_rope", describe(k_rope),
             "[B, S, E] with E at most Dn + E = ", q.size(3));
  check.that(p.S >= p.T, "k_rope", describe(k_rope), "[B, S, E] with S >= T = ", p.T);
  check.like("kv", kv, q, "q");
  check.shape("kv", kv, {p.B, p.S, -1, -1}, "[B, S, G, Dn + Dv]");
  check.last_dim_contiguous("kv", kv);
  p.G = kv.size(2), p.v_dim = kv.size(3) - p.nope;
  check.that(p.G > 0 && p.H % p.G == 0, "kv", describe(kv),
             "[B, S, G, Dn + Dv] with G a divisor of H = ", p.H);
  check.that(p.v_dim > 0, "kv", describe(kv), "[B, S, G, Dn + Dv] wider than Dn = ", p.nope);
  p.sequences = p.B;
  if (cu_seqlens) {
    p.sequences = check.cu_seqlens(*cu_seqlens, q, "q", "[1, T, H, Dn + E]");
    check.that(p.S == p.T, "k_rope", describe(k_rope), "[B, S, E] with S = T = ", p.T,
               " with cu_seqlens");
    p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->data_ptr());
  }
  p.q = q.data_ptr(), p.kv = kv.data_ptr(), p.k_rope = k_rope.data_ptr();
  for (int d = 0; d < 3; ++d) p.q_stride[d] = q.stride(d), p.kv_stride[d] = kv.stride(d);
  for (int d = 0; d < 2; ++d) p.rope_stride[d] = k_rope.stride(d);
  p.scale = scale;
  p.causal = causal;
  return p;
}

template <typename Launch>
std::tuple<Tensor, Tensor> mla_attention_torch(const Tensor& q, const Tensor& kv,
                                               const Tensor& k_rope, double scale,
                                               const OptTensor& cu_seqlens, bool causal,
                                               Launch launch) {
  const Check check("mla_attention");
  MlaAttentionParams p{};
  p.in = mla_attention_shape(check, q, kv, k_rope, scale, cu_seqlens, causal);
  Tensor o = torch::stable::new_empty(q, {p.in.B, p.in.T, p.in.H, p.in.v_dim});
  Tensor lse = torch::stable::new_empty(q, {p.in.B, p.in.T, p.in.H}, acc_dtype(q));
  p.o = o.data_ptr(), p.lse = lse.data_ptr();
  check.status(launch(p));
  return {o, lse};
}

template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> mla_attention_backward_torch(
    const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& kv,
    const Tensor& k_rope, const Tensor& o, const Tensor& lse, double scale,
    const OptTensor& cu_seqlens, bool causal, Launch launch) {
  const Check check("mla_attention_backward");
  MlaAttentionBackwardParams p{};
  p.in = mla_attention_shape(check, q, kv, k_rope, scale, cu_seqlens, causal);
  const MlaAttentionShape& s = p.in;
  check.like("do", dout, q, "q");
  check.shape("do", dout, {s.B, s.T, s.H, s.v_dim}, "[B, T, H, Dv]");
  check.like("o", o, q, "q");
  check.shape("o", o, {s.B, s.T, s.H, s.v_dim}, "[B, T, H, Dv]");
  check.dtype("lse", lse, acc_dtype(q));
  check.shape("lse", lse, {s.B, s.T, s.H}, "[B, T, H]");
  const Tensor dout_rows = torch::stable::contiguous(dout), o_rows = torch::stable::contiguous(o);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  Tensor dlse_rows = lse_rows;
  if (dlse) {
    check.like("dlse", *dlse, lse, "lse");
    check.shape("dlse", *dlse, {s.B, s.T, s.H}, "[B, T, H]");
    dlse_rows = torch::stable::contiguous(*dlse);
    p.dlse = dlse_rows.data_ptr();
  }
  Tensor dq = torch::stable::new_empty(q, q.sizes());
  Tensor dkv = torch::stable::new_empty(kv, kv.sizes());
  Tensor dk_rope = torch::stable::new_empty(k_rope, k_rope.sizes());
  Tensor partial = torch::stable::new_empty(q, {s.G, s.B, s.S, s.E}, acc_dtype(q));
  p.o = o_rows.data_ptr(), p.lse = lse_rows.data_ptr(), p.dout = dout_rows.data_ptr();
  p.dq = dq.data_ptr(), p.dkv = dkv.data_ptr(), p.dk_rope = dk_rope.data_ptr();
  p.partial = partial.data_ptr();
  check.status(launch(p));
  return {dq, dkv, dk_rope};
}

}  // namespace zebra
