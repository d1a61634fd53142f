// The portable kernel's sequences and decays.
#pragma once

#include "common/cuda/mma.cuh"
#include "common/cuda/vec.cuh"
#include "ssd_scan/ssd_scan.h"
#include "ssd_scan/ssd_scan_config.h"

namespace zebra {
namespace {

constexpr int kChunk = kSsdScanChunk;
constexpr unsigned kWarp = 0xffffffffu;
static_assert(kChunk == 32, "a lane a token; the loops over tiles below are written out for 32");

struct Decays {
  float s_high[kChunk], s_low[kChunk];  // s in two parts: differences keep their digits after a
                                        // huge step
  float d[kChunk];
  float from_start[kChunk];  // exp2(s_i)
  float to_end[kChunk];      // d_j exp2(s_last - s_j)
};

// Constants of a CTA that would otherwise take registers of the state in every thread.
struct Constants {
  const char *x, *B, *C, *z, *dt;  // the first token of the sequence
  char* y;
  std::int64_t state;  // elements before the head's state
  double rate;         // A log2(e)
  float dt_bias, D;
  int len;  // tokens of the sequence
};

struct Sequence {
  std::int64_t batch, first;
  int len;
};

// Boundaries are clamped: wrong values give wrong rows, never a wrong access.
__device__ __forceinline__ Sequence sequence(const SsdScanParams& p, std::int64_t index) {
  if (p.cu_seqlens == nullptr) return {index, 0, static_cast<int>(p.tokens)};
  const int tokens = static_cast<int>(p.tokens);
  const int first = min(max(p.cu_seqlens[index], 0), tokens);
  const int end = min(max(p.cu_seqlens[index + 1], first), tokens);
  return {0, first, end - first};
}

template <typename T>
__device__ __forceinline__ float element(const void* src, DType dtype, std::int64_t i) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(src)[i]
                                  : to_float(static_cast<const T*>(src)[i]);
}

// dt of a token, 0 beyond the end; `first` is dt of the sequence's first token.
template <typename T>
__device__ __forceinline__ float load_step(const SsdScanParams& p, const char* first, int token,
                                           int len) {
  if (token >= len) return 0.f;
  const std::int64_t offset = token * p.dt_stride.token;
  return p.dt_dtype == DType::kFloat32 ? reinterpret_cast<const float*>(first)[offset]
                                       : to_float(reinterpret_cast<const T*>(first)[offset]);
}

// The decays of a chunk, by one warp; `step` is load_step() of this lane's token.
__device__ __forceinline__ void store_decays(Decays& out, const Constants& constants, float step,
                                             bool softplus, bool is_valid) {
  const unsigned lane = threadIdx.x % 32;
  float d = step + constants.dt_bias;
  if (softplus && d <= 20.f) d = log1pf(expf(d));
  if (!is_valid) d = 0.f;
  double s = is_valid ? constants.rate * d : 0.0;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double before = __shfl_up_sync(kWarp, s, offset);
    if (lane >= offset) s += before;
  }
  const double last = __shfl_sync(kWarp, s, 31);
  const float high = static_cast<float>(s);
  out.s_high[lane] = high;
  out.s_low[lane] = static_cast<float>(s - high);
  out.d[lane] = d;
  out.from_start[lane] = exp2_approx(high);
  out.to_end[lane] = d * exp2_approx(static_cast<float>(last - s));
}

}  // namespace
}  // namespace zebra
