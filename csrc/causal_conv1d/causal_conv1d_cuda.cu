// causal_conv1d for every GPU from sm_80 on.
//
// Computes       pre[t] = bias + sum_w weight[w] x[t - (W-1) + w], y = silu(pre) or pre, its
// gradients
//                (causal_conv1d.h), and the one-token step of decoding.
// Grid           forward: channel blocks x tiles of tokens, then channel blocks x sequences for the
//                final states.  Backward: channel blocks x groups of tiles; then one kernel sums
//                the partial weight gradients and gives dinitial_state.  Step: channel blocks x
//                rows.
// Tiles          causal_conv1d_config.h: 128 threads x 8 channels (16 bytes) x up to 128 tokens
//                (backward 256).  A thread owns its channels and walks along time; it never talks
//                to another thread, so there is no barrier.
// Shared memory  a ring of 8 rows, 16 bytes a thread and row, filled by cp.async 7 rows ahead:
//                forward 16 KiB, backward 32 KiB (x and dy) and 4 KiB of bias.  A thread reads only
//                what it wrote. On an H200 that is 70 KiB (forward, 5 CTAs) and 84 KiB (backward, 3
//                CTAs) of loads in flight on a multiprocessor, without a register.
// Registers      weights, the W-1 last rows and (backward) the sums of dx, dweight, dbias, in fp32.
// Misaligned     rows that are not 16-byte aligned take one channel a thread and plain loads.
// Packed         a tile finds its first sequence by binary search and then only compares tokens
//                with the end of the sequence; the unpacked instance has none of it.  Boundaries
//                are clamped: wrong values give wrong rows, never a wrong access.
// Bound          HBM.  16,384 tokens x 6144 channels, 16 bit: forward 403 MB, backward 604 MB;
//                at 4.25 TB/s 0.095 + 0.142 ms, plus 1.2 % (2.3 %) for rows read by two tiles.
// Predicted      forward 0.103 ms, backward 0.165 ms, one event floor of 4.3 us in each.
// Measured       not yet.
#include <initializer_list>
#include <type_traits>

#include "causal_conv1d/causal_conv1d.h"
#include "causal_conv1d/causal_conv1d_config.h"
#include "common/cuda/launch.h"
#include "common/cuda/vec.cuh"

namespace zebra {
namespace {

constexpr int kThreads = kCausalConv1dThreads;
constexpr int kStages = kCausalConv1dStages;
constexpr int kReduceGroups = 8;  // warps that share the sum over partials
static_assert((kStages & (kStages - 1)) == 0, "the ring index is masked");
static_assert((2 * kStages * 16 + 8 * 4) * kThreads == 36 * 1024, "backward, of 48 KiB static");

// ---- elementary functions -------------------------------------------------------------------

// 1 / (1 + exp(-x)) within 3 ulp, two special-function instructions; 0 and 1 at the far ends.
__device__ __forceinline__ float fast_sigmoid(float x) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
  return s;
}

// ---- packed rows ----------------------------------------------------------------------------

// kVec channels of one row as loaded: 16-bit elements stay packed, two a register, until used.
template <typename T, int kVec>
struct Row {
  static_assert(kVec * sizeof(T) == 16, "one 16-byte access");
  unsigned words[4];

