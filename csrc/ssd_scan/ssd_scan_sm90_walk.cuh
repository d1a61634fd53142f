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
  // Where sequences are cut: what the walk for the states leaves, part after part of a unit.
  float4* states;     // [units, parts, width, 2, registers / 4, 128]
  float* decays;      // [units, parts, width, heads], of a whole part
  const int4* table;  // packed: where units begin, [units + 1] Places
};

// Where a unit begins: a bundle, a sequence, a grain of it, and a grain of the whole line.
struct Place {
  int bundle, sequence, grain, at;
};

__device__ __forceinline__ Place place_of(const SsdArgs& a, int unit) {
  if (a.table != nullptr) {
    const int4 t = a.table[unit];
    return {t.x, t.y, t.z, t.w};
  }
  const SsdScanSm90Config& cfg = a.cfg;
  const int grains = static_cast<int>(cfg.grains), sequences = static_cast<int>(a.p.sequences);
  int at = ssd_scan_cut(static_cast<int>(cfg.share), static_cast<int>(cfg.more), unit);
  int line = at / grains;
  const int moved = at + static_cast<int>(ssd_scan_snap(at - line * grains, grains, cfg.snap));
  if (moved != at) at = moved, line = at / grains;
  return {line / sequences, line % sequences, at - line * grains, at};
}

