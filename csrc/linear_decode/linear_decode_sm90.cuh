// The kernel of linear_decode on Hopper (linear_decode_sm90.cu tells the whole story).
#pragma once

#include <type_traits>

#include "common/cuda/vec.cuh"
#include "common/sm90/wgmma.cuh"
#include "linear_decode/linear_decode_sm90_load.cuh"
#include "linear_decode/linear_decode_sm90_norm.cuh"
#include "linear_decode/linear_decode_sm90_project.cuh"

namespace zebra::sm90 {

// ---- products and what follows them: two warpgroups
//
// Of units of more than 64 rows (row_tiles 2) each takes 64; of others both take all rows: of 128
// tokens half of the tokens each, of fewer every other group of kSlices boxes along K, so a stage
// has two groups or more.
//
// With several slices the 64 rows are those of kSlices boxes along K, one behind the other in
// shared memory, and the columns the tokens of as many boxes of x: the blocks on the diagonal are
// products of the same part of K and are summed at the end, the others are not used.

template <typename T, int kTokens, int kRowTiles, int kSlices>
struct LinearProduct {
  static constexpr int kThreads = kLinearThreads - 128, kWarps = kThreads / 32;
  static constexpr int kParts = linear_parts(kTokens, kRowTiles);
  static constexpr bool kHalves = linear_halves_tokens(kTokens, kRowTiles);
  static constexpr int kGroupTokens = kHalves ? kTokens / 2 : kTokens;  // of a warpgroup
  static constexpr int kSize = kSlices * kGroupTokens / 2;              // accumulators of a thread
  static constexpr int kFinishing = 128 * kRowTiles;  // threads that send, and that receive, sums
  static constexpr int kStaged = linear_staged_tokens(kTokens, kRowTiles);
  static constexpr int kPitch = linear_staging_pitch(kRowTiles);
  // Of the staged ones, a warp's tokens and a lane's outputs of each.
  static constexpr int kOwnTokens = kStaged / kWarps, kOwnOutputs = 2 * kRowTiles;
  static constexpr bool kPairs = linear_may_pair(kTokens, kSlices);  // with another CTA
  static constexpr int kSent = kHalves ? kSize : kSize / 2;          // sums of a thread, to a peer
  // Whether registers are left for a rehearsal.
  static constexpr bool kRehearses = kTokens != 64 || kRowTiles == 1;

  const LinearArgs& a;
  const LinearWork& work;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - 4;
  const int group = warp / 4, tile = kRowTiles == 2 ? group : 0, part = kParts == 2 ? group : 0;
  const int group_token = kHalves ? group * kGroupTokens : 0;  // the first of the warpgroup

  // `start` waits until x, the residual and y may be touched.  Before it the end of a unit runs
  // once, without sums and without a store: until W is there, there is nothing else to do, and then
  // the code that every unit ends with need not be fetched.  Not where a peer may have sent sums to
  // the same memory.
  template <typename Start>
  __device__ __forceinline__ void walk(const Start& start) const {
    LinearRing r;
#pragma unroll 1
    for (int u = kRehearses && a.cfg.cluster == 1 ? -1 : 0; u < work.units; ++u) {
      const bool is_real = !kRehearses || u >= 0;
      float d[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) d[i] = 0.f;
      const Outputs out = outputs_of(work.first_unit + (is_real ? u : 0));
      Aside aside;
      if (is_real) {
        if (u == 0) start();
        if (a.cfg.cluster == 2 && warp == 0 && lane == 0)
          mbarrier_expect(linear_shared_at(LinearSmem::kPeerFull), kSent * 4 * kFinishing);
        // Under way while the products are made.
        if (!a.cfg.projects) read_residual(aside, first_token(), out);
        wgmma_fence(d);
        multiply_all(d, r);
        if constexpr (kPairs) {
          if (a.cfg.cluster == 2) {
            if constexpr (kParts == 2) merge(d);
            if (part == 0) exchange(d, u);
            // Taken: the memory serves finish() next.  The other part, or those who sent, meet,
            // too: racecheck takes warps that met others less often for unordered.
            named_barrier(2 + (kRowTiles == 2 ? 0 : group), kFinishing);
          }
        }
      }
      finish(d, out, aside, is_real);
      if constexpr (kPairs)
        if (a.cfg.cluster == 2 && (kRowTiles == 2 || group == 0) && is_real && u + 1 < work.units)
          tell_peer(LinearSmem::kPeerFree);
    }
  }

