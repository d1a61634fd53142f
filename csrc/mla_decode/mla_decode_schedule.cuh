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

// Whose a unit is, where the first `larger` CTAs have each + 1 of them and the others `each`.
__device__ __forceinline__ int mla_owner(int each, int larger, int place) {
  const int of_larger = larger * (each + 1);
  const bool is_larger = place < of_larger;
  const int from = is_larger ? place : place - of_larger;
  return (is_larger ? 0 : larger) + from / (each + is_larger);  // one division
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
};

// A warp's sum of the lanes up to each; the first `lanes` have something.
__device__ __forceinline__ int mla_scan(int v, int lane, int lanes = 32) {
#pragma unroll 1
  for (int d = 1; d < lanes; d *= 2) {
    const int below = __shfl_up_sync(kWarp, v, d);
    if (lane >= d) v += below;
  }
  return v;
}

// Batches up to here: a lane of every warp has a sequence, and no warp waits for another.  Larger
// ones: every thread of kMlaWarps warps has an equal run of them.
constexpr int kMlaLaneBatch = 32, kMlaLineThreads = 32 * kMlaWarps;

// The length of the first sequence that the thread looks at, as it lies in memory.  A kernel asks
// for it first of all.
__device__ __forceinline__ int mla_first_length(const MlaLine& a) {
  const int run = (a.batch + kMlaLineThreads - 1) / kMlaLineThreads;
  const int b = a.batch <= kMlaLaneBatch ? threadIdx.x % 32 : threadIdx.x * run;
  return b < a.batch ? __ldcg(a.seq_lens + b * a.seq_lens_stride) : 0;
}

// A thread's sequences [first, last) on the line.
struct MlaRun {
  static constexpr int kAtOnce = 4;
  int first, last;
  int before, weight, total;  // units of the sequences before them, of them, of all
  int length[kAtOnce] = {};   // of the last sequences looked at: of all of a short run
  bool has_empty;             // some sequence of the batch has no token

  __device__ __forceinline__ void look(const MlaLine& a, int b) {
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) length[n] = b + n < last ? mla_length(a, b + n) : 0;
  }
  // Of a batch above kMlaLaneBatch.  kMlaWarps warps call it and meet at `barrier`; `scratch` is
  // shared memory for kMlaWarps ints.
  template <typename Barrier>
  __device__ __forceinline__ void begin(const MlaLine& a, int first_length, int* scratch,
                                        Barrier barrier) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int run = (a.batch + kMlaLineThreads - 1) / kMlaLineThreads;
    first = min(thread * run, a.batch), last = min(first + run, a.batch);
    weight = 0;
    bool is_empty = false;
#pragma unroll 1
    for (int b = first; b < last; b += kAtOnce) {
      if (run == 1) {
        length[0] = min(max(first_length, 0), a.max_tokens);
      } else {
        look(a, b);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (b + n >= last) break;
        is_empty |= length[n] == 0;
        weight += mla_weight(a, mla_units(a, length[n]));
      }
    }
    before = mla_scan(weight, lane);  // of the threads up to this one
    const int of_warp = __shfl_sync(kWarp, before, 31);
    is_empty = __any_sync(kWarp, is_empty);
    if (lane == 0) scratch[warp] = is_empty ? ~of_warp : of_warp;
    barrier();
    before -= weight, total = 0, has_empty = false;
#pragma unroll
    for (int w = 0; w < kMlaWarps; ++w) {
      const int v = scratch[w], units = v < 0 ? ~v : v;
      has_empty |= v < 0;
      if (w < warp) before += units;
      total += units;
    }
  }
  // Tells whose of its sequences a place on the line is: number, start on the line, length, units.
  __device__ __forceinline__ void find(const MlaLine& a, int place, int* found) {
    int start = before;
    bool is_found = false;
#pragma unroll 1
    for (int b = first; b < last && !is_found; b += kAtOnce) {
      if (last - first > kAtOnce) look(a, b);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (b + n >= last || is_found) break;
        const int units = mla_units(a, length[n]), weight = mla_weight(a, units);
        is_found = place < start + weight;
        if (is_found) found[0] = b + n, found[1] = start, found[2] = length[n], found[3] = units;
        start += weight;
      }
    }
  }
};

