// The walk along the chunks: scores, outputs and states (ssd_scan_sm90.cu tells the whole story).
#pragma once

#include "ssd_scan/ssd_scan_sm90_decays.cuh"
#include "ssd_scan/ssd_scan_sm90_scores.cuh"

namespace zebra::sm90 {

constexpr int kForwardThreads = 512;
// Registers of a thread: loads, stores, decays and norm; scores; states (two warpgroups).  Of 512
// in all.
constexpr int kLoadRegisters = 40;
constexpr int score_registers(int state_dim) { return state_dim == 64 ? 88 : 72; }
constexpr int state_registers(int state_dim) { return state_dim == 64 ? 192 : 200; }

// C, B and x of every chunk: one thread.
template <int kP>
__device__ __forceinline__ void load_walk(const SsdArgs& a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  const SsdScanSm90Config& cfg = a.cfg;
  const int heads = static_cast<int>(a.p.heads);
  const int per_x = heads / static_cast<int>(a.p.x_heads);
  const int per_b = heads / static_cast<int>(a.p.b_heads);
  const int per_c = heads / static_cast<int>(a.p.c_heads);
  Ring r;
  for (Pieces<false> item(a); item.next();) {
    int of_x[kHeads], of_b[kHeads], of_c[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      const int head = item.head + k;
      of_x[k] = head / per_x, of_b[k] = head / per_b, of_c[k] = head / per_c;
    }
    for (int c = 0, chunks = item.chunks(); c < chunks; ++c) {
      const std::uint32_t bar = shared_at(S::kFull) + 8 * r.slot;
      const std::uint32_t tile = shared_at(S::kTiles) + r.slot * cfg.stage_bytes;
      const int token = item.first + c * kQ;
      mbarrier_wait(shared_at(S::kEmpty) + 8 * r.slot, r.phase ^ 1);
      mbarrier_expect(bar, cfg.stage_bytes);
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        if (k == 0 || !cfg.share_c)
          tma_load_5d(tile + k * cfg.c_step, &a.C, bar, 0, token, 0, of_c[k], item.row);
        if (k == 0 || !cfg.share_b)
          tma_load_5d(tile + cfg.b_offset + k * cfg.b_step, &a.B, bar, 0, token, 0, of_b[k],
                      item.row);
        if (k == 0 || cfg.x_step != 0)
          tma_load_5d(tile + cfg.x_offset + k * cfg.x_step, &a.x, bar, 0, token, 0, of_x[k],
                      item.row);
      }
      r.advance(cfg.stages);
    }
  }
}

// z and y of every chunk share slots: a slot is filled with z (without a gate: with nothing), y
// takes its place, and once y is stored the slot is filled for the next chunk but one or two.  One
// warp. Where a packed sequence ends inside a chunk, only its rows are stored.
template <int kP>
__device__ __forceinline__ void gate_store_walk(const SsdArgs& a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  const int lane = threadIdx.x % 32;
  Cursor<false> ahead(a);
  const auto fill = [&](int slot) {
    ahead.next();
    if (ahead.done) return;
    const std::uint32_t bar = shared_at(S::kZyFull) + 8 * slot;
    const int token = ahead.piece.first + ahead.chunk * kQ;
    if (lane == 0 && a.p.z != nullptr) {
      mbarrier_expect(bar, 2 * kTile);
#pragma unroll
      for (int k = 0; k < kHeads; ++k)
        tma_load_5d(shared_at(a.cfg.zy_offset) + (2 * slot + k) * kTile, &a.z, bar, 0, token, 0,
                    ahead.piece.head + k, ahead.piece.row);
    } else if (lane == 0) {
      mbarrier_arrive(bar);
    }
  };
#pragma unroll 1
  for (int slot = 0; slot < a.cfg.zy_slots; ++slot) fill(slot);
  Ring r;
  Cursor<false> at(a);
  for (at.next(); !at.done; at.next()) {
    const Pieces<false>& item = at.piece;
    const int valid = item.valid(at.chunk), token = item.first + at.chunk * kQ;
    mbarrier_wait(shared_at(S::kYFull) + 8 * r.slot, r.phase);
    if (valid == kQ || a.p.cu_seqlens == nullptr) {
      if (lane == 0) {
#pragma unroll
        for (int k = 0; k < kHeads; ++k)
          tma_store_5d(&a.y, shared_at(a.cfg.zy_offset) + (2 * r.slot + k) * kTile, 0, token, 0,
                       item.head + k, item.row);
        tma_store_commit();
        tma_store_wait_read<0>();
      }
    } else {
      const char* const src = shared_memory + a.cfg.zy_offset + r.slot * 2 * kTile;
      for (int unit = lane; unit < valid * 16; unit += 32) {
        const int row = unit / 16, tile = unit / 8 % 2, column = unit % 8;
        const int head = item.head + (kHeads == 2 ? tile : 0);
        if (head >= a.p.heads) continue;
        const uint4 v = *reinterpret_cast<const uint4*>(src + tile * kTile + row * 128 +
                                                        ((column ^ (row % 8)) << 4));
        const std::int64_t out = (static_cast<std::int64_t>(token + row) * a.p.heads + head) * kP +
                                 (kHeads == 2 ? 0 : tile * 64) + column * 8;
        *reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(a.p.y) + out) = v;
      }
      __syncwarp();
    }
    fill(r.slot);
    r.advance(a.cfg.zy_slots);
  }
  if (lane == 0) tma_store_wait();
}

