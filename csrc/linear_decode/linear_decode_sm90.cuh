// The kernel of linear_decode on Hopper (linear_decode_sm90.cu tells the whole story).
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/vec.cuh"
#include "common/sm90/ptx.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"
#include "linear_decode/linear_decode.h"
#include "linear_decode/linear_decode_sm90_config.h"

namespace zebra::sm90 {

// What is asked for before the kernel that precedes in the stream has ended: nothing, the weight in
// L2, or the weight in shared memory.  The last may read a weight that the preceding kernel writes.
enum class Early { kNothing, kIntoL2, kIntoShared };

struct LinearArgs {
  CUtensorMap weight, x;
  LinearDecodeParams p;
  LinearDecodeSm90Config cfg;
  Early early;
  // Whether one copy brings all boxes of a stage: the map then has K in blocks of kLinearBox as its
  // third dimension.
  bool weight_whole, x_whole;
};

// Shared memory before the ring: byte offsets.
struct LinearSmem {
  static constexpr int kFull = 0, kReady = kFull + 8 * kLinearMostStages;
  static constexpr int kEmpty = kReady + 8 * kLinearMostStages;
  static constexpr int kSquaresFull = kEmpty + 8 * kLinearMostStages;
  static constexpr int kPeerFull = kSquaresFull + 8, kPeerFree = kPeerFull + 8;
  static constexpr int kSquares = 1024;  // float [2][128]: of both CTAs of a cluster
  static constexpr int kRing = kLinearHeaderBytes;
  static_assert(kPeerFree + 8 <= kSquares);
  static_assert(kSquares + 2 * kLinearMostTokens * 4 <= kRing && kRing % 1024 == 0);
};

extern __shared__ __align__(1024) char linear_shared[];

__device__ __forceinline__ std::uint32_t linear_shared_at(int offset) {
  return smem_addr(linear_shared) + offset;
}

// Position in the ring; a consumer waits for `phase`, the producer for `phase ^ 1`.
struct LinearRing {
  int slot = 0;
  std::uint32_t phase = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// What this CTA does: units of its cluster, and the steps along K that are its own.
struct LinearWork {
  int rank, first_unit, units, first_step, steps;

  __device__ __forceinline__ explicit LinearWork(const LinearArgs& a) {
    const LinearDecodeSm90Config& c = a.cfg;
    rank = c.cluster == 2 ? static_cast<int>(cluster_rank()) : 0;
    first_unit = static_cast<int>(blockIdx.x) / c.cluster * c.units;
    const int all = static_cast<int>((a.p.outputs + c.unit - 1) / c.unit);
    units = min(c.units, all - first_unit);
    first_step = rank == 0 ? 0 : c.steps / 2;
    steps = (c.cluster == 2 && rank == 0 ? c.steps / 2 : c.steps) - first_step;
  }
};

__device__ __forceinline__ void linear_arrive_warp(std::uint32_t bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(bar);
}

// ---- loads: one thread

struct LinearLoader {
  const LinearArgs& a;
  const LinearWork& work;

  // A load of this CTA: its coordinate along K and its first output.
  struct Place {
    int step, k, output;
  };
  __device__ __forceinline__ Place first() const {
    return {0, work.first_step * a.cfg.boxes * kLinearBox, work.first_unit * a.cfg.unit};
  }
  __device__ __forceinline__ void advance(Place& at) const {
    at.k += a.cfg.boxes * kLinearBox;
    if (++at.step < work.steps) return;
    at.step = 0, at.k = work.first_step * a.cfg.boxes * kLinearBox, at.output += a.cfg.unit;
  }