 private:
  // Those of a unit: of the second weight, the first one, and how many.
  struct Outputs {
    bool second;
    std::int64_t first;
    int count;
  };
  __device__ __forceinline__ Outputs outputs_of(int unit) const {
    const bool second = unit >= a.cfg.first_units;
    const std::int64_t first =
        (unit - (second ? a.cfg.first_units : 0)) * static_cast<std::int64_t>(a.cfg.unit);
    const std::int64_t left = (second ? a.also.outputs : a.p.outputs) - first;
    return {second, first, left < a.cfg.unit ? static_cast<int>(left) : a.cfg.unit};
  }

  // What a lane needs of memory for its outputs of the staged tokens: the residual, as it lies
  // there, or cosines and sines.
  struct Aside {
    std::uint32_t of[kOwnTokens][kOwnOutputs];

    // The next output's: a loop over registers that need not be unrolled.
    __device__ __forceinline__ void next_output() {
#pragma unroll
      for (int i = 0; i < kOwnTokens; ++i)
#pragma unroll
        for (int k = 0; k + 1 < kOwnOutputs; ++k) of[i][k] = of[i][k + 1];
    }
  };

  // The tokens that this CTA finishes.
  __device__ __forceinline__ int first_token() const {
    return a.cfg.cluster == 2 ? work.rank * (kTokens / 2) : 0;
  }
  __device__ __forceinline__ int past_token() const {
    const int past = a.cfg.cluster == 2 ? (work.rank + 1) * (kTokens / 2) : kTokens;
    return past < a.p.rows ? past : static_cast<int>(a.p.rows);
  }

  __device__ __forceinline__ void release(int slot) const {
    mbarrier_arrive_warp(linear_shared_at(LinearSmem::kEmpty) + 8 * slot);
  }

