// What a CTA of ssd_scan's Hopper kernels walks, piece after piece.  Include CUDA's headers before:
// the emulation on the CPU has others.
#pragma once

#include "ssd_scan/ssd_scan.h"
#include "ssd_scan/ssd_scan_sm90_config.h"

namespace zebra::sm90 {

constexpr int kQ = kSsdChunk;

struct SsdArgs {
  CUtensorMap x, B, C, z, y;
  SsdScanParams p;
  SsdScanSm90Config cfg;
  // Where sequences are cut: what the walk for the states leaves.
  float4* states;     // [slots, width, 2, registers / 4, 128]
  float* decays;      // [slots, width, heads], of all that the state was walked over
  const int4* table;  // packed: where units begin, [units + 1] Places
};

// Where a unit of packed sequences begins: a bundle, a sequence, a grain of it, and a grain of the
// whole line.
struct Place {
  int bundle, sequence, grain, at;
};

__device__ __forceinline__ Place place_of(const SsdArgs& a, int unit) {
  const int4 t = a.table[unit];
  return {t.x, t.y, t.z, t.w};
}

// The chunks of a unit that belong to one sequence.  In the walk for the states alone: of a share
// or, packed, of a part of what a unit does not finish.
template <bool kStatesOnly>
struct Pieces {
  const SsdArgs& a;
  int item = static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x);
  int head;           // first of the CTA
  int sequence, row;  // sequence and batch row
  int first, tokens;
  int grain;  // of the sequence that the piece begins with
  bool last;  // piece of its sequence
  // In the walk for the states: where the state goes, and whether it begins here or goes on from
  // the piece before.
  int slot;
  bool fresh;
  // The next piece begins at grain `at` (of a share: chunk) of sequence `line` of all bundles.  In
  // the walk for the states, packed: the first unit to look at, the unfinished ones before it.
  int line = 0, at = 0;
  int left = 0;  // grains (of a share: chunks) of the run from there
  // kHeadRun: the run leaves sequences where their tails begin.  kWholes: whole sequences follow.
  // Of a share: kBegun.
  static constexpr int kHeadRun = 1, kWholes = 2, kBegun = 4;
  int mode = 0;

  __device__ __forceinline__ explicit Pieces(const SsdArgs& args) : a(args) {}

  // The unit (or share) and the slot in its bundle.
  __device__ __forceinline__ int unit() const { return item / a.cfg.width; }
  __device__ __forceinline__ int member() const { return item % a.cfg.width; }

