// mla_decode on CUDA: which kernel instance serves a shape, how its rows and tokens are dealt to
// warps, and how sequences are cut.  Pure, so that tests can print and check the choice.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zebra {

constexpr int kMlaBlock = 32;       // cached tokens that a warp attends to at once
constexpr int kMlaTmaStage = 64;    // cached tokens of a stage that TMA brings; cp.async: a block
constexpr int kMlaWarps = 8;        // of a CTA
constexpr int kMlaMostSlots = 8;    // stages of one stream
constexpr int kMlaProducers = 4;    // warps beside them that bring stages by TMA, one a stream
constexpr int kMlaMostStages = 28;  // of a CTA, by TMA: two barriers each
constexpr int kMlaMostLanes = 32;   // of a combination
constexpr int kMlaQFromSmem = 192;  // latent ranks from here on keep q in shared memory
constexpr int kMlaMergeOffset = 6144;  // schedule and softmax statistics lie before it
// Stages of a CTA together, where two of a stream take no more: more bytes under way were slower.
constexpr int kMlaRingBytes = 112 * 1024;
static_assert(kMlaRingBytes / (kMlaTmaStage * 96 * 2) <= kMlaMostStages);
// Where the warps add their results, 32 x `parts` columns of each at a time.  The stride, in
// floats, is such that rows meet no bank twice.
constexpr int mla_merge_stride(int parts) { return parts * 32 + 8; }
constexpr int mla_merge_bytes(int parts) { return kMlaWarps * 16 * mla_merge_stride(parts) * 4; }
// Rows of q in shared memory, in bytes: an odd number of 16-byte units, as ldmatrix likes them.
constexpr int mla_q_pitch(int width) { return width * 2 + 16; }
constexpr int mla_q_bytes(int groups, int width) {
  return (groups * 16 * mla_q_pitch(width) + 1023) / 1024 * 1024;
}
static_assert((kMlaMergeOffset + mla_merge_bytes(1)) % 1024 == 0 && mla_merge_bytes(1) % 1024 == 0,
              "stages lie where the swizzles of TMA repeat");
constexpr int kMlaSm90SmemBytes = 232448;  // shared memory of a CTA on sm_90

// Division of 0 .. 2^31 - 1 by a number of 1 .. 2^31 - 1 with a multiplication (Granlund and
// Montgomery): n m / 2^p for p = 31 + ceil(log2 d), m = ceil(2^p / d) is floor(n / d).  With 2 n
// in place of n the shift is the logarithm, and 1 needs no case of its own.
struct MlaDivisor {
  int divisor;
  unsigned multiplier, shift;

#ifdef __CUDACC__
  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(__umulhi(2u * static_cast<unsigned>(n), multiplier) >> shift);
  }
  __device__ __forceinline__ int rest(int n) const { return n - quotient(n) * divisor; }
#endif
};
constexpr MlaDivisor mla_divisor(std::int64_t d) {
  int bits = 0;
  while ((std::int64_t{1} << bits) < d) ++bits;
  const int p = 31 + bits;
  const std::uint64_t power = std::uint64_t{1} << p;
  const std::uint64_t m =
      (power + static_cast<std::uint64_t>(d) - 1) / static_cast<std::uint64_t>(d);
  return {static_cast<int>(d), static_cast<unsigned>(m), static_cast<unsigned>(bits)};
}

struct MlaInstance {
  int rank, rope;  // columns that a kernel is compiled for; more than the cache's are zero
};
constexpr MlaInstance kMlaInstances[] = {{64, 32},  {64, 64},  {96, 64},  {128, 32},
                                         {128, 64}, {160, 64}, {192, 64}, {256, 64}};

// The instance that serves a shape that mla_decode_takes().
constexpr MlaInstance mla_decode_instance(std::int64_t rank, std::int64_t rope) {
  for (const MlaInstance& i : kMlaInstances)
    if (i.rank >= rank && i.rope >= rope) return i;
  return {0, 0};
}

// Whether TMA can bring the cache's rows: pages of whole stages, and no column to fill with zeros.
constexpr bool mla_decode_tma_takes(std::int64_t rank, std::int64_t rope, std::int64_t page) {
  const MlaInstance i = mla_decode_instance(rank, rope);
  return page % kMlaTmaStage == 0 && rank == i.rank && rope == i.rope;
}

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
  bool tma;                 // stages of kMlaTmaStage tokens
  bool expands = false;     // kv_b_weight follows: the combination looks at every item
};

// An item is one pass of one sequence: 16 * groups of its rows over all its tokens.  A team of
// groups x halves warps shares the stages of one stream of tokens: a warp attends with 16 rows to
// one of `halves` parts of a stage.
struct MlaDecodeConfig {
  int rank, rope;  // of the instance
  int stage;       // tokens
  int groups, passes, halves;
  int streams, slots;  // of a CTA; stages of a stream
  int merge_parts;     // of 32 columns that are added at a time where an item ends
  int q_offset, ring_offset, smem_bytes;
  int ctas;
  bool rehearses;         // one more, or a pair, without work: mla_wide_rehearse
  int item_cost;          // of an item's start and end, in stages
  std::int64_t split;     // tokens of a piece, whole stages; 0: a CTA's share is a piece
  std::int64_t pieces;    // of an item at most, where split > 0
  std::int64_t partials;  // results of pieces that are kept until they are combined
  bool unit_per_item;     // a combination is listed by item; otherwise by the CTA that begins it
  std::int64_t units;
  int combine_lanes;  // threads that share the partial results of one element
  // The workspace: statistics [partials, 16 groups] x 2, sums [partials, 16 groups, rank], units.
  std::int64_t sums_offset, units_offset, workspace_bytes;
};

