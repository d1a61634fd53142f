// mla_decode on CUDA: how the cached tokens of a batch are dealt to CTAs, from lengths that only
// the device knows.
//
// A line of work units: for every item (sequence b, pass) with tokens, `item_cost` units that stand
// for its start and end, then its stages of tokens (its pieces of `split` tokens where
// split > 0).  CTA i of n takes units [total i / n, total (i + 1) / n) and walks the pieces in
// them.
#pragma once

#include "mla_decode/mla_decode.h"
#include "mla_decode/mla_decode_config.h"

namespace zebra {
namespace {

// What combines the partial results of one item: `first`, then `rest`, `rest + step`, ...
struct MlaUnit {
  int item;   // sequence * passes + pass
  int count;  // partial results; below 2 there is nothing to do
  std::int64_t first, rest;
  int step, unused;
};
static_assert(sizeof(MlaUnit) == kMlaUnitBytes, "the workspace counts on it");

struct MlaArgs {
  MlaDecodeParams p;
  MlaDecodeConfig c;
  int max_tokens;  // of a sequence: what the block table has room for
  float2* stats;   // [partials, 16 groups]: reference exponent, sum
  float* sums;     // [partials, 16 groups, rank]
  MlaUnit* units;
};

struct MlaShare {
  int low, high;     // units of this CTA
  int total, ctas;   // units of all, CTAs that share them
  int batch, start;  // the first sequence of the share and where it starts on the line
};

__device__ __forceinline__ int mla_length(const MlaArgs& a, int b) {
  const int length = __ldg(a.p.seq_lens + b * a.p.seq_lens_stride);
  return min(max(length, 0), a.max_tokens);
}
// Units of a sequence's items, each.
__device__ __forceinline__ int mla_units(const MlaArgs& a, int length) {
  const int size = a.c.split > 0 ? static_cast<int>(a.c.split) : a.c.stage;
  return length / size + (length % size != 0);
}
__device__ __forceinline__ int mla_weight(const MlaArgs& a, int b) {
  const int units = mla_units(a, mla_length(a, b));
  return units == 0 ? 0 : a.c.passes * (units + a.c.item_cost);
}

__device__ __forceinline__ int warp_scan(int v) {  // inclusive
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, v, d);
    if (threadIdx.x % 32 >= d) v += below;
  }
  return v;
}

// This CTA's share.  All threads call it; `scratch` is shared memory for kMlaWarps + 2 ints.
__device__ __forceinline__ MlaShare mla_share(const MlaArgs& a, int* scratch) {
  const int batch = static_cast<int>(a.p.B), thread = threadIdx.x, warp = thread / 32;
  const int kThreads = 32 * kMlaWarps;
  int sum = 0;
  for (int b = thread; b < batch; b += kThreads) sum += mla_weight(a, b);
  sum = warp_scan(sum);
  if (thread % 32 == 31) scratch[warp] = sum;
  __syncthreads();
  MlaShare s = {};
#pragma unroll
  for (int w = 0; w < kMlaWarps; ++w) s.total += scratch[w];
  // At least a stage for every stream of a CTA.
  const int least = a.c.split > 0 ? 1 : a.c.streams;
  s.ctas = max(1, min(static_cast<int>(gridDim.x), s.total / least));
  const int cta = blockIdx.x;
  if (cta >= s.ctas) return s;
  s.low = static_cast<int>(static_cast<std::int64_t>(s.total) * cta / s.ctas);
  s.high = static_cast<int>(static_cast<std::int64_t>(s.total) * (cta + 1) / s.ctas);
  if (s.low >= s.high) return s;
  int carry = 0;
  for (int base = 0; base < batch; base += kThreads) {
    const int b = base + thread;
    const int weight = b < batch ? mla_weight(a, b) : 0;
    const int inclusive = warp_scan(weight);
    __syncthreads();
    if (thread % 32 == 31) scratch[warp] = inclusive;
    __syncthreads();
    int before = carry;
#pragma unroll
    for (int w = 0; w < kMlaWarps; ++w) {
      if (w < warp) before += scratch[w];
      carry += scratch[w];
    }
    const int start = before + inclusive - weight;
    if (start <= s.low && s.low < start + weight) {
      scratch[kMlaWarps] = b;
      scratch[kMlaWarps + 1] = start;
    }
    if (carry > s.low) break;
  }
  __syncthreads();
  s.batch = scratch[kMlaWarps];
  s.start = scratch[kMlaWarps + 1];
  return s;
}

