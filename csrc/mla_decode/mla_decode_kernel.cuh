// The kernels of mla_decode for 16-bit dtypes: attention over pieces of sequences, and the sum of
// the pieces of a sequence.
//
// Computes       o and lse of mla_decode.h for latent queries, R up to 256, E up to 64.
//                Derivation: docs/kernels/mla_decode.md.
// Grid           persistent, one CTA a multiprocessor; mla_decode_schedule.cuh deals the tokens.
// Warps          8.  A team of `groups` (query rows, 16 each) x `halves` (of a stage) warps shares
//                one stream of stages; no barrier beyond it but at items' ends.
// Stage          32 cached rows (TMA: 64), mla_decode_load.cuh: the same tile is K (plain) and V
//                (transposed on the way out of shared memory).
// Registers      scores and probabilities never leave them; q does from R = 192 on.
// Softmax        base 2, relative to a reference that moves only when a score exceeds it by 2^20
//                (fp16: 2^8): probabilities are floating point, so nothing is lost by a late move.
// Bound          HBM: (R + E) x 2 bytes a cached token.
#pragma once

#include "mla_decode/mla_decode_rows.cuh"

namespace zebra {
namespace {

// ---- the end of a piece ---------------------------------------------------------------------

struct MlaMerge {
  float2 (*stats)[16];   // [warps]: reference and sum of a warp's rows
  float2 (*merged)[16];  // [groups]: of the group's rows over all streams
  float* columns;        // [warps][16][mla_merge_stride(parts)]
};

// Adds the results of a group's workers, the warps with the same rows, and writes them: the item's
// o and lse, or a partial result.  They call it together; those without tokens bring zeros.
template <typename T, typename S>
__device__ __forceinline__ void mla_finish(const MlaArgs& a, MlaRows<T, S>& rows, const MlaMerge& m,
                                           const MlaStep& step) {
  const MlaPlace place(a, thread_index());
  const int worker = place.worker, workers = place.workers, group = place.group;
  const int groups = a.groups, barrier = place.group_barrier, warp = place.warp;
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
  // Lane t looks at workers t and t + 4, at both rows before anything is made of one.
  float2 v[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      v[i][n] = {-kInfinity, 0.f};
      if (t + 4 * n < workers) v[i][n] = m.stats[(t + 4 * n) * groups + group][g + 8 * i];
    }
  float2 whole[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = fmaxf(v[i][0].x, v[i][1].x);
    top = fmaxf(top, __shfl_xor_sync(kWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kWarp, top, 2));
    const float base = top == -kInfinity ? 0.f : top;
    scale[i] = exp2_approx(rows.reference[i] - base);
    float sum =
        v[i][0].y * exp2_approx(v[i][0].x - base) + v[i][1].y * exp2_approx(v[i][1].x - base);
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    whole[i] = {top, sum};
  }
  if (worker == 0 && t == 0) m.merged[group][g] = whole[0], m.merged[group][g + 8] = whole[1];

  const std::int64_t partial = step.partial;
  const int first = (step.pass * groups + group) * 16;  // of the group's rows in the sequence
  const std::int64_t out = static_cast<std::int64_t>(step.b) * a.rows + first;
  const std::int64_t kept = (partial * groups + group) * 16;
  constexpr int kParts = S::kRank / 32, kAtOnce = (kParts + 1) / 2;
  const int parts = a.merge_parts, stride = mla_merge_stride(parts), threads = 32 * workers;
#pragma unroll
  for (int j = 0; j < S::kRank / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.o[j][i] *= scale[i / 2];
#pragma unroll 1
  for (int from = 0; from < kParts; from += parts) {
    float* mine = m.columns + (warp * 16 + g) * stride + 2 * t;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      if (part >= from && part < from + parts) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float (&o)[4] = rows.o[part * 4 + j];
          *reinterpret_cast<float2*>(mine + 8 * j) = {o[0], o[1]};
          *reinterpret_cast<float2*>(mine + 8 * j + 8 * stride) = {o[2], o[3]};
        }
        mine += 32;
      }
    named_barrier(barrier, threads);
    // Four columns each: 8 neighbours share a row's 32, so no bank is met twice and lines go whole.
    const int units = min(parts, kParts - from) * 128;
#pragma unroll 1
    for (int begin = worker * 32 + lane; begin < units; begin += kAtOnce * threads) {
      float4 v[kAtOnce] = {};
#pragma unroll 1
      for (int s = 0; s < workers; s += 4)
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const int i = begin + n * threads, r = i / 8 % 16;
          const float* const share =
              m.columns + ((s * groups + group) * 16 + r) * stride + i / 128 * 32 + i % 8 * 4;
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (i < units && s + k < workers) {
              const float4 part =
                  *reinterpret_cast<const float4*>(share + k * groups * 16 * stride);
              v[n].x += part.x, v[n].y += part.y, v[n].z += part.z, v[n].w += part.w;
            }
        }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = begin + n * threads, r = i / 8 % 16;
        const int at = (from + i / 128) * 32 + i % 8 * 4;
        if (i >= units || first + r >= a.rows) continue;
        const float2 whole = m.merged[group][r];
        if (partial >= 0) {
          *reinterpret_cast<float4*>(a.sums + (kept + r) * S::kRank + at) = v[n];
          if (at == 0) a.stats[kept + r] = whole;
        } else {
          const float inverse = whole.y == 0.f ? 0.f : __fdividef(1.f, whole.y);
          const uint2 packed = {pack<T>(v[n].x * inverse, v[n].y * inverse),
                                pack<T>(v[n].z * inverse, v[n].w * inverse)};
          if (at < a.R)
            *reinterpret_cast<uint2*>(static_cast<char*>(a.o) + ((out + r) * a.R + at) * 2) =
                packed;
          if (at == 0) a.lse[out + r] = mla_lse(whole.x, whole.y);
        }
      }
    }
    // After the last round the next end's first barrier says that all have read.
    if (from + parts < kParts) named_barrier(barrier, threads);
  }
}

