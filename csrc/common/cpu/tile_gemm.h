// Small matrix products in registers, for kernels whose tiles live in the L1 and L2 caches.
//
// Every element of C is summed over k in increasing order with one accumulator, whatever tile it
// falls into: results do not depend on how a caller blocks rows or columns.
#pragma once

#include "common/cpu/simd.h"

namespace zebra::ZEBRA_ISA {

// Vectors of C that a tile holds side by side.
constexpr int kTileVectors = kVecRegisters == 32 ? 4 : 2;

template <typename A>
static inline std::int64_t pad_lanes(std::int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Rows of a tile that is NV vectors wide.
constexpr int tile_rows(int nv) { return nv == kTileVectors ? 6 : 8; }

// C[MR, NV vectors] = (or +=) A[MR, K] B[K, NV vectors].  A's elements are at row_stride and
// col_stride, rows of B and C are contiguous.
template <int MR, int NV, bool kAdd, typename A>
static inline void tile(std::int64_t K, const A* __restrict a, std::int64_t row_stride,
                        std::int64_t col_stride, const A* __restrict b, std::int64_t ldb,
                        A* __restrict c, std::int64_t ldc) {
  Vec<A> acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = kAdd ? load(c + m * ldc + n * kLanes<A>) : Vec<A>{};
  const A* row[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) row[m] = a + m * row_stride;
  for (std::int64_t k = 0; k < K; ++k) {
    Vec<A> bk[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) bk[n] = load(b + n * kLanes<A>);
    b += ldb;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const A am = row[m][k * col_stride];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += am * bk[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * kLanes<A>, acc[m][n]);
}

// All rows of one column panel.  kRows / kCols: the stride of A that is 1 at compile time, which
// turns a pointer a row into one pointer.
template <int NV, bool kAdd, bool kRowMajor, typename A>
static inline void panel(std::int64_t M, std::int64_t K, const A* a, std::int64_t lda, const A* b,
                         std::int64_t ldb, A* c, std::int64_t ldc) {
  constexpr int kMain = tile_rows(NV);
  const std::int64_t row = kRowMajor ? lda : 1, col = kRowMajor ? 1 : lda;
  std::int64_t m = 0;
  for (; m + kMain <= M; m += kMain)
    tile<kMain, NV, kAdd>(K, a + m * row, row, col, b, ldb, c + m * ldc, ldc);
  for (; m + 4 <= M; m += 4) tile<4, NV, kAdd>(K, a + m * row, row, col, b, ldb, c + m * ldc, ldc);
  for (; m + 2 <= M; m += 2) tile<2, NV, kAdd>(K, a + m * row, row, col, b, ldb, c + m * ldc, ldc);
  for (; m < M; ++m) tile<1, NV, kAdd>(K, a + m * row, row, col, b, ldb, c + m * ldc, ldc);
}

// C[M, N] = (kAdd: +=) op(A) B[K, N].  kRowMajor: A is [M, K] with rows at lda; otherwise it is
// stored transposed, [K, M].  N is rounded up to whole vectors: rows of B and C must be readable
// (and C writable) up to there.
template <bool kAdd, bool kRowMajor, typename A>
static inline void gemm(std::int64_t M, std::int64_t N, std::int64_t K, const A* a,
                        std::int64_t lda, const A* b, std::int64_t ldb, A* c, std::int64_t ldc) {
  constexpr std::int64_t L = kLanes<A>;
  std::int64_t n = 0;
  for (; n + (kTileVectors - 1) * L < N; n += kTileVectors * L)
    panel<kTileVectors, kAdd, kRowMajor>(M, K, a, lda, b + n, ldb, c + n, ldc);
  if constexpr (kTileVectors == 4) {
    if (n + 2 * L < N) {
      panel<3, kAdd, kRowMajor>(M, K, a, lda, b + n, ldb, c + n, ldc);
      n += 3 * L;
    } else if (n + L < N) {
      panel<2, kAdd, kRowMajor>(M, K, a, lda, b + n, ldb, c + n, ldc);
      n += 2 * L;
    }
  }
  for (; n < N; n += L) panel<1, kAdd, kRowMajor>(M, K, a, lda, b + n, ldb, c + n, ldc);
}

}  // namespace zebra::ZEBRA_ISA
