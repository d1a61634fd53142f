// Enough of CUDA's language to run device functions on host threads: a thread of the host is one of
// the CTA, and meets the others where the device's would.  Include it before the device's headers.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

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
constexpr int kMostThreads = 384;

[[noreturn]] inline void stuck(const char* what, unsigned which);
constexpr std::chrono::seconds kPatience{60};

// A barrier of as many threads as it is told.
struct Meeting {
  std::mutex mutex;
  std::condition_variable all;
  int arrived = 0;
  unsigned phase = 0;
  void meet(int threads, const char* what, unsigned which, bool waits = true) {
    std::unique_lock lock(mutex);
    const unsigned mine = phase;
    if (++arrived == threads) {
      arrived = 0, ++phase;
      all.notify_all();
    } else if (waits && !all.wait_for(lock, kPatience, [&] { return phase != mine; })) {
      stuck(what, which);
    }
  }
};

struct Warp {
  Meeting meeting;
  std::uint32_t values[32][8];
};
inline Warp warps[kMostThreads / 32];
inline Meeting cta;

}  // namespace cuda_on_host

inline thread_local cuda_on_host::Index blockIdx, threadIdx;
inline cuda_on_host::Index gridDim, blockDim;
using std::max, std::min;

namespace cuda_on_host {

inline void stuck(const char* what, unsigned which) {
  std::printf("stuck: thread %d of CTA (%d, %d) at %s %u\n", threadIdx.x, blockIdx.x, blockIdx.y,
              what, which);
  std::fflush(stdout);
  std::_Exit(3);
}

// Runs a CTA of `threads` threads.
template <typename Kernel>
void run_cta(int threads, Index block, Kernel kernel) {
  blockDim.x = threads;
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i)
    all.emplace_back([&kernel, block, i] {
      threadIdx.x = i, blockIdx = block;
      kernel(i);
    });
  for (std::thread& thread : all) thread.join();
}

// What read(values of the lanes) gives, once all lanes have told theirs: up to 32 bytes.
template <typename V, typename Read>
auto among_lanes(const V& value, Read read) {
  static_assert(sizeof(V) <= sizeof(Warp::values[0]));
  Warp& warp = warps[threadIdx.x / 32];
  std::memcpy(warp.values[threadIdx.x % 32], &value, sizeof(V));
  warp.meeting.meet(32, "warp", threadIdx.x / 32);
  const auto result = read([&](int lane) {
    V v;
    std::memcpy(&v, warp.values[lane], sizeof(V));
    return v;
  });
  warp.meeting.meet(32, "warp", threadIdx.x / 32);
  return result;
}

}  // namespace cuda_on_host

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

template <typename V>
V __shfl_sync(unsigned, V value, int lane) {
  return cuda_on_host::among_lanes(value, [&](auto of) { return of(lane); });
}
inline int __shfl_up_sync(unsigned, int value, int by) {
  const int lane = threadIdx.x % 32;
  return cuda_on_host::among_lanes(value,
                                   [&](auto of) { return of(lane >= by ? lane - by : lane); });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return cuda_on_host::among_lanes(value, [](auto of) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(of(i)) << i;
    return bits;
  });
}
inline void __syncwarp() {
  cuda_on_host::among_lanes(0, [](auto of) { return of(0); });
}
inline bool __any_sync(unsigned, bool value) { return __ballot_sync(0, value) != 0; }
inline void __syncthreads() { cuda_on_host::cta.meet(blockDim.x, "__syncthreads", 0); }
