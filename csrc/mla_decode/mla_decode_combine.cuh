// mla_decode on CUDA: the sum of the partial results of sequences that were cut.
//
// Runs after the attention kernel, under programmatic dependent launch where the GPU has it.  Not
// inside it: its last CTA alone would read up to 132 partial results, and CTAs that wait for each
// other, or tickets that outlive a launch, are not safe beside other streams.
#pragma once

#include "common/sm90/ptx.cuh"
#include "mla_decode/mla_decode_fold.cuh"

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
__global__ void __launch_bounds__(32 * kMlaWarps, 4) mla_combine_kernel(const MlaCombineArgs a) {
  constexpr int kThreads = 32 * kMlaWarps, kAtOnce = 6;
  __shared__ float4 sums[kThreads];
  __shared__ float2 stats[kThreads];
  __shared__ int scratch[kMlaWarps + 2];
  const int thread = threadIdx.x, wide = kThreads >> a.log_lanes;
  if (!a.finds_units) sm90::grid_dependency_wait();
  const MlaUnit unit =
      a.finds_units ? mla_find_unit(a.line, blockIdx.x, scratch) : a.units[blockIdx.x];
  const int b = a.passes.quotient(unit.item);
  const int first =
      (unit.item - b * a.passes.divisor) * a.pass_rows;  // of the item in its sequence
#pragma unroll 1
  for (int part = static_cast<int>(blockIdx.y); part < a.parts;
       part += static_cast<int>(gridDim.y)) {
    const int place = part * wide + (thread & (wide - 1));
    const int row = a.quads.quotient(place), column = place - row * a.quads.divisor;
    const bool is_row = row < a.pass_rows && first + row < a.rows;
    MlaFold fold(a.stats, a.sums, unit, a.pass_rows, row, a.quads.divisor, column,
                 thread >> (8 - a.log_lanes), 1 << a.log_lanes);
    sm90::grid_dependency_wait();
    sm90::grid_launch_dependents();
    if (unit.count < 2) return;
    if (part >= static_cast<int>(gridDim.y)) __syncthreads();  // the part before is read
    MlaPart mine;
    if (is_row) mine = fold.gather<kAtOnce>();
#pragma unroll 1
    for (int d = kThreads / 2; d >= wide; d /= 2) {
      if (thread >= d && thread < 2 * d)
        sums[thread] = mine.o, stats[thread] = {mine.top, mine.sum};
      __syncthreads();
      if (thread < d) mine.add(sums[thread + d], stats[thread + d]);
    }
    if (!is_row || thread >= wide) continue;
    const float inverse = mine.inverse();
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
