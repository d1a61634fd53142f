#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include "rms_norm/rms_norm_torch.h"

namespace zebra {
namespace {

auto rms_norm_op(const Tensor& x, const Tensor& weight, const OptTensor& residual, double eps) {
  const CudaScope scope(x);
  return rms_norm_torch(x, weight, residual, eps,
                        [&](const RmsNormParams& p) { return rms_norm_cuda(p, scope.stream()); });
}

auto rms_norm_backward_op(const Tensor& dy, const OptTensor& dsum, const Tensor& sum,
                          const Tensor& weight, const Tensor& rstd) {
  const CudaScope scope(sum);
  const int64_t dim = sum.size(sum.dim() - 1), rows = dim == 0 ? 0 : sum.numel() / dim;
  return rms_norm_backward_torch(
      dy, dsum, sum, weight, rstd, rms_norm_backward_ctas(rows),
      [&](const RmsNormBackwardParams& p) { return rms_norm_backward_cuda(p, scope.stream()); });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&zebra::rms_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&zebra::rms_norm_backward_op));
}
