// fused_kl_div on the CPU: one task per row of logits (one token).
#include "common/cpu/parallel.h"
#include "common/cpu/vec.h"
#include "common/math.h"
#include "fused_kl_div/fused_kl_div.h"

namespace zebra::ZEBRA_ISA {
namespace {

// Sums run in the accumulation type over this many elements, then in fp64.
constexpr std::int64_t kSumBlock = 256;

// body(student, teacher, count) over the columns of row r, in blocks of at most kSumBlock.
template <typename A, typename Body>
void for_blocks(const FusedKlDivLogits& l, std::int64_t r, const Body& body) {
  for (std::int64_t first = 0, c = 0; first < l.vocab; first += l.panel, ++c) {
    const std::int64_t left = l.vocab - first, width = left < l.panel ? left : l.panel;
    A* const student = static_cast<A*>(l.student[c]) + r * width;
    A* const teacher = static_cast<A*>(l.teacher[c]) + r * width;
    for (std::int64_t at = 0; at < width; at += kSumBlock)
      body(student + at, teacher + at, width - at < kSumBlock ? width - at : kSumBlock);
  }
}

// p_T (exp(d) - 1 - d) with d = log p_S - log p_T: by its series where the terms would cancel.
template <typename A>
A divergence(A d, A p_s, A p_t) {
  A series = 0;
  // 1/2! + d/3! + d^2/4! + ...: enough terms for |d| <= 1/2 at the precision of A.
  constexpr int kTerms = sizeof(A) == 8 ? 14 : 8;
  constexpr A kInverse[14] = {
      A(1) / 2,         A(1) / 6,          A(1) / 24,          A(1) / 120,          A(1) / 720,
      A(1) / 5040,      A(1) / 40320,      A(1) / 362880,      A(1) / 3628800,      A(1) / 39916800,
      A(1) / 479001600, A(1) / 6227020800, A(1) / 87178291200, A(1) / 1307674368000};
  for (int i = kTerms - 1; i >= 0; --i) series = series * d + kInverse[i];
  const A near = p_t * d * d * series;
  const A far = p_s - p_t - p_t * d;
  return d < A(0.5) && d > A(-0.5) ? near : far;
}

template <typename A>
void forward_row(const FusedKlDivParams& p, std::int64_t r) {
  const FusedKlDivLogits& l = p.logits;
  const A scale = static_cast<A>(1.0 / l.temperature);
  A max_s = -HUGE_VALF, max_t = -HUGE_VALF;
  for_blocks<A>(l, r, [&](A* s, A* t, std::int64_t n) {
    A ms = max_s, mt = max_t;
#pragma omp simd reduction(max : ms, mt)
    for (std::int64_t i = 0; i < n; ++i) {
      s[i] *= scale;
      t[i] *= scale;
      ms = s[i] > ms ? s[i] : ms;  // a NaN is left to the sums
      mt = t[i] > mt ? t[i] : mt;
    }
    max_s = ms;
    max_t = mt;
  });
  double sum_s = 0, sum_t = 0;
  for_blocks<A>(l, r, [&](A* s, A* t, std::int64_t n) {
    A ps = 0, pt = 0;
#pragma omp simd reduction(+ : ps, pt)
    for (std::int64_t i = 0; i < n; ++i) {
      ps += fast_exp(s[i] - max_s);
      pt += fast_exp(t[i] - max_t);
    }
    sum_s += static_cast<double>(ps);
    sum_t += static_cast<double>(pt);
  });
  const A inverse_s = static_cast<A>(1 / sum_s), inverse_t = static_cast<A>(1 / sum_t);
  const A shift = static_cast<A>(std::log(sum_t) - std::log(sum_s));
  double kl = 0;
  for_blocks<A>(l, r, [&](A* s, A* t, std::int64_t n) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) {
      const A ds = s[i] - max_s, dt = t[i] - max_t;
      sum += divergence((ds - dt) + shift, fast_exp(ds) * inverse_s, fast_exp(dt) * inverse_t);
    }
    kl += static_cast<double>(sum);
  });
  static_cast<A*>(p.kl)[r] = static_cast<A>(kl);
  static_cast<double*>(p.student_lse)[r] = static_cast<double>(max_s) + std::log(sum_s);
  static_cast<double*>(p.teacher_lse)[r] = static_cast<double>(max_t) + std::log(sum_t);
}

template <typename A>
void backward_row(const FusedKlDivBackwardParams& p, std::int64_t r) {
  const FusedKlDivLogits& l = p.logits;
  const A scale = static_cast<A>(1.0 / l.temperature);
  const A gradient = static_cast<const A*>(p.dkl)[r] * scale;
  // lse in two parts, so that logits of 1e4 keep the digits of their distance from it.
  const double lse_s = static_cast<const double*>(p.student_lse)[r];
  const double lse_t = static_cast<const double*>(p.teacher_lse)[r];
  const A high_s = static_cast<A>(lse_s), high_t = static_cast<A>(lse_t);
  const A low_s = static_cast<A>(lse_s - high_s), low_t = static_cast<A>(lse_t - high_t);
  for_blocks<A>(l, r, [&](A* s, A* t, std::int64_t n) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const A ps = fast_exp((s[i] * scale - high_s) - low_s);
      const A pt = fast_exp((t[i] * scale - high_t) - low_t);
      s[i] = (ps - pt) * gradient;
    }
  });
}

template <typename A>
void add(const FusedKlDivAddParams& p) {
  A* const total = static_cast<A*>(p.total);
  const A* const part = static_cast<const A*>(p.part);
  parallel_for(p.count, 65536, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) total[i] += part[i];
  });
}

}  // namespace

void fused_kl_div(const FusedKlDivParams& p) {
  parallel_for(p.logits.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r)
      p.logits.dtype == DType::kFloat64 ? forward_row<double>(p, r) : forward_row<float>(p, r);
  });
}

void fused_kl_div_backward(const FusedKlDivBackwardParams& p) {
  parallel_for(p.logits.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r)
      p.logits.dtype == DType::kFloat64 ? backward_row<double>(p, r) : backward_row<float>(p, r);
  });
}

void fused_kl_div_add(const FusedKlDivAddParams& p) {
  p.dtype == DType::kFloat64 ? add<double>(p) : add<float>(p);
}

}  // namespace zebra::ZEBRA_ISA
