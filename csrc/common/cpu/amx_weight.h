// A linear layer on the matrix unit of x86: bf16 weight rows as they lie in memory, each read once,
// times rows of x that were packed before, summed in fp32.
#pragma once

#include "common/cpu/flash_amx.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define ZEBRA_AMX_WEIGHT 1

namespace zebra::ZEBRA_ISA {
constexpr std::int64_t kAmxDepth = 512;  // of the width, summed while 32 weight rows stay in L1
constexpr std::int64_t kAmxRows = 32;    // weight rows of a block: two tiles

// Dwords of rows of x when packed: tiles of 16 rows, [ceil(width / 32) * 16 pairs of columns, 16].
static inline std::int64_t amx_packed_size(std::int64_t rows, std::int64_t width) {
  return (rows + 15) / 16 * ((width + 31) / 32) * 256;
}

// Packs row r of x, as bf16; the memory must have been zero.
static inline void amx_pack_row(const BFloat16* row, std::int64_t r, std::int64_t width,
                                std::uint32_t* pairs) {
  std::uint32_t* const out = pairs + r / 16 * ((width + 31) / 32) * 256 + r % 16;
  for (std::int64_t i = 0; i + 1 < width; i += 2)
    out[i / 2 * 16] = row[i].bits | static_cast<std::uint32_t>(row[i + 1].bits) << 16;
  if (width % 2 != 0) out[width / 2 * 16] = row[width - 1].bits;
}

// Two tiles of weight rows by one or two tiles of 16 rows of x.
template <bool kTwo>
static inline void amx_weight_tiles(const char* w, std::int64_t w_bytes, const std::uint32_t* b,
                                    std::int64_t b_stride, std::int64_t steps, const char* next,
                                    std::int64_t next_bytes, std::int64_t lines, float* c,
                                    std::int64_t row_stride, std::int64_t tile_stride, bool add) {
  float* const c1 = c + tile_stride;
  float* const below = c + 16 * row_stride;
  float* const below1 = c1 + 16 * row_stride;
  if (add) {
    ZEBRA_TILE_LOAD(0, c, row_stride * 4);
    ZEBRA_TILE_LOAD(1, below, row_stride * 4);
    if constexpr (kTwo) {
      ZEBRA_TILE_LOAD(2, c1, row_stride * 4);
      ZEBRA_TILE_LOAD(3, below1, row_stride * 4);
    }
  } else {
    ZEBRA_TILE_ZERO(0);
    ZEBRA_TILE_ZERO(1);
    ZEBRA_TILE_ZERO(2);
    ZEBRA_TILE_ZERO(3);
  }
  for (std::int64_t i = 0; i < steps; ++i) {
    ZEBRA_TILE_LOAD(4, w + i * 64, w_bytes);
    ZEBRA_TILE_LOAD(6, b + i * 256, 64);
    ZEBRA_TILE_DP(0, 4, 6);
    ZEBRA_TILE_LOAD(5, w + 16 * w_bytes + i * 64, w_bytes);
    ZEBRA_TILE_DP(1, 5, 6);
    if constexpr (kTwo) {
      ZEBRA_TILE_LOAD(7, b + b_stride + i * 256, 64);
      ZEBRA_TILE_DP(2, 4, 7);
      ZEBRA_TILE_DP(3, 5, 7);
    }
    for (std::int64_t l = 0; l < lines; ++l) __builtin_prefetch(next + l * next_bytes + i * 64);
  }
  ZEBRA_TILE_STORE(0, c, row_stride * 4);
  ZEBRA_TILE_STORE(1, below, row_stride * 4);
  if constexpr (kTwo) {
    ZEBRA_TILE_STORE(2, c1, row_stride * 4);
    ZEBRA_TILE_STORE(3, below1, row_stride * 4);
  }
}

// Products of `count` weight rows with the packed rows of x: of weight row v and row r, at c[v
// row_stride + r / 16 tile_stride + r % 16], with room for whole blocks of kAmxRows weight rows.
// `block` is scratch, kAmxRows rows of kAmxDepth.
static inline void amx_weight_product(const BFloat16* weight, std::int64_t weight_stride,
                                      std::int64_t count, std::int64_t width,
                                      const std::uint32_t* pairs, std::int64_t rows_of_x, float* c,
                                      std::int64_t row_stride, std::int64_t tile_stride,
                                      BFloat16* block) {
  const std::int64_t all_steps = (width + 31) / 32, tiles = (rows_of_x + 15) / 16;
  const std::int64_t b_stride = all_steps * 256, bytes = weight_stride * 2;
  const std::int64_t lines = (kAmxRows * 2 + tiles - 1) / tiles;  // to prefetch, a step
  // Two tiles of x: every weight is used once, and the sums stay in registers over the whole width.
  // What follows in the same rows is fetched ahead.
  if (tiles <= 2 && width % 32 == 0) {
    constexpr std::int64_t kAhead = 1024;  // bytes
    for (; count >= kAmxRows; count -= kAmxRows) {
      const char* const w = reinterpret_cast<const char*>(weight);
      if (tiles == 2)
        amx_weight_tiles<true>(w, bytes, pairs, b_stride, all_steps, w + kAhead, bytes, kAmxRows, c,
                               row_stride, tile_stride, false);
      else
        amx_weight_tiles<false>(w, bytes, pairs, b_stride, all_steps, w + kAhead, bytes, kAmxRows,
                                c, row_stride, tile_stride, false);
      weight += kAmxRows * weight_stride;
      c += kAmxRows * row_stride;
    }
  }
  for (std::int64_t k = 0; k < width; k += kAmxDepth) {
    const std::int64_t depth = width - k < kAmxDepth ? width - k : kAmxDepth;
    const std::int64_t steps = (depth + 31) / 32;
    for (std::int64_t r = 0; r < count; r += kAmxRows) {
      const std::int64_t rows = count - r < kAmxRows ? count - r : kAmxRows;
      const BFloat16* const src = weight + r * weight_stride + k;
      const char* w = reinterpret_cast<const char*>(src);
      std::int64_t w_bytes = bytes;
      // Rows far apart share few sets of the L1 cache; rows past the end are not ours to read.
      if (rows < kAmxRows || depth % 32 != 0 || weight_stride > kAmxDepth) {
        for (std::int64_t i = 0; i < kAmxRows; ++i) {
          BFloat16* const row = block + i * kAmxDepth;
          const std::int64_t n = i < rows ? depth : 0;
          std::memcpy(row, src + i * weight_stride, static_cast<std::size_t>(n) * 2);
          std::memset(row + n, 0, static_cast<std::size_t>(steps * 32 - n) * 2);
        }
        w = reinterpret_cast<const char*>(block);
        w_bytes = kAmxDepth * 2;
      }
      // The rows after these, also past the last: the next call of this thread takes them.
      const char* const next = reinterpret_cast<const char*>(src) + kAmxRows * bytes;
      float* const at = c + r * row_stride;
      std::int64_t t = 0;
      for (; t < tiles; t += 2) {
        const std::uint32_t* const b = pairs + t * b_stride + k * 8;
        const std::int64_t begin = t / 2 * lines;
        const std::int64_t left = kAmxRows - begin < lines ? kAmxRows - begin : lines;
        const std::int64_t here = left > 0 ? left : 0;
        if (t + 1 < tiles)
          amx_weight_tiles<true>(w, w_bytes, b, b_stride, steps, next + begin * bytes, bytes, here,
                                 at + t * tile_stride, row_stride, tile_stride, k > 0);
        else
          amx_weight_tiles<false>(w, w_bytes, b, b_stride, steps, next + begin * bytes, bytes, here,
                                  at + t * tile_stride, row_stride, tile_stride, k > 0);
      }
    }
  }
}

}  // namespace zebra::ZEBRA_ISA
#endif
