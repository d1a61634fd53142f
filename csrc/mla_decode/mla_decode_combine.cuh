// mla_decode on CUDA: the sum of the partial results of sequences that were cut.
//
// Runs after the attention kernel, under programmatic dependent launch where the GPU has it.  Not
// inside it: its last CTA alone would read up to 132 partial results, and CTAs that wait for each
// other, or tickets that outlive a launch, are not safe beside other streams.
#pragma once

#include "mla_decode/mla_decode_ptx.cuh"
#include "mla_decode/mla_decode_schedule.cuh"

namespace zebra {
namespace {

// One row of one item a team of `combine_warps` warps: o = sum_k 2^(m_k - m) o_k / l.
template <typename T>
__global__ void __launch_bounds__(32 * kMlaWarps) mla_combine_kernel(const MlaArgs a) {
  __shared__ float4 parts[kMlaWarps][64];
  grid_dependency_wait();
  const MlaUnit unit = a.units[blockIdx.x];
  if (unit.count < 2) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = a.c.combine_warps, sub = warp % team;
  const int row = static_cast<int>(blockIdx.y) * (kMlaWarps / team) + warp / team;
  const int pass_rows = 16 * a.c.groups, all = static_cast<int>(a.p.T * a.p.H);
  const int b = unit.item / a.c.passes, pass = unit.item % a.c.passes;
  const bool is_row = row < pass_rows && pass * pass_rows + row < all;
  const auto at = [&](int k) {
    const std::int64_t partial =
        k == 0 ? unit.first : unit.rest + (k - 1) * std::int64_t{1} * unit.step;
    return partial * pass_rows + row;
  };
  float top = -kInfinity, sum = 0.f;
  float4 v[2] = {};
  if (is_row) {
    for (int k = lane; k < unit.count; k += 32) top = fmaxf(top, a.stats[at(k)].x);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, d));
    const float base = top == -kInfinity ? 0.f : top;
    for (int k = lane; k < unit.count; k += 32) {
      const float2 s = a.stats[at(k)];
      sum += s.y * exp2_approx(s.x - base);
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kWarp, sum, d);
    const int quads = a.c.rank / 4;
#pragma unroll 4
    for (int k = sub; k < unit.count; k += team) {
      const std::int64_t from = at(k);
      const float scale = exp2_approx(a.stats[from].x - base);
      const float4* const o = reinterpret_cast<const float4*>(a.sums + from * a.c.rank);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (lane + 32 * i < quads) {
          const float4 part = o[lane + 32 * i];
          v[i].x += part.x * scale, v[i].y += part.y * scale;
          v[i].z += part.z * scale, v[i].w += part.w * scale;
        }
    }
  }
  parts[warp][lane] = v[0];
  parts[warp][lane + 32] = v[1];
  __syncthreads();
  if (!is_row || sub != 0) return;
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;
  const std::int64_t out = static_cast<std::int64_t>(b) * all + pass * pass_rows + row;
  if (lane == 0) static_cast<float*>(a.p.lse)[out] = mla_lse(top, sum);
  for (int i = lane; i < static_cast<int>(a.p.R) / 4; i += 32) {
    float4 o = {};
    for (int w = 0; w < team; ++w) {
      const float4 part = parts[warp + w][i];
      o.x += part.x, o.y += part.y, o.z += part.z, o.w += part.w;
    }
    const uint2 packed = {pack<T>(o.x * inverse, o.y * inverse),
                          pack<T>(o.z * inverse, o.w * inverse)};
    *reinterpret_cast<uint2*>(static_cast<char*>(a.p.o) + (out * a.p.R + i * 4) * 2) = packed;
  }
}

}  // namespace
}  // namespace zebra
