// causal_conv1d for every GPU from sm_80 on.
//
// Computes       pre[t] = bias + sum_w weight[w] x[t - (W-1) + w], y = silu(pre) or pre, its
//                gradients (causal_conv1d.h), and the one-token step of decoding.
//                Derivation and what was rejected: docs/kernels/causal_conv1d.md.
// Grid           forward: channel blocks x tiles of tokens, then (packed) channel blocks x
//                sequences for the final states.  Backward: channel blocks x groups of tiles, then
//                one kernel that sums the partial weight gradients and gives dinitial_state.
//                Step: channel blocks x rows.
// Tiles          causal_conv1d_config.h: 128 threads x 8 channels (16 bytes) x up to 20 tokens
//                (backward 256), whole waves of CTAs.  A thread owns its channels and walks along
//                time; it never talks to another thread, so there is no barrier.
// Shared memory  a ring of 8 rows of 16 bytes a thread, filled by cp.async 7 rows ahead: forward
//                16 KiB, backward 32 KiB (x and dy) and 4 KiB of bias.  A thread reads only what
//                it wrote.  On an H200 that is 56 KiB (forward, 4 CTAs) and 84 KiB (backward, 3
//                CTAs) of loads in flight on a multiprocessor, without a register.
// Registers      sm_90, 16 bit, W = 4: forward 111 (packed 116), backward 168, step 95; no spills.
//                Weights and the sums of dx, dweight and dbias are fp32; the W-1 last rows stay
//                packed.
// Misaligned     rows that are not 16-byte aligned take one channel a thread and plain loads.
// Packed         a tile finds its first sequence by binary search and then only compares tokens
//                with the end of the sequence; the unpacked instance has none of it.  Boundaries
//                are clamped: wrong values give wrong rows, never a wrong access.
// Bound          HBM.  16,384 tokens x 6144 channels, 16 bit: forward 403 MB, backward 604 MB; at
//                4.25 TB/s 0.095 + 0.142 ms, plus (backward) 2.5 % for rows read by two tiles.
//                Forward issues 19 instructions an element and lane, 60 % of the slots at that
//                rate; backward 34, 70 %.
// Predicted      forward 0.103 ms, backward 0.170 ms, an event floor of 4.3 us in each.
// Measured       H200, 2026-11-23, 2x8192 x 6144 bf16: forward 104.8 us (91 % of the floor, a copy
//                of the same bytes 103.2), forward + backward 272 us (87 %), event floor of 3.4 us
//                in each. benchmarks/bench_causal_conv1d.py --device cuda
#include <initializer_list>

#include "causal_conv1d/causal_conv1d_backward.cuh"
#include "causal_conv1d/causal_conv1d_rows.cuh"
#include "common/cuda/launch.h"

namespace zebra {
namespace {

// ---- forward --------------------------------------------------------------------------------

// rows[0 .. W-2]: the last W-1 rows of sequence i
template <typename T, int kVec, int W>
__device__ __forceinline__ void store_state(const CausalConv1dParams& p, int i, int c0,
                                            const Row<T, kVec> (&rows)[W]) {
  T* state = static_cast<T*>(p.final_state) + (i * p.in.channels + c0) * (W - 1);
#pragma unroll
  for (int k = 0; k < W - 1; ++k)
#pragma unroll
    for (int j = 0; j < kVec; ++j) state[j * (W - 1) + k] = from_float<T>(rows[k][j]);
}

template <typename T, int kVec, int W, bool kPacked>
__global__ void __launch_bounds__(kThreads, 4)
    causal_conv1d_fwd_kernel(const CausalConv1dParams p, int tile, unsigned tiles,
                             unsigned channel_blocks) {
  __shared__ alignas(16) char ring[Rows<T, kVec>::kAsync ? kStages * kThreads * 16 : 16];
  const CausalConv1dInputs& in = p.in;
  const unsigned item = blockIdx.x / channel_blocks, block = blockIdx.x % channel_blocks;
  const int c0 = (block * blockDim.x + threadIdx.x) * kVec;
  if (c0 >= in.channels) return;
  Row<T, kVec> rows[W];
  if (item >= tiles * in.batch) {  // the final state of a sequence, which may be empty
    const Sequence s = sequence(in, item - tiles * in.batch);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) rows[k] = full_row<T, kVec, W>(in, s, s.end - (W - 1) + k, c0);
    return store_state(p, s.index, c0, rows);
  }
  const int b = item / tiles, t0 = item % tiles * tile;
  const int t1 = min(t0 + tile, static_cast<int>(in.tokens)), count = t1 - t0;
  Rows<T, kVec> x(ring + threadIdx.x * 16, blockDim.x * 16, x_row<T>(in, b, t0) + c0,
                  in.x_row_stride);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) x.request(i);
    async_commit();
  }
  const Parameters<T, kVec, W> parameters(in, c0);
  T* y = static_cast<T*>(p.y) + (b * in.tokens + t0) * in.channels + c0;
  Sequence s = kPacked ? sequence_at(in, b, t0) : Sequence{b, 0, static_cast<int>(in.tokens)};
  int n = 0;  // rows done
  for (;;) {
#pragma unroll
    for (int k = 0; k < W - 1; ++k) rows[k] = full_row<T, kVec, W>(in, s, t0 + n - (W - 1) + k, c0);
    const int stop = kPacked ? min(s.end, t1) - t0 : count;
    const auto walk = [&](auto is_silu) {
#pragma unroll 4
      for (; n < stop; ++n) {
        if (n + kStages - 1 < count) x.request(n + kStages - 1);
        async_commit();
        async_wait<kStages - 1>();
        rows[W - 1] = x.read(n);
        float out[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          out[j] = parameters.pre(j, rows);
          if constexpr (is_silu) out[j] *= sigmoid<T>(out[j]);
        }
        store_row(y, out);
        y += in.channels;
        shift(rows);
      }
    };
    if (in.silu)
      walk(std::true_type());
    else
      walk(std::false_type());
    if (!kPacked || n >= count) break;
    s = next_sequence(in, s, t0 + n);
  }
  if (!kPacked && t1 == in.tokens) store_state(p, b, c0, rows);
}

