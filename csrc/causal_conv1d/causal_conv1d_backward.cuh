// The backward pass of causal_conv1d: dx and partial weight gradients in one walk, then their sum.
// causal_conv1d_cuda.cu opens with the design.
#pragma once

#include "causal_conv1d/causal_conv1d_rows.cuh"

namespace zebra {
namespace {

constexpr int kReduceGroups = 8;  // warps that share the sum over partials
static_assert((2 * kStages * 16 + 8 * 4) * kThreads == 36 * 1024, "of 48 KiB static");

template <typename T, int kVec, int W, bool kPacked>
__global__ void __launch_bounds__(kThreads, 3)
    causal_conv1d_bwd_kernel(const CausalConv1dBackwardParams p, unsigned channel_blocks) {
  constexpr int kRing = Rows<T, kVec>::kAsync ? kStages * kThreads * 16 : 16;
  __shared__ alignas(16) char ring[2 * kRing];
  const CausalConv1dInputs& in = p.in;
  const unsigned group = blockIdx.x / channel_blocks, block = blockIdx.x % channel_blocks;
  const int c0 = (block * blockDim.x + threadIdx.x) * kVec;
  if (c0 >= in.channels) return;
  const Parameters<T, kVec, W> parameters(in, c0);
  // In shared memory, a thread its own, because there is no register left.
  constexpr int kQuad = kVec < 4 ? kVec : 4;
  __shared__ Vec<float, kQuad> bias[kVec / kQuad][kThreads];
#pragma unroll
  for (int j = 0; j < kVec; ++j) bias[j / kQuad][threadIdx.x].v[j % kQuad] = parameters.bias[j];
  float dw[W][kVec] = {}, db[kVec] = {};

  const unsigned tiles = static_cast<unsigned>(p.tiles), per_cta = static_cast<unsigned>(p.items);
  const unsigned last = min((group + 1) * per_cta, static_cast<unsigned>(in.batch) * tiles);
  for (unsigned item = group * per_cta; item < last; ++item) {
    const int b = item / tiles, t0 = item % tiles * static_cast<int>(p.tile);
    const int tokens = static_cast<int>(in.tokens);
    const int own = min(static_cast<int>(p.tile), tokens - t0);
    const int count =
        min(own + W - 1, tokens - t0);  // the next W-1 tokens reach back into the tile
    Rows<T, kVec> x(ring + threadIdx.x * 16, blockDim.x * 16, x_row<T>(in, b, t0) + c0,
                    in.x_row_stride);
    Rows<T, kVec> dy(
        ring + kRing + threadIdx.x * 16, blockDim.x * 16,
        static_cast<const T*>(p.dy) + b * p.dy_batch_stride + t0 * p.dy_row_stride + c0,
        p.dy_row_stride);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) {
        x.request(i);
        dy.request(i);
      }
      async_commit();
    }
    T* dx = static_cast<T*>(p.dx) + (b * in.tokens + t0 - (W - 1)) * in.channels + c0;
    Sequence s = kPacked ? sequence_at(in, b, t0) : Sequence{b, 0, static_cast<int>(in.tokens)};
    Row<T, kVec> rows[W];
    int n = 0;  // tokens done; dx points to row n - (W-1)
    for (;;) {
      float sums[W - 1][kVec];  // dx of rows n - (W-1) .. n - 1
#pragma unroll
      for (int k = 0; k < W - 1; ++k) {
        rows[k] = full_row<T, kVec, W>(in, s, t0 + n - (W - 1) + k, c0);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sums[k][j] = 0.f;
      }
      const int first = n;  // rows before it are another tile's or another sequence's
      const int stop = kPacked ? min(s.end - t0, count) : count;
      const auto token = [&](auto is_own) {
        if (n + kStages - 1 < count) {
          x.request(n + kStages - 1);
          dy.request(n + kStages - 1);
        }
        async_commit();
        async_wait<kStages - 1>();
        rows[W - 1] = x.read(n);
        const Row<T, kVec> dy_row = dy.read(n);
        float done[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          float g = dy_row[j];
          const float b_j = bias[j / kQuad][threadIdx.x].v[j % kQuad];
          const float slope = silu_grad<T>(parameters.pre(j, rows, b_j));
          g *= in.silu ? slope : 1.f;  // a branch would keep the channels from overlapping
          if constexpr (is_own) {
            db[j] += g;
#pragma unroll
            for (int k = 0; k < W; ++k) dw[k][j] = fmaf(g, rows[k][j], dw[k][j]);
          }
          const float* w = parameters.w + j * W;
          done[j] = fmaf(w[0], g, sums[0][j]);
#pragma unroll
          for (int k = 1; k < W - 1; ++k) sums[k - 1][j] = fmaf(w[k], g, sums[k][j]);
          sums[W - 2][j] = w[W - 1] * g;
        }
        if (n - (W - 1) >= first) store_row(dx, done);
        dx += in.channels;
        shift(rows);
      };
      const int own_stop = stop < own ? stop : own;
#pragma unroll 1
      for (; n < own_stop; ++n) token(std::true_type());
#pragma unroll 1
      for (; n < stop; ++n) token(std::false_type());
      if (t0 + n == s.end) {  // its last rows, which are also the final state
#pragma unroll
        for (int k = 0; k < W - 1; ++k) {
          const int r = n - (W - 1) + k;
          if (p.dfinal_state != nullptr) {
#pragma unroll
            for (int j = 0; j < kVec; ++j)
              sums[k][j] += to_float(static_cast<const T*>(
                  p.dfinal_state)[(s.index * in.channels + c0 + j) * (W - 1) + k]);
          }
          if (r >= first && r < own) store_row(dx + k * in.channels, sums[k]);
        }
      }
      if (!kPacked || n >= own) break;
      s = next_sequence(in, s, t0 + n);
    }
    async_wait<0>();
  }
  float* partial = static_cast<float*>(p.partial) +
                   static_cast<std::int64_t>(group) * (W + 1) * in.channels + c0;
#pragma unroll
  for (int k = 0; k <= W; ++k) {
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      partial[k * in.channels + j] = k < W ? dw[k < W ? k : 0][j] : db[j];
  }
}

