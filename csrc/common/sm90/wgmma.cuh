// Warpgroup matrix products (sm_90a) [PTX ISA 9.7.15]: D[64, N] += A[64, 16] B[16, N], fp32
// accumulators.
//
// One warpgroup (128 threads, first warp index a multiple of 4) issues them together.  Thread t
// holds of D, with g = t % 32 / 4, c = t % 4, w = t / 32 % 4:  d[4 j + 2 i + k] = D[16 w + 8 i +
// g][8 j + 2 c + k]. A from registers has the layout of that D rounded to 16 bits: a[2 * half + i]
// = rows 8 i + g, columns 8 half + 2 c + {0, 1} of a 64 x 16 slice.
//
// Operands in shared memory are tiles of 128-byte rows in the 128-byte swizzle that TMA writes:
// 16-byte unit u of row r lies at unit u ^ (r % 8).  A tile is 64 elements wide; wider operands are
// several tiles, `kTileBytes` apart.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

namespace zebra::sm90 {

// Descriptor of a swizzled operand at byte address `addr`: `leading` and `stride` are byte offsets.
//   K-major (rows are m or n, 64 elements of k a tile): stride 1024 (8 rows); advance k by 16: +32
//   bytes. MN-major (rows are k): leading = distance of the next 64 columns, stride 1024; advance k
//   by 16: +2048.
__device__ __forceinline__ std::uint64_t wgmma_descriptor(std::uint32_t addr, std::uint32_t leading,
                                                          std::uint32_t stride = 1024) {
  constexpr std::uint64_t kSwizzle128 = 1ull << 62;
  return (addr & 0x3ffffu) >> 4 | static_cast<std::uint64_t>(leading >> 4) << 16 |
         static_cast<std::uint64_t>(stride >> 4) << 32 | kSwizzle128;
}
// A descriptor moved by `bytes`.
__device__ __forceinline__ std::uint64_t advance(std::uint64_t descriptor, std::uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Keeps ordinary code on these registers on its side of this line.
template <int kSize>
__device__ __forceinline__ void wgmma_hold(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Registers written by ordinary code are ready for the wgmma that follow.  Name the accumulators
// that ordinary code has written.
template <int... kSizes>
__device__ __forceinline__ void wgmma_fence(float (&... accumulators)[kSizes]) {
  (wgmma_hold(accumulators), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending committed groups are still running.  Name the accumulators that
// ordinary code reads next.
template <int kPending, int... kSizes>
__device__ __forceinline__ void wgmma_wait(float (&... accumulators)[kSizes]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (wgmma_hold(accumulators), ...);
}

#define ZEBRA_D8(d, i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ZEBRA_D32(d, i) ZEBRA_D8(d, i), ZEBRA_D8(d, i + 8), ZEBRA_D8(d, i + 16), ZEBRA_D8(d, i + 24)
#define ZEBRA_P32                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ZEBRA_P64                                                                                \
  ZEBRA_P32                                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ZEBRA_P128                                                                               \
  ZEBRA_P64                                                                                      \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "   \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "   \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// B is K-major (0) or MN-major (1) in shared memory.
enum class Major { kK = 0, kMN = 1 };

// D += A B (D = A B where `accumulate` is false), A and B in shared memory, A K-major; N = 8, 16,
// 32, 64, 128 or 256 by the size of d, N / 2.
#define ZEBRA_SS(SIZE, N, OUTPUTS, NAMES, A, B, P, MAJOR)                                      \
  template <typename T, Major kMajor = Major::kK>                                              \
  __device__ __forceinline__ void wgmma_ss(float (&d)[SIZE], std::uint64_t a, std::uint64_t b, \
                                           bool accumulate) {                                  \
    if constexpr (std::is_same_v<T, __nv_bfloat16>)                                            \
      ZEBRA_SS_OF("bf16", N, OUTPUTS, NAMES, A, B, P, MAJOR);                                  \
    else                                                                                       \
      ZEBRA_SS_OF("f16", N, OUTPUTS, NAMES, A, B, P, MAJOR);                                   \
  }
#define ZEBRA_SS_OF(TYPE, N, OUTPUTS, NAMES, A, B, P, MAJOR)                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                             \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, " A \
               ", " B ", p, 1, 1, 0, " MAJOR ";\n}\n"                                            \
               : OUTPUTS(d)                                                                      \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajor)))
#define ZEBRA_D4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define ZEBRA_D8A(d) ZEBRA_D8(d, 0)
#define ZEBRA_D32A(d) ZEBRA_D32(d, 0)
#define ZEBRA_D16(d) ZEBRA_D8(d, 0), ZEBRA_D8(d, 8)
#define ZEBRA_D64(d) ZEBRA_D32(d, 0), ZEBRA_D32(d, 32)
#define ZEBRA_D128(d) ZEBRA_D32(d, 0), ZEBRA_D32(d, 32), ZEBRA_D32(d, 64), ZEBRA_D32(d, 96)
#define ZEBRA_P8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ZEBRA_P16 ZEBRA_P8 ", %8, %9, %10, %11, %12, %13, %14, %15"
ZEBRA_SS(4, "8", ZEBRA_D4, "%0, %1, %2, %3", "%4", "%5", "%6", "%7")
ZEBRA_SS(8, "16", ZEBRA_D8A, ZEBRA_P8, "%8", "%9", "%10", "%11")
ZEBRA_SS(16, "32", ZEBRA_D16, ZEBRA_P16, "%16", "%17", "%18", "%19")
ZEBRA_SS(32, "64", ZEBRA_D32A, ZEBRA_P32, "%32", "%33", "%34", "%35")
ZEBRA_SS(64, "128", ZEBRA_D64, ZEBRA_P64, "%64", "%65", "%66", "%67")
ZEBRA_SS(128, "256", ZEBRA_D128, ZEBRA_P128, "%128", "%129", "%130", "%131")
#undef ZEBRA_SS
#undef ZEBRA_SS_OF

// D += A B, A in registers, B in shared memory; N = 8, 16, 32, 64, 128 or 256 by the size of d.
#define ZEBRA_RS(SIZE, N, OUTPUTS, NAMES, A0, A1, A2, A3, B, P, MAJOR)                    \
  template <typename T, Major kMajor>                                                     \
  __device__ __forceinline__ void wgmma_rs(float (&d)[SIZE], const std::uint32_t (&a)[4], \
                                           std::uint64_t b, bool accumulate = true) {     \
    if constexpr (std::is_same_v<T, __nv_bfloat16>)                                       \
      ZEBRA_RS_OF("bf16", N, OUTPUTS, NAMES, A0, A1, A2, A3, B, P, MAJOR);                \
    else                                                                                  \
      ZEBRA_RS_OF("f16", N, OUTPUTS, NAMES, A0, A1, A2, A3, B, P, MAJOR);                 \
  }
#define ZEBRA_RS_OF(TYPE, N, OUTPUTS, NAMES, A0, A1, A2, A3, B, P, MAJOR)                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                               \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, {" A0 \
               ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, " MAJOR ";\n}\n"                        \
               : OUTPUTS(d)                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                               \
                 "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajor)))
ZEBRA_RS(4, "8", ZEBRA_D4, "%0, %1, %2, %3", "%4", "%5", "%6", "%7", "%8", "%9", "%10")
ZEBRA_RS(8, "16", ZEBRA_D8A, ZEBRA_P8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
ZEBRA_RS(16, "32", ZEBRA_D16, ZEBRA_P16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
ZEBRA_RS(32, "64", ZEBRA_D32A, ZEBRA_P32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
ZEBRA_RS(64, "128", ZEBRA_D64, ZEBRA_P64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
ZEBRA_RS(128, "256", ZEBRA_D128, ZEBRA_P128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#undef ZEBRA_RS
#undef ZEBRA_RS_OF
#undef ZEBRA_D4
#undef ZEBRA_D8A
#undef ZEBRA_D32A
#undef ZEBRA_D16
#undef ZEBRA_D64
#undef ZEBRA_D128
#undef ZEBRA_P8
#undef ZEBRA_P16
#undef ZEBRA_D8
#undef ZEBRA_D32
#undef ZEBRA_P32
#undef ZEBRA_P64
#undef ZEBRA_P128

}  // namespace zebra::sm90
