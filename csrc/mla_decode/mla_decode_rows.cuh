// mla_decode on CUDA: what a thread is, and the attention of one warp's 16 rows of q.
#pragma once

#include <type_traits>

#include "mla_decode/mla_decode_load.cuh"

namespace zebra {
namespace {

// What a thread is.  A piece's end asks anew, through thread_index(), so that the answers take no
// registers while the stages pass.
struct MlaPlace {
  int warp, lane, stream, member, half, group;
  int worker, workers;  // among the warps with the same rows
  int group_barrier;    // of those

  __device__ __forceinline__ MlaPlace(const MlaArgs& a, int thread)
      : warp(thread / 32), lane(thread % 32) {
    stream = warp >> a.log_team, member = warp & ((1 << a.log_team) - 1);
    half = member >> a.log_groups, group = member & (a.groups - 1);
    worker = stream * a.halves + half, workers = a.streams * a.halves;
    group_barrier = 1 + a.streams + group;
  }
};

// Shared memory of every warp of 16 rows that only masked stages need: tokens that each row sees.
constexpr int kMlaLimitsOffset = kMlaMergeOffset - kMlaWarps * 64;

__device__ __forceinline__ int* mla_limits() {
  extern __shared__ __align__(1024) unsigned char smem[];
  return reinterpret_cast<int*>(smem + kMlaLimitsOffset) + threadIdx.x / 32 * 16;
}

// Where a lane reads the fragments of its group's rows of q.
template <typename S>
__device__ __forceinline__ unsigned mla_q_address(const MlaArgs& a, unsigned smem, int group,
                                                  int lane) {
  return smem + a.q_offset + (group * 16 + (lane & 15)) * S::kQPitch + (lane >> 4) * 16;
}

template <typename T, typename S>
struct MlaRows {
  unsigned q[S::kQFromSmem ? 1 : S::kSteps][4];
  unsigned q_address;  // where the lane reads q in shared memory
  float o[S::kRank / 8][4];
  float reference[2], sum[2];  // of rows g and g + 8; the sum is the lane's part

  // Asks for the warp's part of q's rows from `row` of sequence b on: the warps with the same rows
  // bring them to shared memory together, whole rows at once, where fragments from global memory
  // would be a line for every 16 bytes.  Rows past the last one are it again.
  __device__ __forceinline__ void ask(const MlaArgs& a, int b, int row, const MlaPlace& place) {
    constexpr int kUnits = S::kWidth / 8;
    sm90::grid_dependency_wait();  // q is the absorption's; nothing else here is
    const char* const base = static_cast<const char*>(a.q) + 2 * b * a.q_stride[0];
    const unsigned to = q_address - (place.lane & 15) * S::kQPitch - (place.lane >> 4) * 16;
#pragma unroll 1
    for (int r = place.worker; r < 16; r += place.workers) {
      const int mine = min(row + r, a.rows - 1), token = a.heads.quotient(mine);
      const int head = mine - token * a.heads.divisor;
      const char* const from = base + 2 * (token * a.q_stride[1] + head * a.q_stride[2]);
#pragma unroll
      for (int n = 0; n < (kUnits + 31) / 32; ++n) {
        const int unit = place.lane + 32 * n, column = unit * 8;
        const bool is_rope = column >= S::kRank;
        const int at = column - (is_rope ? S::kRank - a.R : 0);
        const bool is_valid = is_rope ? column - S::kRank < a.E : column < a.R;
        const char* const src = from + (is_valid ? 2 * at : 0);
        const unsigned dst = to + r * S::kQPitch + unit * 16;
        if (unit >= kUnits) continue;
        if (a.q_is_aligned) {
          cp_async_16(dst, src, is_valid);
        } else {
#pragma unroll 1
          for (int k = 0; k < 16; k += 4) cp_async_4(dst + k, is_valid ? src + k : src, is_valid);
        }
      }
    }
  }

  // Opens an item whose q has been asked for.
  __device__ __forceinline__ void begin(const MlaArgs& a, int length, int row,
                                        const MlaPlace& place) {
    const int lane = place.lane, threads = 32 * place.workers;
    if (lane < 16)
      mla_limits()[lane] = length - a.tokens + a.heads.quotient(min(row + lane, a.rows - 1)) + 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) reference[i] = -kInfinity, sum[i] = 0.f;  // no token yet
#pragma unroll
    for (int j = 0; j < S::kRank / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
    cp_async_wait_all();
    named_barrier(place.group_barrier, threads);
    if constexpr (!S::kQFromSmem) {
#pragma unroll
      for (int n = 0; n < S::kSteps; ++n) ldmatrix_x4(q[n], q_address + n * 32);
    }
  }

