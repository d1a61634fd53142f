// mla_decode on GPUs from sm_80 on: the choice of a kernel and its launch.
#include <cstring>

#include "common/cuda/launch.h"
#include "mla_decode/mla_decode_combine.cuh"
#include "mla_decode/mla_decode_kernel.cuh"

namespace zebra {
namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

std::int64_t max_tokens(const MlaDecodeParams& p) {
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 8192;  // sums of tokens stay in int
  if (p.pages == 0) return 0;
  return p.max_pages > kMost / p.page ? kMost : p.max_pages * p.page;
}

MlaDecodeConfig config_of(const MlaDecodeParams& p) {
  return select_mla_decode_config({p.B, p.T * p.H, p.R, p.E, max_tokens(p), p.split_size},
                                  attribute(cudaDevAttrMultiProcessorCount),
                                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <typename T>
Status combine(const MlaArgs& a, cudaStream_t stream) {
  const int rows = 16 * a.c.groups, per_cta = kMlaWarps / a.c.combine_warps;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(a.c.units), ceil_div(rows, per_cta));
  launch.blockDim = dim3(32 * kMlaWarps);
  launch.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  launch.attrs = &early;
  launch.numAttrs = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&launch, mla_combine_kernel<T>, a);
  return error == cudaSuccess ? launch_status() : Status{cudaGetErrorString(error)};
}

template <typename T, int kRank, int kRope>
Status run(const MlaArgs& a, cudaStream_t stream) {
  const auto kernel = mla_decode_kernel<T, kRank, kRope>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.c.smem_bytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  kernel<<<a.c.ctas, 32 * kMlaWarps, a.c.smem_bytes, stream>>>(a);
  const Status s = launch_status();
  return s.error != nullptr || a.c.units == 0 ? s : combine<T>(a, stream);
}

template <typename T>
Status run(const MlaArgs& a, cudaStream_t stream) {
  switch (a.c.rank) {
    case 64:
      return a.c.rope == 32 ? run<T, 64, 32>(a, stream) : run<T, 64, 64>(a, stream);
    case 96:
      return run<T, 96, 64>(a, stream);
    case 128:
      return a.c.rope == 32 ? run<T, 128, 32>(a, stream) : run<T, 128, 64>(a, stream);
    case 160:
      return run<T, 160, 64>(a, stream);
    case 192:
      return run<T, 192, 64>(a, stream);
    default:
      return run<T, 256, 64>(a, stream);
  }
}

}  // namespace

std::int64_t mla_decode_cuda_workspace(const MlaDecodeParams& p) {
  return config_of(p).workspace_bytes;
}

Status mla_decode_cuda(const MlaDecodeParams& p, void* workspace, cudaStream_t stream) {
  MlaArgs a;
  std::memset(&a, 0, sizeof(a));
  a.p = p;
  a.c = config_of(p);
  constexpr std::int64_t kInt = std::int64_t{1} << 31;
  a.max_tokens = static_cast<int>(max_tokens(p));
  const std::int64_t items = p.B * a.c.passes;
  if (p.T * p.H >= kInt / 2 || p.page >= kInt || p.pages >= kInt || items >= kInt / 2)
    return {"T * H, pages, page and B * T * H / 128 must be below 2^30"};
  if (items * (a.max_tokens / kMlaBlock + 3) >= kInt)
    return {
        "the cached tokens that block_table has room for, over all sequences, must be below "
        "2^36"};
  char* const base = static_cast<char*>(workspace);
  a.stats = reinterpret_cast<float2*>(base);
  a.sums = reinterpret_cast<float*>(base + a.c.sums_offset);
  a.units = reinterpret_cast<MlaUnit*>(base + a.c.units_offset);
  return p.dtype == DType::kBFloat16 ? run<__nv_bfloat16>(a, stream) : run<__half>(a, stream);
}

}  // namespace zebra
