// Decays of every chunk, in log2 units, for all who weigh tokens by them.
#pragma once

#include "ssd_scan/ssd_scan_sm90_walk.cuh"

namespace zebra::sm90 {

// A decay below 2^-160 is zero in fp32.  Larger sums would only cost the digits of what follows.
constexpr float kLeastLog2Decay = -160.f;

// log(1 + exp(v)) without branches, to 2^-19 of its value: v plus what exp(-|v|) adds, by
// log1p(t) = 2 atanh(t / (2 + t)) with t <= 1.
__device__ __forceinline__ float softplus(float v) {
  const float t = exp2_approx(fabsf(v) * -1.4426950408889634f);
  const float s = __fdividef(t, 2.f + t), q = s * s;
  float sum = 2.f / 13;  // of 2 q^k / (2 k + 1): what is left out is below 1e-8
  sum = fmaf(sum, q, 2.f / 11);
  sum = fmaf(sum, q, 2.f / 9);
  sum = fmaf(sum, q, 2.f / 7);
  sum = fmaf(sum, q, 2.f / 5);
  sum = fmaf(sum, q, 2.f / 3);
  sum = fmaf(sum, q, 2.f);
  return fmaf(sum, s, fmaxf(v, 0.f));
}

// Factors of two tokens as sums of two 16-bit numbers: x = the leading ones, y = what is left.
template <typename T>
__device__ __forceinline__ uint2 split_factors(float a, float b) {
  const std::uint32_t leading = pack<T>(a, b);
  const float2 v = unpack<T>(leading);
  return {leading, pack<T>(a - v.x, b - v.y)};
}

// Adds to every lane's sums those of the lanes before it, for all heads side by side: every line
// waits for the one before.
template <int kHeads>
__device__ __forceinline__ void sum_lanes(float (&sum)[kHeads]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 1; n < 32; n *= 2)
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const float other = __shfl_up_sync(~0u, sum[k], n);
      if (lane >= n) sum[k] += other;
    }
}

// One warp computes the decays of the tokens 2 lane and 2 lane + 1 of a chunk from their steps, for
// all heads of the CTA side by side.
template <typename T, int kHeads>
__device__ __forceinline__ void compute_decays(Decays* out, const float (&step)[kHeads][2],
                                               const float (&rate)[kHeads]) {
  const int lane = threadIdx.x % 32;
  float a0[kHeads], a1[kHeads], sum[kHeads];
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    a0[k] = fmaxf(rate[k] * step[k][0], kLeastLog2Decay);
    a1[k] = fmaxf(rate[k] * step[k][1], kLeastLog2Decay);
    sum[k] = a0[k] + a1[k];
  }
  sum_lanes(sum);
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    const float before = __shfl_up_sync(~0u, sum[k], 1);
    const float s0 = (lane == 0 ? 0.f : before) + a0[k], s1 = s0 + a1[k];
    const float end = __shfl_sync(~0u, s1, 31);
    const float t0 = s0 - __log2f(step[k][0]), t1 = s1 - __log2f(step[k][1]);
    reinterpret_cast<float2*>(out[k].s)[lane] = {s0, s1};
    reinterpret_cast<float2*>(out[k].t)[lane] = {t0, t1};
    reinterpret_cast<float2*>(out[k].e)[lane] = {step[k][0], step[k][1]};
    out[k].w[lane] = split_factors<T>(exp2_approx(end - t0), exp2_approx(end - t1));
  }
}

// The same for the walk for the states, which takes two chunks at a time: tokens 4 lane to 4 lane
// + 3.
template <typename T, int kHeads>
__device__ __forceinline__ void compute_decays(PairDecays* out, const float (&step)[kHeads][4],
                                               const float (&rate)[kHeads]) {
  const int lane = threadIdx.x % 32;
  float s[kHeads][4], sum[kHeads];  // sums from this lane's first token on, then from all lanes'
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      s[k][i] = fmaxf(rate[k] * step[k][i], kLeastLog2Decay) + (i > 0 ? s[k][i - 1] : 0.f);
    sum[k] = s[k][3];
  }
  sum_lanes(sum);
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    const float before = __shfl_up_sync(~0u, sum[k], 1), end = __shfl_sync(~0u, sum[k], 31);
    const float rest = end - (lane == 0 ? 0.f : before);
    float w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = exp2_approx(rest - s[k][i] + __log2f(step[k][i]));
    const uint2 first = split_factors<T>(w[0], w[1]), second = split_factors<T>(w[2], w[3]);
    reinterpret_cast<uint4*>(out[k].w)[lane] = make_uint4(first.x, first.y, second.x, second.y);
    if (lane == 31) out[k].log2_decay = end, out[k].decay = exp2_approx(end);
  }
}