  __device__ __forceinline__ void multiply_all(float (&d)[kSize], LinearRing& r) const {
    const LinearDecodeSm90Config& c = a.cfg;
    const int own = c.boxes / (kSlices * kParts);  // groups of boxes in a stage
    const std::uint32_t w_skip =
        (tile ^ a.up_first) * c.second_offset + part * kSlices * c.weight_box;
    const std::uint32_t x_skip = part * kSlices * c.x_box + group_token * 2 * kLinearBox;
    const std::uint32_t w_step = kParts * kSlices * c.weight_box;
    const std::uint32_t x_step = kParts * kSlices * c.x_box;
    int last = 0;
    for (int s = 0; s < work.steps; ++s) {
      mbarrier_wait(linear_shared_at(LinearSmem::kFull) + 8 * r.slot, r.phase);
      const std::uint32_t stage = linear_shared_at(LinearSmem::kRing + r.slot * c.stage_bytes);
      const std::uint64_t w = wgmma_descriptor(stage + w_skip, 16);
      const std::uint32_t boxes_of_x =
          c.norms ? linear_shared_at(c.h_offset) + s * c.boxes * c.x_box : stage + c.x_offset;
      const std::uint64_t x = wgmma_descriptor(boxes_of_x + x_skip, 16);
      if (own == 1)
        multiply<1>(d, w, w_step, x, x_step);
      else if (own == 2)
        multiply<2>(d, w, w_step, x, x_step);
      else
        multiply<4>(d, w, w_step, x, x_step);
      wgmma_wait<1>();
      if (s > 0) release(last);
      last = r.slot;
      r.advance(c.stages);
    }
    wgmma_wait<0>(d);
    if (work.steps > 0) release(last);
  }
  // kGroups groups of boxes of a stage.  Of x products read kTokens rows, also where its box has
  // fewer: what lies behind them makes sums of tokens that there are not.
  template <int kGroups>
  __device__ __forceinline__ void multiply(float (&d)[kSize], std::uint64_t w, std::uint32_t w_step,
                                           std::uint64_t x, std::uint32_t x_step) const {
    wgmma_fence();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int k = 0; k < kLinearBox / 16; ++k)
        wgmma_ss<T>(d, advance(w, 32 * k), advance(x, 32 * k), true);
      w = advance(w, w_step), x = advance(x, x_step);
    }
    wgmma_commit();
  }

  // Of which slice the eighth i of this warp's 16 rows is.
  __device__ __forceinline__ int slice_of(int i) const {
    return (16 * (warp % 4) + 8 * i) * 128 / a.cfg.weight_box;
  }

  // Both warpgroups' sums in the first: through the ring, which has served, or behind it.
  __device__ __forceinline__ void merge(float (&d)[kSize]) const {
    char* const at = linear_shared + a.cfg.merge_offset + threadIdx.x % 128 * 16;
    named_barrier(1, kThreads);
#pragma unroll
    for (int i = 0; i < kSize; i += 4)
      if (part == 1)
        *reinterpret_cast<float4*>(at + i / 4 * 128 * 16) = {d[i], d[i + 1], d[i + 2], d[i + 3]};
    named_barrier(1, kThreads);
    if (part == 1) return;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(at + i / 4 * 128 * 16);
      d[i] += v.x, d[i + 1] += v.y, d[i + 2] += v.z, d[i + 3] += v.w;
    }
  }

  __device__ __forceinline__ void tell_peer(int bar) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive_cluster(cluster_addr(linear_shared_at(bar), work.rank ^ 1));
  }

  // Each CTA of a cluster gets the sums of both for its half of the tokens: half of those that a
  // warpgroup has, or all that one has and none of the other's.
  __device__ __forceinline__ void exchange(float (&d)[kSize], int u) const {
    const int at = a.cfg.staging_offset + (tile * (kSent / 4) * 128 + threadIdx.x % 128) * 16;
    const std::uint32_t to = cluster_addr(linear_shared_at(at), work.rank ^ 1);
    const std::uint32_t bar = cluster_addr(linear_shared_at(LinearSmem::kPeerFull), work.rank ^ 1);
    const auto give = [&](int from) {
      if (u > 0) mbarrier_wait_cluster(linear_shared_at(LinearSmem::kPeerFree), (u - 1) & 1);
#pragma unroll
      for (int i = 0; i < kSent; i += 4)
        cluster_store_async(to + i / 4 * 128 * 16,
                            {d[from + i], d[from + i + 1], d[from + i + 2], d[from + i + 3]}, bar);
    };
    const auto take = [&](int into) {
      mbarrier_wait_cluster(linear_shared_at(LinearSmem::kPeerFull), u & 1);
#pragma unroll
      for (int i = 0; i < kSent; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(linear_shared + at + i / 4 * 128 * 16);
        d[into + i] += v.x, d[into + i + 1] += v.y;
        d[into + i + 2] += v.z, d[into + i + 3] += v.w;
      }
    };
    if constexpr (kHalves) {
      group == work.rank ? take(0) : give(0);
    } else {
      work.rank == 0 ? give(kSent) : give(0);
      work.rank == 0 ? take(0) : take(kSent);
    }
  }

  // Bias, activation, residual, rounding: through shared memory, so that a warp writes neighbouring
  // outputs of one token.  This code runs once or twice and comes from memory: loops are unrolled
  // no further than their latencies want.
  __device__ __forceinline__ void finish(const float (&d)[kSize], const Outputs& out, Aside& aside,
                                         bool is_real) const {
    const LinearDecodeSm90Config& c = a.cfg;
    const float* const staging = reinterpret_cast<const float*>(linear_shared + c.staging_offset);
    if (c.projects && is_real) mbarrier_wait(linear_shared_at(LinearSmem::kLookedUp), 0);
    const LinearTurn<T, kRowTiles> turn(a, out.second, out.first, out.count);
    const int past = past_token();
#pragma unroll 1
    for (int from = first_token(); from < past; from += kStaged) {
      if (c.projects && is_real)
        look_up(aside, from, past, turn);
      else if (is_real && from > first_token())
        read_residual(aside, from, out);
#pragma unroll
      for (int i = 0; i < kGroupTokens; i += kStaged)
        if (group_token + i == from) stage(d, i);
      named_barrier(1, kThreads);
      const int tokens = is_real ? past - from - warp : 0;
      if (c.projects)
        turn.template write<kWarps>(aside.of, from + warp, tokens, [&](int i, int n) {
          return pair_of(staging + (warp + i * kWarps) * kPitch + n);
        });
      else
        write(staging, from, tokens, out, aside);
      if (!is_real || from + kStaged >= past) break;
      named_barrier(1, kThreads);
    }
    named_barrier(1, kThreads);  // the memory serves the next unit
  }

  // The sums of kStaged of the warpgroup's tokens in shared memory, outputs side by side.
  __device__ __forceinline__ void stage(const float (&d)[kSize], int from) const {
    if (part == 1 && a.cfg.cluster == 2) return;  // merged
    const int row = 64 * tile + 16 * (warp % 4) + lane / 4, column = lane % 4 * 2;
    float* const to = reinterpret_cast<float*>(linear_shared + a.cfg.staging_offset) +
                      (part * kStaged + column) * kPitch + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slice = slice_of(half);
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        if (kSlices > 1 && slice != s) continue;
#pragma unroll
        for (int j = 0; j < kStaged / 8; ++j) {
          const int i = (s * kGroupTokens + from) / 2 + 4 * j + 2 * half;
          to[8 * j * kPitch + 8 * half] = d[i];
          to[(8 * j + 1) * kPitch + 8 * half] = d[i + 1];
        }
      }
    }
  }

  // Two neighbouring sums.
  __device__ __forceinline__ float2 pair_of(const float* sums) const {
    const bool in_parts = kParts == 2 && a.cfg.cluster == 1;
    float2 v = {0.f, 0.f};
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const float* const from = sums + s * (a.cfg.weight_box / 128);
      const auto add = [&](const float* at) {
        const float2 part = *reinterpret_cast<const float2*>(at);
        v.x += part.x, v.y += part.y;
      };
      add(from);
      if (in_parts) add(from + kStaged * kPitch);
    }
    return v;
  }

  // All of a lane's at once: one latency.
  __device__ __forceinline__ void read_residual(Aside& aside, int from, const Outputs& out) const {
    if (a.p.residual == nullptr) return;
    const int past = past_token();
    const auto* const rows = static_cast<const unsigned short*>(a.p.residual) + out.first + lane;
#pragma unroll
    for (int i = 0; i < kOwnTokens; ++i) {
      const int token = from + warp + i * kWarps;
      if (token >= past) break;
      const unsigned short* const row = rows + token * a.p.residual_stride;
#pragma unroll
      for (int k = 0; k < kOwnOutputs; ++k)
        if (lane + 32 * k < out.count) aside.of[i][k] = row[32 * k];
    }
  }

  __device__ __forceinline__ void look_up(Aside& aside, int from, int past,
                                          const LinearTurn<T, kRowTiles>& turn) const {
#pragma unroll
    for (int i = 0; i < kOwnTokens; ++i) {
      const int token = from + warp + i * kWarps;
      if (token < past) turn.look_up(aside.of[i], token);
    }
  }

  // Of the warp's tokens from `from` on, kWarps apart, those before `tokens`.
  __device__ __forceinline__ void write(const float* staging, int from, int tokens,
                                        const Outputs& out, Aside& aside) const {
    const LinearDecodeParams& p = a.p;
    const bool in_parts = kParts == 2 && a.cfg.cluster == 1;
    const float* sums = staging + warp * kPitch + lane;
    T* y = static_cast<T*>(p.y) + (from + warp) * p.outputs + out.first + lane;
    // Four sums at once, of tokens or of outputs: the end of a unit is latencies.
#pragma unroll(kOwnTokens < 4 ? 4 / kOwnTokens : 1)
    for (int k = 0; k < kOwnOutputs; ++k, sums += 32, y += 32, aside.next_output()) {
      if (32 * k >= out.count) break;
      const bool is_there = lane + 32 * k < out.count;
      float v[kOwnTokens];
#pragma unroll
      for (int i = 0; i < kOwnTokens; ++i) {
        v[i] = 0.f;
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          const float* const at = sums + i * kWarps * kPitch + s * (a.cfg.weight_box / 128);
          v[i] += in_parts ? at[0] + at[kStaged * kPitch] : at[0];
        }
      }
      const auto bias_of = [&](std::int64_t first) {
        return p.bias != nullptr && is_there
                   ? to_float(static_cast<const T*>(p.bias)[first + out.first + lane + 32 * k])
                   : 0.f;
      };
      const float bias = bias_of(0);
#pragma unroll
      for (int i = 0; i < kOwnTokens; ++i) v[i] += bias;
      if (kRowTiles == 2 && p.swiglu) {
        const float up_bias = bias_of(p.outputs);
#pragma unroll
        for (int i = 0; i < kOwnTokens; ++i)
          v[i] *= sigmoidf(v[i]) * (sums[i * kWarps * kPitch + 64] + up_bias);
      }
      if (p.residual != nullptr) {
#pragma unroll
        for (int i = 0; i < kOwnTokens; ++i) {
          const auto bits = static_cast<unsigned short>(aside.of[i][0]);
          v[i] += to_float(reinterpret_cast<const T&>(bits));
        }
      }
      const std::uint64_t policy = kept_policy();  // for registers' sake not before the loop
#pragma unroll
      for (int i = 0; i < kOwnTokens; ++i)
        if (is_there && i * kWarps < tokens)
          store_kept(y + i * kWarps * p.outputs, from_float<T>(v[i]), policy);
    }
  }
};

