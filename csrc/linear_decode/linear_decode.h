// linear_decode: y = act(W norm(x) + b) + residual for few rows of x, where reading W is the cost.
// The contract between registrations and kernels.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/rope.h"
#include "common/status.h"

struct CUstream_st;

namespace zebra {

struct LinearDecodeParams {
  const void* x;            // [rows, K], row stride x_stride
  const void* weight;       // [outputs, K], row stride weight_stride; swiglu: the gate rows
  const void* up_weight;    // swiglu: the up rows, like weight
  const void* norm_weight;  // [K] of norm_weight_dtype, or nullptr: no norm
  const void* bias;         // [outputs] ([2 outputs]) or nullptr
  const void* residual;     // [rows, outputs], row stride residual_stride, or nullptr
  void* y;                  // [rows, outputs] contiguous
  std::int64_t rows, outputs, K;
  std::int64_t x_stride, weight_stride, residual_stride;
  DType dtype, norm_weight_dtype;
  bool swiglu;  // y = silu(gate) up; of b the first and the last `outputs`
  double norm_eps;
  bool use_amx = false;  // CPU: multiply in bf16 on the matrix unit
  void* h = nullptr;     // CUDA: workspace [rows, K] where linear_decode_cuda_needs_h()
};

// The two ends of the same operator around a matrix product that is done elsewhere: norm(x) into
// h [rows, K], and bias, activation and residual from the products [rows, outputs (2 outputs)].
struct LinearDecodeEnds {
  LinearDecodeParams p;
  void* h;
  const void* products;
};

// For latent attention: both products of a norm(x) in one launch, their rotary parts turned, and
// the second one's rows stored in a paged cache as well.
struct LinearProjection {
  const void* weight;    // the second: [outputs, K], row stride weight_stride
  void* y;               // [rows, outputs] contiguous
  std::int64_t outputs;  // 0: there is no second weight
  std::int64_t weight_stride;
  RopeTable rope;                    // of the last E outputs of the second weight
  std::int64_t head;                 // and of every `head` of the first one's; 0: of none
  void* cache;                       // [pages, page, outputs], or nullptr
  const std::int64_t* slot_mapping;  // [rows]: page index * page + offset, negative: not stored
  std::int64_t pages, page, page_stride, row_stride;
};

// On CUDA: whether the Hopper kernel takes p, and is faster than ATen's product.
bool linear_decode_cuda_takes(const LinearDecodeParams& p);
bool linear_decode_cuda_needs_h(const LinearDecodeParams& p);  // norm(x) then goes through memory
// What follows products that ATen made, of any rows and dtype.
Status linear_decode_epilogue_cuda(const LinearDecodeEnds& e, CUstream_st* stream);
// The Hopper kernel: 16-bit dtypes, at most 128 rows; x, W and norm_weight in units of 16 bytes.
bool linear_decode_sm90_takes(const LinearDecodeParams& p);
Status linear_decode_sm90(const LinearDecodeParams& p, CUstream_st* stream);
// The same kernel with a projection; p without activation, bias and residual.  A position outside
// the tables gives NaN, a slot outside the cache is not stored.
bool linear_project_cuda_takes(const LinearDecodeParams& p, const LinearProjection& also);
bool linear_project_sm90_takes(const LinearDecodeParams& p, const LinearProjection& also);
Status linear_project_sm90(const LinearDecodeParams& p, const LinearProjection& also,
                           CUstream_st* stream);

}  // namespace zebra

ZEBRA_CPU_KERNEL(linear_decode, ::zebra::LinearDecodeParams)
ZEBRA_CPU_KERNEL(linear_decode_norm, ::zebra::LinearDecodeEnds)
ZEBRA_CPU_KERNEL(linear_decode_epilogue, ::zebra::LinearDecodeEnds)
