// The norm before linear_decode on Hopper: h = x gain / sqrt(mean(x^2) + eps), rounded once.
//
// Of at most 4 rows, every CTA of the products makes all of h for itself, in its shared memory,
// while its ring fills: nothing is launched before it, and the products start a few hundred clocks
// after x could have been there.  One row, which is what decoding is mostly about, stays in
// registers on its way: its chain is one load, one sum over the CTA and one store.
//
// Of more rows, a launch of its own, one CTA a row.  It is so small that it fits beside the CTAs of
// the products before and after it (2 KB of shared memory, at most 16384 registers), so the product
// after it starts, and asks for its weight, while the one before still runs.
#pragma once

#include <cstdint>

#include "common/cuda/vec.cuh"
#include "common/sm90/ptx.cuh"
#include "linear_decode/linear_decode_sm90_load.cuh"

namespace zebra::sm90 {

constexpr int kLinearNormThreads = 256;
// Dynamic, because static memory would be padded to the 1 KB that the ring is aligned to.
constexpr int kLinearNormSmemBytes = kLinearNormThreads / 32 * 4;

// Eight gains, of either type.
template <typename Gain>
__device__ __forceinline__ void load_gain(const Gain* from, float (&g)[8]) {
  constexpr int kWide = 16 / sizeof(Gain);
#pragma unroll
  for (int i = 0; i < 8; i += kWide) {
    float part[kWide];
    load_vec<Gain, kWide>(from + i, part);
#pragma unroll
    for (int j = 0; j < kWide; ++j) g[i + j] = part[j];
  }
}

// ---- in the CTAs of the products, by their two warpgroups

template <typename T>
struct LinearNorm {
  static constexpr int kThreads = kLinearThreads - 128, kRows = kLinearMostNormedRows;

  const LinearArgs& a;
  const int thread = threadIdx.x - 128, lane = thread % 32;
  const int units = a.cfg.steps * a.cfg.boxes * 8;  // of 8 elements, in a row of h
  const int rows = static_cast<int>(a.p.rows), K = static_cast<int>(a.p.K);

  // A thread has the same units in every pass, so only the sums of squares need a barrier.  Loops
  // over units stay loops: code that runs once comes from memory.
  __device__ __forceinline__ void run() const {
    const bool is_float = a.p.norm_weight_dtype == DType::kFloat32;
    if (rows == 1 && !is_float) return run_one();
    // As the weight, before the preceding kernels have ended.
    if (a.early == Early::kIntoShared) request_gain(is_float ? 4 : sizeof(T));
    grid_dependency_wait();
    if (a.early != Early::kIntoShared) request_gain(is_float ? 4 : sizeof(T));
    request_x();
    cp_async_wait_all();
    float scale[kRows];
    find_scales(scale);
    is_float ? apply<float>(scale) : apply<T>(scale);
    fence_async_proxy();
    named_barrier(1, kThreads);
  }

 private:
  // Of one row: units thread, thread + kThreads, ... and their gains.
  __device__ __forceinline__ void run_one() const {
    constexpr int kHeld = kLinearMostNormedK / 8 / kThreads;
    static_assert(kHeld * 8 * kThreads == kLinearMostNormedK);
    const float inverse = __fdividef(1.f, static_cast<float>(K));
    const float eps = static_cast<float>(a.p.norm_eps);
    uint4 gain[kHeld], x[kHeld];
    if (a.early == Early::kIntoShared) read_units(a.p.norm_weight, gain);
    grid_dependency_wait();
    read_units(a.p.x, x);
    if (a.early != Early::kIntoShared) read_units(a.p.norm_weight, gain);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (thread + i * kThreads >= K / 8) break;
      float v[8];
      unpack(x[i], v);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares = fmaf(v[j], v[j], squares);
    }
    const float scale = rsqrtf(sum_of_all(squares) * inverse + eps);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int u = thread + i * kThreads;
      if (u >= units) break;  // zeros behind K: what lies there is multiplied by the zeros of W
      float v[8], g[8];
      unpack(x[i], v), unpack(gain[i], g);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= scale * g[j];
      store_vec<T, 8>(reinterpret_cast<T*>(linear_shared + at(u, 0)), v);
    }
    fence_async_proxy();
    named_barrier(1, kThreads);
  }
  // Not from L1, which need not have been told yet what the kernels before have written.
  template <int kHeld>
  __device__ __forceinline__ void read_units(const void* from, uint4 (&to)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int u = thread + i * kThreads;
      to[i] = {};
      if (u < K / 8) to[i] = __ldcg(static_cast<const uint4*>(from) + u);
    }
  }
  static __device__ __forceinline__ void unpack(const uint4& from, float (&to)[8]) {
    load_vec<T, 8>(reinterpret_cast<const T*>(&from), to);
  }
  __device__ __forceinline__ float sum_of_all(float v) const {
    float* const sums = reinterpret_cast<float*>(linear_shared + LinearSmem::kSquares);
    v = warp_sum(v);
    if (lane == 0) sums[thread / 32] = v;
    named_barrier(1, kThreads);
    const float4 first = *reinterpret_cast<const float4*>(sums);
    const float4 last = *reinterpret_cast<const float4*>(sums + 4);
    return first.x + first.y + first.z + first.w + (last.x + last.y + last.z + last.w);
  }

  // Where unit u of a row lies: swizzled as TMA would have written it.
  __device__ __forceinline__ int at(int u, int row) const {
    return a.cfg.h_offset + u / 8 * a.cfg.x_box + row * 128 + (u % 8 ^ row) * 16;
  }

  __device__ __forceinline__ void request_gain(int bytes) const {
    const char* const gain = static_cast<const char*>(a.p.norm_weight);
#pragma unroll 1
    for (int u = thread; u < K / 8; u += kThreads)
#pragma unroll 1
      for (int i = 8 * bytes * u; i < 8 * bytes * (u + 1); i += 16)
        cp_async_16(linear_shared_at(a.cfg.gain_offset + i), gain + i, true);
  }
  // Zeros behind K: what lies there is multiplied by the zeros of W.
  __device__ __forceinline__ void request_x() const {
    const T* const x = static_cast<const T*>(a.p.x);
#pragma unroll 1
    for (int u = thread; u < units; u += kThreads)
#pragma unroll
      for (int row = 0; row < kRows; ++row)
        if (row < rows)
          cp_async_16(linear_shared_at(at(u, row)), x + row * a.p.x_stride + 8 * u, u < K / 8);
  }

  __device__ __forceinline__ void find_scales(float (&scale)[kRows]) const {
    float squares[kRows] = {};
#pragma unroll 1
    for (int u = thread; u < K / 8; u += kThreads)
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows) continue;
        float v[8];
        load_vec<T, 8>(reinterpret_cast<const T*>(linear_shared + at(u, row)), v);
