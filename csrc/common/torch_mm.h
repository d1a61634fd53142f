// ATen's matrix product into memory that exists already.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace zebra {

// out = a b.  The out form, because ATen would allocate (and fault in) every product anew, and
// because autocast leaves it alone.
inline void matmul_into(const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                        const torch::stable::Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // takes the result's reference
}

inline torch::stable::Tensor transposed(torch::stable::Tensor t) {
  return torch::stable::transpose(t, 0, 1);
}

}  // namespace zebra
