// The walk for the states alone: what the units leave of the sequences they do not finish, and how
// much of the state before it is left.
#pragma once

#include "ssd_scan/ssd_scan_sm90_decays.cuh"

namespace zebra::sm90 {

constexpr int kStatesThreads = 512;

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
  Ring r;
  for (Pieces<true> item(a); item.next();) {
    for (int c = 0, chunks = item.chunks(); c < chunks; ++c) {
      if (threadIdx.x % 32 == 0) {
        const std::uint32_t bar = shared_at(S::kFull) + 8 * r.slot;
        const std::uint32_t tile = shared_at(S::kTiles) + r.slot * bytes;
        const int token = item.first + c * kQ;
        mbarrier_wait(shared_at(S::kEmpty) + 8 * r.slot, r.phase ^ 1);
        mbarrier_expect(bar, bytes);
#pragma unroll
        for (int k = 0; k < kHeads; ++k) {
          const int head = item.head + k;
          if (k == 0 || !cfg.share_b)
            tma_load_5d(tile + k * cfg.b_step, &a.B, bar, 0, token, 0, head / per_b, item.row);
          if (k == 0 || cfg.x_step != 0)
            tma_load_5d(tile + cfg.x_offset - cfg.b_offset + k * cfg.x_step, &a.x, bar, 0, token, 0,
                        head / per_x, item.row);
        }
      }
      r.advance(cfg.state_stages);
    }
  }
}

// x times the weights of its tokens: one warpgroup.  Both tiles of a chunk, or the one that two
// heads read with the weights of each.
template <typename T, int kP>
__device__ __forceinline__ void scale_walk(const SsdArgs& a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  const SsdScanSm90Config& cfg = a.cfg;
  const std::uint32_t base = keep(smem_addr(shared_memory));
  const int thread = keep(static_cast<int>(threadIdx.x % 128)), lane = thread % 32;
  char* const memory = static_cast<char*>(__cvta_shared_to_generic(base));
  Ring r, out;
  unsigned number = 0;  // of the step, over all pieces
  for (Pieces<true> item(a); item.next();) {
    for (int c = 0, chunks = item.chunks(); c < chunks; ++c) {
      if (c % 2 == 0) wait_decays<kHeads>(base, number);
      mbarrier_wait(base + S::kFull + 8 * r.slot, r.phase);
      mbarrier_wait(base + S::kScaledEmpty + 8 * out.slot, out.phase ^ 1);
      const PairDecays* const d = decays_of<kHeads, PairDecays>(base, number);
      const char* const from =
          memory + S::kTiles + r.slot * cfg.state_stage_bytes + cfg.x_offset - cfg.b_offset;
      char* const to = memory + cfg.scaled_offset + out.slot * 2 * kTile;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = (thread + 128 * i) * 16, token = at / 128;
          // The halves of a token's factor, each twice.
          const uint2 pair = d[kHeads == 2 ? tile : 0].w[32 * (c % 2) + token / 2];
          const unsigned select = token % 2 == 0 ? 0x1010 : 0x3232;
          const uint2 factors = {__byte_perm(pair.x, 0, select), __byte_perm(pair.y, 0, select)};
          uint4 v = *reinterpret_cast<const uint4*>(from + tile * cfg.x_step + at);
          v.x = scale_pair<T>(v.x, factors), v.y = scale_pair<T>(v.y, factors);
          v.z = scale_pair<T>(v.z, factors), v.w = scale_pair<T>(v.w, factors);
          *reinterpret_cast<uint4*>(to + tile * kTile + at) = v;
        }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(base + S::kScaledFull + 8 * out.slot);
        mbarrier_arrive(base + S::kEmpty + 8 * r.slot);
      }
      const bool done = c % 2 == 1 || c + 1 == chunks;  // with the step's decays
      if (done && lane == 0) mbarrier_arrive(base + S::kDecayEmpty + 8 * (number % kSsdDecaySlots));
      number += done;
      r.advance(cfg.state_stages);
      out.advance(kSsdScaledSlots);
    }
  }
}