  __device__ __forceinline__ void prefetch(const Place& at) const {
    const int k = at.k, n = at.output;
    if (a.weight_whole) {
      tma_prefetch_3d(&a.weight, 0, n, k / kLinearBox);
      return;
    }
    for (int b = 0; b < a.cfg.boxes; ++b) {
      tma_prefetch_2d(&a.weight, k + b * kLinearBox, n);
      if (a.p.swiglu)
        tma_prefetch_2d(&a.weight, k + b * kLinearBox, static_cast<int>(a.p.outputs) + n);
    }
  }
  // The stage's weight and gain, and the bytes that the whole stage will bring.
  __device__ __forceinline__ void load_weight(const Place& at, int slot) const {
    const LinearDecodeSm90Config& c = a.cfg;
    const int k0 = at.k, n = at.output;
    const std::uint32_t stage = linear_shared_at(LinearSmem::kRing + slot * c.stage_bytes);
    const std::uint32_t full = linear_shared_at(LinearSmem::kFull) + 8 * slot;
    const int element = a.p.norm_weight_dtype == DType::kFloat32 ? 4 : 2;
    const int gain = min(c.gain_bytes, (static_cast<int>(a.p.K) - k0) * element);
    const int rows = a.p.swiglu ? 2 * c.unit : c.unit;
    mbarrier_expect(full, c.boxes * (rows * 2 * kLinearBox + c.x_box) + gain);
    if (a.weight_whole) tma_load_3d(stage, &a.weight, full, 0, n, k0 / kLinearBox);
    for (int b = 0; b < c.boxes && !a.weight_whole; ++b) {
      const std::uint32_t box = stage + b * c.weight_box;
      tma_load_2d(box, &a.weight, full, k0 + b * kLinearBox, n);
      if (a.p.swiglu)
        tma_load_2d(box + c.second_offset, &a.weight, full, k0 + b * kLinearBox,
                    static_cast<int>(a.p.outputs) + n);
    }
    if (gain > 0) {
      const std::int64_t skip = static_cast<std::int64_t>(k0) * element;
      bulk_load(stage + c.gain_offset, static_cast<const char*>(a.p.norm_weight) + skip, gain,
                full);
    }
  }
  __device__ __forceinline__ void load_x(const Place& at, int slot) const {
    const LinearDecodeSm90Config& c = a.cfg;
    const std::uint32_t to =
        linear_shared_at(LinearSmem::kRing + slot * c.stage_bytes + c.x_offset);
    const std::uint32_t full = linear_shared_at(LinearSmem::kFull) + 8 * slot;
    if (a.x_whole) {
      tma_load_3d(to, &a.x, full, 0, 0, at.k / kLinearBox);
      return;
    }
    for (int b = 0; b < c.boxes; ++b)
      tma_load_2d(to + b * c.x_box, &a.x, full, at.k + b * kLinearBox, 0);
  }

  __device__ __forceinline__ void walk() const {
    const int ahead = min(work.units * work.steps, a.cfg.stages);
    Place at = first();
    for (int i = 0; i < ahead; ++i, advance(at)) {
      if (a.early == Early::kIntoL2) prefetch(at);
      if (a.early == Early::kIntoShared) load_weight(at, i);
    }
    grid_dependency_wait();
    fence_async_proxy_global();
    at = first();
    for (int i = 0; i < ahead; ++i, advance(at)) {
      if (a.early != Early::kIntoShared) load_weight(at, i);
      load_x(at, i);
    }
    LinearRing r;
    for (int i = ahead; i < work.units * work.steps; ++i, advance(at)) {
      mbarrier_wait(linear_shared_at(LinearSmem::kEmpty) + 8 * r.slot, r.phase);
      load_weight(at, r.slot);
      load_x(at, r.slot);
      r.advance(a.cfg.stages);
    }
    grid_launch_dependents();  // whose first loads then follow on the last ones of this kernel
  }
};

// ---- x times the gain, in place, and the sums of squares of x: three warps

template <typename T, int kTokens>
struct LinearNorm {
  static constexpr int kThreads = 96, kRowsAtOnce = kThreads / 8;
  static constexpr int kPasses = (kTokens + kRowsAtOnce - 1) / kRowsAtOnce;

  const LinearArgs& a;
  const LinearWork& work;
  const int thread = threadIdx.x - 32, unit = thread % 8, row = thread / 8;

  __device__ __forceinline__ static void load_gain(const char* from, bool is_float,
                                                   float (&gain)[8]) {
    if (is_float) {
      float low[4], high[4];
      load_vec(reinterpret_cast<const float*>(from), low);
      load_vec(reinterpret_cast<const float*>(from) + 4, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) gain[i] = low[i], gain[i + 4] = high[i];
    } else {
      load_vec(reinterpret_cast<const T*>(from), gain);
    }
  }