// dinitial_state[i] of one channel: what the first W-1 tokens and, in a shorter sequence, the final
// state give back.
template <typename T, int W>
__device__ __forceinline__ void write_dinitial_state(const CausalConv1dBackwardParams& p, int i,
                                                     int c) {
  const CausalConv1dInputs& in = p.in;
  const Sequence s = sequence(in, i);
  const Parameters<T, 1, W> parameters(in, c);
  const int b = batch_row(in, i), length = s.end - s.start;
  const T* dy = static_cast<const T*>(p.dy) + b * p.dy_batch_stride + s.start * p.dy_row_stride + c;
  const std::int64_t state = (i * in.channels + c) * (W - 1);
  Row<T, 1> rows[W];
  float sums[W - 1];
#pragma unroll
  for (int k = 0; k < W - 1; ++k) {
    rows[k] = full_row<T, 1, W>(in, s, s.start - (W - 1) + k, c);
    sums[k] = 0.f;
  }
#pragma unroll
  for (int n = 0; n < W - 1; ++n) {
    if (n < length) {
      rows[W - 1] = full_row<T, 1, W>(in, s, s.start + n, c);
      float g = to_float(dy[n * p.dy_row_stride]);
      if (in.silu) g *= silu_grad<T>(parameters.pre(0, rows));
#pragma unroll
      for (int k = n; k < W - 1; ++k) sums[k] = fmaf(parameters.w[k - n], g, sums[k]);
      shift(rows);
    } else if (p.dfinal_state != nullptr) {
      // Row n of the initial state is row n - length of the final state.
      sums[n] += to_float(static_cast<const T*>(p.dfinal_state)[state + n - length]);
    }
  }
#pragma unroll
  for (int k = 0; k < W - 1; ++k)
    static_cast<T*>(p.dinitial_state)[state + k] = from_float<T>(sums[k]);
}

template <typename T>
__device__ __forceinline__ void store_parameter(void* dst, DType dtype, std::int64_t at, float v) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(dst)[at] = v;
  else
    static_cast<T*>(dst)[at] = from_float<T>(v);
}

// Block row 0..W: one tap (or the bias) of 32 channels, the partials in kReduceGroups runs that are
// then added in order.  Block rows beyond: dinitial_state of a sequence.
template <typename T, int W>
__global__ void __launch_bounds__(32 * kReduceGroups)
    causal_conv1d_bwd_reduce_kernel(const CausalConv1dBackwardParams p, unsigned channel_blocks) {
  __shared__ float smem[kReduceGroups][32];
  const CausalConv1dInputs& in = p.in;
  const unsigned row = blockIdx.x / channel_blocks, block = blockIdx.x % channel_blocks;
  const int c = block * 32 + threadIdx.x;
  if (row > W) {
    const int i = (row - W - 1) * kReduceGroups + threadIdx.y;
    if (c < in.channels && i < in.sequences) write_dinitial_state<T, W>(p, i, c);
    return;
  }
  const std::int64_t run = ceil_div<std::int64_t>(p.partials, kReduceGroups);
  const std::int64_t first = threadIdx.y * run;
  const std::int64_t last = first + run < p.partials ? first + run : p.partials;
  float total = 0.f;
  if (c < in.channels) {
    const float* partial = static_cast<const float*>(p.partial) + row * in.channels + c;
#pragma unroll 8
    for (std::int64_t g = first; g < last; ++g) total += partial[g * (W + 1) * in.channels];
  }
  smem[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || c >= in.channels) return;
#pragma unroll
  for (int g = 1; g < kReduceGroups; ++g) total += smem[g][threadIdx.x];
  if (row < W)
    store_parameter<T>(p.dweight, in.weight_dtype, c * W + row, total);
  else if (p.dbias != nullptr)
    store_parameter<T>(p.dbias, in.bias_dtype, c, total);
}

}  // namespace
}  // namespace zebra
