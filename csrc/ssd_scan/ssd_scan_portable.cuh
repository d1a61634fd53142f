// The portable kernel of ssd_scan: one CTA walks one (sequence, head) in chunks of 32 tokens.
//
// With s the cumulative sum of A d log2(e) inside the chunk (inclusive), h the state before it, all
// products with the state and the output transposed, so that the fp32 state of a warp's 16 rows of
// P is both an accumulator and, rounded, the left operand of the next product, in registers:
//   M_ij   = [j <= i] exp2(s_i - s_j) d_j (C_i . B_j)             one tile a warp, to shared memory
//   y^T    = exp2(s_i) (h^T C^T) + X^T M^T + D X^T                [16, 32] a warp
//   h^T    = exp2(s_last) h^T + (d_j exp2(s_last - s_j) X)^T B    [16, N] a warp
#pragma once

#include <type_traits>

#include "common/cuda/vec.cuh"
#include "ssd_scan/ssd_scan_portable_decays.cuh"

namespace zebra {
namespace {

// ---- shared memory --------------------------------------------------------------------------

template <typename T, int P, int N>
struct Tiles {
  T x[kSsdScanStages][kChunk * P], z[kSsdScanStages][kChunk * P];
  T B[kSsdScanStages][kChunk * N], C[kSsdScanStages][kChunk * N];
  T y[kChunk * P];
  T scores[kChunk * kSsdScanScoreRow];
  Decays decays[2];
  float own[kChunk];  // the factor of x_i in y_i: (C_i . B_i) d_i + D
  Constants constants;
  float sums[P / 16][kChunk];  // of u^2 over a warp's rows of P
  float weight[P];             // of the norm
};

// Address of 16-byte segment `segment` of a row.  Segments are permuted within rows, so that one
// column of 8 rows lies in 8 different groups of banks.
template <int kDim>
__device__ __forceinline__ unsigned at(unsigned tile, unsigned row, unsigned segment) {
  return tile + row * (2 * kDim) + ((segment ^ (row % 8)) * 16);
}

// From at(tile, row, segment) to at(tile, row, segment + 2 k), where 2 k sets other bits than
// `segment`: rows begin at multiples of their size.
__device__ __forceinline__ unsigned along(unsigned address, unsigned k) {
  return address ^ (32 * k);
}

// Requests the tokens [0, len) of a chunk; the rows beyond become zeros, because 0 * NaN is NaN in
// a product.
template <int kDim, int kThreads>
__device__ __forceinline__ void request(unsigned tile, const char* first, std::int64_t stride,
                                        int len) {
  constexpr int kSegments = kDim / 8;
#pragma unroll
  for (int k = 0; k < kChunk * kSegments / kThreads; ++k) {
    const unsigned i = threadIdx.x + k * kThreads, row = i / kSegments, segment = i % kSegments;
    const bool is_valid = static_cast<int>(row) < len;
    const char* src = first + (is_valid ? row : 0) * stride + segment * 16;
    cp_async_16(at<kDim>(tile, row, segment), src, is_valid);
  }
}

// ---- one chunk ------------------------------------------------------------------------------

// The tile of M that this warp owns: 16 rows, kBlocks x 8 columns.  The diagonal stays in fp32 and
// takes D along: where both nearly cancel, the norm would magnify its rounding.
template <typename T, int N, int kWarps>
struct ScoreTile {
  static constexpr int kAcross = kWarps / 2, kBlocks = kChunk / 8 / kAcross;

  static __device__ __forceinline__ void compute(unsigned C, unsigned B, const Decays& decays,
                                                 float D, T* scores, float* own) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned i0 = warp / kAcross * 16, j0 = warp % kAcross * (8 * kBlocks);
    if (j0 > i0 + 15) return;  // above the diagonal: never read
    const unsigned c_at = at<N>(C, i0 + lane % 16, lane / 16);
    const unsigned b_at = at<N>(B, j0 + lane % 8, lane / 8);
    float acc[kBlocks][4] = {};
#pragma unroll
    for (int k = 0; k < N / 16; k += 2) {
      unsigned c[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) ldmatrix_x4(c[half], along(c_at, k + half));
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        unsigned b[4];
        ldmatrix_x4(b, along(b_at, k) + 8 * block * (2 * N));
        mma<T>(acc[block], c[0], b[0], b[1]);
        mma<T>(acc[block], c[1], b[2], b[3]);
      }
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const unsigned j = j0 + 8 * block + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned i = i0 + 8 * half + lane / 4;
        float m[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float s =
              (decays.s_high[i] - decays.s_high[j + e]) + (decays.s_low[i] - decays.s_low[j + e]);
          // Selected, not multiplied: above the diagonal exp2 may be infinite.
          const float v = acc[block][2 * half + e] * (exp2_approx(s) * decays.d[j + e]);
          m[e] = j + e < i ? v : 0.f;
          if (j + e == i) own[i] = v + D;
        }
        *reinterpret_cast<unsigned*>(scores + i * kSsdScanScoreRow + j) = pack<T>(m[0], m[1]);
      }
    }
  }
};

