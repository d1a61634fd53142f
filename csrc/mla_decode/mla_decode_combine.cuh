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
  MlaDivisor quads, passes;  // quads: of half a row of the partial results
  int rows, pass_rows;       // of a sequence, of an item
  int R, log_lanes;
  int parts;  // of an item's (row, four columns of each half), each for a CTA at once
  // CTAs, the first ones, that run while the attention kernel does: they execute the code once
  // without loads and stores, so that the others find it in L2.
  int rehearsing;
};

// The rows and columns of one part, `wide` of (row, four columns of each half).
struct MlaCombinePart {
  int from, rows;
  std::int64_t out;  // the item's first row

  // Whether there is element `at`, and where it is.
  __device__ __forceinline__ bool find(const MlaCombineArgs& a, int at, int& row,
                                       int& column) const {
    row = a.quads.quotient(from + at), column = from + at - row * a.quads.divisor;
    return row < rows;
  }
};

// Adds what the lanes of each element have, and writes it.
template <typename T>
__device__ __forceinline__ void mla_combine_lanes(const MlaCombineArgs& a,
                                                  const MlaCombinePart& part, MlaPart<2>& mine) {
  constexpr int kThreads = 32 * kMlaWarps;
  __shared__ float tops[kThreads], sums[kThreads], whole[kThreads / 2];
  __shared__ float4 o[2][kThreads];
  const int thread = threadIdx.x, lanes = 1 << a.log_lanes, wide = kThreads >> a.log_lanes;
  __syncthreads();  // the part before is read
  tops[thread] = mine.top;
  __syncthreads();
  float top = -kInfinity;
#pragma unroll 4
  for (int lane = 0; lane < lanes; ++lane)
    top = fmaxf(top, tops[lane * wide + (thread & (wide - 1))]);
  const float scale = exp2_approx(mine.top - (top == -kInfinity ? 0.f : top));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mla_scale(mine.o[half], scale);
    o[half][thread] = mine.o[half];
  }
  sums[thread] = mine.sum * scale;
  if (thread < wide) whole[thread] = top;
  __syncthreads();
  // A thread adds one column of all lanes, so that no level of a tree is waited for.
#pragma unroll 1
  for (int i = thread; i < 8 * wide; i += kThreads) {
    const int half = i / (4 * wide), at = i / 4 & (wide - 1);
    const float* const columns = reinterpret_cast<const float*>(o[half]) + (i & (4 * wide - 1));
    float v = 0.f, sum = 0.f;
#pragma unroll 4
    for (int lane = 0; lane < lanes; ++lane)
      v += columns[lane * 4 * wide], sum += sums[lane * wide + at];
    v *= mla_inverse(sum);
    const float next = __shfl_down_sync(kWarp, v, 1);
    int row, column;
    if (!part.find(a, at, row, column)) continue;
    if (half == 0 && column == 0 && i % 4 == 0) a.lse[part.out + row] = mla_lse(whole[at], sum);
    const int to = (half * a.quads.divisor + column) * 4 + i % 4;
    if (i % 2 == 0 && to < a.R)
      *reinterpret_cast<unsigned*>(static_cast<T*>(a.o) + (part.out + row) * a.R + to) =
          pack<T>(v, next);
  }
}

// o = sum_k 2^(m_k - m) o_k / l.  A CTA has parts of the (row, four columns of each half) of one
// item: neighbours are neighbours in memory, and `lanes` threads share the partial results of one.
template <typename T>
__global__ void __launch_bounds__(32 * kMlaWarps, 2) mla_combine_kernel(const MlaCombineArgs a) {
  constexpr int kThreads = 32 * kMlaWarps, kFew = 3, kMany = 5;
  __shared__ MlaUnit found;
  const int thread = threadIdx.x, lanes = 1 << a.log_lanes, wide = kThreads >> a.log_lanes;
  // One warp looks: CTAs start when the attention kernel ends, and all of one multiprocessor at
  // once, so what every warp did here would be waited for.
  if (!a.finds_units) sm90::grid_dependency_wait();
  if (thread < 32) {
    const MlaUnit unit =
        a.finds_units ? mla_find_unit<true>(a.line, blockIdx.x) : a.units[blockIdx.x];
    if (thread == 0) found = unit;
  }
  __syncthreads();
  const MlaUnit unit = found;
  const int b = a.passes.quotient(unit.item);
  const int first =
      (unit.item - b * a.passes.divisor) * a.pass_rows;  // of the item in its sequence
  const std::int64_t out = static_cast<std::int64_t>(b) * a.rows + first;
  const int hop = static_cast<int>(gridDim.y);
  const bool rehearses = static_cast<int>(blockIdx.x + blockIdx.y * gridDim.x) < a.rehearsing;
#pragma unroll 1
  for (int n = static_cast<int>(blockIdx.y) - (rehearses ? hop : 0); n < a.parts; n += hop) {
    const bool is_real = n >= 0;
    const int rows = is_real ? min(a.pass_rows, a.rows - first) : 0;
    const MlaCombinePart part = {is_real ? n * wide : 0, rows, out};
    int row, column;
    const bool is_there = part.find(a, thread & (wide - 1), row, column);
    MlaFold<2> fold(a.stats, a.sums, unit, a.pass_rows, row, a.quads.divisor, column,
                    thread >> (8 - a.log_lanes), lanes);
    fold.is_real = is_real;
    if (is_real) {
      sm90::grid_dependency_wait();
      sm90::grid_launch_dependents();
    }
    // Not before the wait: the kernel after this one waits for no other.
    if (unit.count < 2 && is_real) return;
    MlaPart<2> mine;
    if (is_there || !is_real)
      mine = unit.count <= kFew * lanes ? fold.gather<kFew>() : fold.gather<kMany>();
    if (lanes > 1) {
      mla_combine_lanes<T>(a, part, mine);
      continue;
    }
    if (!is_there) continue;
    if (column == 0) a.lse[part.out + row] = mla_lse(mine.top, mine.sum);
    const float inverse = mla_inverse(mine.sum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int to = (half * a.quads.divisor + column) * 4;
      float4& o = mine.o[half];
      mla_scale(o, inverse);
      if (to < a.R)
        *reinterpret_cast<uint2*>(static_cast<T*>(a.o) + (part.out + row) * a.R + to) = {
            pack<T>(o.x, o.y), pack<T>(o.z, o.w)};
    }
  }
}

}  // namespace
}  // namespace zebra
