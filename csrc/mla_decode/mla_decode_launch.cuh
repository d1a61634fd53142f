// mla_decode on CUDA: how its kernels are launched, by cp.async or by TMA.
#pragma once

#include "common/cuda/launch.h"
#include "mla_decode/mla_decode_combine.cuh"
#include "mla_decode/mla_decode_kernel.cuh"

namespace zebra {
namespace {

inline int mla_attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

inline std::int64_t mla_max_tokens(const MlaDecodeParams& p) {
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 8192;  // sums of tokens stay in int
  if (p.pages == 0) return 0;
  return p.max_pages > kMost / p.page ? kMost : p.max_pages * p.page;
}

inline MlaDecodeConfig mla_config(const MlaDecodeParams& p, bool tma) {
  return select_mla_decode_config({p.B, p.T * p.H, p.R, p.E, mla_max_tokens(p), p.split_size, tma},
                                  mla_attribute(cudaDevAttrMultiProcessorCount),
                                  mla_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// The arguments of a launch, or why there can be none.
inline Status mla_arguments(const MlaDecodeParams& p, const MlaDecodeConfig& c, void* workspace,
                            MlaArgs& a) {
  a.p = p;
  a.c = c;
  a.max_tokens = static_cast<int>(mla_max_tokens(p));
  constexpr std::int64_t kInt = std::int64_t{1} << 31;
  const std::int64_t items = p.B * c.passes;
  if (p.T * p.H >= kInt / 2 || p.page >= kInt || p.pages >= kInt || items >= kInt / 2)
    return {"T * H, pages, page and B * T * H / 128 must be below 2^30"};
  if (items * (a.max_tokens / c.stage + 3) >= kInt)
    return {
        "the cached tokens that block_table has room for, over all sequences, must be below "
        "2^36"};
  char* const base = static_cast<char*>(workspace);
  a.stats = reinterpret_cast<float2*>(base);
  a.sums = reinterpret_cast<float*>(base + c.sums_offset);
  a.units = reinterpret_cast<MlaUnit*>(base + c.units_offset);
  return {};
}

template <typename T>
Status mla_launch_combine(const MlaArgs& a, cudaStream_t stream) {
  const int rows = 16 * a.c.groups, per_cta = kMlaWarps / a.c.combine_warps;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(a.c.units), ceil_div(rows, per_cta));
  launch.blockDim = dim3(32 * kMlaWarps);
  launch.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  launch.attrs = &early;
  launch.numAttrs = mla_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&launch, mla_combine_kernel<T>, a);
  return error == cudaSuccess ? launch_status() : Status{cudaGetErrorString(error)};
}

template <typename T, int kRank, int kRope, bool kTma>
Status mla_launch(const MlaArgs& a, const MlaMaps& maps, cudaStream_t stream) {
  const auto kernel = mla_decode_kernel<T, kRank, kRope, kTma>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.c.smem_bytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  kernel<<<a.c.ctas, 32 * kMlaWarps, a.c.smem_bytes, stream>>>(a, maps);
  const Status s = launch_status();
  return s.error != nullptr || a.c.units == 0 ? s : mla_launch_combine<T>(a, stream);
}

template <typename T, bool kTma>
Status mla_launch(const MlaArgs& a, const MlaMaps& maps, cudaStream_t stream) {
  const bool narrow = a.c.rope == 32;
  switch (a.c.rank) {
    case 64:
      return narrow ? mla_launch<T, 64, 32, kTma>(a, maps, stream)
                    : mla_launch<T, 64, 64, kTma>(a, maps, stream);
    case 96:
      return mla_launch<T, 96, 64, kTma>(a, maps, stream);
    case 128:
      return narrow ? mla_launch<T, 128, 32, kTma>(a, maps, stream)
                    : mla_launch<T, 128, 64, kTma>(a, maps, stream);
    case 160:
      return mla_launch<T, 160, 64, kTma>(a, maps, stream);
    case 192:
      return mla_launch<T, 192, 64, kTma>(a, maps, stream);
    default:
      return mla_launch<T, 256, 64, kTma>(a, maps, stream);
  }
}

template <bool kTma>
Status mla_launch(const MlaArgs& a, const MlaMaps& maps, cudaStream_t stream) {
  return a.p.dtype == DType::kBFloat16 ? mla_launch<__nv_bfloat16, kTma>(a, maps, stream)
                                       : mla_launch<__half, kTma>(a, maps, stream);
}

}  // namespace
}  // namespace zebra
