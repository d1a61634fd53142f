#include <torch/csrc/stable/library.h>

#include "rms_norm/rms_norm_torch.h"

namespace zebra {
namespace {

auto rms_norm_op(const Tensor& x, const Tensor& weight, const OptTensor& residual, double eps) {
  return rms_norm_torch(x, weight, residual, eps, [](const RmsNormParams& p) {
    rms_norm_cpu(p);
    return Status{};
  });
}

auto rms_norm_backward_op(const Tensor& dy, const OptTensor& dsum, const Tensor& sum,
                          const Tensor& weight, const Tensor& rstd) {
  return rms_norm_backward_torch(dy, dsum, sum, weight, rstd, kRmsNormCpuPartials,
                                 [](const RmsNormBackwardParams& p) {
                                   rms_norm_backward_cpu(p);
                                   return Status{};
                                 });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&zebra::rms_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&zebra::rms_norm_backward_op));
}
