// The kernel of linear_decode on Hopper (linear_decode_sm90.cu tells the whole story).
#pragma once

#include <type_traits>

#include "common/cuda/vec.cuh"
#include "common/sm90/wgmma.cuh"
#include "linear_decode/linear_decode_sm90_load.cuh"

namespace zebra::sm90 {

// ---- products and what follows them: one warpgroup for 64 rows of the weight
//
// With several slices the 64 rows are those of kSlices boxes along K, one behind the other in
// shared memory, and the columns the tokens of as many boxes of x: the blocks on the diagonal are
// products of the same part of K and are summed at the end, the others are not used.

template <typename T, int kTokens, int kRowTiles, int kSlices>
struct LinearProduct {
  static constexpr int kSize = kSlices * kTokens / 2;  // accumulators of a thread
  static constexpr int kThreads = 128 * kRowTiles, kWarps = 4 * kRowTiles;
  // Sets of fragments that registers allow: two launches' CTAs of 384 threads leave 80 a thread.
  static constexpr bool kTwoSets =
      kRowTiles == 1 ? kSlices * kTokens < 128 : linear_ctas_of_sm(kTokens, kRowTiles) == 1;
  static constexpr int kStaged = linear_staged_tokens(kTokens);
  static constexpr int kPitch = linear_staging_pitch(kRowTiles);

  const LinearArgs& a;
  const LinearWork& work;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - 4;
  const int tile = warp / 4;

  // Of one box: 64 rows and 4 x 16 elements of K of the weight, in registers for a product.
  struct Fragments {
    std::uint32_t at[kLinearBox / 16][4];
  };

  __device__ __forceinline__ void walk() const {
    const bool norm = a.p.norm_weight != nullptr;
    LinearRing r;
    for (int u = 0; u < work.units; ++u) {
      float d[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) d[i] = 0.f;
      if (a.cfg.cluster == 2 && warp == 0 && lane == 0)
        mbarrier_expect(linear_shared_at(LinearSmem::kPeerFull), kSize / 2 * 4 * kThreads);
      wgmma_fence(d);
      norm ? walk_scaled(d, r) : walk_plain(d, r);
      if (norm && u == 0) mbarrier_wait_squares();
      if constexpr (kTokens >= 64)
        if (a.cfg.cluster == 2) exchange(d, u);
      finish(d, (work.first_unit + u) * static_cast<std::int64_t>(a.cfg.unit));
      if constexpr (kTokens >= 64)
        if (a.cfg.cluster == 2 && u + 1 < work.units) tell_peer(LinearSmem::kPeerFree);
    }
  }

 private:
  __device__ __forceinline__ std::uint32_t stage_of(int slot) const {
    return linear_shared_at(LinearSmem::kRing + slot * a.cfg.stage_bytes);
  }
  __device__ __forceinline__ void wait_full(const LinearRing& r) const {
    mbarrier_wait(linear_shared_at(LinearSmem::kFull) + 8 * r.slot, r.phase);
  }
  __device__ __forceinline__ void release(int slot) const {
    linear_arrive_warp(linear_shared_at(LinearSmem::kEmpty) + 8 * slot);
  }

