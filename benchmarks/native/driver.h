// What the kernel drivers share: errors that name their case, device data that a kernel must not
// have guessed, and times of graphs that find their operands in HBM.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "common/cuda/vec.cuh"
#include "common/status.h"

namespace zebra::native {

// The case that runs.  An error on the device shows up in some later call, so every message names
// it, and nothing is tried after an error: the context is lost.
inline std::string current_case;

inline void stop(const char* what, const char* why) {
  std::printf("STOPPED at %s: %s\n  in case: %s\n", what, why, current_case.c_str());
  std::fflush(stdout);
  std::_Exit(2);
}

#define CUDA_OK(call)                                                                    \
  do {                                                                                   \
    const cudaError_t error_ = (call);                                                   \
    if (error_ != cudaSuccess) ::zebra::native::stop(#call, cudaGetErrorString(error_)); \
  } while (0)

inline void launched(Status s) {
  if (s.error != nullptr) stop("a launch", s.error);
}

// What was checked.  A broken kernel fails everywhere: the first few reports are the useful ones.
struct Tally {
  int runs = 0, failures = 0;

  void fail() {
    std::fflush(stdout);
    if (++failures > 12) {
      std::printf("too many failures, stopping\n");
      std::_Exit(1);
    }
  }
  void section(const char* name) const {
    std::printf("%s: %d runs so far, %d failures\n", name, runs, failures);
    std::fflush(stdout);
  }
  int finish() const {
    std::printf("%s: %d runs, %d failures\n", failures == 0 ? "PASSED" : "FAILED", runs, failures);
    return failures == 0 ? 0 : 1;
  }
};

// ---- device memory

// One allocation, dealt out from the start.  What is taken is poisoned: every byte 0xff, which is
// NaN in all floating-point types and -1 in integers.
class Arena {
 public:
  explicit Arena(std::size_t bytes) : bytes_(bytes) { CUDA_OK(cudaMalloc(&base_, bytes)); }
  ~Arena() { cudaFree(base_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <typename T>
  T* take(std::size_t count) {
    const std::size_t from = at_, bytes = count * sizeof(T);
    at_ += (bytes + kApart) / kApart * kApart + kApart;  // never adjacent
    if (at_ > bytes_) stop("Arena::take", "the arena is too small");
    CUDA_OK(cudaMemset(base_ + from, 0xff, at_ - from));
    return reinterpret_cast<T*>(base_ + from);
  }
  // The same without poison, where that would take long.
  template <typename T>
  T* take_as_is(std::size_t count) {
    const std::size_t from = at_;
    at_ += (count * sizeof(T) + kApart) / kApart * kApart;
    if (at_ > bytes_) stop("Arena::take_as_is", "the arena is too small");
    return reinterpret_cast<T*>(base_ + from);
  }
  std::size_t mark() const { return at_; }
  void release(std::size_t mark) { at_ = mark; }  // what was taken since

 private:
  static constexpr std::size_t kApart = 1024;
  char* base_ = nullptr;
  std::size_t bytes_, at_ = 0;
};

template <typename T>
std::vector<T> to_host(const T* device, std::size_t count) {
  std::vector<T> host(count);
  CUDA_OK(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}
template <typename T>
void to_device(T* device, const std::vector<T>& host) {
  CUDA_OK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
}

template <typename T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
template <typename T>
std::size_t first_difference(const std::vector<T>& a, const std::vector<T>& b) {
  std::size_t i = 0;
  while (i < a.size() && std::memcmp(&a[i], &b[i], sizeof(T)) == 0) ++i;
  return i;
}

// ---- data: a function of index and seed, so that a failing case can be made again

__host__ __device__ inline unsigned hash(std::uint64_t v) {
  v = (v ^ v >> 33) * 0xff51afd7ed558ccdull;
  v = (v ^ v >> 33) * 0xc4ceb9fe1a85ec53ull;
  return static_cast<unsigned>(v ^ v >> 33);
}
// Uniform, with mean 0 and variance 1.
__device__ inline float random_value(std::uint64_t index, unsigned seed) {
  const unsigned bits = hash(index * 2654435761ull + seed * 0x9e3779b97f4a7c15ull) >> 8;
  return (static_cast<float>(bits) * (2.f / 16777216.f) - 1.f) * 1.7320508f;
}

template <typename T>
__global__ void fill_kernel(T* p, long rows, long columns, long stride, float scale, float shift,
                            unsigned seed) {
  const long step = static_cast<long>(gridDim.x) * blockDim.x;
  for (long i = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x; i < rows * columns;
       i += step)
    p[i / columns * stride + i % columns] = from_float<T>(random_value(i, seed) * scale + shift);
}
// Rows of random values; what lies between them stays poison.
template <typename T>
void fill(T* p, long rows, long columns, long stride, float scale, float shift, unsigned seed,
          cudaStream_t stream = nullptr) {
  if (rows * columns == 0) return;
  const long blocks = std::min<long>((rows * columns + 255) / 256, 2048);
  fill_kernel<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(p, rows, columns, stride, scale,
                                                                 shift, seed);
  CUDA_OK(cudaGetLastError());
}

// ---- time

inline int device_attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  CUDA_OK(cudaGetDevice(&device));
  CUDA_OK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Work captured from one stream, to be replayed there.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& work) : stream_(stream) {
    cudaGraph_t graph;
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    CUDA_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_OK(cudaGraphInstantiate(&executable_, graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
  }
  ~Graph() { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch() const { CUDA_OK(cudaGraphLaunch(executable_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

// The median of the replays by `launch`, in us.  `before` runs ahead of each replay and is not
// timed; the first replay is not either.
inline double replay_us(cudaStream_t stream, int replays, const std::function<void()>& before,
                        const std::function<void()>& launch) {
  cudaEvent_t from, to;
  CUDA_OK(cudaEventCreate(&from));
  CUDA_OK(cudaEventCreate(&to));
  std::vector<float> times;
  for (int i = 0; i <= replays; ++i) {
    before();
    CUDA_OK(cudaEventRecord(from, stream));
    launch();
    CUDA_OK(cudaEventRecord(to, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    float ms = 0;
    CUDA_OK(cudaEventElapsedTime(&ms, from, to));
    if (i > 0) times.push_back(ms);
  }
  CUDA_OK(cudaEventDestroy(from));
  CUDA_OK(cudaEventDestroy(to));
  std::sort(times.begin(), times.end());
  return 1e3 * times[times.size() / 2];
}

// The same of `work` as a graph.
inline double graph_us(cudaStream_t stream, int replays, const std::function<void()>& before,
                       const std::function<void()>& work) {
  before();
  work();  // loads the kernels, which a capture may not
  CUDA_OK(cudaStreamSynchronize(stream));
  const Graph graph(stream, work);
  return replay_us(stream, replays, before, [&] { graph.launch(); });
}

static __global__ void empty_kernel() {}

// Reads and does nothing else; `sink` is written when a sum that does not occur occurs.  `kOnce`:
// lines that L2 gives up before others.
template <bool kOnce>
static __global__ void __launch_bounds__(512)
    read_kernel(const uint4* p, std::size_t count, unsigned* sink) {
  constexpr int kAtOnce = 8;
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * 512;
  std::size_t i = blockIdx.x * std::size_t{512} + threadIdx.x;
  unsigned sum = 0;
  const auto add = [&](const uint4& v) { sum ^= v.x ^ v.y ^ v.z ^ v.w; };
  for (; i + (kAtOnce - 1) * step < count; i += kAtOnce * step) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) v[k] = kOnce ? __ldcs(p + i + k * step) : p[i + k * step];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) add(v[k]);
  }
  for (; i < count; i += step) add(kOnce ? __ldcs(p + i) : p[i]);
  if (sum == 0x12345678u) *sink = sum;
}

// Code, a part of more than the instruction caches of a multiprocessor hold.
template <int kPart>
static __global__ void other_code_kernel(unsigned* sink) {
  constexpr int kSteps = 1600;
  float a = kPart, b = static_cast<float>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    a = fmaf(a, b, 1.f + 0.001f * static_cast<float>(i + kSteps * kPart)), b = fmaf(b, a, 0.7f);
  if (a == 1.5f && b == 3.f) *sink = 1;
}

// A stream, what it takes to make the L2 cold, and what the machine reads at best.
class Bench {
 public:
  static constexpr std::size_t kFlushBytes = std::size_t{256} << 20;  // several times any L2

  // `pool`: memory to read at length, of which the times are.
  Bench(Arena& arena, const void* pool, std::size_t pool_bytes)
      : flush_(arena.take<char>(kFlushBytes)), sink_(arena.take<unsigned>(1)) {
    CUDA_OK(cudaStreamCreate(&stream));
    empty_us = graph_us(stream, 31, [] {}, [&] { empty_kernel<<<1, 32, 0, stream>>>(); });
    const std::size_t bytes = std::min(pool_bytes, std::size_t{4} << 30);
    for (const int ctas_of_sm : {4, 8, 16}) {
      const double us = graph_us(stream, 5, [] {}, [&] { read(pool, bytes, ctas_of_sm); });
      bytes_per_us = std::max(bytes_per_us, static_cast<double>(bytes) / us);
    }
    cudaDeviceProp device;
    CUDA_OK(cudaGetDeviceProperties(&device, 0));
    std::printf("%s, %d multiprocessors: an empty graph %.2f us, %zu MiB read at %.2f TB/s\n",
                device.name, device.multiProcessorCount, empty_us, bytes >> 20,
                bytes_per_us * 1e-6);
    std::printf("floor: bytes at that rate; read: the same bytes by a kernel that only reads\n");
  }

  template <bool kOnce = true>
  void read(const void* p, std::size_t bytes, int ctas_of_sm = 4) const {
    const long all = static_cast<long>(bytes / 16);
    const long blocks = std::min<long>(ctas_of_sm * multiprocessors(), (all + 511) / 512);
    read_kernel<kOnce><<<static_cast<unsigned>(std::max(blocks, 1l)), 512, 0, stream>>>(
        static_cast<const uint4*>(p), static_cast<std::size_t>(all), sink_);
    CUDA_OK(cudaGetLastError());
  }
  // A cold L2 as other kernels leave it: full of lines that must be written back first.
  void flush_by_write() const { CUDA_OK(cudaMemsetAsync(flush_, 0, kFlushBytes, stream)); }
  // A cold L2 that has nothing to write back.  Lines read once would not displace those of a call.
  void flush_by_read() const { read<false>(flush_, kFlushBytes); }

  // What other kernels leave of a kernel's code in a multiprocessor: nothing.  Before L2 is
  // flushed.
  void forget_code() const { forget_code(std::make_integer_sequence<int, 6>()); }

  double floor_us(double bytes) const { return bytes / bytes_per_us; }

  static void print_header(const char* shape) {
    std::printf("%-52s %8s %8s %9s %6s %8s %7s\n", shape, "floor us", "read us", "measured", "TB/s",
                "% floor", "% read");
  }
  void print_row(const char* shape, double bytes, double read_us, double us) const {
    std::printf("%-52s %8.2f %8.2f %9.2f %6.2f %7.1f%% %6.1f%%", shape, floor_us(bytes), read_us,
                us, bytes / us * 1e-6, 100 * floor_us(bytes) / us, 100 * read_us / us);
  }

  cudaStream_t stream = nullptr;
  double empty_us = 0, bytes_per_us = 0;

 private:
  template <int... kParts>
  void forget_code(std::integer_sequence<int, kParts...>) const {
    const int sms = multiprocessors();
    (other_code_kernel<kParts><<<sms, 32, 0, stream>>>(sink_), ...);
    CUDA_OK(cudaGetLastError());
  }

  char* flush_;
  unsigned* sink_;
};

// main() of a driver.
inline int run(int argc, char** argv, int (*check)(), int (*time)()) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argc == 2 ? argv[1] : "";
  if (mode == "check") return check();
  if (mode == "time") return time();
  std::printf("usage: %s check | time\n", argv[0]);
  return 2;
}

}  // namespace zebra::native
