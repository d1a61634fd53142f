// flash_tile.h for bf16 keys and values on the matrix unit of x86 (AMX-BF16).
//
// Keys and values are bf16 and enter exactly.  Queries and probabilities are fp32: they are split
// into sums of bf16 parts (queries into three, which is exact; probabilities into two, 16 bits for
// a 16-bit output), one product each, so that results keep fp32 accuracy.
#pragma once

#include "common/cpu/flash_tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define ZEBRA_FLASH_AMX 1

namespace zebra::ZEBRA_ISA {

// Configures the tile registers of this thread, all 16 rows of 64 bytes, for its lifetime.
struct AmxScope {
  AmxScope() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
  ~AmxScope() { asm volatile("tilerelease"); }
};

#define ZEBRA_TILE_LOAD(N, P, STRIDE)                                                          \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #N::"r"(P), "r"(static_cast<std::int64_t>(STRIDE)) \
               : "memory")
#define ZEBRA_TILE_STORE(N, P, STRIDE)                       \
  asm volatile("tilestored %%tmm" #N ", (%0,%1,1)" ::"r"(P), \
               "r"(static_cast<std::int64_t>(STRIDE))        \
               : "memory")
#define ZEBRA_TILE_ZERO(N) asm volatile("tilezero %tmm" #N)
// C += A B
#define ZEBRA_TILE_DP(C, A, B) asm volatile("tdpbf16ps %tmm" #B ", %tmm" #A ", %tmm" #C)

// A shuffle of two vectors of 16 dwords that does the same in every 128-bit lane.
#define ZEBRA_LANES(A, B, I, J, K, L)                                                        \
  __builtin_shufflevector(A, B, I, J, K, L, I + 4, J + 4, K + 4, L + 4, I + 8, J + 8, K + 8, \
                          L + 8, I + 12, J + 12, K + 12, L + 12)

// dst[j, i] = src[i, j], 16 x 16 dwords: 2 x 2, then 4 x 4 blocks within lanes, then whole lanes.
static inline void transpose_16x16(const std::uint32_t* src, std::int64_t lds, std::uint32_t* dst,
                                   std::int64_t ldd) {
  typedef std::uint32_t Vec __attribute__((vector_size(64)));
  typedef std::uint32_t Any __attribute__((vector_size(64), aligned(4), may_alias));
  Vec r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = *reinterpret_cast<const Any*>(src + i * lds);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = ZEBRA_LANES(r[i], r[i + 1], 0, 16, 1, 17);
    t[i + 1] = ZEBRA_LANES(r[i], r[i + 1], 2, 18, 3, 19);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // lane l of r[i + c]: rows i to i + 3 of column 4 l + c
    r[i] = ZEBRA_LANES(t[i], t[i + 2], 0, 1, 16, 17);
    r[i + 1] = ZEBRA_LANES(t[i], t[i + 2], 2, 3, 18, 19);
    r[i + 2] = ZEBRA_LANES(t[i + 1], t[i + 3], 0, 1, 16, 17);
    r[i + 3] = ZEBRA_LANES(t[i + 1], t[i + 3], 2, 3, 18, 19);
  }
#define ZEBRA_EVEN(A, B) \
  __builtin_shufflevector(A, B, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ZEBRA_ODD(A, B) \
  __builtin_shufflevector(A, B, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Vec even_low = ZEBRA_EVEN(r[c], r[4 + c]), even_high = ZEBRA_EVEN(r[8 + c], r[12 + c]);
    const Vec odd_low = ZEBRA_ODD(r[c], r[4 + c]), odd_high = ZEBRA_ODD(r[8 + c], r[12 + c]);
    *reinterpret_cast<Any*>(dst + c * ldd) = ZEBRA_EVEN(even_low, even_high);
    *reinterpret_cast<Any*>(dst + (4 + c) * ldd) = ZEBRA_EVEN(odd_low, odd_high);
    *reinterpret_cast<Any*>(dst + (8 + c) * ldd) = ZEBRA_ODD(even_low, even_high);
    *reinterpret_cast<Any*>(dst + (12 + c) * ldd) = ZEBRA_ODD(odd_low, odd_high);
  }
#undef ZEBRA_EVEN
#undef ZEBRA_ODD
#undef ZEBRA_LANES
}

// Takes the leading bf16 part off x; returns its bits, low half first.
static inline std::uint32_t take_part(float& x) {
  const BFloat16 part = from_acc<BFloat16>(x);
  x -= to_acc(part);
  return part.bits;
}

