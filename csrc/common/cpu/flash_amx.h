// flash_tile.h for bf16 keys and values on the matrix unit of x86 (AMX-BF16).
//
// Everything is transposed, so that softmax loops run over rows without horizontal sums and
// probabilities come out in the order that the second product takes:
//   S^T[keys, rows] = K Q^T,  O^T[width, rows] += V^T P^T
// Keys and values enter exactly, probabilities are rounded to bf16 once (their sum is not), as in
// every flash attention.  bf16 queries enter exactly; fp32 ones as the sum of two bf16 parts.
#pragma once

#include "common/cpu/amx.h"
#include "common/cpu/flash_tile.h"

#ifdef ZEBRA_AMX

namespace zebra::ZEBRA_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// src = high + low, up to 16 bits of mantissa.
static inline void split_row(const float* __restrict src, BFloat16* __restrict high,
                             BFloat16* __restrict low, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    high[i] = from_acc<BFloat16>(src[i]);
    low[i] = from_acc<BFloat16>(src[i] - to_acc(high[i]));
  }
}

struct FlashAmx {
  static constexpr std::int64_t kKeys = 128;  // most keys of a block
  // The maximum of a row moves only when scores outgrow it by this power of two: until then
  // probabilities above 1 are as exact as those below.
  static constexpr float kSlack = 8.0f;

  const std::int64_t depth, width, parts;  // parts of a query
  const std::int64_t ldk, ldo;             // padded depth and width
  const float to_log2;                     // |scale| log2(e)
  const std::uint32_t sign;                // of scale, in both halves of a pair
  std::int64_t rows = 0, ld = 0;
  Aligned<BFloat16> q_rows;        // [parts, ld, ldk]
  Aligned<std::uint32_t> q_pairs;  // [parts, ldk / 2, ld]
  Aligned<float> s;                // [kKeys, ld]
  Aligned<std::uint32_t> p;        // [kKeys / 2, ld]: pairs of keys
  Aligned<float> o_t;              // [ldo, ld]
  Aligned<float> o;                // [ld, ldo], from finish()
  Aligned<float> max, sum;         // of every row; max in units of log 2

  // A scale of 0 becomes the least normal number, under which masked scores stay -inf.
  FlashAmx(std::int64_t depth_, std::int64_t width_, double scale, std::int64_t parts_)
      : depth(depth_),
        width(width_),
        parts(parts_),
        ldk(pad_32(depth_)),
        ldo(pad_32(width_)),
        to_log2(static_cast<float>(std::fabs(scale)) * kLog2E < 1.17549435e-38f
                    ? 1.17549435e-38f
                    : static_cast<float>(std::fabs(scale)) * kLog2E),
        sign(scale < 0 ? 0x80008000u : 0u),
        q_rows(parts_ * kFlashRows * ldk),
        q_pairs(parts_ * kFlashRows * ldk / 2),
        s(kKeys * kFlashRows),
        p(kKeys / 2 * kFlashRows),
        o_t(ldo * kFlashRows),
        o(ldo * kFlashRows),
        max(kFlashRows),
        sum(kFlashRows) {}

  // Starts a row block; the caller then loads query r < rows.
  void start(std::int64_t rows_) {
    rows = rows_;
    ld = pad_32(rows);
    std::memset(q_rows, 0, static_cast<std::size_t>(parts * ld * ldk) * 2);
    std::memset(o_t, 0, static_cast<std::size_t>(ldo * ld) * 4);
    for (std::int64_t r = 0; r < ld; ++r) {
      max[r] = -std::numeric_limits<float>::infinity();
      sum[r] = 0.0f;
    }
  }

  void load_query(std::int64_t r, const BFloat16* src) {
    copy_padded(src, depth, q_rows + r * ldk, depth);
  }
  void load_query(std::int64_t r, const float* src) {
    split_row(src, q_rows + r * ldk, q_rows + (ld + r) * ldk, depth);
  }
  void queries_ready() {
    for (std::int64_t part = 0; part < parts; ++part)
      transpose_to_pairs(ld, ldk, q_rows + part * ld * ldk, ldk, q_pairs + part * ldk / 2 * ld, ld);
    if (sign == 0) return;
    for (std::int64_t i = 0; i < parts * ldk / 2 * ld; ++i) q_pairs[i] ^= sign;
  }