  __device__ __forceinline__ void walk() const {
    const LinearDecodeSm90Config& c = a.cfg;
    const bool is_float = a.p.norm_weight_dtype == DType::kFloat32;
    const int gain_unit = is_float ? 32 : 16;
    const int rows = static_cast<int>(a.p.rows);
    float squares[kPasses] = {};
    LinearRing r;
    for (int u = 0; u < work.units; ++u) {
      for (int s = 0; s < work.steps; ++s) {
        char* const stage = linear_shared + LinearSmem::kRing + r.slot * c.stage_bytes;
        const int k0 = (work.first_step + s) * c.boxes * kLinearBox;
        mbarrier_wait(linear_shared_at(LinearSmem::kFull) + 8 * r.slot, r.phase);
        for (int b = 0; b < c.boxes; ++b) {
          // Beyond K x is zero and there is no gain.
          if (k0 + b * kLinearBox + unit * 8 >= static_cast<int>(a.p.K)) break;
          float gain[8];
          load_gain(stage + c.gain_offset + (b * 8 + unit) * gain_unit, is_float, gain);
          char* const x = stage + c.x_offset + b * c.x_box;
#pragma unroll
          for (int i = 0; i < kPasses; ++i) {
            const int at = row + i * kRowsAtOnce;
            if (at >= rows) continue;
            uint4* const place = reinterpret_cast<uint4*>(x + at * 128 + ((unit ^ (at % 8)) << 4));
            uint4 v = *place;
            scale(v.x, gain[0], gain[1], squares[i]);
            scale(v.y, gain[2], gain[3], squares[i]);
            scale(v.z, gain[4], gain[5], squares[i]);
            scale(v.w, gain[6], gain[7], squares[i]);
            *place = v;
          }
        }
        fence_async_proxy();
        linear_arrive_warp(linear_shared_at(LinearSmem::kReady) + 8 * r.slot);
        r.advance(c.stages);
      }
      if (u == 0) share(squares);
    }
  }

