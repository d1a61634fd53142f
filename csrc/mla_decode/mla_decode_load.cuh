// mla_decode on CUDA: how cached rows come to shared memory, by cp.async or by TMA.
//
// A stage holds 32 (TMA: 64) cached rows [c | k_rope] as tiles of 64 columns in rows of 128 bytes,
// 16-byte unit u of row r at u ^ (r % 8), and where 32 columns are left over a tile of rows of 64
// bytes, u at u ^ (r / 2 % 4): the two swizzles of TMA, in which 8 rows of a column of units lie
// in different banks.
#pragma once

#include <cuda.h>

#include "common/sm90/ptx.cuh"
#include "common/sm90/tma.cuh"
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
  static constexpr int kQPitch = mla_q_pitch(kWidth);
  static_assert(kRank % 32 == 0 && kWidth % 32 == 0 && kRank <= kTiles * 64,
                "the latent lies in whole tiles");
};

constexpr int kMlaTableAhead = 512;  // tokens

// Bytes of a CTA's share from which, and up to which, its rows are brought as those that nobody
// asks for again.  Fewer find room in L2 beside what is there, and with more the L2 has to write
// back what others left there in any case, which costs more if it is put off.
constexpr unsigned kMlaLeastOnce = 128 << 10, kMlaMostOnce = 1600 << 10;

// Where one part of a CTA brings and the other attends, the first makes the barriers ready and the
// second finds the share: named barriers at which one part arrives and the other waits.
// compute-sanitizer wants a barrier that all wait at to stand in one place.
enum { kMlaBarrierReady = 14, kMlaBarrierKnown = 15 };

// The table in L2 by the time that this or another CTA knows its part of it.  One warp.
__device__ __forceinline__ void mla_prefetch_table(const MlaArgs& a, int lane) {
  const int line = static_cast<int>(blockIdx.x + lane * gridDim.x);
  if (line < a.table_lines) prefetch_l2(a.block_table + line * 32);
}

// Waits until at most `pending` of this thread's committed groups of copies are in flight.
__device__ __forceinline__ void mla_copy_wait(int pending) {
  switch (pending) {
    case 0:
      return cp_async_wait<0>();
    case 1:
      return cp_async_wait<1>();
    case 2:
      return cp_async_wait<2>();
    case 3:
      return cp_async_wait<3>();
    case 4:
      return cp_async_wait<4>();
    case 5:
      return cp_async_wait<5>();
    default:
      return cp_async_wait<6>();
  }
}

