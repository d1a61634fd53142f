// The walk for the states alone: what every segment but the last of its sequence adds to the state
// and how much of the state before it is left.
#pragma once

#include "ssd_scan/ssd_scan_sm90_walk.cuh"

namespace zebra::sm90 {

constexpr int kStatesThreads = 384;

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
  for (int i = blockIdx.x; i < cfg.state_items; i += gridDim.x) {
    const Item<true> item(a, i);
    if (item.tokens == 0) continue;
    for (int c = 0, chunks = item.chunks(); c < chunks; ++c) {
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
      r.advance(cfg.state_stages);
    }
  }
}

// h^T = exp2(s_63) h^T + (w X)^T B: the next chunk's x is scaled while the product runs.
template <typename T, int kP, int kN>
__device__ __forceinline__ void states_walk(const SsdArgs& a) {
  constexpr int kHeads = 128 / kP, kRegs = kN / 2;
  using S = Smem<kHeads>;
  const SsdScanSm90Config& cfg = a.cfg;
  const int unit = warpgroup_index() - 1, of = kHeads == 2 ? unit : 0;
  const int bytes = cfg.state_stage_bytes;
  const std::uint32_t offset = matrix_offset();
  Ring r;
  unsigned number = 0;
  for (int i = blockIdx.x; i < cfg.state_items; i += gridDim.x) {
    const Item<true> item(a, i);
    if (item.tokens == 0) continue;
    float h[kRegs];
#pragma unroll
    for (int k = 0; k < kRegs; ++k) h[k] = 0.f;
    float log2_decay = 0.f, decay;
    const auto scale = [&](std::uint32_t (&xw)[4][4], const Ring& stage) {
      mbarrier_wait(shared_at(S::kFull) + 8 * stage.slot, stage.phase);
      wait_decays<kHeads>(number);
      const Decays& d = decays_of<kHeads>(number)[of];
      const std::uint32_t tile = shared_at(S::kTiles) + stage.slot * bytes + cfg.x_offset -
                                 cfg.b_offset + unit * cfg.x_step + offset;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        std::uint32_t x[4];
        ldmatrix_x4_trans(x, tile + k * 2048);
        scale_tokens<T>(xw[k], x, d.w + 8 * k);
      }
      decay = d.e[kQ - 1];
      log2_decay += d.s[kQ - 1];
      arrive_warp(shared_at(S::kDecayEmpty) + 8 * (number % kSsdDecaySlots));
      ++number;
    };
    const int chunks = item.chunks();
    // `now` goes into the product while `after` is made: registers of a running product must not be
    // written, so the two change places by code, not by copies.
    const auto step = [&](const std::uint32_t (&now)[4][4], std::uint32_t (&after)[4][4],
                          bool more) {
#pragma unroll
      for (int k = 0; k < kRegs; ++k) h[k] *= decay;
      const std::uint64_t db =
          wgmma_descriptor(shared_at(S::kTiles) + r.slot * bytes + of * cfg.b_step, kTile);
      wgmma_fence(h);
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_rs<T, Major::kMN>(h, now[k], advance(db, 2048 * k));
      wgmma_commit();
      Ring next = r;
      next.advance(cfg.state_stages);
      if (more) scale(after, next);
      wgmma_wait<0>(h);
      arrive_warp(shared_at(S::kEmpty) + 8 * r.slot);
      r = next;
    };
    std::uint32_t even[4][4], odd[4][4];
    scale(even, r);
    for (int c = 0; c < chunks; c += 2) {
      step(even, odd, c + 1 < chunks);
      if (c + 1 < chunks) step(odd, even, c + 2 < chunks);
    }
    const std::int64_t piece =
        static_cast<std::int64_t>(item.segment) * cfg.state_cuts + item.piece;
    float4* const out = piece_state<kRegs>(a, piece, item.slot, unit);
#pragma unroll
    for (int k = 0; k < kRegs / 4; ++k)
      out[k * 128] = make_float4(h[4 * k], h[4 * k + 1], h[4 * k + 2], h[4 * k + 3]);
    if (threadIdx.x % 128 == 0 && (kHeads == 2 || unit == 0))
      a.decays[piece * (cfg.head_slots * kHeads) + item.head + of] = exp2_approx(log2_decay);
  }
}

template <typename T, int kP, int kN>
__global__ void __launch_bounds__(kStatesThreads, 1)
    ssd_scan_states_kernel(const __grid_constant__ SsdArgs a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  if (threadIdx.x == 0) {
    init_barriers(S::kFull, a.cfg.state_stages, 1), init_barriers(S::kEmpty, a.cfg.state_stages, 8);
    init_barriers(S::kDecayFull, kSsdDecaySlots, 1);
    init_barriers(S::kDecayEmpty, kSsdDecaySlots, 8);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int warp = warp_index();
  if (warp < 4) {
    if (warp == 0 && threadIdx.x % 32 == 0) load_states_walk<kP>(a);
    if (warp > 0) decay_walk<T, kHeads, true, 3>(a, warp - 1);
  } else {
    states_walk<T, kP, kN>(a);
  }
}

// Cuts packed sequences into segments: one block, every thread a run of sequences.
__global__ void ssd_scan_plan_kernel(const std::int32_t* cu_seqlens, int sequences, int segment,
                                     int4* table, int entries) {
  constexpr int kThreads = 1024;
  __shared__ int sums[32];
  const int per = (sequences + kThreads - 1) / kThreads;
  const int from = min(static_cast<int>(threadIdx.x) * per, sequences);
  const int to = min(from + per, sequences);
  const auto count = [&](int i) {
    const int cuts = (cu_seqlens[i + 1] - cu_seqlens[i] + segment - 1) / segment;
    return cuts < 1 ? 1 : cuts;
  };
  int own = 0;
  for (int i = from; i < to; ++i) own += count(i);
  int sum = own;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int k = 1; k < 32; k *= 2) {
    const int other = __shfl_up_sync(~0u, sum, k);
    if (lane >= k) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int before = sum - own, total = 0;
  for (int k = 0; k < 32; ++k) {
    if (k < warp) before += sums[k];
    total += sums[k];
  }
  for (int i = from, at = before; i < to; ++i) {
    const int begin = cu_seqlens[i], tokens = cu_seqlens[i + 1] - begin;
    const int cuts = count(i);
    for (int k = 0; k < cuts; ++k, ++at)
      if (at < entries)
        table[at] = make_int4(i, begin + k * segment, min(tokens - k * segment, segment), k);
  }
  for (int at = total + threadIdx.x; at < entries; at += kThreads)
    table[at] = make_int4(-1, 0, 0, 0);
}

}  // namespace zebra::sm90