#pragma unroll
        for (int i = 0; i < 8; ++i) squares[row] = fmaf(v[i], v[i], squares[row]);
      }
    float* const sums = reinterpret_cast<float*>(linear_shared + LinearSmem::kSquares);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows) continue;
      const float sum = warp_sum(squares[row]);
      if (lane == 0) sums[8 * row + thread / 32] = sum;
    }
    named_barrier(1, kThreads);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows) continue;
      const float4 first = *reinterpret_cast<const float4*>(sums + 8 * row);
      const float4 last = *reinterpret_cast<const float4*>(sums + 8 * row + 4);
      const float sum = first.x + first.y + first.z + first.w + (last.x + last.y + last.z + last.w);
      scale[row] = rsqrtf(sum / static_cast<float>(a.p.K) + static_cast<float>(a.p.norm_eps));
    }
  }

  template <typename Gain>
  __device__ __forceinline__ void apply(const float (&scale)[kRows]) const {
    const Gain* const gain = reinterpret_cast<const Gain*>(linear_shared + a.cfg.gain_offset);
#pragma unroll 1
    for (int u = thread; u < K / 8; u += kThreads) {
      float g[8];
      load_gain(gain + 8 * u, g);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows) continue;
        T* const h = reinterpret_cast<T*>(linear_shared + at(u, row));
        float v[8];
        load_vec<T, 8>(h, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] *= scale[row] * g[i];
        store_vec<T, 8>(h, v);
      }
    }
  }
};

// ---- a launch of its own

template <typename T, typename Gain>
__global__ void __launch_bounds__(kLinearNormThreads, 4)
    linear_decode_norm_kernel(const T* __restrict__ x, std::int64_t stride,
                              const Gain* __restrict__ gain, T* __restrict__ h, int K, float eps) {
  constexpr int kTurn = kLinearNormThreads * 8;  // elements of all threads at once
  constexpr int kHeld = 2;                       // turns whose operands stay in registers
  float* const sums = reinterpret_cast<float*>(linear_shared);
  grid_launch_dependents();
  // 128 bytes a thread and turn; what is in L2 is still seen to change.
  for (int at = threadIdx.x * (128 / sizeof(Gain)); at < K;
       at += kLinearNormThreads * (128 / sizeof(Gain)))
    prefetch_l2(gain + at);
  grid_dependency_wait();
  const T* const row = x + blockIdx.x * stride;
  T* const to = h + static_cast<std::int64_t>(blockIdx.x) * K;
  const int first = threadIdx.x * 8;
  // Of a row of up to 4096, everything is asked for at once.
  float v[kHeld][8] = {}, g[kHeld][8];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (first + i * kTurn < K) {
      load_vec<T, 8>(row + first + i * kTurn, v[i]);
      load_gain(gain + first + i * kTurn, g[i]);
    }
  float squares = 0.f;
  for (int at = first + kHeld * kTurn; at < K; at += kTurn) {
    float u[8];
    load_vec<T, 8>(row + at, u);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(u[j], u[j], squares);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(v[i][j], v[i][j], squares);
  const float scale = rsqrtf(block_sum(squares, sums) / static_cast<float>(K) + eps);
  const std::uint64_t policy = kept_policy();
  const auto write = [&](int at, float (&u)[8], const float (&by)[8]) {
    Vec<T, 8> v;
#pragma unroll
    for (int j = 0; j < 8; ++j) v.v[j] = from_float<T>(u[j] * (scale * by[j]));
    store_kept(reinterpret_cast<Vec<T, 8>*>(to + at), v, policy);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (first + i * kTurn < K) write(first + i * kTurn, v[i], g[i]);
  for (int at = first + kHeld * kTurn; at < K; at += kTurn) {
    float u[8], by[8];
    load_vec<T, 8>(row + at, u);
    load_gain(gain + at, by);
    write(at, u, by);
  }
}

}  // namespace zebra::sm90
