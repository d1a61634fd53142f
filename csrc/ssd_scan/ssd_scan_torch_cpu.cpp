#include <torch/csrc/stable/library.h>

#include "ssd_scan/ssd_scan_torch.h"

namespace zebra {
namespace {

auto ssd_scan_op(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                 const Tensor& C, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias,
                 const OptTensor& norm_weight, const OptTensor& initial_state,
                 const OptTensor& cu_seqlens, bool dt_softplus, double norm_eps) {
  return ssd_scan_torch({x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state, cu_seqlens},
                        dt_softplus, norm_eps, ssd_scan_cpu);
}

auto ssd_scan_backward_op(const Tensor& dy, const OptTensor& dfinal_state, const Tensor& x,
                          const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                          const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias,
                          const OptTensor& norm_weight, const OptTensor& initial_state,
                          const OptTensor& cu_seqlens, bool dt_softplus, double norm_eps) {
  return ssd_scan_backward_torch(
      dy, dfinal_state, {x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state, cu_seqlens},
      dt_softplus, norm_eps, ssd_scan_backward_cpu);
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("ssd_scan", TORCH_BOX(&zebra::ssd_scan_op));
  m.impl("ssd_scan_backward", TORCH_BOX(&zebra::ssd_scan_backward_op));
}
