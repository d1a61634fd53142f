// The kernel of mla_decode on Hopper, where TMA brings the stages; mla_decode_kernel.cuh, with
//
// Warps          8 that attend, in teams of `groups` (query rows, 16 each) x `halves` (of a stage),
//                and one for every stream that walks its pieces and starts its copies: the walk and
//                the table are a chain of a third of the time of a stage, which no product waits
//                for.  A third warpgroup, because registers are moved between whole ones.
// Stage          64 cached rows.  A barrier says that it has landed, and with it its step; another
//                that all warps of the team are done with it.  Teams' warps do not wait for each
//                other otherwise.
#pragma once

#include "mla_decode/mla_decode_finish.cuh"

namespace zebra {
namespace {

constexpr int kMlaTmaThreads = 32 * (kMlaWarps + kMlaProducers);
constexpr int kMlaEmptyOffset = 64 + 8 * kMlaMostStages;  // the second half of the barriers
static_assert(kMlaEmptyOffset + 8 * kMlaMostStages <= kMlaStatsOffset,
              "barriers fit before statistics");
static_assert(kMlaTmaThreads % 128 == 0 && kMlaWarps % 4 == 0, "warpgroups have one purpose");

// The stages of a stream, until the last one, which says that there are no more.  The first one is
// asked for before the walk to it.  `share` stays in shared memory: registers are few.  One lane.
template <typename S>
__device__ __forceinline__ void mla_produce(const MlaArgs& a, const MlaMaps& maps,
                                            const MlaShare& share, int stream,
                                            unsigned char* smem) {
  using Loader = MlaLoader<S>;
  MlaStep* const steps =
      reinterpret_cast<MlaStep*>(smem + kMlaStepsOffset) + stream * kMlaMostSlots;
  const unsigned base = smem_addr(smem), first = stream * a.slots;
  const unsigned share_tokens =
      static_cast<unsigned>(share.each) * static_cast<unsigned>(a.unit.divisor);
  int token = Loader::first_token(a, share, stream), page = 0;
  if (token >= 0)
    page = __ldcg(a.block_table + share.batch * a.table_stride + a.page.quotient(token));
  bool is_ahead = token >= 0, is_unlisted = false;
  MlaWalk walk;
  walk.begin(a, share);
  int slot = 0, parity = -1;  // of the empty barrier's phase; -1: nobody has the stage yet
#pragma unroll 1
  for (;;) {
    const unsigned stage = first + slot, full = base + 64 + stage * 8;
    bool is_asked = false;
#pragma unroll 1
    for (;; is_ahead = false) {  // to the stage and its copy, once each
      if (!is_ahead) {
        // Not between the first stages; the walk is at the item until the piece's last one.
        if (is_unlisted && (parity >= 0 || (walk.flags & MlaStep::kLast))) {
          walk.list(a, share);
          is_unlisted = false;
        }
        Loader::advance(a, share, walk, stream);
        if (is_asked) break;
        token = walk.stage < walk.end ? walk.stage : -1;
        if (token >= 0) page = Loader::page(a, walk, token, true);
      }
      if (parity >= 0) sm90::mbarrier_poll(base + kMlaEmptyOffset + stage * 8, parity);
      if (token >= 0)
        Loader::bring(a, maps, token, page, base + a.ring_offset + stage * S::kStageBytes, full,
                      share_tokens);
      is_asked = true;
      if (!is_ahead) break;
    }
    is_ahead = false;
    // What the stage is, while it is on its way; the barrier waits for this arrival too.
    steps[slot].note(a, walk);
    sm90::mbarrier_expect(full, token >= 0 ? S::kStageBytes : 0);
    if (walk.flags == MlaStep::kStop) return;
    is_unlisted |= stream == 0 && (walk.flags & MlaStep::kFirst) && walk.token == 0;
    if (++slot == a.slots) slot = 0, parity = parity < 0 ? 0 : parity ^ 1;
  }
}

// Code is written once and before it is needed nothing is computed: a kernel that runs once a layer
// finds its code in HBM, and a short launch is mostly the time to fetch it.
template <typename T, int kRank, int kRope>
__global__ void __launch_bounds__(kMlaTmaThreads, 1)
    mla_decode_tma_kernel(const __grid_constant__ MlaArgs a, const __grid_constant__ MlaMaps maps) {
  using S = MlaShape<kRank, kRope, true>;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int length = mla_first_length(a);
  sm90::grid_launch_dependents();
  const int warp = threadIdx.x / 32;
  MlaShare& known = *reinterpret_cast<MlaShare*>(smem + kMlaSharesOffset);
  // Registers move first of all: behind the first barrier it took 2,000 clocks.
  if (warp >= kMlaWarps) {
    sm90::registers_decrease<40>();
    const int stream = warp - kMlaWarps, lane = threadIdx.x % 32;
    if (stream == kMlaProducers - 1) {  // the least busy one
      if (lane < a.streams * a.slots) {
        const unsigned at = smem_addr(smem) + 64 + lane * 8;
        sm90::mbarrier_init(at, 1);
        sm90::mbarrier_init(at + kMlaEmptyOffset - 64, sm90::kWarpArrivals << a.log_team);
        sm90::mbarrier_init_fence();
      }
      mla_prefetch_table(a, lane);
    }
    named_barrier_arrive(kMlaBarrierReady, kMlaTmaThreads);
    named_barrier(kMlaBarrierKnown, kMlaTmaThreads);
    if (lane != 0 || stream >= a.streams) return;
    if (stream == 0 && !a.unit_per_item && a.unit_count > 0) a.units[blockIdx.x] = MlaUnit{};
    mla_produce<S>(a, maps, known, stream, smem);
    return;
  }
  sm90::registers_increase<232>();
  const MlaShare share =
      mla_share(a, reinterpret_cast<int*>(smem), length, [] { named_barrier(1, 32 * kMlaWarps); });
  if (threadIdx.x == 0) known = share;
  named_barrier_arrive(kMlaBarrierKnown, kMlaTmaThreads);
  named_barrier(kMlaBarrierReady, kMlaTmaThreads);
  const MlaMerge merge(smem);
  // What follows from the thread's index is found anew in every round: registers are scarce.
  if (const MlaPlace me(a, threadIdx.x); me.stream < a.streams) {
    MlaRows<T, S> mine;
    // The share's first item, whose q is asked for before its steps are there.
    int opened = -1;
    if (share.low < share.high) {
      const int pass = mla_first_pass(a, share);
      const int row = (pass * a.groups + me.group) * 16;
      mine.q_address = mla_q_address<S>(a, smem_addr(smem), me.group, me.lane);
      if (row < a.rows) {
        mine.ask(a, share.batch, row, me);
        mine.begin(a, share.length, row, me);
        opened = share.batch * a.passes + pass;
      }
    }
    int slot = 0, parity = 0;
#pragma unroll 1
    for (;;) {
      const MlaPlace place(a, thread_index());
      const int lane = place.lane, stage = place.stream * a.slots + slot;
      const unsigned barrier = smem_addr(smem) + 64 + stage * 8;
      const unsigned tile = smem_addr(smem) + a.ring_offset + stage * S::kStageBytes;
      const MlaStep* const step = reinterpret_cast<const MlaStep*>(smem + kMlaStepsOffset) +
                                  place.stream * kMlaMostSlots + slot;
      sm90::mbarrier_poll(barrier, parity);
      __syncwarp();
      const int flags = step->flags;
      if (flags & MlaStep::kStop) break;
      const int row = (step->pass * a.groups + place.group) * 16;
      const bool is_active = row < a.rows;  // by warp; the others of its group agree
      mine.q_address = mla_q_address<S>(a, smem_addr(smem), place.group, lane);
      if ((flags & MlaStep::kFirst) && is_active) {
        if (opened != step->b * a.passes + step->pass) {
          mine.ask(a, step->b, row, place);
          mine.begin(a, step->length, row, place);
        }
        opened = -1;
      }
      const int left = step->end - step->token;
      // All teams meet here, the one that has the last rows and those that do not: racecheck takes
      // warps that met others less often for unordered.
      if ((flags & MlaStep::kLast) && step->end % S::kStage != 0) {
        const int team = 32 << a.log_team;  // threads
        if (left > 0) mla_clear_tail<S>(tile, left, place.member * 32 + lane, team);
        sm90::fence_async_proxy();
        named_barrier(1 + place.stream, team);
      }
      if (is_active) {
#pragma unroll 1
        for (int skip = kMlaBlock * place.half; skip < min(S::kStage, left);
             skip += kMlaBlock * a.halves) {
          const int first = step->token + skip;
          const int open = step->length - a.tokens + 1;  // tokens that every row sees
          mine.attend(tile, skip, a.scale, first, first + kMlaBlock > open);
        }
      }
      if (is_active && (flags & MlaStep::kLast)) {
        const MlaStep kept = *step;
        sm90::mbarrier_arrive_warp(barrier + kMlaEmptyOffset - 64, thread_index() % 32);
        mla_finish<T, S>(a, mine, merge, kept);
      } else {
        sm90::mbarrier_arrive_warp(barrier + kMlaEmptyOffset - 64, thread_index() % 32);
      }
      if (++slot == a.slots) slot = 0, parity ^= 1;
    }
  }
  // A grid must not end before the one that it follows: the next one waits for this one alone.
  sm90::grid_dependency_wait();
  if (known.has_empty) mla_write_empty<T>(a);
}

}  // namespace
}  // namespace zebra