  // Folds keys in: k [keys, ldk], v_t of transpose_32_rows, both up to a multiple of 32 keys.
  // visible == nullptr: every row sees all of them.
  // ahead(j) runs before the scores of keys j to j + 31: room for prefetches.
  template <typename Ahead>
  void fold(std::int64_t keys, const std::int32_t* visible, const BFloat16* k, const BFloat16* v_t,
            const Ahead& ahead) {
    const std::int64_t padded = pad_32(keys);
    for (std::int64_t j = 0; j < padded; j += 32) {
      ahead(j);
      amx_product<false>(32, ld, ldk, k + j * ldk, ldk, 32, q_pairs, ld, s + j * ld, ld, parts,
                         ldk / 2 * ld);
    }
    if (visible != nullptr) mask(keys, visible);
    for (std::int64_t i = keys * ld; i < padded * ld; ++i)
      s[i] = -std::numeric_limits<float>::infinity();
    move_max(padded);
    probabilities(padded);
    amx_product<true>(ldo, ld, padded, v_t, 32, 32 * ldo, p, ld, o_t, ld);
  }

  void mask(std::int64_t keys, const std::int32_t* visible) {
    for (std::int64_t j = 0; j < keys; ++j) {
      float* const __restrict sj = s + j * ld;
      const std::int32_t key = static_cast<std::int32_t>(j);
#pragma omp simd
      for (std::int64_t r = 0; r < rows; ++r)
        sj[r] = key < visible[r] ? sj[r] : -std::numeric_limits<float>::infinity();
    }
  }

  void move_max(std::int64_t keys) {
    const Float16 none = Float16{} - std::numeric_limits<float>::infinity();
    Float16 block[kFlashRows / 16];
    bool moved = false;
    for (std::int64_t r = 0; r < ld; r += 16) {
      Float16 most[4] = {none, none, none, none};
      for (std::int64_t j = 0; j < keys; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)  // the second operand where one is NaN
          most[i] = _mm512_maskz_max_ps(0xffff, lanes(s + (j + i) * ld + r), most[i]);
      const Float16 a = _mm512_maskz_max_ps(0xffff, most[0], most[1]);
      const Float16 b = _mm512_maskz_max_ps(0xffff, most[2], most[3]);
      block[r / 16] = _mm512_maskz_max_ps(0xffff, a, b) * to_log2;
      const Float16 limit = lanes(max + r) + kSlack;
      moved = moved || _mm512_cmp_ps_mask(block[r / 16], limit, _CMP_GT_OQ) != 0;
    }
    if (!moved) return;
    for (std::int64_t r = 0; r < ld; r += 16) {
      const Float16 next = _mm512_maskz_max_ps(0xffff, block[r / 16], lanes(max + r));
      Float16 factor;
      exp2_lanes(lanes(max + r) - finite(next), 0xffff, factor);
      lanes(max + r) = next;
      lanes(sum + r) *= factor;
      for (std::int64_t c = 0; c < ldo; ++c) lanes(o_t + c * ld + r) *= factor;
    }
  }

  void probabilities(std::int64_t keys) {
    for (std::int64_t r = 0; r < ld; r += 16) {
      const Float16 base = finite(lanes(max + r));
      Float16 total = lanes(sum + r);
      for (std::int64_t j = 0; j < keys; j += 2) {
        Float16 even, odd;
        exp2_lanes(lanes(s + j * ld + r) * to_log2 - base, 0xffff, even);
        exp2_lanes(lanes(s + (j + 1) * ld + r) * to_log2 - base, 0xffff, odd);
        total += even + odd;
        store_pairs(even, odd, p + j / 2 * ld + r);
      }
      lanes(sum + r) = total;
    }
  }

  // Ends a row block: o.
  void finish() { transpose_dwords(ldo, ld, o_t, ld, o, ldo); }

  // Natural logarithm of the unit in which row r of o and sum are kept.
  float unit(std::int64_t r) const { return max[r] * kLn2; }
  float lse(std::int64_t r) const {
    return sum[r] == 0.0f ? -std::numeric_limits<float>::infinity() : unit(r) + std::log(sum[r]);
  }

  static Float16& lanes(float* at) { return *reinterpret_cast<Float16*>(at); }
  // A row that has seen nothing yet has max -inf: subtract 0, so that 2^-inf is 0.
  static Float16 finite(const Float16& x) {
    const __mmask16 none =
        _mm512_cmp_ps_mask(x, Float16{} - std::numeric_limits<float>::infinity(), _CMP_EQ_OQ);
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~none), x);
  }
};

}  // namespace zebra::ZEBRA_ISA
#endif
