// mla_decode on CUDA: how cached rows come to shared memory, by cp.async or by TMA.
//
// A stage holds 32 (TMA: 64) cached rows [c | k_rope] as tiles of 64 columns in rows of 128 bytes,
// 16-byte unit u of row r at u ^ (r % 8), and where 32 columns are left over a tile of rows of 64
// bytes, u at u ^ (r / 2 % 4): the two swizzles of TMA, in which 8 rows of a column of units lie
// in different banks.
#pragma once

#include <cuda.h>

#include "mla_decode/mla_decode_ptx.cuh"
#include "mla_decode/mla_decode_schedule.cuh"

namespace zebra {
namespace {

// Maps of the cache for TMA, [page, row, column]: boxes of a stage's rows and 64 or 32 columns.
struct MlaMaps {
  CUtensorMap tile, half;
};

// What a kernel is compiled for, and the layout of its stages.
template <int kRank_, int kRope_, bool kTma_>
struct MlaShape {
  static constexpr bool kTma = kTma_;
  static constexpr int kStage = kTma ? kMlaTmaStage : kMlaBlock;
  static constexpr int kRank = kRank_, kRope = kRope_, kWidth = kRank + kRope;
  static constexpr int kTiles = kWidth / 64;
  static constexpr bool kHalf = kWidth % 64 != 0;  // 32 columns in a tile of their own
  static constexpr int kTileBytes = kStage * 128;
  static constexpr int kHalfOffset = kTiles * kTileBytes;
  static constexpr int kStageBytes = kStage * kWidth * 2;
  static constexpr int kSteps = kWidth / 16;
  static constexpr bool kQFromSmem = kRank >= kMlaQFromSmem;
  static_assert(kRank % 32 == 0 && kWidth % 32 == 0 && kRank <= kTiles * 64,
                "the latent lies in whole tiles");
};

// Copies the stages of one stream, a few ahead of the warps that use them.  With cp.async every
// warp of a team copies a part of every stage; with TMA one lane of the team has it done.
template <typename S>
struct MlaLoader {
  MlaWalk& walk;   // in shared memory
  int token;       // of the next stage
  int end;         // of its piece
  int entry, row;  // the lane's token of it (TMA: the first): page and row in the page
  bool more;

  __device__ __forceinline__ void look_up(const MlaArgs& a) {
    entry = row = 0;
    const int mine = token + (S::kTma ? 0 : static_cast<int>(threadIdx.x % 32));
    if (!more || mine >= end) return;
    const int page = static_cast<int>(a.p.page);
    const int index = mine / page;
    row = mine - index * page;
    entry = __ldg(a.p.block_table + walk.b * a.p.table_stride + index);
  }
  // To the stream's next stage.
  __device__ __forceinline__ void advance(const MlaArgs& a, const MlaShare& s, int stream) {
    token += S::kStage * a.c.streams;
    while (more && token >= end) {
      more = mla_advance(walk, a, s);
      token = walk.token + S::kStage * stream;
      end = walk.end;
    }
    look_up(a);
  }
  __device__ __forceinline__ void begin(const MlaArgs& a, const MlaShare& s, int stream) {
    if (threadIdx.x % 32 == 0) walk.begin(a, s);
    more = true;
    token = end = 0;
    advance(a, s, stream);
  }
  // Starts the TMA of the next stage, which arrives at the barrier `full`.  Rows past the end of
  // the sequence come as they lie in the page.
  __device__ __forceinline__ void fetch(const MlaArgs& a, const MlaMaps& maps, unsigned stage,
                                        unsigned full) const {
    if (threadIdx.x % 32 != 0) return;
    const int page = min(max(entry, 0), static_cast<int>(a.p.pages) - 1);
    mbarrier_expect(full, S::kStageBytes);
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile)
      tma_load(stage + tile * S::kTileBytes, &maps.tile, full, tile * 64, row, page);
    if (S::kHalf) tma_load(stage + S::kHalfOffset, &maps.half, full, S::kTiles * 64, row, page);
  }