// What a CTA walks, piece after piece: the chunks of a unit that belong to one sequence.  In the
// walk for the states alone: a part of what the unit does not finish.
template <bool kStatesOnly>
struct Pieces {
  const SsdArgs& a;
  int item = static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x);
  int unit, member;   // the unit and the slot in its bundle
  int part;           // in the walk for the states: number over all units
  int head;           // first of the CTA
  int sequence, row;  // sequence and batch row
  int first, tokens;
  int grain;  // of the sequence that the piece begins with
  bool last;  // piece of its sequence
  // Of the next piece.  In the walk for the states: the first unit to look at (at) and the
  // unfinished ones before it (grain).
  Place at = {};
  int left = 0;  // grains of the unit from there

  __device__ __forceinline__ explicit Pieces(const SsdArgs& args) : a(args) {}

  // The next piece, false where there is none.
  __device__ __forceinline__ bool next() {
    const int items = static_cast<int>(kStatesOnly ? a.cfg.state_items : a.cfg.items);
    while (left == 0) {
      item += static_cast<int>(gridDim.x);
      if (item >= items) return false;
      kStatesOnly ? enter_states() : enter();
    }
    if (kStatesOnly)
      left = 0;
    else
      take();
    return true;
  }
  __device__ __forceinline__ int chunks() const { return (tokens + kQ - 1) / kQ; }
  __device__ __forceinline__ int valid(int chunk) const {
    const int left = tokens - chunk * kQ;
    return left < kQ ? left : kQ;
  }

  // Keeps in shared memory what the next piece and the end of this one need, kHeld values a warp:
  // the walks of the states have no registers to spare.
  static constexpr int kHeld = 8;
  __device__ __forceinline__ void hold(int* place) const {
    const int values[kHeld] = {item, left, at.bundle, at.sequence, at.grain, head, sequence, last};
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < kHeld; ++i) place[i] = values[i];
    __syncwarp();
  }
  __device__ __forceinline__ void restore(const int* place) {
    item = place[0], left = place[1];
    at.bundle = place[2], at.sequence = place[3], at.grain = place[4];
    head = place[5], sequence = place[6], last = place[7];
    __syncwarp();  // before the next piece takes the place
  }

  // Of the grains of a unit that ends at `end`, those it leaves of an unfinished sequence.
  static __device__ __forceinline__ int unfinished(const Place& begin, const Place& end) {
    return min(end.grain, end.at - begin.at);
  }
  // Chunks of each part of `grains` grains.
  static __device__ __forceinline__ int part_chunks(const SsdArgs& a, int grains) {
    const int shift = a.cfg.state_cuts_shift;
    return ((grains << a.cfg.grain_shift) + (1 << shift) - 1) >> shift;
  }

 private:
  __device__ __forceinline__ void enter() {
    unit = item / a.cfg.width, member = item % a.cfg.width;
    at = place_of(a, unit);
    left = place_of(a, unit + 1).at - at.at;
  }
  __device__ __forceinline__ void take() {
    int begin = 0, length = static_cast<int>(a.p.tokens);
    sequence = row = at.sequence;
    if (a.p.cu_seqlens != nullptr) {
      row = 0;
      begin = a.p.cu_seqlens[sequence];
      length = a.p.cu_seqlens[sequence + 1] - begin;
    }
    const int shift = a.cfg.grain_shift;
    const int grains = ssd_scan_grains(length, shift);
    const int size = min(grains - at.grain, left);
    const int from = (at.grain << shift) * kQ;
    grain = at.grain;
    last = grain + size == grains;
    first = begin + from;
    tokens = last ? length - from : (size << shift) * kQ;
    head = (at.bundle * a.cfg.width + member) * a.cfg.heads;
    left -= size;
    at.grain += size;
    if (last) {
      at.grain = 0;
      if (++at.sequence == static_cast<int>(a.p.sequences)) at.sequence = 0, ++at.bundle;
    }
  }
  // Units that leave nothing unfinished have no parts: every item finds its unit among the others,
  // 32 units at a time, going on from where the item before was.
  __device__ __forceinline__ void enter_states() {
    const int width = a.cfg.width, cuts = a.cfg.state_cuts_shift;
    const int units = static_cast<int>(a.cfg.units), lane = threadIdx.x % 32;
    const int number = item / width, cut = number & ((1 << cuts) - 1);
    member = item - number * width;
    int walked;
    for (;; at.at += 32) {
      const int u = at.at + lane;
      walked = u < units ? unfinished(place_of(a, u), place_of(a, u + 1)) : 0;
      unsigned mask = __ballot_sync(~0u, walked > 0);
      int skip = (number >> cuts) - at.grain;  // of these 32 units
      if (skip < __popc(mask)) {
        for (; skip > 0; --skip) mask &= mask - 1;
        const int pick = __ffs(mask) - 1;
        unit = at.at + pick;
        walked = __shfl_sync(~0u, walked, pick);
        break;
      }
      at.grain += __popc(mask);
      if (at.at + 32 >= units) {
        item = static_cast<int>(a.cfg.state_items);
        return;
      }
    }
    part = ((unit << cuts) + cut) * width + member;
    const Place end = place_of(a, unit + 1);
    const int per = part_chunks(a, walked);
    const int count = min(per, (walked << a.cfg.grain_shift) - cut * per);
    left = count > 0;
    sequence = row = end.sequence;
    first = (((end.grain - walked) << a.cfg.grain_shift) + cut * per) * kQ;
    if (a.p.cu_seqlens != nullptr && count > 0) row = 0, first += a.p.cu_seqlens[sequence];
    tokens = count * kQ;
    head = (end.bundle * width + member) * a.cfg.heads;
    last = false;
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
  static constexpr int kHeldPieces = 256;             // Pieces of the 8 warps of states
  static constexpr int kRstd = 512;                   // float [heads][64]: 1 / rms of the tokens
  static constexpr int kDecays = kRstd + 2 * kQ * 4;  // Decays [slots][heads]
  static constexpr int kTiles = ssd_scan_sm90_tiles_offset(kHeads);
  static_assert(kRstdFull + 8 <= kHeldPieces);
  static_assert(kHeldPieces + 8 * Pieces<false>::kHeld * 4 <= kRstd);
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

// Holds a value in its register: what a shuffle brings cannot be computed again.  For what loops
// use all the time and the compiler would rather ask threadIdx for again and again, 50 clk each.
template <typename V>
__device__ __forceinline__ V keep(V v) {
  return __shfl_xor_sync(~0u, v, 0);
}

// One lane arrives for its warp, after all lanes are done.
__device__ __forceinline__ void arrive_warp(std::uint32_t bar, int lane = threadIdx.x % 32) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(bar);
}

// Decays of one head in one chunk, in log2 units: s_i the inclusive sum of A d, restarted.
struct Decays {
  float s[kQ];      // s_i; the scores leave the factor of x_i in y_i here: (C_i . B_i) d_i + D
  float t[kQ];      // s_j - log2 d_j: exp2(s_i - t_j) = exp(s_i - s_j) d_j
  float e[kQ];      // exp2(s_i); e[63] is the decay of the chunk
  uint2 w[kQ / 2];  // exp2(s_63 - t_j), the weight of token j in the state after the chunk, split
};

