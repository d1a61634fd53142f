#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include "linear_decode/linear_decode.h"
#include "mla_project/mla_project_torch_products.h"

namespace zebra {
namespace {

// mla_project_append of few tokens on Hopper: one launch, which reads both weights once, turns and
// stores; with q_a_weight one more, from c_q.
class FewTokens {
 public:
  FewTokens(const MlaProjectInputs& in, const MlaProjectDims& d, const MlaProjectParams& p,
            const Tensor& x)
      : in_(in), d_(d) {
    LinearDecodeParams& q = head_.p;
    q.rows = d.tokens, q.K = d.D, q.x = x.data_ptr(), q.x_stride = d.D;
    q.dtype = q.norm_weight_dtype = d.dtype, q.norm_eps = in.input_norm_eps;
    set_norm(q, *in.input_norm_weight);
    set_weight(q, in.q_a_weight ? *in.q_a_weight : in.q_b_weight);
    LinearProjection& kv = head_.also;
    kv.weight = in.kv_a_weight.data_ptr(), kv.weight_stride = in.kv_a_weight.stride(0);
    kv.outputs = d.R + d.E, kv.rope = p.rope, kv.head = in.q_a_weight ? 0 : d.q_dim;
    kv.cache = p.cache, kv.slot_mapping = p.slot_mapping;
    kv.pages = p.pages, kv.page = p.page, kv.page_stride = p.page_stride;
    kv.row_stride = p.row_stride;
    if (!in.q_a_weight) return;
    LinearDecodeParams& b = tail_.p;
    b = q;
    b.K = b.x_stride = d.rank_q, b.norm_eps = in.norm_eps;
    set_norm(b, in.q_a_norm_weight);
    set_weight(b, in.q_b_weight);
    tail_.also.rope = p.rope, tail_.also.head = d.q_dim;
  }

  bool are_taken() const {
    const auto in_rows = [](const Tensor& w) { return w.size(1) <= 1 || w.stride(1) == 1; };
    // Norms of other inputs than both products': of c, and of hidden for q alone.
    if (in_.kv_a_norm_weight || (!in_.q_a_weight && in_.q_a_norm_weight)) return false;
    if (!in_rows(in_.kv_a_weight) || !in_rows(in_.q_b_weight)) return false;
    if (!linear_project_cuda_takes(head_.p, head_.also)) return false;
    if (!in_.q_a_weight) return true;
    // c_q is a fresh tensor: as aligned as hidden's rows.
    return in_rows(*in_.q_a_weight) && d_.rank_q % 8 == 0 &&
           linear_project_cuda_takes(tail_.p, tail_.also);
  }

  std::tuple<Tensor, Tensor> run(const Check& check, CUstream_st* stream) {
    const Tensor& like = in_.hidden;
    const Tensor latent = torch::stable::new_empty(like, {d_.tokens, d_.R + d_.E});
    const Tensor q = torch::stable::new_empty(like, {d_.tokens, d_.H * d_.q_dim});
    Tensor c_q = q;
    if (in_.q_a_weight) c_q = torch::stable::new_empty(like, {d_.tokens, d_.rank_q});
    head_.p.y = c_q.data_ptr(), head_.also.y = latent.data_ptr();
    check.status(launch(head_, stream));
    if (in_.q_a_weight) {
      tail_.p.x = c_q.data_ptr(), tail_.p.y = q.data_ptr();
      check.status(launch(tail_, stream));
    }
    return {q, latent};
  }

 private:
  struct Launch {
    LinearDecodeParams p{};
    LinearProjection also{};
  };

  static void set_weight(LinearDecodeParams& p, const Tensor& weight) {
    p.weight = weight.data_ptr(), p.weight_stride = weight.stride(0);
    p.outputs = weight.size(0);
  }
  void set_norm(LinearDecodeParams& p, const OptTensor& weight) const {
    p.norm_weight = weight ? weight->data_ptr() : nullptr;
    p.norm_weight_dtype =
        weight && weight->scalar_type() == ScalarType::Float ? DType::kFloat32 : d_.dtype;
  }
  Status launch(Launch& of, CUstream_st* stream) const {
    Tensor h = in_.hidden;
    if (linear_decode_cuda_needs_h(of.p)) {
      h = torch::stable::new_empty(in_.hidden, {of.p.rows, of.p.K});
      of.p.h = h.data_ptr();
    }
    return linear_project_sm90(of.p, of.also, stream);
  }

