// Enough of CUDA's language to run device functions on host threads: a thread of the host is one of
// the CTA, and meets the others where the device's would.  Include it before the device's headers.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#define __CUDACC__
#define __device__
#define __forceinline__ inline

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};

namespace cuda_on_host {

struct Index {
  int x = 0, y = 0;
};
#ifndef ZEBRA_HOST_THREADS
#define ZEBRA_HOST_THREADS 256
#endif
constexpr int kThreads = ZEBRA_HOST_THREADS, kWarps = kThreads / 32;

struct Warp {
  std::barrier<> meet{32};
  int values[32];
};
inline Warp warps[kWarps];
inline std::barrier<> cta{kThreads};

}  // namespace cuda_on_host

inline thread_local cuda_on_host::Index blockIdx, threadIdx;
inline cuda_on_host::Index gridDim, blockDim;
using std::max, std::min;

template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}
inline float __log2f(float v) { return std::log2(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }

// What read(values of the lanes) gives, once all lanes have written theirs.
template <typename Read>
auto among_lanes(int value, Read read) {
  cuda_on_host::Warp& warp = cuda_on_host::warps[threadIdx.x / 32];
  warp.values[threadIdx.x % 32] = value;
  warp.meet.arrive_and_wait();
  const auto result = read(warp.values);
  warp.meet.arrive_and_wait();
  return result;
}
inline int __shfl_sync(unsigned, int value, int lane) {
  return among_lanes(value, [&](const int* v) { return v[lane]; });
}
inline int __shfl_up_sync(unsigned, int value, int by) {
  const int lane = threadIdx.x % 32;
  return among_lanes(value, [&](const int* v) { return v[lane >= by ? lane - by : lane]; });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return among_lanes(value, [](const int* v) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(v[i]) << i;
    return bits;
  });
}
inline void __syncwarp() {
  among_lanes(0, [](const int* v) { return v[0]; });
}
inline bool __any_sync(unsigned, bool value) { return __ballot_sync(0, value) != 0; }
inline void __syncthreads() { cuda_on_host::cta.arrive_and_wait(); }
