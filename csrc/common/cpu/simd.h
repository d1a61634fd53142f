// Vectors as wide as the registers of the instruction set, loaded from and stored to any element
// type.  For kernels whose tiles live in registers, where loops left to the vectoriser fall short.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "common/cpu/vec.h"

namespace zebra::ZEBRA_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64, kVecRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32, kVecRegisters = 16;
#else
constexpr int kVecBytes = 16, kVecRegisters = 16;
#endif

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVecBytes)));
  typedef std::int32_t index __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVecBytes)));
  typedef std::int64_t index __attribute__((vector_size(kVecBytes)));
};
template <typename A>
using Vec = typename VecOf<A>::type;  // of an accumulation type, float or double
template <typename A>
using VecIndex = typename VecOf<A>::index;  // integers of the same width; masks are 0 and -1
template <typename A>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(A));

ZEBRA_INLINE Vec<float> load(const float* src) {
  Vec<float> v;
  std::memcpy(&v, src, sizeof v);
  return v;
}
ZEBRA_INLINE Vec<double> load(const double* src) {
  Vec<double> v;
  std::memcpy(&v, src, sizeof v);
  return v;
}
ZEBRA_INLINE void store(float* dst, Vec<float> v) { std::memcpy(dst, &v, sizeof v); }
ZEBRA_INLINE void store(double* dst, Vec<double> v) { std::memcpy(dst, &v, sizeof v); }

typedef std::uint16_t VecShort __attribute__((vector_size(kVecBytes / 2)));
typedef std::uint32_t VecWord __attribute__((vector_size(kVecBytes)));

ZEBRA_INLINE Vec<float> load(const BFloat16* src) {
  VecShort bits;
  std::memcpy(&bits, src, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, VecWord) << 16);
}
ZEBRA_INLINE void store(BFloat16* dst, Vec<float> v) {  // as from_acc<BFloat16>
  const VecWord bits = (VecWord)v;
  const VecWord rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecWord result = v == v ? rounded : (bits >> 16) | 0x40u;
  const VecShort narrow = __builtin_convertvector(result, VecShort);
  std::memcpy(dst, &narrow, sizeof narrow);
}

ZEBRA_INLINE Vec<float> load(const Half* src) {
#if defined(__AVX512F__)
  // The masked forms: gcc 12 warns of an uninitialised value inside the plain ones.
  return (Vec<float>)_mm512_maskz_cvtph_ps(
      0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
#else
  float wide[kLanes<float>];
  for (int l = 0; l < kLanes<float>; ++l) wide[l] = to_acc(src[l]);
  return load(wide);
#endif
}
ZEBRA_INLINE void store(Half* dst, Vec<float> v) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(dst, &bits, sizeof bits);
#elif defined(__F16C__)
  const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(dst, &bits, sizeof bits);
#else
  for (int l = 0; l < kLanes<float>; ++l) dst[l] = from_acc<Half>(v[l]);
#endif
}

// The sum of the lanes: the upper half onto the lower until one is left, in registers.
template <int kBytes, typename A>
ZEBRA_INLINE A sum_halves(const void* v) {
  if constexpr (kBytes == sizeof(A)) {
    return *static_cast<const A*>(v);
  } else {
    typedef A Part __attribute__((vector_size(kBytes / 2)));
    Part low, high;
    std::memcpy(&low, v, sizeof low);
    std::memcpy(&high, static_cast<const char*>(v) + sizeof low, sizeof high);
    low += high;
    return sum_halves<kBytes / 2, A>(&low);
  }
}
template <typename A>
ZEBRA_INLINE A sum_lanes(Vec<A> v) {
  return sum_halves<kVecBytes, A>(&v);
}

// exp(x) for x <= 0, about 1 ulp: 2^k p(r), r = x - k ln 2.  0 below -87.3, where results would be
// denormal; NaN stays NaN; positive x gives some finite number.
ZEBRA_INLINE Vec<float> exp_decay(Vec<float> x) {
  using V = Vec<float>;
  using I = VecIndex<float>;
  constexpr float kLowest = -87.33654f, kRound = 12582912.0f;  // 1.5 * 2^23
  const I under = x < kLowest, over = x > 0.0f;
  const V clamped = under ? V{} + kLowest : (over ? V{} : x);
  const V shifted = clamped * 1.44269504f + kRound;  // k in the low bits
  const V k = shifted - kRound;
  const V r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const V scale = (V)(((I)shifted + 127) << 23);
  return under ? V{} : p * scale;
}
ZEBRA_INLINE Vec<double> exp_decay(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}

}  // namespace zebra::ZEBRA_ISA
