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
// Of units of more than 64 rows (row_tiles 2) each takes 64; of others both take all rows, and
// every other group of kSlices boxes along K, so a stage has two groups or more.
//
// With several slices the 64 rows are those of kSlices boxes along K, one behind the other in
// shared memory, and the columns the tokens of as many boxes of x: the blocks on the diagonal are
// products of the same part of K and are summed at the end, the others are not used.

template <typename T, int kTokens, int kRowTiles, int kSlices>
struct LinearProduct {
  static constexpr int kSize = kSlices * kTokens / 2;  // accumulators of a thread
  static constexpr int kThreads = kLinearThreads - 128, kWarps = kThreads / 32;
  static constexpr int kParts = kRowTiles == 1 ? 2 : 1;  // into which sums along K are split
  static constexpr int kFinishing = 128 * kRowTiles;     // threads that exchange sums
  static constexpr int kStaged = linear_staged_tokens(kTokens, kRowTiles);
  static constexpr int kPitch = linear_staging_pitch(kRowTiles);
  // Of the staged ones, a warp's tokens and a lane's outputs of each.
  static constexpr int kOwnTokens = kStaged / kWarps, kOwnOutputs = 2 * kRowTiles;

  const LinearArgs& a;
  const LinearWork& work;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - 4;
  const int tile = kRowTiles == 2 ? warp / 4 : 0, part = kParts == 2 ? warp / 4 : 0;

  __device__ __forceinline__ void walk() const {
    LinearRing r;
    for (int u = 0; u < work.units; ++u) {
      float d[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) d[i] = 0.f;
      if (a.cfg.cluster == 2 && warp == 0 && lane == 0)
        mbarrier_expect(linear_shared_at(LinearSmem::kPeerFull), kSize / 2 * 4 * kFinishing);
      wgmma_fence(d);
      multiply_all(d, r);
      if constexpr (kTokens >= 64) {
        if (a.cfg.cluster == 2) {
          if constexpr (kParts == 2) merge(d);
          if (part == 0) exchange(d, u);
        }
      }
      finish(d, work.first_unit + u);
      if constexpr (kTokens >= 64)
        if (a.cfg.cluster == 2 && part == 0 && u + 1 < work.units) tell_peer(LinearSmem::kPeerFree);
    }
  }

 private:
  __device__ __forceinline__ void release(int slot) const {
    mbarrier_arrive_warp(linear_shared_at(LinearSmem::kEmpty) + 8 * slot);
  }

  __device__ __forceinline__ void multiply_all(float (&d)[kSize], LinearRing& r) const {
    const LinearDecodeSm90Config& c = a.cfg;
    const int own = c.boxes / (kSlices * kParts);  // groups of boxes in a stage
    const std::uint32_t w_skip =
        (tile ^ a.up_first) * c.second_offset + part * kSlices * c.weight_box;
    const std::uint32_t x_skip = part * kSlices * c.x_box;
    const std::uint32_t w_step = kParts * kSlices * c.weight_box;
    int last = 0;
    for (int s = 0; s < work.steps; ++s) {
      mbarrier_wait(linear_shared_at(LinearSmem::kFull) + 8 * r.slot, r.phase);
      const std::uint32_t stage = linear_shared_at(LinearSmem::kRing + r.slot * c.stage_bytes);
      const std::uint64_t w = wgmma_descriptor(stage + w_skip, 16);
      const std::uint32_t boxes_of_x =
          c.norms ? linear_shared_at(c.h_offset) + s * c.boxes * c.x_box : stage + c.x_offset;
      const std::uint64_t x = wgmma_descriptor(boxes_of_x + x_skip, 16);
      if (own == 1)
        multiply<1>(d, w, w_step, x);
      else if (own == 2)
        multiply<2>(d, w, w_step, x);
      else
        multiply<4>(d, w, w_step, x);
      wgmma_wait<1>();
      if (s > 0) release(last);
      last = r.slot;
      r.advance(c.stages);
    }
    wgmma_wait<0>(d);
    if (work.steps > 0) release(last);
  }
  // kGroups groups of boxes of a stage.
  template <int kGroups>
  __device__ __forceinline__ void multiply(float (&d)[kSize], std::uint64_t w, std::uint32_t w_step,
                                           std::uint64_t x) const {
    wgmma_fence();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int k = 0; k < kLinearBox / 16; ++k)
        wgmma_ss<T>(d, advance(w, 32 * k),
                    advance(x, g * kParts * kSlices * 128 * kTokens + 32 * k), true);
      w = advance(w, w_step);
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

