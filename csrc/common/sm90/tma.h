// Tensor maps of the bulk copy engine: encoded on the host, free of libcuda at link time.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

#include "common/status.h"

namespace zebra::sm90 {

// One dimension of a tensor and of the box that a copy moves, innermost first.
struct TmaDim {
  std::uint64_t size;    // elements
  std::uint64_t stride;  // elements; that of the innermost dimension is 1
  std::uint32_t box;     // elements
};

// Encodes a map over 16-bit elements whose boxes land in shared memory in a swizzle, by default of
// 128 bytes (the innermost box is then 64 elements).  Coordinates outside read as zero and are not
// written.  `promotion`: what L2 fetches at least of a line or two that a box touches.  256 bytes
// cap a kernel that memory bounds at 4.1 TB/s of an H200's 4.4 (docs/kernels/linear_decode.md); one
// that waits for latencies may find its next box in L2.
inline Status encode_tensor_map(
    CUtensorMap* map, bool bf16, const void* base, std::initializer_list<TmaDim> dims,
    CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B,
    CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(entry)
               : nullptr;
  }();
  if (encode == nullptr) return {"the driver has no cuTensorMapEncodeTiled (CUDA 12 is needed)"};
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], ones[5];
  int rank = 0;
  for (const TmaDim& d : dims) {
    sizes[rank] = d.size;
    if (rank > 0) strides[rank - 1] = d.stride * 2;
    box[rank] = d.box;
    ones[rank++] = 1;
  }
  const CUresult result =
      encode(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             static_cast<cuuint32_t>(rank), const_cast<void*>(base), sizes, strides, box, ones,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return {
        "cuTensorMapEncodeTiled refused a tensor (base and strides must be multiples of 16 bytes)"};
  return {};
}

}  // namespace zebra::sm90