// Brings the stages of one stream, a few ahead of the warps that use them.  With cp.async every
// warp of a team copies a part of every stage, and nothing of it is kept in registers; with TMA one
// lane of a warp of its own does all of it.
template <typename S>
struct MlaLoader {
  // To the stream's next stage.  Every piece has one at least, be it empty: all streams attend the
  // end of a piece.  With cp.async it has as many of every stream, because a barrier belongs to
  // each, and compute-sanitizer's racecheck takes warps that met others less often for unordered.
  // One lane.
  static __device__ __forceinline__ void advance(const MlaArgs& a, const MlaShare& s, MlaWalk& walk,
                                                 int stream) {
    if (walk.flags == MlaStep::kStop) return;
    const int ahead = S::kStage * a.streams, lag = S::kTma ? 0 : S::kStage * stream;
    int token = walk.stage + ahead;
    int flags = 0;
    if (token - lag >= walk.end) {
      if (walk.advance(a, s)) {
        flags = MlaStep::kFirst;
      } else {
        flags = MlaStep::kStop;
        walk.end = 0;
      }
      token = walk.token + S::kStage * stream;
    }
    if (flags != MlaStep::kStop && token + ahead - lag >= walk.end) flags |= MlaStep::kLast;
    walk.stage = token, walk.flags = flags;
  }
  // The table's entry for a cached token.  Neighbours of it are needed soon after and then lie in
  // L1 (which may be out of date before the grid's wait: `is_early`); the next line of the table is
  // asked for in time.
  static __device__ __forceinline__ int page(const MlaArgs& a, const MlaWalk& walk, int token,
                                             bool is_early) {
    const std::int32_t* const table = a.block_table + walk.b * a.table_stride;
    const std::int32_t* const at = table + a.page.quotient(token);
    const int entry = token >= walk.end ? 0 : is_early ? __ldcg(at) : __ldg(at);
    prefetch_l2(table + a.page.quotient(min(token + kMlaTableAhead, walk.end - 1)));
    return entry;
  }
  // The stream's first stage of a share, made without the walk to it: its first token, or -1 where
  // it is empty or there are several passes.
  static __device__ __forceinline__ int first_token(const MlaArgs& a, const MlaShare& s,
                                                    int stream) {
    if (a.passes > 1 || s.low >= s.high) return -1;
    const int from = mla_first_unit(a, s);
    const int until =
        min(a.is_split ? from + 1 : s.units, min(s.units, s.high - s.start - a.item_cost));
    const int token = from * a.unit.divisor + S::kStage * stream;
    return token < (until == s.units ? s.length : until * a.unit.divisor) ? token : -1;
  }
  static __device__ __forceinline__ int valid(const MlaArgs& a, int page) {
    return min(max(page, 0), a.pages - 1);
  }
  // Starts the TMA of the stage from cached token `token` on, which lies in `page` and arrives at
  // the barrier `full`.  Rows past the end of the sequence come as they lie in the page.
  // `share_tokens`: about as many as the CTA brings in all.  One lane.
  static __device__ __forceinline__ void bring(const MlaArgs& a, const MlaMaps& maps, int token,
                                               int page, unsigned stage, unsigned full,
                                               unsigned share_tokens) {
    const int row = a.page.rest(token);
    page = valid(a, page);
    constexpr unsigned kRowBytes = S::kWidth * 2;
    const bool is_once =
        share_tokens >= kMlaLeastOnce / kRowBytes && share_tokens <= kMlaMostOnce / kRowBytes;
    const auto load_all = [&](auto... policy) {
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile)
        sm90::tma_load_3d(stage + tile * S::kTileBytes, &maps.tile, full, tile * 64, row, page,
                          policy...);
      if (S::kHalf)
        sm90::tma_load_3d(stage + S::kHalfOffset, &maps.half, full, S::kTiles * 64, row, page,
                          policy...);
    };
    if (is_once)
      load_all(sm90::tma_read_once());
    else
      load_all();
  }

  // Starts the copy of the next stage.  Rows past the end become zeros.
  static __device__ __forceinline__ void copy(const MlaArgs& a, const MlaWalk& walk, MlaStep& step,
                                              unsigned stage, int group, bool is_early) {
    const int lane = threadIdx.x % 32, unit = lane % 8;
    if (lane == 0) step.note(a, walk);
    const int token = walk.stage, end = walk.end;
    if (token >= end) return;
    const int page = valid(a, MlaLoader::page(a, walk, token + lane, is_early));
    const int row = a.page.rest(token + lane);
    const std::int64_t mine = 2 * (page * a.page_stride + row * a.row_stride);
    const int shift = 2 * (S::kRank - a.R);  // rope columns lie closer
#pragma unroll 1
    for (int i = group; i < 8; i += a.groups) {
      const int r = 4 * i + lane / 8;
      const bool valid = token + r < end;
      const char* src = static_cast<const char*>(a.cache) + __shfl_sync(kWarp, mine, r) + unit * 16;
#pragma unroll
      for (int tile = 0; tile < S::kTiles + S::kHalf; ++tile) {
        const int column = tile * 64 + unit * 8;
        const bool is_rope = column >= S::kRank;
        const bool used = is_rope ? column - S::kRank < a.E : column < a.R;
        const char* from = src + tile * 128 - (is_rope ? shift : 0);
        if (tile < S::kTiles) {
          const unsigned to = stage + tile * S::kTileBytes + r * 128 + ((unit ^ (r & 7)) << 4);
          if (used) cp_async_16(to, from, valid);
        } else if (unit < 4) {
          const unsigned to = stage + S::kHalfOffset + r * 64 + ((unit ^ (r >> 1 & 3)) << 4);
          if (used) cp_async_16(to, from, valid);
        }
      }
    }
  }
};

// Zeros where the cache's rows are narrower than the instance; copies never touch it.
template <typename S>
__device__ __forceinline__ void mla_clear_padding(const MlaArgs& a, unsigned ring) {
  const int rank = a.R, rope = a.E;
  if (rank == S::kRank && rope == S::kRope) return;
  const unsigned zeros[4] = {0, 0, 0, 0};
  constexpr int kUnits = S::kWidth / 8;
  const int rows = a.streams * a.slots * S::kStage;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kUnits; i += blockDim.x) {
    const int unit = i % kUnits, row = i / kUnits, column = unit * 8;
    if (column < S::kRank ? column < rank : column - S::kRank < rope) continue;
    const unsigned stage = ring + row / S::kStage * S::kStageBytes;
    const int r = row % S::kStage, tile = unit / 8, u = unit % 8;
    const unsigned at = tile < S::kTiles ? tile * S::kTileBytes + r * 128 + ((u ^ (r & 7)) << 4)
                                         : S::kHalfOffset + r * 64 + ((u ^ (r >> 1 & 3)) << 4);
    st_shared_v4(stage + at, zeros);
  }
  __syncthreads();
}

// Zeros in the rows of a stage from `first` on, by the `threads` threads of a team: what a page
// holds past the end of its sequence may be NaN, and 0 * NaN is NaN.
template <typename S>
__device__ __forceinline__ void mla_clear_tail(unsigned stage, int first, int thread, int threads) {
  const unsigned zeros[4] = {0, 0, 0, 0};
  constexpr int kUnits = S::kWidth / 8;
#pragma unroll 1
  for (int i = thread; i < (S::kStage - first) * kUnits; i += threads) {
    const int r = first + i / kUnits, unit = i % kUnits, tile = unit / 8;
    const unsigned at = tile < S::kTiles ? tile * S::kTileBytes + r * 128 + unit % 8 * 16
                                         : S::kHalfOffset + r * 64 + unit % 8 * 16;
    st_shared_v4(stage + at, zeros);
  }
}

}  // namespace
}  // namespace zebra
