// mla_decode: absorbed latent attention over the paged cache (DeepSeek-V2, section 2.1.3).
//   q~ = U_k^T q_nope;  p = softmax(scale (q~ . c + q_rope . k_rope));  o = U_v sum p c
// The contract between registrations and kernels: pointers, shapes, strides in elements.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/math.h"
#include "common/status.h"

struct CUstream_st;

namespace zebra {

struct MlaDecodeParams {
  const void* q;                    // [B, T, H, q_dim], strides q_stride, contiguous last
  const void* cache;                // [pages, page, R + E]
  const void* weight;               // [G, nope + v_dim, R] contiguous, or nullptr: latent queries
  const std::int32_t* block_table;  // [B, max_pages], row stride table_stride
  const std::int32_t* seq_lens;     // [B], the T new tokens included
  void* o;                          // [B, T, H, v_dim] contiguous; v_dim = R for latent queries
  void* lse;                        // [B, T, H] fp32 (fp64 for fp64 q)
  std::int64_t B, T, H, G, R, E;
  std::int64_t nope, v_dim;
  std::int64_t pages, page, max_pages;
  std::int64_t q_stride[3], page_stride, row_stride, table_stride, seq_lens_stride;
  std::int64_t split_size;  // cached tokens of one partial result
  double scale;
  DType dtype;
  bool use_amx;  // CPU: cpu_has_amx_bf16()
};

// Tokens of a partial result on the CPU.  A constant, so that the result of a sequence depends
// neither on the number of threads nor on the rest of its batch.
constexpr std::int64_t kMlaDecodeCpuSplit = 512;

// CUDA: 16-bit dtypes, what mla_decode_cuda_takes() on this GPU; cache, weight and o in 16-byte
// units, q in 4-byte units.  `workspace`: device memory of mla_decode_cuda_workspace(p) bytes,
// which depends on shapes only.
bool mla_decode_cuda_takes(const MlaDecodeParams& p);
std::int64_t mla_decode_cuda_workspace(const MlaDecodeParams& p);
Status mla_decode_cuda(const MlaDecodeParams& p, void* workspace, CUstream_st* stream);
Status mla_decode_portable(const MlaDecodeParams& p, void* workspace, CUstream_st* stream);
Status mla_decode_sm90(const MlaDecodeParams& p, void* workspace, CUstream_st* stream);
Status mla_decode_wide(const MlaDecodeParams& p, void* workspace, CUstream_st* stream);

}  // namespace zebra

ZEBRA_CPU_KERNEL(mla_decode, ::zebra::MlaDecodeParams)
