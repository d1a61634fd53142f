// mamba2_step for every GPU from sm_80 on.
//
// Computes       the convolution of x, B, C, then state update, output, gate and per-head norm
//                (mamba2_step.h), in two kernels: several heads read the convolution of one group,
//                whose window may be shifted only once.
// Grid           convolution: a thread a channel and row; states: a CTA a head and row.
// Tiles          a warp holds 16 neighbouring state rows, 16 bytes a lane: where N is 64 or 128 it
//                asks for 512 bytes that lie together at a time, and a head of 128 x 128 fp32 is in
//                flight at once in the registers of 256 threads, or of many heads half of it in
//                those of 128.  kRowLanes = 0 walks rows of any other N element by element.
// Launch         dependent: windows and taps are asked into L2 before the convolution's input is
//                there, and the states are read while it runs.  Nothing before it in the stream
//                still runs then, because the convolution lets the next grid start only after its
//                own wait.
// Shared memory  P floats and one a warp.
// Bound          HBM: the state, read and written once; below some 4 rows, latency.
// Predicted      H200, 8B layer (32 heads, 128 x 128 fp32), 64 rows: 64 us / 0.88 = 72 us;
//                1 row: 5 us.
// Measured       H200, 2026-11-28: 64 rows 80 us (81 % of the floor), 1 row 10 us alone and 6.4 us
//                in a decoding step.  benchmarks/bench_mamba2_step.py, bench_decode.py --device
//                cuda
#include "common/cuda/launch.h"
#include "common/cuda/mma.cuh"
#include "common/cuda/vec.cuh"
#include "common/math.h"
#include "common/sm90/ptx.cuh"
#include "mamba2_step/mamba2_step.h"

