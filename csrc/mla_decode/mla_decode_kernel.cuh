// The kernels of mla_decode for 16-bit dtypes: attention over pieces of sequences, and the sum of
// the pieces of a sequence.
//
// Computes       o and lse of mla_decode.h for latent queries, R up to 256, E up to 64.
//                Derivation: docs/kernels/mla_decode.md.
// Grid           persistent, one CTA a multiprocessor; mla_decode_schedule.cuh deals the tokens.
// Warps          8.  A team of `groups` warps, 16 query rows each, shares one of 8 / groups streams
//                of 32-token stages; no CTA-wide barrier but where an item ends.
// Stage          32 cached rows [c | k_rope], as tiles of 64 columns in rows of 128 bytes (16-byte
//                unit u of row r at u ^ (r % 8)), 32 columns left over in rows of 64 bytes (u at
//                u ^ (r / 2 % 4)).  The same tile is K (plain) and V (transposed on the way out).
// Registers      scores and probabilities never leave them; q does from R = 192 on.
// Softmax        base 2, relative to a reference that moves only when a score exceeds it by 2^20
//                (fp16: 2^8): probabilities are floating point, so nothing is lost by a late move.
// Bound          HBM: (R + E) x 2 bytes a cached token.
#pragma once

#include <type_traits>

#include "mla_decode/mla_decode_ptx.cuh"
#include "mla_decode/mla_decode_schedule.cuh"

namespace zebra {
namespace {

// What a kernel is compiled for, and the layout of its stages.
template <int kRank_, int kRope_>
struct MlaShape {
  static constexpr int kRank = kRank_, kRope = kRope_, kWidth = kRank + kRope;
  static constexpr int kTiles = kWidth / 64;
  static constexpr bool kHalf = kWidth % 64 != 0;  // 32 columns in a tile of their own
  static constexpr int kTileBytes = kMlaBlock * 128;
  static constexpr int kHalfOffset = kTiles * kTileBytes;
  static constexpr int kStageBytes = kMlaBlock * kWidth * 2;
  static constexpr int kSteps = kWidth / 16;
  static constexpr bool kQFromSmem = kRank >= kMlaQFromSmem;
  static_assert(kRank % 32 == 0 && kWidth % 32 == 0 && kRank <= kTiles * 64,
                "the latent lies in whole tiles");
};

// ---- loading --------------------------------------------------------------------------------

// Copies the blocks of one stream, a few stages ahead of the warps that use them.  Every warp of a
// team copies a part of every stage.
template <typename S>
struct MlaLoader {
  MlaWalk walk;
  int token;       // of the next block
  int entry, row;  // the lane's token of it: page and row in the page
  bool more;

