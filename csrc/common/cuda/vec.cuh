// Element conversion, 16-byte access and warp/block sums shared by the portable CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "common/dtype.h"

namespace zebra {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// N elements moved by one access; N * sizeof(T) <= 16.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
  T v[N];
};

template <typename T, int N>
__device__ __forceinline__ void load_vec(const T* src, float (&dst)[N]) {
  const Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(src);
#pragma unroll
  for (int i = 0; i < N; ++i) dst[i] = to_float(v.v[i]);
}

template <typename T, int N>
__device__ __forceinline__ void store_vec(T* dst, const float (&src)[N]) {
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v.v[i] = from_float<T>(src[i]);
  *reinterpret_cast<Vec<T, N>*>(dst) = v;
}

// Whether rows of `size` elements at these pointers and strides (in elements) allow 16-byte access.
template <typename T>
bool rows_aligned(std::int64_t size, std::initializer_list<const void*> pointers,
                  std::initializer_list<std::int64_t> strides) {
  constexpr std::int64_t kVec = 16 / sizeof(T);
  bool ok = size % kVec == 0;
  for (const void* ptr : pointers) ok = ok && reinterpret_cast<std::uintptr_t>(ptr) % 16 == 0;
  for (const std::int64_t stride : strides) ok = ok && stride % kVec == 0;
  return ok;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// The sum over the CTA, in every thread; `smem` holds a float per warp.  Ends with a barrier before
// reuse of `smem` only at its start: call it with alternating buffers or a barrier between calls.
__device__ __forceinline__ float block_sum(float v, float* smem) {
  v = warp_sum(v);
  const int warps = (blockDim.x + 31) / 32;
  if (warps == 1) return v;
  __syncthreads();
  if (threadIdx.x % 32 == 0) smem[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < warps; ++w) total += smem[w];
  return total;
}

__device__ __forceinline__ float sigmoidf(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

}  // namespace zebra

// Calls FN<T>(args...) for the CUDA element type of DTYPE; float64 is refused before this point.
#define ZEBRA_DISPATCH_CUDA(DTYPE, FN, ...)  \
  switch (DTYPE) {                           \
    case ::zebra::DType::kFloat16:           \
      return FN<__half>(__VA_ARGS__);        \
    case ::zebra::DType::kBFloat16:          \
      return FN<__nv_bfloat16>(__VA_ARGS__); \
    default:                                 \
      return FN<float>(__VA_ARGS__);         \
  }
