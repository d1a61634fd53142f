// mla_decode on CUDA with kv_b_weight: the sum of the partial results of an item, as
// mla_decode_combine.cuh, and o_h = U_v,g o~_h of it.
//
// Grid           [KV heads, slices of rows, value columns].  A CTA walks tiles of up to 16 rows.
// Shared memory  sums and statistics of threads that share an element, 16 latent rows, U_v's rows:
//                asked for before the attention kernel has ended.
// Bound          latency.  Tiles are as few rows as fill the GPU, so that with one sequence, whose
//                rows have a partial result of every CTA, 32 CTAs of 8B read them, a row each.
#pragma once

#include "common/sm90/ptx.cuh"
#include "mla_decode/mla_decode_fold.cuh"
#include "mla_decode/mla_decode_weight_config.h"

namespace zebra {
namespace {

struct MlaExpandArgs {
  MlaLine line;
  bool finds_units;      // from the lengths, while the attention kernel runs
  const MlaUnit* units;  // by item; of one partial result: it lies in `latent`
  const float2* stats;   // [partials, pass_rows]
  const float4* sums;    // [partials, pass_rows, rank_quads]
  const uint2* latent;   // [rows of q, R / 4]
  const void* weight;    // the value rows of the first KV head
  void* o;               // [rows of q, v_dim]
  float* lse;
  std::int64_t head_stride;       // of the weight: (Dn + Dv) R
  MlaDivisor tokens, group;       // new tokens of a sequence, query heads of a KV head
  MlaDivisor quads, slots, pass;  // of a row, of a tile; pass: rows of an item
  int rows, heads, passes;        // rows: of a KV head
  int rank_quads, R, v_dim;
  int tile_rows, lanes, width, pitch;
  bool is_weight_early;  // nothing before the attention kernel writes the weight
};

// One row of a KV head.
struct MlaExpandRow {
  int token, head;        // over all sequences; query head
  int item, row_in_pass;  // where the attention kernel had it

  __device__ __forceinline__ MlaExpandRow(const MlaExpandArgs& a, int kv_head, int row) {
    token = a.group.quotient(row);
    head = kv_head * a.group.divisor + row - token * a.group.divisor;
    const int b = a.tokens.quotient(token);
    const int of_sequence = (token - b * a.tokens.divisor) * a.heads + head;
    const int pass = a.pass.quotient(of_sequence);
    item = b * a.passes + pass, row_in_pass = of_sequence - pass * a.pass.divisor;
  }
  __device__ __forceinline__ std::int64_t index(const MlaExpandArgs& a) const {
    return static_cast<std::int64_t>(token) * a.heads + head;
  }
};

#if __CUDA_ARCH__ == 900
constexpr int kMlaExpandAtOnce = 6;  // partial results
#else
constexpr int kMlaExpandAtOnce = 3;  // as registers of 1024 threads allow
#endif

constexpr int kMlaExpandFewRows = 16;  // of a KV head

template <typename T>
__global__ void __launch_bounds__(kMlaExpandThreads, 1)
    mla_expand_kernel(const __grid_constant__ MlaExpandArgs a) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32, lane = thread % 32;
  float4* const sums = reinterpret_cast<float4*>(smem);
  float2* const stats = reinterpret_cast<float2*>(sums + threads);
  const unsigned rows = smem_addr(stats + threads), weight = rows + 16 * a.pitch;
  const int kv_head = blockIdx.x, first_column = blockIdx.z * a.width;
  const int units = a.pitch / 16 - 1;  // of a row, the gap behind it not counted

  // What follows may start: at once where rows are few, and it has most to ask for while this
  // waits.
  const bool is_few = a.rows <= kMlaExpandFewRows;
  if (is_few) sm90::grid_launch_dependents();
  if (!a.is_weight_early) sm90::grid_dependency_wait();
  const char* const from =
      static_cast<const char*>(a.weight) +
      2 * (kv_head * a.head_stride + static_cast<std::int64_t>(first_column) * a.R);
#pragma unroll 1
  for (int d = warp; d < a.width; d += threads / 32)
#pragma unroll 1
    for (int unit = lane; unit < units; unit += 32) {
      const bool is_valid = unit * 8 < a.R && first_column + d < a.v_dim;
      const char* const src = from + 2 * static_cast<std::int64_t>(d) * a.R + unit * 16;
      cp_async_16(weight + d * a.pitch + unit * 16, is_valid ? src : a.weight, is_valid);
    }
  cp_async_commit();
  // Columns past R stay zeros, and so do rows that no tile has.
  const unsigned zeros[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int i = thread; i < 16 * (units + 1); i += threads) st_shared_v4(rows + i * 16, zeros);

