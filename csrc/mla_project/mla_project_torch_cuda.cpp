#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include "mla_project/mla_project_torch_products.h"

namespace zebra {
namespace {

struct CudaDevice {
  static constexpr bool kInPlace = true;
  CUstream_st* stream;

  static int64_t norm_partials(int64_t rows) { return rms_norm_backward_ctas(rows); }
  Status norm(const RmsNormParams& p) const { return rms_norm_cuda(p, stream); }
  Status norm_backward(const RmsNormBackwardParams& p) const {
    return rms_norm_backward_cuda(p, stream);
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

std::tuple<Tensor, Tensor> mla_project_append_op(
    const Tensor& hidden, const OptTensor& q_a_weight, const Tensor& q_b_weight,
    const Tensor& kv_a_weight, const Tensor& cos, const Tensor& sin, const Tensor& positions,
    int64_t num_heads, Tensor cache, const Tensor& slot_mapping, const OptTensor& q_a_norm_weight,
    const OptTensor& kv_a_norm_weight, double norm_eps) {
  const CudaScope scope(hidden);
  const Check check("mla_project_append");
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  return MlaProducts(check, in, CudaDevice{scope.stream()}).forward(&cache, &slot_mapping);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mla_project_backward_op(
    const Tensor& dq, const Tensor& dlatent, const Tensor& hidden, const OptTensor& q_a_weight,
    const Tensor& q_b_weight, const Tensor& kv_a_weight, const Tensor& cos, const Tensor& sin,
    const Tensor& positions, int64_t num_heads, const OptTensor& q_a_norm_weight,
    const OptTensor& kv_a_norm_weight, double norm_eps) {
  const CudaScope scope(hidden);
  const Check check("mla_project_backward");
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  return MlaProducts(check, in, CudaDevice{scope.stream()}).backward(dq, dlatent);
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("mla_project", TORCH_BOX(&zebra::mla_project_op));
  m.impl("mla_project_append", TORCH_BOX(&zebra::mla_project_append_op));
  m.impl("mla_project_backward", TORCH_BOX(&zebra::mla_project_backward_op));
}
