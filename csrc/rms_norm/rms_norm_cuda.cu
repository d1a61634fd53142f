// rms_norm for every GPU from sm_80 on.
//
// Computes       y = w * s * rstd with s = x + residual, and the gradients (rms_norm.h).
// Grid           forward: one CTA a row.  Backward: rms_norm_backward_ctas(rows) CTAs, each a group
// of
//                consecutive rows; then one thread a column sums the groups in order.
// Tiles          a row lies in registers, vecs_per_thread 16-byte vectors a thread
// (rms_norm_config.h);
//                vecs_per_thread = 0 walks a long or misaligned row twice instead.
// Shared memory  one float per warp.
// Bound          HBM: forward 2-4 passes of [rows, dim], backward 3-4.
// Measured       H200, 2026-11-23, 16384 x 4096 bf16 with residual: forward 131.5 us (96 % of the
//                floor), forward + backward 399 us (64 %).  benchmarks/bench_rms_norm.py --device
//                cuda
#include "common/cuda/launch.h"
#include "common/cuda/vec.cuh"
#include "rms_norm/rms_norm.h"
#include "rms_norm/rms_norm_config.h"

namespace zebra {
namespace {

constexpr int kMaxWarps = 16;

// N weights from column `at`, stored as T or as fp32.
template <typename T, int N>
__device__ __forceinline__ void load_weight(const void* w, bool is_float, std::int64_t at,
                                            float (&dst)[N]) {
  if (is_float) {
#pragma unroll
    for (int i = 0; i < N; ++i) dst[i] = static_cast<const float*>(w)[at + i];
  } else {
    load_vec(static_cast<const T*>(w) + at, dst);
  }
}

template <typename T, int kVec, int kPerThread>
__global__ void rms_norm_fwd_kernel(const RmsNormParams p) {
  __shared__ float smem[kMaxWarps];
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
    load_weight<T>(p.weight, weight_float, vec * kVec, w);
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

// Weight gradients of a CTA's rows accumulate in registers (kPerThread > 0) or in its partial row.
template <typename T, int kVec, int kPerThread>
__global__ void rms_norm_bwd_kernel(const RmsNormBackwardParams p, std::int64_t group) {
  __shared__ float smem[kMaxWarps];
  constexpr int kHeld = kPerThread == 0 ? 1 : kPerThread;
  const std::int64_t vecs = p.dim / kVec;
  const std::int64_t first = blockIdx.x * group;
  const std::int64_t last = first + group < p.rows ? first + group : p.rows;
  const bool weight_float = p.weight_dtype == DType::kFloat32;
  float* partial = static_cast<float*>(p.partial) + blockIdx.x * p.dim;
  float dw[kHeld][kVec] = {};
  if constexpr (kPerThread == 0)
    for (std::int64_t c = threadIdx.x; c < p.dim; c += blockDim.x) partial[c] = 0.f;
  if constexpr (kPerThread == 0) __syncthreads();

  for (std::int64_t row = first; row < last; ++row) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const T* sum = static_cast<const T*>(p.sum) + row * p.sum_stride;
    const T* dsum = p.dsum ? static_cast<const T*>(p.dsum) + row * p.dim : nullptr;
    T* dx = static_cast<T*>(p.dx) + row * p.dim;
    const float rstd = static_cast<const float*>(p.rstd)[row];
    float g[kHeld][kVec], s[kHeld][kVec];
    float dot = 0.f;
    // g = w dy; adds dy s rstd to the weight gradient when `grad` is set.
    const auto read = [&](std::int64_t vec, float (&gv)[kVec], float (&sv)[kVec], float* grad) {
      float w[kVec];
      load_vec(dy + vec * kVec, gv);
      load_vec(sum + vec * kVec, sv);
      load_weight<T>(p.weight, weight_float, vec * kVec, w);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (grad) grad[i] += gv[i] * sv[i] * rstd;
        gv[i] *= w[i];
      }
    };
    const auto write = [&](std::int64_t vec, const float (&gv)[kVec], const float (&sv)[kVec],
                           float c) {
      float out[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] = rstd * (gv[i] - sv[i] * c);
      if (dsum) {
        float d[kVec];
        load_vec(dsum + vec * kVec, d);
#pragma unroll
        for (int i = 0; i < kVec; ++i) out[i] += d[i];
      }
      store_vec(dx + vec * kVec, out);
    };
    const auto accumulate = [&](const float (&gv)[kVec], const float (&sv)[kVec]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) dot += gv[i] * sv[i];
    };
    if constexpr (kPerThread > 0) {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const std::int64_t vec = threadIdx.x + j * blockDim.x;
        if (vec < vecs) {
          read(vec, g[j], s[j], dw[j]);
          accumulate(g[j], s[j]);
        }
      }
    } else {
      for (std::int64_t vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
        read(vec, g[0], s[0], partial + vec * kVec);
        accumulate(g[0], s[0]);
      }
    }
    const float c = block_sum(dot, smem) * rstd * rstd / static_cast<float>(p.dim);
    if constexpr (kPerThread > 0) {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const std::int64_t vec = threadIdx.x + j * blockDim.x;
        if (vec < vecs) write(vec, g[j], s[j], c);
      }
    } else {
      for (std::int64_t vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
        read(vec, g[0], s[0], nullptr);
        write(vec, g[0], s[0], c);
      }
    }
  }
  if constexpr (kPerThread > 0) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const std::int64_t vec = threadIdx.x + j * blockDim.x;
      if (vec < vecs)
#pragma unroll
        for (int i = 0; i < kVec; ++i) partial[vec * kVec + i] = dw[j][i];
    }
  }
}

template <typename T>
__global__ void rms_norm_dweight_kernel(const RmsNormBackwardParams p) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= p.dim) return;
  const float* partial = static_cast<const float*>(p.partial) + c;
  float total = 0.f;
#pragma unroll 8
  for (std::int64_t g = 0; g < p.partials; ++g) total += partial[g * p.dim];
  if (p.weight_dtype == DType::kFloat32)
    static_cast<float*>(p.dweight)[c] = total;
  else
    static_cast<T*>(p.dweight)[c] = from_float<T>(total);
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

template <typename T>
Status backward(const RmsNormBackwardParams& p, CUstream_st* stream) {
  const RmsNormConfig config = select_rms_norm_config(
      p.dim, sizeof(T),
      rows_aligned<T>(p.dim, {p.dy, p.dsum, p.sum, p.weight, p.dx}, {p.dy_stride, p.sum_stride}));
  const Status status = with_tile<T>(config, [&](auto vec, auto per_thread) {
    rms_norm_bwd_kernel<T, vec(), per_thread()>
        <<<static_cast<unsigned>(p.partials), config.threads, 0, stream>>>(
            p, ceil_div(p.rows, p.partials));
    return launch_status();
  });
  if (status.error) return status;
  rms_norm_dweight_kernel<T>
      <<<static_cast<unsigned>(ceil_div<std::int64_t>(p.dim, 128)), 128, 0, stream>>>(p);
  return launch_status();
}

}  // namespace

Status rms_norm_cuda(const RmsNormParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.dtype, forward, p, stream);
}

Status rms_norm_backward_cuda(const RmsNormBackwardParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.dtype, backward, p, stream);
}

}  // namespace zebra
