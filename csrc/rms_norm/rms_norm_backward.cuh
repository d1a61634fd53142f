// rms_norm's gradients for every GPU from sm_80 on.
//
// Computes       dx = rstd (w dy - s c) + dsum with c = rstd^2 mean(w dy s), and
//                dw = sum_rows dy s rstd.
// Grid           rms_norm_backward_ctas(rows) CTAs, each consecutive rows, at most one more than
//                another; then a sum of their weight gradients over the CTAs, in a fixed order.
// Tiles          rms_norm_config.h: a thread has the same 1, 2 or 4 vectors of 16 bytes in every
//                row, and their weight gradients in registers; short rows lie side by side.
// Shared memory  a ring of 4 vectors of dy, s and dsum a thread (up to 96 KiB a CTA), filled by
//                cp.async 4, 2 or 1 rows ahead; a thread reads only what it wrote.  Besides a rstd
//                a warp and slot, and two sums a warp, used by turns: one barrier a row.
// Registers      sm_90, 16 bit: 128 with 4 vectors a thread, 96 with 2; no spills.
// Weight         in registers; with 4 vectors a thread read again in every row, from L1, which the
//                ring's copies pass by.
// Long rows      and misaligned ones are walked twice, their weight gradients in global memory.
// Bound          HBM: [rows, dim] three times, four with dsum.  Two CTAs a multiprocessor have 64
//                KiB (96 with dsum) on their way; what latency and bandwidth ask for is 31.
// Predicted      H200, 16384 x 4096 bf16: 136 us with dsum (93 % of the floor), 104 us without.
// Measured       H100, 2026-11-28, 16384 x 4096 bf16: forward with residual + backward 379 us, of
//                which the forward 186 (PyTorch 699).  benchmarks/bench_rms_norm.py --device cuda
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/mma.cuh"
#include "common/cuda/vec.cuh"
#include "common/sm90/ptx.cuh"
#include "rms_norm/rms_norm.h"
#include "rms_norm/rms_norm_config.h"
#include "rms_norm/rms_norm_weight.cuh"