// ---- step -----------------------------------------------------------------------------------

template <typename T, int kVec, int W>
__global__ void __launch_bounds__(kThreads, 5)
    causal_conv1d_step_kernel(const CausalConv1dStepParams p, unsigned channel_blocks) {
  const unsigned first = blockIdx.x / channel_blocks, block = blockIdx.x % channel_blocks;
  const int c0 = (block * blockDim.x + threadIdx.x) * kVec;
  if (c0 >= p.channels) return;
  const Parameters<T, kVec, W> parameters(p, c0);
  const unsigned step = gridDim.x / channel_blocks;
  for (std::int64_t b = first; b < p.batch; b += step) {
    const std::int64_t slot = p.state_indices == nullptr ? b : p.state_indices[b];
    T* y = static_cast<T*>(p.y) + b * p.channels + c0;
    if (slot < 0 || slot >= p.slots) {  // padding, or an index that does not exist
      Row<T, kVec> fill;
      fill.fill(slot < 0 ? 0u : 0xffffffffu);
      fill.store(y);
      continue;
    }
    float out[kVec];
    T* state = static_cast<T*>(p.conv_state) + slot * p.state_stride + c0 * (W - 1);
    // [channel][tap] in memory, kVec elements an access
    Row<T, kVec> old[W - 1], x;
    x.load(static_cast<const T*>(p.x) + b * p.x_stride + c0);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) old[k].load(state + k * kVec);
    const auto tap = [&](int j, int k) {
      const int at = j * (W - 1) + k;
      return k == W - 1 ? x[j] : old[at / kVec][at % kVec];
    };
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      float v = parameters.bias[j];
#pragma unroll
      for (int k = 0; k < W; ++k) v = fmaf(parameters.w[j * W + k], tap(j, k), v);
      const float gate = sigmoid<T>(v);
      out[j] = p.silu ? v * gate : v;
    }
#pragma unroll
    for (int i = 0; i < W - 1; ++i) {
      float moved[kVec];
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        moved[j] = tap((i * kVec + j) / (W - 1), (i * kVec + j) % (W - 1) + 1);
      store_row(state + i * kVec, moved);
    }
    store_row(y, out);
  }
}

// ---- launch ---------------------------------------------------------------------------------

template <typename Fn>
Status with_width(int width, const Fn& fn) {
  switch (width) {
    case 2:
      return fn(std::integral_constant<int, 2>());
    case 3:
      return fn(std::integral_constant<int, 3>());
    default:
      return fn(std::integral_constant<int, kCausalConv1dMaxWidth>());
  }
}

// fn(channels a thread, W, packed): misaligned rows share the packed instance.
template <typename T, typename Fn>
Status with_tile(bool is_aligned, int width, bool packed, const Fn& fn) {
  constexpr int kVec = 16 / sizeof(T);
  return with_width(width, [&](auto w) {
    if (!is_aligned) return fn(std::integral_constant<int, 1>(), w, std::true_type());
    if (packed) return fn(std::integral_constant<int, kVec>(), w, std::true_type());
    return fn(std::integral_constant<int, kVec>(), w, std::false_type());
  });
}

constexpr std::int64_t kInt = std::int64_t{1} << 31;

Status check_grid(std::int64_t ctas) {
  return ctas < kInt ? Status{} : Status{"the problem needs 2^31 CTAs or more"};
}