// This warp's part of the output: y[token block][2 * (row half) + token], rows and tokens in the
// lanes as in a fragment; and of the state, h[block of N][2 * (row half) + column].
using Output = float[kChunk / 8][4];
template <int N>
using State = float[N / 8][4];

// Where this lane's part of the state starts: its rows of P are this one and the eighth after it.
template <int N>
__device__ __forceinline__ unsigned lane_state() {
  unsigned thread;  // read anew: kept over the walk it would take a register
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  const unsigned lane = thread % 32, warp = thread / 32;
  return (16 * warp + lane / 4) * N + 2 * (lane % 4);
}

// x^T or z^T of this warp's rows as two left operands of 16 tokens: register r holds the block of
// rows 8 (r % 2) and tokens 8 (r / 2), which is also where the output keeps them.
using Columns = unsigned[2][4];

template <int P>
__device__ __forceinline__ void load_columns(Columns& columns, unsigned tile) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < 2; ++k)
    ldmatrix_x4_trans(columns[k],
                      at<P>(tile, 16 * k + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2));
}

// y^T = exp2(s_i) h^T C^T
template <typename T, int N>
__device__ __forceinline__ void read_state(Output& y, const State<N>& h, unsigned C,
                                           const Decays& decays) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned c_at = at<N>(C, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    unsigned a[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      a[r] = pack<T>(h[2 * k + r / 2][r % 2 * 2], h[2 * k + r / 2][r % 2 * 2 + 1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned b[4];
      ldmatrix_x4(b, along(c_at, k) + 16 * i * (2 * N));
      mma<T>(y[2 * i], a, b[0], b[1]);
      mma<T>(y[2 * i + 1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) y[i][e] *= decays.from_start[8 * i + 2 * (lane % 4) + e % 2];
}

// y^T += X^T M^T; the block of M above the diagonal is skipped.
template <typename T>
__device__ __forceinline__ void add_chunk(Output& y, const Columns& x, unsigned scores) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int k = 0; k <= i; ++k) {
      unsigned b[4];
      ldmatrix_x4(b, scores + 2 * ((16 * i + lane / 16 * 8 + lane % 8) * kSsdScanScoreRow + 16 * k +
                                   lane / 8 % 2 * 8));
      mma<T>(y[2 * i], x[k], b[0], b[1]);
      mma<T>(y[2 * i + 1], x[k], b[2], b[3]);
    }
}

// h^T = exp2(s_last) h^T + (d_j exp2(s_last - s_j) X)^T B
template <typename T, int N>
__device__ __forceinline__ void update_state(State<N>& h, const Columns& x, unsigned B,
                                             const Decays& decays) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned b_at = at<N>(B, lane % 16, lane / 16);
  const float whole = decays.from_start[kChunk - 1];
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) h[n][e] *= whole;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    unsigned a[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const unsigned j = 16 * k + r / 2 * 8 + 2 * (lane % 4);
      const float2 v = unpack<T>(x[k][r]);
      a[r] = pack<T>(v.x * decays.to_end[j], v.y * decays.to_end[j + 1]);
    }
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      unsigned b[4];
      ldmatrix_x4_trans(b, along(b_at, n) + 16 * k * (2 * N));
      mma<T>(h[2 * n], a, b[0], b[1]);
      mma<T>(h[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// fn(y, y of the next token, both inputs packed) for every pair of tokens.
template <typename Fn>
__device__ __forceinline__ void each(Output& y, const Columns& columns, const Fn& fn) {
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float (&block)[4] = y[2 * k + r / 2];
      fn(block[r % 2 * 2], block[r % 2 * 2 + 1], columns[k][r]);
    }
}

// y_i += own_i x_i
template <typename T>
__device__ __forceinline__ void add_own(Output& y, const Columns& x, const float* own) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float* const factors = own + 16 * k + r / 2 * 8 + 2 * (lane % 4);
      const float2 v = unpack<T>(x[k][r]);
      float (&block)[4] = y[2 * k + r / 2];
      block[r % 2 * 2] = fmaf(factors[0], v.x, block[r % 2 * 2]);
      block[r % 2 * 2 + 1] = fmaf(factors[1], v.y, block[r % 2 * 2 + 1]);
    }
}

