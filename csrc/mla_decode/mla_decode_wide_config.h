// mla_decode on Hopper for many query rows, or latents wider than 256: which kernel instance serves
// a shape, and how rows and tokens are dealt to CTAs.  Pure, so that tests can check the choice.
#pragma once

#include "mla_decode/mla_decode_config.h"

namespace zebra {

constexpr int kMlaWideRows = 64;   // query rows of a CTA, those of a wgmma
constexpr int kMlaWideBlock = 64;  // cached tokens that a warpgroup scores at once
constexpr int kMlaWideLogBlock = 6;
constexpr int kMlaWideTileBytes = kMlaWideBlock * 128;  // 64 columns of a block
constexpr int kMlaWideHeader = 3072;  // bytes of shared memory before q: barriers, statistics
constexpr int kMlaWidePieces = 8;     // that are known at once: one a block, and two

constexpr MlaInstance kMlaWideInstances[] = {{128, 64}, {256, 64}, {512, 64}};
// Blocks of cached rows in shared memory; even, because warpgroups take turns.
constexpr int mla_wide_stages(int rank) { return rank > 256 ? 2 : 4; }
constexpr int mla_wide_smem_bytes(int rank) {
  return kMlaWideHeader + (1 + mla_wide_stages(rank)) * (rank / 64 + 1) * kMlaWideTileBytes;
}
static_assert(mla_wide_stages(128) + 2 <= kMlaWidePieces);
static_assert(mla_wide_smem_bytes(512) <= kMlaSm90SmemBytes && kMlaWideHeader % 1024 == 0);

// Rows of a box that TMA brings: a block's, or as many of them as lie in one page.
constexpr int mla_wide_box(std::int64_t page) {
  int rows = kMlaWideBlock;
  while (page % rows != 0) rows /= 2;
  return rows;
}
// Whether the kernel takes the cache: pages of whole swizzle patterns, 8 rows.
constexpr bool mla_wide_takes(std::int64_t rank, std::int64_t rope, std::int64_t page) {
  return rank > 0 && rank <= 512 && rank % 8 == 0 && rope >= 0 && rope <= 64 && rope % 8 == 0 &&
         page % 8 == 0;
}
// Whether it is the better one for a shape that both take: above 32 rows mma.sync is what limits
// the other kernel.
constexpr bool mla_wide_is_better(std::int64_t rows, std::int64_t rank) {
  return rank > 256 || rows > 32;
}

// A sequence's rows are dealt to pairs of CTAs (one CTA where 64 rows are enough), which walk the
// same tokens side by side, so that L2 serves one of them.  `ctas` counts pairs, `groups` 16 rows
// of a pair.
constexpr MlaDecodeConfig select_mla_wide_config(const MlaDecodeShape& s, std::int64_t sms) {
  MlaDecodeConfig c = {};
  for (const MlaInstance& i : kMlaWideInstances)
    if (c.rank == 0 && i.rank >= s.rank) c.rank = i.rank, c.rope = i.rope;
  const int pair = s.rows > kMlaWideRows ? 2 : 1;
  c.stage = kMlaWideBlock;
  c.groups = pair * kMlaWideRows / 16, c.halves = c.streams = 1;
  c.slots = mla_wide_stages(c.rank);
  c.smem_bytes = mla_wide_smem_bytes(c.rank);
  c.passes = static_cast<int>(ceil_div<std::int64_t>(s.rows, 16 * c.groups));
  mla_cut_work(s, sms / pair > 0 ? sms / pair : 1, sms, c);
  c.rehearses = (c.ctas + 1) * pair <= sms;
  return c;
}

}  // namespace zebra
