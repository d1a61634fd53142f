// The norm before linear_decode on Hopper: a launch of its own, one CTA of 4 warps a row of x.
//
// h = x gain / sqrt(mean(x^2) + eps), rounded once.  It is so small that it fits beside the CTAs of
// the products before and after it (2 KB of shared memory, 4096 registers), so the product after it
// starts, and asks for its weight, while the one before still runs.
#pragma once

#include <cstdint>

#include "common/cuda/vec.cuh"
#include "common/sm90/ptx.cuh"

namespace zebra::sm90 {

constexpr int kLinearNormThreads = 128;

template <typename T, typename Gain>
__global__ void __launch_bounds__(kLinearNormThreads, 16)
    linear_decode_norm_kernel(const T* __restrict__ x, std::int64_t stride,
                              const Gain* __restrict__ gain, T* __restrict__ h, int K, float eps) {
  __shared__ float sums[kLinearNormThreads / 32];
  grid_launch_dependents();
  // 128 bytes a thread and turn; what is in L2 is still seen to change.
  for (int at = threadIdx.x * (128 / sizeof(Gain)); at < K;
       at += kLinearNormThreads * (128 / sizeof(Gain)))
    prefetch_l2(gain + at);
  grid_dependency_wait();
  const T* const row = x + blockIdx.x * stride;
  float squares = 0.f;
#pragma unroll 4
  for (int at = threadIdx.x * 8; at < K; at += kLinearNormThreads * 8) {
    float v[8];
    load_vec<T, 8>(row + at, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(v[i], v[i], squares);
  }
  const float scale = rsqrtf(block_sum(squares, sums) / static_cast<float>(K) + eps);
#pragma unroll 2
  for (int at = threadIdx.x * 8; at < K; at += kLinearNormThreads * 8) {
    float v[8], g[8];
    load_vec<T, 8>(row + at, v);
    constexpr int kWide = 16 / sizeof(Gain);
#pragma unroll
    for (int i = 0; i < 8; i += kWide) {
      float part[kWide];
      load_vec<Gain, kWide>(gain + at + i, part);
#pragma unroll
      for (int j = 0; j < kWide; ++j) g[i + j] = part[j];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale * g[i];
    store_vec<T, 8>(h + static_cast<std::int64_t>(blockIdx.x) * K + at, v);
  }
}

}  // namespace zebra::sm90