namespace zebra {
namespace {

struct RmsNormRows {
  std::int64_t first, last;
};
// The rows of this CTA.
__device__ __forceinline__ RmsNormRows rms_norm_rows(std::int64_t rows) {
  return {rows * blockIdx.x / gridDim.x, rows * (blockIdx.x + 1) / gridDim.x};
}

// 16 bytes of T.
__device__ __forceinline__ void rms_norm_floats(const uint4& raw, float (&v)[4], const float*) {
  v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
  v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
}
template <typename T>
__device__ __forceinline__ void rms_norm_floats(const uint4& raw, float (&v)[8], const T*) {
  const std::uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(pairs[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

template <typename T, int kPerThread>
__global__ void __launch_bounds__(kPerThread == 4 ? 512 : 320, kPerThread == 4 ? 1 : 2)
    rms_norm_bwd_kernel(const RmsNormBackwardParams p) {
  constexpr int kVec = 16 / sizeof(T), kStages = kRmsNormRingVecs / kPerThread;
  extern __shared__ uint4 ring[];
  __shared__ float rstds[kStages][kRmsNormMaxWarps], dots[2][kRmsNormMaxWarps];
  static_assert(512 * 3 * kRmsNormRingVecs * sizeof(uint4) + sizeof rstds + sizeof dots <=
                    kRmsNormMostSmemBytes,
                "one CTA fits everywhere");
  const int lane = threadIdx.x % 32, row_warps = blockDim.x / 32, rows_at_once = blockDim.y;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * rows_at_once;
  const int warp = thread / 32;
  const bool has_dsum = p.dsum != nullptr;
  const int slot = threads * kPerThread;  // vectors of one tensor in a stage
  const int stage_vecs = slot * (has_dsum ? 3 : 2);
  const RmsNormRows rows = rms_norm_rows(p.rows);
  const int count = static_cast<int>(rows.last - rows.first);
  const int column = threadIdx.x * kVec, next_column = blockDim.x * kVec;
  const auto is_column = [&](int j) { return column + j * next_column < p.dim; };

  // The row at `place` of this CTA's; zeros where there is no such row or column: they add nothing.
  const auto request = [&](int place, int stage) {
    const std::uint32_t to = smem_addr(ring + stage * stage_vecs + thread);
    const std::int64_t row = rows.first + place;
    const bool is_row = place < count;
    const T* const dy = static_cast<const T*>(p.dy) + row * p.dy_stride + column;
    const T* const sum = static_cast<const T*>(p.sum) + row * p.sum_stride + column;
    const T* const dsum = static_cast<const T*>(p.dsum) + row * p.dim + column;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const std::uint32_t to_j = to + j * threads * 16;
      const bool is_valid = is_row && is_column(j);
      cp_async_16(to_j, dy + j * next_column, is_valid);
      cp_async_16(to_j + slot * 16, sum + j * next_column, is_valid);
      if (has_dsum) cp_async_16(to_j + slot * 32, dsum + j * next_column, is_valid);
    }
    if (lane == 0)
      cp_async_4(smem_addr(&rstds[stage][warp]), static_cast<const float*>(p.rstd) + row, is_row);
    cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) request(threadIdx.y + stage * rows_at_once, stage);

  const auto read_weight = [&](int j, float (&w)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) w[i] = 0.f;
    if (is_column(j))
      rms_norm_weight<T>(p.weight, p.weight_dtype == DType::kFloat32, column + j * next_column, w);
  };
  constexpr bool kHoldsWeight = kPerThread <= 2;
  float held[kPerThread][kVec], dw[kPerThread][kVec] = {};
  if constexpr (kHoldsWeight)
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) read_weight(j, held[j]);
  const auto weight = [&](int j, float (&w)[kVec]) {
    if constexpr (!kHoldsWeight) read_weight(j, held[j]);
#pragma unroll
    for (int i = 0; i < kVec; ++i) w[i] = held[j][i];
  };
  const float inverse_dim = 1.f / static_cast<float>(p.dim);
  int stage = 0, turn = 0;
  for (int done = 0; done < count; done += rows_at_once) {
    const int place = done + threadIdx.y;
    cp_async_wait<kStages - 1>();
    __syncwarp();  // rstd is its first lane's
    const float rstd = rstds[stage][warp];
    const std::uint32_t from = smem_addr(ring + stage * stage_vecs + thread);
    const auto read = [&](int tensor, int j, float (&v)[kVec]) {
      const uint4 raw = ld_shared_v4(from + (tensor * slot + j * threads) * 16);
      rms_norm_floats(raw, v, static_cast<const T*>(nullptr));
    };
    float dot = 0.f;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      float w[kVec], dy[kVec], s[kVec];
      weight(j, w);
      read(0, j, dy);
      read(1, j, s);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float product = dy[i] * s[i];
        dw[j][i] += product * rstd;
        dot += product * w[i];
      }
    }
    dot = warp_sum(dot);
    if (row_warps > 1) {
      if (lane == 0) dots[turn][warp] = dot;
      __syncthreads();
      dot = warp_sum(lane < row_warps ? dots[turn][threadIdx.y * row_warps + lane] : 0.f);
      turn ^= 1;
    }
    const float c = dot * rstd * rstd * inverse_dim;
    T* const dx = static_cast<T*>(p.dx) + (rows.first + place) * p.dim + column;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      float w[kVec], dy[kVec], s[kVec], out[kVec] = {};
      weight(j, w);
      read(0, j, dy);
      read(1, j, s);
      if (has_dsum) read(2, j, out);
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] += rstd * (w[i] * dy[i] - s[i] * c);
      if (place < count && is_column(j)) store_vec(dx + j * next_column, out);
    }
    __syncwarp();  // every lane has its rstd
    request(place + kStages * rows_at_once, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  cp_async_wait_all();
  if (blockDim.y > 1) {  // rows that lay side by side, in their order
    static_assert(kPerThread * kVec * sizeof(float) <= 2 * 16 * kRmsNormRingVecs, "in the ring");
    float* const mine = reinterpret_cast<float*>(ring) + thread;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPerThread; ++j)
#pragma unroll
      for (int i = 0; i < kVec; ++i) mine[(j * kVec + i) * threads] = dw[j][i];
    __syncthreads();
    if (threadIdx.y > 0) return;
#pragma unroll 1
    for (int y = 1; y < rows_at_once; ++y)
#pragma unroll
      for (int j = 0; j < kPerThread; ++j)
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          dw[j][i] += mine[(j * kVec + i) * threads + y * static_cast<int>(blockDim.x)];
  }
  float* const partial = static_cast<float*>(p.partial) + blockIdx.x * p.dim + column;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j)
    if (is_column(j))
#pragma unroll
      for (int i = 0; i < kVec; i += 4)
        *reinterpret_cast<float4*>(partial + j * next_column + i) =
            make_float4(dw[j][i], dw[j][i + 1], dw[j][i + 2], dw[j][i + 3]);
}

