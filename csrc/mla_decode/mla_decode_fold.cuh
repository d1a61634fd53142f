// mla_decode on CUDA: how a thread adds up the partial results of four columns of a row, in the
// combination and in the expansion.
#pragma once

#include "mla_decode/mla_decode_schedule.cuh"

namespace zebra {
namespace {

// o = sum_k 2^(m_k - m) o_k of some partial results, not yet divided by sum_k 2^(m_k - m) l_k.
struct MlaPart {
  float4 o = {};
  float top = -kInfinity, sum = 0.f;

  __device__ __forceinline__ void add(float4 other, float2 stats) {
    const float most = fmaxf(top, stats.x), base = most == -kInfinity ? 0.f : most;
    const float x = exp2_approx(top - base), y = exp2_approx(stats.x - base);
    top = most, sum = sum * x + stats.y * y;
    o.x = o.x * x + other.x * y, o.y = o.y * x + other.y * y;
    o.z = o.z * x + other.z * y, o.w = o.w * x + other.w * y;
  }
  __device__ __forceinline__ float inverse() const {
    return sum == 0.f ? 0.f : __fdividef(1.f, sum);
  }
};

// A use of a value that the compiler cannot move: what makes it stays on this side of the wait.
__device__ __forceinline__ void mla_have(int value) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.s32 p, %0, -1;\n@p nanosleep.u32 1;\n}" ::"r"(value));
}

// The partial results lane, lane + lanes, ... of an item.  Where they lie is made up before the
// attention kernel has ended: behind its end every instruction is waited for, because it comes from
// L2 when it is first executed.
struct MlaFold {
  const float2* stats;  // [partials, pass_rows]
  const float4* sums;   // [partials, pass_rows, quads], from this thread's four columns on
  int next, after;      // rows of the thread's next partial result and of the one after it
  int stride;           // rows from there to the next
  int k, count, lanes, quads;

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

  // kAtOnce: asked for together.
  template <int kAtOnce>
  __device__ __forceinline__ MlaPart gather() {
    MlaPart mine;
#pragma unroll 1
    for (; k < count; k += kAtOnce * lanes) {
      float4 o[kAtOnce];
      float2 s[kAtOnce];
      float top = mine.top;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        s[n] = {-kInfinity, 0.f}, o[n] = {};
        if (k + n * lanes >= count) continue;
        const int row = n == 0 ? next : after + (n - 1) * stride;
        s[n] = stats[row], o[n] = sums[static_cast<std::int64_t>(row) * quads];
      }
      next = after + (kAtOnce - 1) * stride, after += kAtOnce * stride;
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
    return mine;
  }
};

}  // namespace
}  // namespace zebra
