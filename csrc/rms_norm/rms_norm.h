// rms_norm: y = w * s * rstd, s = x + residual, rstd = 1 / sqrt(mean(s^2) + eps); and its backward.
// The contract between registrations and kernels: pointers, shapes, strides in elements.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/status.h"

struct CUstream_st;

namespace zebra {

struct RmsNormParams {
  const void* x;         // [rows, dim], row stride x_stride
  const void* residual;  // [rows, dim], row stride residual_stride; or nullptr
  const void* weight;    // [dim] of weight_dtype
  void* y;               // [rows, dim] contiguous
  void* sum;             // [rows, dim] contiguous: x + residual; nullptr without a residual
  void* rstd;            // [rows] fp32 (fp64 for fp64 x)
  std::int64_t rows, dim;
  std::int64_t x_stride, residual_stride;
  DType dtype, weight_dtype;
  double eps;
};

// dx = rstd * (w dy - s rstd^2 mean(w dy s)) + dsum,   dw = sum_rows dy s rstd
struct RmsNormBackwardParams {
  const void* dy;    // [rows, dim], row stride dy_stride
  const void* dsum;  // [rows, dim] contiguous, or nullptr
  const void* sum;   // [rows, dim], row stride sum_stride
  const void* weight;
  const void* rstd;  // [rows]
  void* dx;          // [rows, dim] contiguous
  void* dweight;     // [dim] of weight_dtype
  void* partial;     // [partials, dim] fp32 (fp64): workspace of the weight gradient
  std::int64_t rows, dim, partials;
  std::int64_t dy_stride, sum_stride;
  DType dtype, weight_dtype;
};

// How many row groups the weight gradient is summed over before the final fixed-order sum.  It
// depends on shapes only, so results do not depend on the number of threads or multiprocessors.
constexpr std::int64_t kRmsNormCpuPartials = 32;
constexpr std::int64_t rms_norm_backward_ctas(std::int64_t rows) {  // the same of the CUDA kernel
  return rows < 1 ? 1 : (rows < 256 ? rows : 256);
}

Status rms_norm_cuda(const RmsNormParams& p, CUstream_st* stream);
Status rms_norm_backward_cuda(const RmsNormBackwardParams& p, CUstream_st* stream);

}  // namespace zebra

ZEBRA_CPU_KERNEL(rms_norm, ::zebra::RmsNormParams)
ZEBRA_CPU_KERNEL(rms_norm_backward, ::zebra::RmsNormBackwardParams)
