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

constexpr unsigned kWarp = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

// The natural logarithm of sum 2^reference.
__device__ __forceinline__ float mla_lse(float reference, float sum) {
  return (reference + __log2f(sum)) * 0.693147180559945309f;
}

// What combines the partial results of one item: `first`, then `rest`, `rest + step`, ...
struct MlaUnit {
  int item;   // sequence * passes + pass
  int count;  // partial results; below 2 there is nothing to do
  std::int64_t first, rest;
  int step, unused;
};
static_assert(sizeof(MlaUnit) == kMlaUnitBytes, "the workspace counts on it");

// What the device needs, in the widths it needs: every cold instruction and constant line delays a
// short launch, so nothing here is wider than it must be.  First what the line of work follows
// from.
struct MlaLine {
  const std::int32_t* seq_lens;
  std::int64_t seq_lens_stride;
  MlaDivisor unit,
      ctas;  // unit: tokens of a unit of the line, a stage or a piece; ctas: of the grid
  int batch, passes;
  int max_tokens;        // of a sequence: what the block table has room for
  int least, item_cost;  // least: log2 of the units that a CTA is woken for
  int pieces;
  bool is_split;
};
struct MlaArgs : MlaLine {
  const void *q, *cache;
  const std::int32_t* block_table;
  void* o;
  float* lse;
  float2* stats;  // [partials, 16 groups]: reference exponent, sum
  float* sums;    // [partials, 16 groups, rank]
  MlaUnit* units;
  std::int64_t q_stride[3], page_stride, row_stride, table_stride;
  MlaDivisor page, heads;
  int tokens, rows;  // tokens: new ones of a sequence; rows: tokens x heads
  int R, E, pages;
  int table_lines;                           // of 128 bytes, of the block table
  int halves, groups, log_groups, log_team;  // team: groups x halves
  int streams, slots;
  int q_offset, ring_offset, merge_parts;
  int unit_count;                    // that the combination looks at; 0: there is none
  bool unit_per_item, q_is_aligned;  // to 16 bytes
  float scale;                       // to base 2
};

struct alignas(16) MlaShare {
  int low, high;      // units of this CTA
  int each, larger;   // of a CTA at least; CTAs that have one more, the first ones
  int batch, start;   // the first sequence of the share and where it starts on the line
  int length, units;  // of it
  bool has_empty;     // some sequence of the batch has no token
};
constexpr int kMlaShareBytes = sizeof(MlaShare);

__device__ __forceinline__ int mla_length(const MlaLine& a, int b) {
  // Not from L1: under programmatic launch this grid may start before L1 is told what changed.
  const int length = __ldcg(a.seq_lens + b * a.seq_lens_stride);
  return min(max(length, 0), a.max_tokens);
}
// Units of an item of a sequence.
__device__ __forceinline__ int mla_units(const MlaLine& a, int length) {
  const int whole = a.unit.quotient(length);
  return whole + (whole * a.unit.divisor != length);
}
__device__ __forceinline__ int mla_weight(const MlaLine& a, int units) {
  return units == 0 ? 0 : a.passes * (units + a.item_cost);
}

// How a line of `total` units is dealt.
struct MlaDeal {
  int ctas;          // that have something to do
  int each, larger;  // units of a CTA at least; CTAs that have one more, the first ones

  __device__ __forceinline__ MlaDeal(const MlaLine& a, int total) {
    ctas = total >> a.least;
    if (ctas >= a.ctas.divisor) {
      ctas = a.ctas.divisor, each = a.ctas.quotient(total);
      larger = total - each * ctas;
    } else {
      ctas = max(ctas, 1), each = ctas == 1 ? total : 1 << a.least;
      larger = total - each * ctas;
#pragma unroll 1
      while (larger >= ctas) larger -= ctas, ++each;
    }
  }
  // Whose a unit is.
  __device__ __forceinline__ int owner(int place) const {
    const int of_larger = larger * (each + 1);
    return place < of_larger ? place / (each + 1) : larger + (place - of_larger) / each;
  }
};

// A warp's sum of the lanes up to each.
__device__ __forceinline__ int mla_scan(int v, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(kWarp, v, d);
    if (lane >= d) v += below;
  }
  return v;
}

// Batches up to here: a lane has a sequence.  Up to kMlaWarpBatch: every warp looks at all lengths,
// and no warp waits for another.
constexpr int kMlaLaneBatch = 32, kMlaWarpBatch = 256;

// What mla_share() makes of a batch up to kMlaLaneBatch: the length of the lane's sequence, as it
// lies in memory.  A kernel asks for it first of all.
__device__ __forceinline__ int mla_lane_length(const MlaLine& a) {
  const int lane = threadIdx.x % 32;
  return lane < a.batch ? __ldcg(a.seq_lens + lane * a.seq_lens_stride) : 0;
}

