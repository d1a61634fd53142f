// mla_decode on CUDA: the end of a piece, where the warps with the same rows add what they have,
// and the rows of sequences without tokens.
#pragma once

#include "mla_decode/mla_decode_rows.cuh"

namespace zebra {
namespace {

// Shared memory before the merge: mbarriers from byte 64 on, statistics, steps and, with cp.async,
// shares and walks.
constexpr int kMlaStatsOffset = 512;
constexpr int kMlaStepsOffset = kMlaStatsOffset + 2 * kMlaWarps * 128;
constexpr int kMlaSharesOffset = kMlaStepsOffset + kMlaWarps * kMlaMostSlots * sizeof(MlaStep);
constexpr int kMlaWalksOffset = kMlaSharesOffset + kMlaWarps * kMlaShareBytes;
static_assert(kMlaWalksOffset + kMlaWarps * sizeof(MlaWalk) <= kMlaLimitsOffset,
              "statistics, steps, shares and walks fit before the merge");

struct MlaMerge {
  float2 (*stats)[16];   // [warps]: reference and sum of a warp's rows
  float2 (*merged)[16];  // [groups]: of the group's rows over all streams
  float* columns;        // [warps][16][mla_merge_stride(parts)]

  __device__ __forceinline__ explicit MlaMerge(unsigned char* smem)
      : stats(reinterpret_cast<float2 (*)[16]>(smem + kMlaStatsOffset)),
        merged(reinterpret_cast<float2 (*)[16]>(smem + kMlaStatsOffset + kMlaWarps * 128)),
        columns(reinterpret_cast<float*>(smem + kMlaMergeOffset)) {}
};

// Adds the results of a group's workers, the warps with the same rows, and writes them: the item's
// o and lse, or a partial result.  They call it together; those without tokens bring zeros.
template <typename T, typename S>
__device__ __forceinline__ void mla_finish(const MlaArgs& a, MlaRows<T, S>& rows, const MlaMerge& m,
                                           const MlaStep& step) {
  const MlaPlace place(a, thread_index());
  const int worker = place.worker, workers = place.workers, group = place.group;
  const int groups = a.groups, barrier = place.group_barrier, warp = place.warp;
  const int lane = place.lane, g = lane / 4, t = lane % 4;
  float scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    if (t == 0) m.stats[warp][g + 8 * i] = {rows.reference[i], sum};
  }
  named_barrier(barrier, 32 * workers);
  // Lane t looks at workers t and t + 4, at both rows before anything is made of one.
  float2 v[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      v[i][n] = {-kInfinity, 0.f};
      if (t + 4 * n < workers) v[i][n] = m.stats[(t + 4 * n) * groups + group][g + 8 * i];
    }
  float2 whole[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = fmaxf(v[i][0].x, v[i][1].x);
    top = fmaxf(top, __shfl_xor_sync(kWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kWarp, top, 2));
    const float base = top == -kInfinity ? 0.f : top;
    scale[i] = exp2_approx(rows.reference[i] - base);
    float sum =
        v[i][0].y * exp2_approx(v[i][0].x - base) + v[i][1].y * exp2_approx(v[i][1].x - base);
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    whole[i] = {top, sum};
  }
  if (worker == 0 && t == 0) m.merged[group][g] = whole[0], m.merged[group][g + 8] = whole[1];

  const std::int64_t partial = step.partial;
  const int first = (step.pass * groups + group) * 16;  // of the group's rows in the sequence
  const std::int64_t out = static_cast<std::int64_t>(step.b) * a.rows + first;
  const std::int64_t kept = (partial * groups + group) * 16;
  constexpr int kParts = S::kRank / 32;
  const int parts = a.merge_parts, stride = mla_merge_stride(parts), threads = 32 * workers;
#pragma unroll
  for (int j = 0; j < S::kRank / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.o[j][i] *= scale[i / 2];
#pragma unroll 1
  for (int from = 0; from < kParts; from += parts) {
    float* mine = m.columns + (warp * 16 + g) * stride + 2 * t;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      if (part >= from && part < from + parts) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float (&o)[4] = rows.o[part * 4 + j];
          *reinterpret_cast<float2*>(mine + 8 * j) = {o[0], o[1]};
          *reinterpret_cast<float2*>(mine + 8 * j + 8 * stride) = {o[2], o[3]};
        }
        mine += 32;
      }
    named_barrier(barrier, threads);
    // Four columns each: 8 neighbours share a row's 32, so no bank is met twice and lines go whole.
    // A short loop: it runs once an item, and two of its rounds side by side were no faster.
    const int units = min(parts, kParts - from) * 128;
#pragma unroll 1
    for (int i = worker * 32 + lane; i < units; i += threads) {
      const int r = i / 8 % 16, column = i / 128 * 32 + i % 8 * 4, at = from * 32 + column;
      const float* share = m.columns + (group * 16 + r) * stride + column;
      float4 v = {};
#pragma unroll 1
      for (int s = 0; s < workers; s += 4) {
        float4 part[4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (s + k < workers) part[k] = *reinterpret_cast<const float4*>(share);
          share += groups * 16 * stride;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
          v.x += part[k].x, v.y += part[k].y, v.z += part[k].z, v.w += part[k].w;
      }
      if (first + r >= a.rows) continue;
      const float2 whole = m.merged[group][r];
      if (partial >= 0) {
        st_global_v4(a.sums + (kept + r) * S::kRank + at, v);
        if (at == 0) a.stats[kept + r] = whole;
      } else {
        const float inverse = whole.y == 0.f ? 0.f : __fdividef(1.f, whole.y);
        const uint2 packed = {pack<T>(v.x * inverse, v.y * inverse),
                              pack<T>(v.z * inverse, v.w * inverse)};
        if (at < a.R)
          *reinterpret_cast<uint2*>(static_cast<char*>(a.o) + ((out + r) * a.R + at) * 2) = packed;
        if (at == 0) a.lse[out + r] = mla_lse(whole.x, whole.y);
      }
    }
    // After the last round the next end's first barrier says that all have read.
    if (from + parts < kParts) named_barrier(barrier, threads);
  }
}

// Rows of sequences without tokens; nothing of them is on the line of work.
template <typename T>
__device__ __forceinline__ void mla_write_empty(const MlaArgs& a) {
#pragma unroll 1
  for (int b = blockIdx.x; b < a.batch; b += gridDim.x) {
    if (mla_length(a, b) > 0) continue;
    const std::int64_t first = static_cast<std::int64_t>(b) * a.rows;
    uint4* const o = reinterpret_cast<uint4*>(static_cast<T*>(a.o) + first * a.R);
    const std::int64_t units = static_cast<std::int64_t>(a.rows) * a.R / 8;
#pragma unroll 1
    for (std::int64_t i = threadIdx.x; i < units; i += 32 * kMlaWarps) o[i] = {};
#pragma unroll 1
    for (int i = threadIdx.x; i < a.rows; i += 32 * kMlaWarps) a.lse[first + i] = -kInfinity;
    if (a.unit_per_item && a.unit_count > 0)
#pragma unroll 1
      for (int i = threadIdx.x; i < a.passes; i += 32 * kMlaWarps)
        a.units[static_cast<std::int64_t>(b) * a.passes + i] = MlaUnit{};
  }
}

}  // namespace
}  // namespace zebra
