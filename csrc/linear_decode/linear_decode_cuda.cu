// linear_decode for every GPU from sm_80 on: mma.sync, ldmatrix, cp.async; the choice of kernel;
// and what follows products that ATen made.
//
// Computes       y of linear_decode.h for 16-bit dtypes and at most 128 rows of x (tokens).
// Grid           64 outputs x up to 32 tokens a CTA (linear_decode_config.h).
// Tiles          a warp multiplies 16 rows of W (swiglu: 16 gate rows and their 16 up rows) with
//                all tokens of the CTA, 64 elements of K at a time.
// Norm           y = rms(x)^-1 W (gain x): x is multiplied by the gain where it lies in shared
//                memory, its squares are summed, and the sums of products are scaled at the end.
// Shared memory  three stages of W and x by cp.async, element by element where rows are not aligned
//                to 16 bytes; rows are 144 bytes apart, so ldmatrix meets no bank twice.
// Barriers       one a stage, with the norm two.
// Bound          HBM by bytes; in truth the latency of few CTAs where W has few rows.
// Measured       not yet.
#include "common/cuda/launch.h"
#include "common/cuda/mma.cuh"
#include "common/cuda/vec.cuh"
#include "linear_decode/linear_decode.h"
#include "linear_decode/linear_decode_config.h"
#include "linear_decode/linear_decode_sm90_config.h"

namespace zebra {
namespace {

constexpr int kThreads = 128, kStages = 3;

// kAligned: rows of x and W in units of 16 bytes.
template <typename T, int kTokens, bool kSwiglu, bool kAligned>
struct LinearTile {
  static constexpr int kParts = kSwiglu ? 2 : 1;  // gate and up
  static constexpr int kRows = kParts * kLinearTileRows + kTokens;
  static constexpr int kPasses = (kTokens + 15) / 16;

  const LinearDecodeParams& p;
  T* const smem;  // [stages][rows of W, then of x][pitch]
  const std::int64_t first_output, first_token;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  __device__ __forceinline__ T* row_of(int stage, int row) const {
    return smem + (stage * kRows + row) * kLinearPitch;
  }
  __device__ __forceinline__ T* x_row(int stage, int token) const {
    return row_of(stage, kParts * kLinearTileRows + token);
  }

  // 8 elements from column k of a row of p.K, zeros beyond K and where there is no row.
  __device__ __forceinline__ void load_unit(T* to, const T* row, std::int64_t k,
                                            bool is_row) const {
    if constexpr (kAligned) {
      const bool valid = is_row && k < p.K;
      const T* const from = valid ? row + k : static_cast<const T*>(p.x);
      cp_async_16(smem_addr(to), from, valid);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = is_row && k + i < p.K ? row[k + i] : from_float<T>(0.f);
    }
  }
  __device__ __forceinline__ void load(int stage, std::int64_t k0) const {
    const T* const w = static_cast<const T*>(p.weight);
    const T* const up = static_cast<const T*>(p.up_weight);
    const T* const x = static_cast<const T*>(p.x);
    const int unit = thread % 8 * 8;
    for (int row = thread / 8; row < kRows; row += kThreads / 8) {
      const bool is_x = row >= kParts * kLinearTileRows;
      const std::int64_t at = is_x ? first_token + row - kParts * kLinearTileRows
                                   : first_output + row % kLinearTileRows;
      const T* const part = row < kLinearTileRows ? w : up;
      const T* const from = is_x ? x + at * p.x_stride : part + at * p.weight_stride;
      load_unit(row_of(stage, row) + unit, from, k0 + unit, at < (is_x ? p.rows : p.outputs));
    }
    cp_async_commit();
  }

