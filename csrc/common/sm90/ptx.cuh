// One PTX instruction a function: barriers, fences, clusters, register reallocation; with those of
// common/cuda/mma.cuh.  PTX ISA sections in brackets.  Everything here exists from sm_90 on unless
// it says otherwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/cuda/mma.cuh"

namespace zebra::sm90 {

// ---- mbarrier [9.7.13.15]: addresses are shared-memory byte addresses.

__device__ __forceinline__ void mbarrier_init(std::uint32_t bar, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; then a CTA barrier, before first use.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// The arrivals of a warp on a barrier, and their doing after all lanes are done: one lane's.  With
// ZEBRA_RACECHECK all lanes arrive, because compute-sanitizer follows barriers thread by thread and
// does not know that __syncwarp() orders the other lanes before the one.
#ifdef ZEBRA_RACECHECK
constexpr std::uint32_t kWarpArrivals = 32;
#else
constexpr std::uint32_t kWarpArrivals = 1;
#endif
__device__ __forceinline__ void mbarrier_arrive_warp(std::uint32_t bar,
                                                     int lane = threadIdx.x % 32) {
  __syncwarp();
  if (kWarpArrivals == 32 || lane == 0) mbarrier_arrive(bar);
}

// Arrives and announces `bytes` that asynchronous copies will bring.
__device__ __forceinline__ void mbarrier_expect(std::uint32_t bar, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

// Whether the phase of the given parity has completed; it waits a little for it.
__device__ __forceinline__ bool mbarrier_try_wait(std::uint32_t bar, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done;
}

// Returns when the phase of the given parity has completed.  With ZEBRA_DEBUG_WAIT a wait of about
// 2 s ends in a trap instead.
__device__ __forceinline__ void mbarrier_poll(std::uint32_t bar, std::uint32_t parity) {
#ifdef ZEBRA_DEBUG_WAIT
  const long long start = clock64();
#endif
  while (!mbarrier_try_wait(bar, parity)) {
#ifdef ZEBRA_DEBUG_WAIT
    if (clock64() - start > 3500000000ll) asm volatile("trap;");
#endif
  }
}

// The same as one instruction to the compiler, which then does not merge or copy the loop.
__device__ __forceinline__ void mbarrier_wait(std::uint32_t bar, std::uint32_t parity) {
#ifdef ZEBRA_DEBUG_WAIT
  mbarrier_poll(bar, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
#endif
}

// ---- fences

// Orders this thread's shared-memory stores before later reads by wgmma or the copy engine.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory that others have written, before this thread's copies read it.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// ---- setmaxnreg (sm_90a): only at the top of a warpgroup's branch.

template <int kRegisters>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- programmatic dependent launch; before sm_90 these are nothing, and a launch waits for the
// end of those before it.

// Waits for the grids that this one depends on; their writes are visible after it.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next grid start.  After grid_dependency_wait(), or ahead of it where the next grid,
// until its own wait, touches nothing that grids before this one may still write.
__device__ __forceinline__ void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- clusters [9.7.13.4, 9.7.9.11]: shared memory of another CTA of the cluster.

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// The address in CTA `rank` of what lies at `addr` in this one.
__device__ __forceinline__ std::uint32_t cluster_addr(std::uint32_t addr, std::uint32_t rank) {
  std::uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
}
// A barrier of all threads of the cluster.  It orders mbarrier_init_fence(), and no other writes.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_store(std::uint32_t addr, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(addr), "f"(v) : "memory");
}
// Four, counted in bytes on barrier `bar` of the CTA that is written to: no fence is needed.
__device__ __forceinline__ void cluster_store_async(std::uint32_t addr, float4 v,
                                                    std::uint32_t bar) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(addr),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar)
      : "memory");
}
// Arrives on a barrier of any CTA of the cluster; who waits with mbarrier_wait_cluster() sees what
// this thread has written there.
__device__ __forceinline__ void mbarrier_arrive_cluster(std::uint32_t cluster_bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_bar)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait_cluster(std::uint32_t bar, std::uint32_t parity) {
  mbarrier_wait(bar, parity);  // bounded where a debug build bounds it
  std::uint32_t done;
  do
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  while (!done);
}

// ---- 8x8 matrices of 16-bit elements [9.7.14.5.16]; lane i gives the address of row i % 8 of
// matrix i / 8.

__device__ __forceinline__ void stmatrix_x4(std::uint32_t addr, std::uint32_t r0, std::uint32_t r1,
                                            std::uint32_t r2, std::uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(std::uint32_t addr, std::uint32_t r0,
                                                  std::uint32_t r1, std::uint32_t r2,
                                                  std::uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// ---- accesses whose lines L2 gives up last.  For what every CTA reads, and for what the next
// kernel reads and a later one writes again: behind a stream of weights it would be written back to
// HBM every time.

__device__ __forceinline__ std::uint64_t kept_policy() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
template <typename V>
__device__ __forceinline__ void store_kept(V* to, const V& v, std::uint64_t policy) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 16);
  if constexpr (sizeof(V) == 2) {
    asm volatile("st.global.L2::cache_hint.b16 [%0], %1, %2;" ::"l"(to),
                 "h"(reinterpret_cast<const unsigned short&>(v)), "l"(policy)
                 : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("st.global.L2::cache_hint.b32 [%0], %1, %2;" ::"l"(to),
                 "r"(reinterpret_cast<const unsigned&>(v)), "l"(policy)
                 : "memory");
  } else {
    const uint4& u = reinterpret_cast<const uint4&>(v);
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(u.x),
                 "r"(u.y), "r"(u.z), "r"(u.w), "l"(policy)
                 : "memory");
  }
}

// ---- pairs of 16-bit elements in a register.

template <typename T>
__device__ __forceinline__ std::uint32_t multiply_pairs(std::uint32_t v, std::uint32_t w) {
  std::uint32_t r;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(w));
  else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(w));
  return r;
}

}  // namespace zebra::sm90
