// mla_decode for many rows: shared memory, and the warp that brings cached rows to it by TMA.
#pragma once

#include <cuda.h>

#include "common/sm90/ptx.cuh"
#include "common/sm90/tma.cuh"
#include "mla_decode/mla_decode_schedule.cuh"
#include "mla_decode/mla_decode_wide_config.h"

namespace zebra {
namespace {

// Maps of the cache, [page, row, column]: boxes of `box` rows and 64 columns, which are zero past
// the end of the latent and past the end of the rope columns.
struct MlaWideMaps {
  CUtensorMap latent, rope;
  int box, log_box;  // rows
  int rope_column;   // of `rope` where the rope columns start
  int ahead;         // blocks between what is loaded and what is asked for in L2
};

// What lies before q and the blocks in shared memory.
struct MlaWideShared {
  std::uint64_t barriers[56];
  MlaStep pieces[kMlaWidePieces];
  float references[2][kMlaWideRows];  // by owner of the block that raised them
  float sums[2][kMlaWideRows];
  int limits[kMlaWideRows];  // tokens that a row sees
  int is_raised[2][4];       // by owner and warp
  int scratch[12];
  int has_empty;
};
static_assert(sizeof(MlaWideShared) <= kMlaWideHeader);

// A block is tiles of 64 columns in rows of 128 bytes, 16-byte unit u of row r at u ^ (r % 8): the
// latent, half of it for each warpgroup, then the rope columns.
template <int kRank_>
struct MlaWideShape {
  static constexpr int kRank = kRank_, kStages = mla_wide_stages(kRank);
  static constexpr int kHalfTiles = kRank / 128, kRope = 2 * kHalfTiles, kTiles = kRope + 1;
  static constexpr int kStageBytes = kTiles * kMlaWideTileBytes;
  static constexpr int kRing = kMlaWideHeader + kTiles * kMlaWideTileBytes;
  static constexpr int kSmemBytes = kRing + kStages * kStageBytes;
  // By stage: its halves are empty; then: its tiles are full; then: a piece is noted.
  static constexpr int kEmptyBarriers = 2 * kStages;
  static constexpr int kNotedBarriers = kEmptyBarriers + kStages * kTiles;
  static constexpr int kBarriers = kNotedBarriers + kMlaWidePieces;
  static_assert(kBarriers * 8 <= static_cast<int>(sizeof(MlaWideShared::barriers)));
  static_assert(kSmemBytes == mla_wide_smem_bytes(kRank));

  static __device__ __forceinline__ MlaWideShared& shared() {
    extern __shared__ __align__(1024) unsigned char smem[];
    return *reinterpret_cast<MlaWideShared*>(smem);
  }
  static __device__ __forceinline__ std::uint32_t barrier(int i) {
    return smem_addr(shared().barriers) + 8 * i;
  }
  static __device__ __forceinline__ std::uint32_t noted(int piece) {
    return barrier(kNotedBarriers + piece % kMlaWidePieces);
  }
  // The n-th tile of a block to be loaded and scored: the owner gives its own half back first.
  static __device__ __forceinline__ int tile(int owner, int n) {
    return n < kHalfTiles ? owner * kHalfTiles + n
           : n < kRope    ? (1 - owner) * kHalfTiles + n - kHalfTiles
                          : kRope;
  }
};

// Where block b of a CTA lies.
template <typename S>
struct MlaWideSlot {
  std::uint32_t stage, barriers;
  int index;
  std::uint32_t parity;  // of the phase in which it is full

  __device__ __forceinline__ MlaWideSlot(std::uint32_t base, int b)
      : stage(base + S::kRing + b % S::kStages * S::kStageBytes),
        barriers(base),
        index(b % S::kStages),
        parity(b / S::kStages & 1) {}
  __device__ __forceinline__ std::uint32_t empty(int half) const {
    return barriers + 8 * (2 * index + half);
  }
  __device__ __forceinline__ std::uint32_t full(int tile) const {
    return barriers + 8 * (S::kEmptyBarriers + index * S::kTiles + tile);
  }
  // The probabilities [64 rows, 64 tokens] replace the rope columns.
  __device__ __forceinline__ std::uint32_t probabilities() const {
    return stage + S::kRope * kMlaWideTileBytes;
  }
  __device__ __forceinline__ std::uint32_t probabilities(int row, int unit) const {
    return probabilities() + row * 128 + ((unit ^ (row & 7)) << 4);
  }
  // Zeros in the latents from row `first` on, by the 128 threads of a warpgroup: what is there may
  // be NaN, and 0 * NaN is NaN.
  __device__ __forceinline__ void clear_tail(int first, int thread) const {
    const std::uint32_t zeros[4] = {};
    const int units = (kMlaWideBlock - first) * 8;
#pragma unroll 1
    for (int i = thread; i < units; i += 128)
#pragma unroll
      for (int tile = 0; tile < S::kRope; ++tile)
        st_shared_v4(stage + tile * kMlaWideTileBytes + first * 128 + i * 16, zeros);
    sm90::fence_async_proxy();
  }
};
static_assert(sizeof(std::uint64_t) == 8 && offsetof(MlaWideShared, barriers) == 0);

// This CTA's first row of a pass, in its sequence.
__device__ __forceinline__ int mla_wide_first_row(const MlaArgs& a, int pass) {
  return pass * 16 * a.groups + static_cast<int>(blockIdx.y) * kMlaWideRows;
}

// The table's entries for the next 32 boxes of a piece, one in a lane, and for 32 more.
struct MlaWidePages {
  const std::int32_t* table;
  int from, end;  // tokens: of the first box held, of the piece
  int now, next;

