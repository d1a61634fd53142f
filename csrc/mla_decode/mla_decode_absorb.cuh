// mla_decode on CUDA: latent queries, q~_h = U_k,g^T q_nope,h beside the rope columns of q.
//
// Grid           [KV heads, slices of rows, 64 latent columns]; 4 warps, 16 columns each.
// Shared memory  U_k's [Dn, 64] rows, then 16 rows of q, both at an odd number of 16-byte units.
// Bound          latency: 8B with 64 sequences is 0.7 MB.  The weight is asked for before the grid
//                that writes q has ended, and the attention kernel starts while this one runs: it
//                waits only where it takes q.
#pragma once

#include "common/sm90/ptx.cuh"
#include "mla_decode/mla_decode_schedule.cuh"
#include "mla_decode/mla_decode_weight_config.h"

namespace zebra {
namespace {

struct MlaAbsorbArgs {
  const void *q, *weight;                 // of the first KV head
  void* latent;                           // [rows of q, R + E]
  std::int64_t q_stride[3], head_stride;  // of the weight: (Dn + Dv) R
  MlaDivisor tokens, group;               // new tokens of a sequence, query heads of a KV head
  int rows, heads;                        // rows of a KV head; query heads
  int nope, R, E, weight_pitch, q_pitch;
  bool q_is_aligned;     // to 16 bytes
  bool is_weight_early;  // nothing before this kernel writes the weight
};

__device__ __forceinline__ uint4 mla_load_unit(const char* from, bool is_aligned) {
  if (is_aligned) return *reinterpret_cast<const uint4*>(from);
  const unsigned* const words = reinterpret_cast<const unsigned*>(from);
  return {words[0], words[1], words[2], words[3]};
}

template <typename T>
__global__ void __launch_bounds__(kMlaAbsorbThreads)
    mla_absorb_kernel(const __grid_constant__ MlaAbsorbArgs a) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int kv_head = blockIdx.x, column = blockIdx.z * kMlaAbsorbColumns;
  const int nope = (a.nope + 15) / 16 * 16;  // columns of whole products; the last may be zeros
  const unsigned weight = smem_addr(smem), rows = weight + nope * a.weight_pitch;
  if (!a.is_weight_early) sm90::grid_dependency_wait();
  const char* const from =
      static_cast<const char*>(a.weight) + 2 * (kv_head * a.head_stride + column);
#pragma unroll 1
  for (int i = thread; i < nope * 8; i += kMlaAbsorbThreads) {
    const int d = i / 8, unit = i % 8;
    const bool is_valid = d < a.nope && column + unit * 8 < a.R;
    const char* const src = from + 2 * static_cast<std::int64_t>(d) * a.R + unit * 16;
    cp_async_16(weight + d * a.weight_pitch + unit * 16, is_valid ? src : a.weight, is_valid);
  }
  cp_async_commit();
  // Before the next grid starts: what this one waits for has then ended for that one, too.
  sm90::grid_dependency_wait();
  sm90::grid_launch_dependents();

  const int row = thread % 16, first_unit = thread / 16;
  const int width = a.R + a.E;
#pragma unroll 1
  for (int tile = blockIdx.y * 16; tile < a.rows; tile += gridDim.y * 16) {
    // Every thread serves one row; those past the last repeat it and are not written.
    const int mine = min(tile + row, a.rows - 1), token = a.group.quotient(mine);
    const int head = kv_head * a.group.divisor + mine - token * a.group.divisor;
    const int b = a.tokens.quotient(token), t = token - b * a.tokens.divisor;
    const char* const q = static_cast<const char*>(a.q) +
                          2 * (b * a.q_stride[0] + t * a.q_stride[1] + head * a.q_stride[2]);
    const std::int64_t out = (static_cast<std::int64_t>(token) * a.heads + head) * width;
    const bool has_rope = blockIdx.z == 0 && first_unit * 8 < a.E && tile + row < a.rows;
    uint4 rope;
    if (has_rope) rope = mla_load_unit(q + 2 * a.nope + first_unit * 16, a.q_is_aligned);
#pragma unroll 1
    for (int unit = first_unit; unit < nope / 8; unit += kMlaAbsorbThreads / 16) {
      uint4 v = {};
      if (unit * 8 < a.nope) v = mla_load_unit(q + unit * 16, a.q_is_aligned);
      const unsigned words[4] = {v.x, v.y, v.z, v.w};
      st_shared_v4(rows + row * a.q_pitch + unit * 16, words);
    }
    T* const latent = static_cast<T*>(a.latent);
    if (has_rope) *reinterpret_cast<uint4*>(latent + out + a.R + first_unit * 8) = rope;
    cp_async_wait<0>();
    __syncthreads();

    float s[2][4] = {};
    const unsigned q_lane = rows + lane % 16 * a.q_pitch + lane / 16 * 16;
    const unsigned weight_lane = weight + lane % 16 * a.weight_pitch + warp * 32 + lane / 16 * 16;
#pragma unroll 2
    for (int k = 0; k < nope / 16; ++k) {
      unsigned x[4], w[4];
      ldmatrix_x4(x, q_lane + k * 32);
      ldmatrix_x4_trans(w, weight_lane + k * 16 * a.weight_pitch);
      mma<T>(s[0], x, w[0], w[1]);
      mma<T>(s[1], x, w[2], w[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = lane / 4 + 8 * half;
      const std::int64_t to = __shfl_sync(kWarp, out, r);  // lane r has row r
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int at = column + warp * 16 + n * 8 + lane % 4 * 2;
        if (tile + r < a.rows && at < a.R)
          *reinterpret_cast<unsigned*>(latent + to + at) =
              pack<T>(s[n][2 * half], s[n][2 * half + 1]);
      }
    }
    __syncthreads();  // the rows are free for the next tile
  }
}

}  // namespace
}  // namespace zebra
