// mamba2_step for every GPU from sm_80 on.
//
// Computes       the convolution of x, B, C, then state update, output, gate and per-head norm
//                (mamba2_step.h), in two kernels: several heads read the convolution of one group,
//                whose window may be shifted only once.
// Grid           convolution: a thread a channel and row; states: a CTA a head and row.
// Tiles          8 lanes a state row of N, 16 bytes a lane; 4 rows a thread, so that a head of
//                128 x 128 fp32 is in flight at once in the registers of 256 threads.  kChunks = 0
//                walks rows of any other N element by element.
// Launch         dependent: the states are read while the convolution runs.  Nothing before it in
//                the stream still runs then, because the convolution lets the next grid start only
//                after its own wait.
// Shared memory  P floats and one a warp.
// Bound          HBM: the state, read and written once; below some 4 rows, latency.
// Predicted      H200, 8B layer (32 heads, 128 x 128 fp32), 64 rows: 64 us / 0.88 = 72 us;
//                1 row: 5 us.
// Measured       H100, 2026-11-27: 64 rows 109 us (84 % of the floor there), 1 row 10 us alone and
//                7 us in a decoding step.  benchmarks/bench_mamba2_step.py --device cuda
#include "common/cuda/launch.h"
#include "common/cuda/vec.cuh"
#include "common/math.h"
#include "common/sm90/ptx.cuh"
#include "mamba2_step/mamba2_step.h"

