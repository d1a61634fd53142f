// Hopper's instructions on host threads, with the names of csrc/common/sm90 and csrc/common/cuda:
// barriers, TMA, wgmma.  The folder sm90_on_host/ comes first on the include path and leads here.
// A wgmma is executed when it is issued or, where `wgmma_is_late`, when it is waited for: between
// the two its operands must not change.
#pragma once

#include "cuda_on_host.h"

#include <functional>
#include <type_traits>

#define __global__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};
// A map of the host: a tensor of 16-bit elements in 3 dimensions.
struct CUtensorMap {
  const std::uint16_t* base;
  std::int64_t sizes[3], strides[3];
  int box[3];
};

inline float __shfl_xor_sync(unsigned mask, float value, int by) {
  return __shfl_sync(mask, value, (threadIdx.x % 32) ^ by);
}
inline float __fdividef(float a, float b) { return a / b; }

namespace zebra {
namespace {
alignas(1024) unsigned char smem[232448];
}

using cuda_on_host::kPatience, cuda_on_host::stuck;

template <typename T>
float widen(std::uint16_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
  } else {
    _Float16 v;
    std::memcpy(&v, &bits, 2);
    return static_cast<float>(v);
  }
}
template <typename T>
std::uint16_t narrow(float v) {
  std::uint16_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    std::uint32_t wide;
    std::memcpy(&wide, &v, 4);
    bits = static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  } else {
    const _Float16 half = static_cast<_Float16>(v);
    std::memcpy(&bits, &half, 2);
  }
  return bits;
}

// ---- common/cuda/mma.cuh

inline std::uint32_t smem_addr(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - smem);
}
inline uint4 ld_shared_v4(std::uint32_t addr) {
  uint4 v;
  std::memcpy(&v, smem + addr, 16);
  return v;
}
inline void st_shared(std::uint32_t addr, std::uint32_t v) { std::memcpy(smem + addr, &v, 4); }
inline void st_shared_v2(std::uint32_t addr, std::uint32_t x, std::uint32_t y) {
  st_shared(addr, x), st_shared(addr + 4, y);
}
inline std::uint32_t __float_as_uint(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline void st_shared_v4(std::uint32_t addr, const std::uint32_t (&v)[4]) {
  std::memcpy(smem + addr, v, 16);
}
inline void st_global_v4(float* dst, float4 v) { *reinterpret_cast<float4*>(dst) = v; }
inline float exp2_approx(float x) { return std::exp2(x); }
template <typename T>
std::uint32_t pack(float lo, float hi) {
  return narrow<T>(lo) | static_cast<std::uint32_t>(narrow<T>(hi)) << 16;
}
// A thread's copies land when they are asked for or, where `copies_are_late`, when it waits.
inline bool copies_are_late = false;
inline thread_local std::vector<std::vector<std::function<void()>>> copies(1);
inline void copy_async(std::uint32_t to, const void* from, int bytes, bool is_valid) {
  const auto copy = [=] {
    std::memset(smem + to, 0, bytes);
    if (is_valid) std::memcpy(smem + to, from, bytes);
  };
  if (copies_are_late)
    copies.back().push_back(copy);
  else
    copy();
}
inline void cp_async_16(std::uint32_t to, const void* from, bool is_valid) {
  copy_async(to, from, 16, is_valid);
}
inline void cp_async_4(std::uint32_t to, const void* from, bool is_valid) {
  copy_async(to, from, 4, is_valid);
}
inline void cp_async_commit() { copies.emplace_back(); }
template <int kPending>
void cp_async_wait() {
  while (static_cast<int>(copies.size()) - 1 > kPending) {
    for (const auto& copy : copies.front()) copy();
    copies.erase(copies.begin());
  }
}
inline void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait<0>();
}
inline cuda_on_host::Meeting named_barriers[16];
// At the end of a CTA.
inline void all_have_met() {
  for (int id = 0; id < 16; ++id)
    if (named_barriers[id].arrived != 0) stuck("the CTA's end: some wait at named barrier", id);
}
inline void named_barrier(int id, int threads) {
  named_barriers[id].meet(threads, "named barrier", id);
}
inline void named_barrier_arrive(int id, int threads) {
  named_barriers[id].meet(threads, "named barrier", id, false);
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t addr) {
  const int lane = threadIdx.x % 32;
  cuda_on_host::among_lanes(addr, [&](auto of) {
    for (int m = 0; m < 4; ++m) std::memcpy(&r[m], smem + of(8 * m + lane / 4) + lane % 4 * 4, 4);
    return 0;
  });
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t addr) {
  const int lane = threadIdx.x % 32;
  cuda_on_host::among_lanes(addr, [&](auto of) {
    for (int m = 0; m < 4; ++m) {
      std::uint16_t pair[2];
      for (int k = 0; k < 2; ++k)
        std::memcpy(&pair[k], smem + of(8 * m + lane % 4 * 2 + k) + lane / 4 * 2, 2);
      r[m] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
    }
    return 0;
  });
}
template <typename T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Registers {
    std::uint32_t a[4], b[2];
  };
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const auto element = [](std::uint32_t pair, int k) {
    return widen<T>(static_cast<std::uint16_t>(pair >> 16 * (k % 2)));
  };
  cuda_on_host::among_lanes(Registers{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto of) {
    for (int k = 0; k < 16; ++k) {
      const Registers row = of(4 * g + k % 8 / 2);
      for (int n = 0; n < 2; ++n) {
        const float column = element(of(4 * (2 * c + n) + k % 8 / 2).b[k / 8], k);
        for (int i = 0; i < 2; ++i) d[2 * i + n] += element(row.a[k / 8 * 2 + i], k) * column;
      }
    }
    return 0;
  });
}
inline int thread_index() { return threadIdx.x; }
inline void prefetch_l2(const void*) {}
template <typename T>
T __ldg(const T* p) {
  return *p;
}

