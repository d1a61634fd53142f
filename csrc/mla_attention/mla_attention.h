// mla_attention: attention of expanded latents, grouped KV heads and one rope key for all heads.
//   s_j = scale (q_nope,h . k_nope,g,j + q_rope,h . k_rope,j);  o_h = sum_j softmax(s)_j v_g,j
// The contract between registrations and kernels: pointers, shapes, strides in elements.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/math.h"
#include "common/status.h"

struct CUstream_st;

namespace zebra {

// The inputs of both passes.  Sequence i has tokens cu_seqlens[i] to cu_seqlens[i + 1] of row 0, or
// is row i of the batch; its T queries are the last of its S keys.
struct MlaAttentionShape {
  const void* q;       // [B, T, H, nope + E]
  const void* kv;      // [B, S, G, nope + v_dim]
  const void* k_rope;  // [B, S, E]
  const std::int32_t* cu_seqlens;
  std::int64_t sequences;
  std::int64_t B, T, S, H, G, nope, E, v_dim;
  std::int64_t q_stride[3], kv_stride[3], rope_stride[2];  // the last dimension is contiguous
  double scale;
  bool causal;
  DType dtype;
  bool use_amx;  // CPU: cpu_has_amx_bf16()
};

struct MlaAttentionParams {
  MlaAttentionShape in;
  void* o;    // [B, T, H, v_dim] contiguous
  void* lse;  // [B, T, H] fp32 (fp64 for fp64 q)
};

// With P = exp(s - lse):  dS = scale P (dO v - sum(dO o) + dlse)
//   dq = dS k,  dk = dS^T q,  dv = P^T dO,  dk_rope summed over all heads
struct MlaAttentionBackwardParams {
  MlaAttentionShape in;
  const void *o, *lse;  // contiguous
  const void* dout;     // [B, T, H, v_dim] contiguous
  const void* dlse;     // [B, T, H] contiguous like lse, or nullptr
  void* dq;             // [B, T, H, nope + E] contiguous
  void* dkv;            // [B, S, G, nope + v_dim] contiguous
  void* dk_rope;        // [B, S, E] contiguous
  void* partial;        // [G, B, S, E] fp32 (fp64): dk_rope of each KV head
};

// What surrounds the attention of a library on a GPU, 16 bit.  Widths and strides are multiples of
// 8, pointers of 16 bytes.
//   key = [kv's nope part | k_rope, the same for every g]
struct MlaKeysParams {
  const void* kv;      // [B, S, G, nope + ...], last dimension contiguous
  const void* k_rope;  // [B, S, E]
  void* key;           // [B, S, G, nope + E] contiguous
  std::int64_t B, S, G, nope, E;
  std::int64_t kv_stride[3], rope_stride[2];
};

//   dkv = [dkey's nope part | dvalue],  dk_rope = the rope part of dkey summed over g
struct MlaKeyGradientsParams {
  const void* dkey;    // [B, S, G, nope + E], last dimension contiguous
  const void* dvalue;  // [B, S, G, v_dim]
  void* dkv;           // [B, S, G, nope + v_dim] contiguous
  void* dk_rope;       // [B, S, E] contiguous
  std::int64_t B, S, G, nope, E, v_dim;
  std::int64_t key_stride[3], value_stride[3];
  DType dtype;
};

Status mla_attention_keys_cuda(const MlaKeysParams& p, CUstream_st* stream);
Status mla_attention_key_gradients_cuda(const MlaKeyGradientsParams& p, CUstream_st* stream);

}  // namespace zebra

ZEBRA_CPU_KERNEL(mla_attention, ::zebra::MlaAttentionParams)
ZEBRA_CPU_KERNEL(mla_attention_backward, ::zebra::MlaAttentionBackwardParams)
