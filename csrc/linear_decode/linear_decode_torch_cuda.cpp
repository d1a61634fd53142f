#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include "linear_decode/linear_decode_torch.h"
#include "rms_norm/rms_norm.h"

namespace zebra {
namespace {

Tensor linear_decode_op(const Tensor& x, const Tensor& weight, const OptTensor& norm_weight,
                        const OptTensor& bias, const OptTensor& residual,
                        const std::string& activation, double norm_eps,
                        const OptTensor& up_weight) {
  const CudaScope scope(x);
  const auto launch = [&](LinearDecodeParams p, const Tensor& rows, const Tensor& y) {
    if (linear_decode_cuda_takes(p)) {
      Tensor h = rows;
      if (linear_decode_cuda_needs_h(p)) {
        h = torch::stable::new_empty(rows, {p.rows, p.K});
        p.h = h.data_ptr();
      }
      return linear_decode_sm90(p, scope.stream());
    }
    Tensor h = rows;
    if (norm_weight) {
      h = torch::stable::new_empty(rows, {p.rows, p.K});
      const Tensor rstd = torch::stable::new_empty(rows, {p.rows}, acc_dtype(rows));
      const Status s =
          rms_norm_cuda({p.x, nullptr, p.norm_weight, h.data_ptr(), nullptr, rstd.data_ptr(),
                         p.rows, p.K, p.x_stride, 0, p.dtype, p.norm_weight_dtype, p.norm_eps},
                        scope.stream());
      if (s.error != nullptr) return s;
    }
    const Tensor products = linear_decode_products(p, h, weight, up_weight, y);
    if (products.data_ptr() == y.data_ptr()) return Status{};
    return linear_decode_epilogue_cuda({p, nullptr, products.data_ptr()}, scope.stream());
  };
  return linear_decode_torch(x, weight, norm_weight, bias, residual, activation, norm_eps,
                             up_weight, launch);
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("linear_decode", TORCH_BOX(&zebra::linear_decode_op));
}