constexpr std::int64_t kMlaUnitBytes = 32;
constexpr int kMlaCombineThreads = 512;  // of a multiprocessor

// How work is cut, given how rows and stages are dealt: the rest of a configuration.  `slots`: CTAs
// that run at once, or pairs of them.
constexpr void mla_cut_work(const MlaDecodeShape& s, std::int64_t slots, std::int64_t sms,
                            MlaDecodeConfig& c) {
  const std::int64_t items = s.batch * c.passes;
  const std::int64_t item_blocks = ceil_div<std::int64_t>(s.max_tokens, c.stage);
  constexpr std::int64_t kMostSplit = (std::int64_t{1} << 31) - kMlaTmaStage;
  c.split =
      s.split_size > kMostSplit ? kMostSplit : round_up<std::int64_t>(s.split_size, kMlaTmaStage);
  c.pieces = c.split > 0 ? ceil_div(s.max_tokens, c.split) : 1;
  const std::int64_t work = items * (c.split > 0 ? c.pieces : item_blocks);
  c.ctas = static_cast<int>(work < 1 ? 1 : work < slots ? work : slots);
  // A few less where equal sequences then end where shares do: an end inside of a share costs more.
  // And a multiprocessor at least for the combination's first CTA, which fetches its code.
  for (int n = c.ctas - (items < c.ctas); n * 16 >= c.ctas * 15; --n)
    if (c.ctas == slots && (items % n == 0 || n % items == 0)) {
      c.ctas = n;
      break;
    }
  c.item_cost = items < slots || c.split > 0 ? 0 : kMlaTmaStage / c.stage;
  c.unit_per_item = s.expands || c.split > 0 || items <= c.ctas;
  c.units = c.unit_per_item ? items : c.ctas;
  const bool cut = c.split > 0 ? c.pieces > 1 : c.ctas > 1;
  c.partials = !cut ? 0 : c.split > 0 ? items * c.pieces : 2 * c.ctas;
  if (!cut && !s.expands) c.units = 0;
  // Lanes for at most three of the partial results that an item may have, but no more than leave a
  // multiprocessor few threads of the combination: all of them start when the attention kernel ends
  // there, and issue the same instructions one after the other.  With split_size a constant,
  // because the order of summation must not depend on the batch.
  const std::int64_t cuts = ceil_div<std::int64_t>(c.ctas, items < 1 ? 1 : items) + 1;
  const std::int64_t item_rows = s.rows < 16 * c.groups ? s.rows : 16 * c.groups;
  const std::int64_t threads = items * item_rows * (c.rank / 8);  // of a lane
  c.combine_lanes = c.split > 0 ? 8 : 1;
  while (c.split == 0 && c.combine_lanes < kMlaMostLanes && c.combine_lanes * 3 < cuts &&
         c.combine_lanes * 2 * threads <= sms * kMlaCombineThreads)
    c.combine_lanes *= 2;
  const std::int64_t rows = c.partials * 16 * c.groups;
  c.sums_offset = rows * 8;
  c.units_offset = c.sums_offset + rows * c.rank * 4;
  c.workspace_bytes = c.units_offset + c.units * kMlaUnitBytes;
}

constexpr MlaDecodeConfig select_mla_decode_config(const MlaDecodeShape& s, std::int64_t sms,
                                                   int smem_limit) {
  MlaDecodeConfig c = {};
  const MlaInstance instance = mla_decode_instance(s.rank, s.rope);
  c.rank = instance.rank, c.rope = instance.rope;
  c.stage = s.tma ? kMlaTmaStage : kMlaBlock;
  const int width = c.rank + c.rope;
  const int stage = c.stage * width * 2;
  c.groups = 1;
  while (c.groups < kMlaWarps && c.groups * 16 < s.rows) c.groups *= 2;
  int slots = 0;
  for (;; c.groups /= 2) {  // fewer rows where q leaves no room for two stages
    c.ring_offset = kMlaMergeOffset + mla_merge_bytes(1) + mla_q_bytes(c.groups, width);
    slots = (smem_limit - c.ring_offset) / stage;
    if (slots >= 2 || c.groups == 1) break;
  }
  c.halves = c.groups < kMlaWarps ? c.stage / kMlaBlock : 1;
  c.streams = kMlaWarps / (c.groups * c.halves);
  while (c.streams > 1 && slots / c.streams < 2) c.streams /= 2;
  c.slots = slots / c.streams < kMlaMostSlots ? slots / c.streams : kMlaMostSlots;
  while (c.slots > 2 && c.streams * c.slots * stage > kMlaRingBytes) --c.slots;
  const int left = smem_limit - c.ring_offset - c.streams * c.slots * stage + mla_merge_bytes(1);
  c.merge_parts = c.rank / 32;  // as few rounds of equal parts as there is room for
  for (int rounds = 2; mla_merge_bytes(c.merge_parts) > left; ++rounds)
    c.merge_parts = ceil_div(c.rank / 32, rounds);
  c.q_offset = kMlaMergeOffset + mla_merge_bytes(c.merge_parts);
  c.ring_offset = c.q_offset + mla_q_bytes(c.groups, width);
  c.smem_bytes = c.ring_offset + c.streams * c.slots * stage;
  c.passes = static_cast<int>(ceil_div<std::int64_t>(s.rows, 16 * c.groups));
  mla_cut_work(s, sms, sms, c);
  return c;
}

}  // namespace zebra
