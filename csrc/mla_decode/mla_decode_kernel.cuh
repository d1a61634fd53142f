// The kernels of mla_decode for 16-bit dtypes: attention over pieces of sequences, and the sum of
// the pieces of a sequence.
//
// Computes       o and lse of mla_decode.h for latent queries, R up to 256, E up to 64.
//                Derivation: docs/kernels/mla_decode.md.
// Grid           persistent, one CTA a multiprocessor; mla_decode_schedule.cuh deals the tokens.
// Warps          8.  A team of `groups` (query rows, 16 each) x `halves` (of a stage) warps shares
//                one stream of stages; no barrier beyond the team but where an item ends.
// Stage          32 cached rows (TMA: 64), mla_decode_load.cuh: the same tile is K (plain) and V
//                (transposed on the way out of shared memory).
// Registers      scores and probabilities never leave them; q does from R = 192 on.
// Softmax        base 2, relative to a reference that moves only when a score exceeds it by 2^20
//                (fp16: 2^8): probabilities are floating point, so nothing is lost by a late move.
// Bound          HBM: (R + E) x 2 bytes a cached token.
#pragma once

#include <type_traits>

#include "mla_decode/mla_decode_load.cuh"

namespace zebra {
namespace {

// What a thread is.  A piece's end asks anew, through thread_index(), so that the answers take no
// registers while the stages pass.
struct MlaPlace {
  int warp, lane, halves, team, stream, member, half, group;
  int worker, workers;  // among the warps with the same rows
  int group_barrier;    // of those

  __device__ __forceinline__ MlaPlace(const MlaArgs& a, bool tma, int thread)
      : warp(thread / 32), lane(thread % 32), halves(tma ? a.c.halves : 1) {
    const int groups = a.c.groups;
    team = groups * halves, stream = warp / team, member = warp % team;
    half = member / groups, group = member % groups;
    worker = stream * halves + half, workers = a.c.streams * halves;
    group_barrier = 1 + a.c.streams + group;
  }
};

__device__ __forceinline__ int thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Shared memory of every warp of 16 rows that only masked stages need: tokens that each row sees.
constexpr int kMlaLimitsOffset = kMlaMergeOffset - kMlaWarps * 64;

__device__ __forceinline__ int* mla_limits() {
  extern __shared__ __align__(1024) unsigned char smem[];
  return reinterpret_cast<int*>(smem + kMlaLimitsOffset) + threadIdx.x / 32 * 16;
}

// ---- one warp's 16 rows ---------------------------------------------------------------------

template <typename T, typename S>
struct MlaRows {
  unsigned q[S::kQFromSmem ? 1 : S::kSteps][4];
  unsigned q_address;  // where q lies in shared memory
  float o[S::kRank / 8][4];
  float reference[2], sum[2];  // of rows g and g + 8; the sum is the lane's part

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
                                        const MlaPlace& place) {
    const int g = threadIdx.x % 32 / 4;
    const int heads = static_cast<int>(a.p.H), tokens = static_cast<int>(a.p.T);
    const char* source[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int mine = row + g + 8 * i, token = mine / heads, head = mine - token * heads;
      if (threadIdx.x % 4 == 0)
        mla_limits()[g + 8 * i] = mine < rows ? walk.length - tokens + token + 1 : 0;
      source[i] = mine < rows ? static_cast<const char*>(a.p.q) +
                                    2 * (walk.b * a.p.q_stride[0] + token * a.p.q_stride[1] +
                                         head * a.p.q_stride[2])
                              : nullptr;
      reference[i] = -kInfinity, sum[i] = 0.f;  // no token yet
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < S::kRank / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
    if constexpr (S::kQFromSmem) {
      for (int step = place.worker; step < S::kSteps; step += place.workers) {
        unsigned fragment[4];
        read_q(a, source, step, fragment);
        store_shared(q_address + step * 512, fragment);
      }
      named_barrier(place.group_barrier, 32 * place.workers);
    } else {
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) read_q(a, source, step, q[step]);
    }
  }

  // Whether a score has left the reference of its row behind.
  __device__ __forceinline__ bool is_left_behind(float top, int i) const {
    return top > reference[i] + (std::is_same_v<T, __half> ? 8.f : 20.f);
  }

