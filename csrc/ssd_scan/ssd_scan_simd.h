// Vectors of fp32 or fp64 as wide as the instruction set, and the functions of them that a scan
// needs: written out, because the compiler leaves some loops over fast_exp() scalar.
#pragma once

#include <cmath>
#include <cstdint>

namespace zebra::ZEBRA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef std::int32_t index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef std::int64_t index __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
using Index = typename VectorOf<A>::index;  // integers of the same width; masks are 0 and -1
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
inline Vector<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A>::unaligned*>(p);
}
template <typename A>
inline void store(A* p, const Vector<A>& v) {
  *reinterpret_cast<typename VectorOf<A>::unaligned*>(p) = v;
}

// The sum of the lanes, in one order for every instruction set's width.
template <typename A>
inline A sum(Vector<A> v) {
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    Index<A> rotate;
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<A>; ++l) rotate[l] = (l + half) % kLanes<A>;
    v += __builtin_shuffle(v, rotate);
  }
  return v[0];
}

// exp(x) for x <= 0, about 1 ulp: 2^k p(r), r = x - k ln 2.  0 below -87.3, where results would be
// denormal; NaN stays NaN; positive x gives some finite number.
inline Vector<float> exp_decay(Vector<float> x) {
  using V = Vector<float>;
  using I = Index<float>;
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
inline Vector<double> exp_decay(Vector<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}

// log(1 + e) for e in [0, 1]: 2 artanh(e / (2 + e)), exact to rounding for small e too.
inline Vector<float> log1p_unit(Vector<float> e) {
  const Vector<float> t = e / (2.0f + e), q = t * t;
  Vector<float> p = Vector<float>{} + 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  return 2.0f * t + 2.0f * t * q * p;
}
inline Vector<double> log1p_unit(Vector<double> e) {
  for (int l = 0; l < kLanes<double>; ++l) e[l] = std::log1p(e[l]);
  return e;
}

template <typename A>
inline Vector<A> softplus_of(Vector<A> x) {
  const Vector<A> small = log1p_unit(exp_decay(x < A(0) ? x : -x));
  return x < A(0) ? small : x + small;
}

template <typename A>
inline Vector<A> sigmoid_of(Vector<A> x) {
  const Vector<A> e = exp_decay(x < A(0) ? x : -x);
  const Vector<A> one = Vector<A>{} + A(1);
  return (x < A(0) ? e : one) / (one + e);
}

}  // namespace
}  // namespace zebra::ZEBRA_ISA