// This CTA's share, by one look at the lengths: every thread takes one of equal runs of sequences.
// kMlaWarps warps call it and meet at `barrier`; `scratch` is shared memory for kMlaWarps + 4 ints.
template <typename Barrier>
__device__ __forceinline__ MlaShare mla_share(const MlaArgs& a, int* scratch, int lane_length,
                                              Barrier barrier) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const bool is_lane = a.batch <= kMlaLaneBatch, is_alone = a.batch <= kMlaWarpBatch;
  constexpr int kAtOnce = 4;
  int sum = 0, first = 0, last = 0;
  MlaShare s;
  s.length = s.units = 0;
  bool has_empty = false;
  if (is_lane) {
    if (lane < a.batch) {
      s.length = min(max(lane_length, 0), a.max_tokens), s.units = mla_units(a, s.length);
      sum = mla_weight(a, s.units), has_empty = s.length == 0;
    }
  } else {
    const int me = is_alone ? lane : thread, log_runs = is_alone ? 5 : 8;
    const int run = (a.batch + (1 << log_runs) - 1) >> log_runs;
    first = min(me * run, a.batch), last = min(first + run, a.batch);
#pragma unroll 1
    for (int b = first; b < last; b += kAtOnce) {
      int length[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) length[n] = b + n < last ? mla_length(a, b + n) : 0;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        has_empty |= b + n < last && length[n] == 0;
        sum += mla_weight(a, mla_units(a, length[n]));
      }
    }
  }
  int before = mla_scan(sum, lane);  // of the threads up to this one
  int total = __shfl_sync(kWarp, before, 31);
  before -= sum;
  if (is_alone) {
    s.has_empty = __any_sync(kWarp, has_empty);
  } else {
    const bool any_empty = __any_sync(kWarp, has_empty);
    if (lane == 0) scratch[warp] = any_empty ? ~total : total;
    barrier();
    total = 0, s.has_empty = false;
#pragma unroll
    for (int w = 0; w < kMlaWarps; ++w) {
      const int v = scratch[w];
      s.has_empty |= v < 0;
      if (w < warp) before += v < 0 ? ~v : v;
      total += v < 0 ? ~v : v;
    }
  }
  const int cta = blockIdx.x;
  const MlaDeal deal(a, total);
  s.each = deal.each, s.larger = deal.larger;
  s.low = s.each * cta + min(cta, s.larger);
  s.high = cta < deal.ctas ? s.low + s.each + (cta < s.larger) : s.low;
  const bool is_mine = s.low < s.high && s.low >= before && s.low < before + sum;
  s.batch = lane, s.start = before;
  if (is_mine && !is_lane) {
    bool is_found = false;
#pragma unroll 1
    for (int b = first; !is_found; b += kAtOnce) {  // the lengths once more, a few at a time
      int length[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) length[n] = b + n < last ? mla_length(a, b + n) : 0;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int units = mla_units(a, length[n]), weight = mla_weight(a, units);
        if (!is_found && s.low < before + weight) {
          s.batch = b + n, s.start = before, s.length = length[n], s.units = units;
          is_found = true;
        }
        before += weight;
      }
    }
  }
  if (is_alone) {
    const unsigned who = __ballot_sync(kWarp, is_mine);
    const int from = who == 0 ? 0 : __ffs(who) - 1;
    s.batch = __shfl_sync(kWarp, s.batch, from);
    s.start = __shfl_sync(kWarp, s.start, from);
    s.length = __shfl_sync(kWarp, s.length, from);
    s.units = __shfl_sync(kWarp, s.units, from);
  } else {
    int* const found = scratch + kMlaWarps;
    if (is_mine) found[0] = s.batch, found[1] = s.start, found[2] = s.length, found[3] = s.units;
    barrier();
    s.batch = found[0], s.start = found[1], s.length = found[2], s.units = found[3];
  }
  if (s.low >= s.high) s.batch = a.batch, s.start = s.high, s.length = s.units = 0;
  return s;
}

// The pass of a share's first item; its sequence is the share's own.
__device__ __forceinline__ int mla_first_pass(const MlaArgs& a, const MlaShare& s) {
  return s.low < s.high && a.passes > 1 ? (s.low - s.start) / (s.units + a.item_cost) : 0;
}