  const MlaProjectInputs& in_;
  const MlaProjectDims& d_;
  Launch head_, tail_;
};

struct CudaDevice {
  static constexpr bool kInPlace = true;
  CUstream_st* stream;

  static int64_t norm_partials(int64_t rows) { return rms_norm_backward_ctas(rows); }
  Status norm(const RmsNormParams& p) const { return rms_norm_cuda(p, stream); }
  Status norm_backward(const RmsNormBackwardParams& p) const {
    return rms_norm_backward_cuda(p, stream);
  }
  std::optional<std::tuple<Tensor, Tensor>> project(const Check& check, const MlaProjectInputs& in,
                                                    const MlaProjectDims& d,
                                                    const MlaProjectParams& p,
                                                    const Tensor& x) const {
    if (p.cache == nullptr || in.input_norm_weight == nullptr || d.tokens == 0) return std::nullopt;
    FewTokens few(in, d, p, x);
    if (!few.are_taken()) return std::nullopt;
    return few.run(check, stream);
  }
  Status rotate(const MlaProjectParams& p) const { return mla_project_cuda(p, stream); }
  Status unrotate(const MlaProjectBackwardParams& p) const {
    return mla_project_backward_cuda(p, stream);
  }
  static void check_positions(const Check&, const RopeTable&, const MlaProjectDims&) {}
};

std::tuple<Tensor, Tensor> mla_project_op(const Tensor& hidden, const OptTensor& q_a_weight,
                                          const Tensor& q_b_weight, const Tensor& kv_a_weight,
                                          const Tensor& cos, const Tensor& sin,
                                          const Tensor& positions, int64_t num_heads,
                                          const OptTensor& q_a_norm_weight,
                                          const OptTensor& kv_a_norm_weight, double norm_eps) {
  const CudaScope scope(hidden);
  const Check check("mla_project");
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  return MlaProducts(check, in, CudaDevice{scope.stream()}).forward(nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> mla_project_training_op(
    const Tensor& hidden, const Tensor& q_a, const Tensor& q_b_weight, const Tensor& kv_a_weight,
    const Tensor& cos, const Tensor& sin, const Tensor& positions, int64_t num_heads,
    const OptTensor& q_a_norm_weight, const OptTensor& kv_a_norm_weight, double norm_eps) {
  const CudaScope scope(hidden);
  const Check check("mla_project");
  const OptTensor q_a_weight(q_a);
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  Tensor c_q = hidden;
  const auto [q, latent] =
      MlaProducts(check, in, CudaDevice{scope.stream()}).forward(nullptr, nullptr, &c_q);
  return {q, latent, c_q};
}

std::tuple<Tensor, Tensor> mla_project_append_op(
    const Tensor& hidden, const OptTensor& q_a_weight, const Tensor& q_b_weight,
    const Tensor& kv_a_weight, const Tensor& cos, const Tensor& sin, const Tensor& positions,
    int64_t num_heads, Tensor cache, const Tensor& slot_mapping, const OptTensor& q_a_norm_weight,
    const OptTensor& kv_a_norm_weight, double norm_eps, const OptTensor& input_norm_weight,
    double input_norm_eps) {
  const CudaScope scope(hidden);
  const Check check("mla_project_append");
  const MlaProjectInputs in{
      hidden,   q_a_weight,         q_b_weight,    kv_a_weight,     cos,
      sin,      positions,          num_heads,     q_a_norm_weight, kv_a_norm_weight,
      norm_eps, &input_norm_weight, input_norm_eps};
  return MlaProducts(check, in, CudaDevice{scope.stream()}).forward(&cache, &slot_mapping);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mla_project_backward_op(
    const Tensor& dq, const Tensor& dlatent, const Tensor& hidden, const OptTensor& q_a_weight,
    const Tensor& q_b_weight, const Tensor& kv_a_weight, const Tensor& cos, const Tensor& sin,
    const Tensor& positions, int64_t num_heads, const OptTensor& q_a_norm_weight,
    const OptTensor& kv_a_norm_weight, double norm_eps, const OptTensor& c_q) {
  const CudaScope scope(hidden);
  const Check check("mla_project_backward");
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  return MlaProducts(check, in, CudaDevice{scope.stream()}).backward(dq, dlatent, c_q);
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("mla_project", TORCH_BOX(&zebra::mla_project_op));
  m.impl("mla_project_training", TORCH_BOX(&zebra::mla_project_training_op));
  m.impl("mla_project_append", TORCH_BOX(&zebra::mla_project_append_op));
  m.impl("mla_project_backward", TORCH_BOX(&zebra::mla_project_backward_op));
}
