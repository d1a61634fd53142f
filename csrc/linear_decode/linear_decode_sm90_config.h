// linear_decode on Hopper: how rows of the weight are dealt to CTAs and what a CTA holds.  Pure, so
// that tests can print and check the choice.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zebra {

constexpr int kLinearMostTokens = 128;  // rows of x
constexpr int kLinearBox = 64;          // elements of K in a box: 128 bytes of a row
constexpr int kLinearMostStages = 16;
constexpr int kLinearHeaderBytes = 1024;  // barriers
constexpr int kLinearThreads = 384;       // a warpgroup that loads, two that multiply

// Shared memory of a CTA where two fit on a multiprocessor, and where one does (sm_90).  Both leave
// 2 KB for the norm's CTA (linear_decode_sm90_norm.cuh).
constexpr int kLinearHalfSmemBytes = 114688, kLinearWholeSmemBytes = 230400;

// Below this many rows of the weight, and from 64 rows of x on, two CTAs share rows and halve K:
// then x is read half as often.  With 32 rows of x too, where the weight is not so large that the
// exchange is all that is seen.  A function of the shape alone, because it decides how sums are
// split.
constexpr std::int64_t kLinearSplitRows = 4608, kLinearSplitWeight = 1 << 25;
// Each then finishes half of the tokens: halves of the sums, which slices' are not.
constexpr bool linear_may_pair(int tokens, int slices) { return tokens >= 32 && slices == 1; }

// Few outputs make units of few rows, and the 64 rows of a product hold several slices of K of the
// same rows: of 16 rows 4, of 32 rows 2, where outputs are at most so many.  Again by shape alone.
constexpr std::int64_t kLinearFourSlices = 2112, kLinearTwoSlices = 4224;
constexpr int kLinearMostSlicedColumns = 64;  // of a product: slices times tokens

// Bytes of the weight in a stage, at least, where the ring stays long: every stage costs both ends
// of the ring a handshake and a copy of x, whatever it brings.
constexpr int kLinearStageWeightBytes = 12288;

// Boxes along K in a stage, at least, where the ring still has a few stages: HBM is read faster in
// runs of 512 bytes of a row than in runs of 128.  With more tokens x takes the room, and with the
// norm of few h does.
constexpr int linear_run_boxes(int tokens, bool norms) {
  return norms || tokens > 64 ? 1 : tokens > 16 ? 2 : 4;
}
constexpr int kLinearRunStages = 4;

// Two CTAs share a multiprocessor where one reads no more than this in all.
constexpr int kLinearHalfBytes = 272 * 1024;

// Bytes that a CTA has yet to ask for when it lets the next launch start, whose ring should fill
// when this one's has no more to do: earlier, and the next one's stages come before the last ones
// of this; later, and memory waits.  With few tokens, and no norm in between, what follows is
// short.
constexpr int kLinearLastBytes = 65536, kLinearLastBytesOfFew = 131072;

// Of four multiprocessors so many have work, at least, where units are rounded up to whole boxes.
constexpr int kLinearBusyOfFour = 3;

// Up to 16 tokens, CTAs of more rows than this have units of one product's 64: stages of long runs
// are then small enough for a ring of many.
constexpr std::int64_t kLinearTallShare = 96;

// Where at most 4 rows of x are normalised, every CTA does it for itself: all of h lies in its
// shared memory, whatever the ring brings.  Longer rows would leave the ring too little, and of
// more rows the work shows more than the launch that they have before this one.
constexpr std::int64_t kLinearMostNormedRows = 4, kLinearMostNormedK = 6144;
constexpr bool linear_norms_itself(std::int64_t rows, std::int64_t K) {
  return rows <= kLinearMostNormedRows && K <= kLinearMostNormedK;
}

// Shared memory besides h and gain where two CTAs are to fit on a multiprocessor.
constexpr int kLinearRingBesideNormBytes = 73728;

struct LinearDecodeSm90Shape {
  std::int64_t rows, outputs, K;
  bool swiglu;
  bool norm = false;
  bool projects = false;            // units of even outputs, and what a projection looks up
  std::int64_t second_outputs = 0;  // of another weight
};

// The most rows of x for which this kernel is faster than ATen's product with the norm and the
// residual in launches of their own (measured over the projections of 1B to 8B models, 1 to 128
// rows).  Up to 64 it always is.  Beyond, where products are two that are combined, where rows of W
// are long and its sums few, and where pairs of CTAs fill their products with them, 4096 x 4096;
// with more fused also where W has fewer than twice as many rows as columns.
constexpr std::int64_t kLinearVocabulary = 24576;
constexpr std::int64_t kLinearLeastPaired = 4096, kLinearMostPaired = 4224, kLinearPairedK = 4096;
constexpr std::int64_t linear_most_rows(const LinearDecodeSm90Shape& s, bool is_plain) {
  const bool is_paired =
      s.outputs >= kLinearLeastPaired && s.outputs <= kLinearMostPaired && s.K >= kLinearPairedK;
  const bool is_long = !s.norm && s.K >= 2 * s.outputs;
  const bool is_fused = !is_plain && s.outputs < 2 * s.K && s.outputs < kLinearVocabulary;
  return s.swiglu || is_paired || is_long || is_fused ? kLinearMostTokens : 64;
}

