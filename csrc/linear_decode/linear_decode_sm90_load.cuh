// What feeds the kernel of linear_decode on Hopper (linear_decode_sm90.cu tells the whole story).
#pragma once

#include <cuda_runtime.h>

#include "common/sm90/ptx.cuh"
#include "common/sm90/tma.cuh"
#include "linear_decode/linear_decode.h"
#include "linear_decode/linear_decode_sm90_config.h"

namespace zebra::sm90 {

// What is asked for before the kernels that precede in the stream have ended: nothing, the weight
// in L2, or the weight in shared memory.  The last may miss what those kernels write to the weight.
enum class Early { kNothing, kIntoL2, kIntoShared };

struct LinearArgs {
  CUtensorMap weight, second, x;
  LinearDecodeParams p;   // norm_weight where this kernel normalises x itself
  LinearProjection also;  // where cfg.projects
  LinearDecodeSm90Config cfg;
  Early early;
  // Whether one copy brings all boxes of a stage: the maps then have K in blocks of kLinearBox as
  // their last dimension.
  bool whole;
  bool up_first;  // swiglu: the map begins with the up rows, which lie below the gate rows
};

// Shared memory before the ring: byte offsets.
struct LinearSmem {
  static constexpr int kFull = 0, kEmpty = kFull + 8 * kLinearMostStages;
  static constexpr int kPeerFull = kEmpty + 8 * kLinearMostStages, kPeerFree = kPeerFull + 8;
  static constexpr int kLookedUp = kPeerFree + 8;
  static constexpr int kSquares = 512;  // of a row, by 8 warps
  static constexpr int kRing = kLinearHeaderBytes;
  static_assert(kLookedUp + 8 <= kSquares && kSquares + 4 * 64 <= kRing && kRing % 1024 == 0);
};

constexpr int kLinearLookingUp = 96;  // threads: the warps beside the one that loads

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
    units = min(c.units, c.all_units - first_unit);
    first_step = rank == 0 ? 0 : c.steps / 2;
    steps = (c.cluster == 2 && rank == 0 ? c.steps / 2 : c.steps) - first_step;
  }
};

// ---- loads: one thread; loops stay loops, because code that runs once comes from memory

struct LinearLoader {
  const LinearArgs& a;
  const LinearWork& work;
  const std::uint64_t x_policy = kept_policy();  // every CTA reads all of x

  // A load of this CTA: its coordinate along K, and of which unit it is.
  struct Place {
    int step, k, unit;
  };
  __device__ __forceinline__ Place first() const {
    return {0, work.first_step * a.cfg.boxes * kLinearBox, work.first_unit};
  }
  __device__ __forceinline__ bool is_second(const Place& at) const {
    return at.unit >= a.cfg.first_units;
  }
  __device__ __forceinline__ const CUtensorMap* map_of(const Place& at) const {
    return is_second(at) ? &a.second : &a.weight;
  }
  __device__ __forceinline__ int output_of(const Place& at) const {
    return (at.unit - (is_second(at) ? a.cfg.first_units : 0)) * a.cfg.unit;
  }
  __device__ __forceinline__ void advance(Place& at) const {
    at.k += a.cfg.boxes * kLinearBox;
    if (++at.step < work.steps) return;
    at.step = 0, at.k = work.first_step * a.cfg.boxes * kLinearBox, ++at.unit;
  }

  __device__ __forceinline__ void prefetch(const Place& at) const {
    if (a.whole) {
      tma_prefetch_4d(map_of(at), 0, output_of(at), 0, at.k / kLinearBox);
      return;
    }
#pragma unroll 1
    for (int b = 0; b < a.cfg.boxes; ++b)
      tma_prefetch_3d(map_of(at), at.k + b * kLinearBox, output_of(at), 0);
  }
  // The stage's weight, and the bytes that the whole stage will bring.
  __device__ __forceinline__ void load_weight(const Place& at, int slot) const {
    const LinearDecodeSm90Config& c = a.cfg;
    const std::uint32_t to = linear_shared_at(LinearSmem::kRing + slot * c.stage_bytes);
    const std::uint32_t full = linear_shared_at(LinearSmem::kFull) + 8 * slot;
    mbarrier_expect(full, c.stage_bytes);
    if (a.whole) {
      tma_load_4d(to, map_of(at), full, 0, output_of(at), 0, at.k / kLinearBox);
      return;
    }
#pragma unroll 1
    for (int b = 0; b < c.boxes; ++b)
      tma_load_3d(to + b * c.weight_box, map_of(at), full, at.k + b * kLinearBox, output_of(at), 0);
  }
  __device__ __forceinline__ void load_x(const Place& at, int slot) const {
    const LinearDecodeSm90Config& c = a.cfg;
    if (c.norms) return;
    const std::uint32_t to =
        linear_shared_at(LinearSmem::kRing + slot * c.stage_bytes + c.x_offset);
    const std::uint32_t full = linear_shared_at(LinearSmem::kFull) + 8 * slot;
    if (a.whole) {
      tma_load_3d(to, &a.x, full, 0, 0, at.k / kLinearBox, x_policy);
      return;
    }
#pragma unroll 1
    for (int b = 0; b < c.boxes; ++b)
      tma_load_2d(to + b * c.x_box, &a.x, full, at.k + b * kLinearBox, 0);
  }

  __device__ __forceinline__ void walk() const {
    const int all = work.units * work.steps, ahead = min(all, a.cfg.stages);
    Place at = first();
#pragma unroll 1
    for (int i = 0; i < ahead; ++i, advance(at)) {
      if (a.early == Early::kIntoL2) prefetch(at);
      if (a.early == Early::kIntoShared) load_weight(at, i);
    }
    // After so many loads the next launch may start.
    const int next = all - a.cfg.last_loads;
    if (next <= 0) grid_launch_dependents();
    grid_dependency_wait();
    fence_async_proxy_global();
    at = first();
#pragma unroll 1
    for (int i = 0; i < ahead; ++i, advance(at)) {
      if (a.early != Early::kIntoShared) load_weight(at, i);
      load_x(at, i);
    }
    if (next > 0 && next <= ahead) grid_launch_dependents();
    LinearRing r;
#pragma unroll 1
    for (int i = ahead; i < all; ++i, advance(at)) {
      mbarrier_wait(linear_shared_at(LinearSmem::kEmpty) + 8 * r.slot, r.phase);
      load_weight(at, r.slot);
      load_x(at, r.slot);
      r.advance(a.cfg.stages);
      if (i + 1 == next) grid_launch_dependents();
    }
  }
};

}  // namespace zebra::sm90
