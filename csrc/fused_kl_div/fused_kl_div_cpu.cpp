// fused_kl_div on the CPU: one task per slab of the vocabulary, for all tokens of a chunk.
#include "common/cpu/amx_weight.h"
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "common/math.h"
#include "fused_kl_div/fused_kl_div.h"

namespace zebra::ZEBRA_ISA {
namespace {

// exp(d) - 1 - d by its series, for |d| <= 1/2: enough terms for the precision of A.
template <typename A>
Vec<A> near_divergence(Vec<A> d) {
  constexpr int kTerms = sizeof(A) == 8 ? 14 : 8;
  constexpr A kInverse[14] = {
      A(1) / 2,         A(1) / 6,          A(1) / 24,          A(1) / 120,          A(1) / 720,
      A(1) / 5040,      A(1) / 40320,      A(1) / 362880,      A(1) / 3628800,      A(1) / 39916800,
      A(1) / 479001600, A(1) / 6227020800, A(1) / 87178291200, A(1) / 1307674368000};
  Vec<A> series = Vec<A>{} + kInverse[kTerms - 1];
#pragma GCC unroll 14
  for (int i = kTerms - 2; i >= 0; --i) series = series * d + kInverse[i];
  return d * d * series;
}

// Logits of some tokens, one a lane: those of vocabulary row v at p + v stride.
template <typename A>
struct Strip {
  const A* p;
  std::int64_t stride;
};

// The six statistics of n rows, one a row of `out`.
template <typename A>
void reduce_strip(Strip<A> s, Strip<A> t, std::int64_t n, A scale, A* out, std::int64_t ldo) {
  using V = Vec<A>;
  V max_s = V{} - A(HUGE_VAL), max_t = max_s;
  for (std::int64_t v = 0; v < n; ++v) {  // a NaN is left to the sums
    const V ls = load(s.p + v * s.stride), lt = load(t.p + v * t.stride);
    max_s = ls > max_s ? ls : max_s;
    max_t = lt > max_t ? lt : max_t;
  }
  max_s *= scale;
  max_t *= scale;
  // Where all are -inf, exp(-inf - 0) is 0.
  const V base_s = max_s == V{} - A(HUGE_VAL) ? V{} : max_s;
  const V base_t = max_t == V{} - A(HUGE_VAL) ? V{} : max_t;
  constexpr int kSums = 2;  // rows in turn: shorter sums, and two chains of additions
  V S[kSums] = {}, T[kSums] = {}, far[kSums] = {}, B[kSums] = {};
  const auto row = [&](std::int64_t v, int i) {
    const V ds = load(s.p + v * s.stride) * scale - base_s;
    const V dt = load(t.p + v * t.stride) * scale - base_t;
    const V d = ds - dt, es = exp_decay(ds), et = exp_decay(dt), weighted = et * d;
    S[i] += es;
    T[i] += et;
    B[i] += weighted;
    const V outer = (es - et) - weighted, inner = et * near_divergence<A>(d);
    far[i] += (d < A(0.5)) & (d > A(-0.5)) ? inner : outer;
  };
  std::int64_t v = 0;
  for (; v + kSums <= n; v += kSums)
    for (int i = 0; i < kSums; ++i) row(v + i, i);
  if (v < n) row(v, 0);
  store(out, max_s);
  store(out + ldo, max_t);
  store(out + 2 * ldo, S[0] + S[1]);
  store(out + 3 * ldo, T[0] + T[1]);
  store(out + 4 * ldo, far[0] + far[1]);
  store(out + 5 * ldo, B[0] + B[1]);
}

// The logits of a slab: where they are, or computed into `scratch` or the place kept for them.
template <typename A>
struct Slab {
  const A* p;
  std::int64_t row_stride, tile_stride;