namespace zebra {
namespace {

constexpr int kRowsPerWarp = 16;  // at once
// Warps of a head, at most: few, of many heads, take turns at its rows, so that more heads are on a
// multiprocessor, and loads of some cover stores of others.  From so many heads of a multiprocessor
// on.  Of at most 128 rows the result is the same: as many threads have an output.
constexpr int kMostWarps = 8, kFewWarps = 4, kManyHeads = 4, kFewWarpsRows = 128;
constexpr int kConvThreads = 128;
constexpr int kTaps = 4;   // of a window, asked for before the first of them is shifted
constexpr int kAhead = 8;  // channels whose window, and whose taps, a line holds at least
constexpr unsigned kWarp = 0xffffffffu;

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
  const std::int64_t row = blockIdx.y;
  const int channel = static_cast<int>(blockIdx.x * kConvThreads + threadIdx.x);
  const int width = static_cast<int>(p.width);
  const std::int64_t taps = static_cast<std::int64_t>(channel) * width;
  const auto window_of = [&](std::int64_t slot) {
    return static_cast<T*>(p.conv_state) + slot * p.conv_slot_stride +
           static_cast<std::int64_t>(channel) * (width - 1);
  };
  if (threadIdx.x % kAhead == 0 && channel < channels) {
    // Into L2, whatever still changes: nothing is read before the wait, and no slot from L1.
    const std::int64_t soon = p.state_indices == nullptr ? row : __ldcg(p.state_indices + row);
    if (soon >= 0 && soon < p.slots) prefetch_l2(window_of(soon));
    prefetch_l2(static_cast<const char*>(p.conv_weight) +
                taps * (p.conv_weight_dtype == DType::kFloat32 ? 4 : sizeof(T)));
  }
  sm90::grid_dependency_wait();
  sm90::grid_launch_dependents();
  const std::int64_t slot = slot_of(p, row);
  if (channel >= channels || slot < 0 || slot >= p.slots) return;
  T* const window = window_of(slot);
  const T x = static_cast<const T*>(p.zxbcdt)[row * p.row_stride + p.heads * p.headdim + channel];
  float sum = p.conv_bias ? parameter<T>(p.conv_bias, p.conv_bias_dtype, channel) : 0.f;
  for (int base = 0; base < width; base += kTaps) {
    T held[kTaps];
    float weight[kTaps];
#pragma unroll
    for (int w = 0; w < kTaps; ++w) {
      if (base + w >= width) break;
      held[w] = base + w + 1 < width ? window[base + w] : x;
      weight[w] = parameter<T>(p.conv_weight, p.conv_weight_dtype, taps + base + w);
    }
#pragma unroll
    for (int w = 0; w < kTaps; ++w) {
      if (base + w >= width) break;
      sum += to_float(held[w]) * weight[w];
      if (base + w > 0) window[base + w - 1] = held[w];
    }
  }
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

// Advances a piece of a state and returns their part of S C.
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

// The compiler unpacks a piece of 2-byte numbers behind it, not all pieces ahead.
template <typename Piece>
__device__ __forceinline__ void opaque(Piece& piece) {
  auto& words = reinterpret_cast<unsigned (&)[4]>(piece);
  asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
}

// Of 2 kValues neighbouring lanes, lanes 2 n and 2 n + 1 get the sum of everybody's v[n].
template <int kValues>
__device__ __forceinline__ float sum_of_own(const float (&v)[kValues], int lane) {
  if constexpr (kValues == 1) {
    return v[0] + __shfl_xor_sync(kWarp, v[0], 1);
  } else {
    constexpr int kHalf = kValues / 2;
    const bool is_upper = (lane & kValues) != 0;
    float kept[kHalf];
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float other = __shfl_xor_sync(kWarp, is_upper ? v[k] : v[k + kHalf], kValues);
      kept[k] = (is_upper ? v[k + kHalf] : v[k]) + other;
    }
    return sum_of_own(kept, lane);
  }
}

template <typename T, typename S, int kRowLanes>
__global__ void __launch_bounds__(256) mamba2_state_kernel(const Mamba2StepParams p) {
  extern __shared__ float smem[];  // [P] outputs, then a float a warp
  constexpr int kVec = 16 / sizeof(S);
  using Piece = Vec<S, kVec>;
  constexpr int kPieces = kRowLanes == 0 ? 1 : kRowsPerWarp * kRowLanes / 32;
  constexpr int kTogether =
      kRowLanes == 0 ? 1 : 32 / kRowLanes;  // rows that a warp asks for at a time
  const int P = static_cast<int>(p.headdim), N = static_cast<int>(p.d_state);
  const int head = static_cast<int>(blockIdx.x % p.heads);
  const std::int64_t row = blockIdx.x / p.heads;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRowsPerWarp;
  const int pass = blockDim.x / 32 * kRowsPerWarp;
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

  // A warp's rows are a run of pieces; piece i of a lane is of the i-th 512 bytes.
  const auto row_of = [&](int i) {
    return i * kTogether + (kRowLanes == 0 ? 0 : lane / kRowLanes);
  };
  Piece* const pieces = reinterpret_cast<Piece*>(state) + lane;
  Piece held[kPieces];
  const auto read = [&](int base) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (kRowLanes > 0 && base + row_of(i) < P) held[i] = pieces[base * kRowLanes + 32 * i];
  };
  read(first);
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
  if constexpr (kRowLanes > 0) {
    const int column = lane % kRowLanes * kVec;
    float B[kVec], C[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      *reinterpret_cast<float4*>(B + i) = *reinterpret_cast<const float4*>(h.B + column + i);
      *reinterpret_cast<float4*>(C + i) = *reinterpret_cast<const float4*>(h.C + column + i);
    }
    for (int base = first; base < P; base += pass) {
      if (base > first) read(base);
      const int mine = base + lane % kRowsPerWarp;
      const float x = mine < P ? h.x[mine] : 0.f;  // of the row of this number, for all lanes
      float dots[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        dots[i] = 0.f;
        const float dx = d * __shfl_sync(kWarp, x, row_of(i));
        opaque(held[i]);
        if (base + row_of(i) < P) {
          dots[i] = advance(held[i], decay, dx, B, C);
          pieces[base * kRowLanes + 32 * i] = held[i];
        }
      }
      const float dot = sum_of_own(dots, lane);
      const int own_row = row_of(lane % kRowLanes / 2);
      const float skip = D * __shfl_sync(kWarp, x, own_row);
      if (lane % 2 == 0 && base + own_row < P) smem[base + own_row] = dot + skip;
    }
  } else {
    for (int r = threadIdx.x / 32; r < P; r += blockDim.x / 32) {
      const float x = h.x[r];
      float dot = 0.f;
      for (int n = lane; n < N; n += 32) {
        Vec<S, 1> one{{state[r * N + n]}};
        const float b[1] = {h.B[n]}, c[1] = {h.C[n]};
        dot += advance(one, decay, d * x, b, c);
        state[r * N + n] = one.v[0];
      }
      dot = warp_sum(dot);
      if (lane == 0) smem[r] = dot + D * x;
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
  constexpr int kVec = 16 / sizeof(S);
  auto kernel = mamba2_state_kernel<T, S, 0>;
  if (aligned && p.d_state == 64) kernel = mamba2_state_kernel<T, S, 64 / kVec>;
  if (aligned && p.d_state == 128) kernel = mamba2_state_kernel<T, S, 128 / kVec>;
  const bool is_many = blocks > kManyHeads * multiprocessors() && p.headdim <= kFewWarpsRows;
  const std::int64_t warps = ceil_div<std::int64_t>(p.headdim, kRowsPerWarp);
  const std::int64_t most = is_many ? kFewWarps : kMostWarps;
  return launch_dependent(kernel, dim3(static_cast<unsigned>(blocks)),
                          dim3(32 * static_cast<unsigned>(warps < most ? warps : most)),
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