  __device__ __forceinline__ void load(const T* src) {
    const uint4 v = *reinterpret_cast<const uint4*>(src);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  __device__ __forceinline__ void store(T* dst) const {
    *reinterpret_cast<uint4*>(dst) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  __device__ __forceinline__ void fill(unsigned bits) {  // all ones: NaN in every dtype
    words[0] = words[1] = words[2] = words[3] = bits;
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      const __half2 pair = *reinterpret_cast<const __half2*>(&words[i / 2]);
      return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
    }
  }
  __device__ __forceinline__ void set(const float (&v)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i += 4 / sizeof(T)) {
      if constexpr (std::is_same_v<T, float>) {
        words[i] = __float_as_uint(v[i]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(v[i], v[i + 1]);
        words[i / 2] = *reinterpret_cast<const unsigned*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(v[i], v[i + 1]);
        words[i / 2] = *reinterpret_cast<const unsigned*>(&pair);
      }
    }
  }
};

// One channel: nothing to pack.
template <typename T>
struct Row<T, 1> {
  float value;
  __device__ __forceinline__ void load(const T* src) { value = to_float(*src); }
  __device__ __forceinline__ void store(T* dst) const { *dst = from_float<T>(value); }
  __device__ __forceinline__ void fill(unsigned bits) { value = __uint_as_float(bits); }
  __device__ __forceinline__ float operator[](int) const { return value; }
  __device__ __forceinline__ void set(const float (&v)[1]) { value = v[0]; }
};

template <typename T, int kVec>
__device__ __forceinline__ void store_row(T* dst, const float (&v)[kVec]) {
  Row<T, kVec> row;
  row.set(v);
  row.store(dst);
}

// ---- the ring of rows -----------------------------------------------------------------------

__device__ __forceinline__ void async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Consecutive rows of a tensor for one thread's channels: request() them in order kStages - 1 ahead
// of read().  Sixteen-byte rows go through shared memory; one-element rows are read in place.
template <typename T, int kVec>
class Rows {
 public:
  static constexpr bool kAsync = kVec * sizeof(T) == 16;

  // `smem`: this thread's column of the ring, `pitch` bytes a row; `row`: the first one.
  __device__ __forceinline__ Rows(char* smem, unsigned pitch, const T* row, std::int64_t stride)
      : smem_(smem), pitch_(pitch), row_(row), stride_(stride) {}

  __device__ __forceinline__ void request(int row) {
    if constexpr (kAsync) {
      const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(slot(row)));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(row_) : "memory");
      row_ += stride_;
    }
  }
  __device__ __forceinline__ Row<T, kVec> read(int row) {
    Row<T, kVec> values;
    if constexpr (kAsync) {
      values.load(reinterpret_cast<const T*>(slot(row)));
    } else {
      values.load(row_);
      row_ += stride_;
    }
    return values;
  }

 private:
  __device__ __forceinline__ char* slot(int row) { return smem_ + (row & (kStages - 1)) * pitch_; }

  char* smem_;
  unsigned pitch_;
  const T* row_;
  std::int64_t stride_;
};

// ---- sequences ------------------------------------------------------------------------------

// Tokens and sequences count in 32 bits (checked before the launch); offsets take 64.
struct Sequence {
  int index, start, end;  // tokens [start, end) of a batch row
};

__device__ __forceinline__ int clamp(int v, int low, int high) {
  return v < low ? low : (v > high ? high : v);
}

// Sequence i; with any values in cu_seqlens 0 <= start <= end <= tokens, and the last ends at
// tokens.
__device__ __forceinline__ Sequence sequence(const CausalConv1dInputs& in, int i) {
  const int tokens = static_cast<int>(in.tokens);
  if (in.cu_seqlens == nullptr) return {i, 0, tokens};
  const int start = i == 0 ? 0 : clamp(in.cu_seqlens[i], 0, tokens);
  return {i, start, i + 1 == in.sequences ? tokens : clamp(in.cu_seqlens[i + 1], start, tokens)};
}

// The sequence that holds token t of batch row b; its start is at most t.
__device__ __forceinline__ Sequence sequence_at(const CausalConv1dInputs& in, int b, int t) {
  if (in.cu_seqlens == nullptr) return sequence(in, b);
  int low = 0, high = static_cast<int>(in.sequences) - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (in.cu_seqlens[middle + 1] > t)
      high = middle;
    else
      low = middle + 1;
  }
  Sequence s = sequence(in, low);
  s.start = min(s.start, t);
  return s;
}

// The next sequence that ends after t.  One ends at the last token whatever cu_seqlens holds.
__device__ __forceinline__ Sequence next_sequence(const CausalConv1dInputs& in, Sequence s, int t) {
  do s = sequence(in, s.index + 1);
  while (s.end <= t && s.index + 1 < in.sequences);
  s.start = min(s.start, t);
  return s;
}

