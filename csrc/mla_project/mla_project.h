// mla_project: what follows the projections of latent attention, in one pass over each token:
//   q's rope parts rotated in place;  latent = [c | rotated k];  optionally latent -> paged cache
// and its transpose.  The matrix products around it are aten's.
// The contract between registrations and kernels: pointers, shapes, strides in elements.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/rope.h"
#include "common/status.h"

struct CUstream_st;

namespace zebra {

struct MlaProjectParams {
  RopeTable rope;
  void* q;                           // [tokens, H, q_dim], changed in place
  const void *c, *k;                 // [tokens, R] and [tokens, E], row strides c_stride, k_stride
  void* latent;                      // [tokens, R + E]; CUDA: c and k may lie in it already
  void* cache;                       // [pages, page, R + E], or nullptr
  const std::int64_t* slot_mapping;  // [tokens]: page * page_size + offset, negative: not stored
  std::int64_t tokens, H, q_dim, R;
  std::int64_t c_stride, k_stride;
  std::int64_t pages, page, page_stride, row_stride;
  DType dtype;
};

struct MlaProjectBackwardParams {
  RopeTable rope;
  const void* dq;       // [tokens, H, q_dim]
  const void *dc, *dk;  // [tokens, R] and [tokens, E], row strides dc_stride, dk_stride
  void* dq_raw;         // [tokens, H, q_dim], row stride dq_raw_stride: before the rotation
  void* dkv_raw;        // [tokens, R + E], row stride dkv_raw_stride: the same of [c | k]
  std::int64_t tokens, H, q_dim, R;
  std::int64_t dc_stride, dk_stride, dq_raw_stride, dkv_raw_stride;
  DType dtype;
};

Status mla_project_cuda(const MlaProjectParams& p, CUstream_st* stream);
Status mla_project_backward_cuda(const MlaProjectBackwardParams& p, CUstream_st* stream);

}  // namespace zebra

ZEBRA_CPU_KERNEL(mla_project, ::zebra::MlaProjectParams)
ZEBRA_CPU_KERNEL(mla_project_backward, ::zebra::MlaProjectBackwardParams)