// What combines an item, found by a warp from the lengths, for batches up to kMlaLaneBatch.
__device__ __forceinline__ MlaUnit mla_find_unit(const MlaLine& a, int item) {
  const int lane = threadIdx.x % 32;
  int units = 0;
  if (lane < a.batch) units = mla_units(a, mla_length(a, lane));
  const int weight = mla_weight(a, units), until = mla_scan(weight, lane);
  const MlaDeal deal(a, __shfl_sync(kWarp, until, 31));
  const int b = item / a.passes, pass = item - b * a.passes;
  const int start = __shfl_sync(kWarp, until - weight, b);
  units = __shfl_sync(kWarp, units, b);
  MlaUnit u = {};
  if (units == 0) return u;
  u.item = item;
  if (a.is_split) {
    u.count = units, u.first = static_cast<std::int64_t>(item) * a.pieces;
    u.rest = u.first + 1, u.step = 1;
  } else {
    const int from = start + pass * (units + a.item_cost) + a.item_cost;
    const int owner = deal.owner(from);
    u.count = deal.owner(from + units - 1) - owner + 1;
    u.first = 2 * owner + 1, u.rest = u.first + 1, u.step = 2;
  }
  return u;
}

// What the warps of a team know of a stage in their ring.
struct alignas(16) MlaStep {
  static constexpr int kFirst = 1, kLast = 2, kStop = 4;  // of a piece; after all pieces
  int token, end;  // of the stage, of the piece; none left: the stream has no token of the piece
  int length, b, pass, flags;
  std::int64_t partial;

  __device__ __forceinline__ void note(const MlaArgs& a, const struct MlaWalk& walk);
};

// Walks the pieces of a share in order.  It lies in shared memory, where it takes no registers from
// the products; one lane moves it, whole: field by field every step would wait for the one before.
struct alignas(16) MlaWalk {
  int b, pass, start;     // the item and where it starts on the line
  int length, units;      // of the item
  int from, next, until;  // its units of this share: the first, the next one, the end
  int token, end;         // the piece: cached tokens [token, end)
  int stage, flags;       // the next stage of the stream: its first token, MlaStep's flags

  // To before the first piece.
  __device__ __forceinline__ void begin(const MlaArgs& a, const MlaShare& s) {
    const int item = s.units + a.item_cost;
    pass = mla_first_pass(a, s);
    b = s.batch, start = s.start + pass * item, length = s.length, units = s.units;
    from = next = until = token = end = stage = flags = 0;
    if (s.low < s.high) open(a, s);
  }
  __device__ __forceinline__ void open(const MlaArgs& a, const MlaShare& s) {
    from = next = max(0, s.low - start - a.item_cost);
    until = min(units, s.high - start - a.item_cost);
  }
  // Opens the next piece; false: there is none.
  __device__ __forceinline__ bool advance(const MlaArgs& a, const MlaShare& s) {
#pragma unroll 1
    while (next >= until) {
      if (b >= a.batch) return false;
      start += units + a.item_cost;
      if (start >= s.high) return false;
      if (++pass == a.passes) {
        pass = 0;
        do {
          if (++b >= a.batch) return false;
          length = mla_length(a, b);
          units = mla_units(a, length);
        } while (units == 0);
      }
      open(a, s);
    }
    token = next * a.unit.divisor;
    next = a.is_split ? next + 1 : until;
    // next * unit may pass 2^31 where the last unit is not full
    end = next == units ? length : next * a.unit.divisor;
    return true;
  }
  __device__ __forceinline__ int item(const MlaArgs& a) const { return b * a.passes + pass; }
  // Where the open piece's partial result goes; -1: it is the whole item.
  __device__ __forceinline__ std::int64_t partial(const MlaArgs& a) const {
    if (a.is_split)
      return units == 1 ? -1 : static_cast<std::int64_t>(item(a)) * a.pieces + (next - 1);
    if (from == 0 && until == units) return -1;
    return 2 * static_cast<int>(blockIdx.x) + (from == 0);
  }
  // Lists the item, whose first piece is open, for the combination.  One thread of the grid.
  __device__ __forceinline__ void list(const MlaArgs& a, const MlaShare& s) const {
    if (a.unit_count == 0) return;
    MlaUnit u = {};
    u.item = item(a);
    if (a.is_split) {
      u.count = units;
      u.first = static_cast<std::int64_t>(u.item) * a.pieces;
      u.rest = u.first + 1, u.step = 1;
    } else {
      // The owner of the item's last unit.
      int last = start + a.item_cost + units - 1, owner = 0, each = s.each + 1;
      const int larger = s.larger * each;
      if (last >= larger) last -= larger, owner = s.larger, each = s.each;
      u.count = owner + last / each - static_cast<int>(blockIdx.x) + 1;
      u.first = 2 * static_cast<int>(blockIdx.x) + 1;
      u.rest = u.first + 1, u.step = 2;
    }
    if (a.unit_per_item)
      a.units[u.item] = u;
    else if (u.count > 1)
      a.units[blockIdx.x] = u;
  }
};

__device__ __forceinline__ void MlaStep::note(const MlaArgs& a, const MlaWalk& walk) {
  *this = {walk.stage, walk.end, walk.length, walk.b, walk.pass, walk.flags, walk.partial(a)};
}

}  // namespace
}  // namespace zebra
