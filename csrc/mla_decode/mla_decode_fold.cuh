// mla_decode on CUDA: sums that are weighed by the exponents of their parts, and how a thread of
// the combination or the expansion adds up the partial results of its columns of a row.
#pragma once

#include "common/cuda/mma.cuh"
#include "mla_decode/mla_decode_schedule.cuh"

namespace zebra {
namespace {

__device__ __forceinline__ void mla_scale(float4& o, float scale) {
  o.x *= scale, o.y *= scale, o.z *= scale, o.w *= scale;
}
__device__ __forceinline__ void mla_add(float4& o, const float4& other, float scale) {
  o.x += other.x * scale, o.y += other.y * scale;
  o.z += other.z * scale, o.w += other.w * scale;
}
__device__ __forceinline__ float mla_inverse(float sum) {
  return sum == 0.f ? 0.f : __fdividef(1.f, sum);
}

// o = sum_k 2^(m_k - m) o_k of some partial results, not yet divided by sum_k 2^(m_k - m) l_k: four
// columns, or twice four.
template <int kQuads>
struct MlaPart {
  float4 o[kQuads] = {};
  float top = -kInfinity, sum = 0.f;

  __device__ __forceinline__ void add(float4 other, float2 stats) {
    static_assert(kQuads == 1);
    const float most = fmaxf(top, stats.x), base = most == -kInfinity ? 0.f : most;
    const float x = exp2_approx(top - base), y = exp2_approx(stats.x - base);
    top = most, sum = sum * x + stats.y * y;
    mla_scale(o[0], x), mla_add(o[0], other, y);
  }
};

// A use of a value that the compiler cannot move: what makes it stays on this side of the wait.
__device__ __forceinline__ void mla_have(int value) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.s32 p, %0, -1;\n@p nanosleep.u32 1;\n}" ::"r"(value));
}

// The partial results lane, lane + lanes, ... of an item.  Where they lie is made up before the
// attention kernel has ended: behind its end every instruction is waited for, because it comes from
// L2 when it is first executed.
template <int kQuads>
struct MlaFold {
  const float2* stats;  // [partials, pass_rows]
  const float4* sums;   // [partials, pass_rows, kQuads, quads], from this thread's four columns on
  int next, after;      // rows of the thread's next partial result and of the one after it
  int stride;           // rows from there to the next
  int k, count, lanes, quads;
  bool is_real = true;  // otherwise nothing is there, and the code is executed all the same

  // A place of 16 rows has 4 KiB at least: 32 bits count rows.
  __device__ __forceinline__ MlaFold(const float2* stats_, const float4* sums_, const MlaUnit& unit,
                                     int pass_rows, int row, int quads_, int quad, int lane,
                                     int lanes_)
      : stats(stats_),
        sums(sums_ + quad),
        k(lane),
        count(unit.count),
        lanes(lanes_),
        quads(quads_) {
    const int first = static_cast<int>(unit.first);
    const int rest = static_cast<int>(unit.rest) - unit.step;
    next = (lane == 0 ? first : rest + lane * unit.step) * pass_rows + row;
    after = (rest + (lane + lanes) * unit.step) * pass_rows + row;
    stride = lanes * unit.step * pass_rows;
    mla_have(next ^ after ^ stride);
  }

  // kAtOnce are asked for together; those that are not there are nothing.
  template <int kAtOnce>
  __device__ __forceinline__ MlaPart<kQuads> gather() {
    MlaPart<kQuads> mine;
#pragma unroll 1
    while (k < count) {
      float4 o[kAtOnce][kQuads];
      float2 s[kAtOnce];
      float top = mine.top;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const bool is_there = is_real && k + n * lanes < count;
        const int row = n == 0 ? next : after + (n - 1) * stride;
        const float4* const from = sums + static_cast<std::int64_t>(row) * (kQuads * quads);
        s[n] = {-kInfinity, 0.f};
        if (is_there) s[n] = stats[row];
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          o[n][q] = {};
          if (is_there) o[n][q] = from[q * quads];
        }
      }
      next = after + (kAtOnce - 1) * stride, after += kAtOnce * stride;
      k += kAtOnce * lanes;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) top = fmaxf(top, s[n].x);
      const float base = top == -kInfinity ? 0.f : top;
      const float shrink = exp2_approx(mine.top - base);
      mine.sum *= shrink, mine.top = top;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) mla_scale(mine.o[q], shrink);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const float scale = exp2_approx(s[n].x - base);
        mine.sum += s[n].y * scale;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) mla_add(mine.o[q], o[n][q], scale);
      }
    }
    return mine;
  }
};

}  // namespace
}  // namespace zebra