  Strip<A> strip(std::int64_t token) const {
    return {p + token / 16 * tile_stride + token % 16, row_stride};
  }
};

template <typename A>
Slab<A> slab_of(const KlLogits& m, std::int64_t first, std::int64_t n, std::int64_t tokens,
                A* scratch) {
  A* const kept = m.logits == nullptr ? nullptr : static_cast<A*>(m.logits) + first * m.row_stride;
#ifdef ZEBRA_AMX
  if constexpr (sizeof(A) == sizeof(float)) {
    if (m.weight != nullptr) {
      A* const c = kept == nullptr ? scratch : kept;
      const std::int64_t row_stride = kept == nullptr ? 16 : m.row_stride;
      const std::int64_t tile_stride = kept == nullptr ? kKlSlabRows * 16 : m.tile_stride;
      BFloat16* const block =
          reinterpret_cast<BFloat16*>(scratch + kl_padded_tokens(tokens) * kKlSlabRows);
      amx_weight_product(static_cast<const BFloat16*>(m.weight) + first * m.weight_stride,
                         m.weight_stride, n, m.width, m.pairs, tokens, c, row_stride, tile_stride,
                         block);
      return {c, row_stride, tile_stride};
    }
  }
#endif
  static_cast<void>(n);
  static_cast<void>(tokens);
  static_cast<void>(scratch);
  return {kept, m.row_stride, m.tile_stride};
}

#ifdef ZEBRA_AMX
constexpr std::int64_t kBlockFloats = kAmxRows * kAmxDepth / 2;
#else
constexpr std::int64_t kBlockFloats = 0;
#endif

// Memory of a thread: logits of a slab of both models, and amx_weight_product()'s block.
template <typename A>
struct SlabScratch {
  std::int64_t size;
  A *memory = nullptr, *student = nullptr, *teacher = nullptr;

  explicit SlabScratch(const KlPanel& p)
      : size(p.student.weight == nullptr && p.teacher.weight == nullptr
                 ? 0
                 : kl_padded_tokens(p.tokens) * kKlSlabRows + kBlockFloats) {
    if (size == 0) return;
    memory = new A[2 * size + 16];
    student = memory + (64 - reinterpret_cast<std::uintptr_t>(memory) % 64) % 64 / sizeof(A);
    teacher = student + size;
  }
  SlabScratch(const SlabScratch&) = delete;
  ~SlabScratch() { delete[] memory; }
};

// body(first row, rows, student's slab, teacher's slab), in parallel.
template <typename A, typename Body>
void for_slabs(const KlPanel& p, const Body& body) {
  parallel_for(ceil_div(p.vocab, kKlSlabRows), 1, [&](std::int64_t begin, std::int64_t end) {
    const SlabScratch<A> scratch(p);
    const auto run = [&] {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t first = i * kKlSlabRows, left = p.vocab - first;
        const std::int64_t n = left < kKlSlabRows ? left : kKlSlabRows;
        const Slab<A> s = slab_of<A>(p.student, first, n, p.tokens, scratch.student);
        const Slab<A> t = slab_of<A>(p.teacher, first, n, p.tokens, scratch.teacher);
        body(first, n, s, t);
      }
    };
#ifdef ZEBRA_AMX
    if (scratch.size > 0) {
      const AmxScope amx;
      return run();
    }
#endif
    run();
  });
}

template <typename A>
void statistics(const KlStatisticsParams& p) {
  const std::int64_t ld = kl_padded_tokens(p.panel.tokens);
  const A scale = static_cast<A>(1.0 / p.panel.temperature);
  for_slabs<A>(p.panel, [&](std::int64_t first, std::int64_t n, Slab<A> s, Slab<A> t) {
    A* const out = static_cast<A*>(p.partial) + first / kKlSlabRows * kKlStatistics * ld;
    for (std::int64_t token = 0; token < p.panel.tokens; token += kLanes<A>)
      reduce_strip<A>(s.strip(token), t.strip(token), n, scale, out + token, ld);
  });
}

// One token's slabs, in their order, in fp64.
template <typename A>
void reduce_token(const KlReduceParams& p, std::int64_t token) {
  const std::int64_t ld = kl_padded_tokens(p.tokens);
  const A* const partial = static_cast<const A*>(p.partial) + token;
  double max_s = -HUGE_VAL, max_t = -HUGE_VAL;
  for (std::int64_t i = 0; i < p.slabs; ++i) {
    const A* const at = partial + i * kKlStatistics * ld;
    const double ms = at[0], mt = at[ld];
    max_s = ms > max_s ? ms : max_s;
    max_t = mt > max_t ? mt : max_t;
  }
  double S = 0, T = 0, A_ = 0, B = 0;
  for (std::int64_t i = 0; i < p.slabs; ++i) {
    const A* const at = partial + i * kKlStatistics * ld;
    const double shift_s = at[0] - max_s, shift_t = at[ld] - max_t;
    const double weight_s = std::exp(shift_s), weight_t = std::exp(shift_t);
    const double Si = weight_s * at[2 * ld], Ti = weight_t * at[3 * ld];
    double Ai = weight_t * at[4 * ld], Bi = weight_t * at[5 * ld];
    // d of the whole row is d of the slab, plus shift.
    const double shift = shift_s - shift_t;
    if (shift < 0.5 && shift > -0.5) {
      const double grow = std::expm1(shift);
      Ai += grow * (Ai + Bi) + Ti * (grow - shift);
      Bi += shift * Ti;
    } else {
      if (Ti != 0) Bi += shift * Ti;
      Ai = Si - Ti - Bi;
    }
    S += Si, T += Ti, A_ += Ai, B += Bi;
  }
  const double a = A_ / T, b = B / T;
  const double kl = (a + b < 0.5 && a + b > -0.5 ? std::log1p(a + b) : std::log(S / T)) - b;
  static_cast<A*>(p.kl)[token] = static_cast<A>(kl < 0 ? 0 : kl);  // -1e-17 is rounding
  p.student_lse[token] = max_s + std::log(S);
  p.teacher_lse[token] = max_t + std::log(T);
}

// What is subtracted from the logits of some tokens, in two parts: a logit of 1e4 keeps the digits
// of its distance from the sum.
template <typename A>
struct LogSum {
  Vec<A> high{}, low{};