  // Each CTA of a cluster gets the sums of both for its half of the tokens.
  __device__ __forceinline__ void exchange(float (&d)[kSize], int u) const {
    constexpr int kHalf = kSize / 2;
    const int at = a.cfg.staging_offset + (tile * (kHalf / 4) * 128 + threadIdx.x % 128) * 16;
    const std::uint32_t to = cluster_addr(linear_shared_at(at), work.rank ^ 1);
    const std::uint32_t bar = cluster_addr(linear_shared_at(LinearSmem::kPeerFull), work.rank ^ 1);
    if (u > 0) mbarrier_wait_cluster(linear_shared_at(LinearSmem::kPeerFree), (u - 1) & 1);
    const auto give = [&](int from) {
#pragma unroll
      for (int i = 0; i < kHalf; i += 4)
        cluster_store_async(to + i / 4 * 128 * 16,
                            {d[from + i], d[from + i + 1], d[from + i + 2], d[from + i + 3]}, bar);
    };
    const auto take = [&](int into) {
#pragma unroll
      for (int i = 0; i < kHalf; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(linear_shared + at + i / 4 * 128 * 16);
        d[into + i] += v.x, d[into + i + 1] += v.y;
        d[into + i + 2] += v.z, d[into + i + 3] += v.w;
      }
    };
    work.rank == 0 ? give(kHalf) : give(0);
    mbarrier_wait_cluster(linear_shared_at(LinearSmem::kPeerFull), u & 1);
    work.rank == 0 ? take(0) : take(kHalf);
    named_barrier(2, kFinishing);  // taken: the memory serves finish() next
  }

  // Bias, activation, residual, rounding: through shared memory, so that a warp writes neighbouring
  // outputs of one token.
  __device__ __forceinline__ void finish(const float (&d)[kSize], int unit) const {
    const LinearDecodeSm90Config& c = a.cfg;
    const LinearDecodeParams& p = a.p;
    const bool second = unit >= c.first_units;
    const std::int64_t first =
        (unit - (second ? c.first_units : 0)) * static_cast<std::int64_t>(c.unit);
    float* const staging = reinterpret_cast<float*>(linear_shared + c.staging_offset);
    const bool has_sums = part == 0 || c.cluster == 1;
    const int row = 64 * tile + 16 * (warp % 4) + lane / 4, column = lane % 4 * 2;
    const std::int64_t left = (second ? a.also.outputs : p.outputs) - first;
    const int outputs = left < c.unit ? static_cast<int>(left) : c.unit;
    const int slice[2] = {slice_of(0), slice_of(1)};
    if (c.projects) mbarrier_wait(linear_shared_at(LinearSmem::kLookedUp), 0);
    const LinearTurn<T, kRowTiles> turn(a, second, first, outputs);
    float read[kOwnTokens][kOwnOutputs];  // residual, or cosines and sines
#pragma unroll
    for (int from = 0; from < kTokens; from += kStaged) {
      if (c.cluster == 2 && from / (kTokens / 2) != work.rank) continue;
      if (from >= p.rows) break;
      // All that is to be read, before anything is written: one latency.
#pragma unroll
      for (int i = 0; i < kOwnTokens; ++i) {
        const int token = from + warp + i * kWarps;
        if (token >= p.rows) continue;
        if (c.projects)
          turn.look_up(read[i], token);
        else if (p.residual != nullptr)
          read_residual(read[i], token, first, outputs);
      }
#pragma unroll
      for (int j = 0; j < kStaged / 8; ++j) {
        float* const to = staging + (part * kStaged + 8 * j + column) * kPitch + row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
            const int i = (s * kTokens + from) / 2 + 4 * j + 2 * half;
            if (has_sums && (kSlices == 1 || slice[half] == s))
              to[8 * half] = d[i], to[kPitch + 8 * half] = d[i + 1];
          }
        }
      }
      named_barrier(1, kThreads);
#pragma unroll
      for (int i = 0; i < kOwnTokens; ++i) {
        const int t = warp + i * kWarps;
        if (from + t >= p.rows) continue;
        if (c.projects)
          turn.write(read[i], from + t, [&](int n) { return pair_of(staging + t * kPitch + n); });
        else
          write(staging + t * kPitch, from + t, first, outputs, read[i]);
      }
      named_barrier(1, kThreads);
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