template <typename T>
__device__ __forceinline__ void gate(Output& y, const Columns& z) {
  each(y, z, [](float& first, float& second, unsigned packed) {
    const auto silu = [](float v) {
      return v * reciprocal_approx(1.f + exp2_approx(-1.44269504f * v));
    };
    const float2 v = unpack<T>(packed);
    first *= silu(v.x), second *= silu(v.y);
  });
}

// u = weight u / sqrt(mean(u^2) + eps) over all rows of P; contains a barrier.
template <int P>
__device__ __forceinline__ void normalise(Output& y, float (&sums)[P / 16][kChunk],
                                          const float (&weight)[P], float eps) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // token 8 i + 2 (lane % 4) + e
      float sum = y[i][e] * y[i][e] + y[i][2 + e] * y[i][2 + e];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(kWarp, sum, offset);
      if (lane < 4) sums[warp][8 * i + 2 * lane + e] = sum;
    }
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < P / 16; ++w) total += sums[w][lane];
  const unsigned row = 16 * warp + lane / 4;
  const float scale = rsqrtf(total * (1.f / P) + eps);
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      y[i][e] *=
          weight[row + e / 2 * 8] * __shfl_sync(kWarp, scale, 8 * i + 2 * (lane % 4) + e % 2);
}

// The output as rows of tokens in shared memory.
template <typename T, int P>
__device__ __forceinline__ void stage(const Output& y, unsigned tile) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      st_shared(at<P>(tile, 8 * i + lane / 4, 2 * warp + half) + 4 * (lane % 4),
                movmatrix_trans(pack<T>(y[i][2 * half], y[i][2 * half + 1])));
}

// The staged rows of chunk c to global memory.
template <int P, int kThreads>
__device__ __forceinline__ void store_chunk(char* first, std::int64_t row_bytes, unsigned tile,
                                            int c, int len) {
  constexpr int kSegments = P / 8;
#pragma unroll
  for (int k = 0; k < kChunk * kSegments / kThreads; ++k) {
    const unsigned i = threadIdx.x + k * kThreads, row = i / kSegments, segment = i % kSegments;
    const int token = c * kChunk + row;
    if (token < len)
      *reinterpret_cast<uint4*>(first + token * row_bytes + segment * 16) =
          ld_shared_v4(at<P>(tile, row, segment));
  }
}

// ---- the kernel -----------------------------------------------------------------------------