  __device__ __forceinline__ void walk_plain(float (&d)[kSize], LinearRing& r) const {
    const LinearDecodeSm90Config& c = a.cfg;
    int last = 0;
    for (int s = 0; s < work.steps; ++s) {
      wait_full(r);
      const std::uint32_t stage = stage_of(r.slot);
      const std::uint64_t w = wgmma_descriptor(stage + tile * c.second_offset, 16);
      const std::uint64_t x = wgmma_descriptor(stage + c.x_offset, 16);
      if (kSlices < 2 && c.boxes == 1)
        multiply<1>(d, w, x);
      else if (kSlices < 4 && c.boxes == 2)
        multiply<2>(d, w, x);
      else
        multiply<4>(d, w, x);
      wgmma_wait<1>();
      if (s > 0) release(last);
      last = r.slot;
      r.advance(c.stages);
    }
    wgmma_wait<0>(d);
    if (work.steps > 0) release(last);
  }
  // One group of products: all boxes of a stage.
  template <int kBoxes>
  __device__ __forceinline__ void multiply(float (&d)[kSize], std::uint64_t w,
                                           std::uint64_t x) const {
    wgmma_fence();
#pragma unroll
    for (int b = 0; b < kBoxes; b += kSlices) {
#pragma unroll
      for (int k = 0; k < kLinearBox / 16; ++k)
        wgmma_ss<T>(d, advance(w, b * a.cfg.weight_box + 32 * k),
                    advance(x, b * 128 * kTokens + 32 * k), true);
    }
    wgmma_commit();
  }

  // With the norm the weight is multiplied by the gain on its way through registers.
  __device__ __forceinline__ void walk_scaled(float (&d)[kSize], LinearRing& r) const {
    const bool is_float = a.p.norm_weight_dtype == DType::kFloat32;
    // Products read their fragments until they are waited for: two sets where registers allow it,
    // so that the next box is fetched while one is multiplied.
    Fragments even = {}, odd = {};
    int last = -1;
    if constexpr (kTwoSets) {
      int s = 0, b = 0;
      while (s < work.steps) {
        step(d, even, odd, is_float, r, s, b, last);
        if (s < work.steps) step(d, odd, even, is_float, r, s, b, last);
      }
    } else {
      for (int s = 0, b = 0; s < work.steps;) step(d, even, even, is_float, r, s, b, last);
    }
    wgmma_wait<0>(d);
    if (last >= 0) release(last);
  }
  // The next box, or the next kSlices boxes: box b of step s.
  __device__ __forceinline__ void step(float (&d)[kSize], Fragments& w, Fragments& running,
                                       bool is_float, LinearRing& r, int& s, int& b,
                                       int& last) const {
    const LinearDecodeSm90Config& c = a.cfg;
    if (b == 0) wait_full(r);
    const std::uint32_t stage = stage_of(r.slot);
    if constexpr (!kTwoSets) finish_running(running, last);
    fetch(w, stage + tile * c.second_offset + b * c.weight_box);
    const int k0 = ((work.first_step + s) * c.boxes + b) * kLinearBox;
    const int before = r.slot * c.gain_bytes + b * (c.gain_bytes / c.boxes);
    const char* const gain = linear_shared + c.gain_offset + before;
    is_float ? scale<float>(w, gain, k0) : scale<T>(w, gain, k0);
    if constexpr (kTwoSets) finish_running(running, last);
    const std::uint64_t x = wgmma_descriptor(stage + c.x_offset + b * 128 * kTokens, 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kLinearBox / 16; ++k)
      wgmma_rs<T, Major::kK>(d, w.at[k], advance(x, 32 * k));
    wgmma_commit();
    b += kSlices;
    if (b < c.boxes) return;
    b = 0, ++s, last = r.slot;
    r.advance(c.stages);
  }
  // The products that are running have read their fragments, and the stage of `last` where they
  // were its last.
  __device__ __forceinline__ void finish_running(Fragments& running, int& last) const {
    wgmma_wait<0>();
#pragma unroll
    for (auto& k : running.at)
#pragma unroll
      for (std::uint32_t& v : k) asm volatile("" : "+r"(v)::"memory");
    if (last >= 0) release(last);
    last = -1;
  }
  __device__ __forceinline__ void fetch(Fragments& w, std::uint32_t box) const {
    const std::uint32_t from = box + (16 * (warp % 4) + lane % 16) * 128;
#pragma unroll
    for (int k = 0; k < kLinearBox / 16; ++k)
      ldmatrix_x4(w.at[k], from + (((2 * k + lane / 16) ^ lane % 8) << 4));
  }
  // `gain` is that of the box that `w` begins with, at element k0 of K.
  template <typename Gain>
  __device__ __forceinline__ void scale(Fragments& w, const char* gain, int k0) const {
    constexpr int kHalves = kSlices == 1 ? 1 : 2;  // of 16 rows, which may be of two slices
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int skip = skip_of(i);
      const Gain* const from = reinterpret_cast<const Gain*>(gain) + skip;
#pragma unroll
      for (int at = 0; at < kLinearBox; at += 8) {
        if constexpr (std::is_same_v<Gain, float>) {
          const float2 g = *reinterpret_cast<const float2*>(from + at);
          for_rows<kHalves>(w, at, i, [&](std::uint32_t& v) {
            const float2 f = unpack<T>(v);
            v = pack<T>(f.x * g.x, f.y * g.y);
          });
        } else {
          const std::uint32_t g = *reinterpret_cast<const std::uint32_t*>(from + at);
          for_rows<kHalves>(w, at, i, [&](std::uint32_t& v) { v = multiply_pairs<T>(v, g); });
        }
      }
      // Beyond K there is no gain, and what lies in its place may be anything.
      if (k0 + kSlices * kLinearBox <= static_cast<int>(a.p.K)) continue;
#pragma unroll
      for (int at = 0; at < kLinearBox; at += 8)
        for_rows<kHalves>(w, at, i, [&](std::uint32_t& v) {
          if (k0 + skip + at >= static_cast<int>(a.p.K)) v = 0;
        });
    }
  }
  // Elements of K from where a box begins to the first that this thread has of rows 8 i and on.
  __device__ __forceinline__ int skip_of(int i) const {
    const int slice = kSlices == 1 ? 0 : min(slice_of(i), kSlices - 1);
    return slice * kLinearBox + lane % 4 * 2;
  }
  template <int kHalves, typename Apply>
  static __device__ __forceinline__ void for_rows(Fragments& w, int at, int i, const Apply& apply) {
    apply(w.at[at / 16][at / 8 % 2 * 2 + i]);
    if constexpr (kHalves == 1) apply(w.at[at / 16][at / 8 % 2 * 2 + 1]);
  }
  // Of which slice the eighth i of this warp's 16 rows is.
  __device__ __forceinline__ int slice_of(int i) const {
    return (16 * warp + 8 * i) * 128 / a.cfg.weight_box;
  }

