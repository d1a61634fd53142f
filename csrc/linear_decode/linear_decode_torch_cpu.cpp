#include <torch/csrc/stable/library.h>

#include "linear_decode/linear_decode_torch.h"

namespace zebra {
namespace {

// Above this many rows the arithmetic costs more than reading the weight, and ATen's matrix product
// is faster than streaming in fp32: soonest in bf16, for which it has the CPU's matrix units
// (measured at 2048 x 2048 and 4096 x 14336 on an AVX-512 machine with AMX).
int64_t most_streamed_rows(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 4;
    case DType::kFloat16:
      return 8;
    default:
      return 16;
  }
}

// Up to this many bf16 rows our own product on the matrix unit, which reads the weight as it lies,
// is faster than ATen's.
constexpr int64_t kMostMatrixUnitRows = 64;

Tensor linear_decode_op(const Tensor& x, const Tensor& weight, const OptTensor& norm_weight,
                        const OptTensor& bias, const OptTensor& residual,
                        const std::string& activation, double norm_eps,
                        const OptTensor& up_weight) {
  const auto launch = [&](const LinearDecodeParams& p, const Tensor& rows, const Tensor& y) {
    if (p.rows <= most_streamed_rows(p.dtype)) {
      linear_decode_cpu(p);
      return Status{};
    }
    if (p.dtype == DType::kBFloat16 && p.rows <= kMostMatrixUnitRows && cpu_has_amx_bf16()) {
      LinearDecodeParams amx = p;
      amx.use_amx = true;
      linear_decode_cpu(amx);
      return Status{};
    }
    Tensor h = rows;
    if (norm_weight) {
      h = torch::stable::new_empty(rows, {p.rows, p.K});
      linear_decode_norm_cpu({p, h.data_ptr(), nullptr});
    }
    const Tensor products = linear_decode_products(p, h, weight, up_weight, y);
    if (products.data_ptr() != y.data_ptr())
      linear_decode_epilogue_cpu({p, nullptr, products.data_ptr()});
    return Status{};
  };
  return linear_decode_torch(x, weight, norm_weight, bias, residual, activation, norm_eps,
                             up_weight, launch);
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("linear_decode", TORCH_BOX(&zebra::linear_decode_op));
}