  __device__ __forceinline__ void read_residual(float (&v)[kOwnOutputs], int token,
                                                std::int64_t first, int outputs) const {
    const T* const from = static_cast<const T*>(a.p.residual) + token * a.p.residual_stride + first;
#pragma unroll
    for (int i = 0; i < kOwnOutputs; ++i)
      if (lane + 32 * i < outputs) v[i] = to_float(from[lane + 32 * i]);
  }

  __device__ __forceinline__ void write(const float* sums, int token, std::int64_t first,
                                        int outputs, const float (&residual)[kOwnOutputs]) const {
    const LinearDecodeParams& p = a.p;
    const T* const bias = static_cast<const T*>(p.bias);
    T* const y = static_cast<T*>(p.y) + token * p.outputs + first;
    const bool in_parts = kParts == 2 && a.cfg.cluster == 1;
#pragma unroll
    for (int i = 0; i < kOwnOutputs; ++i) {
      const int n = lane + 32 * i;
      if (n >= outputs) continue;
      float v = 0.f;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const float* const from = sums + s * (a.cfg.weight_box / 128) + n;
        v += in_parts ? from[0] + from[kStaged * kPitch] : from[0];
      }
      if (bias != nullptr) v += to_float(bias[first + n]);
      if (p.swiglu) {
        float up = sums[64 + n];
        if (bias != nullptr) up += to_float(bias[p.outputs + first + n]);
        v *= sigmoidf(v) * up;
      }
      if (p.residual != nullptr) v += residual[i];
      y[n] = from_float<T>(v);
    }
  }
};

template <typename T, int kTokens, int kRowTiles, int kSlices>
__global__ void __launch_bounds__(linear_bound_threads(kTokens), linear_ctas_of_sm(kTokens))
    linear_decode_sm90_kernel(const __grid_constant__ LinearArgs a) {
  using S = LinearSmem;
  using Product = LinearProduct<T, kTokens, kRowTiles, kSlices>;
  const int cluster = a.cfg.cluster;
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
  __syncthreads();
  // The peer may be spoken to once both have passed here.
  if (cluster == 2) cluster_arrive();
  // Through a shuffle, so that the compiler knows that warps do not diverge: else every descriptor
  // costs four moves into uniform registers.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < 4) {
    if (threadIdx.x == 0) LinearLoader{a, LinearWork(a)}.walk();
    if (warp > 0 && a.cfg.projects) linear_look_up_tokens(a);
    __syncwarp();
    if (cluster == 2) cluster_wait();
  } else {
    if (cluster == 2) cluster_wait();
    bool has_x = false;
    if constexpr (kTokens == 8) {  // at most as many are normalised here
      if (a.cfg.norms) LinearNorm<T>{a}.run(), has_x = true;
    }
    if (!has_x) grid_dependency_wait();  // the residual, and y
    Product{a, LinearWork(a)}.walk();
  }
}

}  // namespace zebra::sm90