  // Raises the reference of rows whose scores have left it behind.
  __device__ __forceinline__ void raise(float (&top)[2]) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(kWarp, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(kWarp, top[i], 2));
      shrink[i] = 1.f;
      if (is_left_behind(top[i], i)) {
        shrink[i] = reference[i] == -kInfinity ? 1.f : exp2_approx(reference[i] - top[i]);
        reference[i] = top[i];
      }
      sum[i] *= shrink[i];
    }
#pragma unroll
    for (int j = 0; j < S::kRank / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] *= shrink[i / 2];
  }

  // Attention over 32 tokens of a stage, `skip` rows into it; the first is `token` of the sequence.
  __device__ __forceinline__ void attend(unsigned stage, int skip, float scale, int token,
                                         bool is_masked) {
    const unsigned lane = threadIdx.x % 32, x = lane & 7;
    // Blocks of K: (tokens 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
    const unsigned k_row = x + (lane >> 4 & 1) * 8, k_unit = lane >> 3 & 1;
    const unsigned k_tile = stage + skip * 128 + k_row * 128 + ((k_unit ^ x) << 4);
    const unsigned k_half =
        stage + S::kHalfOffset + skip * 64 + k_row * 64 + ((k_unit ^ (x >> 1)) << 4);
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
      const int limit[2] = {mla_limits()[lane / 4], mla_limits()[lane / 4 + 8]};
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
    if (__any_sync(kWarp, is_left_behind(top[0], 0) || is_left_behind(top[1], 1))) raise(top);
    const float base[2] = {reference[0] == -kInfinity ? 0.f : reference[0],
                           reference[1] == -kInfinity ? 0.f : reference[1]};

    unsigned p[2][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(s[n][i] - base[i / 2]);
        sum[i / 2] += s[n][i];
      }
      p[n / 2][n % 2 * 2] = pack<T>(s[n][0], s[n][1]);
      p[n / 2][n % 2 * 2 + 1] = pack<T>(s[n][2], s[n][3]);
    }

    // Blocks of V: (tokens 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
    const unsigned v_row = x + (lane >> 3 & 1) * 8, v_unit = lane >> 4 & 1;
    const unsigned v_tile = stage + skip * 128 + v_row * 128 + ((v_unit ^ x) << 4);
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

