// What the Hopper kernels of ssd_scan share: arguments, work items, rings, decays, states.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/cuda/vec.cuh"
#include "common/sm90/ptx.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"
#include "ssd_scan/ssd_scan_sm90_pieces.cuh"

namespace zebra::sm90 {

constexpr int kTile = kSsdTileBytes;

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
  static constexpr int kStateChunks = kHeldPieces;    // walk for the states: StateChunk [stages]
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

// Decays of one head in one chunk, in log2 units: s_i the inclusive sum of A d, restarted.
struct Decays {
  float s[kQ];      // s_i; the scores leave the factor of x_i in y_i here: (C_i . B_i) d_i + D
  float t[kQ];      // s_j - log2 d_j: exp2(s_i - t_j) = exp(s_i - s_j) d_j
  float e[kQ];      // d_i; the scores leave exp2(s_i) here, so that e[63] is the chunk's decay
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

// The state that the walk for the states leaves for a warpgroup, in the order of its registers.
template <int kRegs>
__device__ __forceinline__ float4* slot_state(const SsdArgs& a, std::int64_t slot, int unit) {
  return a.states + (slot * 2 + unit) * (kRegs / 4 * 128) + threadIdx.x % 128;
}

}  // namespace zebra::sm90