  // The next piece, false where there is none.
  __device__ __forceinline__ bool next() {
    const int items = static_cast<int>(kStatesOnly ? a.cfg.state_items : a.cfg.items);
    while (left == 0) {
      if (!kStatesOnly && mode & kWholes) {
        run(ssd_scan_whole_run(a.cfg, unit()), 0);
        continue;
      }
      item += static_cast<int>(gridDim.x);
      if (item >= items) return false;
      if (!kStatesOnly)
        enter();
      else if (a.table == nullptr)
        enter_share();
      else
        enter_part();
    }
    if (!kStatesOnly)
      take();
    else if (a.table == nullptr)
      take_of_share();
    else
      left = 0;
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
    const int values[kHeld] = {item, left, line, at, mode, head, sequence, last};
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < kHeld; ++i) place[i] = values[i];
    __syncwarp();
  }
  __device__ __forceinline__ void restore(const int* place) {
    item = place[0], left = place[1];
    line = place[2], at = place[3], mode = place[4];
    head = place[5], sequence = place[6], last = place[7];
    __syncwarp();  // before the next piece takes the place
  }

  // Packed: of the grains of a unit that ends at `end`, those it leaves of an unfinished sequence.
  static __device__ __forceinline__ int unfinished(const Place& begin, const Place& end) {
    return min(end.grain, end.at - begin.at);
  }
  // Chunks of each part of `grains` grains.
  static __device__ __forceinline__ int part_chunks(const SsdArgs& a, int grains) {
    const int shift = a.cfg.state_cuts_shift;
    return ((grains << a.cfg.grain_shift) + (1 << shift) - 1) >> shift;
  }

 private:
  __device__ __forceinline__ void run(const SsdRun& r, int with) {
    line = r.line, at = r.grain, left = r.left, mode = with;
  }
  __device__ __forceinline__ void enter() {
    const int u = unit();
    if (a.table != nullptr) {
      const Place begin = place_of(a, u);
      line = begin.bundle * static_cast<int>(a.p.sequences) + begin.sequence, at = begin.grain;
      left = place_of(a, u + 1).at - begin.at;
      return;
    }
    mode = a.cfg.wholes > 0 ? kWholes : 0;
    if (a.cfg.cut_lines > 0)
      run(ssd_scan_cut_run(a.cfg, u), u < a.cfg.head_units ? mode | kHeadRun : mode);
  }
  // Sequence and heads of `line`.
  __device__ __forceinline__ void find() {
    const int sequences = static_cast<int>(a.p.sequences), bundle = line / sequences;
    sequence = row = line - bundle * sequences;
    head = (bundle * a.cfg.width + member()) * a.cfg.heads;
  }
  __device__ __forceinline__ void take() {
    find();
    int begin = 0, length = static_cast<int>(a.p.tokens);
    if (a.p.cu_seqlens != nullptr) {
      row = 0;
      begin = a.p.cu_seqlens[sequence];
      length = a.p.cu_seqlens[sequence + 1] - begin;
    }
    const int shift = a.cfg.grain_shift;
    const int grains = ssd_scan_grains(length, shift), end = mode & kHeadRun ? a.cfg.head : grains;
    const int size = min(end - at, left);
    const int from = (at << shift) * kQ;
    grain = at;
    last = grain + size == grains;
    first = begin + from;
    tokens = last ? length - from : (size << shift) * kQ;
    left -= size;
    at += size;
    if (at == end) at = 0, ++line;
  }

  __device__ __forceinline__ void enter_share() {
    const int v = unit(), begin = ssd_scan_state_cut(a.cfg, v);
    left = ssd_scan_state_cut(a.cfg, v + 1) - begin;
    line = begin / a.cfg.state_line;
    at = begin - line * a.cfg.state_line;
    mode = 0;
  }
  // Up to the next unit's begin, whose state goes to that unit's slot, or to the share's end.
  __device__ __forceinline__ void take_of_share() {
    find();
    const SsdNextCut cut = ssd_scan_next_cut(a.cfg, line, at);
    const int size = min(cut.chunk - at, left);
    first = at * kQ, tokens = size * kQ;
    slot = (size == left ? unit() : a.cfg.state_units + cut.unit) * a.cfg.width + member();
    fresh = mode == 0 || at == 0;
    mode = kBegun;
    left -= size;
    at += size;
    if (at == a.cfg.state_line) at = 0, ++line;
  }
  // Units that leave nothing unfinished have no parts: every item finds its unit among the others,
  // 32 units at a time, going on from where the item before was.
  __device__ __forceinline__ void enter_part() {
    const int width = a.cfg.width, cuts = a.cfg.state_cuts_shift;
    const int units = static_cast<int>(a.cfg.units), lane = threadIdx.x % 32;
    const int number = item / width, cut = number & ((1 << cuts) - 1);
    int walked, u;
    for (;; line += 32) {
      u = line + lane;
      walked = u < units ? unfinished(place_of(a, u), place_of(a, u + 1)) : 0;
      unsigned mask = __ballot_sync(~0u, walked > 0);
      int skip = (number >> cuts) - at;  // of these 32 units
      if (skip < __popc(mask)) {
        for (; skip > 0; --skip) mask &= mask - 1;
        const int pick = __ffs(mask) - 1;
        u = line + pick;
        walked = __shfl_sync(~0u, walked, pick);
        break;
      }
      at += __popc(mask);
      if (line + 32 >= units) {
        item = static_cast<int>(a.cfg.state_items);
        return;
      }
    }
    slot = ((u << cuts) + cut) * width + member();
    fresh = true;
    const Place end = place_of(a, u + 1);
    const int per = part_chunks(a, walked);
    const int count = min(per, (walked << a.cfg.grain_shift) - cut * per);
    left = count > 0;
    sequence = end.sequence, row = 0;
    first = (((end.grain - walked) << a.cfg.grain_shift) + cut * per) * kQ;
    if (count > 0) first += a.p.cu_seqlens[sequence];
    tokens = count * kQ;
    head = (end.bundle * width + member()) * a.cfg.heads;
  }
};

}  // namespace zebra::sm90