// Rows of sequences without tokens; nothing of them is on the line of work.
template <typename T>
__device__ __forceinline__ void mla_write_empty(const MlaArgs& a) {
#pragma unroll 1
  for (int b = blockIdx.x; b < a.batch; b += gridDim.x) {
    if (mla_length(a, b) > 0) continue;
    const std::int64_t first = static_cast<std::int64_t>(b) * a.rows;
    uint4* const o = reinterpret_cast<uint4*>(static_cast<T*>(a.o) + first * a.R);
    const std::int64_t units = static_cast<std::int64_t>(a.rows) * a.R / 8;
#pragma unroll 1
    for (std::int64_t i = threadIdx.x; i < units; i += 32 * kMlaWarps) o[i] = {};
#pragma unroll 1
    for (int i = threadIdx.x; i < a.rows; i += 32 * kMlaWarps) a.lse[first + i] = -kInfinity;
    if (a.unit_per_item && a.unit_count > 0)
#pragma unroll 1
      for (int i = threadIdx.x; i < a.passes; i += 32 * kMlaWarps)
        a.units[static_cast<std::int64_t>(b) * a.passes + i] = MlaUnit{};
  }
}

// ---- kernels --------------------------------------------------------------------------------

// Code is written once and before it is needed nothing is computed: a kernel that runs once a layer
// finds its code in HBM, and a short launch is mostly the time to fetch it.
template <typename T, int kRank, int kRope, bool kTma>
__global__ void __launch_bounds__(32 * kMlaWarps, 1)
    mla_decode_kernel(const __grid_constant__ MlaArgs a, const __grid_constant__ MlaMaps maps) {
  using S = MlaShape<kRank, kRope, kTma>;
  extern __shared__ __align__(1024) unsigned char smem[];
  sm90::grid_launch_dependents();
  int* const scratch = reinterpret_cast<int*>(smem);
  const MlaMerge merge = {reinterpret_cast<float2(*)[16]>(smem + 512),
                          reinterpret_cast<float2(*)[16]>(smem + 512 + kMlaWarps * 128),
                          reinterpret_cast<float*>(smem + kMlaMergeOffset)};
  constexpr int kStepsOffset = 512 + 2 * kMlaWarps * 128;
  constexpr int kSharesOffset = kStepsOffset + kMlaWarps * kMlaMostSlots * sizeof(MlaStep);
  constexpr int kWalksOffset = kSharesOffset + kMlaWarps * kMlaShareBytes;
  static_assert(kWalksOffset + kMlaWarps * sizeof(MlaWalk) <= kMlaLimitsOffset,
                "statistics, steps, shares and walks fit before the merge");
  MlaWalk* const walks = reinterpret_cast<MlaWalk*>(smem + kWalksOffset);
  const unsigned ring = smem_addr(smem + a.ring_offset);
  const unsigned barriers = smem_addr(smem + 64);  // a stage each, TMA only
  static_assert(64 + kMlaWarps / 2 * kMlaMostSlots * 8 <= 512, "barriers fit before statistics");

  const MlaPlace me(a, threadIdx.x);
  if (kTma && me.member == 0 && me.lane == 0 && me.stream < a.streams) {  // who uses them first
#pragma unroll 1
    for (int i = 0; i < a.slots; ++i)
      sm90::mbarrier_init(barriers + 8 * (me.stream * a.slots + i), 1);
    sm90::mbarrier_init_fence();
  }
  // The table in L2 by the time that this or another CTA knows its part of it.
  if (const int line = static_cast<int>(blockIdx.x + me.lane * gridDim.x);
      me.warp == kMlaWarps - 1 && line < a.table_lines)
    prefetch_l2(a.block_table + line * 32);
  if (!kTma) mla_clear_padding<S>(a, ring);
  if (threadIdx.x == 0 && !a.unit_per_item && a.unit_count > 0) a.units[blockIdx.x] = MlaUnit{};
  const auto share_of = [&](int warp) -> MlaShare& {
    return *reinterpret_cast<MlaShare*>(smem + kSharesOffset + warp * kMlaShareBytes);
  };
  if (const MlaShare found = mla_share(a, scratch); me.lane == 0) {
    share_of(me.warp) = found;
    MlaWalk walk;
    walk.begin(a, found);
    walks[me.warp] = walk;
  }
  __syncwarp();

  // What follows from the thread's index is found anew in every round: registers are scarce.
  if (me.stream < a.streams) {
    using Loader = MlaLoader<S>;
    MlaRows<T, S> mine;
    // The slot of the stage to attend to, its phase from bit 8 on, and from bit 16 on how many
    // rounds come before the first.
    int round = (a.slots - 1) << 16;
    int asked = -1;  // the item whose q was asked for ahead of its steps
    const auto has_work = [&] {
      const MlaShare& share = share_of(thread_index() / 32);
      return share.low < share.high;
    };
#pragma unroll 1
    for (;;) {
      const MlaPlace place(a, thread_index());
      const int ahead = round >> 16, slot = round & 255, slots = a.slots;
      const int member = place.member, lane = place.lane, group = place.group;
      const int team_barrier = 1 + place.stream, team = 32 << a.log_team;  // threads
      const int first_stage = place.stream * slots;
      const int leader = kTma ? place.stream << a.log_team : place.warp;  // who notes the steps
      MlaStep* const steps =
          reinterpret_cast<MlaStep*>(smem + kStepsOffset) + leader * kMlaMostSlots;
      const MlaStep& step = steps[slot];
      const auto row = [&] { return (step.pass * a.groups + group) * 16; };
      // By warp; the others of its group agree.
      const auto is_active = [&] { return row() < a.rows; };
      mine.q_address =
          smem_addr(smem) + a.q_offset + (group * 16 + (lane & 15)) * S::kQPitch + (lane >> 4) * 16;
      const auto open = [&] {  // while the stage is under way
        __syncwarp();
        if (!(step.flags & MlaStep::kFirst) || !is_active()) return;
        if (asked != step.b * a.passes + step.pass) mine.ask(a, step.b, row(), place);
        mine.begin(a, step, row(), place);
      };
      // The team's copies of this stage have landed (cp.async: after the barrier), and it is done
      // with the stage before, which is refilled.  Steps noted in the rounds before are visible.
      if (ahead == 0) {
        if (!kTma) open();
        if (!kTma) mla_copy_wait(slots - 2);
        named_barrier(team_barrier, team);
      }
      const int fill = (ahead > 0 ? slots - ahead : slot == 0 ? slots : slot) - 1;
      const unsigned filled = ring + (first_stage + fill) * S::kStageBytes;
      if (!kTma) __syncwarp();
      if (lane == 0 && (!kTma || member == 0)) {
        MlaWalk walk = walks[place.warp];
        Loader::advance(a, share_of(place.warp), walk, place.stream);
        if (kTma)
          Loader::fetch(a, maps, walk, steps[fill], filled, barriers + (first_stage + fill) * 8,
                        ahead > 0);
        Loader::list(a, share_of(place.warp), walk);
        walks[place.warp] = walk;
      }
      if (!kTma) __syncwarp();
      if (!kTma) Loader::copy(a, walks[place.warp], steps[fill], filled, group, ahead > 0);
      if (!kTma) cp_async_commit();
      if (ahead > 0) {
        // q of the first item, before its steps are known to all: as the warp's own walk has it.
        if (ahead == slots - 1 && has_work()) {
          __syncwarp();
          const MlaWalk& walk = walks[place.warp];
          const int first = (walk.pass * a.groups + group) * 16;
          if (first < a.rows && walk.b < a.batch) {
            mine.ask(a, walk.b, first, place);
            asked = walk.item(a);
          }
        }
        round -= 1 << 16;
        continue;
      }
      if (kTma) open();
      if (step.flags & MlaStep::kStop) break;
      if (kTma) sm90::mbarrier_poll(barriers + (first_stage + slot) * 8, round >> 8 & 1);
      __syncwarp();
      const unsigned stage = ring + (first_stage + slot) * S::kStageBytes;
      const int left = step.end - step.token;
      if (kTma && left > 0 && left < S::kStage) {
        mla_clear_tail<S>(stage, left, member * 32 + lane, team);
        sm90::fence_async_proxy();
        named_barrier(team_barrier, team);
      }
      if (is_active()) {
#pragma unroll 1
        for (int skip = kMlaBlock * place.half; skip < min(S::kStage, left);
             skip += kMlaBlock * (kTma ? a.halves : 1)) {
          const int first = step.token + skip;
          const int open = step.length - a.tokens + 1;  // tokens that every row sees
          mine.attend(stage, skip, a.scale, first, first + kMlaBlock > open);
        }
        if (step.flags & MlaStep::kLast) mla_finish<T, S>(a, mine, merge, step);
      }
      round = slot + 1 < slots ? round + 1 : (round ^ 256) & 256;
    }
  }
  // A grid must not end before the one that it follows: the next one waits for this one alone.
  sm90::grid_dependency_wait();
  if (share_of(thread_index() / 32).has_empty) mla_write_empty<T>(a);
}

}  // namespace
}  // namespace zebra