namespace sm90 {

// ---- common/sm90/ptx.cuh

struct Mbarrier {
  std::mutex mutex;
  std::condition_variable turned;
  int count = 0, pending = 0;
  long bytes = 0;
  unsigned phase = 0;
  void change(int arrivals, long by) {
    std::lock_guard lock(mutex);
    pending -= arrivals, bytes += by;
    if (pending < 0) stuck("a barrier with too many arrivals", 0);
    if (pending > 0 || bytes != 0) return;
    pending = count, ++phase;
    turned.notify_all();
  }
};
inline Mbarrier mbarriers[64];
inline Mbarrier& mbarrier(std::uint32_t bar) { return mbarriers[bar / 8]; }
inline void mbarrier_init(std::uint32_t bar, std::uint32_t arrivals) {
  Mbarrier& b = mbarrier(bar);
  b.count = b.pending = static_cast<int>(arrivals), b.bytes = 0, b.phase = 0;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(std::uint32_t bar) { mbarrier(bar).change(1, 0); }
constexpr std::uint32_t kWarpArrivals = 1;
inline void mbarrier_arrive_warp(std::uint32_t bar, int lane = threadIdx.x % 32) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(bar);
}
inline void mbarrier_expect(std::uint32_t bar, std::uint32_t bytes) {
  mbarrier(bar).change(1, bytes);
}
inline void mbarrier_wait(std::uint32_t bar, std::uint32_t parity) {
  Mbarrier& b = mbarrier(bar);
  std::unique_lock lock(b.mutex);
  if (!b.turned.wait_for(lock, kPatience, [&] { return (b.phase & 1) != parity; }))
    stuck("mbarrier", bar / 8);
}
inline void mbarrier_poll(std::uint32_t bar, std::uint32_t parity) { mbarrier_wait(bar, parity); }
inline void fence_async_proxy() {}
template <int>
void registers_decrease() {}
template <int>
void registers_increase() {}
inline void grid_launch_dependents() {}
inline void grid_dependency_wait() {}
inline void stmatrix_x4(std::uint32_t addr, std::uint32_t r0, std::uint32_t r1, std::uint32_t r2,
                        std::uint32_t r3) {
  const std::uint32_t r[4] = {r0, r1, r2, r3};
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    const std::uint32_t row = __shfl_sync(~0u, addr, 8 * m + lane / 4);
    std::memcpy(smem + row + lane % 4 * 4, &r[m], 4);
  }
}

// ---- common/sm90/tma.cuh

inline void tma_load_3d(std::uint32_t to, const CUtensorMap* map, std::uint32_t bar, int c0, int c1,
                        int c2) {
  long bytes = 0;
  for (int r = 0; r < map->box[1]; ++r)
    for (int c = 0; c < map->box[0]; ++c, bytes += 2) {
      const std::int64_t at[3] = {c0 + c, c1 + r, c2};
      std::uint16_t v = 0;
      if (at[0] < map->sizes[0] && at[1] < map->sizes[1] && at[2] < map->sizes[2])
        v = map->base[at[0] * map->strides[0] + at[1] * map->strides[1] + at[2] * map->strides[2]];
      const std::uint32_t addr = to + (r * map->box[0] + c) * 2;  // rows of 128 or 64 bytes
      std::memcpy(smem + (addr ^ (addr >> 3 & (map->box[0] == 64 ? 0x70 : 0x30))), &v, 2);
    }
  mbarrier(bar).change(0, -bytes);
}
inline std::uint64_t tma_read_once() { return 0; }
inline void tma_load_3d(std::uint32_t to, const CUtensorMap* map, std::uint32_t bar, int c0, int c1,
                        int c2, std::uint64_t) {
  tma_load_3d(to, map, bar, c0, c1, c2);
}