namespace zebra {
namespace {

constexpr int kLanes = 8;          // that share a state row
constexpr int kRowsPerThread = 4;  // at once
constexpr int kConvThreads = 128;

// A parameter stored as T or as fp32.
template <typename T>
__device__ __forceinline__ float parameter(const void* w, DType dtype, std::int64_t at) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(w)[at]
                                  : to_float(static_cast<const T*>(w)[at]);
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

__device__ __forceinline__ std::int64_t slot_of(const Mamba2StepParams& p, std::int64_t row) {
  return p.state_indices == nullptr ? row : p.state_indices[row];
}

template <typename T>
__global__ void mamba2_conv_kernel(const Mamba2StepParams p, const int channels) {
  sm90::grid_dependency_wait();
  sm90::grid_launch_dependents();
  const std::int64_t row = blockIdx.y;
  const int channel = static_cast<int>(blockIdx.x * kConvThreads + threadIdx.x);
  const std::int64_t slot = slot_of(p, row);
  if (channel >= channels || slot < 0 || slot >= p.slots) return;
  const int width = static_cast<int>(p.width);
  T* window = static_cast<T*>(p.conv_state) + slot * p.conv_slot_stride +
              static_cast<std::int64_t>(channel) * (width - 1);
  const T x = static_cast<const T*>(p.zxbcdt)[row * p.row_stride + p.heads * p.headdim + channel];
  const std::int64_t taps = static_cast<std::int64_t>(channel) * width;
  float sum = p.conv_bias ? parameter<T>(p.conv_bias, p.conv_bias_dtype, channel) : 0.f;
  for (int w = 0; w + 1 < width; ++w) {
    sum += to_float(window[w]) * parameter<T>(p.conv_weight, p.conv_weight_dtype, taps + w);
    if (w > 0) window[w - 1] = window[w];
  }
  sum += to_float(x) * parameter<T>(p.conv_weight, p.conv_weight_dtype, taps + width - 1);
  if (width > 1) window[width - 2] = x;
  p.conv[row * channels + channel] = silu(sum);
}

// Where the convolution left x, B and C of a head.
struct Convolved {
  const float *x, *B, *C;  // [P], [N], [N]
};

__device__ __forceinline__ Convolved convolved(const Mamba2StepParams& p, std::int64_t row,
                                               int head) {
  const std::int64_t group = head / (p.heads / p.groups), N = p.d_state;
  const float* const conv = p.conv + row * (p.groups * (p.headdim + N) + p.heads * N);
  return {conv + group * p.headdim, conv + p.groups * p.headdim + group * N,
          conv + p.groups * (p.headdim + N) + head * N};
}

// Advances 16 bytes of a state and returns their part of S C.
template <typename S, int kVec>
__device__ __forceinline__ float advance(Vec<S, kVec>& state, float decay, float dx,
                                         const float (&B)[kVec], const float (&C)[kVec]) {
  float dot = 0.f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float s = to_float(state.v[i]) * decay + dx * B[i];
    dot += s * C[i];
    state.v[i] = from_float<S>(s);
  }
  return dot;
}

template <typename T, typename S, int kChunks>
__global__ void __launch_bounds__(256) mamba2_state_kernel(const Mamba2StepParams p) {
  extern __shared__ float smem[];  // [P] outputs, then a float a warp
  constexpr int kVec = 16 / sizeof(S);
  using Chunk = Vec<S, kVec>;
  const int P = static_cast<int>(p.headdim), N = static_cast<int>(p.d_state);
  const int head = static_cast<int>(blockIdx.x % p.heads);
  const std::int64_t row = blockIdx.x / p.heads;
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const int stride = blockDim.x / kLanes, pass = kRowsPerThread * stride;
  const std::int64_t slot = slot_of(p, row);
  T* const y = static_cast<T*>(p.y) + (row * p.heads + head) * P;
  if (slot < 0 || slot >= p.slots) {
    sm90::grid_dependency_wait();
    sm90::grid_launch_dependents();
    const T nothing = from_float<T>(slot < 0 ? 0.f : __int_as_float(0x7fc00000));
    for (int r = threadIdx.x; r < P; r += blockDim.x) y[r] = nothing;
    return;
  }
  S* const state = static_cast<S*>(p.ssm_state) + slot * p.ssm_slot_stride +
                   static_cast<std::int64_t>(head) * P * N;

  Chunk held[kRowsPerThread][kChunks == 0 ? 1 : kChunks];
  const auto read = [&](int base) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int r = base + i * stride + first;
#pragma unroll
      for (int j = 0; j < kChunks; ++j)
        if (r < P)
          held[i][j] = *reinterpret_cast<const Chunk*>(state + r * N + (j * kLanes + lane) * kVec);
    }
  };
  read(0);
  // All that the convolution does not write: the latency of these hides behind it.
  const T* const z = static_cast<const T*>(p.zxbcdt) + row * p.row_stride + head * P;
  const std::int64_t channels = p.groups * (p.headdim + p.d_state) + p.heads * p.d_state;
  const float dt = to_float(z[p.heads * p.headdim - head * P + channels + head]) +
                   parameter<T>(p.dt_bias, p.dt_bias_dtype, head);
  const float a = static_cast<const float*>(p.A)[head], A = p.A_is_log ? -expf(a) : a;
  const float D = parameter<T>(p.D, p.D_dtype, head);
  const int own = static_cast<int>(threadIdx.x);  // the output that this thread finishes first
  const float weight = p.norm_weight != nullptr && own < P
                           ? parameter<T>(p.norm_weight, p.norm_weight_dtype, head * P + own)
                           : 1.f;
  const float gate = own < P ? silu(to_float(z[own])) : 0.f;
  const float d = dt > 20.f ? dt : log1pf(expf(dt)), decay = expf(d * A);
  sm90::grid_dependency_wait();
  sm90::grid_launch_dependents();

  const Convolved h = convolved(p, row, head);
  float B[kChunks == 0 ? 1 : kChunks][kVec], C[kChunks == 0 ? 1 : kChunks][kVec];
