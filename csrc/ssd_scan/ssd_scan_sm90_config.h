// ssd_scan on Hopper: what one CTA holds and how sequences are cut.  Pure, so that tests can print
// and check the choice.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/math.h"

namespace zebra {

constexpr int kSsdChunk = 64;                   // tokens of a chunk
constexpr int kSsdTileBytes = kSsdChunk * 128;  // 64 tokens x 64 elements of 16 bits
constexpr int kSsdDecaySlots = 4;  // chunks whose decays are kept ready, a power of two
constexpr int kSsdPmSlots = 2;     // chunks whose masked scores are kept ready
constexpr int kSsdMostStages = 6;
constexpr int kSsdSm90SmemBytes = 232448;  // shared memory of a CTA on sm_90

// Sums of squares for the norm: a row for every 2 x 2 rows of a state warpgroup's registers.
constexpr int kSsdSquaresRows = 32;
constexpr int kSsdSquaresStride = kSsdChunk + 8;  // floats; four rows meet no bank twice

// Bytes in shared memory before the tiles: barriers, 1 / rms, decays.
constexpr int ssd_scan_sm90_tiles_offset(int heads) {
  return round_up(512 + 2 * kSsdChunk * 4 + kSsdDecaySlots * heads * 4 * kSsdChunk * 4, 1024);
}

struct SsdMachine {
  std::int64_t sms;  // multiprocessors
  double gb_s;       // what a copy moves, read and written
};

struct SsdScanSm90Shape {
  std::int64_t rows;       // batch rows
  std::int64_t sequences;  // packed sequences, 0 when they are not packed
  std::int64_t tokens;     // of a batch row
  std::int64_t heads, x_heads, b_heads, c_heads;
  int head_dim, state_dim;
  bool norm;
};

// How the work is cut.  Neighbouring head slots form a bundle: their CTAs walk side by side and
// share what they read through L2.  All chunks of all sequences of all bundles stand in one line,
// sequence after sequence; the line is cut into units of equal length, and a unit is walked by the
// CTAs of its bundle.  Where a cut falls inside a sequence, a first kernel walks what lies before
// it for the state alone: not to walk long, cuts lie as far to the front as they can.
struct SsdScanSm90Config {
  int heads;                       // of a CTA: 128 / P
  int head_slots;                  // CTAs side by side over the heads
  bool share_c, share_b, share_x;  // two heads of a CTA read the same tiles
  // A stage holds C, B and x, in bytes; *_step leads from one head's (x: 64-column block's) tiles
  // to the next's.
  int c_step, b_step, x_step, b_offset, x_offset, stage_bytes, stages;
  int zy_slots;  // ring of z and y, 16 KiB each
  // Of the rings of z and y and of the masked scores, and of the sums of squares for the norm.
  int zy_offset, pm_offset, squares_offset;
  int smem_bytes;
  // The walk for the states: a stage holds B and x.
  int state_stage_bytes, state_stages, state_smem_bytes;
  int width, bundles;  // slots of a bundle, bundles
  // A grain is 2^grain_shift chunks: cuts fall between grains.
  int grain_shift;
  std::int64_t grains;  // of a sequence (packed: of one that holds all tokens)
  std::int64_t line;    // grains of all bundles (packed: at most)
  std::int64_t units;   // shares of the line
  int snap;             // a cut as near to a sequence's (or a head's) end, in grains, moves there
  bool cut;             // some cut may fall inside a sequence
  // Not packed.  Every unit walks `wholes` sequences of its own and a share of the first
  // `cut_lines`.  Each of those ends in `tails` units of `tail` grains; the `head` grains before
  // them stand in a line of `head_units` equal shares (the first `more` have one grain more).
  int wholes, cut_lines, tails, tail, head, head_units, share, more;
  // The walk for the states up to the last tail of every cut sequence, `state_line` chunks each, in
  // equal shares of their own (the first `state_more` have one chunk more).
  int state_line, state_units, state_share, state_more;
  int state_cuts_shift;      // packed: parts of a unit in the walk for the states: a power of two
  std::int64_t items;        // units x slots of a bundle
  std::int64_t state_items;  // shares or parts of the walk for the states x slots of a bundle
  std::int64_t state_slots;  // states that it may leave
};

// Grains of a sequence: an empty one has one, because its state is passed through.
template <typename Int>
constexpr Int ssd_scan_grains(Int tokens, int grain_shift) {
  return tokens <= 0 ? 1 : ((tokens - 1) / kSsdChunk >> grain_shift) + 1;
}

// Where unit `u` begins in the line, before it snaps.
template <typename Int>
constexpr Int ssd_scan_cut(Int share, Int more, Int u) {
  return share * u + (u < more ? u : more);
}
// How far a cut at grain `at` of a sequence of `grains` moves.
constexpr std::int64_t ssd_scan_snap(std::int64_t at, std::int64_t grains, int snap) {
  if (at <= snap) return -at;
  return grains - at <= snap ? grains - at : 0;
}

// ---- where units and the shares of the walk for the states lie; sequences that are not packed

// `left` grains from grain `grain` of sequence `line` (of bundle line / rows) on, of which every
// sequence gives those before `stop`.
struct SsdRun {
  int line, grain, left, stop;
};

// Where unit `u` begins in the line of heads.
constexpr int ssd_scan_head_cut(const SsdScanSm90Config& c, int u) {
  const int at = ssd_scan_cut(c.share, c.more, u);
  return at + static_cast<int>(ssd_scan_snap(at % c.head, c.head, c.snap));
}
// What a unit walks of cut sequences.
constexpr SsdRun ssd_scan_cut_run(const SsdScanSm90Config& c, int unit) {
  if (unit >= c.head_units) {
    const int line = (unit - c.head_units) / c.tails;
    const int tail = unit - c.head_units - line * c.tails;
    return {line, c.head + tail * c.tail, c.tail, static_cast<int>(c.grains)};
  }
  const int begin = ssd_scan_head_cut(c, unit), line = begin / c.head;
  return {line, begin - line * c.head, ssd_scan_head_cut(c, unit + 1) - begin, c.head};
}
// And of whole ones.
constexpr SsdRun ssd_scan_whole_run(const SsdScanSm90Config& c, int unit) {
  const int grains = static_cast<int>(c.grains);
  return {c.cut_lines + unit * c.wholes, 0, c.wholes * grains, grains};
}

// The first cut of cut sequence `line` beyond chunk `chunk`, in chunks, and the unit that begins
// there.
struct SsdNextCut {
  int chunk, unit;
};
constexpr SsdNextCut ssd_scan_next_cut(const SsdScanSm90Config& c, int line, int chunk) {
  const int grain = chunk >> c.grain_shift;
  if (grain >= c.head) {
    const int tail = (grain - c.head) / c.tail + 1;
    return {(c.head + tail * c.tail) << c.grain_shift, c.head_units + line * c.tails + tail};
  }
  const int before = line * c.head, at = before + grain;
  int u = (at > c.snap ? at - c.snap : 0) / (c.share + 1);  // begins no later than `at`
  while (u < c.head_units && ssd_scan_head_cut(c, u) <= at) ++u;
  const int cut = ssd_scan_head_cut(c, u) - before;
  if (cut >= c.head) return {c.head << c.grain_shift, c.head_units + line * c.tails};
  // Of several units that begin there, all but the last are empty.
  while (u + 1 < c.head_units && ssd_scan_head_cut(c, u + 1) - before == cut) ++u;
  return {cut << c.grain_shift, u};
}

// Where share `v` of the walk for the states begins, in chunks.
constexpr int ssd_scan_state_cut(const SsdScanSm90Config& c, int v) {
  return ssd_scan_cut(c.state_share, c.state_more, v);
}
// The share that holds chunk `chunk`.
constexpr int ssd_scan_state_unit(const SsdScanSm90Config& c, int chunk) {
  int v = chunk / (c.state_share + 1);
  while (ssd_scan_state_cut(c, v + 1) <= chunk) ++v;
  return v;
}

namespace detail {

constexpr double kSsdStart = 1.5;  // a CTA's first loads and last stores, in chunks of its walk
constexpr double kSsdStateChunk = 0.28;  // a chunk of the walk for the states
constexpr double kSsdStateStart = 1.2;   // its first loads and the store of a state
constexpr double kSsdStateLaunch = 1;    // a second kernel
constexpr double kSsdStatePiece = 0.4;   // a state stored on the way
constexpr double kSsdFold = 0.7;         // reading a state
constexpr double kSsdChunkUs = 2.2;      // a chunk of the main walk where HBM is not in the way
// Parts of the copy's rate that are reached: by the main walk, by the one for the states.
constexpr double kSsdReached = 0.95, kSsdStateReached = 0.8;
constexpr double kSsdBeside = 0.1;  // of what computing or HBM takes less, not hidden by the other
constexpr double kSsdGain = 0.97;   // a plan with cuts must be as much faster than one without
constexpr std::int64_t kSsdLeast = 4;  // chunks of a share

// Time of HBM for one grain of a line, in chunks of the main walk.
struct SsdTraffic {
  double main, state;
};

// SsdScanSm90Config tells what these are.
struct SsdPlan {
  std::int64_t units, wholes, cut_lines, tails, tail, head, head_units, state_units;
  double time;  // in chunks of the main walk
};

constexpr double most_of(double a, double b) { return a > b ? a : b; }
constexpr double side_by_side(double a, double b) {
  return a > b ? a + kSsdBeside * b : b + kSsdBeside * a;
}

// `units` units for `lines` sequences of `grains` chunks, of all bundles: whole sequences as far as
// they can be dealt out evenly.  Of the others every sequence ends in as many whole units as it
// can, because only what lies before the last of them has to be walked for the state.
constexpr SsdPlan ssd_scan_plan(std::int64_t lines, std::int64_t grains, std::int64_t units,
                                std::int64_t at_once, SsdTraffic hbm) {
  SsdPlan best = {};
  const std::int64_t wholes = lines / units, cut = lines - wholes * units;
  const double of_wholes = static_cast<double>(wholes) * (static_cast<double>(grains) + kSsdStart);
  const double moved = static_cast<double>(lines * grains) * hbm.main / kSsdReached + kSsdStart;
  if (cut == 0) {
    const double waves = static_cast<double>(ceil_div(units, at_once));
    best = {units, wholes, 0, 0, 0, 0, 0, 0, side_by_side(waves * of_wholes, moved)};
    return best;
  }
  const std::int64_t parts = units / cut, tails = parts * cut == units ? parts - 1 : parts;
  const std::int64_t head_units = units - tails * cut, even = cut * grains / units;
  for (std::int64_t tail = even > 8 ? even - 8 : 1; tail <= even + 2; ++tail) {
    const std::int64_t head = grains - tails * tail, line = grains - tail;
    if (tail < kSsdLeast || head < 1) continue;
    const std::int64_t share = ceil_div(cut * head, head_units), walked = cut * line;
    const double pieces =
        cut == head_units ? 1. : 1. + static_cast<double>(share) / static_cast<double>(head);
    // The walk for the states in as many shares as fit at once, or in whole ones of every sequence,
    // which are longer, but fewer of them meet in a sequence.
    const std::int64_t most = ceil_div(walked, kSsdLeast), fit = most < at_once ? most : at_once;
    for (const std::int64_t shares : {fit, fit / cut * cut}) {
      if (shares < 1) continue;
      const std::int64_t walk = ceil_div(walked, shares);
      const bool aligned = shares % cut == 0 && walk * shares == walked;
      const auto folds = [&](std::int64_t before) {
        return kSsdFold * static_cast<double>(ceil_div(before, walk) + (aligned ? 0 : 1));
      };
      const double of_tail = static_cast<double>(tail) + kSsdStart + folds(line);
      const double of_head =
          static_cast<double>(share) + kSsdStart * pieces + (cut == head_units ? 0. : folds(head));
      // Cuts of the main walk and ends of sequences in a share.
      const std::int64_t ends = aligned && tails == 1 ? 0 : ceil_div(walk * tails, line);
      const double states = kSsdStateStart + kSsdStatePiece * static_cast<double>(ends) +
                            most_of(kSsdStateChunk * static_cast<double>(walk),
                                    static_cast<double>(walked) * hbm.state / kSsdStateReached);
      const double time =
          side_by_side(of_wholes + most_of(of_tail, of_head), moved) + kSsdStateLaunch + states;
      if (best.units == 0 || time < best.time)
        best = {units, wholes, cut, tails, tail, head, head_units, shares, time};
    }
  }
  return best;
}

// Cuts `lines` sequences of `grains` chunks each: not at all, into equal parts, or into as many
// shares as the machine takes at once.
constexpr SsdPlan ssd_scan_cuts(std::int64_t lines, std::int64_t grains, std::int64_t at_once,
                                SsdTraffic hbm) {
  SsdPlan best = ssd_scan_plan(lines, grains, lines, at_once, hbm);
  best.time *= kSsdGain;
  const auto attempt = [&](std::int64_t units) {
    const SsdPlan plan = ssd_scan_plan(lines, grains, units, at_once, hbm);
    if (plan.units > 0 && plan.time < best.time) best = plan;
  };
  attempt(at_once);
  for (std::int64_t n = 2; n * lines <= at_once; ++n) attempt(n * lines);
  return best;
}

}  // namespace detail

// `invariant`: cuts every 2048 tokens of a sequence whatever the batch, so that its result does not
// depend on what else is computed.
constexpr SsdScanSm90Config select_ssd_scan_sm90_config(const SsdScanSm90Shape& s,
                                                        const SsdMachine& machine, bool invariant) {
  const std::int64_t sms = machine.sms;
  SsdScanSm90Config c = {};
  c.heads = 128 / s.head_dim;
  c.head_slots = static_cast<int>(ceil_div<std::int64_t>(s.heads, c.heads));
  // Two heads of a CTA share a tile where every such pair does.
  const auto shared = [&](std::int64_t groups) {
    return c.heads == 1 || (s.heads / groups) % c.heads == 0;
  };
  const int state_tiles = s.state_dim / 64 * kSsdTileBytes;
  c.share_c = shared(s.c_heads), c.share_b = shared(s.b_heads), c.share_x = shared(s.x_heads);
  c.c_step = c.share_c ? 0 : state_tiles;
  c.b_step = c.share_b ? 0 : state_tiles;
  c.x_step = c.heads == 2 && c.share_x ? 0 : kSsdTileBytes;
  c.b_offset = (c.share_c ? 1 : 2) * state_tiles;
  c.x_offset = c.b_offset + (c.share_b ? 1 : 2) * state_tiles;
  c.stage_bytes = c.x_offset + (c.x_step == 0 ? 1 : 2) * kSsdTileBytes;
  const int tiles = ssd_scan_sm90_tiles_offset(c.heads);
  const int rings[][2] = {{4, 3}, {4, 2}, {3, 3}, {3, 2}, {2, 3}, {2, 2}, {1, 3}};
  for (const auto& r : rings) {
    c.stages = r[0], c.zy_slots = r[1];
    c.zy_offset = tiles + c.stages * c.stage_bytes;
    c.pm_offset = c.zy_offset + c.zy_slots * 2 * kSsdTileBytes;
    c.squares_offset = c.pm_offset + kSsdPmSlots * c.heads * kSsdTileBytes;
    c.smem_bytes = c.squares_offset + (s.norm ? kSsdSquaresRows * kSsdSquaresStride * 4 : 0);
    if (c.smem_bytes <= kSsdSm90SmemBytes) break;
  }
  c.state_stage_bytes = c.stage_bytes - c.b_offset;
  const int most = (kSsdSm90SmemBytes - tiles) / c.state_stage_bytes;
  c.state_stages = most < kSsdMostStages ? most : kSsdMostStages;
  c.state_smem_bytes = tiles + c.state_stages * c.state_stage_bytes;

  // A bundle: up to 16 slots, whole groups that read the same x and B, that leave the fewest
  // multiprocessors without work; of those the most, because neighbours share DRAM pages.
  const std::int64_t group = s.heads / (s.x_heads > s.b_heads ? s.x_heads : s.b_heads);
  const std::int64_t whole = group % c.heads == 0 ? group / c.heads : 1;  // slots of a group
  c.width = 1;
  for (int w = 2; w <= 16 && w <= sms; ++w)
    if (c.head_slots % w == 0 && (w % whole == 0 || whole > 16) &&
        (sms / w * w >= sms / c.width * c.width || c.width % whole != 0))
      c.width = w;
  c.bundles = c.head_slots / c.width;
  const std::int64_t at_once = sms < c.width ? 1 : sms / c.width;
  constexpr int kSnap = 2, kInvariantShift = 5;  // 2^5 chunks are 2048 tokens
  constexpr int kInvariantCuts = 2;              // 2^2 shares of them for the states
  const bool packed = s.sequences > 0;
  c.grain_shift = invariant ? kInvariantShift : 0;
  c.snap = invariant ? 0 : kSnap;
  c.grains = ssd_scan_grains(s.tokens, c.grain_shift);
  const std::int64_t lines = c.bundles * (packed ? s.sequences : s.rows);
  if (packed) {  // lengths are known to the device alone; every sequence may end in a part of a
                 // grain
    c.state_cuts_shift = invariant ? kInvariantCuts : 1;
    c.line = c.bundles * ((s.tokens / kSsdChunk >> c.grain_shift) + s.sequences);
    const std::int64_t useful = ceil_div(c.line, detail::kSsdLeast);
    c.units = invariant ? c.line : useful < at_once ? useful : at_once;
    c.cut = invariant ? c.grains > 1 : c.units > 1 && c.grains > 2 * kSnap + 1;
    if (!c.cut) {  // a grain is a whole sequence
      c.grain_shift = 25;
      c.grains = 1;
      c.units = c.line = lines;
      c.wholes = 1;
    }
    c.items = c.units * c.width;
    c.state_items = c.state_slots = c.cut ? c.items << c.state_cuts_shift : 0;
    return c;
  }
  c.line = lines * c.grains;
  detail::SsdPlan plan = {};
  if (invariant && c.grains > 1) {  // every grain a unit
    plan = {c.line, 0, lines, c.grains - 1, 1, 1, lines, 0, 0};
    plan.state_units = (c.grains - 1) * lines << kInvariantCuts;
  } else if (invariant || lines == 0) {
    plan = {lines, 1, 0, 0, 0, 0, 0, 0, 0};
  } else {
    // Elements of a token: x and B; all that is read and written.
    const std::int64_t inputs = s.x_heads * s.head_dim + s.b_heads * s.state_dim;
    const std::int64_t all = inputs + s.c_heads * s.state_dim + 2 * s.heads * s.head_dim;
    const double us = 2.0 * kSsdChunk / (1e3 * machine.gb_s) / static_cast<double>(c.bundles);
    plan = detail::ssd_scan_cuts(lines, c.grains, at_once,
                                 {static_cast<double>(all) * us / detail::kSsdChunkUs,
                                  static_cast<double>(inputs) * us / detail::kSsdChunkUs});
  }
  const auto narrow = [](std::int64_t v) { return static_cast<int>(v); };
  c.units = plan.units;
  c.wholes = narrow(plan.wholes), c.cut_lines = narrow(plan.cut_lines);
  c.tails = narrow(plan.tails), c.tail = narrow(plan.tail), c.head = narrow(plan.head);
  c.head_units = narrow(plan.head_units), c.state_units = narrow(plan.state_units);
  c.cut = plan.cut_lines > 0;
  if (c.cut) {
    const std::int64_t heads = plan.cut_lines * plan.head;
    c.share = narrow(heads / plan.head_units), c.more = narrow(heads % plan.head_units);
    c.state_line = narrow((c.grains - plan.tail) << c.grain_shift);
    const std::int64_t walked = plan.cut_lines * ((c.grains - plan.tail) << c.grain_shift);
    c.state_share = narrow(walked / plan.state_units);
    c.state_more = narrow(walked % plan.state_units);
  }
  c.items = c.units * c.width;
  c.state_items = c.state_units * c.width;
  c.state_slots = c.cut ? (c.state_units + c.units) * c.width : 0;
  return c;
}

}  // namespace zebra
