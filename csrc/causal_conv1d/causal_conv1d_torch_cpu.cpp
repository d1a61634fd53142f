#include <torch/csrc/stable/library.h>

#include "causal_conv1d/causal_conv1d_torch.h"

namespace zebra {
namespace {

auto causal_conv1d_op(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                      const OptTensor& initial_state, const OptTensor& cu_seqlens,
                      const std::string& activation) {
  return causal_conv1d_torch(x, weight, bias, initial_state, cu_seqlens, activation,
                             [](const CausalConv1dParams& p) {
                               causal_conv1d_cpu(p);
                               return Status{};
                             });
}

auto causal_conv1d_backward_op(const Tensor& dy, const OptTensor& dfinal_state, const Tensor& x,
                               const Tensor& weight, const OptTensor& bias,
                               const OptTensor& initial_state, const OptTensor& cu_seqlens,
                               const std::string& activation) {
  return causal_conv1d_backward_torch(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens,
                                      activation, select_causal_conv1d_cpu_backward_config,
                                      [](const CausalConv1dBackwardParams& p) {
                                        causal_conv1d_backward_cpu(p);
                                        return Status{};
                                      });
}

auto causal_conv1d_step_op(const Tensor& x, Tensor conv_state, const Tensor& weight,
                           const OptTensor& bias, const std::string& activation,
                           const OptTensor& state_indices) {
  return causal_conv1d_step_torch(x, conv_state, weight, bias, activation, state_indices,
                                  [](const CausalConv1dStepParams& p) {
                                    causal_conv1d_step_cpu(p);
                                    return Status{};
                                  });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&zebra::causal_conv1d_op));
  m.impl("causal_conv1d_backward", TORCH_BOX(&zebra::causal_conv1d_backward_op));
  m.impl("causal_conv1d_step", TORCH_BOX(&zebra::causal_conv1d_step_op));
}
