// What the Hopper kernels of ssd_scan share: arguments, work items, rings, decays, states.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/cuda/vec.cuh"
#include "common/sm90/ptx.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"
#include "ssd_scan/ssd_scan.h"
#include "ssd_scan/ssd_scan_sm90_config.h"

namespace zebra::sm90 {

constexpr int kQ = kSsdChunk;
constexpr int kTile = kSsdTileBytes;

struct SsdArgs {
  CUtensorMap x, B, C, z, y;
  SsdScanParams p;
  SsdScanSm90Config cfg;
  // With more than one segment: what the walk over segments but the last of a sequence leaves.
  float4* states;     // [segments, pieces, head_slots, 2, registers / 4, 128]
  float* decays;      // [segments, pieces, head_slots * heads], of a whole piece
  const int4* table;  // packed: {sequence, first token, tokens, ordinal}, sequence -1: none
};

// A segment of a sequence, or a piece of one in the walk for the states, and the heads of a CTA.
template <bool kStatesOnly>
struct Item {
  int slot, head;     // head slot and its first head
  int segment;        // number over all segments
  int ordinal;        // of the segment in its sequence
  int piece;          // of the segment
  int sequence, row;  // sequence and batch row
  int first, tokens;
  bool last;  // segment of its sequence

  __device__ __forceinline__ Item(const SsdArgs& a, int item) {
    const int per_row = static_cast<int>(a.cfg.segments);
    slot = item % a.cfg.head_slots;
    head = slot * a.cfg.heads;
    segment = item / a.cfg.head_slots;
    if (kStatesOnly) piece = segment % a.cfg.state_cuts, segment /= a.cfg.state_cuts;
    if (a.p.cu_seqlens == nullptr) {
      const int walked = kStatesOnly ? per_row - 1 : per_row;
      sequence = row = segment / walked;
      ordinal = segment % walked;
      segment = row * per_row + ordinal;
      const std::int64_t begin = ordinal * a.cfg.segment;
      const std::int64_t left = a.p.tokens - begin;
      first = static_cast<int>(begin);
      tokens = static_cast<int>(left < a.cfg.segment ? left : a.cfg.segment);
      last = left <= a.cfg.segment;
    } else if (a.table == nullptr) {
      row = ordinal = 0;
      sequence = segment;
      first = a.p.cu_seqlens[segment];
      tokens = a.p.cu_seqlens[segment + 1] - first;
      last = true;
    } else {
      row = 0;
      const int4 entry = a.table[segment];
      sequence = entry.x, first = entry.y, tokens = entry.z, ordinal = entry.w;
      last = sequence < 0 || first + tokens == a.p.cu_seqlens[sequence + 1];
    }
    if (kStatesOnly) {
      const int from = piece * static_cast<int>(a.cfg.state_segment);
      const int left = tokens - from;
      first += from;
      tokens = last || left < 0 ? 0 : min(left, static_cast<int>(a.cfg.state_segment));
    }
  }
  __device__ __forceinline__ int chunks() const { return (tokens + kQ - 1) / kQ; }
  __device__ __forceinline__ int valid(int chunk) const {
    const int left = tokens - chunk * kQ;
    return left < kQ ? left : kQ;
  }
};

// Shared memory before the tiles: byte offsets, the same in both kernels.
template <int kHeads>
struct Smem {
  // mbarriers of 8 bytes
  static constexpr int kFull = 0, kEmpty = kFull + 8 * kSsdMostStages;
  static constexpr int kDecayFull = kEmpty + 8 * kSsdMostStages;
  static constexpr int kDecayEmpty = kDecayFull + 8 * kSsdDecaySlots;
  static constexpr int kZyFull = kDecayEmpty + 8 * kSsdDecaySlots, kYFull = kZyFull + 8 * 3;
  static constexpr int kPmFull = kYFull + 8 * 3, kPmEmpty = kPmFull + 8 * kSsdPmSlots;
  static constexpr int kSquaresFull = kPmEmpty + 8 * kSsdPmSlots, kRstdFull = kSquaresFull + 8;
  static constexpr int kRstd = 512;                   // float [heads][64]: 1 / rms of the tokens
  static constexpr int kDecays = kRstd + 2 * kQ * 4;  // Decays [slots][heads]
  static constexpr int kTiles = ssd_scan_sm90_tiles_offset(kHeads);
  static_assert(kRstdFull + 8 <= kRstd);
  static_assert(kDecays + kSsdDecaySlots * kHeads * 4 * kQ * 4 <= kTiles && kTiles % 1024 == 0);
};

extern __shared__ __align__(1024) char shared_memory[];

__device__ __forceinline__ std::uint32_t shared_at(int offset) {
  return smem_addr(shared_memory) + offset;
}
// Initialises `slots` barriers.
__device__ __forceinline__ void init_barriers(int offset, int slots, int arrivals) {
  for (int i = 0; i < slots; ++i) mbarrier_init(shared_at(offset) + 8 * i, arrivals);
}

// Position in a ring of slots; `phase` flips at every turn.  A consumer waits for `phase`, a
// producer for `phase ^ 1`: the first turn does not wait.
struct Ring {
  int slot = 0;
  std::uint32_t phase = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// Index of this thread's warp and warpgroup, known to the compiler to be the same in a warp.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }
__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

// One lane arrives for its warp, after all lanes are done.
__device__ __forceinline__ void arrive_warp(std::uint32_t bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(bar);
}

// Decays of one head in one chunk, in log2 units: s_i the inclusive sum of A d, restarted.
struct Decays {
  float s[kQ];      // s_i; the scores leave the factor of x_i in y_i here: (C_i . B_i) d_i + D
  float t[kQ];      // s_j - log2 d_j: exp2(s_i - t_j) = exp(s_i - s_j) d_j
  float e[kQ];      // exp2(s_i); e[63] is the decay of the chunk
  uint2 w[kQ / 2];  // exp2(s_63 - t_j), the weight of token j in the state after the chunk, split
};

// Factors of two tokens as sums of two 16-bit numbers: x = the leading ones, y = what is left.
template <typename T>
__device__ __forceinline__ uint2 split_factors(float a, float b) {
  const std::uint32_t leading = pack<T>(a, b);
  const float2 v = unpack<T>(leading);
  return {leading, pack<T>(a - v.x, b - v.y)};
}
// Two 16-bit elements times split factors, rounded once.
template <typename T>
__device__ __forceinline__ std::uint32_t scale_pair(std::uint32_t v, uint2 factors) {
  using T2 = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const auto as = [](std::uint32_t& bits) { return *reinterpret_cast<T2*>(&bits); };
  T2 out = __hfma2(as(v), as(factors.x), __hmul2(as(v), as(factors.y)));
  return *reinterpret_cast<std::uint32_t*>(&out);
}

__device__ __forceinline__ float load_scalar(const void* p, DType dtype, std::int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  if (dtype == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return to_float(static_cast<const __half*>(p)[i]);
}

// A decay below 2^-160 is zero in fp32.  Larger sums would only cost the digits of what follows.
constexpr float kLeastLog2Decay = -160.f;

// One warp computes the decays of the tokens 2 lane and 2 lane + 1 of a chunk.
template <typename T>
__device__ __forceinline__ void compute_decays(Decays* out, float2 dt, float bias, float rate,
                                               bool softplus, int valid) {
  const int lane = threadIdx.x % 32;
  const auto step = [&](float v, int i) {
    v += bias;
    if (softplus) v = v > 20.f ? v : log1pf(__expf(v));
    return i < valid ? v : 0.f;
  };
  const float d0 = step(dt.x, 2 * lane), d1 = step(dt.y, 2 * lane + 1);
  const float a0 = fmaxf(rate * d0, kLeastLog2Decay), a1 = fmaxf(rate * d1, kLeastLog2Decay);
  float sum = a0 + a1;
#pragma unroll
  for (int k = 1; k < 32; k *= 2) {
    const float other = __shfl_up_sync(~0u, sum, k);
    if (lane >= k) sum += other;
  }
  float before = __shfl_up_sync(~0u, sum, 1);
  if (lane == 0) before = 0.f;
  const float s0 = before + a0, s1 = s0 + a1;
  const float end = __shfl_sync(~0u, s1, 31);
  const float t0 = s0 - __log2f(d0), t1 = s1 - __log2f(d1);
  reinterpret_cast<float2*>(out->s)[lane] = {s0, s1};
  reinterpret_cast<float2*>(out->t)[lane] = {t0, t1};
  reinterpret_cast<float2*>(out->e)[lane] = {exp2_approx(s0), exp2_approx(s1)};
  out->w[lane] = split_factors<T>(exp2_approx(end - t0), exp2_approx(end - t1));
}

// Decays of chunk `number`, counted over all items.
template <int kHeads>
__device__ __forceinline__ Decays* decays_of(unsigned number) {
  return reinterpret_cast<Decays*>(shared_memory + Smem<kHeads>::kDecays) +
         number % kSsdDecaySlots * kHeads;
}
template <int kHeads>
__device__ __forceinline__ void wait_decays(unsigned number) {
  mbarrier_wait(shared_at(Smem<kHeads>::kDecayFull) + 8 * (number % kSsdDecaySlots),
                number / kSsdDecaySlots & 1);
}

// The chunks that a CTA walks, one after the other over all its items.
template <bool kStatesOnly>
struct Cursor {
  const SsdArgs& a;
  int index = blockIdx.x;
  Item<kStatesOnly> item;
  int chunk = -1, chunks;

  __device__ __forceinline__ explicit Cursor(const SsdArgs& args)
      : a(args), item(args, blockIdx.x) {
    chunks = item.chunks();
    next();
  }
  __device__ __forceinline__ bool done() const {
    return index >= (kStatesOnly ? a.cfg.state_items : a.cfg.items);
  }
  __device__ __forceinline__ void next() {
    ++chunk;
    while (chunk >= chunks) {
      index += gridDim.x;
      if (done()) return;
      item = Item<kStatesOnly>(a, index);
      chunk = 0, chunks = item.chunks();
    }
  }
};

// Keeps the ring of decays filled: one warp, or kWarps of them, each for every kWarps-th chunk.  It
// asks for dt two of its chunks before it computes, because a row of dt is a cache miss of its own.
template <typename T, int kHeads, bool kStatesOnly, int kWarps = 1>
__device__ __forceinline__ void decay_walk(const SsdArgs& a, int warp = 0) {
  const SsdScanParams& p = a.p;
  const int lane = threadIdx.x % 32;
  constexpr float kLog2e = 1.4426950408889634f;
  const bool wide = p.dt_dtype == DType::kFloat32;

  // A chunk asked for: the bits of dt (converting them would wait for them), its item (-1: none)
  // and its tokens.
  struct Ask {
    std::uint32_t bits[kHeads][2];
    int item, valid;
  };
  const auto value = [&](std::uint32_t bits) {
    if (wide) return __uint_as_float(bits);
    return p.dt_dtype == DType::kBFloat16 ? unpack<__nv_bfloat16>(bits).x : unpack<__half>(bits).x;
  };
  Cursor<kStatesOnly> at(a);
  const auto skip = [&](int chunks) {
    for (int i = 0; i < chunks && !at.done(); ++i) at.next();
  };
  const auto ask = [&](Ask& chunk) {
    chunk.item = -1;
    if (at.done()) return;
    chunk.item = at.index;
    chunk.valid = at.item.valid(at.chunk);
    const int token = at.chunk * kQ + 2 * lane;
    const std::int64_t offset = at.item.row * p.dt_stride.batch +
                                (at.item.first + token) * p.dt_stride.token + at.item.head;
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        chunk.bits[k][i] = 0;
        if (token + i >= at.item.tokens || at.item.head + k >= p.heads) continue;
        const std::int64_t e = offset + i * p.dt_stride.token + k;
        if (wide)
          chunk.bits[k][i] = static_cast<const std::uint32_t*>(p.dt)[e];
        else
          chunk.bits[k][i] = static_cast<const std::uint16_t*>(p.dt)[e];
      }
    skip(kWarps);
  };

  unsigned number = warp;
  float rate[kHeads], bias[kHeads];
  int known = -1;  // item whose rates are loaded
  const auto step = [&](Ask& chunk) {
    if (known != chunk.item) {
      known = chunk.item;
      const int first = known % a.cfg.head_slots * a.cfg.heads;
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        const int head = first + k < p.heads ? first + k : 0;
        rate[k] = static_cast<const float*>(p.A)[head] * kLog2e;
        bias[k] = p.dt_bias == nullptr ? 0.f : load_scalar(p.dt_bias, p.dt_bias_dtype, head);
      }
    }
    const int slot = 8 * (number % kSsdDecaySlots);
    mbarrier_wait(shared_at(Smem<kHeads>::kDecayEmpty) + slot, number / kSsdDecaySlots & 1 ^ 1);
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      compute_decays<T>(decays_of<kHeads>(number) + k,
                        {value(chunk.bits[k][0]), value(chunk.bits[k][1])}, bias[k], rate[k],
                        p.dt_softplus, chunk.valid);
    arrive_warp(shared_at(Smem<kHeads>::kDecayFull) + slot);
    number += kWarps;
    ask(chunk);
  };
  Ask even, odd;
  skip(warp);
  ask(even), ask(odd);
  while (even.item >= 0) {
    step(even);
    if (odd.item < 0) break;
    step(odd);
  }
}

// Byte offset of this lane's row for ldmatrix and stmatrix (.trans) of 16 tokens x this warp's 16
// columns of a tile; 16 tokens on: + 2048.
__device__ __forceinline__ std::uint32_t matrix_offset() {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int token = lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
  return token * 128 + ((unit ^ (lane % 8)) << 4);
}

// Tokens j < valid of 16 tokens from `from` on: the others become zero, whatever they hold.
__device__ __forceinline__ void clear_tail(std::uint32_t (&x)[4], int from, int valid) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int token = from + m / 2 * 8 + threadIdx.x % 4 * 2;
    x[m] &= (token < valid ? 0xffffu : 0u) | (token + 1 < valid ? 0xffff0000u : 0u);
  }
}