  __device__ __forceinline__ void look_up(const MlaArgs& a) {
    entry = row = 0;
    const int mine = token + static_cast<int>(threadIdx.x % 32);
    if (!more || mine >= walk.end) return;
    const int page = static_cast<int>(a.p.page);
    const int index = mine / page;
    row = mine - index * page;
    entry = __ldg(a.p.block_table + walk.b * a.p.table_stride + index);
  }
  // To the stream's next block.
  __device__ __forceinline__ void advance(const MlaArgs& a, const MlaShare& s, int stream) {
    token += kMlaBlock * a.c.streams;
    while (more && token >= walk.end) {
      more = walk.advance(a, s);
      token = walk.token + kMlaBlock * stream;
    }
    look_up(a);
  }
  __device__ __forceinline__ void begin(const MlaArgs& a, const MlaShare& s, int stream) {
    walk.begin(a, s);
    more = true;
    token = 0;
    advance(a, s, stream);
  }
  // Starts the copy of the next block into a stage.  Rows past the end become zeros.
  __device__ __forceinline__ void copy(const MlaArgs& a, unsigned stage, int group) const {
    const int lane = threadIdx.x % 32, unit = lane % 8;
    const int page = min(max(entry, 0), static_cast<int>(a.p.pages) - 1);
    const std::int64_t mine = 2 * (page * a.p.page_stride + row * a.p.row_stride);
    const int shift = 2 * (S::kRank - static_cast<int>(a.p.R));  // rope columns lie closer
    const int rank = static_cast<int>(a.p.R), rope = static_cast<int>(a.p.E);
    for (int i = group; i < 8; i += a.c.groups) {
      const int r = 4 * i + lane / 8;
      const bool valid = token + r < walk.end;
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
  const int rows = a.c.streams * a.c.slots * kMlaBlock;
  for (int i = threadIdx.x; i < rows * kUnits; i += blockDim.x) {
    const int unit = i % kUnits, row = i / kUnits, column = unit * 8;
    if (column < S::kRank ? column < rank : column - S::kRank < rope) continue;
    const unsigned stage = ring + row / kMlaBlock * S::kStageBytes;
    const int r = row % kMlaBlock, tile = unit / 8, u = unit % 8;
    const unsigned at = tile < S::kTiles ? tile * S::kTileBytes + r * 128 + ((u ^ (r & 7)) << 4)
                                         : S::kHalfOffset + r * 64 + ((u ^ (r >> 1 & 3)) << 4);
    store_shared(stage + at, zeros);
  }
}

// ---- one warp's 16 rows ---------------------------------------------------------------------

template <typename T, typename S>
struct MlaRows {
  unsigned q[S::kQFromSmem ? 1 : S::kSteps][4];
  unsigned q_address;  // where q lies in shared memory
  float o[S::kRank / 8][4];
  float reference[2], threshold[2], sum[2];  // of rows g and g + 8; the sum is the lane's part
  int limit[2];                              // cached tokens that the row sees

  // The fragment of q for columns 16 step .. 16 step + 15.
  __device__ __forceinline__ void read_q(const MlaArgs& a, const char* const (&row)[2], int step,
                                         unsigned (&fragment)[4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int column = step * 16 + i / 2 * 8 + 2 * t;
      bool used = column < static_cast<int>(a.p.R);
      if (column >= S::kRank) {
        column -= S::kRank;
        used = column < static_cast<int>(a.p.E);
        column += static_cast<int>(a.p.R);
      }
      const char* const at = row[i % 2];
      fragment[i] =
          used && at != nullptr ? __ldg(reinterpret_cast<const unsigned*>(at + column * 2)) : 0u;
    }
  }

  // Opens an item; `row` is the warp's first, among `rows` of the sequence.
  __device__ __forceinline__ void begin(const MlaArgs& a, const MlaWalk& walk, int row, int rows,
                                        int stream, int barrier) {
    const int g = threadIdx.x % 32 / 4;
    const int heads = static_cast<int>(a.p.H), tokens = static_cast<int>(a.p.T);
    const char* source[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int mine = row + g + 8 * i, token = mine / heads, head = mine - token * heads;
      limit[i] = mine < rows ? walk.length - tokens + token + 1 : 0;
      source[i] = mine < rows ? static_cast<const char*>(a.p.q) +
                                    2 * (walk.b * a.p.q_stride[0] + token * a.p.q_stride[1] +
                                         head * a.p.q_stride[2])
                              : nullptr;
      reference[i] = 0.f, threshold[i] = -kInfinity, sum[i] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < S::kRank / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
    if constexpr (S::kQFromSmem) {
      for (int step = stream; step < S::kSteps; step += a.c.streams) {
        unsigned fragment[4];
        read_q(a, source, step, fragment);
        store_shared(q_address + step * 512, fragment);
      }
      named_barrier(barrier, 32 * a.c.streams);
    } else {
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) read_q(a, source, step, q[step]);
    }
  }

  // Raises the reference of rows whose scores have left it behind.
  __device__ __forceinline__ void raise(float (&top)[2]) {
    constexpr float kSlack = std::is_same_v<T, __half> ? 8.f : 20.f;
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(kWarp, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(kWarp, top[i], 2));
      shrink[i] = 1.f;
      if (top[i] > threshold[i]) {
        shrink[i] = threshold[i] == -kInfinity ? 1.f : exp2_approx(reference[i] - top[i]);
        reference[i] = top[i];
        threshold[i] = top[i] + kSlack;
      }
      sum[i] *= shrink[i];
    }
#pragma unroll
    for (int j = 0; j < S::kRank / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] *= shrink[i / 2];
  }

  // Attention over the 32 tokens of a stage, the first of which is `token` of the sequence.
  __device__ __forceinline__ void attend(unsigned stage, float scale, int token, bool is_masked) {
    const unsigned lane = threadIdx.x % 32, x = lane & 7;
    // Blocks of K: (tokens 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
    const unsigned k_row = x + (lane >> 4 & 1) * 8, k_unit = lane >> 3 & 1;
    const unsigned k_tile = stage + k_row * 128 + ((k_unit ^ x) << 4);
    const unsigned k_half = stage + S::kHalfOffset + k_row * 64 + ((k_unit ^ (x >> 1)) << 4);
    float s[4][4] = {};
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      unsigned low[4], high[4];
      if (step < S::kTiles * 4) {
        const unsigned at = (k_tile ^ (step % 4 << 5)) + step / 4 * S::kTileBytes;
        load_blocks(low, at);
        load_blocks(high, at + 16 * 128);
      } else {
        const unsigned at = k_half ^ (step % 2 << 5);
        load_blocks(low, at);
        load_blocks(high, at + 16 * 64);
      }
      unsigned from_smem[4];
      if constexpr (S::kQFromSmem) load_shared(from_smem, q_address + step * 512);
      const unsigned (&fragment)[4] = S::kQFromSmem ? from_smem : q[S::kQFromSmem ? 0 : step];
      multiply_add<T>(s[0], fragment, low[0], low[1]);
      multiply_add<T>(s[1], fragment, low[2], low[3]);
      multiply_add<T>(s[2], fragment, high[0], high[1]);
      multiply_add<T>(s[3], fragment, high[2], high[3]);
    }

    float top[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= scale;
    if (is_masked) {
      const int first = token + 2 * static_cast<int>(lane % 4);
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + 8 * n + i % 2 >= limit[i / 2]) s[n][i] = -kInfinity;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[n][i]);
    if (__any_sync(kWarp, top[0] > threshold[0] || top[1] > threshold[1])) raise(top);

    unsigned p[2][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(s[n][i] - reference[i / 2]);
        sum[i / 2] += s[n][i];
      }
      p[n / 2][n % 2 * 2] = pack<T>(s[n][0], s[n][1]);
      p[n / 2][n % 2 * 2 + 1] = pack<T>(s[n][2], s[n][3]);
    }