// This CTA's share, by one look at the lengths.  kMlaWarps warps call it and meet at `barrier`;
// `scratch` is shared memory for kMlaWarps + 4 ints.
template <typename Barrier>
__device__ __forceinline__ MlaShare mla_share(const MlaArgs& a, int* scratch, int first_length,
                                              Barrier barrier) {
  const int lane = threadIdx.x % 32, cta = blockIdx.x;
  MlaShare s;
  const auto deal = [&](int total) {
    const MlaDeal deal(a, total);
    s.each = deal.each, s.larger = deal.larger;
    s.low = s.each * cta + min(cta, s.larger);
    s.high = cta < deal.ctas ? s.low + s.each + (cta < s.larger) : s.low;
  };
  if (a.batch <= kMlaLaneBatch) {
    const int length = lane < a.batch ? min(max(first_length, 0), a.max_tokens) : 0;
    const int units = mla_units(a, length), weight = mla_weight(a, units);
    const int until = mla_scan(weight, lane, a.batch), start = until - weight;
    s.has_empty = __any_sync(kWarp, lane < a.batch && length == 0);
    deal(__shfl_sync(kWarp, until, a.batch - 1));
    const unsigned who = __ballot_sync(kWarp, s.low < s.high && s.low >= start && s.low < until);
    s.batch = who == 0 ? 0 : __ffs(who) - 1;
    s.start = __shfl_sync(kWarp, start, s.batch), s.length = __shfl_sync(kWarp, length, s.batch);
    s.units = __shfl_sync(kWarp, units, s.batch);
  } else {
    MlaRun run;
    run.begin(a, first_length, scratch, barrier);
    s.has_empty = run.has_empty;
    deal(run.total);
    int* const found = scratch + kMlaWarps;
    if (s.low < s.high && s.low >= run.before && s.low < run.before + run.weight)
      run.find(a, s.low, found);
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

// The first unit of its first item that is of it, where items have one pass, and that unit's token.
__device__ __forceinline__ int mla_first_unit(const MlaArgs& a, const MlaShare& s) {
  return max(0, s.low - s.start - a.item_cost);
}
__device__ __forceinline__ int mla_first_token(const MlaArgs& a, const MlaShare& s) {
  return mla_first_unit(a, s) * a.unit.divisor;
}

// What combines an item of `units` units, of which CTA `owner` has the first and CTA `last` the
// last.
__device__ __forceinline__ MlaUnit mla_unit(const MlaLine& a, int item, int units, int owner,
                                            int last) {
  MlaUnit u = {};
  u.item = item;
  if (a.is_split) {
    u.count = units, u.step = 1;
    u.first = static_cast<std::int64_t>(item) * a.pieces;
  } else {
    u.count = last - owner + 1, u.step = 2;
    u.first = 2 * owner + 1;
  }
  u.rest = u.first + 1;
  return u;
}
// Of an item whose sequence starts at `start` on a line of `total` units.
__device__ __forceinline__ MlaUnit mla_unit_of(const MlaLine& a, int item, int total, int start,
                                               int units) {
  if (units == 0) return {};
  if (a.is_split) return mla_unit(a, item, units, 0, 0);
  const MlaDeal deal(a, total);
  const int pass = item - item / a.passes * a.passes;
  const int from = start + pass * (units + a.item_cost) + a.item_cost;
  const auto owner = [&](int place) { return mla_owner(deal.each, deal.larger, place); };
  return mla_unit(a, item, units, owner(from), owner(from + units - 1));
}
// It, found by a warp from the lengths.  Up to kMlaLaneBatch sequences lanes may look for different
// items; of more, if there can be (kMore), every lane has a run.
template <bool kMore>
__device__ __forceinline__ MlaUnit mla_find_unit(const MlaLine& a, int item) {
  const int lane = threadIdx.x % 32, b = item / a.passes;
  int weight = 0, before = 0, units = 0;  // of the run; up to b in it; of b
  int owner = b, lanes = 32;
  if (!kMore || a.batch <= kMlaLaneBatch) {
    if (lane < a.batch) units = mla_units(a, mla_length(a, lane));
    weight = mla_weight(a, units), lanes = a.batch;
  } else {
    constexpr int kAtOnce = 4;
    const int run = (a.batch + 31) / 32;
    owner = b / run;
#pragma unroll 1
    for (int i = 0; i < run; i += kAtOnce) {
      const int at = lane * run + i;
      int length[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
        length[n] = i + n < run && at + n < a.batch ? mla_length(a, at + n) : 0;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int more = mla_units(a, length[n]);
        if (at + n == b) before = weight, units = more;
        weight += mla_weight(a, more);
      }
    }
  }
  const int until = mla_scan(weight, lane, lanes);
  return mla_unit_of(a, item, __shfl_sync(kWarp, until, lanes - 1),
                     __shfl_sync(kWarp, until - weight + before, owner),
                     __shfl_sync(kWarp, units, owner));
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
    const int last = a.is_split ? 0 : mla_owner(s.each, s.larger, start + a.item_cost + units - 1);
    const MlaUnit u = mla_unit(a, item(a), units, static_cast<int>(blockIdx.x), last);
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