// A unit is `unit` outputs; a cluster of 1 or 2 CTAs computes `units` of them one after another,
// each of its CTAs over a part of K.  A step is `boxes` boxes along K: one stage of the ring.
struct LinearDecodeSm90Config {
  int tokens;     // columns of the product: rows of x, padded to 8, 16, 32, 64 or 128
  int row_tiles;  // products of 64 rows that a unit needs: of 2, each is one warpgroup's; of 1,
                  // both take half of the tokens or every other `slices` boxes along K
  int cluster;    // CTAs that share the rows of a unit
  int slices;     // boxes along K that one product takes together
  int unit;
  int units;        // of a cluster
  int first_units;  // those of the first weight, before those of the second
  int all_units;
  int clusters;             // in all
  int box_rows;             // rows of the weight in a box: `unit`, rounded up to 8
  int x_rows;               // of x: those that there are, rounded up to 8, but with slices `tokens`
  int boxes;                // of the weight in a stage
  int steps;                // of a unit, over both CTAs of a cluster
  int second_offset;        // bytes from the first 64 rows of a box, or the gate's, to the others
  int weight_box, x_box;    // bytes in shared memory from one box to the next
  int x_offset;             // in a stage
  int stage_bytes, stages;  // of the ring
  int staging_offset;       // fp32 sums on their way out, or to the other CTA
  int merge_offset;         // sums of the second warpgroup, where two CTAs share a unit of one tile
  bool norms;       // h = norm(x) lies in shared memory as a whole, and stages bring W alone
  int h_offset;     // its boxes
  int gain_offset;  // the norm's weight
  bool projects;
  int tokens_offset;  // what a projection looks up of every row of x
  int smem_bytes;
  int last_loads;  // stages that a CTA has yet to ask for when it lets the next launch start
};

// Whether the warpgroups of a unit of one tile have half of the tokens each, so that nobody adds up
// what they have: of many tokens that takes longer than to read a box of the weight twice.
constexpr bool linear_halves_tokens(int tokens, int row_tiles) {
  return row_tiles == 1 && tokens > 64;
}
// Into which sums along K are split within a CTA.
constexpr int linear_parts(int tokens, int row_tiles) {
  return row_tiles == 1 && !linear_halves_tokens(tokens, row_tiles) ? 2 : 1;
}

// Tokens whose sums lie in shared memory together on their way out, and the floats between them.
// Of two CTAs that share a unit one finishes as many, or twice.
constexpr int linear_staged_tokens(int tokens, int row_tiles) {
  if (linear_halves_tokens(tokens, row_tiles)) return tokens / 2;
  return tokens < 16 ? 8 : tokens > 32 ? 32 : 16;
}
constexpr int linear_staging_pitch(int row_tiles) { return 64 * row_tiles + 4; }

constexpr int kLinearTokenBytes = 16;  // of a row of x, where a projection looks it up

// Loads of a CTA: its steps, of all its units.
constexpr int linear_loads(const LinearDecodeSm90Config& c) {
  return ceil_div(c.steps, c.cluster) * c.units;
}

// What a caller may fix to measure with; 0, or -1: chosen here.
struct LinearDecodeSm90Tuning {
  int cluster = 0, boxes = 0, smem_bytes = 0, last_bytes = -1;
};

// CTAs of a multiprocessor that registers are kept for.
constexpr int linear_ctas_of_sm(int tokens) { return tokens > 64 ? 1 : 2; }
// And threads: with 128 tokens as if there were more than there are, which leaves registers for the
// norm's CTA.
constexpr int linear_bound_threads(int tokens) { return tokens > 64 ? 512 : kLinearThreads; }

