// The kernel of mla_decode for 16-bit dtypes whose stages cp.async brings: attention over pieces of
// sequences.
//
// Computes       o and lse of mla_decode.h for latent queries, R up to 256, E up to 64.
//                Derivation: docs/kernels/mla_decode.md.
// Grid           persistent, one CTA a multiprocessor; mla_decode_schedule.cuh deals the tokens.
// Warps          8.  A team of `groups` (query rows, 16 each) warps shares one stream of stages; no
//                barrier beyond it but at items' ends.
// Stage          32 cached rows, mla_decode_load.cuh: the same tile is K (plain) and V (transposed
//                on the way out of shared memory).
// Registers      scores and probabilities never leave them; q does from R = 192 on.
// Softmax        base 2, relative to a reference that moves only when a score exceeds it by 2^20
//                (fp16: 2^8): probabilities are floating point, so nothing is lost by a late move.
// Bound          HBM: (R + E) x 2 bytes a cached token.
#pragma once

#include "mla_decode/mla_decode_finish.cuh"

namespace zebra {
namespace {

// ---- kernels --------------------------------------------------------------------------------

// Code is written once and before it is needed nothing is computed: a kernel that runs once a layer
// finds its code in HBM, and a short launch is mostly the time to fetch it.
template <typename T, int kRank, int kRope>
__global__ void __launch_bounds__(32 * kMlaWarps, 1)
    mla_decode_kernel(const __grid_constant__ MlaArgs a, const __grid_constant__ MlaMaps) {
  using S = MlaShape<kRank, kRope, false>;
  extern __shared__ __align__(1024) unsigned char smem[];
  sm90::grid_launch_dependents();
  const MlaMerge merge(smem);
  MlaWalk* const walks = reinterpret_cast<MlaWalk*>(smem + kMlaWalksOffset);
  const unsigned ring = smem_addr(smem + a.ring_offset);
  const MlaPlace me(a, threadIdx.x);
  if (me.warp == kMlaWarps - 1) mla_prefetch_table(a, me.lane);
  mla_clear_padding<S>(a, ring);
  if (threadIdx.x == 0 && !a.unit_per_item && a.unit_count > 0) a.units[blockIdx.x] = MlaUnit{};
  const auto share_of = [&](int warp) -> MlaShare& {
    return *reinterpret_cast<MlaShare*>(smem + kMlaSharesOffset + warp * kMlaShareBytes);
  };
  if (const MlaShare found =
          mla_share(a, reinterpret_cast<int*>(smem), mla_first_length(a), [] { __syncthreads(); });
      me.lane == 0) {
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
    // The slot of the stage to attend to, and from bit 16 on how many rounds come before the first.
    int round = (a.slots - 1) << 16;
    int asked = -1;  // the item whose q was asked for ahead of its steps
#pragma unroll 1
    for (;;) {
      const MlaPlace place(a, thread_index());
      const int ahead = round >> 16, slot = round & 255, slots = a.slots;
      const int lane = place.lane, group = place.group;
      const int team_barrier = 1 + place.stream, team = 32 << a.log_team;  // threads
      const int first_stage = place.stream * slots;
      MlaStep* const steps =
          reinterpret_cast<MlaStep*>(smem + kMlaStepsOffset) + place.warp * kMlaMostSlots;
      const MlaStep& step = steps[slot];
      const auto row = [&] { return (step.pass * a.groups + group) * 16; };
      mine.q_address = mla_q_address<S>(a, smem_addr(smem), group, lane);
      // The team's copies of this stage have landed after the barrier, and it is done with the
      // stage before, which is refilled.
      if (ahead == 0) {
        __syncwarp();
        if ((step.flags & MlaStep::kFirst) && row() < a.rows) {  // while the stage is under way
          if (asked != step.b * a.passes + step.pass) mine.ask(a, step.b, row(), place);
          mine.begin(a, step.length, row(), place);
        }
        mla_copy_wait(slots - 2);
        named_barrier(team_barrier, team);
      }
      const int fill = (ahead > 0 ? slots - ahead : slot == 0 ? slots : slot) - 1;
      const unsigned filled = ring + (first_stage + fill) * S::kStageBytes;
      __syncwarp();
      if (lane == 0) {
        MlaWalk walk = walks[place.warp];
        Loader::advance(a, share_of(place.warp), walk, place.stream);
        if (threadIdx.x == 0 && (walk.flags & MlaStep::kFirst) && walk.token == 0)
          walk.list(a, share_of(place.warp));
        walks[place.warp] = walk;
      }
      __syncwarp();
      Loader::copy(a, walks[place.warp], steps[fill], filled, group, ahead > 0);
      cp_async_commit();
      if (ahead > 0) {
        // q of the first item, before its steps are known to all: as the warp's own walk has it.
        if (const MlaShare& share = share_of(place.warp);
            ahead == slots - 1 && share.low < share.high) {
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
      if (step.flags & MlaStep::kStop) break;
      __syncwarp();
      if (row() < a.rows) {
        const unsigned stage = ring + (first_stage + slot) * S::kStageBytes;
        const int open = step.length - a.tokens + 1;  // tokens that every row sees
        if (step.token < step.end)
          mine.attend(stage, 0, a.scale, step.token, step.token + kMlaBlock > open);
        if (step.flags & MlaStep::kLast) mla_finish<T, S>(a, mine, merge, step);
      }
      round = slot + 1 < slots ? slot + 1 : 0;
    }
  }
  // A grid must not end before the one that it follows: the next one waits for this one alone.
  sm90::grid_dependency_wait();
  if (share_of(thread_index() / 32).has_empty) mla_write_empty<T>(a);
}

}  // namespace
}  // namespace zebra
