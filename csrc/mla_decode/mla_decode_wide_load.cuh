// mla_decode for many rows: shared memory, and the warp that brings cached rows to it by TMA.
#pragma once

#include <cuda.h>

#include "common/sm90/ptx.cuh"
#include "common/sm90/tma.cuh"
#include "mla_decode/mla_decode_load.cuh"
#include "mla_decode/mla_decode_wide_config.h"

namespace zebra {
namespace {

// Maps of the cache, [page, row, column]: boxes of `box` rows and 64 columns, which are zero past
// the end of the latent and past the end of the rope columns.
struct MlaWideMaps {
  CUtensorMap latent, rope;
  int box, log_box;  // rows
  int rope_column;   // of `rope` where the rope columns start
};

// What lies before q and the blocks in shared memory.
struct MlaWideShared {
  std::uint64_t barriers[56];
  MlaStep pieces[kMlaWidePieces];
  MlaStep opened;  // of the share's first item: what is known before its piece is noted
  float references[2][kMlaWideRows];  // by owner of the block that raised them
  float sums[2][kMlaWideRows];
  int limits[kMlaWideRows];  // tokens that a row sees
  int is_raised[2][4];       // by owner and warp
  int scratch[12];
  MlaShare share;
};
static_assert(sizeof(MlaWideShared) <= kMlaWideHeader);

// A block is tiles of 64 columns in rows of 128 bytes, 16-byte unit u of row r at u ^ (r % 8): the
// latent, half of it for each warpgroup, then the rope columns.  They are given back in chunks of
// each half, the owner's first, the rope columns with the last one.
template <int kRank_>
struct MlaWideShape {
  static constexpr int kRank = kRank_, kStages = mla_wide_stages(kRank);
  static constexpr int kHalfTiles = kRank / 128, kRope = 2 * kHalfTiles, kTiles = kRope + 1;
  static constexpr int kStageBytes = kTiles * kMlaWideTileBytes;
  static constexpr int kRing = kMlaWideHeader + kTiles * kMlaWideTileBytes;
  static constexpr int kSmemBytes = kRing + kStages * kStageBytes;
  static constexpr int kChunkTiles = kHalfTiles < 2 ? kHalfTiles : 2;
  static constexpr int kChunks = kHalfTiles / kChunkTiles;  // of a half
  // By stage: its chunks are empty; then: its tiles are full; then: a piece is noted.
  static constexpr int kEmpties = 2 * kChunks;
  static constexpr int kEmptyBarriers = kEmpties * kStages;
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
  // Its chunk n, counted from the owner's half on.
  __device__ __forceinline__ std::uint32_t empty(int n) const {
    return barriers + 8 * (S::kEmpties * index + n);
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
    const int page = token < end ? __ldcg(table + a.page.quotient(token)) : 0;
    return min(max(page, 0), a.pages - 1);
  }
  __device__ __forceinline__ MlaWidePages(const MlaArgs& a, int log_box, int b, int from_, int end_)
      : table(a.block_table + b * a.table_stride), from(from_), end(end_) {
    const int mine = from + ((threadIdx.x % 32) << log_box);
    now = entry(a, mine), next = entry(a, mine + (32 << log_box));
  }
  // To a block of the first 32 boxes or of those after them.
  __device__ __forceinline__ void move(const MlaArgs& a, int log_box, int token) {
    if (token - from < (32 << log_box)) return;
    from += 32 << log_box, now = next;
    next = entry(a, from + ((threadIdx.x % 32 + 32) << log_box));
  }
  // The page of the box that starts at this lane's `token`, in the block moved to.  All lanes call.
  __device__ __forceinline__ int of(int log_box, int token) const {
    return __shfl_sync(kWarp, now, (token - from) >> log_box & 31);
  }
};

// Brings tiles of a block: `first` to `first + kCount` in the order in which they are scored.
// `filled` boxes of the block are the sequence's; a lane brings one of them to `to`, where it has
// one.  One box is brought by one lane without a loop over lanes, which takes 200 clocks a tile.
template <typename S, int kFirst, int kCount, bool kIsWhole>
__device__ __forceinline__ void mla_wide_bring(const MlaWideMaps& maps, const MlaWideSlot<S>& slot,
                                               int owner, std::uint32_t to, int row, int page,
                                               int filled, bool is_mine) {
  const int lane = threadIdx.x % 32;
  const auto bring = [&](int n) {
    const int tile = S::tile(owner, n);
    sm90::tma_load_3d(to + tile * kMlaWideTileBytes, n < S::kRope ? &maps.latent : &maps.rope,
                      slot.full(tile), n < S::kRope ? tile * 64 : maps.rope_column, row, page);
  };
  if (kIsWhole) {
    if (lane == 0) {
#pragma unroll
      for (int n = kFirst; n < kFirst + kCount; ++n) {
        sm90::mbarrier_expect(slot.full(S::tile(owner, n)), kMlaWideTileBytes);
        bring(n);
      }
    }
  } else {
    if (lane == 0) {
#pragma unroll
      for (int n = kFirst; n < kFirst + kCount; ++n)
        sm90::mbarrier_expect(slot.full(S::tile(owner, n)), filled * maps.box * 128);
    }
    __syncwarp();
    if (is_mine) {
#pragma unroll
      for (int n = kFirst; n < kFirst + kCount; ++n) bring(n);
    }
  }
  __syncwarp();
}

// Whether this CTA is one beside those that may have work.  It executes what they do before they
// have anything to do it with, and then they find the code in L2: there is more of it than a short
// call hides.
__device__ __forceinline__ bool mla_wide_rehearses(const MlaArgs& a) {
  return static_cast<int>(blockIdx.x) >= a.ctas.divisor;
}

// In place of mla_wide_load, of such a CTA: a piece of whatever lies in shared memory, of rows past
// the last one, so that nothing of it is written.  One warp.
template <typename S>
__device__ __forceinline__ void mla_wide_rehearse(const MlaArgs& a) {
  constexpr int kBlocks = 3, kTokens = kBlocks * kMlaWideBlock;  // every path of both warpgroups
  const std::uint32_t base = smem_addr(&S::shared());
  if (threadIdx.x % 32 != 0) return;
  MlaStep* const pieces = S::shared().pieces;
  pieces[0] = {0, kTokens, kTokens + a.tokens, 0, a.passes, 0, 0};
  pieces[1].flags = MlaStep::kStop;
  sm90::mbarrier_arrive(S::noted(0));
  sm90::mbarrier_arrive(S::noted(1));
#pragma unroll 1
  for (int b = 0; b < kBlocks; ++b) {
    const MlaWideSlot<S> slot(base, b);
#pragma unroll 1
    for (int n = 0; n < S::kEmpties; ++n) sm90::mbarrier_wait(slot.empty(n), slot.parity ^ 1);
#pragma unroll 1
    for (int tile = 0; tile < S::kTiles; ++tile) sm90::mbarrier_arrive(slot.full(tile));
  }
}

// Brings the blocks of the CTA's pieces in order, and notes pieces.  One warp.  kIsWhole: a box is
// a block.
template <typename S, bool kIsWhole>
__device__ __forceinline__ void mla_wide_load(const MlaArgs& a, const MlaWideMaps& maps,
                                              const MlaShare& share) {
  const int lane = threadIdx.x % 32;
  const std::uint32_t base = smem_addr(&S::shared());
  const bool speaks = lane == 0 && blockIdx.y == 0;  // for both CTAs of a pair
  if (speaks && !a.unit_per_item && a.unit_count > 0) a.units[blockIdx.x] = MlaUnit{};
  const int log_box = kIsWhole ? kMlaWideLogBlock : maps.log_box, boxes = kMlaWideBlock >> log_box;
  // Those of the first piece, which the share says without a walk where there is one pass.
  bool is_known = a.passes == 1 && share.low < share.high;
  MlaWidePages pages(a, log_box, share.batch, mla_first_token(a, share),
                     is_known ? share.length : 0);
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
    bool is_unlisted = speaks && walk.token == 0;
    if (mla_wide_first_row(a, walk.pass) >= a.rows) continue;  // the pair's other CTA has them all
    if (!is_known) pages = MlaWidePages(a, log_box, walk.b, walk.token, walk.end);
    is_known = false;
    note(0);
#pragma unroll 1
    for (int first = walk.token; first < walk.end; first += kMlaWideBlock, ++b) {
      // The same in all lanes, which the compiler has to know.
      const int block = __shfl_sync(kWarp, b, 0), token = __shfl_sync(kWarp, first, 0);
      const MlaWideSlot<S> slot(base, block);
      const int owner = block & 1;
      pages.move(a, log_box, token);
      const int mine = kIsWhole ? token : token + (lane << log_box);
      const int page = pages.of(log_box, mine), row = a.page.rest(mine);
      const bool is_mine = lane < boxes && mine < walk.end;
      const int filled = min(boxes, (walk.end - token + maps.box - 1) >> log_box);
      const std::uint32_t to = kIsWhole ? slot.stage : slot.stage + (lane << log_box) * 128;
      const std::uint32_t was_given_back = slot.parity ^ 1;
      sm90::mbarrier_wait(slot.empty(0), was_given_back);
      mla_wide_bring<S, 0, S::kChunkTiles, kIsWhole>(maps, slot, owner, to, row, page, filled,
                                                     is_mine);
      if constexpr (S::kChunks == 2) {
        sm90::mbarrier_wait(slot.empty(1), was_given_back);
        mla_wide_bring<S, S::kChunkTiles, S::kChunkTiles, kIsWhole>(maps, slot, owner, to, row,
                                                                    page, filled, is_mine);
      }
      sm90::mbarrier_wait(slot.empty(S::kChunks), was_given_back);
      if constexpr (S::kChunks == 2) {
        mla_wide_bring<S, S::kHalfTiles, S::kChunkTiles, kIsWhole>(maps, slot, owner, to, row, page,
                                                                   filled, is_mine);
        sm90::mbarrier_wait(slot.empty(S::kChunks + 1), was_given_back);
      }
      mla_wide_bring<S, S::kHalfTiles + (S::kChunks - 1) * S::kChunkTiles, S::kChunkTiles + 1,
                     kIsWhole>(maps, slot, owner, to, row, page, filled, is_mine);
      if (is_unlisted) {
        walk.list(a, share);
        is_unlisted = false;
      }
    }
  }
  note(MlaStep::kStop);
}

}  // namespace
}  // namespace zebra
