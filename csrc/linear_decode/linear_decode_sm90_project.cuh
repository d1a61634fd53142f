// What a projection adds to linear_decode on Hopper: rows of x looked up while the ring fills, and
// pairs of outputs that are turned and stored, in a paged cache too.
//
// Two weights share a launch: a unit is one weight's, and the loader takes its rows from that one's
// map.  Sums lie in shared memory by token, outputs side by side, so a lane has a pair.
#pragma once

#include <cstdint>

#include "common/cuda/vec.cuh"
#include "common/sm90/ptx.cuh"
#include "linear_decode/linear_decode_sm90_load.cuh"

namespace zebra::sm90 {

struct LinearToken {
  std::int64_t position;  // -1: outside of the tables
  std::int64_t row;       // elements from the cache to where the row is stored; -1: nowhere
};
static_assert(sizeof(LinearToken) == kLinearTokenBytes);

__device__ __forceinline__ LinearToken* linear_tokens(const LinearArgs& a) {
  return reinterpret_cast<LinearToken*>(linear_shared + a.cfg.tokens_offset);
}

// By the three warps beside the one that loads: nothing waits for it but the end of a unit.  The
// angles go to L2, where the end of a unit finds them.
__device__ __forceinline__ void linear_look_up_tokens(const LinearArgs& a) {
  const LinearProjection& q = a.also;
  const int half = static_cast<int>(q.rope.E / 2);
  grid_dependency_wait();
  for (int t = static_cast<int>(threadIdx.x) - 32; t < a.p.rows; t += kLinearLookingUp) {
    const std::int64_t position =
        q.rope.int64_positions
            ? static_cast<const std::int64_t*>(q.rope.positions)[t]
            : static_cast<std::int64_t>(static_cast<const std::int32_t*>(q.rope.positions)[t]);
    const std::int64_t slot = q.cache != nullptr ? q.slot_mapping[t] : -1;
    LinearToken token = {-1, -1};
    if (position >= 0 && position < q.rope.max_positions) {
      token.position = position;
      for (int i = 0; i < half; i += 32) {
        prefetch_l2(q.rope.cos + position * half + i);
        prefetch_l2(q.rope.sin + position * half + i);
      }
    }
    if (slot >= 0 && slot < q.pages * q.page)
      token.row = slot / q.page * q.page_stride + slot % q.page * q.row_stride;
    linear_tokens(a)[t] = token;
  }
  mbarrier_arrive(linear_shared_at(LinearSmem::kLookedUp));
}

template <typename T>
struct LinearPair;
template <>
struct LinearPair<__half> {
  using type = __half2;
  static __device__ __forceinline__ type round(float2 v) { return __float22half2_rn(v); }
};
template <>
struct LinearPair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ type round(float2 v) { return __float22bfloat162_rn(v); }
};

// The pairs of a lane, 64 outputs apart, of a unit.
template <typename T, int kRowTiles>
struct LinearTurn {
  using Pair = typename LinearPair<T>::type;

  const LinearArgs& a;
  const bool second;         // the second weight's unit
  const std::int64_t first;  // its first output
  const int outputs, lane = threadIdx.x % 32;
  int angle[kRowTiles];  // which of a position's; -1: the pair is not turned

  __device__ __forceinline__ LinearTurn(const LinearArgs& args, bool is_second,
                                        std::int64_t first_output, int count)
      : a(args), second(is_second), first(first_output), outputs(count) {
    const LinearProjection& q = a.also;
    const auto E = static_cast<unsigned>(q.rope.E);
    const auto head = static_cast<unsigned>(second ? q.outputs : q.head);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      angle[i] = -1;
      if (head == 0 || 64 * i + 2 * lane >= outputs) continue;
      const unsigned at = (static_cast<unsigned>(first) + 64 * i + 2 * lane) % head;
      if (at >= head - E) angle[i] = static_cast<int>(at - (head - E)) / 2;
    }
  }

  // The cosine and the sine of every pair.
  __device__ __forceinline__ void look_up(std::uint32_t (&turn)[2 * kRowTiles], int token) const {
    const RopeTable& rope = a.also.rope;
    const std::int64_t position = linear_tokens(a)[token].position;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if (angle[i] < 0) continue;
      const std::int64_t at = position * (rope.E / 2) + angle[i];
      turn[2 * i] = position < 0 ? 0x7fc00000u : __float_as_uint(rope.cos[at]);
      turn[2 * i + 1] = position < 0 ? 0u : __float_as_uint(rope.sin[at]);
    }
  }

  // Of `tokens` tokens, kStep apart.  `sum(i, n)`: the products n and n + 1 of the i-th.
  template <int kStep, int kOwnTokens, typename Sum>
  __device__ __forceinline__ void write(const std::uint32_t (&turn)[kOwnTokens][2 * kRowTiles],
                                        int token, int tokens, const Sum& sum) const {
    const LinearProjection& q = a.also;
    const std::int64_t wide = second ? q.outputs : a.p.outputs;
    T* const y = static_cast<T*>(second ? q.y : a.p.y) + token * wide + first;
    const std::uint64_t policy = kept_policy();
#pragma unroll
    for (int p = 0; p < kRowTiles; ++p) {
      const int n = 64 * p + 2 * lane;
      if (n >= outputs) continue;
      float2 v[kOwnTokens];
#pragma unroll
      for (int i = 0; i < kOwnTokens; ++i) v[i] = sum(i, n);
      if (angle[p] >= 0) {
#pragma unroll
        for (int i = 0; i < kOwnTokens; ++i) {
          const float cos = __uint_as_float(turn[i][2 * p]),
                      sin = __uint_as_float(turn[i][2 * p + 1]);
          v[i] = make_float2(v[i].x * cos - v[i].y * sin, v[i].x * sin + v[i].y * cos);
        }
      }
#pragma unroll
      for (int i = 0; i < kOwnTokens; ++i) {
        if (i * kStep >= tokens) continue;
        const Pair rounded = LinearPair<T>::round(v[i]);
        store_kept(reinterpret_cast<Pair*>(y + i * kStep * wide + n), rounded, policy);
        const std::int64_t row = second ? linear_tokens(a)[token + i * kStep].row : -1;
        if (row >= 0)
          *reinterpret_cast<Pair*>(static_cast<T*>(q.cache) + row + first + n) = rounded;
      }
    }
  }
};

}  // namespace zebra::sm90