// Rows of any length and alignment, one after another, read twice.
template <typename T, int kVec>
__global__ void rms_norm_bwd_walk_kernel(const RmsNormBackwardParams p) {
  __shared__ float smem[kRmsNormMaxWarps];
  const std::int64_t vecs = p.dim / kVec;
  const RmsNormRows rows = rms_norm_rows(p.rows);
  const bool is_weight_float = p.weight_dtype == DType::kFloat32;
  float* const partial = static_cast<float*>(p.partial) + blockIdx.x * p.dim;
  for (std::int64_t vec = threadIdx.x; vec < vecs; vec += blockDim.x)
#pragma unroll
    for (int i = 0; i < kVec; ++i) partial[vec * kVec + i] = 0.f;
  for (std::int64_t row = rows.first; row < rows.last; ++row) {
    const T* const dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const T* const sum = static_cast<const T*>(p.sum) + row * p.sum_stride;
    const float rstd = static_cast<const float*>(p.rstd)[row];
    // g = w dy
    const auto read = [&](std::int64_t at, float (&dyv)[kVec], float (&g)[kVec], float (&s)[kVec]) {
      load_vec(dy + at, dyv);
      load_vec(sum + at, s);
      rms_norm_weight<T>(p.weight, is_weight_float, at, g);
#pragma unroll
      for (int i = 0; i < kVec; ++i) g[i] *= dyv[i];
    };
    float dot = 0.f;
    for (std::int64_t vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
      float dyv[kVec], g[kVec], s[kVec];
      read(vec * kVec, dyv, g, s);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        partial[vec * kVec + i] += dyv[i] * (s[i] * rstd);
        dot += g[i] * s[i];
      }
    }
    const float c = block_sum(dot, smem) * rstd * rstd / static_cast<float>(p.dim);
    for (std::int64_t vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
      const std::int64_t at = vec * kVec;
      float dyv[kVec], g[kVec], s[kVec], out[kVec] = {};
      read(at, dyv, g, s);
      if (p.dsum != nullptr) load_vec(static_cast<const T*>(p.dsum) + row * p.dim + at, out);
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] += rstd * (g[i] - s[i] * c);
      store_vec(static_cast<T*>(p.dx) + row * p.dim + at, out);
    }
  }
}

// 32 columns a CTA; each of its warps sums every 16th CTA's partial row, all of them under way at
// once.
constexpr int kRmsNormSumColumns = 32, kRmsNormSumWarps = 16;

template <typename T>
__global__ void __launch_bounds__(kRmsNormSumColumns* kRmsNormSumWarps)
    rms_norm_dweight_kernel(const RmsNormBackwardParams p) {
  __shared__ float sums[kRmsNormSumWarps][kRmsNormSumColumns];
  sm90::grid_dependency_wait();
  const std::int64_t c = std::int64_t{blockIdx.x} * kRmsNormSumColumns + threadIdx.x;
  float total = 0.f;
  if (c < p.dim)
#pragma unroll 16
    for (std::int64_t g = threadIdx.y; g < p.partials; g += kRmsNormSumWarps)
      total += static_cast<const float*>(p.partial)[g * p.dim + c];
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || c >= p.dim) return;
#pragma unroll
  for (int w = 1; w < kRmsNormSumWarps; ++w) total += sums[w][threadIdx.x];
  if (p.weight_dtype == DType::kFloat32)
    static_cast<float*>(p.dweight)[c] = total;
  else
    static_cast<T*>(p.dweight)[c] = from_float<T>(total);
}

// ---- launches

template <typename T, int kPerThread>
Status rms_norm_bwd_start(const RmsNormBackwardParams& p, const RmsNormBackwardConfig& c,
                          cudaStream_t stream) {
  const auto kernel = rms_norm_bwd_kernel<T, kPerThread>;
  const Status s = allow_shared_memory(kernel, c.smem_bytes);
  if (s.error != nullptr) return s;
  kernel<<<static_cast<unsigned>(p.partials), dim3(c.threads, c.rows), c.smem_bytes, stream>>>(p);
  return launch_status();
}

template <typename T>
Status rms_norm_bwd_rows(const RmsNormBackwardParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool aligned =
      rows_aligned<T>(p.dim, {p.dy, p.dsum, p.sum, p.weight, p.dx}, {p.dy_stride, p.sum_stride});
  const RmsNormBackwardConfig c =
      select_rms_norm_backward_config(p.dim, sizeof(T), aligned, p.dsum != nullptr);
  switch (c.vecs_per_thread) {
    case 1:
      return rms_norm_bwd_start<T, 1>(p, c, stream);
    case 2:
      return rms_norm_bwd_start<T, 2>(p, c, stream);
    case 4:
      return rms_norm_bwd_start<T, 4>(p, c, stream);
  }
  const auto kernel =
      c.vec == 1 ? rms_norm_bwd_walk_kernel<T, 1> : rms_norm_bwd_walk_kernel<T, kVec>;
  kernel<<<static_cast<unsigned>(p.partials), c.threads, 0, stream>>>(p);
  return launch_status();
}

template <typename T>
Status rms_norm_backward(const RmsNormBackwardParams& p, CUstream_st* stream) {
  const Status status = rms_norm_bwd_rows<T>(p, stream);
  if (status.error != nullptr) return status;
  return launch_dependent(rms_norm_dweight_kernel<T>,
                          static_cast<unsigned>(ceil_div<std::int64_t>(p.dim, kRmsNormSumColumns)),
                          dim3(kRmsNormSumColumns, kRmsNormSumWarps), 0, stream, p);
}

}  // namespace
}  // namespace zebra
