// linear_decode on CUDA: the choice between the Hopper kernel and ATen's product, and what follows
// a product that ATen made.  GPUs before and after Hopper take ATen's always: a kernel of mma.sync
// and cp.async for them was up to 8 times slower on an H200.
//
// Computes       y = act(products + b) + residual of linear_decode.h, of any dtype and rows.
// Threads        a vector of 16 bytes each, read at once; an element where rows are not aligned.
// Bound          memory: as long as PyTorch's addition where there is a residual alone.
#include "common/cuda/launch.h"
#include "common/cuda/vec.cuh"
#include "linear_decode/linear_decode.h"
#include "linear_decode/linear_decode_sm90_config.h"

namespace zebra {
namespace {

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

bool linear_decode_cuda_takes(const LinearDecodeParams& p) {
  const bool is_plain = p.norm_weight == nullptr && p.bias == nullptr && p.residual == nullptr;
  const LinearDecodeSm90Shape shape{p.rows, p.outputs, p.K, p.swiglu, p.norm_weight != nullptr};
  return p.dtype != DType::kFloat32 && takes_sm90() && linear_decode_sm90_takes(p) &&
         p.rows <= linear_most_rows(shape, is_plain);
}

bool linear_project_cuda_takes(const LinearDecodeParams& p, const LinearProjection& also) {
  return p.dtype != DType::kFloat32 && p.rows <= kLinearMostTokens && takes_sm90() &&
         linear_project_sm90_takes(p, also);
}

bool linear_decode_cuda_needs_h(const LinearDecodeParams& p) {
  return p.norm_weight != nullptr && !linear_norms_itself(p.rows, p.K);
}

}  // namespace zebra
