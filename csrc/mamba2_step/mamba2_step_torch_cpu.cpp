#include <torch/csrc/stable/library.h>

#include <vector>

#include "mamba2_step/mamba2_step_torch.h"

namespace zebra {
namespace {

template <typename T>
void check_decay(const Check& check, const Tensor& A) {
  const T* a = static_cast<const T*>(A.data_ptr());
  for (int64_t h = 0; h < A.size(0); ++h)
    if (a[h] > 0)
      check.that(false, "A", std::to_string(a[h]) + " at head " + std::to_string(h),
                 "<= 0 (the state decays by exp(A d))");
}

void check_slots(const Check& check, const Tensor& indices, int64_t slots) {
  const auto* slot = static_cast<const std::int32_t*>(indices.data_ptr());
  std::vector<bool> taken(static_cast<size_t>(slots));
  for (int64_t b = 0; b < indices.size(0); ++b) {
    if (slot[b] < 0) continue;
    const auto got = [&] { return std::to_string(slot[b]) + " in row " + std::to_string(b); };
    if (slot[b] >= slots) check.that(false, "state_indices", got(), "less than slots = ", slots);
    if (taken[static_cast<size_t>(slot[b])])
      check.that(false, "state_indices", got() + " for the second time",
                 "distinct (a slot holds the state of one row)");
    taken[static_cast<size_t>(slot[b])] = true;
  }
}

Tensor mamba2_step_op(const Tensor& zxbcdt, const Tensor& conv_state, const Tensor& ssm_state,
                      const Tensor& conv_weight, const OptTensor& conv_bias, const Tensor& dt_bias,
                      const Tensor& A, const Tensor& D, const OptTensor& norm_weight,
                      int64_t n_groups, const OptTensor& state_indices, double norm_eps,
                      bool A_is_log) {
  const auto validate = [&](const Check& check, int64_t slots) {
    if (!A_is_log && A.scalar_type() == ScalarType::Double)
      check_decay<double>(check, A);
    else if (!A_is_log)
      check_decay<float>(check, A);
    if (state_indices) check_slots(check, *state_indices, slots);
  };
  return mamba2_step_torch(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D,
                           norm_weight, n_groups, state_indices, norm_eps, A_is_log, validate,
                           [](const Mamba2StepParams& p) {
                             mamba2_step_cpu(p);
                             return Status{};
                           });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("mamba2_step", TORCH_BOX(&zebra::mamba2_step_op));
}
