// What linear_decode's driver computes: cases, their data, what is expected of them, and what is
// wrong with a result.
#pragma once

#include <cmath>

#include "driver.h"
#include "linear_decode/linear_decode.h"

namespace zebra::native {

struct Case {
  long rows, outputs, K;
  bool swiglu;
  int norm;  // 0: none; 1: a weight of x's dtype; 2: of fp32
  bool bias, residual, bf16;
  long weight_pad, x_pad;  // elements between rows
  int up = 0;  // swiglu: the up rows follow the gate rows; 1, 2: lie apart, above, below
};

inline std::string describe(const Case& c, const char* route) {
  char text[256];
  std::snprintf(
      text, sizeof(text),
      "%s, %ld rows, N %ld, K %ld, swiglu %d (up rows %d), norm %d, bias %d, residual %d, "
      "%s, pads of W %ld, x %ld",
      route, c.rows, c.outputs, c.K, c.swiglu, c.up, c.norm, c.bias, c.residual,
      c.bf16 ? "bf16" : "fp16", c.weight_pad, c.x_pad);
  return text;
}

// A warp an output, in fp64.
template <typename T>
__global__ void expected_kernel(LinearDecodeParams p, double* y) {
  const long n = blockIdx.x, m = blockIdx.y;
  const T* const x = static_cast<const T*>(p.x) + m * p.x_stride;
  const T* const w = static_cast<const T*>(p.weight) + n * p.weight_stride;
  const T* const up = static_cast<const T*>(p.up_weight) + n * p.weight_stride;
  double squares = 0, sum = 0, up_sum = 0;
  for (long k = threadIdx.x; k < p.K; k += 32) {
    const double v = to_float(x[k]);
    double gain = 1;
    if (p.norm_weight != nullptr)
      gain = p.norm_weight_dtype == DType::kFloat32
                 ? static_cast<const float*>(p.norm_weight)[k]
                 : to_float(static_cast<const T*>(p.norm_weight)[k]);
    squares += v * v;
    sum += gain * v * to_float(w[k]);
    if (p.swiglu) up_sum += gain * v * to_float(up[k]);
  }
  for (int lane = 16; lane > 0; lane /= 2) {
    squares += __shfl_xor_sync(~0u, squares, lane);
    sum += __shfl_xor_sync(~0u, sum, lane);
    up_sum += __shfl_xor_sync(~0u, up_sum, lane);
  }
  if (threadIdx.x != 0) return;
  const double scale =
      p.norm_weight == nullptr ? 1 : 1 / sqrt(squares / static_cast<double>(p.K) + p.norm_eps);
  sum *= scale, up_sum *= scale;
  if (p.bias != nullptr) {
    sum += to_float(static_cast<const T*>(p.bias)[n]);
    if (p.swiglu) up_sum += to_float(static_cast<const T*>(p.bias)[p.outputs + n]);
  }
  if (p.swiglu) sum = sum / (1 + exp(-sum)) * up_sum;
  if (p.residual != nullptr)
    sum += to_float(static_cast<const T*>(p.residual)[m * p.residual_stride + n]);
  y[m * p.outputs + n] = sum;
}

constexpr long kGuard = 512;  // elements before and after y that must stay as they are

template <typename T>
struct Problem {
  LinearDecodeParams p;
  T* guarded;  // y with its guards
  std::size_t guarded_size;
  std::vector<double> expected;
};

template <typename T>
Problem<T> make_problem(Arena& arena, const Case& c) {
  arena.release(0);
  const long weight_rows = c.swiglu ? 2 * c.outputs : c.outputs;
  Problem<T> made = {};
  LinearDecodeParams& p = made.p;
  p.rows = c.rows, p.outputs = c.outputs, p.K = c.K, p.swiglu = c.swiglu, p.norm_eps = 1e-5;
  p.x_stride = c.K + c.x_pad, p.weight_stride = c.K + c.weight_pad, p.residual_stride = c.outputs;
  p.dtype = c.bf16 ? DType::kBFloat16 : DType::kFloat16;
  p.norm_weight_dtype = c.norm == 2 ? DType::kFloat32 : p.dtype;
  const auto seed = static_cast<unsigned>(c.rows * 7 + c.outputs * 13 + c.K);

  const float small = 1.f / std::sqrt(static_cast<float>(c.K));
  T* const weight = arena.take<T>((c.up == 0 ? weight_rows : c.outputs) * p.weight_stride);
  p.weight = weight;
  if (c.up == 0) {
    fill(weight, weight_rows, c.K, p.weight_stride, small, 0.f, seed);
    p.up_weight = c.swiglu ? weight + c.outputs * p.weight_stride : nullptr;
  } else {  // poison between and behind them
    T* const other = arena.take<T>(c.outputs * p.weight_stride);
    fill(weight, c.outputs, c.K, p.weight_stride, small, 0.f, seed);
    fill(other, c.outputs, c.K, p.weight_stride, small, 0.f, seed + 9);
    p.weight = c.up == 1 ? weight : other, p.up_weight = c.up == 1 ? other : weight;
  }
  T* const x = arena.take<T>(c.rows * p.x_stride);
  fill(x, c.rows, c.K, p.x_stride, 1.f, 0.f, seed + 1);
  p.x = x;
  if (c.bias) {
    T* const bias = arena.take<T>(weight_rows);
    fill(bias, 1, weight_rows, weight_rows, 1.f, 0.f, seed + 2);
    p.bias = bias;
  }
  if (c.residual) {
    T* const residual = arena.take<T>(c.rows * c.outputs);
    fill(residual, c.rows, c.outputs, c.outputs, 1.f, 0.f, seed + 3);
    p.residual = residual;
  }
  if (c.norm == 1) {
    T* const gain = arena.take<T>(c.K);
    fill(gain, 1, c.K, c.K, 0.1f, 1.f, seed + 4);
    p.norm_weight = gain;
  } else if (c.norm == 2) {
    float* const gain = arena.take<float>(c.K);
    fill(gain, 1, c.K, c.K, 0.1f, 1.f, seed + 4);
    p.norm_weight = gain;
  }
  p.h = arena.take<T>(c.rows * c.K);
  made.guarded_size = c.rows * c.outputs + 2 * kGuard;
  made.guarded = arena.take<T>(made.guarded_size);
  p.y = made.guarded + kGuard;

  double* const expected = arena.take<double>(c.rows * c.outputs);
  expected_kernel<T>
      <<<dim3(static_cast<unsigned>(c.outputs), static_cast<unsigned>(c.rows)), 32>>>(p, expected);
  CUDA_OK(cudaGetLastError());
  made.expected = to_host(expected, c.rows * c.outputs);
  return made;
}

// Empty: y is right.  Otherwise what is wrong, and where.
template <typename T>
std::string find_errors(const Problem<T>& problem, const std::vector<T>& got) {
  const bool bf16 = problem.p.dtype == DType::kBFloat16;
  // Of the root mean square of y, and of one element: rounding of norm(x), of y, and the sums.
  const double most_rms = bf16 ? 8e-3 : 1.2e-3, most_one = bf16 ? 0.04 : 0.006;
  const long outputs = problem.p.outputs, count = problem.p.rows * outputs;
  const std::vector<double>& want = problem.expected;
  double scale = 0;
  for (const double v : want) scale += std::isnan(v) ? 0 : v * v;
  scale = std::max(scale, 0.25 * static_cast<double>(count));
  const double rms = std::sqrt(scale / static_cast<double>(count));
  const auto value = [&](long i) {
    return static_cast<double>(static_cast<float>(got[kGuard + i]));
  };
  const auto is_bad = [&](long i) {
    if (std::isnan(want[i])) return !std::isnan(value(i));
    return !(std::fabs(value(i) - want[i]) <= most_one * (std::fabs(want[i]) + rms));
  };
  double squares = 0;
  long bad = 0, nans = 0, guards = 0, first = -1;
  for (long i = 0; i < count; ++i) {
    const double error = std::isnan(want[i]) ? 0 : value(i) - want[i];
    if (std::isnan(error))
      ++nans;
    else
      squares += error * error;
    if (!is_bad(i)) continue;
    if (bad++ == 0) first = i;
  }
  for (long i = 0; i < kGuard; ++i)
    for (const long at : {i, kGuard + count + i}) {
      std::uint16_t bits;
      std::memcpy(&bits, &got[at], 2);
      guards += bits != 0xffff;
    }
  const double error = std::sqrt(squares / scale);
  if (bad == 0 && error < most_rms && guards == 0) return "";

  char text[256];
  std::snprintf(text, sizeof(text),
                "relative error %.2e (at most %.1e), %ld bad of %ld, %ld NaN, %ld elements written "
                "outside\n",
                error, most_rms, bad, count, nans, guards);
  std::string report = text;
  if (bad == 0) return report;
  std::snprintf(text, sizeof(text),
                "  first bad [token %ld, output %ld]; got / expected from there:", first / outputs,
                first % outputs);
  report += text;
  for (long i = first; i < std::min(first + 6, count); ++i) {
    std::snprintf(text, sizeof(text), " %g / %g", value(i), want[i]);
    report += text;
  }
  report += "\n  bad outputs of that token:";
  const long from = first / outputs * outputs;
  int shown = 0;
  for (long n = 0; n < outputs && shown < 24; ++n)
    if (is_bad(from + n)) report += " " + std::to_string(n), ++shown;
  report += "\n  bad by token:";
  for (long m = 0; m < problem.p.rows; ++m) {
    long of_token = 0;
    for (long n = 0; n < outputs; ++n) of_token += is_bad(m * outputs + n);
    if (of_token > 0) report += " " + std::to_string(m) + ":" + std::to_string(of_token);
  }
  return report + "\n";
}

}  // namespace zebra::native