  LogSum(const double* lse, std::int64_t count) {
    for (std::int64_t l = 0; l < count; ++l) {
      high[l] = static_cast<A>(lse[l]);
      low[l] = static_cast<A>(lse[l] - static_cast<double>(high[l]));
    }
  }
  Vec<A> probability(Vec<A> scaled) const { return exp_decay((scaled - high) - low); }
};

template <typename A, typename D>
void gradient(const KlGradientParams& p) {
  const A scale = static_cast<A>(1.0 / p.panel.temperature);
  for_slabs<A>(p.panel, [&](std::int64_t first, std::int64_t n, Slab<A> s, Slab<A> t) {
    for (std::int64_t token = 0; token < kl_padded_tokens(p.panel.tokens); token += kLanes<A>) {
      D* const out = static_cast<D*>(p.dlogits) + first * p.ld + token;
      const std::int64_t left = p.panel.tokens - token;
      const std::int64_t count = left < 0 ? 0 : left < kLanes<A> ? left : kLanes<A>;
      const LogSum<A> sum_s(p.student_lse + token, count), sum_t(p.teacher_lse + token, count);
      Vec<A> factor{};
      VecIndex<A> valid{};
      for (std::int64_t l = 0; l < count; ++l) {
        factor[l] = p.dkl == nullptr ? scale : scale * static_cast<const A*>(p.dkl)[token + l];
        valid[l] = -1;
      }
      const Strip<A> ls = s.strip(token), lt = t.strip(token);
      for (std::int64_t v = 0; v < n; ++v) {
        const Vec<A> ps = sum_s.probability(load(ls.p + v * ls.stride) * scale);
        const Vec<A> pt = sum_t.probability(load(lt.p + v * lt.stride) * scale);
        const Vec<A> d = (ps - pt) * factor;
        store(out + v * p.ld, valid ? d : Vec<A>{});
      }
    }
  });
}

template <typename A, typename P>
void add(const KlAddParams& p) {
  A* const total = static_cast<A*>(p.total);
  const P* const part = static_cast<const P*>(p.part);
  parallel_for(p.count, 65536, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) total[i] += to_acc(part[i]);
  });
}

}  // namespace

void fused_kl_div_pack(const KlPack& p) {
#ifdef ZEBRA_AMX
  parallel_for(ceil_div<std::int64_t>(p.tokens, 16), 1, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t ld = pad_32(p.width);
    Aligned<BFloat16> rows(16 * ld);
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t r = 0; r < 16; ++r) {
        const std::int64_t token = i * 16 + r;
        copy_padded(static_cast<const BFloat16*>(p.hidden) + token * p.stride,
                    token < p.tokens ? p.width : 0, rows + r * ld, ld);
      }
      amx_pack_tile(rows, p.width, p.pairs + i * amx_packed_size(16, p.width));
    }
  });
#else
  static_cast<void>(p);  // called only where the matrix unit is
#endif
}

void fused_kl_div_statistics(const KlStatisticsParams& p) {
  p.panel.dtype == DType::kFloat64 ? statistics<double>(p) : statistics<float>(p);
}

void fused_kl_div_reduce(const KlReduceParams& p) {
  parallel_for(p.tokens, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      p.dtype == DType::kFloat64 ? reduce_token<double>(p, i) : reduce_token<float>(p, i);
  });
}

void fused_kl_div_gradient(const KlGradientParams& p) {
  if (p.panel.dtype == DType::kFloat64) return gradient<double, double>(p);
  p.dlogits_dtype == DType::kBFloat16 ? gradient<float, BFloat16>(p) : gradient<float, float>(p);
}

void fused_kl_div_add(const KlAddParams& p) {
  if (p.dtype == DType::kFloat64) return add<double, double>(p);
  p.part_dtype == DType::kBFloat16 ? add<float, BFloat16>(p) : add<float, float>(p);
}

}  // namespace zebra::ZEBRA_ISA