template <typename T>
__device__ __forceinline__ const T* x_row(const CausalConv1dInputs& in, int b, int t) {
  return static_cast<const T*>(in.x) + b * in.x_batch_stride + t * in.x_row_stride;
}
__device__ __forceinline__ int batch_row(const CausalConv1dInputs& in, int i) {
  return in.cu_seqlens == nullptr ? i : 0;
}

// Element of row r < start of sequence s: the initial state, or zero.
template <typename T, int W>
__device__ __forceinline__ float past(const CausalConv1dInputs& in, const Sequence& s, int r,
                                      int c) {
  if (in.initial_state == nullptr) return 0.f;
  const std::int64_t at = (s.index * in.channels + c) * (W - 1) + (r - s.start + W - 1);
  return to_float(static_cast<const T*>(in.initial_state)[at]);
}

// Row r of sequence s, before its start too.
template <typename T, int kVec, int W>
__device__ __forceinline__ Row<T, kVec> full_row(const CausalConv1dInputs& in, const Sequence& s,
                                                 int r, int c0) {
  Row<T, kVec> row;
  if (r >= s.start) {
    row.load(x_row<T>(in, batch_row(in, s.index), r) + c0);
  } else {
    float v[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = past<T, W>(in, s, r, c0 + i);
    row.set(v);
  }
  return row;
}

// ---- parameters -----------------------------------------------------------------------------

// kVec * N consecutive values of T or fp32, 16 bytes at a time where kVec is a full vector.
template <typename T, int kVec, int N>
__device__ __forceinline__ void load_parameters(const void* src, bool is_float, std::int64_t at,
                                                float (&dst)[kVec * N]) {
  constexpr int kFloats = kVec < 4 ? kVec : 4;
  if (is_float) {
#pragma unroll
    for (int i = 0; i < kVec * N / kFloats; ++i) {
      float v[kFloats];
      load_vec(static_cast<const float*>(src) + at + i * kFloats, v);
#pragma unroll
      for (int j = 0; j < kFloats; ++j) dst[i * kFloats + j] = v[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float v[kVec];
      load_vec(static_cast<const T*>(src) + at + i * kVec, v);
#pragma unroll
      for (int j = 0; j < kVec; ++j) dst[i * kVec + j] = v[j];
    }
  }
}

template <typename T, int kVec, int W>
struct Parameters {
  float w[kVec * W];  // [channel][tap]
  float bias[kVec];

  template <typename Params>
  __device__ __forceinline__ Parameters(const Params& p, int c0) {
    load_parameters<T, kVec, W>(p.weight, p.weight_dtype == DType::kFloat32, c0 * W, w);
    if (p.bias != nullptr) {
      load_parameters<T, kVec, 1>(p.bias, p.bias_dtype == DType::kFloat32, c0, bias);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) bias[i] = 0.f;
    }
  }
  // rows[W-1] is the newest
  __device__ __forceinline__ float pre(int i, const Row<T, kVec> (&rows)[W], float v) const {
#pragma unroll
    for (int k = 0; k < W; ++k) v = fmaf(w[i * W + k], rows[k][i], v);
    return v;
  }
  __device__ __forceinline__ float pre(int i, const Row<T, kVec> (&rows)[W]) const {
    return pre(i, rows, bias[i]);
  }
};

template <typename T, int kVec, int W>
__device__ __forceinline__ void shift(Row<T, kVec> (&rows)[W]) {
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) rows[k] = rows[k + 1];
}

// ---- forward --------------------------------------------------------------------------------