  // Whether a score has left the reference of its row behind.
  __device__ __forceinline__ bool is_left_behind(float top, int i) const {
    return top > reference[i] + (std::is_same_v<T, __half> ? 8.f : 20.f);
  }

  // Raises the reference of rows whose scores have left it behind.
  __device__ __forceinline__ void raise(float (&top)[2]) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(kWarp, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(kWarp, top[i], 2));
      shrink[i] = 1.f;
      if (is_left_behind(top[i], i)) {
        shrink[i] = reference[i] == -kInfinity ? 1.f : exp2_approx(reference[i] - top[i]);
        reference[i] = top[i];
      }
      sum[i] *= shrink[i];
    }
#pragma unroll
    for (int j = 0; j < S::kRank / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] *= shrink[i / 2];
  }

  // Attention over 32 tokens of a stage, `skip` rows into it; the first is `token` of the sequence.
  __device__ __forceinline__ void attend(unsigned stage, int skip, float scale, int token,
                                         bool is_masked) {
    const unsigned lane = threadIdx.x % 32, x = lane & 7;
    // Blocks of K: (tokens 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
    const unsigned k_row = x + (lane >> 4 & 1) * 8, k_unit = lane >> 3 & 1;
    const unsigned k_tile = stage + skip * 128 + k_row * 128 + ((k_unit ^ x) << 4);
    const unsigned k_half =
        stage + S::kHalfOffset + skip * 64 + k_row * 64 + ((k_unit ^ (x >> 1)) << 4);
    float s[4][4] = {};
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      unsigned low[4], high[4];
      if (step < S::kTiles * 4) {
        const unsigned at = (k_tile ^ (step % 4 << 5)) + step / 4 * S::kTileBytes;
        ldmatrix_x4(low, at);
        ldmatrix_x4(high, at + 16 * 128);
      } else {
        const unsigned at = k_half ^ (step % 2 << 5);
        ldmatrix_x4(low, at);
        ldmatrix_x4(high, at + 16 * 64);
      }
      unsigned from_smem[4];
      if constexpr (S::kQFromSmem) ldmatrix_x4(from_smem, q_address + step * 32);
      const unsigned (&fragment)[4] = S::kQFromSmem ? from_smem : q[S::kQFromSmem ? 0 : step];
      mma<T>(s[0], fragment, low[0], low[1]);
      mma<T>(s[1], fragment, low[2], low[3]);
      mma<T>(s[2], fragment, high[0], high[1]);
      mma<T>(s[3], fragment, high[2], high[3]);
    }

    float top[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= scale;
    if (is_masked) {
      const int limit[2] = {mla_limits()[lane / 4], mla_limits()[lane / 4 + 8]};
      const int first = token + 2 * static_cast<int>(lane % 4);
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + 8 * n + i % 2 >= limit[i / 2]) s[n][i] = -kInfinity;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[n][i]);
    if (__any_sync(kWarp, is_left_behind(top[0], 0) || is_left_behind(top[1], 1))) raise(top);
    const float base[2] = {reference[0] == -kInfinity ? 0.f : reference[0],
                           reference[1] == -kInfinity ? 0.f : reference[1]};

    unsigned p[2][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(s[n][i] - base[i / 2]);
        sum[i / 2] += s[n][i];
      }
      p[n / 2][n % 2 * 2] = pack<T>(s[n][0], s[n][1]);
      p[n / 2][n % 2 * 2 + 1] = pack<T>(s[n][2], s[n][3]);
    }

    // Blocks of V: (tokens 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
    const unsigned v_row = x + (lane >> 3 & 1) * 8, v_unit = lane >> 4 & 1;
    const unsigned v_tile = stage + skip * 128 + v_row * 128 + ((v_unit ^ x) << 4);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int c = 0; c < S::kRank / 16; ++c) {
        unsigned v[4];
        ldmatrix_x4_trans(v, (v_tile ^ (c % 4 << 5)) + c / 4 * S::kTileBytes + half * 16 * 128);
        mma<T>(o[2 * c], p[half], v[0], v[1]);
        mma<T>(o[2 * c + 1], p[half], v[2], v[3]);
      }
  }
};

}  // namespace
}  // namespace zebra
