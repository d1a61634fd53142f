// Register-blocked products of the small row-major tiles of one chunk, in fp32 or fp64.
//
// The right operand and the output are read and written in whole vectors: their rows are padded to
// a multiple of kPad elements.  The left operand is only ever broadcast, so it may be transposed by
// its strides.  The sum always runs over exactly the elements asked for: padding may hold anything.
#pragma once

#include <cstdint>

#include "ssd_scan/ssd_scan_simd.h"

namespace zebra::ZEBRA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kPanel = 4;  // vectors of a register block: 4 x 4 accumulators of 32 registers
#else
constexpr int kPanel = 2;  // 4 x 2 of 16
#endif
constexpr int kRows = 4;  // rows of a register block
template <typename A>
constexpr int kPad = kLanes<A> < kRows ? kRows : kLanes<A>;

// Which elements of the left operand take part.  kLower: k <= row; kUpper: k >= row.  The rest is
// not read into the sum at all, so that a NaN there stays there.
enum class Part { kFull, kLower, kUpper };

template <typename A>
struct Left {
  const A* p;
  std::int64_t row, k;  // strides
};

// out = scale * init + left * right, one block of kRows rows and NV vectors.  scale nullptr: no
// init.
template <Part part, int NV, typename A>
inline void micro(Left<A> left, const A* right, std::int64_t ldr, const A* init, A* out,
                  std::int64_t ldo, const A* scale, std::int64_t scale_stride, std::int64_t first,
                  std::int64_t depth) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[kRows][NV];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < NV; ++v)
      acc[m][v] =
          scale == nullptr ? Vec<A>{} : scale[m * scale_stride] * load(init + m * ldo + v * L);
  const auto step = [&](std::int64_t k, int from, int to) {
    Vec<A> r[NV];
    for (int v = 0; v < NV; ++v) r[v] = load(right + k * ldr + v * L);
    for (int m = 0; m < kRows; ++m) {
      if (m < from || m > to) continue;
      const A l = left.p[m * left.row + k * left.k];
      for (int v = 0; v < NV; ++v) acc[m][v] += l * r[v];
    }
  };
  if constexpr (part == Part::kUpper)
#pragma GCC unroll 4
    for (int kk = 0; kk < kRows; ++kk) step(first + kk, 0, kk);
  const std::int64_t begin = part == Part::kUpper ? first + kRows : 0;
  const std::int64_t end = part == Part::kLower ? first : depth;
  for (std::int64_t k = begin; k < end; ++k) step(k, 0, kRows - 1);
  if constexpr (part == Part::kLower)
#pragma GCC unroll 4
    for (int kk = 0; kk < kRows; ++kk) step(first + kk, kk, kRows - 1);
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < NV; ++v) store(out + m * ldo + v * L, acc[m][v]);
}

template <typename A>
struct Product {
  Left<A> left;
  const A* right;
  std::int64_t ldr;
  A* out;
  std::int64_t ldo;
  std::int64_t rows, cols, depth;  // rows % kRows == 0, cols % kPad == 0
  const A* scale = nullptr;        // nullptr: out = left * right; else out = scale * init + ...
  std::int64_t scale_stride = 0;   // 0: one scale for all rows
  const A* init = nullptr;         // nullptr: out itself
};

template <Part part, int NV, typename A>
inline void column_panel(const Product<A>& p, std::int64_t col) {
  const A* const init = p.init == nullptr ? p.out : p.init;
  for (std::int64_t i = 0; i < p.rows; i += kRows)
    micro<part, NV, A>({p.left.p + i * p.left.row, p.left.row, p.left.k}, p.right + col, p.ldr,
                       init + i * p.ldo + col, p.out + i * p.ldo + col, p.ldo,
                       p.scale == nullptr ? nullptr : p.scale + i * p.scale_stride, p.scale_stride,
                       i, p.depth);
}

template <Part part, typename A>
void multiply(const Product<A>& p) {
  constexpr int L = kLanes<A>;
  std::int64_t col = 0;
  for (; col + kPanel * L <= p.cols; col += kPanel * L) column_panel<part, kPanel, A>(p, col);
  if constexpr (kPanel > 2)
    for (; col + 2 * L <= p.cols; col += 2 * L) column_panel<part, 2, A>(p, col);
  for (; col < p.cols; col += L) column_panel<part, 1, A>(p, col);
}

// The blocks of left * right on and below the diagonal of a square output.
template <typename A>
void multiply_lower_output(const Product<A>& p) {
  constexpr int L = kLanes<A>;
  for (std::int64_t i = 0; i < p.rows; i += kRows) {
    const Left<A> left{p.left.p + i * p.left.row, p.left.row, p.left.k};
    A* const out = p.out + i * p.ldo;
    std::int64_t col = 0;
    const std::int64_t cols = i + kRows;
    const auto block = [&](auto nv) {
      micro<Part::kFull, decltype(nv)::value, A>(left, p.right + col, p.ldr, out + col, out + col,
                                                 p.ldo, nullptr, 0, i, p.depth);
      col += decltype(nv)::value * L;
    };
    struct One {
      enum { value = 1 };
    };
    struct Two {
      enum { value = 2 };
    };
    struct Panel {
      enum { value = kPanel };
    };
    while (col + (kPanel - 1) * L < cols) block(Panel{});
    if (col + L < cols) block(Two{});
    while (col < cols) block(One{});
  }
}

// out[c][r] = in[r][c] for whole vector blocks: rows and cols are rounded up to kLanes.
template <typename A>
void transpose(const A* in, std::int64_t ldi, A* out, std::int64_t ldo, std::int64_t rows,
               std::int64_t cols) {
  constexpr int L = kLanes<A>;
  for (std::int64_t r0 = 0; r0 < rows; r0 += L)
    for (std::int64_t c0 = 0; c0 < cols; c0 += L) {
      Vec<A> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = load(in + (r0 + i) * ldi + c0);
    // Stage w swaps the off-diagonal halves of every 2w x 2w block.
#pragma GCC unroll 4
      for (int w = 1; w < L; w *= 2) {
        VecIndex<A> low, high;
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          low[l] = (l & w) ? L + l - w : l;
          high[l] = (l & w) ? L + l : l + w;
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          if (i & w) continue;
          const Vec<A> a = v[i], b = v[i + w];
          v[i] = __builtin_shuffle(a, b, low);
          v[i + w] = __builtin_shuffle(a, b, high);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(out + (c0 + i) * ldo + r0, v[i]);
    }
}

}  // namespace
}  // namespace zebra::ZEBRA_ISA