    // Blocks of V: (tokens 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
    const unsigned v_row = x + (lane >> 3 & 1) * 8, v_unit = lane >> 4 & 1;
    const unsigned v_tile = stage + v_row * 128 + ((v_unit ^ x) << 4);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int c = 0; c < S::kRank / 16; ++c) {
        unsigned v[4];
        load_blocks_t(v, (v_tile ^ (c % 4 << 5)) + c / 4 * S::kTileBytes + half * 16 * 128);
        multiply_add<T>(o[2 * c], p[half], v[0], v[1]);
        multiply_add<T>(o[2 * c + 1], p[half], v[2], v[3]);
      }
  }
};

// ---- the end of a piece ---------------------------------------------------------------------

struct MlaMerge {
  float2 (*stats)[16];   // [warps]: reference and sum of a warp's rows
  float2 (*merged)[16];  // [groups]: of the group's rows over all streams
  float* columns;        // [warps][16][kMlaMergeStride]
};

// Adds the results of a group's streams and writes them: the item's o and lse, or a partial result.
// The group's warps call it together; streams without tokens bring zeros.
template <typename T, typename S>
__device__ __forceinline__ void mla_finish(const MlaArgs& a, MlaRows<T, S>& rows, const MlaMerge& m,
                                           const MlaWalk& walk, int stream, int group,
                                           int barrier) {
  const int streams = a.c.streams, groups = a.c.groups, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    const bool any = rows.threshold[i] != -kInfinity;
    if (t == 0) m.stats[warp][g + 8 * i] = {any ? rows.reference[i] : -kInfinity, sum};
  }
  named_barrier(barrier, 32 * streams);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = -kInfinity, sum = 0.f;
    for (int s = 0; s < streams; ++s) top = fmaxf(top, m.stats[s * groups + group][g + 8 * i].x);
    const float base = top == -kInfinity ? 0.f : top;
    for (int s = 0; s < streams; ++s) {
      const float2 v = m.stats[s * groups + group][g + 8 * i];
      sum += v.y * exp2_approx(v.x - base);
    }
    scale[i] = exp2_approx(m.stats[warp][g + 8 * i].x - base);
    if (stream == 0 && t == 0) m.merged[group][g + 8 * i] = {top, sum};
  }

  const std::int64_t partial = walk.partial(a);
  const int all = static_cast<int>(a.p.T * a.p.H);
  const int first = (walk.pass * groups + group) * 16;  // of the group's rows in the sequence
  const std::int64_t out = static_cast<std::int64_t>(walk.b) * all + first;
  const std::int64_t kept = (partial * groups + group) * 16;
  float* const mine = m.columns + warp * 16 * kMlaMergeStride;
  constexpr int kStep = kMlaMergeColumns;
  constexpr int kStride = kMlaMergeStride;