// 1 / rms of every token of a head: one warp.
template <int kP>
__device__ __forceinline__ void norm_walk(const SsdArgs& a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  const int lane = threadIdx.x % 32;
  const float eps = static_cast<float>(a.p.norm_eps);
  // A lane sums four tokens over every other row.
  const int half = lane / 16, token = lane % 16 * 4;
  const float* const squares = reinterpret_cast<float*>(shared_memory + a.cfg.squares_offset) +
                               half * kSsdSquaresStride + token;
  float* const rstd = reinterpret_cast<float*>(shared_memory + S::kRstd) + token + 2 * half;
  std::uint32_t phase = 0;
  for (Pieces<false> item(a); item.next();) {
    for (int c = 0, chunks = item.chunks(); c < chunks; ++c, phase ^= 1) {
      mbarrier_wait(shared_at(S::kSquaresFull), phase);
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        float4 sum[2] = {};
#pragma unroll
        for (int row = 0; row < kSsdSquaresRows / kHeads; row += 2) {
          const float4 v = *reinterpret_cast<const float4*>(
              squares + (kSsdSquaresRows / kHeads * k + row) * kSsdSquaresStride);
          float4& to = sum[row / 2 % 2];
          to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w;
        }
        const float x = sum[0].x + sum[1].x, y = sum[0].y + sum[1].y;
        const float z = sum[0].z + sum[1].z, w = sum[0].w + sum[1].w;
        // Each half keeps two of the four tokens.
        const float first = (half ? z : x) + __shfl_xor_sync(~0u, half ? x : z, 16);
        const float second = (half ? w : y) + __shfl_xor_sync(~0u, half ? y : w, 16);
        *reinterpret_cast<float2*>(rstd + k * kQ) = {rsqrtf(first * (1.f / kP) + eps),
                                                     rsqrtf(second * (1.f / kP) + eps)};
      }
      mbarrier_arrive_warp(shared_at(S::kRstdFull));
    }
  }
}

// One warpgroup of 64 rows of h^T: half of a head (P = 128) or a head (P = 64).
template <typename T, int kP, int kN>
struct StateWalk {
  static constexpr int kHeads = 128 / kP;
  static constexpr int kRegs = kN / 2;

  using S = Smem<kHeads>;

  const SsdArgs& a;
  const int lane = keep(static_cast<int>(threadIdx.x % 32));
  const std::uint32_t base = keep(smem_addr(shared_memory));
  const int warp = warp_index() - 8;  // of both warpgroups
  const int unit = warpgroup_index() - 2;
  const std::uint32_t offset = keep(matrix_offset());
  Ring r, z;
  unsigned number = 0;  // of the chunk, over all items
  float weight[2];      // norm_weight of this thread's two rows