#pragma unroll
  for (int j = 0; j < kChunks; ++j)
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const int n = (j * kLanes + lane) * kVec + i;
      *reinterpret_cast<float4*>(&B[j][i]) = *reinterpret_cast<const float4*>(h.B + n);
      *reinterpret_cast<float4*>(&C[j][i]) = *reinterpret_cast<const float4*>(h.C + n);
    }

  for (int base = 0; base < P; base += pass) {
    if (base > 0) read(base);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int r = base + i * stride + first;
      float dot = 0.f;
      const float x = r < P ? h.x[r] : 0.f, dx = d * x;
      if constexpr (kChunks > 0) {
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
          if (r < P) {
            dot += advance(held[i][j], decay, dx, B[j], C[j]);
            *reinterpret_cast<Chunk*>(state + r * N + (j * kLanes + lane) * kVec) = held[i][j];
          }
      } else if (r < P) {
        for (int n = lane; n < N; n += kLanes) {
          Vec<S, 1> one{{state[r * N + n]}};
          const float b[1] = {h.B[n]}, c[1] = {h.C[n]};
          dot += advance(one, decay, dx, b, c);
          state[r * N + n] = one.v[0];
        }
      }
#pragma unroll
      for (int m = kLanes / 2; m > 0; m /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, m);
      if (r < P && lane == 0) smem[r] = dot + D * x;
    }
  }
  __syncthreads();

  // Gate and norm, a thread an output; the first of each thread is at hand.
  const auto gated = [&](int r) { return smem[r] * (r == own ? gate : silu(to_float(z[r]))); };
  float rstd = 1.f;
  if (p.norm_weight) {
    float square = 0.f;
    for (int r = own; r < P; r += blockDim.x) {
      const float u = gated(r);
      square += u * u;
    }
    rstd = rsqrtf(block_sum(square, smem + P) / static_cast<float>(P) +
                  static_cast<float>(p.norm_eps));
  }
  for (int r = own; r < P; r += blockDim.x) {
    float w = weight;
    if (r != own && p.norm_weight)
      w = parameter<T>(p.norm_weight, p.norm_weight_dtype, head * P + r);
    y[r] = from_float<T>(w * gated(r) * rstd);
  }
}

template <typename T, typename S>
Status launch(const Mamba2StepParams& p, CUstream_st* stream) {
  const std::int64_t channels = p.groups * (p.headdim + p.d_state) + p.heads * p.d_state;
  const std::int64_t blocks = p.batch * p.heads, smem = 4 * (p.headdim + 8);
  if (blocks > 0x7fffffff || p.batch > 65535 || channels > 0x7fffffff || smem > 48 << 10)
    return {"zebra::mamba2_step: on CUDA at most 65535 rows and heads of at most 12000 channels"};
  const dim3 conv_grid(static_cast<unsigned>(ceil_div<std::int64_t>(channels, kConvThreads)),
                       static_cast<unsigned>(p.batch));
  const Status s = launch_dependent(mamba2_conv_kernel<T>, conv_grid, dim3(kConvThreads), 0, stream,
                                    p, static_cast<int>(channels));
  if (s.error != nullptr) return s;
  const bool aligned =
      p.headdim % 4 == 0 && rows_aligned<S>(p.d_state, {p.ssm_state}, {p.ssm_slot_stride});
  constexpr int kWide = kLanes * 16 / sizeof(S);  // state columns of one chunk of the lanes
  auto kernel = mamba2_state_kernel<T, S, 0>;
  if (aligned && p.d_state == 64) kernel = mamba2_state_kernel<T, S, 64 / kWide>;
  if (aligned && p.d_state == 128) kernel = mamba2_state_kernel<T, S, 128 / kWide>;
  const std::int64_t rows_per_warp = 32 / kLanes * kRowsPerThread;
  const std::int64_t warps = ceil_div<std::int64_t>(p.headdim, rows_per_warp);
  return launch_dependent(kernel, dim3(static_cast<unsigned>(blocks)),
                          dim3(32 * static_cast<unsigned>(warps < 8 ? warps : 8)),
                          static_cast<std::size_t>(smem), stream, p);
}

template <typename T>
Status step(const Mamba2StepParams& p, CUstream_st* stream) {
  return p.state_dtype == DType::kFloat32 ? launch<T, float>(p, stream) : launch<T, T>(p, stream);
}

}  // namespace

Status mamba2_step_cuda(const Mamba2StepParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.dtype, step, p, stream);
}

}  // namespace zebra