// h^T = exp2(s_127) h^T + (w X)^T B, two chunks a step, so that the state is multiplied half as
// often: 64 rows of h^T a warpgroup.
template <typename T, int kP, int kN>
__device__ __forceinline__ void states_walk(const SsdArgs& a) {
  constexpr int kHeads = 128 / kP, kRegs = kN / 2;
  using S = Smem<kHeads>;
  const SsdScanSm90Config& cfg = a.cfg;
  const int unit = warpgroup_index() - 2, of = kHeads == 2 ? unit : 0;
  const std::uint32_t base = keep(smem_addr(shared_memory));
  const int lane = keep(static_cast<int>(threadIdx.x % 32));
  Ring r, x;            // of B, of scaled x: the next product
  Ring used_r, used_x;  // the next to give back
  unsigned number = 0;  // of the step, over all pieces
  for (Pieces<true> item(a); item.next();) {
    float h[kRegs];
#pragma unroll
    for (int k = 0; k < kRegs; ++k) h[k] = 0.f;
    float log2_decay = 0.f;
    const auto product = [&] {
      mbarrier_wait(base + S::kScaledFull + 8 * x.slot, x.phase);  // B came before it
      const std::uint64_t dx =
          wgmma_descriptor(base + cfg.scaled_offset + (2 * x.slot + unit) * kTile, kTile);
      const std::uint64_t db = wgmma_descriptor(
          base + S::kTiles + r.slot * cfg.state_stage_bytes + of * cfg.b_step, kTile);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_ss_mn<T>(h, advance(dx, 2048 * k), advance(db, 2048 * k));
      wgmma_commit();
      r.advance(cfg.state_stages), x.advance(kSsdScaledSlots);
    };
    const auto release = [&] {  // a product is done, its tiles are free
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(base + S::kScaledEmpty + 8 * used_x.slot);
        mbarrier_arrive(base + S::kEmpty + 8 * used_r.slot);
      }
      used_r.advance(cfg.state_stages), used_x.advance(kSsdScaledSlots);
    };
    for (int left = item.chunks(); left > 0; left -= 2) {
      wait_decays<kHeads>(base, number);
      const PairDecays& d = decays_of<kHeads, PairDecays>(base, number)[of];
      const float decay = d.decay;
      log2_decay += d.log2_decay;
      arrive_warp(base + S::kDecayEmpty + 8 * (number % kSsdDecaySlots), lane);
      ++number;
#pragma unroll
      for (int k = 0; k < kRegs; ++k) h[k] *= decay;
      wgmma_hold(h);
      product();
      if (left > 1) {
        product();
        wgmma_wait<1>();
        release();
      }
      wgmma_wait<0>(h);
      release();
    }
    float4* const out = part_state<kRegs>(a, item.part, unit);
#pragma unroll
    for (int k = 0; k < kRegs / 4; ++k)
      out[k * 128] = make_float4(h[4 * k], h[4 * k + 1], h[4 * k + 2], h[4 * k + 3]);
    if (threadIdx.x % 128 == 0 && (kHeads == 2 || unit == 0))
      a.decays[static_cast<std::int64_t>(item.part) * kHeads + of] = exp2_approx(log2_decay);
  }
}

template <typename T, int kP, int kN>
__global__ void __launch_bounds__(kStatesThreads, 1)
    ssd_scan_states_kernel(const __grid_constant__ SsdArgs a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  if (threadIdx.x == 0) {
    init_barriers(S::kFull, a.cfg.state_stages, 1);
    init_barriers(S::kEmpty, a.cfg.state_stages, 12);
    init_barriers(S::kDecayFull, kSsdDecaySlots, 1);
    init_barriers(S::kDecayEmpty, kSsdDecaySlots, 12);
    init_barriers(S::kScaledFull, kSsdScaledSlots, 4);
    init_barriers(S::kScaledEmpty, kSsdScaledSlots, 8);
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_launch_dependents();  // the forward kernel takes a multiprocessor as soon as it is free
  const int warp = warp_index();
  if (warp < 4) {
    if (warp == 0) load_states_walk<kP>(a);
    if (warp > 0) decay_walk<T, kHeads, true>(a, warp - 1, 3);
  } else if (warp < 8) {
    scale_walk<T, kP>(a);
  } else {
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
    return static_cast<int>(ssd_scan_grains(tokens, a.cfg.grain_shift));
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
    int at = min(static_cast<int>(ssd_scan_cut(share, more, u)), line);
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
