// Products of bf16 matrices on the matrix unit of x86 (AMX-BF16), and the packing that it takes.
//
// A tile product is C[16, 16] += A[16, 32] B[32, 16] in fp32: rows of A are bf16 as they lie, rows
// of B hold two rows of the matrix, interleaved ("pairs": 32 bits a column).  Every size here is a
// multiple of 32; callers pad with zeros.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "common/cpu/vec.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define ZEBRA_AMX 1

#include <immintrin.h>

namespace zebra::ZEBRA_ISA {

static inline std::int64_t pad_32(std::int64_t n) { return (n + 31) / 32 * 32; }

// Memory aligned to cache lines, which rows of tiles then do not straddle.  Not initialised.
template <typename T>
struct Aligned {
  T* const data;
  explicit Aligned(std::int64_t n)
      : data(static_cast<T*>(
            ::operator new(static_cast<std::size_t>(n) * sizeof(T), std::align_val_t(64)))) {}
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  operator T*() const { return data; }
};

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

// A product of 2 x 2 tiles, or 2 x 1 where kTwo is false: tiles_begin, tiles_step for every 32
// columns of A, tiles_end.  4 loads feed 4 products, which the loads then keep up with.
// C: rows at ldc, its second column of tiles at c1.
template <bool kTwo>
ZEBRA_INLINE void tiles_begin(const float* c, const float* c1, std::int64_t ldc, bool add) {
  if (add) {
    ZEBRA_TILE_LOAD(0, c, ldc * 4);
    ZEBRA_TILE_LOAD(1, c + 16 * ldc, ldc * 4);
    if constexpr (kTwo) {
      ZEBRA_TILE_LOAD(2, c1, ldc * 4);
      ZEBRA_TILE_LOAD(3, c1 + 16 * ldc, ldc * 4);
    }
  } else {
    ZEBRA_TILE_ZERO(0);
    ZEBRA_TILE_ZERO(1);
    if constexpr (kTwo) {
      ZEBRA_TILE_ZERO(2);
      ZEBRA_TILE_ZERO(3);
    }
  }
}
// A: rows at lda; B: pairs at ldb, its second tile at b1.
template <bool kTwo>
ZEBRA_INLINE void tiles_step(const BFloat16* a, std::int64_t lda, const std::uint32_t* b,
                             const std::uint32_t* b1, std::int64_t ldb) {
  ZEBRA_TILE_LOAD(4, a, lda * 2);
  ZEBRA_TILE_LOAD(6, b, ldb * 4);
  ZEBRA_TILE_DP(0, 4, 6);
  ZEBRA_TILE_LOAD(5, a + 16 * lda, lda * 2);
  ZEBRA_TILE_DP(1, 5, 6);
  if constexpr (kTwo) {
    ZEBRA_TILE_LOAD(7, b1, ldb * 4);
    ZEBRA_TILE_DP(2, 4, 7);
    ZEBRA_TILE_DP(3, 5, 7);
  }
}
template <bool kTwo>
ZEBRA_INLINE void tiles_end(float* c, float* c1, std::int64_t ldc) {
  ZEBRA_TILE_STORE(0, c, ldc * 4);
  ZEBRA_TILE_STORE(1, c + 16 * ldc, ldc * 4);
  if constexpr (kTwo) {
    ZEBRA_TILE_STORE(2, c1, ldc * 4);
    ZEBRA_TILE_STORE(3, c1 + 16 * ldc, ldc * 4);
  }
}

// C[M, N] = (kAdd: +=) A[M, K] B[K, N].  A: rows at lda; columns 32 i to 32 i + 31 at i a_step
// (32 where A is an ordinary matrix).  b: pairs [K / 2, ldb]; B may be the sum of several such
// parts, at b + i part_stride.
template <bool kAdd>
static inline void amx_product(std::int64_t M, std::int64_t N, std::int64_t K, const BFloat16* a,
                               std::int64_t lda, std::int64_t a_step, const std::uint32_t* b,
                               std::int64_t ldb, float* c, std::int64_t ldc, std::int64_t parts = 1,
                               std::int64_t part_stride = 0) {
  for (std::int64_t m = 0; m < M; m += 32) {
    for (std::int64_t n = 0; n < N; n += 32) {
      float* const at = c + m * ldc + n;
      tiles_begin<true>(at, at + 16, ldc, kAdd);
      for (std::int64_t part = 0; part < parts; ++part) {
        const BFloat16* am = a + m * lda;
        const std::uint32_t* bn = b + part * part_stride + n;
        for (std::int64_t k = 0; k < K; k += 32, am += a_step, bn += 16 * ldb)
          tiles_step<true>(am, lda, bn, bn + 16, ldb);
      }
      tiles_end<true>(at, at + 16, ldc);
    }
  }
}

// A shuffle of two vectors of 16 dwords that does the same in every 128-bit lane.
#define ZEBRA_LANES(A, B, I, J, K, L)                                                        \
  __builtin_shufflevector(A, B, I, J, K, L, I + 4, J + 4, K + 4, L + 4, I + 8, J + 8, K + 8, \
                          L + 8, I + 12, J + 12, K + 12, L + 12)

// dst[j, i] = src[i, j], 16 x 16 dwords: 2 x 2, then 4 x 4 blocks within lanes, then whole lanes.
static inline void transpose_16x16(const void* src, std::int64_t lds, void* dst, std::int64_t ldd) {
  typedef std::uint32_t Vec __attribute__((vector_size(64)));
  typedef std::uint32_t Any __attribute__((vector_size(64), aligned(4), may_alias));
  const char* const from = static_cast<const char*>(src);
  char* const to = static_cast<char*>(dst);
  Vec r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = *reinterpret_cast<const Any*>(from + i * lds * 4);
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
    *reinterpret_cast<Any*>(to + c * ldd * 4) = ZEBRA_EVEN(even_low, even_high);
    *reinterpret_cast<Any*>(to + (4 + c) * ldd * 4) = ZEBRA_EVEN(odd_low, odd_high);
    *reinterpret_cast<Any*>(to + (8 + c) * ldd * 4) = ZEBRA_ODD(even_low, even_high);
    *reinterpret_cast<Any*>(to + (12 + c) * ldd * 4) = ZEBRA_ODD(odd_low, odd_high);
  }
#undef ZEBRA_EVEN
#undef ZEBRA_ODD
}
#undef ZEBRA_LANES