// Stages of `boxes` boxes, and all offsets that follow from it, in at most `most_bytes`.
constexpr void lay_out_linear_ring(LinearDecodeSm90Config& c, std::int64_t K, int boxes,
                                   int most_bytes) {
  c.boxes = boxes;
  c.steps = static_cast<int>(ceil_div<std::int64_t>(K, kLinearBox * c.boxes));
  c.x_offset = c.boxes * c.weight_box;
  c.stage_bytes = c.x_offset + (c.norms ? 0 : c.boxes * c.x_box);

  // Sums of the other CTA's half of the tokens, or of the tokens that are on their way out.
  const int exchanged = c.cluster == 2 ? c.tokens / 2 * 64 * c.row_tiles * 4 : 0;
  const int split = linear_parts(c.tokens, c.row_tiles), parts = c.cluster == 1 ? split : 1;
  const int staged =
      parts * linear_staged_tokens(c.tokens, c.row_tiles) * linear_staging_pitch(c.row_tiles) * 4;
  const int staging = round_up(exchanged > staged ? exchanged : staged, 1024);
  // The ring serves to merge sums when it has nothing else to bring.
  const int needed = linear_loads(c);
  const int merged = c.cluster == 2 && split == 2 ? c.tokens * 64 * 4 : 0;
  const int held = (needed < 2 ? needed : 2) * c.stage_bytes;
  const int merge = c.units == 1 && held >= merged ? 0 : merged;
  const int h = c.norms ? c.steps * c.boxes * c.x_box : 0;
  const int gain = c.norms ? static_cast<int>(round_up<std::int64_t>(4 * K, 1024)) : 0;
  const int tokens = c.projects ? round_up(kLinearTokenBytes * c.tokens, 1024) : 0;
  const int rest = staging + merge + h + gain + tokens;
  // A product reads 64 rows from where a box starts, also where the box has fewer.
  const int past = (c.row_tiles - 1) * c.second_offset + 64 * 2 * kLinearBox;
  const int behind = c.stage_bytes - (c.boxes - 1) * c.weight_box + rest;
  const int slack = past > behind ? past - behind : 0;
  const int fit = (most_bytes - kLinearHeaderBytes - rest - slack) / c.stage_bytes;
  c.stages = fit < kLinearMostStages ? fit : kLinearMostStages;
  if (needed < c.stages) c.stages = needed;
  c.staging_offset = kLinearHeaderBytes + c.stages * c.stage_bytes;
  c.merge_offset = merge == 0 ? kLinearHeaderBytes : c.staging_offset + staging;
  c.h_offset = c.staging_offset + staging + merge;
  c.gain_offset = c.h_offset + h;
  c.tokens_offset = c.gain_offset + gain;
  c.smem_bytes = c.staging_offset + rest + slack;
}

// Units that cover the outputs.  One is one weight's.
constexpr std::int64_t linear_units(const LinearDecodeSm90Shape& s, int unit) {
  return ceil_div<std::int64_t>(s.outputs, unit) + ceil_div<std::int64_t>(s.second_outputs, unit);
}

// The smallest unit of which at most `most_units` cover the outputs.  A projection's holds whole
// pairs.
constexpr int linear_unit(const LinearDecodeSm90Shape& s, std::int64_t most_units) {
  const int step = s.projects ? 2 : 1;
  const std::int64_t share = ceil_div(s.outputs + s.second_outputs, most_units);
  int unit = round_up(static_cast<int>(share < 8 ? 8 : share), step);
  while (linear_units(s, unit) > most_units && unit <= 128) unit += step;
  return unit;
}

// Whether a ring has a few stages: four, or three where that is half of what it brings, or all.
constexpr bool linear_ring_is_long(const LinearDecodeSm90Config& c) {
  const int all = linear_loads(c);
  return c.stages >= kLinearRunStages || c.stages == all || (c.stages >= 3 && 2 * c.stages >= all);
}

// Stages of many bytes, as long as the ring is long.
constexpr void choose_linear_stages(LinearDecodeSm90Config& c, std::int64_t K,
                                    const LinearDecodeSm90Tuning& tuning, int most_bytes) {
  const int parts = linear_parts(c.tokens, c.row_tiles);
  const int most_boxes = 4 * parts, least = parts * c.slices;  // one product of either warpgroup
  int boxes = tuning.boxes > least ? tuning.boxes : least;
  if (boxes > most_boxes) boxes = most_boxes;
  lay_out_linear_ring(c, K, boxes, most_bytes);
  while (tuning.boxes == 0 && boxes < most_boxes && c.steps > 1) {
    const bool is_small = boxes * c.weight_box < kLinearStageWeightBytes;
    if (!is_small && boxes >= linear_run_boxes(c.tokens, c.norms)) break;
    const LinearDecodeSm90Config narrow = c;
    boxes *= 2;
    lay_out_linear_ring(c, K, boxes, most_bytes);
    const bool is_all = c.stages == linear_loads(c);
    if (is_small ? linear_ring_is_long(c) : c.stages >= kLinearRunStages || is_all) continue;
    c = narrow;
    break;
  }
}

