#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "linear_decode/linear_decode_torch.h"

namespace zebra {
namespace {

Tensor composite(const Tensor& x, const Tensor& weight, const OptTensor& norm_weight,
                 const OptTensor& bias, const OptTensor& residual, const std::string& activation,
                 double norm_eps, const OptTensor& up_weight) {
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{from(x),        from(weight),   from(norm_weight),
                                    from(bias),     from(residual), from(activation),
                                    from(norm_eps), from(up_weight)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("zebra::_linear_decode_composite", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear_decode_op(const Tensor& x, const Tensor& weight, const OptTensor& norm_weight,
                        const OptTensor& bias, const OptTensor& residual,
                        const std::string& activation, double norm_eps,
                        const OptTensor& up_weight) {
  const CudaScope scope(x);
  bool is_taken = true;
  // Checks everything first: a message from below would not survive the dispatcher.
  const Tensor y =
      linear_decode_torch(x, weight, norm_weight, bias, residual, activation, norm_eps, up_weight,
                          [&](LinearDecodeParams p, const Tensor& in, const Tensor&) {
                            is_taken = p.dtype != DType::kFloat32 && p.rows <= kLinearCudaRows;
                            if (!is_taken) return Status{};
                            Tensor h = in;
                            if (linear_decode_cuda_needs_h(p)) {
                              h = torch::stable::new_empty(in, {p.rows, p.K});
                              p.h = h.data_ptr();
                            }
                            return linear_decode_cuda(p, scope.stream());
                          });
  if (is_taken) return y;
  return composite(x, weight, norm_weight, bias, residual, activation, norm_eps, up_weight);
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("linear_decode", TORCH_BOX(&zebra::linear_decode_op));
}
