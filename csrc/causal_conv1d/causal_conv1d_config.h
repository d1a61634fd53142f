// causal_conv1d: how tokens and channels are laid over thread blocks.  Pure, so that tests can
// print and check the choice.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zebra {

// A CTA covers threads * vec channels and walks along `tile` tokens of one batch row.
struct CausalConv1dConfig {
  int threads;
  int vec;                      // channels of a thread: one 16-byte access, or 1 when misaligned
  std::int64_t channel_blocks;  // CTAs side by side over the channels
  std::int64_t tile;            // tokens of a tile
  std::int64_t tiles;           // tiles of a batch row
  std::int64_t items;           // consecutive tiles that one CTA works through (forward: 1)
  std::int64_t partials;        // groups of `items` tiles over all batch rows
};

constexpr int kCausalConv1dThreads = 128;
constexpr int kCausalConv1dStages = 8;  // rows of the shared-memory ring, a power of two
constexpr int kCausalConv1dMaxWidth = 4;

namespace detail {

// Tiles of `shortest` to `longest` tokens, equal within a batch row, so that the CTAs fill whole
// waves of `slots` CTAs that run at once: a last wave of a few CTAs costs as much as a full one.
constexpr CausalConv1dConfig tile_causal_conv1d(std::int64_t batch, std::int64_t tokens,
                                                std::int64_t channels, int element_bytes,
                                                bool aligned, std::int64_t slots,
                                                std::int64_t shortest, std::int64_t longest) {
  CausalConv1dConfig c = {};
  c.vec = aligned ? 16 / element_bytes : 1;
  const std::int64_t vecs = ceil_div<std::int64_t>(channels, c.vec);
  c.threads = vecs >= kCausalConv1dThreads ? kCausalConv1dThreads
                                           : static_cast<int>(round_up<std::int64_t>(vecs, 32));
  c.channel_blocks = ceil_div<std::int64_t>(vecs, c.threads);
  c.items = 1;
  if (batch == 0 || tokens == 0) return c;
  const std::int64_t work = batch * tokens * c.channel_blocks;
  const std::int64_t waves = ceil_div(work, slots * longest);
  const std::int64_t tiles = slots * waves / (batch * c.channel_blocks);
  const std::int64_t most = ceil_div(tokens, shortest);
  c.tile = ceil_div(tokens, tiles < 1 ? 1 : (tiles > most ? most : tiles));
  c.tiles = ceil_div(tokens, c.tile);
  c.partials = batch * c.tiles;
  return c;
}

}  // namespace detail

// Forward: whole waves of the 132 x 4 CTAs of an H200.  Short tiles, so that the CTAs that run at
// once read and write one compact stretch of memory: 19 tokens measured 7 % faster than 149,
// although the W-1 rows before each tile are read twice (from the L2).
constexpr CausalConv1dConfig select_causal_conv1d_config(std::int64_t batch, std::int64_t tokens,
                                                         std::int64_t channels, int element_bytes,
                                                         bool aligned) {
  return detail::tile_causal_conv1d(batch, tokens, channels, element_bytes, aligned, 132 * 4, 8,
                                    20);
}

// Backward: whole waves of 132 x 3 CTAs.  A function of the shape only, so that the weight gradient
// is the same on every GPU.  Tiles of up to 256 tokens: the partial sums, written and read, are 8
// (W+1) bytes a channel and tile, 2.6 % of the traffic of 256 16-bit tokens, more in shorter tiles
// (then a few MB, which stay in L2).
constexpr CausalConv1dConfig select_causal_conv1d_backward_config(std::int64_t batch,
                                                                  std::int64_t tokens,
                                                                  std::int64_t channels,
                                                                  int element_bytes, bool aligned) {
  CausalConv1dConfig c =
      detail::tile_causal_conv1d(batch, tokens, channels, element_bytes, aligned, 132 * 3, 32, 256);
  // Batch rows shorter than the shortest tile share a CTA.
  if (c.tile > 0 && c.tile < 32) c.items = 32 / c.tile;
  c.partials = ceil_div(batch * c.tiles, c.items);
  return c;
}

// The CPU sums the weight gradient over at most 32 groups of tiles.
constexpr CausalConv1dConfig select_causal_conv1d_cpu_backward_config(std::int64_t batch,
                                                                      std::int64_t tokens,
                                                                      std::int64_t channels) {
  CausalConv1dConfig c = {};
  c.channel_blocks = ceil_div<std::int64_t>(channels, 256);
  c.tiles = ceil_div<std::int64_t>(tokens, 256);
  c.tile = c.tiles == 0 ? 0 : ceil_div(tokens, c.tiles);
  c.items = ceil_div<std::int64_t>(batch * c.tiles, 32);
  c.partials = c.items == 0 ? 0 : ceil_div(batch * c.tiles, c.items);
  return c;
}

}  // namespace zebra
