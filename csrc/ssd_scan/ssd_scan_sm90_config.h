// ssd_scan on Hopper: what one CTA holds and how sequences are cut.  Pure, so that tests can print
// and check the choice.
#pragma once

#include <cstdint>

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
// it for the state alone.
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
  std::int64_t grains;       // of a sequence (packed: of one that holds all tokens)
  std::int64_t line;         // grains of all bundles (packed: at most)
  std::int64_t units;        // equal shares of the line
  std::int64_t share, more;  // grains of a unit; the first `more` units have one more (not packed)
  int snap;                  // a cut as near to a sequence's end, in grains, moves there
  bool cut;                  // some cut may fall inside a sequence
  int state_cuts_shift;      // parts of a unit in the walk for the states: a power of two
  std::int64_t items;        // units x slots of a bundle
  std::int64_t state_items;  // x parts
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

namespace detail {

constexpr double kSsdStart = 1.5;  // a CTA's first loads and last stores, in chunks of its walk
constexpr double kSsdStateChunk = 0.18;  // a chunk of the walk for the states
constexpr double kSsdStateStart = 1.2;   // its first loads and the store of a state
constexpr double kSsdStateLaunch = 1;    // a second kernel
constexpr double kSsdFold = 0.3;         // reading the state of a part
constexpr double kSsdChunkUs = 2.2;      // a chunk of the main walk where HBM is not in the way
// Parts of the copy's rate that are reached: by whole sequences side by side, by cut ones.
constexpr double kSsdWhole = 0.95, kSsdCut = 0.8;

// Time of HBM for one grain of a line, in chunks of the main walk.
struct SsdTraffic {
  double main, state;
};

struct SsdCuts {
  double time;  // in chunks of the main walk
  std::int64_t units;
  int state_cuts_shift;
};

// The time of `units` units for `lines` sequences of `grains` chunks each (of all bundles), with
// `at_once` units on the machine.
constexpr SsdCuts ssd_scan_time(std::int64_t lines, std::int64_t grains, std::int64_t units,
                                std::int64_t at_once, int snap, SsdTraffic hbm) {
  const std::int64_t line = lines * grains, share = line / units;
  // Grains to walk for states, the units that have any, the most of a unit.
  std::int64_t walked = 0, walks = 0, longest = 0, size = 0, before = 0;
  for (std::int64_t u = 1; u <= units; ++u) {
    std::int64_t at = ssd_scan_cut(share, line % units, u);
    at += ssd_scan_snap(at % grains, grains, snap);
    const std::int64_t inside = at % grains, own = at - before;
    size = own > size ? own : size;
    const std::int64_t walk = inside < own ? inside : own;
    walked += walk, walks += walk > 0;
    longest = walk > longest ? walk : longest;
    before = at;
  }
  const double pieces = 1 + static_cast<double>(share) / static_cast<double>(grains);
  const double waves = static_cast<double>(ceil_div(units, at_once));
  const double computed = waves * (static_cast<double>(size) + kSsdStart * pieces);
  const double moved =
      static_cast<double>(line) * hbm.main / (walked == 0 ? kSsdWhole : kSsdCut) + kSsdStart;
  const double main = computed > moved ? computed : moved;
  SsdCuts best = {main, units, 0};
  if (walked == 0) return best;
  for (int shift = 0; shift <= 3; ++shift) {
    const std::int64_t cuts = std::int64_t{1} << shift;
    const double part = static_cast<double>(ceil_div(longest, cuts));
    const double parts = static_cast<double>(ceil_div(walks * cuts, at_once));
    const double even = static_cast<double>(walked) / static_cast<double>(at_once);
    const double walk =
        0.5 * (even + parts * part);  // between evenly and all as long as the longest
    const double products = kSsdStateChunk * walk;
    const double traffic = static_cast<double>(walked) * hbm.state / kSsdCut;
    const double states = parts * kSsdStateStart + (products > traffic ? products : traffic);
    const double folds = kSsdFold * static_cast<double>(cuts) * waves;
    const double time = main + kSsdStateLaunch + states + folds;
    if (shift == 0 || time < best.time) best = {time, units, shift};
  }
  return best;
}

// Cuts `lines` sequences of `grains` chunks each: whole sequences, equal parts of them, or as many
// equal shares as the machine takes at once.
constexpr SsdCuts ssd_scan_cuts(std::int64_t lines, std::int64_t grains, std::int64_t at_once,
                                int snap, SsdTraffic hbm) {
  constexpr std::int64_t kLeast = 4;  // chunks of a unit
  constexpr std::int64_t kWaves = 4;  // of units that are tried: more sequences need no cuts
  if (lines > kWaves * at_once) return {0, lines, 0};
  SsdCuts best = ssd_scan_time(lines, grains, lines, at_once, snap, hbm);
  const auto attempt = [&](std::int64_t units) {
    if (units > kWaves * at_once || units * kLeast > lines * grains) return;
    const SsdCuts c = ssd_scan_time(lines, grains, units, at_once, snap, hbm);
    if (c.time < best.time) best = c;
  };
  attempt(at_once);
  for (std::int64_t n = 2; n <= 16; ++n) attempt(lines * n);
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
  constexpr std::int64_t kLeast = 4;             // grains of a unit, on average
  const bool packed = s.sequences > 0;
  c.grain_shift = invariant ? kInvariantShift : 0;
  c.snap = invariant ? 0 : kSnap;
  c.state_cuts_shift = invariant ? 2 : 1;
  c.grains = ssd_scan_grains(s.tokens, c.grain_shift);
  const std::int64_t lines = c.bundles * (packed ? s.sequences : s.rows);
  c.line = lines * c.grains;
  if (packed)  // every sequence may add a grain that is not full
    c.line = c.bundles * ((s.tokens / kSsdChunk >> c.grain_shift) + s.sequences);
  if (invariant) {
    c.units = c.line;
    c.cut = c.grains > 1;
  } else if (packed) {  // lengths are known to the device alone
    const std::int64_t useful = ceil_div(c.line, kLeast);
    c.units = useful < at_once ? useful : at_once;
    c.cut = c.units > 1 && c.grains > 2 * kSnap + 1;
  } else {
    // Elements of a token: x and B; all that is read and written.
    const std::int64_t inputs = s.x_heads * s.head_dim + s.b_heads * s.state_dim;
    const std::int64_t all = inputs + s.c_heads * s.state_dim + 2 * s.heads * s.head_dim;
    const double us = 2.0 * kSsdChunk / (1e3 * machine.gb_s) / static_cast<double>(c.bundles);
    const detail::SsdTraffic hbm = {static_cast<double>(all) * us / detail::kSsdChunkUs,
                                    static_cast<double>(inputs) * us / detail::kSsdChunkUs};
    const detail::SsdCuts cuts = detail::ssd_scan_cuts(lines, c.grains, at_once, c.snap, hbm);
    c.units = cuts.units, c.state_cuts_shift = cuts.state_cuts_shift;
    c.cut = c.units != lines;
  }
  if (packed && !c.cut) {  // a grain is a whole sequence
    c.grain_shift = 25;
    c.grains = 1;
    c.units = c.line = lines;
  }
  c.share = c.units == 0 ? 0 : c.line / c.units;
  c.more = c.units == 0 ? 0 : c.line % c.units;
  c.items = c.units * c.width;
  c.state_items = c.cut ? c.items << c.state_cuts_shift : 0;
  return c;
}

}  // namespace zebra