  const int k0 = a.lanes > 1 ? a.slots.quotient(thread) : 0;
  const int my_slot = thread - k0 * a.slots.divisor;
  const int step = a.lanes > 1 ? a.slots.divisor : threads;
  __syncthreads();
#pragma unroll 1
  for (int tile = blockIdx.y * a.tile_rows; tile < a.rows; tile += gridDim.y * a.tile_rows) {
#pragma unroll 1
    for (int first = 0; first < a.slots.divisor; first += step) {
      const int slot = first + my_slot, r = a.quads.quotient(slot);
      const int quad = slot - r * a.quads.divisor;
      const bool is_mine = slot < a.slots.divisor && k0 < a.lanes && tile + r < a.rows;
      const MlaExpandRow row(a, kv_head, min(tile + r, a.rows - 1));
      if (!a.finds_units) sm90::grid_dependency_wait();
      MlaUnit unit = {};
      if (a.finds_units)
        unit = mla_find_unit<false>(a.line, row.item);
      else if (is_mine)
        unit = a.units[row.item];
      if (!is_mine) unit.count = 0;
      MlaFold<1> fold(a.stats, a.sums, unit, a.pass.divisor, row.row_in_pass, a.rank_quads, quad,
                      k0, a.lanes);
      sm90::grid_dependency_wait();
      if (!is_few) sm90::grid_launch_dependents();
      MlaPart<1> mine;
      uint2 words = {0, 0};
      if (unit.count > 1)
        mine = fold.gather<kMlaExpandAtOnce>();
      else if (unit.count == 1 && k0 == 0)
        words = a.latent[row.index(a) * a.quads.divisor + quad];
#pragma unroll 1
      for (int left = a.lanes; left > 1;) {  // lanes: a tree, whose shape depends on nothing else
        const int half = (left + 1) / 2;
        if (k0 >= half && k0 < left) sums[thread] = mine.o[0], stats[thread] = {mine.top, mine.sum};
        __syncthreads();
        const int other = thread + half * a.slots.divisor;
        if (k0 + half < left) mine.add(sums[other], stats[other]);
        left = half;
      }
      if (!is_mine || k0 > 0) continue;
      if (unit.count > 1) {
        const float inverse = mla_inverse(mine.sum);
        mla_scale(mine.o[0], inverse);
        words = {pack<T>(mine.o[0].x, mine.o[0].y), pack<T>(mine.o[0].z, mine.o[0].w)};
        if (quad == 0 && blockIdx.z == 0) a.lse[row.index(a)] = mla_lse(mine.top, mine.sum);
      }
      const unsigned to = rows + r * a.pitch + quad * 8;
      st_shared(to, words.x), st_shared(to + 4, words.y);
    }
    cp_async_wait<0>();
    __syncthreads();

#pragma unroll 1
    for (int n = warp * 8; n < a.width; n += threads / 4) {
      float even[4] = {}, odd[4] = {};
      const unsigned row_lane = rows + lane % 16 * a.pitch + lane / 16 * 16;
      const unsigned weight_lane = weight + (n + lane % 8) * a.pitch + lane / 8 * 16;
#pragma unroll 2
      for (int k = 0; k < units / 4; ++k) {
        unsigned x[4], y[4], w[4];
        ldmatrix_x4(x, row_lane + k * 64);
        ldmatrix_x4(y, row_lane + k * 64 + 32);
        ldmatrix_x4(w, weight_lane + k * 64);
        mma<T>(even, x, w[0], w[1]);
        mma<T>(odd, y, w[2], w[3]);
      }
      const int column = first_column + n + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = lane / 4 + 8 * half;
        if (r >= a.tile_rows || tile + r >= a.rows || column >= a.v_dim) continue;
        const MlaExpandRow row(a, kv_head, tile + r);
        *reinterpret_cast<unsigned*>(static_cast<T*>(a.o) + row.index(a) * a.v_dim + column) =
            pack<T>(even[2 * half] + odd[2 * half], even[2 * half + 1] + odd[2 * half + 1]);
      }
    }
    __syncthreads();  // the rows are free for the next tile
  }
}

}  // namespace
}  // namespace zebra
