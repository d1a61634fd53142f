// mla_decode on CUDA: the sum of the partial results of sequences that were cut.
//
// Runs after the attention kernel, under programmatic dependent launch where the GPU has it.  Not
// inside it: its last CTA alone would read up to 132 partial results, and CTAs that wait for each
// other, or tickets that outlive a launch, are not safe beside other streams.
#pragma once

#include "common/sm90/ptx.cuh"
#include "mla_decode/mla_decode_schedule.cuh"

namespace zebra {
namespace {

struct MlaCombineArgs {
  MlaLine line;
  bool finds_units;  // from the lengths, while the attention kernel runs
  const MlaUnit* units;
  const float2* stats;
  const float4* sums;
  void* o;
  float* lse;
  MlaDivisor quads, passes;  // quads: of a row of the partial results
  int rows, pass_rows;       // of a sequence, of an item
  int R, log_lanes;
  int parts;  // of an item's (row, four columns), each for a CTA at once
};

// o = sum_k 2^(m_k - m) o_k / l.  A CTA has parts of the (row, four columns) of one item:
// neighbours are neighbours in memory, and `lanes` threads share the partial results of one, which
// a tree adds.
template <typename T>
__global__ void __launch_bounds__(32 * kMlaWarps) mla_combine_kernel(const MlaCombineArgs a) {
  constexpr int kThreads = 32 * kMlaWarps, kAtOnce = 6;
  struct Part {
    float4 o;
    float top, sum;
  };
  __shared__ float4 sums[kThreads];
  __shared__ float2 stats[kThreads];
  const int thread = threadIdx.x, wide = kThreads >> a.log_lanes;
  const int k0 = thread >> (8 - a.log_lanes);
  MlaUnit unit;
  if (a.finds_units) unit = mla_find_unit(a.line, blockIdx.x);
  sm90::grid_dependency_wait();
  sm90::grid_launch_dependents();
  if (!a.finds_units) unit = a.units[blockIdx.x];
  if (unit.count < 2) return;
  const int b = a.passes.quotient(unit.item);
  const int first =
      (unit.item - b * a.passes.divisor) * a.pass_rows;  // of the item in its sequence
#pragma unroll 1
  for (int part = static_cast<int>(blockIdx.y); part < a.parts;
       part += static_cast<int>(gridDim.y)) {
    if (part >= static_cast<int>(gridDim.y)) __syncthreads();  // the part before is read
    const int place = part * wide + (thread & (wide - 1));
    const int row = a.quads.quotient(place), column = place - row * a.quads.divisor;
    const bool is_row = row < a.pass_rows && first + row < a.rows;
    Part mine = {{}, -kInfinity, 0.f};
    if (is_row) {
#pragma unroll 1
      for (int k = k0; k < unit.count; k += kAtOnce << a.log_lanes) {
        float4 o[kAtOnce];
        float2 s[kAtOnce];
        float top = mine.top;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const int at = k + (n << a.log_lanes);
          s[n] = {-kInfinity, 0.f}, o[n] = {};
          if (at < unit.count) {
            const std::int64_t partial =
                at == 0 ? unit.first : unit.rest + static_cast<std::int64_t>(at - 1) * unit.step;
            const std::int64_t from = partial * a.pass_rows + row;
            s[n] = a.stats[from];
            o[n] = a.sums[from * a.quads.divisor + column];
          }
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) top = fmaxf(top, s[n].x);
        const float base = top == -kInfinity ? 0.f : top;
        const float shrink = exp2_approx(mine.top - base);
        mine.sum *= shrink, mine.top = top;
        mine.o.x *= shrink, mine.o.y *= shrink, mine.o.z *= shrink, mine.o.w *= shrink;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const float scale = exp2_approx(s[n].x - base);
          mine.sum += s[n].y * scale;
          mine.o.x += o[n].x * scale, mine.o.y += o[n].y * scale;
          mine.o.z += o[n].z * scale, mine.o.w += o[n].w * scale;
        }
      }
    }
#pragma unroll 1
    for (int d = kThreads / 2; d >= wide; d /= 2) {
      if (thread >= d && thread < 2 * d) {
        sums[thread] = mine.o;
        stats[thread] = {mine.top, mine.sum};
      }
      __syncthreads();
      if (thread < d) {
        const float4 o = sums[thread + d];
        const float2 s = stats[thread + d];
        const float top = fmaxf(mine.top, s.x), base = top == -kInfinity ? 0.f : top;
        const float x = exp2_approx(mine.top - base), y = exp2_approx(s.x - base);
        mine.top = top, mine.sum = mine.sum * x + s.y * y;
        mine.o.x = mine.o.x * x + o.x * y, mine.o.y = mine.o.y * x + o.y * y;
        mine.o.z = mine.o.z * x + o.z * y, mine.o.w = mine.o.w * x + o.w * y;
      }
    }
    if (!is_row || thread >= wide) continue;
    const float inverse = mine.sum == 0.f ? 0.f : __fdividef(1.f, mine.sum);
    const std::int64_t out = static_cast<std::int64_t>(b) * a.rows + first + row;
    if (column == 0) a.lse[out] = mla_lse(mine.top, mine.sum);
    const uint2 packed = {pack<T>(mine.o.x * inverse, mine.o.y * inverse),
                          pack<T>(mine.o.z * inverse, mine.o.w * inverse)};
    if (column * 4 < a.R)
      *reinterpret_cast<uint2*>(static_cast<char*>(a.o) + (out * a.R + column * 4) * 2) = packed;
  }
}

}  // namespace
}  // namespace zebra
