// linear_decode on Hopper: how rows of the weight are dealt to CTAs and what a CTA holds.  Pure, so
// that tests can print and check the choice.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zebra {

constexpr int kLinearMostTokens = 128;  // rows of x
constexpr int kLinearBox = 64;          // elements of K that one copy brings: 128 bytes of a row
constexpr int kLinearMostStages = 16;
constexpr int kLinearHeaderBytes = 3072;  // barriers and sums of squares

// Shared memory of a CTA where two fit on a multiprocessor, and where one does (sm_90).
constexpr int kLinearHalfSmemBytes = 115712, kLinearWholeSmemBytes = 232448;

// Below this many rows of the weight, and from 64 rows of x on, two CTAs share rows and halve K:
// then x is read half as often.  A function of the shape alone, because it decides how sums are
// split.
constexpr std::int64_t kLinearSplitRows = 8448;

// Few outputs make units of few rows, and the 64 rows of a product hold several slices of K of the
// same rows: of 16 rows 4, of 32 rows 2, where outputs are at most so many.  Again by shape alone.
constexpr std::int64_t kLinearFourSlices = 2112, kLinearTwoSlices = 4224;
constexpr int kLinearMostSlicedTokens = 32;

struct LinearDecodeSm90Shape {
  std::int64_t rows, outputs, K;
  bool swiglu, norm;
  int norm_bytes;  // of an element of norm_weight
};

// A unit is `unit` outputs; a cluster of 1 or 2 CTAs computes `units` of them one after another,
// each of its CTAs over a part of K.  A step is `boxes` copies along K: one stage of the ring.
struct LinearDecodeSm90Config {
  int tokens;     // columns of the product: rows of x, padded to 8, 16, 32, 64 or 128
  int row_tiles;  // warpgroups that multiply, 64 rows of the product each
  int cluster;    // CTAs that share the rows of a unit
  int slices;     // boxes along K that one product takes together
  int unit;
  int units;                // of a cluster
  int clusters;             // in all
  int boxes;                // of the weight in a stage
  int steps;                // of a unit, over both CTAs of a cluster
  int second_offset;        // bytes from the first warpgroup's rows of a box to the second's
  int weight_box, x_box;    // bytes in shared memory from one box to the next
  int gain_bytes;           // of norm_weight that belong to a stage
  int x_offset;             // in a stage
  int stage_bytes, stages;  // of the ring
  int ahead;                // stages of the weight asked for into L2 ahead of the ring
  bool keeps_ahead;         // to the end, rather than once, while x is not there yet
  int staging_offset;       // fp32 sums on their way out
  int gain_offset;          // the gains of all stages, one behind the other
  int smem_bytes;
};

// Tokens whose sums lie in shared memory together on their way out, and the floats between them.
constexpr int linear_staged_tokens(int tokens) { return tokens < 32 ? tokens : 32; }
constexpr int linear_staging_pitch(int row_tiles) { return 64 * row_tiles + 4; }

// What a caller may fix to measure with; 0: chosen here.
struct LinearDecodeSm90Tuning {
  int cluster = 0, boxes = 0, smem_bytes = 0;
  int ahead_bytes = -1;  // of the weight in L2 ahead of a CTA's ring; -1: chosen here
  bool keeps_ahead = false, starts_next_first = false;
};

// Bytes of the weight that a CTA asks for into L2 when its ring is full and x is not there yet.
// The next launch's ring fills beside the tail of this one's, so without more to fetch HBM would
// idle from there until x has come and the ring has turned: about 2 us, or 6 MB.
constexpr int kLinearAheadBytes = 65536;

// Whether a CTA takes the shared memory of a multiprocessor for itself: then a launch starts when
// the one before it has ended, but its ring holds twice as much.
constexpr bool linear_fills_sm(int tokens, int row_tiles) { return tokens * row_tiles > 64; }
// CTAs of a multiprocessor that registers are kept for.
constexpr int linear_ctas_of_sm(int tokens, int row_tiles) {
  return tokens > 32 && row_tiles == 2 ? 1 : 2;
}