  // This thread's sums of squares over its rows and those of lane ^ 16, for the norm: each of the
  // two keeps half of the tokens.
  __device__ __forceinline__ void share_squares(const float (&Y)[32]) {
    const bool upper = lane & 16;
    float* const out = reinterpret_cast<float*>(shared_memory + a.cfg.squares_offset) +
                       (4 * warp + lane / 4 % 4) * kSsdSquaresStride + 32 * upper + lane % 4 * 2;
    const auto sum = [&](int k) { return Y[k] * Y[k] + Y[k + 2] * Y[k + 2]; };
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float x0 = sum(4 * j), x1 = sum(4 * j + 1);
      const float y0 = sum(4 * j + 16), y1 = sum(4 * j + 17);
      const float other0 = __shfl_xor_sync(~0u, upper ? x0 : y0, 16);
      const float other1 = __shfl_xor_sync(~0u, upper ? x1 : y1, 16);
      *reinterpret_cast<float2*>(out + 8 * j) = {(upper ? y0 : x0) + other0,
                                                 (upper ? y1 : x1) + other1};
    }
    mbarrier_arrive_warp(base + S::kSquaresFull, lane);
  }

  // The norm of the chunk before (where there is one to do) and its rounding.
  __device__ __forceinline__ void finish(float (&Y)[32]) {
    if (a.p.norm_weight != nullptr) {
      mbarrier_wait(base + S::kRstdFull, (number - 1) & 1);
      const float* const rstd = reinterpret_cast<float*>(shared_memory + S::kRstd) +
                                (kHeads == 2 ? unit * kQ : 0) + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 v = *reinterpret_cast<const float2*>(rstd + 8 * j);
        Y[4 * j] *= v.x * weight[0], Y[4 * j + 1] *= v.y * weight[0];
        Y[4 * j + 2] *= v.x * weight[1], Y[4 * j + 3] *= v.y * weight[1];
      }
    }
    const std::uint32_t out = base + a.cfg.zy_offset + (2 * y_slot() + unit) * kTile + offset;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      stmatrix_x4_trans(out + k * 2048, pack<T>(Y[8 * k], Y[8 * k + 1]),
                        pack<T>(Y[8 * k + 2], Y[8 * k + 3]), pack<T>(Y[8 * k + 4], Y[8 * k + 5]),
                        pack<T>(Y[8 * k + 6], Y[8 * k + 7]));
  }
  // Leave to store what finish() wrote: a while later, because the fence waits for those writes,
  // but at once where z of the next chunk waits for the slot.
  __device__ __forceinline__ void publish() {
    fence_async_proxy();
    mbarrier_arrive_warp(base + S::kYFull + 8 * y_slot(), lane);
  }
  // Where the output of the chunk before goes: to its z.
  __device__ __forceinline__ int y_slot() const {
    return (z.slot == 0 ? a.cfg.zy_slots : z.slot) - 1;
  }

  // The state before the piece: the sequence's initial state and what was walked up to here.
  __device__ __forceinline__ void start(const Pieces<false>& item, int head, float (&h)[kRegs]) {
    const SsdScanParams& p = a.p;
    if (p.initial_state != nullptr && head < p.heads) {
      load_state<kRegs>(h, static_cast<const float*>(p.initial_state) + state_at(item, head));
    } else {
#pragma unroll
      for (int i = 0; i < kRegs; ++i) h[i] = 0.f;
    }
    if (item.grain == 0) return;
    const int width = a.cfg.width, cuts = a.cfg.state_cuts_shift;
    if (a.table == nullptr) {  // the shares that end between the sequence's begin and this piece's
      const int bundle = item.head / (width * kHeads);
      const int line = bundle * static_cast<int>(p.sequences) + item.sequence;
      const int from = line * a.cfg.state_line, to = from + (item.grain << a.cfg.grain_shift);
      int v = ssd_scan_state_unit(a.cfg, from);
      for (; ssd_scan_state_cut(a.cfg, v + 1) <= to; ++v) fold(v * width + item.member(), h);
      if (ssd_scan_state_cut(a.cfg, v) < to)
        fold((a.cfg.state_units + item.unit()) * width + item.member(), h);
      return;
    }
    // Of the units before this one: those that the sequence comes from, the first of them first.
    int from = item.unit();
    for (int left = item.grain; left > 0;) {
      const int end = place_of(a, from).at;
      left -= end - place_of(a, --from).at;
    }
    for (; from < item.unit(); ++from) {
      const int walked = item.unfinished(place_of(a, from), place_of(a, from + 1));
      const int chunks = walked << a.cfg.grain_shift, per = item.part_chunks(a, walked);
      for (int cut = 0; cut * per < chunks; ++cut)
        fold(((from << cuts) + cut) * width + item.member(), h);
    }
  }
  // What the walk for the states left in a slot, after `h`.
  __device__ __forceinline__ void fold(std::int64_t slot, float (&h)[kRegs]) {
    const float decay = a.decays[slot * kHeads + (kHeads == 2 ? unit : 0)];
    const float4* const local = slot_state<kRegs>(a, slot, unit);
#pragma unroll
    for (int i = 0; i < kRegs / 4; ++i) {
      const float4 v = local[i * 128];
      h[4 * i] = h[4 * i] * decay + v.x, h[4 * i + 1] = h[4 * i + 1] * decay + v.y;
      h[4 * i + 2] = h[4 * i + 2] * decay + v.z, h[4 * i + 3] = h[4 * i + 3] * decay + v.w;
    }
  }
  __device__ __forceinline__ std::int64_t state_at(const Pieces<false>& item, int head) const {
    return ((item.sequence * a.p.heads + head) * kP + (kHeads == 1 ? 64 * unit : 0)) * kN;
  }

  __device__ __forceinline__ void walk(Pieces<false>& item) {
    const SsdScanParams& p = a.p;
    const SsdScanSm90Config& cfg = a.cfg;
    const int head = item.head + (kHeads == 2 ? unit : 0);
    const int known = head < p.heads ? head : 0;  // parameters of an absent head: any
    if (p.norm_weight != nullptr) {
      const std::int64_t at = static_cast<std::int64_t>(known) * kP +
                              (kHeads == 1 ? 64 * unit : 0) + warp % 4 * 16 + keep(lane / 4);
      weight[0] = load_scalar(p.norm_weight, p.norm_weight_dtype, at);
      weight[1] = load_scalar(p.norm_weight, p.norm_weight_dtype, at + 8);
    }
    float h[kRegs], Y[32];
    start(item, head, h);
    const int of = kHeads == 2 ? unit : 0;
    int* const held =
        reinterpret_cast<int*>(shared_memory + S::kHeldPieces) + warp * Pieces<false>::kHeld;
    item.hold(held);
    bool begun = false;
    for (int left = item.tokens; left > 0; left -= kQ, begun = true) {
      const std::uint32_t stage = base + S::kTiles + r.slot * cfg.stage_bytes;
      const std::uint32_t x_tile = stage + cfg.x_offset + unit * cfg.x_step + offset;
      // The scores come after the loads and the decays: one wait for all three.
      const int pm = number % kSsdPmSlots;
      mbarrier_wait(base + S::kPmFull + 8 * pm, number / kSsdPmSlots & 1);
      const Decays& d = decays_of<kHeads>(base, number)[of];

      // next = h^T C^T.  Under it: the norm of the last chunk, the decay of the state, w X.
      float next[32];
      std::uint32_t x[4][4], xw[4][4];
      {
        std::uint32_t hb[kRegs / 2];
#pragma unroll
        for (int i = 0; i < kRegs / 2; ++i) hb[i] = pack<T>(h[2 * i], h[2 * i + 1]);
        const std::uint64_t dc = wgmma_descriptor(stage + of * cfg.c_step, 16);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kN / 16; ++k)
          wgmma_rs<T, Major::kK>(next, {hb[4 * k], hb[4 * k + 1], hb[4 * k + 2], hb[4 * k + 3]},
                                 advance(dc, k / 4 * kTile + k % 4 * 32), k > 0);
        wgmma_commit();
        if (begun) finish(Y);
        if (begun && cfg.zy_slots < 3) publish();
        const float decay = d.e[kQ - 1];
#pragma unroll
        for (int i = 0; i < kRegs; ++i) h[i] *= decay;
#pragma unroll
        for (int k = 0; k < 4; ++k) ldmatrix_x4_trans(x[k], x_tile + k * 2048);
        wgmma_wait<0>(next);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) scale_tokens<T>(xw[k], x[k], d.w + 8 * k, lane);
      mbarrier_wait(base + S::kZyFull + 8 * z.slot, z.phase);
      const std::uint32_t z_tile = base + a.cfg.zy_offset + (2 * z.slot + unit) * kTile + offset;
      std::uint32_t zs[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_x4_trans(zs[k], z_tile + k * 2048);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 e = *reinterpret_cast<const float2*>(&d.e[8 * j + lane % 4 * 2]);
        next[4 * j] *= e.x, next[4 * j + 1] *= e.y;
        next[4 * j + 2] *= e.x, next[4 * j + 3] *= e.y;
      }

      // next = exp2(s_i) next + X^T Pm^T,  h^T = exp2(s_63) h^T + (w X)^T B.  Under the first: the
      // gate; under the second: the diagonal and D, the gate applied, the squares for the norm.
      const std::uint64_t dp =
          wgmma_descriptor(base + cfg.pm_offset + (pm * kHeads + of) * kTile, 16);
      const std::uint64_t db = wgmma_descriptor(stage + cfg.b_offset + of * cfg.b_step, kTile);
      wgmma_fence(next, h);
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_rs<T, Major::kK>(next, x[k], advance(dp, 32 * k));
      wgmma_commit();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_rs<T, Major::kMN>(h, xw[k], advance(db, 2048 * k));
      wgmma_commit();
      if (begun && cfg.zy_slots >= 3) publish();
      float gate[32];
#pragma unroll
      for (int k = 0; k < 16; ++k) {  // without z: of whatever lies there, and not used
        const float2 v = silu(zs[k / 4][k % 4]);
        gate[2 * k] = v.x, gate[2 * k + 1] = v.y;
      }
      wgmma_wait<1>(next);
      mbarrier_arrive_warp(base + S::kPmEmpty + 8 * pm, lane);
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const float2 v = unpack<T>(x[k / 4][k % 4]);
        const float2 own = *reinterpret_cast<const float2*>(&d.s[k / 2 * 8 + lane % 4 * 2]);
        Y[2 * k] = fmaf(own.x, v.x, next[2 * k]);
        Y[2 * k + 1] = fmaf(own.y, v.y, next[2 * k + 1]);
        if (p.z != nullptr) Y[2 * k] *= gate[2 * k], Y[2 * k + 1] *= gate[2 * k + 1];
      }
      mbarrier_arrive_warp(base + S::kDecayEmpty + 8 * (number % kSsdDecaySlots), lane);
      if (p.norm_weight != nullptr) share_squares(Y);
      ++number;
      wgmma_wait<0>(h);
      mbarrier_arrive_warp(base + S::kEmpty + 8 * r.slot, lane);
      r.advance(cfg.stages);
      z.advance(cfg.zy_slots);
    }
    if (begun) finish(Y), publish();
    item.restore(held);
    const int stored = item.head + (kHeads == 2 ? unit : 0);
    if (item.last && stored < p.heads)
      store_state<kRegs>(h, static_cast<float*>(p.final_state) + state_at(item, stored));
  }

  // v / (1 + exp(-v)) of two elements.  For bf16 by tanh, whose error of 2^-11 is below the
  // rounding of y.
  static __device__ __forceinline__ float2 silu(std::uint32_t pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      __nv_bfloat162 half =
          __hmul2(*reinterpret_cast<__nv_bfloat162*>(&pair), __nv_bfloat162{0.5f, 0.5f});
      const float2 v = unpack<T>(*reinterpret_cast<std::uint32_t*>(&half));
      return {fmaf(v.x, tanh_approx(v.x), v.x), fmaf(v.y, tanh_approx(v.y), v.y)};
    } else {
      const auto one = [](float v) {
        return __fdividef(v, 1.f + exp2_approx(v * -1.4426950408889634f));
      };
      const float2 v = unpack<T>(pair);
      return {one(v.x), one(v.y)};
    }
  }
};