// The last W-1 rows of sequence i.
template <typename T, int kVec, int W>
__device__ __forceinline__ void write_final_state(const CausalConv1dParams& p, int i, int c0) {
  const Sequence s = sequence(p.in, i);
  T* state = static_cast<T*>(p.final_state) + (i * p.in.channels + c0) * (W - 1);
#pragma unroll
  for (int k = 0; k < W - 1; ++k) {
    const Row<T, kVec> row = full_row<T, kVec, W>(p.in, s, s.end - (W - 1) + k, c0);
#pragma unroll
    for (int j = 0; j < kVec; ++j) state[j * (W - 1) + k] = from_float<T>(row[j]);
  }
}

template <typename T, int kVec, int W, bool kPacked>
__global__ void __launch_bounds__(kThreads, 5)
    causal_conv1d_fwd_kernel(const CausalConv1dParams p, int tile, unsigned tiles,
                             unsigned channel_blocks) {
  __shared__ alignas(16) char ring[Rows<T, kVec>::kAsync ? kStages * kThreads * 16 : 16];
  const CausalConv1dInputs& in = p.in;
  const unsigned item = blockIdx.x / channel_blocks, block = blockIdx.x % channel_blocks;
  const int c0 = (block * blockDim.x + threadIdx.x) * kVec;
  if (c0 >= in.channels) return;
  if (item >= tiles * in.batch)
    return write_final_state<T, kVec, W>(p, item - tiles * in.batch, c0);
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
  Row<T, kVec> rows[W];
  int n = 0;  // rows done
  for (;;) {
#pragma unroll
    for (int k = 0; k < W - 1; ++k) rows[k] = full_row<T, kVec, W>(in, s, t0 + n - (W - 1) + k, c0);
    const int stop = kPacked ? min(s.end, t1) - t0 : count;
    const auto walk = [&](auto is_silu) {
    // Rolled: unrolling keeps unpacked rows alive and costs a CTA a multiprocessor.
#pragma unroll 1
      for (; n < stop; ++n) {
        if (n + kStages - 1 < count) x.request(n + kStages - 1);
        async_commit();
        async_wait<kStages - 1>();
        rows[W - 1] = x.read(n);
        float out[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          out[j] = parameters.pre(j, rows);
          if constexpr (is_silu) out[j] *= fast_sigmoid(out[j]);
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
}

// ---- backward -------------------------------------------------------------------------------

__device__ __forceinline__ float silu_grad(float x) {
  const float s = fast_sigmoid(x);
  return s * fmaf(x, 1.f - s, 1.f);
}

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
          const float slope = silu_grad(parameters.pre(j, rows, b_j));
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
      if (in.silu) g *= silu_grad(parameters.pre(0, rows));
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
      const float gate = fast_sigmoid(v);
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

// Whether these pointers and strides allow 16-byte access; strides in elements of T.
template <typename T>
bool aligned(std::int64_t channels, std::initializer_list<const void*> pointers,
             std::initializer_list<std::int64_t> strides) {
  constexpr std::int64_t kVec = 16 / sizeof(T);
  bool ok = channels % kVec == 0;
  for (const void* ptr : pointers) ok = ok && reinterpret_cast<std::uintptr_t>(ptr) % 16 == 0;
  for (const std::int64_t stride : strides) ok = ok && stride % kVec == 0;
  return ok;
}

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
  const bool wide = aligned<T>(in.channels, {in.x, in.weight, in.bias, p.y},
                               {in.x_batch_stride, in.x_row_stride});
  const CausalConv1dConfig c =
      select_causal_conv1d_config(in.batch, in.tokens, in.channels, sizeof(T), wide);
  const std::int64_t ctas = (in.batch * c.tiles + in.sequences) * c.channel_blocks;
  if (ctas == 0) return {};
  if (const Status status = check_counts(in); status.error) return status;
  if (const Status status = check_grid(ctas); status.error) return status;
  return with_tile<T>(wide, in.width, in.cu_seqlens != nullptr, [&](auto vec, auto w, auto packed) {
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
      aligned<T>(in.channels, {in.x, in.weight, in.bias, p.dy, p.dx},
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
  const bool wide = aligned<T>(p.channels, {p.x, p.conv_state, p.weight, p.bias, p.y},
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