Status check_counts(const CausalConv1dInputs& in) {
  const bool ok = in.tokens < kInt - kCausalConv1dMaxWidth && in.sequences < kInt &&
                  in.batch * ceil_div<std::int64_t>(in.tokens, 16) < kInt &&
                  in.channels < kInt - 2048;
  return ok ? Status{}
            : Status{"x must have fewer than 2^31 tokens, sequences, tiles and channels"};
}

template <typename T>
Status forward(const CausalConv1dParams& p, CUstream_st* stream) {
  const CausalConv1dInputs& in = p.in;
  const bool wide = rows_aligned<T>(in.channels, {in.x, in.weight, in.bias, p.y},
                                    {in.x_batch_stride, in.x_row_stride});
  const CausalConv1dConfig c =
      select_causal_conv1d_config(in.batch, in.tokens, in.channels, sizeof(T), wide);
  if (const Status status = check_counts(in); status.error) return status;
  return with_tile<T>(wide, in.width, in.cu_seqlens != nullptr, [&](auto vec, auto w, auto packed) {
    const std::int64_t states = packed() || c.tiles == 0 ? in.sequences : 0;
    const std::int64_t ctas = (in.batch * c.tiles + states) * c.channel_blocks;
    if (ctas == 0) return Status{};
    if (const Status status = check_grid(ctas); status.error) return status;
    causal_conv1d_fwd_kernel<T, vec(), w(), packed()>
        <<<static_cast<unsigned>(ctas), c.threads, 0, stream>>>(
            p, static_cast<int>(c.tile), static_cast<unsigned>(c.tiles),
            static_cast<unsigned>(c.channel_blocks));
    return launch_status();
  });
}

template <typename T>
Status backward(const CausalConv1dBackwardParams& p, CUstream_st* stream) {
  const CausalConv1dInputs& in = p.in;
  const bool wide =
      rows_aligned<T>(in.channels, {in.x, in.weight, in.bias, p.dy, p.dx},
                      {in.x_batch_stride, in.x_row_stride, p.dy_batch_stride, p.dy_row_stride});
  const CausalConv1dConfig c =
      select_causal_conv1d_backward_config(in.batch, in.tokens, in.channels, sizeof(T), wide);
  const std::int64_t ctas = p.partials * c.channel_blocks;
  if (const Status status = check_counts(in); status.error) return status;
  if (const Status status = check_grid(ctas); status.error) return status;
  if (ctas > 0) {
    const Status status =
        with_tile<T>(wide, in.width, in.cu_seqlens != nullptr, [&](auto vec, auto w, auto packed) {
          causal_conv1d_bwd_kernel<T, vec(), w(), packed()>
              <<<static_cast<unsigned>(ctas), c.threads, 0, stream>>>(
                  p, static_cast<unsigned>(c.channel_blocks));
          return launch_status();
        });
    if (status.error) return status;
  }
  const std::int64_t blocks = ceil_div<std::int64_t>(in.channels, 32);
  const std::int64_t states =
      p.dinitial_state == nullptr ? 0 : ceil_div<std::int64_t>(in.sequences, kReduceGroups);
  const std::int64_t reduce_ctas = (in.width + 1 + states) * blocks;
  if (const Status status = check_grid(reduce_ctas); status.error) return status;
  return with_width(in.width, [&](auto w) {
    causal_conv1d_bwd_reduce_kernel<T, w()>
        <<<static_cast<unsigned>(reduce_ctas), dim3(32, kReduceGroups), 0, stream>>>(
            p, static_cast<unsigned>(blocks));
    return launch_status();
  });
}

template <typename T>
Status step(const CausalConv1dStepParams& p, CUstream_st* stream) {
  constexpr std::int64_t kRows = 256;  // beyond, a CTA takes several rows with the same weights
  const bool wide = rows_aligned<T>(p.channels, {p.x, p.conv_state, p.weight, p.bias, p.y},
                                    {p.x_stride, p.state_stride});
  const CausalConv1dConfig c = select_causal_conv1d_config(p.batch, 1, p.channels, sizeof(T), wide);
  const std::int64_t ctas = (p.batch < kRows ? p.batch : kRows) * c.channel_blocks;
  return with_tile<T>(wide, p.width, false, [&](auto vec, auto w, auto) {
    causal_conv1d_step_kernel<T, vec(), w()><<<static_cast<unsigned>(ctas), c.threads, 0, stream>>>(
        p, static_cast<unsigned>(c.channel_blocks));
    return launch_status();
  });
}

}  // namespace

Status causal_conv1d_cuda(const CausalConv1dParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.in.dtype, forward, p, stream);
}

Status causal_conv1d_backward_cuda(const CausalConv1dBackwardParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.in.dtype, backward, p, stream);
}

Status causal_conv1d_step_cuda(const CausalConv1dStepParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.dtype, step, p, stream);
}

}  // namespace zebra