template <typename T, int kTokens, int kRowTiles, int kSlices>
__global__ void __launch_bounds__(linear_bound_threads(kTokens), linear_ctas_of_sm(kTokens))
    linear_decode_sm90_kernel(const __grid_constant__ LinearArgs a) {
  using S = LinearSmem;
  using Product = LinearProduct<T, kTokens, kRowTiles, kSlices>;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.cfg.stages; ++i) {
      mbarrier_init(linear_shared_at(S::kFull) + 8 * i, 1);
      mbarrier_init(linear_shared_at(S::kEmpty) + 8 * i, Product::kWarps * kWarpArrivals);
    }
    mbarrier_init(linear_shared_at(S::kPeerFull), 1);
    mbarrier_init(linear_shared_at(S::kPeerFree), 4 * kRowTiles);
    mbarrier_init(linear_shared_at(S::kLookedUp), kLinearLookingUp);
    mbarrier_init_fence();
  }
  // The peer may be spoken to once both have passed here.
  if (a.cfg.cluster == 2)
    cluster_meet();
  else
    __syncthreads();
  // Through a shuffle, so that the compiler knows that warps do not diverge: else every descriptor
  // costs four moves into uniform registers.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < 4) {
    if (threadIdx.x == 0) LinearLoader{a, LinearWork(a)}.walk();
    if (warp > 0 && a.cfg.projects) linear_look_up_tokens(a);
  } else {
    Product{a, LinearWork(a)}.walk([&] {
      if constexpr (kTokens == 8) {  // at most as many are normalised here
        if (a.cfg.norms) return LinearNorm<T>{a}.run();
      }
      grid_dependency_wait();
    });
  }
}

}  // namespace zebra::sm90