struct FlashAmx : FlashTile<float> {
  static constexpr int kQueryParts = 3;
  std::int64_t steps;         // of 32 along the depth
  std::uint32_t* parts;       // memory of all of the below
  std::uint32_t* q_parts;     // [kQueryParts, steps * 16, 64]: pairs of q's rows
  std::uint32_t* p_pairs;     // [kFlashKeys / 2, 64]: pairs of rows of s
  std::uint32_t* p_parts;     // [2, 64, kFlashKeys / 2]: probabilities, a row a query
  std::uint32_t* v_pairs;     // [kFlashKeys / 2, ldo]: pairs of rows of v
  std::int64_t ldk16, ldv16;  // row strides of keys and values
  BFloat16 *k16, *v16;        // [kFlashKeys, ldk16 or ldv16]: the block of keys and values

  FlashAmx(std::int64_t depth_, std::int64_t width_, bool latent)
      : FlashTile<float>(depth_, width_, latent), steps((depth_ + 31) / 32) {
    constexpr std::int64_t kPairs = kFlashKeys / 2;
    ldk16 = steps * 32, ldv16 = latent ? ldk16 : 2 * ldo;
    const std::int64_t q_size = kQueryParts * steps * 16 * kFlashRows;
    const std::int64_t p_size = kPairs * kFlashRows;
    const std::int64_t total =
        q_size + 3 * p_size + kPairs * (ldo + ldk16 + ldv16) + 16;  // pairs of 16 bits
    parts = new std::uint32_t[total];
    for (std::int64_t i = 0; i < total; ++i) parts[i] = 0;
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(parts);
    q_parts = parts + (64 - at % 64) % 64 / 4;  // tile rows do not straddle cache lines
    k16 = reinterpret_cast<BFloat16*>(q_parts + q_size);
    p_pairs = q_parts + q_size + kPairs * ldk16;
    p_parts = p_pairs + p_size;
    v_pairs = p_parts + 2 * p_size;
    v16 = latent ? k16 : reinterpret_cast<BFloat16*>(v_pairs + kPairs * ldo);
  }
  ~FlashAmx() { delete[] parts; }

  void queries_ready() {
    for (std::int64_t i = 0; i < steps * 16; ++i) {
      const std::int64_t stride = steps * 16 * ld;
      std::uint32_t* const __restrict out = q_parts + i * ld;
      const bool low = 2 * i < depth, high = 2 * i + 1 < depth;
#pragma omp simd
      for (std::int64_t r = 0; r < ld; ++r) {
        float a = low ? q[2 * i * ld + r] : 0.0f, b = high ? q[(2 * i + 1) * ld + r] : 0.0f;
        for (int part = 0; part < kQueryParts; ++part) {
          const std::uint32_t even = take_part(a), odd = take_part(b);
          out[part * stride + r] = even | odd << 16;
        }
      }
    }
  }

  // Two key tiles by one or two row tiles, at key j and row r.
  template <bool kTwo>
  void score_tiles(std::int64_t j, std::int64_t r) {
    ZEBRA_TILE_ZERO(0);
    ZEBRA_TILE_ZERO(1);
    ZEBRA_TILE_ZERO(2);
    ZEBRA_TILE_ZERO(3);
    for (std::int64_t i = 0; i < steps; ++i) {
      ZEBRA_TILE_LOAD(4, k16 + j * ldk16 + i * 32, ldk16 * 2);
      ZEBRA_TILE_LOAD(5, k16 + (j + 16) * ldk16 + i * 32, ldk16 * 2);
      for (int part = 0; part < kQueryParts; ++part) {
        const std::uint32_t* const b = q_parts + (part * steps + i) * 16 * ld + r;
        ZEBRA_TILE_LOAD(6, b, ld * 4);
        ZEBRA_TILE_DP(0, 4, 6);
        ZEBRA_TILE_DP(1, 5, 6);
        if constexpr (kTwo) {
          ZEBRA_TILE_LOAD(7, b + 16, ld * 4);
          ZEBRA_TILE_DP(2, 4, 7);
          ZEBRA_TILE_DP(3, 5, 7);
        }
      }
    }
    ZEBRA_TILE_STORE(0, s + j * ld + r, ld * 4);
    ZEBRA_TILE_STORE(1, s + (j + 16) * ld + r, ld * 4);
    if constexpr (kTwo) {
      ZEBRA_TILE_STORE(2, s + j * ld + r + 16, ld * 4);
      ZEBRA_TILE_STORE(3, s + (j + 16) * ld + r + 16, ld * 4);
    }
  }

