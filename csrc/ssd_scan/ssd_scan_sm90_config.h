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

struct SsdScanSm90Shape {
  std::int64_t rows;       // batch rows
  std::int64_t sequences;  // packed sequences, 0 when they are not packed
  std::int64_t tokens;     // of a batch row
  std::int64_t heads, x_heads, b_heads, c_heads;
  int head_dim, state_dim;
  bool norm;
};

// An item is one segment of one sequence for the heads of a CTA.  Segments of a sequence all have
// `segment` tokens, but for the last.  With more than one segment a first kernel walks all but the
// last of them for their states alone.
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
  std::int64_t segment;   // tokens, a multiple of 64
  std::int64_t segments;  // of a batch row (packed: at most, of the batch)
  std::int64_t items;
  // The walk for the states: every segment in `state_cuts` pieces of `state_segment` tokens.
  std::int64_t state_segment;
  int state_cuts;
  std::int64_t state_items;
};

namespace detail {

struct SsdSegments {
  std::int64_t length;  // chunks of a segment
  int state_cuts;       // pieces of a segment in the walk for the states
};

// Cuts one batch row of `chunks` chunks that `width` CTAs walk side by side on `sms`
// multiprocessors, for the least time in chunks of the main walk.
constexpr SsdSegments ssd_scan_segments(std::int64_t chunks, std::int64_t width, std::int64_t sms) {
  constexpr double kState = 0.3;  // a chunk of the walk for the states
  constexpr double kStart = 1.5;  // a CTA's first loads and last stores
  constexpr double kLaunch = 2;   // a second kernel
  constexpr double kFold = 0.4;   // reading the state of a piece
  double best = 0;
  SsdSegments choice = {chunks, 1};
  for (std::int64_t n = 1; n <= 64 && n * 4 <= chunks; ++n) {
    const std::int64_t length = ceil_div(chunks, n);
    const std::int64_t segments = ceil_div(chunks, length);
    for (int cuts = 1; cuts <= (n == 1 ? 1 : 4); cuts *= 2) {
      const double folds = kFold * static_cast<double>((segments - 1) * cuts);
      double time = static_cast<double>(ceil_div(width * segments, sms)) *
                    (static_cast<double>(length) + kStart + folds);
      if (segments > 1)
        time += kLaunch +
                static_cast<double>(ceil_div(width * (segments - 1) * cuts, sms)) *
                    (kStart + kState * static_cast<double>(ceil_div<std::int64_t>(length, cuts)));
      if (n == 1 || time < best) best = time, choice = {length, cuts};
    }
  }
  return choice;
}

}  // namespace detail

// `invariant`: segments of 2048 tokens whatever the batch, so that a sequence's result does not
// depend on what else is computed.
constexpr SsdScanSm90Config select_ssd_scan_sm90_config(const SsdScanSm90Shape& s, std::int64_t sms,
                                                        bool invariant) {
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

  const std::int64_t chunks = ceil_div<std::int64_t>(s.tokens, kSsdChunk);
  detail::SsdSegments cut = {32, 1};
  if (!invariant) cut = detail::ssd_scan_segments(chunks, s.rows * c.head_slots, sms);
  const std::int64_t length = cut.length < 1 ? 1 : cut.length;
  c.segment = length * kSsdChunk;
  c.segments = s.tokens == 0 ? 1 : ceil_div(s.tokens, c.segment);
  const std::int64_t walked = c.segments - 1;  // of a sequence, for their states
  c.state_segment = ceil_div<std::int64_t>(length, cut.state_cuts) * kSsdChunk;
  c.state_cuts = static_cast<int>(ceil_div(c.segment, c.state_segment));
  if (s.sequences > 0) c.segments = c.segments == 1 ? s.sequences : c.segments + s.sequences;
  c.items = s.rows * c.segments * c.head_slots;
  c.state_items = s.rows * (s.sequences > 0 ? c.segments : walked) * c.state_cuts * c.head_slots;
  return c;
}

}  // namespace zebra
