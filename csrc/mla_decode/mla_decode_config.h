// mla_decode on CUDA: which kernel instance serves a shape, how its rows and tokens are dealt to
// warps, and how sequences are cut.  Pure, so that tests can print and check the choice.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zebra {

constexpr int kMlaBlock = 32;       // cached tokens of a stage
constexpr int kMlaWarps = 8;        // of a CTA
constexpr int kMlaMostSlots = 8;    // stages of one stream
constexpr int kMlaQFromSmem = 192;  // latent ranks from here on keep q in shared memory
constexpr int kMlaMergeColumns = 32, kMlaMergeStride = 40;  // floats; rows meet no bank twice
constexpr int kMlaMergeOffset = 3072;  // schedule and softmax statistics lie before it
constexpr int kMlaFixedBytes =
    kMlaMergeOffset + kMlaWarps * 16 * kMlaMergeStride * 4;  // before q and the stages
constexpr int kMlaSm90SmemBytes = 232448;                    // shared memory of a CTA on sm_90

struct MlaInstance {
  int rank, rope;  // columns that a kernel is compiled for; more than the cache's are zero
};
constexpr MlaInstance kMlaInstances[] = {{64, 32},  {64, 64},  {96, 64},  {128, 32},
                                         {128, 64}, {160, 64}, {192, 64}, {256, 64}};

// Whether a kernel takes latents of this rank with this many rope columns.
constexpr bool mla_decode_takes(std::int64_t rank, std::int64_t rope) {
  return rank > 0 && rank <= 256 && rank % 8 == 0 && rope >= 0 && rope <= 64 && rope % 8 == 0;
}

struct MlaDecodeShape {
  std::int64_t batch;
  std::int64_t rows;        // new tokens x heads of a sequence
  std::int64_t rank, rope;  // mla_decode_takes() them
  std::int64_t max_tokens;  // that the block table has room for
  std::int64_t split_size;  // 0: cut by the batch; otherwise every sequence at its multiples
};

// An item is one pass of one sequence: 16 * groups of its rows over all its tokens.  A team of
// `groups` warps, 16 rows each, shares the stages of one stream of tokens.
struct MlaDecodeConfig {
  int rank, rope;  // of the instance
  int groups, passes;
  int streams, slots;  // of a CTA; stages of a stream
  int q_offset, ring_offset, smem_bytes;
  int ctas;
  int item_cost;          // of an item's start and end, in blocks
  std::int64_t split;     // tokens of a piece, a multiple of kMlaBlock; 0: a CTA's share is a piece
  std::int64_t pieces;    // of an item at most, where split > 0
  std::int64_t partials;  // results of pieces that are kept until they are combined
  bool unit_per_item;     // a combination is listed by item; otherwise by the CTA that begins it
  std::int64_t units;
  int combine_warps;  // of one row
  // The workspace: statistics [partials, 16 groups] x 2, sums [partials, 16 groups, rank], units.
  std::int64_t sums_offset, units_offset, workspace_bytes;
};

constexpr std::int64_t kMlaUnitBytes = 32;

constexpr MlaDecodeConfig select_mla_decode_config(const MlaDecodeShape& s, std::int64_t sms,
                                                   int smem_limit) {
  MlaDecodeConfig c = {};
  for (const MlaInstance& i : kMlaInstances) {
    c.rank = i.rank, c.rope = i.rope;
    if (i.rank >= s.rank && i.rope >= s.rope) break;
  }
  const int width = c.rank + c.rope;
  const int stage = kMlaBlock * width * 2;
  c.groups = 1;
  while (c.groups < kMlaWarps && c.groups * 16 < s.rows) c.groups *= 2;
  int slots = 0;
  for (;; c.groups /= 2) {  // fewer rows where q leaves no room for two stages
    c.q_offset = kMlaFixedBytes;
    c.ring_offset = c.q_offset + (c.rank >= kMlaQFromSmem ? c.groups * width * 32 : 0);
    slots = (smem_limit - c.ring_offset) / stage;
    if (slots >= 2 || c.groups == 1) break;
  }
  c.streams = kMlaWarps / c.groups;
  while (c.streams > 1 && slots / c.streams < 2) c.streams /= 2;
  c.slots = slots / c.streams < kMlaMostSlots ? slots / c.streams : kMlaMostSlots;
  c.smem_bytes = c.ring_offset + c.streams * c.slots * stage;
  c.passes = static_cast<int>(ceil_div<std::int64_t>(s.rows, 16 * c.groups));

  const std::int64_t items = s.batch * c.passes;
  const std::int64_t item_blocks = ceil_div<std::int64_t>(s.max_tokens, kMlaBlock);
  c.split = round_up<std::int64_t>(s.split_size, kMlaBlock);
  c.pieces = c.split > 0 ? ceil_div(s.max_tokens, c.split) : 1;
  const std::int64_t work = items * (c.split > 0 ? c.pieces : item_blocks);
  c.ctas = static_cast<int>(work < 1 ? 1 : work < sms ? work : sms);
  c.item_cost = items < sms || c.split > 0 ? 0 : 2;
  c.unit_per_item = c.split > 0 || items <= c.ctas;
  c.units = c.unit_per_item ? items : c.ctas;
  const bool cut = c.split > 0 ? c.pieces > 1 : c.ctas > 1;
  c.partials = !cut ? 0 : c.split > 0 ? items * c.pieces : 2 * c.ctas;
  if (!cut) c.units = 0;
  // Partials of a row, about: a warp sums up to 4 of them.
  const std::int64_t cuts = c.split > 0 ? c.pieces : ceil_div<std::int64_t>(c.ctas, items + 1) + 1;
  c.combine_warps = 1;
  while (c.combine_warps < kMlaWarps && c.combine_warps * 4 < cuts) c.combine_warps *= 2;
  const std::int64_t rows = c.partials * 16 * c.groups;
  c.sums_offset = rows * 8;
  c.units_offset = c.sums_offset + rows * c.rank * 4;
  c.workspace_bytes = c.units_offset + c.units * kMlaUnitBytes;
  return c;
}

}  // namespace zebra
