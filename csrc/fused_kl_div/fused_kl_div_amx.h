// The logits of a slab of the vocabulary on the matrix unit of x86: bf16 weight rows as they lie in
// memory, times hidden states that were packed once, summed in fp32.
#pragma once

#include "common/cpu/flash_amx.h"
#include "fused_kl_div/fused_kl_div.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define ZEBRA_KL_AMX 1

namespace zebra::ZEBRA_ISA {
namespace {

constexpr std::int64_t kKlDepth = 512;  // of the width, summed while 32 weight rows stay in L1
constexpr std::int64_t kKlRows = 32;    // weight rows of a block: two tiles

// Two tiles of weight rows by one or two tiles of 16 tokens.
template <bool kTwo>
void kl_tiles(const char* w, std::int64_t w_bytes, const std::uint32_t* b, std::int64_t b_stride,
              std::int64_t steps, const char* next, std::int64_t next_bytes, std::int64_t lines,
              float* c, std::int64_t row_stride, std::int64_t tile_stride, bool add) {
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

// Logits of weight rows [first, first + count) into c, which has room for whole blocks of rows.
// `block` holds kKlRows rows of kKlDepth.
void kl_product(const KlLogits& m, std::int64_t first, std::int64_t count, std::int64_t tokens,
                float* c, std::int64_t row_stride, std::int64_t tile_stride, BFloat16* block) {
  const std::int64_t all_steps = (m.width + 31) / 32, tiles = kl_padded_tokens(tokens) / 16;
  const std::int64_t b_stride = all_steps * 256, bytes = m.weight_stride * 2;
  const std::int64_t lines = (kKlRows * 2 + tiles - 1) / tiles;  // to prefetch, a step
  for (std::int64_t k = 0; k < m.width; k += kKlDepth) {
    const std::int64_t depth = m.width - k < kKlDepth ? m.width - k : kKlDepth;
    const std::int64_t steps = (depth + 31) / 32;
    for (std::int64_t r = 0; r < count; r += kKlRows) {
      const std::int64_t rows = count - r < kKlRows ? count - r : kKlRows;
      const BFloat16* const src =
          static_cast<const BFloat16*>(m.weight) + (first + r) * m.weight_stride + k;
      const char* w = reinterpret_cast<const char*>(src);
      std::int64_t w_bytes = bytes;
      // Rows far apart share few sets of the L1 cache; rows past the end are not ours to read.
      if (rows < kKlRows || depth % 32 != 0 || m.weight_stride > kKlDepth) {
        for (std::int64_t i = 0; i < kKlRows; ++i) {
          BFloat16* const row = block + i * kKlDepth;
          const std::int64_t n = i < rows ? depth : 0;
          std::memcpy(row, src + i * m.weight_stride, static_cast<std::size_t>(n) * 2);
          std::memset(row + n, 0, static_cast<std::size_t>(steps * 32 - n) * 2);
        }
        w = reinterpret_cast<const char*>(block);
        w_bytes = kKlDepth * 2;
      }
      const char* const next = reinterpret_cast<const char*>(src) + kKlRows * bytes;
      const bool more = r + 2 * kKlRows <= count;
      float* const at = c + r * row_stride;
      std::int64_t t = 0;
      for (; t < tiles; t += 2) {
        const std::uint32_t* const b = m.pairs + t * b_stride + k * 8;
        const std::int64_t begin = t / 2 * lines;
        const std::int64_t left = kKlRows - begin < lines ? kKlRows - begin : lines;
        const std::int64_t here = more && left > 0 ? left : 0;
        if (t + 1 < tiles)
          kl_tiles<true>(w, w_bytes, b, b_stride, steps, next + begin * bytes, bytes, here,
                         at + t * tile_stride, row_stride, tile_stride, k > 0);
        else
          kl_tiles<false>(w, w_bytes, b, b_stride, steps, next + begin * bytes, bytes, here,
                          at + t * tile_stride, row_stride, tile_stride, k > 0);
      }
    }
  }
}

}  // namespace
}  // namespace zebra::ZEBRA_ISA
#endif