constexpr LinearDecodeSm90Config select_linear_decode_sm90_config(
    const LinearDecodeSm90Shape& s, int sms, const LinearDecodeSm90Tuning& tuning = {}) {
  LinearDecodeSm90Config c = {};
  c.tokens = 8;
  while (c.tokens < s.rows) c.tokens *= 2;
  const std::int64_t weight_rows = s.swiglu ? 2 * s.outputs : s.outputs;
  c.cluster = c.tokens >= 64 && weight_rows < kLinearSplitRows ? 2 : 1;
  if (tuning.cluster != 0 && c.tokens >= 64) c.cluster = tuning.cluster;

  const bool sliced = !s.swiglu && c.tokens <= kLinearMostSlicedTokens;
  c.slices = !sliced                          ? 1
             : s.outputs <= kLinearFourSlices ? 4
             : s.outputs <= kLinearTwoSlices  ? 2
                                              : 1;

  // The outputs in even shares: as many units a cluster as keep a unit within the rows of one
  // product, and units as small as cover all.
  const int most = c.slices > 1 ? 64 / c.slices : s.swiglu ? 64 : 128;
  const std::int64_t slots = sms / c.cluster < 1 ? 1 : sms / c.cluster;
  const std::int64_t units = ceil_div(ceil_div(s.outputs, slots), std::int64_t{most});
  const std::int64_t share = ceil_div(s.outputs, slots * units);
  c.unit = static_cast<int>(share < 8 ? 8 : share);
  c.units = static_cast<int>(units);
  c.clusters = static_cast<int>(ceil_div(ceil_div<std::int64_t>(s.outputs, c.unit), units));
  c.row_tiles = s.swiglu || c.unit > 64 ? 2 : 1;

  const int box_rows = round_up(c.unit * 2 * kLinearBox, 1024);
  c.second_offset = s.swiglu ? box_rows : 64 * 2 * kLinearBox;
  c.weight_box = s.swiglu ? 2 * box_rows : box_rows;
  c.x_box = c.tokens * 2 * kLinearBox;
  // 8 KB of the weight a stage, but no more than 24 KB in all: copies come and go in small pieces.
  c.boxes = 1;
  while (c.boxes < 4 && c.boxes * c.weight_box < 8192 &&
         2 * c.boxes * (c.weight_box + c.x_box) <= 24 * 1024)
    c.boxes *= 2;
  if (tuning.boxes != 0) c.boxes = tuning.boxes;
  if (c.boxes < c.slices) c.boxes = c.slices;
  c.steps = static_cast<int>(ceil_div<std::int64_t>(s.K, kLinearBox * c.boxes));
  c.x_offset = c.boxes * c.weight_box;
  c.stage_bytes = c.x_offset + c.boxes * c.x_box;
  c.gain_bytes = s.norm ? c.boxes * kLinearBox * s.norm_bytes : 0;

  // Sums of the other CTA's half of the tokens, or of the tokens that are on their way out.
  const int exchanged = c.cluster == 2 ? c.tokens / 2 * 64 * c.row_tiles * 4 : 0;
  const int staged = linear_staged_tokens(c.tokens) * linear_staging_pitch(c.row_tiles) * 4;
  const int staging = round_up(exchanged > staged ? exchanged : staged, 1024);
  // A product reads 64 rows from where a box starts, also where the box has fewer.
  const int past = (c.row_tiles - 1) * c.second_offset + 64 * 2 * kLinearBox;
  const int behind = c.stage_bytes - (c.boxes - 1) * c.weight_box + staging;
  const int slack = past > behind ? past - behind : 0;
  int most_bytes =
      linear_fills_sm(c.tokens, c.row_tiles) ? kLinearWholeSmemBytes : kLinearHalfSmemBytes;
  if (tuning.smem_bytes != 0) most_bytes = tuning.smem_bytes;
  const int fit =
      (most_bytes - kLinearHeaderBytes - staging - slack) / (c.stage_bytes + c.gain_bytes);
  const int needed = ceil_div(c.steps, c.cluster) * c.units;
  c.stages = fit < kLinearMostStages ? fit : kLinearMostStages;
  if (needed < c.stages) c.stages = needed;
  c.ahead = (tuning.ahead_bytes < 0 ? kLinearAheadBytes : tuning.ahead_bytes) / c.x_offset;
  c.keeps_ahead = tuning.keeps_ahead;
  c.staging_offset = kLinearHeaderBytes + c.stages * c.stage_bytes;
  c.gain_offset = c.staging_offset + staging;
  c.smem_bytes = c.gain_offset + c.stages * c.gain_bytes + slack;
  return c;
}

// A stage is given back when the products of the next one have been issued: a ring of one stage
// holds all there is.
constexpr bool linear_ring_turns(const LinearDecodeSm90Config& c) {
  return c.stages >= 2 || (c.stages == 1 && ceil_div(c.steps, c.cluster) * c.units == 1);
}

}  // namespace zebra