// Keeps the ring of decays filled: warp `warp` of `warps`, each for every `warps`-th slot.  It asks
// for dt kAhead of its slots before it computes, because a row of dt is a cache miss of its own.
template <typename T, int kHeads, bool kStatesOnly>
__device__ __forceinline__ void decay_walk(const SsdArgs& a, int warp, int warps) {
  constexpr int kAhead = 3, kTokens = kStatesOnly ? 4 : 2;  // of a lane
  constexpr float kLog2e = 1.4426950408889634f;
  const SsdScanParams& p = a.p;
  const int lane = threadIdx.x % 32;
  const bool wide = p.dt_dtype == DType::kFloat32;

  // What was asked for: the bits of dt (converting them would wait for them), the first head and
  // the tokens.
  constexpr int kNone = -1, kNotYet = -2;  // instead of a head: after the last, before the first
  struct Ask {
    std::uint32_t bits[kHeads][kTokens];
    int head = kNone, valid;
  };
  Cursor<kStatesOnly, kTokens / 2> at(a);
  int skip = warp + 1;  // slots until the next one of this warp
  const auto ask = [&] {
    Ask chunk;
#pragma unroll 1
    for (; skip > 0 && !at.done; --skip) at.next();
    if (at.done) return chunk;
    skip = warps;
    const Pieces<kStatesOnly>& piece = at.piece;
    chunk.head = piece.head;
    chunk.valid = piece.tokens - at.chunk * kQ;
    const int token = at.chunk * kQ + kTokens * lane;
    const std::int64_t offset =
        piece.row * p.dt_stride.batch + (piece.first + token) * p.dt_stride.token + piece.head;
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        chunk.bits[k][i] = 0;
        if (token + i >= piece.tokens || piece.head + k >= p.heads) continue;
        const std::int64_t e = offset + i * p.dt_stride.token + k;
        if (wide)
          chunk.bits[k][i] = static_cast<const std::uint32_t*>(p.dt)[e];
        else
          chunk.bits[k][i] = static_cast<const std::uint16_t*>(p.dt)[e];
      }
    return chunk;
  };
  Ask queue[kAhead];
#pragma unroll
  for (Ask& chunk : queue) chunk.head = kNotYet;

  unsigned number = warp;
  float rate[kHeads], bias[kHeads];
  int known = -1;  // head whose rates are loaded
  while (queue[0].head != kNone) {
    const Ask now = queue[0];
#pragma unroll
    for (int i = 1; i < kAhead; ++i) queue[i - 1] = queue[i];
    queue[kAhead - 1] = ask();
    if (now.head == kNotYet) continue;
    if (known != now.head) {
      known = now.head;
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        const int head = known + k < p.heads ? known + k : 0;
        rate[k] = static_cast<const float*>(p.A)[head] * kLog2e;
        bias[k] = p.dt_bias == nullptr ? 0.f : load_scalar(p.dt_bias, p.dt_bias_dtype, head);
      }
    }
    float step[kHeads][kTokens];
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const std::uint32_t bits = now.bits[k][i];
        const float dt = wide                             ? __uint_as_float(bits)
                         : p.dt_dtype == DType::kBFloat16 ? unpack<__nv_bfloat16>(bits).x
                                                          : unpack<__half>(bits).x;
        const float d = dt + bias[k];
        step[k][i] = kTokens * lane + i < now.valid ? p.dt_softplus ? softplus(d) : d : 0.f;
      }
    const int slot = 8 * (number % kSsdDecaySlots);
    mbarrier_wait(shared_at(Smem<kHeads>::kDecayEmpty) + slot, number / kSsdDecaySlots & 1 ^ 1);
    compute_decays<T, kHeads>(decays_of<kHeads, DecaysOf<kStatesOnly>>(shared_at(0), number), step,
                              rate);
    mbarrier_arrive_warp(shared_at(Smem<kHeads>::kDecayFull) + slot);
    number += warps;
  }
}

}  // namespace zebra::sm90
