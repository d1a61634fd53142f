// The walk for the states alone: up to where units begin inside a sequence, and how much of the
// state before it is left.
#pragma once

#include "ssd_scan/ssd_scan_sm90_decays.cuh"

namespace zebra::sm90 {

constexpr int kStatesThreads = 384;

// What the walk of a chunk must know of its piece, in shared memory beside the chunk's barriers.
struct StateChunk {
  int slot;   // of the state after it, -1 where the piece goes on
  int flags;  // kBegins: a state begins; kLast: no more pieces
  static constexpr int kBegins = 1, kLast = 2;
};

// B and x of every chunk: one warp.
template <int kP>
__device__ __forceinline__ void load_states_walk(const SsdArgs& a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  const SsdScanSm90Config& cfg = a.cfg;
  const int heads = static_cast<int>(a.p.heads);
  const int per_x = heads / static_cast<int>(a.p.x_heads);
  const int per_b = heads / static_cast<int>(a.p.b_heads);
  const int bytes = cfg.state_stage_bytes;
  StateChunk* const chunks = reinterpret_cast<StateChunk*>(shared_memory + S::kStateChunks);
  Ring r;
  Pieces<true> item(a);
  for (bool more = item.next(); more;) {
    int of_x[kHeads], of_b[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      of_x[k] = (item.head + k) / per_x, of_b[k] = (item.head + k) / per_b;
    const int row = item.row, slot = item.slot;
    int token = item.first, begins = item.fresh ? StateChunk::kBegins : 0;
    for (int left = item.chunks(); left > 0; --left, token += kQ, begins = 0) {
      if (left == 1) more = item.next();
      if (threadIdx.x % 32 == 0) {
        const std::uint32_t bar = shared_at(S::kFull) + 8 * r.slot;
        const std::uint32_t tile = shared_at(S::kTiles) + r.slot * bytes;
        mbarrier_wait(shared_at(S::kEmpty) + 8 * r.slot, r.phase ^ 1);
        chunks[r.slot] = {left == 1 ? slot : -1, more ? begins : begins | StateChunk::kLast};
        mbarrier_expect(bar, bytes);
#pragma unroll
        for (int k = 0; k < kHeads; ++k) {
          if (k == 0 || !cfg.share_b)
            tma_load_5d(tile + k * cfg.b_step, &a.B, bar, 0, token, 0, of_b[k], row);
          if (k == 0 || cfg.x_step != 0)
            tma_load_5d(tile + cfg.x_offset - cfg.b_offset + k * cfg.x_step, &a.x, bar, 0, token, 0,
                        of_x[k], row);
        }
      }
      r.advance(cfg.state_stages);
    }
  }
}

// h^T = exp2(s_127) h^T + (w X)^T B, two chunks a step, so that the state is multiplied half as
// often.  The x of one chunk is scaled while the product of the chunk before runs, also where a
// piece ends: the walk asks no piece where it lies, which takes as long as a step.
template <typename T, int kP, int kN>
__device__ __forceinline__ void states_walk(const SsdArgs& a) {
  constexpr int kHeads = 128 / kP, kRegs = kN / 2;
  using S = Smem<kHeads>;
  using Scaled = std::uint32_t[4][4];
  const SsdScanSm90Config& cfg = a.cfg;
  const int unit = warpgroup_index() - 1, of = kHeads == 2 ? unit : 0;
  const int bytes = cfg.state_stage_bytes;
  const std::uint32_t base = keep(smem_addr(shared_memory));
  const std::uint32_t offset =
      keep(matrix_offset()) + cfg.x_offset - cfg.b_offset + unit * cfg.x_step;
  const int lane = keep(static_cast<int>(threadIdx.x % 32));
  const StateChunk* const chunks =
      reinterpret_cast<const StateChunk*>(shared_memory + S::kStateChunks);
  Ring r, x;            // of the product, of the scaling
  unsigned number = 0;  // of the step
  float h[kRegs], log2_decay = 0.f;
#pragma unroll
  for (int k = 0; k < kRegs; ++k) h[k] = 0.f;
  // x of the next chunk, the first or the second of a step, and what is known of it.
  const auto scale = [&](Scaled& out, int second) {
    mbarrier_wait(base + S::kFull + 8 * x.slot, x.phase);
    const StateChunk chunk = chunks[x.slot];
    const PairDecays& d = decays_of<kHeads, PairDecays>(base, number)[of];
    const std::uint32_t tile = base + S::kTiles + x.slot * bytes + offset;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      std::uint32_t v[4];
      ldmatrix_x4_trans(v, tile + k * 2048);
      scale_tokens<T>(out[k], v, d.w + 32 * second + 8 * k, lane);
    }
    x.advance(cfg.state_stages);
    return chunk;
  };
  const auto product = [&](const Scaled& scaled) {
    const std::uint64_t db =
        wgmma_descriptor(base + S::kTiles + r.slot * bytes + of * cfg.b_step, kTile);
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_rs<T, Major::kMN>(h, scaled[k], advance(db, 2048 * k));
    wgmma_commit();
  };
  // A product is done, its tiles are free.
  const auto release = [&] {
    mbarrier_arrive_warp(base + S::kEmpty + 8 * r.slot, lane);
    r.advance(cfg.state_stages);
  };
  Scaled first, second;
  wait_decays<kHeads>(base, number);
  StateChunk next = scale(first, 0);
  for (bool last = false; !last;) {
    StateChunk chunk = next;
    {
      const PairDecays& d = decays_of<kHeads, PairDecays>(base, number)[of];
      if (chunk.flags & StateChunk::kBegins) {
#pragma unroll
        for (int k = 0; k < kRegs; ++k) h[k] = 0.f;
        log2_decay = d.log2_decay;
      } else {
        const float decay = d.decay;
#pragma unroll
        for (int k = 0; k < kRegs; ++k) h[k] *= decay;
        log2_decay += d.log2_decay;
      }
    }
    wgmma_fence(h);
    product(first);
    if (chunk.slot < 0) {
      chunk = scale(second, 1);
      wgmma_fence();
      // The descriptor of the second chunk: the first has not been released yet.
      const Ring before = r;
      r.advance(cfg.state_stages);
      product(second);
      r = before;
      wgmma_wait<1>();
      release();
    } else {
      wgmma_wait<0>(h);  // it still reads what the next step scales
    }
    mbarrier_arrive_warp(base + S::kDecayEmpty + 8 * (number % kSsdDecaySlots), lane);
    ++number;
    last = chunk.flags & StateChunk::kLast;
    if (!last) {
      wait_decays<kHeads>(base, number);
      next = scale(first, 0);
    }
    wgmma_wait<0>(h);
    release();
    if (chunk.slot < 0) continue;
    float4* const out = slot_state<kRegs>(a, chunk.slot, unit);
#pragma unroll
    for (int k = 0; k < kRegs / 4; ++k)
      out[k * 128] = make_float4(h[4 * k], h[4 * k + 1], h[4 * k + 2], h[4 * k + 3]);
    if (threadIdx.x % 128 == 0 && (kHeads == 2 || unit == 0))
      a.decays[static_cast<std::int64_t>(chunk.slot) * kHeads + of] = exp2_approx(log2_decay);
  }
}

template <typename T, int kP, int kN>
__global__ void __launch_bounds__(kStatesThreads, 1)
    ssd_scan_states_kernel(const __grid_constant__ SsdArgs a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  if (threadIdx.x == 0) {
    init_barriers(S::kFull, a.cfg.state_stages, 1),
        init_barriers(S::kEmpty, a.cfg.state_stages, 8 * kWarpArrivals);
    init_barriers(S::kDecayFull, kSsdDecaySlots, kWarpArrivals);
    init_barriers(S::kDecayEmpty, kSsdDecaySlots, 8 * kWarpArrivals);
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_launch_dependents();  // the forward kernel takes a multiprocessor as soon as it is free
  const int warp = warp_index();
  if (warp < 4) {
    if (warp == 0) load_states_walk<kP>(a);
    if (warp > 0) decay_walk<T, kHeads, true>(a, warp - 1, 3);
  } else {
    // Packed sequences may leave a CTA without a piece, and the walk asks for none.
    if (a.table != nullptr && !Pieces<true>(a).next()) return;
    states_walk<T, kP, kN>(a);
  }
}

// Where units of packed sequences begin: one block, every thread a run of sequences, then of units.
// `ends` [sequences] is scratch: grains up to the end of each sequence.
__global__ void ssd_scan_plan_kernel(const __grid_constant__ SsdArgs a, int4* table, int* ends) {
  constexpr int kThreads = 1024;
  __shared__ int sums[32];
  const int sequences = static_cast<int>(a.p.sequences), units = static_cast<int>(a.cfg.units);
  const int per = (sequences + kThreads - 1) / kThreads;
  const int first = min(static_cast<int>(threadIdx.x) * per, sequences);
  const int end = min(first + per, sequences);
  const auto grains = [&](int i) {
    const int tokens = a.p.cu_seqlens[i + 1] - a.p.cu_seqlens[i];
    return ssd_scan_grains(tokens, a.cfg.grain_shift);
  };
  int own = 0;
  for (int i = first; i < end; ++i) own += grains(i);
  int sum = own;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int k = 1; k < 32; k *= 2) {
    const int other = __shfl_up_sync(~0u, sum, k);
    if (lane >= k) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int before = sum - own, all = 0;
  for (int k = 0; k < 32; ++k) {
    if (k < warp) before += sums[k];
    all += sums[k];
  }
  for (int i = first; i < end; ++i) ends[i] = before += grains(i);
  __syncthreads();
  const int line = all * a.cfg.bundles;
  // Without snapping, units are grains, of which there may be fewer than were allowed for.
  const int share = a.cfg.snap == 0 ? 1 : line / units, more = a.cfg.snap == 0 ? 0 : line % units;
  for (int u = threadIdx.x; u <= units; u += kThreads) {
    int at = min(ssd_scan_cut(share, more, u), line);
    int bundle = at / all, sequence = 0;
    const int inside = at - bundle * all;
    for (int size = sequences; size > 0;) {  // the first sequence that ends beyond `inside`
      const int half = size / 2;
      if (ends[sequence + half] <= inside)
        sequence += half + 1, size -= half + 1;
      else
        size = half;
    }
    const int length = grains(sequence);
    int grain = inside - (ends[sequence] - length);
    const int moved = static_cast<int>(ssd_scan_snap(grain, length, a.cfg.snap));
    grain += moved, at += moved;
    if (grain == length) {
      grain = 0;
      if (++sequence == sequences) sequence = 0, ++bundle;
    }
    table[u] = make_int4(bundle, sequence, grain, at);
  }
}

}  // namespace zebra::sm90
