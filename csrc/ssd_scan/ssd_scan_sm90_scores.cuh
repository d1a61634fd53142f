// Masked, decayed scores of every chunk, ahead of the states.
#pragma once

#include "ssd_scan/ssd_scan_sm90_walk.cuh"

namespace zebra::sm90 {

// Pm[i][j] = (C_i . B_j) exp2(s_i - t_j) for j < i: one warpgroup.  The diagonal stays in fp32 and
// takes D along: where both nearly cancel, the norm would magnify its rounding.
template <typename T, int kP, int kN>
struct ScoreWalk {
  static constexpr int kHeads = 128 / kP;
  using S = Smem<kHeads>;

  const SsdArgs& a;
  const int lane = keep(static_cast<int>(threadIdx.x % 32)), warp = warp_index() % 4;
  const std::uint32_t base = keep(smem_addr(shared_memory));
  const int row = 16 * warp + lane / 4;  // i of the first two registers of four; the others: + 8
  const int store_row = 16 * warp + lane / 8 % 2 * 8 + lane % 8;
  Ring r;
  unsigned number = 0;  // of the chunk, over all items

  // The heads of the CTA read the same C and B (kShared): one product serves both.
  template <bool kShared>
  __device__ __forceinline__ void walk(const Pieces<false>& item) {
    const SsdScanSm90Config& cfg = a.cfg;
    float skip[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      skip[k] = a.p.D == nullptr || item.head + k >= a.p.heads
                    ? 0.f
                    : load_scalar(a.p.D, a.p.d_dtype, item.head + k);
    for (int c = 0, chunks = item.chunks(); c < chunks; ++c) {
      const std::uint32_t stage = base + S::kTiles + r.slot * cfg.stage_bytes;
      const int pm = number % kSsdPmSlots;
      mbarrier_wait(base + S::kFull + 8 * r.slot, r.phase);
      float scores[32];
      const auto product = [&](int k) {
        const std::uint64_t dc = wgmma_descriptor(stage + k * cfg.c_step, 16);
        const std::uint64_t db = wgmma_descriptor(stage + cfg.b_offset + k * cfg.b_step, 16);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < kN / 16; ++n) {
          const std::uint32_t at = n / 4 * kTile + n % 4 * 32;
          wgmma_ss<T>(scores, advance(dc, at), advance(db, at), n > 0);
        }
        wgmma_commit();
      };
      if (kShared) product(0);
      wait_decays<kHeads>(base, number);
      mbarrier_wait(base + S::kPmEmpty + 8 * pm, number / kSsdPmSlots & 1 ^ 1);
      if (kShared) wgmma_wait<0>(scores);
#pragma unroll 1  // one copy of the code: the instruction cache is short
      for (int k = 0; k < kHeads; ++k) {
        if (!kShared) product(k);
        Decays& d = decays_of<kHeads>(base, number)[k];
        const float s0 = d.s[row], s1 = d.s[row + 8];
        float2 t[2][2];
        load_t(t[0], d, 0);
        if (!kShared) wgmma_wait<0>(scores);
        store(scores, s0, s1, t, k == 0 ? skip[0] : skip[kHeads - 1], d,
              base + cfg.pm_offset + (pm * kHeads + k) * kTile + store_row * 128);
      }
      const int valid = item.valid(c);
      if (valid < kQ) clear_tail(valid, r.slot);
      fence_async_proxy();
      __syncwarp();
      if (kWarpArrivals == 32 || lane == 0) {
        mbarrier_arrive(base + S::kPmFull + 8 * pm);
        mbarrier_arrive(base + S::kEmpty + 8 * r.slot);
        mbarrier_arrive(base + S::kDecayEmpty + 8 * (number % kSsdDecaySlots));
      }
      ++number;
      r.advance(cfg.stages);
    }
  }

  // t of this thread's four of 16 columns.
  __device__ __forceinline__ void load_t(float2 (&t)[2], const Decays& d, int block) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      t[m] = *reinterpret_cast<const float2*>(&d.t[16 * block + 8 * m + lane % 4 * 2]);
  }

  // Decays, masks and rounds this warp's 16 rows; t[0] is loaded, `skip` is D.
  __device__ __forceinline__ void store(const float (&scores)[32], float s0, float s1,
                                        float2 (&t)[2][2], float skip, Decays& d,
                                        std::uint32_t out) {
    {  // The diagonal, by d_i itself: exp2(s_i - t_i) loses digits of it where s is large.
      const bool second = lane / 4 % 2;  // the lane that holds it has an odd row
      float d0 = 0.f, d1 = 0.f;
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (n == warp) {
          d0 = second ? scores[8 * n + 1] : scores[8 * n];
          d1 = second ? scores[8 * n + 7] : scores[8 * n + 6];
        }
      __syncwarp();  // s is read
      if (lane / 8 == lane % 4) {
        d.s[row] = fmaf(d0, d.e[row], skip), d.s[row + 8] = fmaf(d1, d.e[row + 8], skip);
        d.e[row] = exp2_approx(s0), d.e[row + 8] = exp2_approx(s1);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {  // 16 columns: above this warp's rows, on the diagonal, below
      std::uint32_t v[4] = {};
      if (n <= warp) {
        const int i = lane / 4, j = lane % 4 * 2;  // of an 8 x 8 block
        if (n < 3) load_t(t[(n + 1) % 2], d, n + 1);
        float p[8];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int at = 8 * n + 4 * m;
          const float2 tm = t[n % 2][m];
          p[4 * m] = scores[at] * exp2_approx(s0 - tm.x);
          p[4 * m + 1] = scores[at + 1] * exp2_approx(s0 - tm.y);
          p[4 * m + 2] = scores[at + 2] * exp2_approx(s1 - tm.x);
          p[4 * m + 3] = scores[at + 3] * exp2_approx(s1 - tm.y);
        }
        if (n == warp) {
          p[0] = j < i ? p[0] : 0.f, p[1] = j + 1 < i ? p[1] : 0.f;
          p[4] = p[5] = 0.f;
          p[6] = j < i ? p[6] : 0.f, p[7] = j + 1 < i ? p[7] : 0.f;
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) v[m] = pack<T>(p[2 * m], p[2 * m + 1]);
      }
      stmatrix_x4(out + (((2 * n + lane / 16) ^ (store_row % 8)) << 4), v[0], v[1], v[2], v[3]);
    }
  }

  // The rows of B and x after the sequence's end, whatever they hold, once the scores are made and
  // before the states read them: 0 * NaN is NaN in a product.
  __device__ __forceinline__ void clear_tail(int valid, int slot) {
    named_barrier(1, 128);
    char* const tiles =
        shared_memory + S::kTiles + slot * a.cfg.stage_bytes + a.cfg.b_offset + valid * 128;
    const int rows = kQ - valid, units = (a.cfg.stage_bytes - a.cfg.b_offset) / kTile * rows * 8;
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < units; i += 128) {
      const int line = i / 8;
      char* const at = tiles + line / rows * kTile + line % rows * 128;
      *reinterpret_cast<uint4*>(at + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
  }
};

}  // namespace zebra::sm90
