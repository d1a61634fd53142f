// A linear layer on the matrix unit of x86: bf16 weight rows as they lie in memory, each read once,
// times rows of x that were packed before, summed in fp32.
#pragma once

#include "common/cpu/amx.h"
#include "common/cpu/isa.h"

#ifdef ZEBRA_AMX

namespace zebra::ZEBRA_ISA {
constexpr std::int64_t kAmxDepth = 512;  // of the width, summed while 32 weight rows stay in L1
constexpr std::int64_t kAmxRows = 32;    // weight rows of a block: two tiles

// Packs up to 16 rows of x, [16, pad_32(width)] with zeros where x ends: amx_packed_size(16, width)
// dwords of `pairs`.
static inline void amx_pack_tile(const BFloat16* rows, std::int64_t width, std::uint32_t* pairs) {
  transpose_to_pairs(16, pad_32(width), rows, pad_32(width), pairs, 16);
}

// Two tiles of weight rows by one or two tiles of 16 rows of x, and `lines` prefetches a step.
template <bool kTwo>
static inline void amx_weight_tiles(const BFloat16* w, std::int64_t ldw, const std::uint32_t* b,
                                    std::int64_t b_stride, std::int64_t steps, const BFloat16* next,
                                    std::int64_t ld_next, std::int64_t lines, float* c,
                                    std::int64_t row_stride, std::int64_t tile_stride, bool add) {
  tiles_begin<kTwo>(c, c + tile_stride, row_stride, add);
  for (std::int64_t i = 0; i < steps; ++i) {
    tiles_step<kTwo>(w + i * 32, ldw, b + i * 256, b + b_stride + i * 256, 16);
    for (std::int64_t l = 0; l < lines; ++l) __builtin_prefetch(next + l * ld_next + i * 32);
  }
  tiles_end<kTwo>(c, c + tile_stride, row_stride);
}

// Products of `count` weight rows with the packed rows of x: of weight row v and row r, at c[v
// row_stride + r / 16 tile_stride + r % 16], with room for whole blocks of kAmxRows weight rows.
// `block` is scratch, kAmxRows rows of kAmxDepth.
static inline void amx_weight_product(const BFloat16* weight, std::int64_t weight_stride,
                                      std::int64_t count, std::int64_t width,
                                      const std::uint32_t* pairs, std::int64_t rows_of_x, float* c,
                                      std::int64_t row_stride, std::int64_t tile_stride,
                                      BFloat16* block) {
  const std::int64_t all_steps = pad_32(width) / 32, tiles = (rows_of_x + 15) / 16;
  const std::int64_t b_stride = amx_packed_size(16, width);
  const std::int64_t lines = (kAmxRows * 2 + tiles - 1) / tiles;  // to prefetch, a step
  // Two tiles of x: every weight is used once, and the sums stay in registers over the whole width.
  // What follows in the same rows is fetched ahead.
  if (tiles <= 2 && width % 32 == 0) {
    constexpr std::int64_t kAhead = 512;
    for (; count >= kAmxRows; count -= kAmxRows) {
      if (tiles == 2)
        amx_weight_tiles<true>(weight, weight_stride, pairs, b_stride, all_steps, weight + kAhead,
                               weight_stride, kAmxRows, c, row_stride, tile_stride, false);
      else
        amx_weight_tiles<false>(weight, weight_stride, pairs, b_stride, all_steps, weight + kAhead,
                                weight_stride, kAmxRows, c, row_stride, tile_stride, false);
      weight += kAmxRows * weight_stride;
      c += kAmxRows * row_stride;
    }
  }
  for (std::int64_t k = 0; k < width; k += kAmxDepth) {
    const std::int64_t depth = width - k < kAmxDepth ? width - k : kAmxDepth;
    const std::int64_t steps = pad_32(depth) / 32;
    for (std::int64_t r = 0; r < count; r += kAmxRows) {
      const std::int64_t rows = count - r < kAmxRows ? count - r : kAmxRows;
      const BFloat16* const src = weight + r * weight_stride + k;
      const BFloat16* w = src;
      std::int64_t ldw = weight_stride;
      // Rows far apart share few sets of the L1 cache; rows past the end are not ours to read.
      if (rows < kAmxRows || depth % 32 != 0 || weight_stride > kAmxDepth) {
        for (std::int64_t i = 0; i < kAmxRows; ++i) {
          const std::int64_t n = i < rows ? depth : 0;
          copy_padded(src + i * weight_stride, n, block + i * kAmxDepth, steps * 32);
        }
        w = block;
        ldw = kAmxDepth;
      }
      // The rows after these, also past the last: the next call of this thread takes them.
      const BFloat16* const next = src + kAmxRows * weight_stride;
      float* const at = c + r * row_stride;
      std::int64_t t = 0;
      for (; t < tiles; t += 2) {
        const std::uint32_t* const b = pairs + t * b_stride + k * 8;
        const std::int64_t begin = t / 2 * lines;
        const std::int64_t left = kAmxRows - begin < lines ? kAmxRows - begin : lines;
        const std::int64_t here = left > 0 ? left : 0;
        if (t + 1 < tiles)
          amx_weight_tiles<true>(w, ldw, b, b_stride, steps, next + begin * weight_stride,
                                 weight_stride, here, at + t * tile_stride, row_stride, tile_stride,
                                 k > 0);
        else
          amx_weight_tiles<false>(w, ldw, b, b_stride, steps, next + begin * weight_stride,
                                  weight_stride, here, at + t * tile_stride, row_stride,
                                  tile_stride, k > 0);
      }
    }
  }
}

}  // namespace zebra::ZEBRA_ISA
#endif
