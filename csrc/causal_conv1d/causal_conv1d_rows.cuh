// What the kernels of causal_conv1d share: the ring of rows, sequences, parameters.
#pragma once

#include <type_traits>

#include "causal_conv1d/causal_conv1d.h"
#include "causal_conv1d/causal_conv1d_config.h"
#include "common/cuda/vec.cuh"

namespace zebra {
namespace {

constexpr int kThreads = kCausalConv1dThreads;
constexpr int kStages = kCausalConv1dStages;
static_assert((kStages & (kStages - 1)) == 0, "the ring index is masked");

// ---- elementary functions -------------------------------------------------------------------

// 1 / (1 + exp(-x)); 0 and 1 at the far ends.  For 16-bit elements two special-function
// instructions, an error of about |x| ulp of fp32; for fp32 an exact exponential, about 2 ulp.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  float e, s;
  if constexpr (std::is_same_v<T, float>)
    e = expf(-x);
  else
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
  return s;
}

template <typename T>
__device__ __forceinline__ float silu_grad(float x) {
  const float s = sigmoid<T>(x);
  return s * fmaf(x, 1.f - s, 1.f);
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

}  // namespace
}  // namespace zebra