// dst[c, r] = src[r, c], rows and columns multiples of 16, 32-bit elements.
static inline void transpose_dwords(std::int64_t rows, std::int64_t columns, const void* src,
                                    std::int64_t lds, void* dst, std::int64_t ldd) {
  for (std::int64_t r = 0; r < rows; r += 16)
    for (std::int64_t c = 0; c < columns; c += 16)
      transpose_16x16(static_cast<const char*>(src) + (r * lds + c) * 4, lds,
                      static_cast<char*>(dst) + (c * ldd + r) * 4, ldd);
}

// B = A^T as pairs [columns / 2, ldd], from A[rows, columns] with rows at lds.
static inline void transpose_to_pairs(std::int64_t rows, std::int64_t columns, const BFloat16* src,
                                      std::int64_t lds, std::uint32_t* dst, std::int64_t ldd) {
  transpose_dwords(rows, columns / 2, src, lds / 2, dst, ldd);
}

// B = A as pairs [rows / 2, ldd].
static inline void rows_to_pairs(std::int64_t rows, std::int64_t columns, const BFloat16* src,
                                 std::int64_t lds, std::uint32_t* dst, std::int64_t ldd) {
  for (std::int64_t i = 0; i < rows / 2; ++i) {
    const BFloat16* const __restrict even = src + 2 * i * lds;
    const BFloat16* const __restrict odd = even + lds;
    std::uint32_t* const __restrict out = dst + i * ldd;
#pragma omp simd
    for (std::int64_t c = 0; c < columns; ++c)
      out[c] = static_cast<std::uint32_t>(even[c].bits) | static_cast<std::uint32_t>(odd[c].bits)
                                                              << 16;
  }
}

// dst[column, 32] = 32 rows of src, transposed: one step of A^T as amx_product takes it, with
// lda = 32 and a_step = 32 columns.  columns is a multiple of 16.
static inline void transpose_32_rows(std::int64_t columns, const BFloat16* src, std::int64_t lds,
                                     BFloat16* dst) {
  alignas(64) std::uint32_t pairs[16 * 16];
  for (std::int64_t c = 0; c < columns; c += 16) {
    rows_to_pairs(32, 16, src + c, lds, pairs, 16);
    transpose_16x16(pairs, 16, dst + c * 32, 16);
  }
}

// Copies n elements of a row and fills it up with zeros.
static inline void copy_padded(const BFloat16* src, std::int64_t n, BFloat16* dst,
                               std::int64_t padded) {
  if (n > 0) std::memcpy(dst, src, static_cast<std::size_t>(n) * 2);
  if (padded > n) std::memset(dst + n, 0, static_cast<std::size_t>(padded - n) * 2);
}

typedef float Float16 __attribute__((vector_size(64), may_alias));

// Of 2^f in [-1/2, 1/2], minimax in the relative error with 2^0 exact.
constexpr float kExp2[6] = {
    1.0f, 6.931469776e-1f, 2.402224208e-1f, 5.550733744e-2f, 9.671512665e-3f, 1.326472684e-3f};

// 2^x to about 1 ulp for x <= 126; 0 below -126; NaN stays NaN.  The maskz forms of intrinsics:
// gcc 12 warns of an uninitialised value inside the plain ones.
ZEBRA_INLINE void exp2_lanes(const Float16& x, __mmask16 keep, Float16& out) {
  const Float16 least = Float16{} - 126.0f;
  const __mmask16 some = keep & _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
  const Float16 n = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
  const Float16 f = x - n;
  Float16 p = f * kExp2[5] + kExp2[4];
  p = p * f + kExp2[3];
  p = p * f + kExp2[2];
  p = p * f + kExp2[1];
  p = p * f + kExp2[0];
  out = _mm512_maskz_scalef_ps(some, p, n);
}

// The 32 values of low and high rounded to bf16, low first.
ZEBRA_INLINE __m512i round_lanes(const Float16& low, const Float16& high) {
  __m512i out;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high));
  return out;
}

// One row of pairs: even and odd rounded to bf16 and interleaved.
ZEBRA_INLINE void store_pairs(const Float16& even, const Float16& odd, std::uint32_t* dst) {
  const __m512i index = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = round_lanes(even, odd);
  _mm512_storeu_si512(dst, _mm512_maskz_permutexvar_epi16(0xffffffffu, index, both));
}

}  // namespace zebra::ZEBRA_ISA
#endif