// ---- common/sm90/wgmma.cuh

enum class Major { kK = 0, kMN = 1 };
inline std::uint64_t wgmma_descriptor(std::uint32_t addr, std::uint32_t leading,
                                      std::uint32_t stride = 1024) {
  return addr | static_cast<std::uint64_t>(leading / 16) << 32 |
         static_cast<std::uint64_t>(stride / 16) << 48;
}
inline std::uint64_t advance(std::uint64_t descriptor, std::uint32_t bytes) {
  return descriptor + bytes;
}
struct Operand {
  std::uint32_t start, leading, stride;
  explicit Operand(std::uint64_t d)
      : start(static_cast<std::uint32_t>(d)), leading(d >> 32 & 0xffff), stride(d >> 48) {
    leading *= 16, stride *= 16;
  }
  // Element k of row m or n of a K-major operand, of column n of an MN-major one.
  std::uint16_t at(int n, int k, Major major) const {
    std::uint32_t addr = start;
    if (major == Major::kK)
      addr += n / 8 * stride + n % 8 * 128 + k * 2;
    else
      addr += n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
    std::uint16_t v;
    std::memcpy(&v, smem + (addr ^ (addr >> 3 & 0x70)), 2);
    return v;
  }
};
inline bool wgmma_is_late = false;
using Groups = std::vector<std::vector<std::function<void()>>>;
inline thread_local Groups groups(1);
inline void issue(std::function<void()> product) {
  if (wgmma_is_late)
    groups.back().push_back(std::move(product));
  else
    product();
}
template <typename T, int kSize, typename Left>
void multiply(float (&d)[kSize], const Left& left, std::uint64_t b, Major major, bool accumulate) {
  const Operand right(b);
  const int c = threadIdx.x % 4;
  for (int j = 0; j < kSize / 4; ++j)
    for (int k = 0; k < 2; ++k) {
      float column[16];
      for (int n = 0; n < 16; ++n) column[n] = widen<T>(right.at(8 * j + 2 * c + k, n, major));
      for (int i = 0; i < 2; ++i) {
        float sum = 0;
        for (int n = 0; n < 16; ++n) sum += left(i, n) * column[n];
        float& to = d[4 * j + 2 * i + k];
        to = accumulate ? to + sum : sum;
      }
    }
}
template <typename T, Major kMajor = Major::kK, int kSize>
void wgmma_ss(float (&d)[kSize], std::uint64_t a, std::uint64_t b, bool accumulate) {
  issue([&d, a, b, accumulate] {
    const Operand operand(a);
    const int g = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    float rows[2][16];
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < 16; ++n) rows[i][n] = widen<T>(operand.at(g + 8 * i, n, Major::kK));
    multiply<T>(d, [&](int i, int n) { return rows[i][n]; }, b, kMajor, accumulate);
  });
}
template <typename T, Major kMajor, int kSize>
void wgmma_rs(float (&d)[kSize], const std::uint32_t (&a)[4], std::uint64_t b,
              bool accumulate = true) {
  struct {
    float v[2][16];
  } rows;
  for (int c = 0; c < 4; ++c)
    for (int n = 0; n < 4; ++n) {
      const std::uint32_t pair = __shfl_sync(~0u, a[n], threadIdx.x % 32 / 4 * 4 + c);
      rows.v[n % 2][n / 2 * 8 + 2 * c] = widen<T>(pair & 0xffff);
      rows.v[n % 2][n / 2 * 8 + 2 * c + 1] = widen<T>(pair >> 16);
    }
  issue([&d, rows, b, accumulate] {
    multiply<T>(d, [&](int i, int n) { return rows.v[i][n]; }, b, kMajor, accumulate);
  });
}
template <int... kSizes>
void wgmma_fence([[maybe_unused]] float (&... d)[kSizes]) {}
inline void wgmma_commit() { groups.emplace_back(); }
template <int kPending, int... kSizes>
void wgmma_wait([[maybe_unused]] float (&... d)[kSizes]) {
  while (static_cast<int>(groups.size()) - 1 > kPending) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  __syncwarp();  // the instruction is a warp's
}

}  // namespace sm90
}  // namespace zebra