// Walks the pieces of a share in order.  Every warp keeps its walks in shared memory, where they
// take no registers from the products; mla_advance() moves them.
struct MlaWalk {
  int b, pass, start;     // the item and where it starts on the line
  int length, units;      // of the item
  int from, next, until;  // its units of this share: the first, the next one, the end
  int token, end;         // the piece: cached tokens [token, end)

  __device__ __forceinline__ void open(const MlaArgs& a, const MlaShare& s) {
    from = next = max(0, s.low - start - a.c.item_cost);
    until = min(units, s.high - start - a.c.item_cost);
  }
  __device__ __forceinline__ void measure(const MlaArgs& a) {
    length = mla_length(a, b);
    units = mla_units(a, length);
  }
  __device__ __forceinline__ void begin(const MlaArgs& a, const MlaShare& s) {
    b = s.batch, pass = 0, start = s.start;
    from = next = until = token = end = length = units = 0;
    if (s.low >= s.high) {
      start = s.high;  // nothing
      b = static_cast<int>(a.p.B);
      return;
    }
    measure(a);
    pass = (s.low - start) / (units + a.c.item_cost);
    start += pass * (units + a.c.item_cost);
    open(a, s);
  }
  // Opens the next piece; false: there is none.
  __device__ __forceinline__ bool advance(const MlaArgs& a, const MlaShare& s) {
    const int batch = static_cast<int>(a.p.B);
    while (next >= until) {
      if (b >= batch) return false;
      start += units + a.c.item_cost;
      if (start >= s.high) return false;
      if (++pass == a.c.passes) {
        pass = 0;
        do {
          if (++b >= batch) return false;
          measure(a);
        } while (units == 0);
      }
      open(a, s);
    }
    const int size = a.c.split > 0 ? static_cast<int>(a.c.split) : a.c.stage;
    token = next * size;
    next = a.c.split > 0 ? next + 1 : until;
    // next * size may pass 2^31 where the last stage is not full
    end = next == units ? length : next * size;
    return true;
  }
  __device__ __forceinline__ std::int64_t item(const MlaArgs& a) const {
    return static_cast<std::int64_t>(b) * a.c.passes + pass;
  }
  // Where the open piece's partial result goes; -1: it is the whole item.
  __device__ __forceinline__ std::int64_t partial(const MlaArgs& a) const {
    if (a.c.split > 0) return units == 1 ? -1 : item(a) * a.c.pieces + (next - 1);
    if (from == 0 && until == units) return -1;
    return 2 * static_cast<std::int64_t>(blockIdx.x) + (from == 0);
  }
  // Lists the item for the combination, if it begins with the open piece.  One thread of the grid.
  __device__ __forceinline__ void list(const MlaArgs& a, const MlaShare& s) const {
    const bool is_first = token == 0;
    if (!is_first || a.c.units == 0) return;
    MlaUnit u = {};
    u.item = static_cast<int>(item(a));
    if (a.c.split > 0) {
      u.count = units;
      u.first = item(a) * a.c.pieces;
      u.rest = u.first + 1, u.step = 1;
    } else {
      const std::int64_t last = start + a.c.item_cost + units - 1;
      const int owner = static_cast<int>(((last + 1) * s.ctas - 1) / s.total);
      u.count = owner - static_cast<int>(blockIdx.x) + 1;
      u.first = 2 * static_cast<std::int64_t>(blockIdx.x) + 1;
      u.rest = u.first + 1, u.step = 2;
    }
    if (a.c.unit_per_item)
      a.units[item(a)] = u;
    else if (u.count > 1)
      a.units[blockIdx.x] = u;
  }
};

// walk.advance() for a warp whose lanes all read `walk` in shared memory.
__device__ __forceinline__ bool mla_advance(MlaWalk& walk, const MlaArgs& a, const MlaShare& s) {
  __syncwarp();
  bool more = false;
  if (threadIdx.x % 32 == 0) more = walk.advance(a, s);
  __syncwarp();
  return __shfl_sync(0xffffffffu, static_cast<int>(more), 0) != 0;
}

}  // namespace
}  // namespace zebra