  __device__ __forceinline__ void mbarrier_wait_squares() const {
    const std::uint32_t bar = linear_shared_at(LinearSmem::kSquaresFull);
    if (a.cfg.cluster == 2)
      mbarrier_wait_cluster(bar, 0);
    else
      mbarrier_wait(bar, 0);
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
    named_barrier(1, kThreads);  // taken: the memory serves finish() next
  }

  // Scale, bias, activation, residual, rounding: through shared memory, so that a warp writes
  // neighbouring outputs of one token.
  __device__ __forceinline__ void finish(const float (&d)[kSize], std::int64_t first) const {
    const LinearDecodeSm90Config& c = a.cfg;
    const LinearDecodeParams& p = a.p;
    float* const staging = reinterpret_cast<float*>(linear_shared + c.staging_offset);
    const int row = 16 * warp + lane / 4, column = lane % 4 * 2;
    const std::int64_t left = p.outputs - first;
    const int outputs = left < c.unit ? static_cast<int>(left) : c.unit;
    const int slice[2] = {slice_of(0), slice_of(1)};
#pragma unroll
    for (int from = 0; from < kTokens; from += kStaged) {
      if (c.cluster == 2 && from / (kTokens / 2) != work.rank) continue;
      if (from >= p.rows) break;
#pragma unroll
      for (int j = 0; j < kStaged / 8; ++j) {
        float* const to = staging + (8 * j + column) * kPitch + row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
            const int i = (s * kTokens + from) / 2 + 4 * j + 2 * half;
            if (kSlices == 1 || slice[half] == s)
              to[8 * half] = d[i], to[kPitch + 8 * half] = d[i + 1];
          }
        }
      }
      named_barrier(1, kThreads);
      for (int t = warp; t < kStaged && from + t < p.rows; t += kWarps)
        write(staging + t * kPitch, from + t, first, outputs);
      named_barrier(1, kThreads);
    }
  }

  __device__ __forceinline__ void write(const float* sums, int token, std::int64_t first,
                                        int outputs) const {
    const LinearDecodeParams& p = a.p;
    float scale = 1.f;
    if (p.norm_weight != nullptr) {
      const float* const squares =
          reinterpret_cast<const float*>(linear_shared + LinearSmem::kSquares) + token;
      const float sum = a.cfg.cluster == 2 ? squares[0] + squares[kTokens] : squares[0];
      scale = rsqrtf(sum / static_cast<float>(p.K) + static_cast<float>(p.norm_eps));
    }
    const T* const bias = static_cast<const T*>(p.bias);
    const T* const residual = static_cast<const T*>(p.residual);
    const std::int64_t residual_at = token * p.residual_stride + first;
    T* const y = static_cast<T*>(p.y) + token * p.outputs + first;
    for (int n = lane; n < outputs; n += 32) {
      float v = sums[n];
#pragma unroll
      for (int s = 1; s < kSlices; ++s) v += sums[s * (a.cfg.weight_box / 128) + n];
      v *= scale;
      if (bias != nullptr) v += to_float(bias[first + n]);
      if (p.swiglu) {
        float up = sums[64 + n] * scale;
        if (bias != nullptr) up += to_float(bias[p.outputs + first + n]);
        v *= sigmoidf(v) * up;
      }
      if (residual != nullptr) v += to_float(residual[residual_at + n]);
      y[n] = from_float<T>(v);
    }
  }
};