constexpr LinearDecodeSm90Config select_linear_decode_sm90_config(
    const LinearDecodeSm90Shape& s, int sms, const LinearDecodeSm90Tuning& tuning = {}) {
  LinearDecodeSm90Config c = {};
  c.tokens = 8;
  while (c.tokens < s.rows) c.tokens *= 2;
  const std::int64_t outputs = s.outputs + s.second_outputs;
  const std::int64_t weight_rows = s.swiglu ? 2 * outputs : outputs;
  const bool splits =
      weight_rows < kLinearSplitRows && (c.tokens >= 64 || weight_rows * s.K <= kLinearSplitWeight);
  c.cluster = 1;
  if (linear_may_pair(c.tokens, 1))
    c.cluster = tuning.cluster != 0 ? tuning.cluster : splits ? 2 : 1;

  const bool is_whole = s.swiglu || c.tokens > 32 || c.cluster == 2;
  c.slices = is_whole ? 1 : outputs <= kLinearFourSlices ? 4 : outputs <= kLinearTwoSlices ? 2 : 1;
  while (c.slices > 1 && c.slices * c.tokens > kLinearMostSlicedColumns) c.slices /= 2;

  // The outputs in even shares: as many units a cluster as keep a unit within the rows of one
  // product, and units as small as cover all.
  const std::int64_t slots = sms / c.cluster < 1 ? 1 : sms / c.cluster;
  const bool is_tall = c.tokens <= 16 && ceil_div(outputs, slots) > kLinearTallShare;
  const int most = c.slices > 1 ? 64 / c.slices : s.swiglu || is_tall ? 64 : 128;
  std::int64_t units = ceil_div(ceil_div(outputs, slots), std::int64_t{most});
  while ((c.unit = linear_unit(s, slots * units)) > most) ++units;
  // Then whole boxes: what one has behind its unit is read twice, and x is by a CTA more.  Not
  // where many multiprocessors would have nothing to do.
  if (const int whole = round_up(c.unit, 8);
      whole <= most && kLinearBusyOfFour * slots * units <= 4 * linear_units(s, whole))
    c.unit = whole;
  c.units = static_cast<int>(units);
  c.first_units = static_cast<int>(ceil_div<std::int64_t>(s.outputs, c.unit));
  c.all_units = static_cast<int>(linear_units(s, c.unit));
  c.clusters = static_cast<int>(ceil_div<std::int64_t>(c.all_units, units));
  c.projects = s.projects;
  c.row_tiles = s.swiglu || c.unit > 64 ? 2 : 1;
  c.box_rows = round_up(c.unit, 8);
  c.second_offset = (s.swiglu ? c.box_rows : 64) * 2 * kLinearBox;
  c.weight_box = (s.swiglu ? 2 : 1) * c.box_rows * 2 * kLinearBox;
  c.x_rows = c.slices == 1 ? round_up(static_cast<int>(s.rows), 8) : c.tokens;
  c.x_box = c.x_rows * 2 * kLinearBox;
  c.norms = s.norm && linear_norms_itself(s.rows, s.K);

  // A whole multiprocessor: long runs of W in flight are worth more than a second ring beside this
  // one, but where all that a CTA reads is little more than a multiprocessor holds; there half of
  // it, and the next launch's ring fills in the other half.  Not where a norm is launched before
  // this: the next launch then starts behind that.
  const std::int64_t bytes =
      (c.weight_box + c.x_box) * ceil_div<std::int64_t>(s.K, kLinearBox) / c.cluster * c.units;
  // h and its gain may not take what the ring needs.
  const std::int64_t normed =
      c.norms ? c.x_box * ceil_div<std::int64_t>(s.K, kLinearBox) + 4 * s.K : 0;
  const bool halves = tuning.smem_bytes == 0 && c.tokens <= 64 && s.norm == c.norms &&
                      bytes <= kLinearHalfBytes &&
                      normed <= kLinearHalfSmemBytes - kLinearRingBesideNormBytes;
  if (halves) choose_linear_stages(c, s.K, tuning, kLinearHalfSmemBytes);
  if (!halves || !linear_ring_is_long(c))
    choose_linear_stages(c, s.K, tuning,
                         tuning.smem_bytes != 0 ? tuning.smem_bytes : kLinearWholeSmemBytes);
  const bool is_few = c.tokens == 8 && (!s.norm || c.norms);
  const int last = tuning.last_bytes >= 0 ? tuning.last_bytes
                   : is_few               ? kLinearLastBytesOfFew
                                          : kLinearLastBytes;
  c.last_loads = ceil_div(last, c.stage_bytes);
  // What follows few tokens is not to wait until x is there.
  const int all = linear_loads(c);
  if (is_few && tuning.last_bytes < 0 && all - c.last_loads <= c.stages) c.last_loads = all;
  return c;
}

// A stage is given back when the products of the next one have been issued: a ring of one stage
// holds all there is.
constexpr bool linear_ring_turns(const LinearDecodeSm90Config& c) {
  return c.stages >= 2 || (c.stages == 1 && linear_loads(c) == 1);
}

}  // namespace zebra
