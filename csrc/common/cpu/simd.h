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
struct VecOf {
  typedef A type __attribute__((vector_size(kVecBytes)));
};
template <typename A>
using Vec = typename VecOf<A>::type;  // of an accumulation type, float or double
template <typename A>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(A));

// Vectors travel by reference into inlined functions: by value between functions, the calling
// convention would change with the instruction set.
#define ZEBRA_INLINE __attribute__((always_inline)) static inline

ZEBRA_INLINE void load(const float* src, Vec<float>& dst) { std::memcpy(&dst, src, sizeof dst); }
ZEBRA_INLINE void load(const double* src, Vec<double>& dst) { std::memcpy(&dst, src, sizeof dst); }
ZEBRA_INLINE void store(const Vec<float>& src, float* dst) { std::memcpy(dst, &src, sizeof src); }
ZEBRA_INLINE void store(const Vec<double>& src, double* dst) { std::memcpy(dst, &src, sizeof src); }

typedef std::uint16_t VecShort __attribute__((vector_size(kVecBytes / 2)));
typedef std::uint32_t VecWord __attribute__((vector_size(kVecBytes)));

ZEBRA_INLINE void load(const BFloat16* src, Vec<float>& dst) {
  VecShort bits;
  std::memcpy(&bits, src, sizeof bits);
  const VecWord wide = __builtin_convertvector(bits, VecWord) << 16;
  std::memcpy(&dst, &wide, sizeof dst);
}
ZEBRA_INLINE void store(const Vec<float>& src, BFloat16* dst) {  // as from_acc<BFloat16>
  VecWord bits;
  std::memcpy(&bits, &src, sizeof bits);
  const VecWord rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecWord result = src == src ? rounded : (bits >> 16) | 0x40u;
  const VecShort narrow = __builtin_convertvector(result, VecShort);
  std::memcpy(dst, &narrow, sizeof narrow);
}

ZEBRA_INLINE void load(const Half* src, Vec<float>& dst) {
#if defined(__AVX512F__)
  // The masked forms: gcc 12 warns of an uninitialised value inside the plain ones.
  const __m512 v =
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
  std::memcpy(&dst, &v, sizeof dst);
#elif defined(__F16C__)
  const __m256 v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
  std::memcpy(&dst, &v, sizeof dst);
#else
  float wide[kLanes<float>];
  for (int l = 0; l < kLanes<float>; ++l) wide[l] = to_acc(src[l]);
  std::memcpy(&dst, wide, sizeof dst);
#endif
}
ZEBRA_INLINE void store(const Vec<float>& src, Half* dst) {
#if defined(__AVX512F__)
  __m512 v;
  std::memcpy(&v, &src, sizeof v);
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(dst, &bits, sizeof bits);
#elif defined(__F16C__)
  __m256 v;
  std::memcpy(&v, &src, sizeof v);
  const __m128i bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(dst, &bits, sizeof bits);
#else
  float wide[kLanes<float>];
  std::memcpy(wide, &src, sizeof src);
  for (int l = 0; l < kLanes<float>; ++l) dst[l] = from_acc<Half>(wide[l]);
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
ZEBRA_INLINE A sum_lanes(const Vec<A>& v) {
  return sum_halves<kVecBytes, A>(&v);
}

}  // namespace zebra::ZEBRA_ISA