#pragma unroll
  for (int c = 0; c < S::kRank / kStep; ++c) {
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
      const float (&o)[4] = rows.o[c * (kStep / 8) + j];
      float* const to = mine + g * kStride + 8 * j + 2 * t;
      *reinterpret_cast<float2*>(to) = {o[0] * scale[0], o[1] * scale[0]};
      *reinterpret_cast<float2*>(to + 8 * kStride) = {o[2] * scale[1], o[3] * scale[1]};
    }
    named_barrier(barrier, 32 * streams);
    for (int i = stream * 32 + lane; i < 16 * kStep / 4; i += 32 * streams) {
      const int r = i / (kStep / 4), column = i % (kStep / 4) * 4;
      float4 v = {};
      for (int s = 0; s < streams; ++s) {
        const float4 part = *reinterpret_cast<const float4*>(
            m.columns + ((s * groups + group) * 16 + r) * kStride + column);
        v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
      }
      const int at = c * kStep + column;
      if (first + r >= all) continue;
      if (partial >= 0) {
        *reinterpret_cast<float4*>(a.sums + (kept + r) * S::kRank + at) = v;
      } else if (at < static_cast<int>(a.p.R)) {
        const float sum = m.merged[group][r].y;
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
        const uint2 packed = {pack<T>(v.x * inverse, v.y * inverse),
                              pack<T>(v.z * inverse, v.w * inverse)};
        *reinterpret_cast<uint2*>(static_cast<char*>(a.p.o) + ((out + r) * a.p.R + at) * 2) =
            packed;
      }
    }
    if (c == 0 && stream == 0 && lane < 16 && first + lane < all) {
      const float2 v = m.merged[group][lane];
      if (partial >= 0)
        a.stats[kept + lane] = v;
      else
        static_cast<float*>(a.p.lse)[out + lane] = mla_lse(v.x, v.y);
    }
    named_barrier(barrier, 32 * streams);
  }
}

// Rows of sequences without tokens; nothing of them is on the line of work.
template <typename T>
__device__ __forceinline__ void mla_write_empty(const MlaArgs& a) {
  const int batch = static_cast<int>(a.p.B);
  const std::int64_t rows = a.p.T * a.p.H;
  for (int b = blockIdx.x; b < batch; b += gridDim.x) {
    if (mla_length(a, b) > 0) continue;
    uint4* const o = reinterpret_cast<uint4*>(static_cast<T*>(a.p.o) + b * rows * a.p.R);
    for (std::int64_t i = threadIdx.x; i < rows * a.p.R / 8; i += blockDim.x) o[i] = {};
    float* const lse = static_cast<float*>(a.p.lse) + b * rows;
    for (std::int64_t i = threadIdx.x; i < rows; i += blockDim.x) lse[i] = -kInfinity;
    if (a.c.unit_per_item && a.c.units > 0)
      for (int i = threadIdx.x; i < a.c.passes; i += blockDim.x)
        a.units[static_cast<std::int64_t>(b) * a.c.passes + i] = MlaUnit{};
  }
}