  __device__ __forceinline__ int entry(const MlaArgs& a, int token) const {
    const int page = token < end ? __ldg(table + a.page.quotient(token)) : 0;
    return min(max(page, 0), a.pages - 1);
  }
  __device__ __forceinline__ MlaWidePages(const MlaArgs& a, const MlaWideMaps& maps,
                                          const MlaWalk& walk)
      : table(a.block_table + walk.b * a.table_stride), from(walk.token), end(walk.end) {
    const int mine = from + ((threadIdx.x % 32) << maps.log_box);
    now = entry(a, mine), next = entry(a, mine + (32 << maps.log_box));
  }
  // To a token of the first 32 boxes or of those after them.
  __device__ __forceinline__ void move(const MlaArgs& a, const MlaWideMaps& maps, int token) {
    if (token - from < (32 << maps.log_box)) return;
    from += 32 << maps.log_box, now = next;
    next = entry(a, from + ((threadIdx.x % 32 + 32) << maps.log_box));
  }
  // The page of the box that starts at this lane's `token`, at most 63 boxes on.  All lanes call.
  __device__ __forceinline__ int of(const MlaWideMaps& maps, int token) const {
    const int box = (token - from) >> maps.log_box;
    const int near = __shfl_sync(kWarp, now, box & 31), far = __shfl_sync(kWarp, next, box & 31);
    return box < 32 ? near : far;
  }
};

// Brings the blocks of the CTA's pieces in order, and notes pieces.  One warp.
template <typename S>
__device__ __forceinline__ void mla_wide_load(const MlaArgs& a, const MlaWideMaps& maps,
                                              const MlaShare& share) {
  const int lane = threadIdx.x % 32;
  const std::uint32_t base = smem_addr(&S::shared());
  const bool speaks = lane == 0 && blockIdx.y == 0;  // for both CTAs of a pair
  if (speaks && !a.unit_per_item && a.unit_count > 0) a.units[blockIdx.x] = MlaUnit{};
  MlaWalk walk;
  walk.begin(a, share);
  int b = 0, n = 0;
  const auto note = [&](int flags) {
    walk.stage = walk.token, walk.flags = flags;
    if (lane == 0) S::shared().pieces[n % kMlaWidePieces].note(a, walk);
    if (lane == 0) sm90::mbarrier_arrive(S::noted(n));
    ++n;
  };
#pragma unroll 1
  while (walk.advance(a, share)) {
    if (speaks && walk.token == 0) walk.list(a, share);
    if (mla_wide_first_row(a, walk.pass) >= a.rows) continue;  // the pair's other CTA has them all
    MlaWidePages pages(a, maps, walk);
#pragma unroll 1
    for (int token = walk.token; token < walk.end; token += kMlaWideBlock, ++b) {
      const MlaWideSlot<S> slot(base, b);
      const int owner = b & 1;
      pages.move(a, maps, token);
      const int mine = token + (lane << maps.log_box), page = pages.of(maps, mine);
      const int row = a.page.rest(mine);
      const int boxes = kMlaWideBlock >> maps.log_box;
      const bool is_mine = lane < boxes && mine < walk.end;
      const int filled = min(boxes, (walk.end - token + maps.box - 1) >> maps.log_box);
      const std::uint32_t to = slot.stage + (lane << maps.log_box) * 128;
#pragma unroll 1
      for (int t = 0; t < S::kTiles; ++t) {
        const int tile = S::tile(owner, t);
        if (t == 0) {
          sm90::mbarrier_wait(slot.empty(owner), slot.parity ^ 1);
          if (token == walk.token) note(0);
        }
        if (t == S::kHalfTiles) sm90::mbarrier_wait(slot.empty(1 - owner), slot.parity ^ 1);
        if (lane == 0) sm90::mbarrier_expect(slot.full(tile), filled * maps.box * 128);
        __syncwarp();
        if (is_mine)
          sm90::tma_load_3d(to + tile * kMlaWideTileBytes,
                            tile < S::kRope ? &maps.latent : &maps.rope, slot.full(tile),
                            tile < S::kRope ? tile * 64 : maps.rope_column, row, page);
      }
      // What both CTAs of a pair will need they ask for in turns.
      const int later = mine + maps.ahead * kMlaWideBlock, later_page = pages.of(maps, later);
      if (maps.ahead > 0 && lane < boxes && later < walk.end &&
          (gridDim.y == 1 || (b & 1) == static_cast<int>(blockIdx.y))) {
        const int later_row = a.page.rest(later);
#pragma unroll 1
        for (int tile = 0; tile < S::kTiles; ++tile)
          sm90::tma_prefetch_3d(tile < S::kRope ? &maps.latent : &maps.rope,
                                tile < S::kRope ? tile * 64 : maps.rope_column, later_row,
                                later_page);
      }
    }
  }
  note(MlaStep::kStop);
}

}  // namespace
}  // namespace zebra