  // Starts the copy of the next stage.  Rows past the end become zeros.
  __device__ __forceinline__ void copy(const MlaArgs& a, unsigned stage, int group) const {
    const int lane = threadIdx.x % 32, unit = lane % 8;
    const int page = min(max(entry, 0), static_cast<int>(a.p.pages) - 1);
    const std::int64_t mine = 2 * (page * a.p.page_stride + row * a.p.row_stride);
    const int shift = 2 * (S::kRank - static_cast<int>(a.p.R));  // rope columns lie closer
    const int rank = static_cast<int>(a.p.R), rope = static_cast<int>(a.p.E);
    for (int i = group; i < 8; i += a.c.groups) {
      const int r = 4 * i + lane / 8;
      const bool valid = token + r < end;
      const char* src =
          static_cast<const char*>(a.p.cache) + __shfl_sync(kWarp, mine, r) + unit * 16;
#pragma unroll
      for (int tile = 0; tile < S::kTiles + S::kHalf; ++tile) {
        const int column = tile * 64 + unit * 8;
        const bool is_rope = column >= S::kRank;
        const bool used = is_rope ? column - S::kRank < rope : column < rank;
        const char* from = src + tile * 128 - (is_rope ? shift : 0);
        if (tile < S::kTiles) {
          const unsigned to = stage + tile * S::kTileBytes + r * 128 + ((unit ^ (r & 7)) << 4);
          if (used) copy_async(to, from, valid);
        } else if (unit < 4) {
          const unsigned to = stage + S::kHalfOffset + r * 64 + ((unit ^ (r >> 1 & 3)) << 4);
          if (used) copy_async(to, from, valid);
        }
      }
    }
  }
};

// Zeros where the cache's rows are narrower than the instance; copies never touch it.
template <typename S>
__device__ __forceinline__ void mla_clear_padding(const MlaArgs& a, unsigned ring) {
  const int rank = static_cast<int>(a.p.R), rope = static_cast<int>(a.p.E);
  if (rank == S::kRank && rope == S::kRope) return;
  const unsigned zeros[4] = {0, 0, 0, 0};
  constexpr int kUnits = S::kWidth / 8;
  const int rows = a.c.streams * a.c.slots * S::kStage;
  for (int i = threadIdx.x; i < rows * kUnits; i += blockDim.x) {
    const int unit = i % kUnits, row = i / kUnits, column = unit * 8;
    if (column < S::kRank ? column < rank : column - S::kRank < rope) continue;
    const unsigned stage = ring + row / S::kStage * S::kStageBytes;
    const int r = row % S::kStage, tile = unit / 8, u = unit % 8;
    const unsigned at = tile < S::kTiles ? tile * S::kTileBytes + r * 128 + ((u ^ (r & 7)) << 4)
                                         : S::kHalfOffset + r * 64 + ((u ^ (r >> 1 & 3)) << 4);
    store_shared(stage + at, zeros);
  }
}

// Zeros in the rows of a stage from `first` on, by the `threads` threads of a team: what a page
// holds past the end of its sequence may be NaN, and 0 * NaN is NaN.
template <typename S>
__device__ __forceinline__ void mla_clear_tail(unsigned stage, int first, int thread, int threads) {
  const unsigned zeros[4] = {0, 0, 0, 0};
  constexpr int kUnits = S::kWidth / 8;
  for (int i = thread; i < (S::kStage - first) * kUnits; i += threads) {
    const int r = first + i / kUnits, unit = i % kUnits, tile = unit / 8;
    const unsigned at = tile < S::kTiles ? tile * S::kTileBytes + r * 128 + unit % 8 * 16
                                         : S::kHalfOffset + r * 64 + unit % 8 * 16;
    store_shared(stage + at, zeros);
  }
}

}  // namespace
}  // namespace zebra