template <typename T, int P, int N>
__global__ void __launch_bounds__(ssd_scan_threads(P), ssd_scan_ctas_per_sm(P, N))
    ssd_scan_kernel(const SsdScanParams p) {
  constexpr int kThreads = ssd_scan_threads(P), kWarps = kThreads / 32;
  constexpr int kDecayWarp = kWarps / 2 - 1;  // the one whose tile of M is above the diagonal
  static_assert(sizeof(Tiles<T, P, N>) == ssd_scan_smem_bytes(P, N), "what the launch asks for");
  extern __shared__ __align__(1024) unsigned char smem[];
  Tiles<T, P, N>& tiles = *reinterpret_cast<Tiles<T, P, N>*>(smem);
  Constants& constants = tiles.constants;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t index = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const Sequence seq = sequence(p, index);

  if (threadIdx.x == 0) {
    const auto rows = [&](const void* tensor, const SsdStrides& stride, std::int64_t heads,
                          int size) {
      return static_cast<const char*>(tensor) +
             size * (seq.batch * stride.batch + seq.first * stride.token +
                     head / (p.heads / heads) * stride.head);
    };
    constants.x = rows(p.x, p.x_stride, p.x_heads, 2);
    constants.B = rows(p.B, p.b_stride, p.b_heads, 2);
    constants.C = rows(p.C, p.c_stride, p.c_heads, 2);
    constants.z = rows(p.z, p.z_stride, p.heads, 2);
    constants.dt = rows(p.dt, p.dt_stride, p.heads, p.dt_dtype == DType::kFloat32 ? 4 : 2);
    constants.y =
        static_cast<char*>(p.y) + 2 * ((seq.batch * p.tokens + seq.first) * p.heads + head) * P;
    constants.state = (index * p.heads + head) * P * N;
    constants.len = seq.len;
    constants.rate = static_cast<const float*>(p.A)[head] * 1.4426950408889634;
    constants.dt_bias = p.dt_bias == nullptr ? 0.f : element<T>(p.dt_bias, p.dt_bias_dtype, head);
    constants.D = p.D == nullptr ? 0.f : element<T>(p.D, p.d_dtype, head);
  }
  __syncthreads();
  const auto request_chunk = [&](int c) {
    const int stage = c % kSsdScanStages, len = constants.len - c * kChunk;
    const std::int64_t bytes = 2 * static_cast<std::int64_t>(c) * kChunk;
    const auto one = [&](auto dim, void* tile, const char* first, std::int64_t stride) {
      request<dim(), kThreads>(smem_addr(tile), first + bytes * stride, 2 * stride, len);
    };
    using DimP = std::integral_constant<int, P>;
    using DimN = std::integral_constant<int, N>;
    one(DimN(), tiles.C[stage], constants.C, p.c_stride.token);
    one(DimN(), tiles.B[stage], constants.B, p.b_stride.token);
    one(DimP(), tiles.x[stage], constants.x, p.x_stride.token);
    if (p.z != nullptr) one(DimP(), tiles.z[stage], constants.z, p.z_stride.token);
    cp_async_commit();
  };
  const auto store_staged = [&](int c) {
    store_chunk<P, kThreads>(constants.y, 2 * p.heads * P, smem_addr(tiles.y), c, constants.len);
  };

  State<N> h = {};
  if (p.initial_state != nullptr) {
    const float* const state =
        static_cast<const float*>(p.initial_state) + constants.state + lane_state<N>();
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) h[n][e] = state[e / 2 * 8 * N + 8 * n + e % 2];
  }

  if (constants.len > 0) {
    float step = 0.f;  // dt of this lane's token in the next chunk
    request_chunk(0);
    if (warp == kDecayWarp) {
      store_decays(tiles.decays[0], constants, load_step<T>(p, constants.dt, lane, constants.len),
                   p.dt_softplus, lane < constants.len);
      step = load_step<T>(p, constants.dt, kChunk + lane, constants.len);
    }
    if (p.norm_weight != nullptr && threadIdx.x < P)
      tiles.weight[threadIdx.x] =
          element<T>(p.norm_weight, p.norm_weight_dtype, head * P + threadIdx.x);
    for (int c = 0; c * kChunk < constants.len; ++c) {
      const int s = c % kSsdScanStages;
      const Decays& decays = tiles.decays[c % 2];
      cp_async_wait_all();
      __syncthreads();  // chunk c is in shared memory, chunk c - 1 has been read, its y is staged
      if ((c + 1) * kChunk < constants.len) request_chunk(c + 1);
      if (c > 0) store_staged(c - 1);
      if (warp == kDecayWarp && (c + 1) * kChunk < constants.len) {
        const int token = (c + 1) * kChunk + lane;
        store_decays(tiles.decays[(c + 1) % 2], constants, step, p.dt_softplus,
                     token < constants.len);
        step = load_step<T>(p, constants.dt, token + kChunk, constants.len);
      }
      ScoreTile<T, N, kWarps>::compute(smem_addr(tiles.C[s]), smem_addr(tiles.B[s]), decays,
                                       constants.D, tiles.scores, tiles.own);
      Output y = {};
      Columns columns;
      read_state<T, N>(y, h, smem_addr(tiles.C[s]), decays);
      load_columns<P>(columns, smem_addr(tiles.x[s]));
      __syncthreads();  // M is in shared memory
      add_chunk<T>(y, columns, smem_addr(tiles.scores));
      add_own<T>(y, columns, tiles.own);
      if (p.z != nullptr) {
        load_columns<P>(columns, smem_addr(tiles.z[s]));
        gate<T>(y, columns);
      }
      if (p.norm_weight != nullptr)
        normalise<P>(y, tiles.sums, tiles.weight, static_cast<float>(p.norm_eps));
      stage<T, P>(y, smem_addr(tiles.y));
      load_columns<P>(columns, smem_addr(tiles.x[s]));
      update_state<T, N>(h, columns, smem_addr(tiles.B[s]), decays);
    }
    __syncthreads();
    store_staged((constants.len - 1) / kChunk);
  }

  float* const state = static_cast<float*>(p.final_state) + constants.state + lane_state<N>();
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(state + half * 8 * N + 8 * n) = {h[n][2 * half],
                                                                  h[n][2 * half + 1]};
}

}  // namespace
}  // namespace zebra
