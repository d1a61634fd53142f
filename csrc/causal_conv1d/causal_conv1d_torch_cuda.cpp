#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include "causal_conv1d/causal_conv1d_torch.h"

namespace zebra {
namespace {

auto causal_conv1d_op(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                      const OptTensor& initial_state, const OptTensor& cu_seqlens,
                      const std::string& activation) {
  const CudaScope scope(x);
  return causal_conv1d_torch(
      x, weight, bias, initial_state, cu_seqlens, activation,
      [&](const CausalConv1dParams& p) { return causal_conv1d_cuda(p, scope.stream()); });
}

auto causal_conv1d_backward_op(const Tensor& dy, const OptTensor& dfinal_state, const Tensor& x,
                               const Tensor& weight, const OptTensor& bias,
                               const OptTensor& initial_state, const OptTensor& cu_seqlens,
                               const std::string& activation) {
  const CudaScope scope(x);
  const int bytes = x.scalar_type() == ScalarType::Float ? 4 : 2;
  return causal_conv1d_backward_torch(
      dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, activation,
      [bytes](int64_t batch, int64_t tokens, int64_t channels) {
        return select_causal_conv1d_backward_config(batch, tokens, channels, bytes, true);
      },
      [&](const CausalConv1dBackwardParams& p) {
        return causal_conv1d_backward_cuda(p, scope.stream());
      });
}

auto causal_conv1d_step_op(const Tensor& x, Tensor conv_state, const Tensor& weight,
                           const OptTensor& bias, const std::string& activation,
                           const OptTensor& state_indices) {
  const CudaScope scope(x);
  return causal_conv1d_step_torch(
      x, conv_state, weight, bias, activation, state_indices,
      [&](const CausalConv1dStepParams& p) { return causal_conv1d_step_cuda(p, scope.stream()); });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("causal_conv1d", TORCH_BOX(&zebra::causal_conv1d_op));
  m.impl("causal_conv1d_backward", TORCH_BOX(&zebra::causal_conv1d_backward_op));
  m.impl("causal_conv1d_step", TORCH_BOX(&zebra::causal_conv1d_step_op));
}
