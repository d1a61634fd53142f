// Functions of vectors that a scan needs: written out, because the compiler leaves some loops over
// fast_exp() scalar.
#pragma once

#include "common/cpu/simd.h"

namespace zebra::ZEBRA_ISA {
namespace {

// log(1 + e) for e in [0, 1]: 2 artanh(e / (2 + e)), exact to rounding for small e too.
inline Vec<float> log1p_unit(Vec<float> e) {
  const Vec<float> t = e / (2.0f + e), q = t * t;
  Vec<float> p = Vec<float>{} + 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  return 2.0f * t + 2.0f * t * q * p;
}
inline Vec<double> log1p_unit(Vec<double> e) {
  for (int l = 0; l < kLanes<double>; ++l) e[l] = std::log1p(e[l]);
  return e;
}

template <typename A>
inline Vec<A> softplus_of(Vec<A> x) {
  const Vec<A> small = log1p_unit(exp_decay(x < A(0) ? x : -x));
  return x < A(0) ? small : x + small;
}

template <typename A>
inline Vec<A> sigmoid_of(Vec<A> x) {
  const Vec<A> e = exp_decay(x < A(0) ? x : -x);
  const Vec<A> one = Vec<A>{} + A(1);
  return (x < A(0) ? e : one) / (one + e);
}

}  // namespace
}  // namespace zebra::ZEBRA_ISA
