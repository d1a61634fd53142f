// mla_decode on CUDA: the end of a piece, where the warps with the same rows add what they have,
// and the rows of sequences without tokens.
#pragma once

#include "mla_decode/mla_decode_fold.cuh"
#include "mla_decode/mla_decode_rows.cuh"

namespace zebra {
namespace {

// Shared memory before the merge: mbarriers from byte 64 on, statistics, steps and, with cp.async,
// shares and walks.
constexpr int kMlaStatsOffset = 512;
constexpr int kMlaStepsOffset = kMlaStatsOffset + kMlaWarps * 128;
constexpr int kMlaSharesOffset = kMlaStepsOffset + kMlaWarps * kMlaMostSlots * sizeof(MlaStep);
constexpr int kMlaWalksOffset = kMlaSharesOffset + kMlaWarps * kMlaShareBytes;
static_assert(kMlaWalksOffset + kMlaWarps * sizeof(MlaWalk) <= kMlaLimitsOffset,
              "statistics, steps, shares and walks fit before the merge");

struct MlaMerge {
  float2 (*stats)[16];  // [warps]: reference and sum of a warp's rows
  float* columns;       // [warps][16][mla_merge_stride(parts)]

  __device__ __forceinline__ explicit MlaMerge(unsigned char* smem)
      : stats(reinterpret_cast<float2 (*)[16]>(smem + kMlaStatsOffset)),
        columns(reinterpret_cast<float*>(smem + kMlaMergeOffset)) {}
};

// Where a thread's four columns of a row are added up, and what each of kWorkers' o counts there.
template <int kWorkers>
struct MlaMergeRow {
  float scale[kWorkers];
  char* to;  // of column 4 * (thread % 8)

  // Writes the row's statistics, too.
  __device__ __forceinline__ void begin(const MlaArgs& a, const MlaMerge& m, const MlaPlace& place,
                                        const MlaStep& step, int row, int rank) {
    const float2* at = &m.stats[place.group][row];
    float2 v[kWorkers];
#pragma unroll
    for (int n = 0; n < kWorkers; ++n, at += a.groups * 16) v[n] = *at;
    float top = v[0].x, sum = 0.f;
#pragma unroll
    for (int n = 1; n < kWorkers; ++n) top = fmaxf(top, v[n].x);
    const float base = top == -kInfinity ? 0.f : top;
#pragma unroll
    for (int n = 0; n < kWorkers; ++n) {
      scale[n] = exp2_approx(v[n].x - base);
      sum += v[n].y * scale[n];
    }
    const int in_item = place.group * 16 + row, first = step.pass * a.groups * 16 + in_item;
    const int quad = place.lane % 8;
    const bool is_one = quad == 0 && place.worker < 4;
    if (step.partial >= 0) {
      const std::int64_t kept = step.partial * a.groups * 16 + in_item;
      if (is_one) a.stats[kept] = {top, sum};
      to = reinterpret_cast<char*>(a.sums + kept * rank + quad * 4);
    } else {
      const std::int64_t out = static_cast<std::int64_t>(step.b) * a.rows + first;
      if (is_one && first < a.rows) a.lse[out] = mla_lse(top, sum);
      to = static_cast<char*>(a.o) + (out * a.R + quad * 4) * 2;
      const float inverse = mla_inverse(sum);
#pragma unroll
      for (int n = 0; n < kWorkers; ++n) scale[n] *= inverse;
    }
    if (first >= a.rows) to = nullptr;
  }
};

// The second half of mla_finish: kWorkers meet, leave their o, row by row, and each adds 32 columns
// of four rows at a time of all, so that lines go whole and no bank is met twice.  A thread stays
// with its row.
template <int kWorkers, typename T, typename S>
__device__ __forceinline__ void mla_merge(const MlaArgs& a, const MlaRows<T, S>& rows,
                                          const MlaMerge& m, const MlaPlace& place,
                                          const MlaStep& step) {
  constexpr int kParts = S::kRank / 32, kRows = kWorkers < 4 ? 4 / kWorkers : 1;
  constexpr int kThreads = 32 * kWorkers, kAside = kWorkers < 4 ? 1 : kWorkers / 4;
  const int lane = place.lane, parts = a.merge_parts, stride = mla_merge_stride(parts);
  const int row = (place.worker * 4 + lane / 8) % 16, aside = place.worker / 4;
  const bool is_partial = step.partial >= 0;
  // The statistics are there, and the columns of the piece before are read.
  named_barrier(place.group_barrier, kThreads);
  MlaMergeRow<kWorkers> mine[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    mine[i].begin(a, m, place, step, row + 4 * kWorkers * i, S::kRank);
#pragma unroll 1
  for (int from = 0; from < kParts; from += parts) {
    float* left = m.columns + (place.warp * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      if (part >= from && part < from + parts) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float (&o)[4] = rows.o[part * 4 + j];
          *reinterpret_cast<float2*>(left + 8 * j) = {o[0], o[1]};
          *reinterpret_cast<float2*>(left + 8 * j + 8 * stride) = {o[2], o[3]};
        }
        left += 32;
      }
    named_barrier(place.group_barrier, kThreads);
    const float* share = m.columns + (place.group * 16 + row) * stride + lane % 8 * 4;
    const int hop = a.groups * 16 * stride;  // to the next worker's
#pragma unroll 1
    for (int part = aside; part < min(parts, kParts - from); part += kAside) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float* at = share + part * 32 + 4 * kWorkers * i * stride;
        float4 o[kWorkers], v = {};
#pragma unroll
        for (int n = 0; n < kWorkers; ++n, at += hop) o[n] = *reinterpret_cast<const float4*>(at);
#pragma unroll
        for (int n = 0; n < kWorkers; ++n) mla_add(v, o[n], mine[i].scale[n]);
        if (mine[i].to == nullptr) continue;
        const int column = (from + part) * 32;
        if (is_partial)
          *reinterpret_cast<float4*>(mine[i].to + column * 4) = v;
        else if (column + lane % 8 * 4 < a.R)
          *reinterpret_cast<uint2*>(mine[i].to + column * 2) = {pack<T>(v.x, v.y),
                                                                pack<T>(v.z, v.w)};
      }
    }
    if (from + parts < kParts) named_barrier(place.group_barrier, kThreads);
  }
}

// Adds the results of a group's workers, the warps with the same rows, and writes them: the item's
// o and lse, or a partial result.  They call it together; those without tokens bring zeros.
template <typename T, typename S>
__device__ __forceinline__ void mla_finish(const MlaArgs& a, MlaRows<T, S>& rows, const MlaMerge& m,
                                           const MlaStep& step) {
  const MlaPlace place(a, thread_index());
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    if (place.lane % 4 == 0) m.stats[place.warp][place.lane / 4 + 8 * i] = {rows.reference[i], sum};
  }
  if (place.workers == 8) {
    mla_merge<8>(a, rows, m, place, step);
  } else if (S::kTma || place.workers == 4) {  // by TMA, for 32 rows at most, there are no fewer
    mla_merge<4>(a, rows, m, place, step);
  } else if (place.workers == 2) {
    mla_merge<2>(a, rows, m, place, step);
  } else {
    mla_merge<1>(a, rows, m, place, step);
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