// ---- kernels --------------------------------------------------------------------------------

template <typename T, int kRank, int kRope>
__global__ void __launch_bounds__(32 * kMlaWarps, 1)
    mla_decode_kernel(const __grid_constant__ MlaArgs a) {
  using S = MlaShape<kRank, kRope>;
  extern __shared__ __align__(1024) unsigned char smem[];
  grid_launch_dependents();
  int* const scratch = reinterpret_cast<int*>(smem);
  const MlaMerge merge = {reinterpret_cast<float2(*)[16]>(smem + 512),
                          reinterpret_cast<float2(*)[16]>(smem + 512 + kMlaWarps * 128),
                          reinterpret_cast<float*>(smem + kMlaMergeOffset)};
  static_assert(512 + 2 * kMlaWarps * 128 <= kMlaMergeOffset, "statistics fit before the merge");
  const unsigned ring = shared_address(smem + a.c.ring_offset);

  mla_clear_padding<S>(a, ring);
  const MlaShare share = mla_share(a, scratch);
  if (threadIdx.x == 0 && !a.c.unit_per_item && a.c.units > 0) a.units[blockIdx.x] = MlaUnit{};
  mla_write_empty<T>(a);
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = a.c.groups, streams = a.c.streams, slots = a.c.slots;
  const int stream = warp / groups, group = warp % groups;
  if (stream >= streams) return;
  const int team_barrier = 1 + stream, group_barrier = 1 + streams + group;
  const unsigned stages = ring + stream * slots * S::kStageBytes;
  const float scale = static_cast<float>(a.p.scale * 1.44269504088896340736);
  const int rows = static_cast<int>(a.p.T * a.p.H), tokens = static_cast<int>(a.p.T);

  MlaLoader<S> loader;
  loader.begin(a, share, stream);
  for (int i = 0; i < slots - 1; ++i) {
    if (loader.more) loader.copy(a, stages + i * S::kStageBytes, group);
    copy_commit();
    if (loader.more) loader.advance(a, share, stream);
  }

  MlaRows<T, S> mine;
  mine.q_address = shared_address(smem + a.c.q_offset) + group * S::kSteps * 512 +
                   static_cast<unsigned>(lane) * 16;
  MlaWalk walk;
  walk.begin(a, share);
  int slot = 0;
  while (walk.advance(a, share)) {
    const int row = (walk.pass * groups + group) * 16;
    const bool is_active = row < rows;  // by warp; the others of its group agree
    if (is_active) mine.begin(a, walk, row, rows, stream, group_barrier);
    for (int token = walk.token + kMlaBlock * stream; token < walk.end;
         token += kMlaBlock * streams) {
      copy_wait(slots - 2);
      named_barrier(team_barrier, 32 * groups);
      // Every warp of the team is done with the stage before this one: refill it.
      const int free = slot == 0 ? slots - 1 : slot - 1;
      if (loader.more) loader.copy(a, stages + free * S::kStageBytes, group);
      copy_commit();
      if (loader.more) loader.advance(a, share, stream);
      const bool is_masked = token + kMlaBlock > walk.length - tokens + 1;
      if (is_active) mine.attend(stages + slot * S::kStageBytes, scale, token, is_masked);
      slot = slot + 1 == slots ? 0 : slot + 1;
    }
    if (threadIdx.x == 0) walk.list(a, share);
    if (is_active) mla_finish<T, S>(a, mine, merge, walk, stream, group, group_barrier);
  }
}

}  // namespace
}  // namespace zebra
