// The inner step of attention on the CPU: a block of keys against a block of query rows, with the
// online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).
//
// Scores are kept transposed, [keys, rows]: queries are transposed once per row block, keys and
// values are read as they lie, and every softmax loop runs over rows, without horizontal sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/cpu/tile_gemm.h"
#include "common/cpu/vec.h"

namespace zebra::ZEBRA_ISA {

constexpr std::int64_t kFlashKeys = 64;  // keys of a block
constexpr std::int64_t kFlashRows = 64;  // most query rows of a block

template <typename T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// Memory of one thread for one row block.  `ld` pads rows to whole vectors.  In latent attention
// (`latent`) the first `width` columns of a key are its value.
template <typename A>
struct FlashTile {
  std::int64_t depth, width;   // of keys, of values
  std::int64_t ldk, ldv, ldo;  // row strides of k, v and o
  A scale;
  std::int64_t rows = 0, ld = 0;
  A* memory;
  A* q;              // [depth, ld]: queries, scaled and transposed
  A* s;              // [kFlashKeys, ld]
  A* o;              // [ld, ldo]: sum of exp(s - max) v
  A *k, *v;          // [kFlashKeys, ldk or ldv]: the block of keys and values
  A *max, *sum;      // [ld] of every row
  A *block, *shift;  // [ld] scratch

  FlashTile(std::int64_t depth_, std::int64_t width_, double scale_, bool latent)
      : depth(depth_),
        width(width_),
        ldk(pad_lanes<A>(depth_)),
        ldv(latent ? ldk : pad_lanes<A>(width_)),
        ldo(pad_lanes<A>(width_)),
        scale(static_cast<A>(scale_)) {
    const std::int64_t most = pad_lanes<A>(kFlashRows);
    const std::int64_t total = (depth + kFlashKeys + 4 + ldo) * most + kFlashKeys * (ldk + ldv);
    memory = new A[total];
    for (std::int64_t i = 0; i < total; ++i) memory[i] = A(0);
    q = memory;
    s = q + depth * most;
    max = s + kFlashKeys * most;
    sum = max + most;
    block = sum + most;
    shift = block + most;
    o = shift + most;
    k = o + most * ldo;
    v = latent ? k : k + kFlashKeys * ldk;
  }
  FlashTile(const FlashTile&) = delete;
  FlashTile& operator=(const FlashTile&) = delete;
  ~FlashTile() { delete[] memory; }

  // Starts a row block; the caller then loads query r < rows.
  void start(std::int64_t rows_) {
    rows = rows_;
    ld = pad_lanes<A>(rows);
    for (std::int64_t i = 0; i < depth * ld; ++i) q[i] = A(0);
    for (std::int64_t i = 0; i < ld * ldo; ++i) o[i] = A(0);
    for (std::int64_t r = 0; r < ld; ++r) {
      max[r] = -std::numeric_limits<A>::infinity();
      sum[r] = A(0);
    }
  }

  // Sets s to -inf where row r may not see key j: j >= visible[r].
  void mask(std::int64_t keys, const std::int32_t* visible) {
    for (std::int64_t j = 0; j < keys; ++j) {
      A* const __restrict sj = s + j * ld;
      const std::int32_t key = static_cast<std::int32_t>(j);
#pragma omp simd
      for (std::int64_t r = 0; r < rows; ++r)
        sj[r] = key < visible[r] ? sj[r] : -std::numeric_limits<A>::infinity();
    }
  }

  // Turns the scores s into exp(s - max), with max, sum and o brought to the new maximum.
  void softmax(std::int64_t keys) {
    A* const __restrict b = block;
    A* const __restrict f = shift;
#pragma omp simd
    for (std::int64_t r = 0; r < ld; ++r) b[r] = max[r];
    for (std::int64_t j = 0; j < keys; ++j) {
      const A* const __restrict sj = s + j * ld;
#pragma omp simd
      for (std::int64_t r = 0; r < ld; ++r) b[r] = sj[r] > b[r] ? sj[r] : b[r];
    }
    bool moved = false;
    for (std::int64_t r = 0; r < ld; ++r) moved = moved || b[r] != max[r];
    if (moved) {
#pragma omp simd
      for (std::int64_t r = 0; r < ld; ++r) {
        const A base = b[r] == -std::numeric_limits<A>::infinity() ? A(0) : b[r];
        f[r] = fast_exp(max[r] - base);
        sum[r] *= f[r];
        max[r] = b[r];
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        A* const __restrict row = o + r * ldo;
        const A factor = f[r];
        if (factor == A(1)) continue;
#pragma omp simd
        for (std::int64_t i = 0; i < ldo; ++i) row[i] *= factor;
      }
    }
    // A row that has seen nothing yet has max -inf: subtract 0, so that exp(-inf) is 0.
#pragma omp simd
    for (std::int64_t r = 0; r < ld; ++r)
      b[r] = max[r] == -std::numeric_limits<A>::infinity() ? A(0) : max[r];
    for (std::int64_t j = 0; j < keys; ++j) {
      A* const __restrict sj = s + j * ld;
      A* const __restrict total = sum;
#pragma omp simd
      for (std::int64_t r = 0; r < ld; ++r) {
        sj[r] = fast_exp(sj[r] - b[r]);
        total[r] += sj[r];
      }
    }
  }

  template <typename T>
  void load_query(std::int64_t r, const T* src) {
    for (std::int64_t i = 0; i < depth; ++i) q[i * ld + r] = scale * to_acc(src[i]);
  }
  // Call it between the queries and the first block.
  void queries_ready() {}

  // Columns [at, at + n) of key j, and value j.
  template <typename T>
  void load_key(std::int64_t j, const T* src, std::int64_t n, std::int64_t at = 0) {
    load_row(src, k + j * ldk + at, n);
  }
  template <typename T>
  void load_value(std::int64_t j, const T* src) {
    load_row(src, v + j * ldv, width);
  }

  // Folds the loaded block in.  visible == nullptr: every row sees all of it.
  void fold(std::int64_t keys, const std::int32_t* visible) {
    gemm<false, true>(keys, ld, depth, k, ldk, q, ld, s, ld);
    if (visible != nullptr) mask(keys, visible);
    softmax(keys);
    gemm<true, false>(rows, width, keys, s, ld, v, ldv, o, ldo);
  }

  // Ends a row block: o.
  void finish() {}

  // Natural logarithm of the unit in which row r of o and sum are kept.
  A unit(std::int64_t r) const { return max[r]; }
  // log sum exp of row r: -inf where it saw no key.
  A lse(std::int64_t r) const {
    return sum[r] == A(0) ? -std::numeric_limits<A>::infinity() : max[r] + std::log(sum[r]);
  }
};

}  // namespace zebra::ZEBRA_ISA