// x times the weights of its tokens, 16 tokens from `weights` on.
template <typename T>
__device__ __forceinline__ void scale_tokens(std::uint32_t (&out)[4], const std::uint32_t (&x)[4],
                                             const uint2* weights) {
#pragma unroll
  for (int m = 0; m < 4; ++m) out[m] = scale_pair<T>(x[m], weights[m / 2 * 4 + threadIdx.x % 4]);
}

// ---- states.  64 rows of h^T [P, N] in the accumulators of a warpgroup:
// h[4 j + 2 i + k] = h^T[16 warp + 8 i + lane / 4][8 j + 2 (lane % 4) + k].

// fp32 [64, N] in global memory, N = 2 kRegs; `src` need not be aligned to more than 4 bytes.
template <int kRegs>
__device__ __forceinline__ void load_state(float (&h)[kRegs], const float* src) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  src += (16 * warp + lane / 4) * (2 * kRegs) + 2 * (lane % 4);
#pragma unroll
  for (int k = 0; k < kRegs; ++k) h[k] = src[k / 2 % 2 * 16 * kRegs + k / 4 * 8 + k % 2];
}
// Neighbouring lanes change halves of two blocks of 8 columns, so that each writes 16 bytes.
template <int kRegs>
__device__ __forceinline__ void store_state(const float (&h)[kRegs], float* dst) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool odd = lane % 2;
  dst += (16 * warp + lane / 4) * (2 * kRegs) + 8 * odd + lane % 4 / 2 * 4;
#pragma unroll
  for (int j = 0; j < kRegs / 4; j += 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int a = 4 * j + 2 * i, b = a + 4;  // the two blocks
      const float x = __shfl_xor_sync(~0u, odd ? h[a] : h[b], 1);
      const float y = __shfl_xor_sync(~0u, odd ? h[a + 1] : h[b + 1], 1);
      const float4 v = odd ? make_float4(x, y, h[b], h[b + 1]) : make_float4(h[a], h[a + 1], x, y);
      *reinterpret_cast<float4*>(dst + 16 * kRegs * i + 8 * j) = v;
    }
}

// The state of piece `piece`, counted over all segments, in the order of the registers.
template <int kRegs>
__device__ __forceinline__ float4* piece_state(const SsdArgs& a, std::int64_t piece, int slot,
                                               int unit) {
  const std::int64_t at = (piece * a.cfg.head_slots + slot) * 2 + unit;
  return a.states + at * (kRegs / 4 * 128) + threadIdx.x % 128;
}

}  // namespace zebra::sm90