template <typename T, int kTokens, int kRowTiles, int kSlices>
__global__ void __launch_bounds__(128 * (1 + kRowTiles), linear_ctas_of_sm(kTokens, kRowTiles))
    linear_decode_sm90_kernel(const __grid_constant__ LinearArgs a) {
  using S = LinearSmem;
  const int cluster = a.cfg.cluster;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.cfg.stages; ++i) {
      mbarrier_init(linear_shared_at(S::kFull) + 8 * i, 1);
      mbarrier_init(linear_shared_at(S::kEmpty) + 8 * i,
                    4 * kRowTiles + (a.p.norm_weight != nullptr ? 1 : 0));
    }
    mbarrier_init(linear_shared_at(S::kSquaresFull), 3 * cluster);
    mbarrier_init(linear_shared_at(S::kPeerFull), 1);
    mbarrier_init(linear_shared_at(S::kPeerFree), 4 * kRowTiles);
    mbarrier_init_fence();
  }
  __syncthreads();
  // The peer may be spoken to once both have passed here.
  if (cluster == 2) cluster_arrive();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  // 128 tokens' sums leave too few of the 128 registers that two CTAs allow a thread.
  constexpr bool kMovesRegisters = kTokens == 128 && kRowTiles == 1;
  if (warp < 4) {
    if constexpr (kMovesRegisters) registers_decrease<88>();
    if (warp == 0 && threadIdx.x == 0) LinearLoader{a, LinearWork(a)}.walk();
    __syncwarp();
    if (cluster == 2) cluster_wait();
    if (warp > 0 && a.p.norm_weight != nullptr) LinearSquares<T, kTokens>{a, LinearWork(a)}.walk();
  } else {
    if constexpr (kMovesRegisters) registers_increase<168>();
    if (cluster == 2) cluster_wait();
    grid_dependency_wait();  // the residual, and y
    LinearProduct<T, kTokens, kRowTiles, kSlices>{a, LinearWork(a)}.walk();
  }
}

}  // namespace zebra::sm90