// Adds the results of a group's workers, the warps with the same rows, and writes them: the item's
// o and lse, or a partial result.  They call it together; those without tokens bring zeros.
template <typename T, typename S>
__device__ __forceinline__ void mla_finish(const MlaArgs& a, MlaRows<T, S>& rows, const MlaMerge& m,
                                           const MlaWalk& walk) {
  const MlaPlace place(a, S::kTma, thread_index());
  const int worker = place.worker, workers = place.workers, group = place.group;
  const int groups = a.c.groups, barrier = place.group_barrier, warp = place.warp;
  const int lane = place.lane, g = lane / 4, t = lane % 4;
  float scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    if (t == 0) m.stats[warp][g + 8 * i] = {rows.reference[i], sum};
  }
  named_barrier(barrier, 32 * workers);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = -kInfinity, sum = 0.f;
    for (int s = 0; s < workers; ++s) top = fmaxf(top, m.stats[s * groups + group][g + 8 * i].x);
    const float base = top == -kInfinity ? 0.f : top;
    for (int s = 0; s < workers; ++s) {
      const float2 v = m.stats[s * groups + group][g + 8 * i];
      sum += v.y * exp2_approx(v.x - base);
    }
    scale[i] = exp2_approx(m.stats[warp][g + 8 * i].x - base);
    if (worker == 0 && t == 0) m.merged[group][g + 8 * i] = {top, sum};
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
    named_barrier(barrier, 32 * workers);
    for (int i = worker * 32 + lane; i < 16 * kStep / 4; i += 32 * workers) {
      const int r = i / (kStep / 4), column = i % (kStep / 4) * 4;
      float4 v = {};
      for (int s = 0; s < workers; ++s) {
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
    if (c == 0 && worker == 0 && lane < 16 && first + lane < all) {
      const float2 v = m.merged[group][lane];
      if (partial >= 0)
        a.stats[kept + lane] = v;
      else
        static_cast<float*>(a.p.lse)[out + lane] = mla_lse(v.x, v.y);
    }
    named_barrier(barrier, 32 * workers);
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

template <typename T, int kRank, int kRope, bool kTma>
__global__ void __launch_bounds__(32 * kMlaWarps, 1)
    mla_decode_kernel(const __grid_constant__ MlaArgs a, const __grid_constant__ MlaMaps maps) {
  using S = MlaShape<kRank, kRope, kTma>;
  extern __shared__ __align__(1024) unsigned char smem[];
  grid_launch_dependents();
  int* const scratch = reinterpret_cast<int*>(smem);
  const MlaMerge merge = {reinterpret_cast<float2(*)[16]>(smem + 512),
                          reinterpret_cast<float2(*)[16]>(smem + 512 + kMlaWarps * 128),
                          reinterpret_cast<float*>(smem + kMlaMergeOffset)};
  constexpr int kMlaShareOffset = 512 + 2 * kMlaWarps * 128;
  constexpr int kMlaWalksOffset = kMlaShareOffset + sizeof(MlaShare);
  static_assert(kMlaWalksOffset + 2 * kMlaWarps * sizeof(MlaWalk) <= kMlaLimitsOffset,
                "statistics and walks fit before the merge");
  MlaWalk* const walks = reinterpret_cast<MlaWalk*>(smem + kMlaWalksOffset);
  const unsigned ring = shared_address(smem + a.c.ring_offset);
  const unsigned barriers = shared_address(smem + 64);  // a stage each, TMA only
  static_assert(64 + kMlaWarps / 2 * kMlaMostSlots * 8 <= 512, "barriers fit before statistics");

  if (kTma && threadIdx.x == 0) {
    for (int i = 0; i < a.c.streams * a.c.slots; ++i) mbarrier_init(barriers + 8 * i, 1);
    mbarrier_init_fence();
  }
  if (!kTma) mla_clear_padding<S>(a, ring);
  MlaShare& share = *reinterpret_cast<MlaShare*>(smem + kMlaShareOffset);
  {
    const MlaShare found = mla_share(a, scratch);
    if (threadIdx.x == 0) share = found;
  }
  if (threadIdx.x == 0 && !a.c.unit_per_item && a.c.units > 0) a.units[blockIdx.x] = MlaUnit{};
  mla_write_empty<T>(a);
  __syncthreads();

  const MlaPlace place(a, kTma, threadIdx.x);
  const int warp = place.warp, lane = place.lane, stream = place.stream, member = place.member;
  const int group = place.group, half = place.half, halves = place.halves, team = place.team;
  const int groups = a.c.groups, streams = a.c.streams, slots = a.c.slots;
  if (stream >= streams) return;
  const int team_barrier = 1 + stream;
  const unsigned stages = ring + stream * slots * S::kStageBytes;
  const unsigned full = barriers + stream * slots * 8;
  const float scale = static_cast<float>(a.p.scale * 1.44269504088896340736);
  const int rows = static_cast<int>(a.p.T * a.p.H), tokens = static_cast<int>(a.p.T);

  MlaLoader<S> loader = {walks[2 * warp]};
  if (!kTma || member == 0) loader.begin(a, share, stream);
  const auto refill = [&](int slot) {
    const unsigned stage = stages + slot * S::kStageBytes;
    if constexpr (kTma) {
      if (member != 0 || !loader.more) return;
      loader.fetch(a, maps, stage, full + 8 * slot);
      __syncwarp();
      loader.advance(a, share, stream);
    } else {
      if (loader.more) loader.copy(a, stage, group);
      copy_commit();
      if (loader.more) loader.advance(a, share, stream);
    }
  };
  for (int i = 0; i < slots - 1; ++i) refill(i);

  MlaRows<T, S> mine;
  mine.q_address = shared_address(smem + a.c.q_offset) + group * S::kSteps * 512 +
                   static_cast<unsigned>(lane) * 16;
  MlaWalk& walk = walks[2 * warp + 1];
  if (lane == 0) walk.begin(a, share);
  int slot = 0;
  unsigned phase = 0;
  while (mla_advance(walk, a, share)) {
    const int end = walk.end, open = walk.length - tokens + 1;  // tokens that every row sees
    const int row = (walk.pass * groups + group) * 16;
    const bool is_active = row < rows;  // by warp; the others of its group agree
    if (is_active) mine.begin(a, walk, row, rows, place);
    for (int token = walk.token + S::kStage * stream; token < end; token += S::kStage * streams) {
      // The team's copies of this stage have landed (cp.async: after the barrier), and it is done
      // with the stage before, which is refilled.
      if (!kTma) copy_wait(slots - 2);
      named_barrier(team_barrier, 32 * team);
      refill(slot == 0 ? slots - 1 : slot - 1);
      const unsigned stage = stages + slot * S::kStageBytes;
      if constexpr (kTma) {
        mbarrier_wait(full + 8 * slot, phase);
        __syncwarp();
        if (end - token < S::kStage) {
          mla_clear_tail<S>(stage, end - token, member * 32 + lane, 32 * team);
          fence_async_proxy();
          named_barrier(team_barrier, 32 * team);
        }
      }
      if (is_active) {
#pragma unroll 1
        for (int skip = kMlaBlock * half; skip < S::kStage; skip += kMlaBlock * halves) {
          const int first = token + skip;
          if (first >= end) break;
          const bool is_masked = first + kMlaBlock > open;
          mine.attend(stage, skip, scale, first, is_masked);
        }
      }
      if (++slot == slots) slot = 0, phase ^= 1;
    }
    if (threadIdx.x == 0) walk.list(a, share);
    if (is_active) mla_finish<T, S>(a, mine, merge, walk);
  }
}

}  // namespace
}  // namespace zebra
