#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include "mamba2_step/mamba2_step_torch.h"

namespace zebra {
namespace {

Tensor mamba2_step_op(const Tensor& zxbcdt, const Tensor& conv_state, const Tensor& ssm_state,
                      const Tensor& conv_weight, const OptTensor& conv_bias, const Tensor& dt_bias,
                      const Tensor& A, const Tensor& D, const OptTensor& norm_weight,
                      int64_t n_groups, const OptTensor& state_indices, double norm_eps,
                      bool A_is_log) {
  const CudaScope scope(zxbcdt);
  return mamba2_step_torch(
      zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, n_groups,
      state_indices, norm_eps, A_is_log, [](const Check&, int64_t) {},
      [&](Mamba2StepParams p) {
        const int64_t channels = conv_state.size(1);
        const Tensor conv =
            torch::stable::new_empty(zxbcdt, {p.batch, channels}, ScalarType::Float);
        p.conv = static_cast<float*>(conv.data_ptr());
        return mamba2_step_cuda(p, scope.stream());
      });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("mamba2_step", TORCH_BOX(&zebra::mamba2_step_op));
}
