// What feeds the kernel of linear_decode on Hopper, and its sums of squares
// (linear_decode_sm90.cu tells the whole story).
#pragma once

#include <cuda_runtime.h>

#include "common/sm90/ptx.cuh"
#include "common/sm90/tma.cuh"
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
  bool starts_next_first;  // the next launch may start before x is there
};

// Shared memory before the ring: byte offsets.
struct LinearSmem {
  static constexpr int kFull = 0, kEmpty = kFull + 8 * kLinearMostStages;
  static constexpr int kSquaresFull = kEmpty + 8 * kLinearMostStages;
  static constexpr int kPeerFull = kSquaresFull + 8, kPeerFree = kPeerFull + 8;
  static constexpr int kSquares = 512;  // float [2][128]: of both CTAs of a cluster
  static constexpr int kParts = kSquares + 2 * kLinearMostTokens * 4;  // float [3][128]: of a warp
  static constexpr int kRing = kLinearHeaderBytes;
  static_assert(kPeerFree + 8 <= kSquares);
  static_assert(kParts + 3 * kLinearMostTokens * 4 <= kRing && kRing % 1024 == 0);
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
      bulk_load(linear_shared_at(c.gain_offset + slot * c.gain_bytes),
                static_cast<const char*>(a.p.norm_weight) + skip, gain, full);
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
    const int all = work.units * work.steps, ahead = min(all, a.cfg.stages);
    Place at = first();
    for (int i = 0; i < ahead; ++i, advance(at)) {
      if (a.early == Early::kIntoL2) prefetch(at);
      if (a.early == Early::kIntoShared) load_weight(at, i);
    }
    Place far = at;  // what is asked for into L2 next
    int far_left = a.early == Early::kNothing ? 0 : all - ahead;
    const auto prefetch_far = [&] {
      if (far_left <= 0) return;
      prefetch(far);
      advance(far), --far_left;
    };
    for (int i = 0; i < a.cfg.ahead; ++i) prefetch_far();
    if (!a.cfg.keeps_ahead) far_left = 0;
    if (a.starts_next_first) grid_launch_dependents();
    grid_dependency_wait();
    fence_async_proxy_global();
    at = first();
    for (int i = 0; i < ahead; ++i, advance(at)) {
      if (a.early != Early::kIntoShared) load_weight(at, i);
      load_x(at, i);
    }
    LinearRing r;
    for (int i = ahead; i < all; ++i, advance(at)) {
      mbarrier_wait(linear_shared_at(LinearSmem::kEmpty) + 8 * r.slot, r.phase);
      load_weight(at, r.slot);
      load_x(at, r.slot);
      prefetch_far();
      r.advance(a.cfg.stages);
    }
    // Their first loads then follow on the last ones of this kernel.
    if (!a.starts_next_first) grid_launch_dependents();
  }
};

// ---- the sums of squares of x: three warps, a stage each in turn

template <typename T, int kTokens>
struct LinearSquares {
  static constexpr int kWarps = 3, kPasses = kTokens / 4;  // a warp reads 4 rows at once

  const LinearArgs& a;
  const LinearWork& work;
  const int lane = threadIdx.x % 32, unit = lane % 8, row = lane / 8;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - 1;

  // Rows that there are not, and what lies beyond K, are zeros.
  __device__ __forceinline__ void walk() const {
    const LinearDecodeSm90Config& c = a.cfg;
    const int rows = static_cast<int>(a.p.rows);
    float squares[kPasses] = {};
    LinearRing r;
    int turn = 0;
    for (int u = 0; u < work.units; ++u) {
      for (int s = 0; s < work.steps; ++s) {
        if (turn == warp) {
          mbarrier_wait(linear_shared_at(LinearSmem::kFull) + 8 * r.slot, r.phase);
          const char* const x = linear_shared + LinearSmem::kRing + r.slot * c.stage_bytes +
                                c.x_offset + row * 128 + unit * 16;
          if (u == 0)
            for (int b = 0; b < c.boxes; ++b) add(x + b * c.x_box, rows, squares);
          linear_arrive_warp(linear_shared_at(LinearSmem::kEmpty) + 8 * r.slot);
        }
        if (++turn == kWarps) turn = 0;
        r.advance(c.stages);
      }
      if (u == 0) share(squares);
    }
  }

 private:
  static __device__ __forceinline__ void add(const char* x, int rows, float (&squares)[kPasses]) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (4 * i >= rows) break;
      const uint4 v = *reinterpret_cast<const uint4*>(x + i * 4 * 128);
      const float2 v0 = unpack<T>(v.x), v1 = unpack<T>(v.y), v2 = unpack<T>(v.z);
      const float2 v3 = unpack<T>(v.w);
      const float even = fmaf(v0.x, v0.x, fmaf(v1.x, v1.x, fmaf(v2.x, v2.x, v3.x * v3.x)));
      const float odd = fmaf(v0.y, v0.y, fmaf(v1.y, v1.y, fmaf(v2.y, v2.y, v3.y * v3.y)));
      squares[i] += even + odd;
    }
  }
  // Sums over this CTA's part of K, for both CTAs of the cluster.
  __device__ __forceinline__ void share(const float (&squares)[kPasses]) const {
    float* const parts = reinterpret_cast<float*>(linear_shared + LinearSmem::kParts);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      float sum = squares[i];
#pragma unroll
      for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
      if (unit == 0) parts[warp * kTokens + 4 * i + row] = sum;
    }
    named_barrier(2, 32 * kWarps);
    const std::uint32_t to = linear_shared_at(LinearSmem::kSquares) + work.rank * kTokens * 4;
    const std::uint32_t bar = linear_shared_at(LinearSmem::kSquaresFull);
    for (int at = 32 * warp + lane; at < kTokens; at += 32 * kWarps) {
      const float sum = parts[at] + parts[kTokens + at] + parts[2 * kTokens + at];
      if (a.cfg.cluster == 2) {
        for (unsigned rank = 0; rank < 2; ++rank)
          cluster_store(cluster_addr(to, rank) + at * 4, sum);
      } else {
        *reinterpret_cast<float*>(linear_shared + LinearSmem::kSquares + at * 4) = sum;
      }
    }
    __syncwarp();
    if (lane != 0) return;
    if (a.cfg.cluster == 2) {
      for (unsigned rank = 0; rank < 2; ++rank) mbarrier_arrive_cluster(cluster_addr(bar, rank));
    } else {
      mbarrier_arrive(bar);
    }
  }
};

}  // namespace zebra::sm90