 private:
  static __device__ __forceinline__ void scale(std::uint32_t& pair, float g0, float g1,
                                               float& square) {
    const float2 v = unpack<T>(pair);
    square = fmaf(v.x, v.x, fmaf(v.y, v.y, square));
    pair = pack<T>(v.x * g0, v.y * g1);
  }
  // Sums over this CTA's part of K, for both CTAs of the cluster.
  __device__ __forceinline__ void share(const float (&squares)[kPasses]) const {
    const std::uint32_t to = linear_shared_at(LinearSmem::kSquares) + work.rank * kTokens * 4;
    const std::uint32_t bar = linear_shared_at(LinearSmem::kSquaresFull);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      float sum = squares[i];
#pragma unroll
      for (int lane = 4; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
      const int at = row + i * kRowsAtOnce;
      if (unit != 0 || at >= kTokens) continue;
      if (a.cfg.cluster == 2) {
        for (unsigned rank = 0; rank < 2; ++rank)
          cluster_store(cluster_addr(to, rank) + at * 4, sum);
      } else {
        *reinterpret_cast<float*>(linear_shared + LinearSmem::kSquares + at * 4) = sum;
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    if (a.cfg.cluster == 2) {
      for (unsigned rank = 0; rank < 2; ++rank) mbarrier_arrive_cluster(cluster_addr(bar, rank));
    } else {
      mbarrier_arrive(bar);
    }
  }
};

// ---- products and what follows them: one warpgroup for 64 rows of the weight
//
// With several slices the 64 rows are those of kSlices boxes along K, one behind the other in
// shared memory, and the columns the tokens of as many boxes of x: the blocks on the diagonal are
// products of the same part of K and are summed at the end, the others are not used.

template <typename T, int kTokens, int kRowTiles, int kSlices>
struct LinearProduct {
  static constexpr int kSize = kSlices * kTokens / 2;  // accumulators of a thread
  static constexpr int kThreads = 128 * kRowTiles, kWarps = 4 * kRowTiles;
  static constexpr int kStaged = linear_staged_tokens(kTokens);
  static constexpr int kPitch = linear_staging_pitch(kRowTiles);

  const LinearArgs& a;
  const LinearWork& work;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - 4;
  const int tile = warp / 4;

  __device__ __forceinline__ void walk() const {
    const LinearDecodeSm90Config& c = a.cfg;
    const bool norm = a.p.norm_weight != nullptr;
    const std::uint32_t ready = linear_shared_at(norm ? LinearSmem::kReady : LinearSmem::kFull);
    const std::uint32_t empty = linear_shared_at(LinearSmem::kEmpty);
    LinearRing r;
    for (int u = 0; u < work.units; ++u) {
      float d[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) d[i] = 0.f;
      wgmma_fence(d);
      int last = 0;
      for (int s = 0; s < work.steps; ++s) {
        mbarrier_wait(ready + 8 * r.slot, r.phase);
        const std::uint32_t stage = linear_shared_at(LinearSmem::kRing + r.slot * c.stage_bytes);
        const std::uint64_t w = wgmma_descriptor(stage + tile * c.second_offset, 16);
        const std::uint64_t x = wgmma_descriptor(stage + c.x_offset, 16);
        if (kSlices < 2 && c.boxes == 1)
          multiply<1>(d, w, x);
        else if (kSlices < 4 && c.boxes == 2)
          multiply<2>(d, w, x);
        else
          multiply<4>(d, w, x);
        wgmma_wait<1>();
        if (s > 0) linear_arrive_warp(empty + 8 * last);
        last = r.slot;
        r.advance(c.stages);
      }
      wgmma_wait<0>(d);
      if (work.steps > 0) linear_arrive_warp(empty + 8 * last);
      if (norm && u == 0) mbarrier_wait_squares();
      if constexpr (kTokens >= 64)
        if (c.cluster == 2) exchange(d, u);
      finish(d, (work.first_unit + u) * static_cast<std::int64_t>(c.unit));
      if constexpr (kTokens >= 64)
        if (c.cluster == 2 && u + 1 < work.units) tell_peer(LinearSmem::kPeerFree);
    }
  }

 private:
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
    if (u > 0) mbarrier_wait_cluster(linear_shared_at(LinearSmem::kPeerFree), (u - 1) & 1);
    const auto give = [&](int from) {
#pragma unroll
      for (int i = 0; i < kHalf; i += 4)
        cluster_store(to + i / 4 * 128 * 16,
                      {d[from + i], d[from + i + 1], d[from + i + 2], d[from + i + 3]});
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
    tell_peer(LinearSmem::kPeerFull);
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
    // Of which slice this thread's two rows are.
    const int slice[2] = {16 * warp * 128 / c.weight_box, (16 * warp + 8) * 128 / c.weight_box};
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
__global__ void __launch_bounds__(128 * (1 + kRowTiles), linear_fills_sm(kTokens) ? 1 : 2)
    linear_decode_sm90_kernel(const __grid_constant__ LinearArgs a) {
  using S = LinearSmem;
  const int cluster = a.cfg.cluster;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.cfg.stages; ++i) {
      mbarrier_init(linear_shared_at(S::kFull) + 8 * i, 1);
      mbarrier_init(linear_shared_at(S::kReady) + 8 * i, 3);
      mbarrier_init(linear_shared_at(S::kEmpty) + 8 * i, 4 * kRowTiles);
    }
    mbarrier_init(linear_shared_at(S::kSquaresFull), 3 * cluster);
    mbarrier_init(linear_shared_at(S::kPeerFull), 4 * kRowTiles);
    mbarrier_init(linear_shared_at(S::kPeerFree), 4 * kRowTiles);
    mbarrier_init_fence();
  }
  __syncthreads();
  // The peer may be spoken to once both have passed here.
  if (cluster == 2) cluster_arrive();
  const LinearWork work(a);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp == 0) {
    if (threadIdx.x == 0) LinearLoader{a, work}.walk();
    __syncwarp();
    if (cluster == 2) cluster_wait();
  } else if (warp < 4) {
    if (cluster == 2) cluster_wait();
    if (a.p.norm_weight != nullptr) LinearNorm<T, kTokens>{a, work}.walk();
  } else {
    if (cluster == 2) cluster_wait();
    grid_dependency_wait();  // the residual, and y
    LinearProduct<T, kTokens, kRowTiles, kSlices>{a, work}.walk();
  }
}

}  // namespace zebra::sm90
