// rms_norm for every GPU from sm_80 on.
//
// Computes       y = w * s * rstd with s = x + residual (rms_norm.h).  The gradients have a design
//                of their own: rms_norm_backward.cuh.
// Grid           one CTA a row.
// Tiles          rms_norm_config.h: a row lies in registers, up to 8 vectors of 16 bytes a thread;
//                a long or misaligned row is walked twice instead.
// Shared memory  one float per warp.
// Bound          HBM: 2-4 passes of [rows, dim].
// Measured       H200, 2026-11-23, 16384 x 4096 bf16 with residual: 131.5 us (96 % of the floor).
//                benchmarks/bench_rms_norm.py --device cuda
#include "common/cuda/launch.h"
#include "common/cuda/vec.cuh"
#include "rms_norm/rms_norm.h"
#include "rms_norm/rms_norm_backward.cuh"
#include "rms_norm/rms_norm_config.h"
#include "rms_norm/rms_norm_weight.cuh"

namespace zebra {
namespace {

template <typename T, int kVec, int kPerThread>
__global__ void rms_norm_fwd_kernel(const RmsNormParams p) {
  __shared__ float smem[kRmsNormMaxWarps];
  constexpr int kHeld = kPerThread == 0 ? 1 : kPerThread;
  const std::int64_t row = blockIdx.x, vecs = p.dim / kVec;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual =
      p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr;
  T* sum = p.sum ? static_cast<T*>(p.sum) + row * p.dim : nullptr;
  T* y = static_cast<T*>(p.y) + row * p.dim;
  const bool weight_float = p.weight_dtype == DType::kFloat32;

  float s[kHeld][kVec];
  float square = 0.f;
  const auto read = [&](std::int64_t vec, float (&v)[kVec]) {
    load_vec(x + vec * kVec, v);
    if (residual) {
      float r[kVec];
      load_vec(residual + vec * kVec, r);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] += r[i];
    }
  };
  const auto write = [&](std::int64_t vec, const float (&v)[kVec], float rstd) {
    float w[kVec], out[kVec];
    rms_norm_weight<T>(p.weight, weight_float, vec * kVec, w);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = w[i] * v[i] * rstd;
    store_vec(y + vec * kVec, out);
  };
  const auto accumulate = [&](const float (&v)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) square += v[i] * v[i];
  };

  if constexpr (kPerThread > 0) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const std::int64_t vec = threadIdx.x + j * blockDim.x;
      if (vec < vecs) {
        read(vec, s[j]);
        if (sum) store_vec(sum + vec * kVec, s[j]);
        accumulate(s[j]);
      }
    }
  } else {
    for (std::int64_t vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
      read(vec, s[0]);
      if (sum) store_vec(sum + vec * kVec, s[0]);
      accumulate(s[0]);
    }
  }
  const float rstd =
      rsqrtf(block_sum(square, smem) / static_cast<float>(p.dim) + static_cast<float>(p.eps));
  if (threadIdx.x == 0) static_cast<float*>(p.rstd)[row] = rstd;
  if constexpr (kPerThread > 0) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const std::int64_t vec = threadIdx.x + j * blockDim.x;
      if (vec < vecs) write(vec, s[j], rstd);
    }
  } else {
    for (std::int64_t vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
      read(vec, s[0]);
      write(vec, s[0], rstd);
    }
  }
}

// Runs `launch` with the compile-time tile of `config`.
template <typename T, typename Launch>
Status with_tile(const RmsNormConfig& config, const Launch& launch) {
  constexpr int kVec = 16 / sizeof(T);
  using std::integral_constant;
  if (config.vec == 1) return launch(integral_constant<int, 1>(), integral_constant<int, 0>());
  switch (config.vecs_per_thread) {
    case 1:
      return launch(integral_constant<int, kVec>(), integral_constant<int, 1>());
    case 2:
      return launch(integral_constant<int, kVec>(), integral_constant<int, 2>());
    case 4:
      return launch(integral_constant<int, kVec>(), integral_constant<int, 4>());
    case 8:
      return launch(integral_constant<int, kVec>(), integral_constant<int, 8>());
    default:
      return launch(integral_constant<int, kVec>(), integral_constant<int, 0>());
  }
}

template <typename T>
Status forward(const RmsNormParams& p, CUstream_st* stream) {
  const RmsNormConfig config =
      select_rms_norm_config(p.dim, sizeof(T),
                             rows_aligned<T>(p.dim, {p.x, p.residual, p.weight, p.y, p.sum},
                                             {p.x_stride, p.residual_stride}));
  return with_tile<T>(config, [&](auto vec, auto per_thread) {
    rms_norm_fwd_kernel<T, vec(), per_thread()>
        <<<static_cast<unsigned>(p.rows), config.threads, 0, stream>>>(p);
    return launch_status();
  });
}

}  // namespace

Status rms_norm_cuda(const RmsNormParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.dtype, forward, p, stream);
}

Status rms_norm_backward_cuda(const RmsNormBackwardParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.dtype, rms_norm_backward, p, stream);
}

}  // namespace zebra
