// What CPU kernels share: element conversion and elementary functions that the compiler vectorises.
//
// Kernels convert rows to the accumulation type once (load_row), compute in it, and convert back
// (store_row).  bf16 and fp16 accumulate in fp32, fp64 in fp64.  Loops over `#pragma omp simd`
// vectorise under -fopenmp-simd without giving up NaN and infinity as -ffast-math would.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

// Also where the compiler would rather call: registers stay registers.
#define ZEBRA_INLINE __attribute__((always_inline)) static inline

namespace zebra::ZEBRA_ISA {

struct BFloat16 {
  std::uint16_t bits;
};
using Half = _Float16;

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

static inline float to_acc(BFloat16 v) {
  const std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
static inline float to_acc(Half v) { return static_cast<float>(v); }
static inline float to_acc(float v) { return v; }
static inline double to_acc(double v) { return v; }

template <typename T>
static inline T from_acc(Acc<T> v) {
  return static_cast<T>(v);
}
template <>
inline BFloat16 from_acc<BFloat16>(float v) {  // round to nearest even; a NaN stays a (quiet) NaN
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <typename T>
static inline void load_row(const T* __restrict src, Acc<T>* __restrict dst, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dst[i] = to_acc(src[i]);
}

template <typename T>
static inline void store_row(const Acc<T>* __restrict src, T* __restrict dst, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dst[i] = from_acc<T>(src[i]);
}

// exp for fp32, about 1 ulp, branch-free so that loops over it vectorise: 2^k * p(r) with
// r = x - k ln 2 in [-ln2/2, ln2/2].  Below -87.3 the result is 0, above 88.7 infinity; NaN stays
// NaN.
static inline float fast_exp(float x) {
  const float clamped = x < -87.33654f ? -87.33654f : (x > 88.72283f ? 88.72283f : x);
  const float k = std::floor(clamped * 1.44269504f + 0.5f);
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Two factors, because 2^128 alone does not fit.
  const std::int32_t ki = static_cast<std::int32_t>(k), half = ki / 2;
  const std::int32_t lo = (half + 127) << 23, hi = (ki - half + 127) << 23;
  float flo, fhi;
  std::memcpy(&flo, &lo, sizeof flo);
  std::memcpy(&fhi, &hi, sizeof fhi);
  const float y = p * flo * fhi;
  const float under = x < -87.33654f ? 0.0f : y;
  const float over = x > 88.72283f ? HUGE_VALF : under;
  return x != x ? x : over;
}
static inline double fast_exp(double x) { return std::exp(x); }

template <typename A>
static inline A sigmoid(A x) {
  return A(1) / (A(1) + fast_exp(-x));
}

template <typename A>
static inline A silu(A x) {
  return x * sigmoid(x);
}

// d silu(x) / dx
template <typename A>
static inline A silu_grad(A x) {
  const A s = sigmoid(x);
  return s * (A(1) + x * (A(1) - s));
}

// log(1 + exp(x)) without overflow, and without losing small results: log1p of the small side.
template <typename A>
static inline A softplus(A x) {
  const A small = std::log1p(std::exp(-std::fabs(x)));
  return x > A(0) ? x + small : small;
}

}  // namespace zebra::ZEBRA_ISA

// Calls FN<T>(args...) with the element type of DTYPE.
#define ZEBRA_DISPATCH_CPU(DTYPE, FN, ...) \
  switch (DTYPE) {                         \
    case ::zebra::DType::kFloat32:         \
      return FN<float>(__VA_ARGS__);       \
    case ::zebra::DType::kFloat64:         \
      return FN<double>(__VA_ARGS__);      \
    case ::zebra::DType::kFloat16:         \
      return FN<Half>(__VA_ARGS__);        \
    case ::zebra::DType::kBFloat16:        \
      return FN<BFloat16>(__VA_ARGS__);    \
  }