  // x times the gain, and the sums of squares of the rows that this thread touches.
  __device__ __forceinline__ void apply_gain(int stage, std::int64_t k0,
                                             float (&squares)[kPasses]) const {
    const int unit = thread % 8 * 8;
    const bool is_float = p.norm_weight_dtype == DType::kFloat32;
    float gain[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::int64_t k = k0 + unit + i;
      gain[i] = k >= p.K   ? 0.f
                : is_float ? static_cast<const float*>(p.norm_weight)[k]
                           : to_float(static_cast<const T*>(p.norm_weight)[k]);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int token = thread / 8 + 16 * i;
      if (token >= kTokens) continue;
      float v[8];
      T* const x = x_row(stage, token) + unit;
      load_vec(x, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares[i] = fmaf(v[j], v[j], squares[i]), v[j] *= gain[j];
      store_vec(x, v);
    }
  }

  __device__ __forceinline__ void multiply(int stage, float (&d)[kParts][kTokens / 8][4]) const {
#pragma unroll
    for (int k = 0; k < kLinearTileK; k += 16) {
      unsigned a[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        ldmatrix_x4(a[part],
                    smem_addr(row_of(stage, part * kLinearTileRows + 16 * warp + lane % 16) + k +
                              lane / 16 * 8));
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        unsigned b[2];
        ldmatrix_x2(b, smem_addr(x_row(stage, 8 * j + lane % 8) + k + lane / 8 % 2 * 8));
#pragma unroll
        for (int part = 0; part < kParts; ++part) mma<T>(d[part][j], a[part], b[0], b[1]);
      }
    }
  }

  __device__ __forceinline__ void write(std::int64_t token, std::int64_t output, float scale,
                                        float v, float up) const {
    if (token >= p.rows || output >= p.outputs) return;
    const T* const bias = static_cast<const T*>(p.bias);
    v *= scale;
    if (bias != nullptr) v += to_float(bias[output]);
    if constexpr (kSwiglu) {
      up *= scale;
      if (bias != nullptr) up += to_float(bias[p.outputs + output]);
      v *= sigmoidf(v) * up;
    }
    if (p.residual != nullptr)
      v += to_float(static_cast<const T*>(p.residual)[token * p.residual_stride + output]);
    static_cast<T*>(p.y)[token * p.outputs + output] = from_float<T>(v);
  }
};

template <typename T, int kTokens, bool kSwiglu, bool kAligned>
__global__ void __launch_bounds__(kThreads) linear_decode_kernel(const LinearDecodeParams p) {
  using Tile = LinearTile<T, kTokens, kSwiglu, kAligned>;
  extern __shared__ __align__(16) char linear_tiles[];
  __shared__ float scales[kTokens];
  const Tile tile{p, reinterpret_cast<T*>(linear_tiles),
                  static_cast<std::int64_t>(blockIdx.x) * kLinearTileRows,
                  static_cast<std::int64_t>(blockIdx.y) * kTokens};
  const std::int64_t steps = (p.K + kLinearTileK - 1) / kLinearTileK;
  float d[Tile::kParts][kTokens / 8][4] = {}, squares[Tile::kPasses] = {};
  for (int s = 0; s < kStages - 1; ++s) tile.load(s, s * kLinearTileK);  // beyond K: zeros
  int stage = 0;
  for (std::int64_t s = 0; s < steps; ++s) {
    cp_async_wait<1>();
    __syncthreads();
    if (p.norm_weight != nullptr) {
      tile.apply_gain(stage, s * kLinearTileK, squares);
      __syncthreads();
    }
    tile.load((stage + kStages - 1) % kStages, (s + kStages - 1) * kLinearTileK);
    tile.multiply(stage, d);
    stage = (stage + 1) % kStages;
  }
  if (p.norm_weight != nullptr) {
#pragma unroll
    for (int i = 0; i < Tile::kPasses; ++i) {
      float sum = squares[i];
#pragma unroll
      for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
      const int token = threadIdx.x / 8 + 16 * i;
      if (threadIdx.x % 8 == 0 && token < kTokens)
        scales[token] = rsqrtf(sum / static_cast<float>(p.K) + static_cast<float>(p.norm_eps));
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * j + tile.lane % 4 * 2 + i % 2;
      const int row = 16 * tile.warp + tile.lane / 4 + i / 2 * 8;
      tile.write(tile.first_token + token, tile.first_output + row,
                 p.norm_weight == nullptr ? 1.f : scales[token], d[0][j][i],
                 d[Tile::kParts - 1][j][i]);
    }
}

template <typename T, int kTokens, bool kSwiglu, bool kAligned>
Status start(const LinearDecodeParams& p, const LinearDecodeConfig& c, CUstream_st* stream) {
  const auto kernel = linear_decode_kernel<T, kTokens, kSwiglu, kAligned>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c.smem_bytes);
  if (error != cudaSuccess) return Status{cudaGetErrorString(error)};
  kernel<<<dim3(static_cast<unsigned>(c.ctas_outputs), static_cast<unsigned>(c.ctas_tokens)),
           c.threads, c.smem_bytes, stream>>>(p);
  return launch_status();
}

template <typename T, int kTokens>
Status with_form(const LinearDecodeParams& p, const LinearDecodeConfig& c, CUstream_st* stream) {
  const bool aligned = rows_aligned<T>(p.K, {p.x, p.weight, p.up_weight},
                                       {p.rows == 1 ? 0 : p.x_stride, p.weight_stride});
  if (p.swiglu)
    return aligned ? start<T, kTokens, true, true>(p, c, stream)
                   : start<T, kTokens, true, false>(p, c, stream);
  return aligned ? start<T, kTokens, false, true>(p, c, stream)
                 : start<T, kTokens, false, false>(p, c, stream);
}

template <typename T>
Status with_tokens(const LinearDecodeParams& p, CUstream_st* stream) {
  const LinearDecodeConfig c = select_linear_decode_config(p.rows, p.outputs, p.swiglu);
  if (c.ctas_outputs >= std::int64_t{1} << 31) return {"weight must have fewer than 2^37 rows"};
  if (c.tokens == 8) return with_form<T, 8>(p, c, stream);
  return c.tokens == 16 ? with_form<T, 16>(p, c, stream) : with_form<T, 32>(p, c, stream);
}

// ---- bias, activation, residual of products in memory: a thread a vector, all reads at once

constexpr int kEndThreads = 128;

// Small, as its code is: between two launches weights pass L2, and both come from HBM.
struct LinearEnds {
  const void *products, *bias, *residual;
  void* y;
  std::int64_t residual_stride;
  int outputs;
};

template <typename T, int kVec, bool kSwiglu>
__global__ void __launch_bounds__(kEndThreads) linear_decode_epilogue_kernel(const LinearEnds e) {
  const std::int64_t row = blockIdx.x;
  const int n = (static_cast<int>(blockIdx.y) * kEndThreads + static_cast<int>(threadIdx.x)) * kVec;
  if (n >= e.outputs) return;
  const auto read = [](const void* from, std::int64_t at, float (&to)[kVec]) {
    load_vec<T, kVec>(static_cast<const T*>(from) + at, to);
  };
  float y[kVec], up[kVec], residual[kVec] = {}, bias[kVec] = {}, up_bias[kVec] = {};
  const std::int64_t at = row * (kSwiglu ? 2 : 1) * e.outputs + n;
  read(e.products, at, y);
  if (kSwiglu) read(e.products, at + e.outputs, up);
  if (e.residual != nullptr) read(e.residual, row * e.residual_stride + n, residual);
  if (e.bias != nullptr) {
    read(e.bias, n, bias);
    if (kSwiglu) read(e.bias, e.outputs + n, up_bias);
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    y[j] += bias[j];
    if (kSwiglu) y[j] *= sigmoidf(y[j]) * (up[j] + up_bias[j]);
    y[j] += residual[j];
  }
  store_vec<T, kVec>(static_cast<T*>(e.y) + row * e.outputs + n, y);
}

template <typename T, int kVec>
Status start_epilogue(const LinearDecodeEnds& e, CUstream_st* stream) {
  constexpr std::int64_t kMostRows = 0x7fffffff, kMostParts = 65535;
  const std::int64_t parts = ceil_div<std::int64_t>(e.p.outputs, kVec * kEndThreads);
  if (e.p.rows > kMostRows || parts > kMostParts)
    return {"at most 2^31 - 1 rows, and 8388480 outputs"};
  const auto kernel = e.p.swiglu ? linear_decode_epilogue_kernel<T, kVec, true>
                                 : linear_decode_epilogue_kernel<T, kVec, false>;
  kernel<<<dim3(static_cast<unsigned>(e.p.rows), static_cast<unsigned>(parts)), kEndThreads, 0,
           stream>>>({e.products, e.p.bias, e.p.residual, e.p.y, e.p.residual_stride,
                      static_cast<int>(e.p.outputs)});
  return launch_status();
}

template <typename T>
Status epilogue(const LinearDecodeEnds& e, CUstream_st* stream) {
  return rows_aligned<T>(e.p.outputs, {e.products, e.p.bias, e.p.residual, e.p.y},
                         {e.p.residual_stride})
             ? start_epilogue<T, 16 / sizeof(T)>(e, stream)
             : start_epilogue<T, 1>(e, stream);
}

}  // namespace

Status linear_decode_epilogue_cuda(const LinearDecodeEnds& e, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(e.p.dtype, epilogue, e, stream);
}

Status linear_decode_portable(const LinearDecodeParams& p, CUstream_st* stream) {
  return p.dtype == DType::kBFloat16 ? with_tokens<__nv_bfloat16>(p, stream)
                                     : with_tokens<__half>(p, stream);
}

Status linear_decode_cuda(const LinearDecodeParams& p, CUstream_st* stream) {
  if (p.rows > kLinearCudaRows) return {"at most 128 rows of x"};
  return takes_sm90() && linear_decode_sm90_takes(p) ? linear_decode_sm90(p, stream)
                                                     : linear_decode_portable(p, stream);
}

bool linear_decode_cuda_takes(const LinearDecodeParams& p) {
  const bool is_plain = p.norm_weight == nullptr && p.bias == nullptr && p.residual == nullptr;
  const LinearDecodeSm90Shape shape{p.rows, p.outputs, p.K, p.swiglu, p.norm_weight != nullptr};
  return p.dtype != DType::kFloat32 &&
         p.rows <= linear_most_rows(shape, is_plain, takes_sm90() && linear_decode_sm90_takes(p));
}

bool linear_project_cuda_takes(const LinearDecodeParams& p, const LinearProjection& also) {
  return p.dtype != DType::kFloat32 && p.rows <= kLinearCudaRows && takes_sm90() &&
         linear_project_sm90_takes(p, also);
}

bool linear_decode_cuda_needs_h(const LinearDecodeParams& p) {
  return p.norm_weight != nullptr && !linear_norms_itself(p.rows, p.K) && takes_sm90() &&
         linear_decode_sm90_takes(p);
}

}  // namespace zebra