  // Two row tiles (the second may repeat the first) by one or two tiles of values.
  template <bool kTwoRows, bool kTwoColumns>
  void output_tiles(std::int64_t r, std::int64_t c) {
    constexpr std::int64_t kPairs = kFlashKeys / 2;
    float* const at = o + r * ldo + c;
    ZEBRA_TILE_LOAD(0, at, ldo * 4);
    if constexpr (kTwoColumns) ZEBRA_TILE_LOAD(1, at + 16, ldo * 4);
    if constexpr (kTwoRows) ZEBRA_TILE_LOAD(2, at + 16 * ldo, ldo * 4);
    if constexpr (kTwoRows && kTwoColumns) ZEBRA_TILE_LOAD(3, at + 16 * ldo + 16, ldo * 4);
    for (std::int64_t i = 0; i < kPairs; i += 16) {
      ZEBRA_TILE_LOAD(6, v_pairs + i * ldo + c, ldo * 4);
      if constexpr (kTwoColumns) ZEBRA_TILE_LOAD(7, v_pairs + i * ldo + c + 16, ldo * 4);
      for (int part = 0; part < 2; ++part) {
        const std::uint32_t* const a = p_parts + (part * kFlashRows + r) * kPairs + i;
        ZEBRA_TILE_LOAD(4, a, kPairs * 4);
        ZEBRA_TILE_DP(0, 4, 6);
        if constexpr (kTwoColumns) ZEBRA_TILE_DP(1, 4, 7);
        if constexpr (kTwoRows) {
          ZEBRA_TILE_LOAD(5, a + 16 * kPairs, kPairs * 4);
          ZEBRA_TILE_DP(2, 5, 6);
          if constexpr (kTwoColumns) ZEBRA_TILE_DP(3, 5, 7);
        }
      }
    }
    ZEBRA_TILE_STORE(0, at, ldo * 4);
    if constexpr (kTwoColumns) ZEBRA_TILE_STORE(1, at + 16, ldo * 4);
    if constexpr (kTwoRows) ZEBRA_TILE_STORE(2, at + 16 * ldo, ldo * 4);
    if constexpr (kTwoRows && kTwoColumns) ZEBRA_TILE_STORE(3, at + 16 * ldo + 16, ldo * 4);
  }

  void split_probabilities(std::int64_t keys) {
    constexpr std::int64_t kPairs = kFlashKeys / 2;
    // Keys past the block: probability 0.
    for (std::int64_t j = keys; j < kFlashKeys; ++j)
      for (std::int64_t r = 0; r < ld; ++r) s[j * ld + r] = 0.0f;
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t i = 0; i < kPairs; ++i) {
        float* const __restrict even = s + 2 * i * ld;
        float* const __restrict odd = even + ld;
        std::uint32_t* const __restrict out = p_pairs + i * ld;
#pragma omp simd
        for (std::int64_t r = 0; r < ld; ++r) {
          const std::uint32_t low = take_part(even[r]), high = take_part(odd[r]);
          out[r] = low | high << 16;
        }
      }
      for (std::int64_t r = 0; r < ld; r += 16)
        for (std::int64_t i = 0; i < kPairs; i += 16)
          transpose_16x16(p_pairs + i * ld + r, ld, p_parts + (part * kFlashRows + r) * kPairs + i,
                          kPairs);
    }
  }

  void pair_values(std::int64_t keys) {
    for (std::int64_t i = 0; i < kFlashKeys / 2; ++i) {
      std::uint32_t* const __restrict out = v_pairs + i * ldo;
      const BFloat16* const even = v16 + 2 * i * ldv16;
      const BFloat16* const odd = even + ldv16;
      if (2 * i + 1 < keys) {
#pragma omp simd
        for (std::int64_t c = 0; c < width; ++c)
          out[c] = static_cast<std::uint32_t>(even[c].bits) |
                   static_cast<std::uint32_t>(odd[c].bits) << 16;
      } else {
        for (std::int64_t c = 0; c < width; ++c) out[c] = 2 * i < keys ? even[c].bits : 0;
      }
    }
  }

  void load_key(std::int64_t j, const BFloat16* src, std::int64_t n, std::int64_t at = 0) {
    std::memcpy(k16 + j * ldk16 + at, src, n * sizeof(BFloat16));
  }
  void load_value(std::int64_t j, const BFloat16* src) {
    std::memcpy(v16 + j * ldv16, src, width * sizeof(BFloat16));
  }

  void fold(std::int64_t keys, const std::int32_t* visible) {
    for (std::int64_t j = 0; j < keys; j += 32) {
      std::int64_t r = 0;
      for (; r + 32 <= ld; r += 32) score_tiles<true>(j, r);
      if (r < ld) score_tiles<false>(j, r);
    }
    if (visible != nullptr) mask(keys, visible);
    softmax(keys);
    split_probabilities(keys);
    pair_values(keys);
    for (std::int64_t r = 0; r < ld; r += 32) {
      const bool two = r + 32 <= ld;
      std::int64_t c = 0;
      for (; c + 32 <= ldo; c += 32)
        two ? output_tiles<true, true>(r, c) : output_tiles<false, true>(r, c);
      if (c < ldo) two ? output_tiles<true, false>(r, c) : output_tiles<false, false>(r, c);
    }
  }
};

}  // namespace zebra::ZEBRA_ISA
#endif