// The same for the two chunks of a step of the walk for the states.
struct alignas(16) PairDecays {
  uint2 w[kQ];  // of all 128 tokens in the state after them
  float decay, log2_decay;
};
template <bool kStatesOnly>
using DecaysOf = std::conditional_t<kStatesOnly, PairDecays, Decays>;
static_assert(sizeof(PairDecays) <= sizeof(Decays), "they share the ring's size");

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

// Decays of chunk (or pair of chunks) `number`, counted over all pieces; `base` is the address of
// shared memory.
template <int kHeads, typename D = Decays>
__device__ __forceinline__ D* decays_of(std::uint32_t base, unsigned number) {
  const std::uint32_t slots = base + Smem<kHeads>::kDecays;
  return static_cast<D*>(__cvta_shared_to_generic(slots)) + number % kSsdDecaySlots * kHeads;
}
template <int kHeads>
__device__ __forceinline__ void wait_decays(std::uint32_t base, unsigned number) {
  mbarrier_wait(base + Smem<kHeads>::kDecayFull + 8 * (number % kSsdDecaySlots),
                number / kSsdDecaySlots & 1);
}

// The chunks that a CTA walks, kStep at a time, over all its pieces.
template <bool kStatesOnly, int kStep = 1>
struct Cursor {
  Pieces<kStatesOnly> piece;
  int chunk = -kStep, chunks = 0;
  bool done = false;

  __device__ __forceinline__ explicit Cursor(const SsdArgs& args) : piece(args) {}
  // The first chunk, then the next.
  __device__ __forceinline__ void next() {
    chunk += kStep;
    while (chunk >= chunks) {
      done = !piece.next();
      if (done) return;
      chunk = 0, chunks = piece.chunks();
    }
  }
};

// Byte offset of this lane's row for ldmatrix and stmatrix (.trans) of 16 tokens x this warp's 16
// columns of a tile; 16 tokens on: + 2048.
__device__ __forceinline__ std::uint32_t matrix_offset() {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int token = lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
  return token * 128 + ((unit ^ (lane % 8)) << 4);
}

// x times the weights of its tokens, 16 tokens from `weights` on.
template <typename T>
__device__ __forceinline__ void scale_tokens(std::uint32_t (&out)[4], const std::uint32_t (&x)[4],
                                             const uint2* weights, int lane) {
#pragma unroll
  for (int m = 0; m < 4; ++m) out[m] = scale_pair<T>(x[m], weights[m / 2 * 4 + lane % 4]);
}

// ---- states.  64 rows of h^T [P, N] in the accumulators of a warpgroup:
// h[4 j + 2 i + k] = h^T[16 warp + 8 i + lane / 4][8 j + 2 (lane % 4) + k].

// fp32 [64, N] in global memory, N = 2 kRegs; `src` need not be aligned to more than 4 bytes.
template <int kRegs>
__device__ __forceinline__ void load_state(float (&h)[kRegs], const float* src) {
  const int lane = keep(threadIdx.x % 32), warp = threadIdx.x / 32 % 4;
  src += (16 * warp + lane / 4) * (2 * kRegs) + 2 * (lane % 4);
#pragma unroll
  for (int k = 0; k < kRegs; ++k) h[k] = src[k / 2 % 2 * 16 * kRegs + k / 4 * 8 + k % 2];
}
// Neighbouring lanes change halves of two blocks of 8 columns, so that each writes 16 bytes.
template <int kRegs>
__device__ __forceinline__ void store_state(const float (&h)[kRegs], float* dst) {
  const int lane = keep(threadIdx.x % 32), warp = threadIdx.x / 32 % 4;
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

// The state that a part leaves for a warpgroup, in the order of its registers.
template <int kRegs>
__device__ __forceinline__ float4* part_state(const SsdArgs& a, std::int64_t part, int unit) {
  return a.states + (part * 2 + unit) * (kRegs / 4 * 128) + threadIdx.x % 128;
}

}  // namespace zebra::sm90