template <typename T, int kP, int kN>
__global__ void __launch_bounds__(kForwardThreads, 1)
    ssd_scan_forward_kernel(const __grid_constant__ SsdArgs a) {
  constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;
  if (threadIdx.x == 0) {
    init_barriers(S::kFull, a.cfg.stages, 1),
        init_barriers(S::kEmpty, a.cfg.stages, 12 * kWarpArrivals);
    init_barriers(S::kDecayFull, kSsdDecaySlots, kWarpArrivals);
    init_barriers(S::kDecayEmpty, kSsdDecaySlots, 12 * kWarpArrivals);
    init_barriers(S::kZyFull, a.cfg.zy_slots, 1);
    init_barriers(S::kYFull, a.cfg.zy_slots, 8 * kWarpArrivals);
    init_barriers(S::kPmFull, kSsdPmSlots, 4 * kWarpArrivals);
    init_barriers(S::kPmEmpty, kSsdPmSlots, 8 * kWarpArrivals);
    init_barriers(S::kSquaresFull, 1, 8 * kWarpArrivals);
    init_barriers(S::kRstdFull, 1, kWarpArrivals);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int warp = warp_index();
  if (warp < 4) {
    registers_decrease<kLoadRegisters>();
    // The norm on the scheduler whose scores are the fewest, the loads where they are the most.
    const bool norm = a.p.norm_weight != nullptr;
    if (warp == 0 && norm) norm_walk<kP>(a);
    if (warp == 1 || (warp == 0 && !norm))
      decay_walk<T, kHeads, false>(a, norm ? 0 : warp, norm ? 1 : 2);
    if (warp == 2) gate_store_walk<kP>(a);
    if (warp == 3 && threadIdx.x % 32 == 0) load_walk<kP>(a);
  } else if (warp < 8) {
    registers_decrease<score_registers(kN)>();
    ScoreWalk<T, kP, kN> scores{a};
    for (Pieces<false> item(a); item.next();) {
      if (kHeads == 2 && a.cfg.share_c && a.cfg.share_b)
        scores.template walk<true>(item);
      else
        scores.template walk<false>(item);
    }
  } else {
    registers_increase<state_registers(kN)>();
    StateWalk<T, kP, kN> states{a};
    grid_dependency_wait();  // the states kernel's work; the inputs were there before it
    for (Pieces<false> item(a); item.next();) states.walk(item);
  }
}

}  // namespace zebra::sm90
