// causal_conv1d: pre[t] = bias + sum_w weight[w] x[t - (W-1) + w],  y = act(pre), channels last.
// The contract between registrations and kernels: pointers, shapes, strides in elements.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/status.h"

struct CUstream_st;

namespace zebra {

// What forward and backward read.  Sequence i is batch row i, or, with cu_seqlens (batch == 1),
// tokens cu_seqlens[i] to cu_seqlens[i + 1]; rows before its first token are initial_state[i], or
// zero.
struct CausalConv1dInputs {
  const void* x;                   // [batch, tokens, channels]
  const void* weight;              // [channels, width] of weight_dtype
  const void* bias;                // [channels] of bias_dtype, or nullptr
  const void* initial_state;       // [sequences, channels, width - 1] like x, or nullptr
  const std::int32_t* cu_seqlens;  // [sequences + 1], or nullptr
  std::int64_t batch, tokens, channels, sequences;
  std::int64_t x_batch_stride, x_row_stride;
  int width;  // 2 to 4
  bool silu;
  DType dtype, weight_dtype, bias_dtype;
};

struct CausalConv1dParams {
  CausalConv1dInputs in;
  void* y;            // [batch, tokens, channels] contiguous
  void* final_state;  // [sequences, channels, width - 1] contiguous: the last width - 1 rows
};

// dpre = dy act'(pre);  dx[t] = sum_w weight[w] dpre[t + (W-1) - w], within the sequence;
// dweight[w] = sum_t dpre[t] x[t - (W-1) + w];  dbias = sum_t dpre[t]
struct CausalConv1dBackwardParams {
  CausalConv1dInputs in;
  const void* dy;            // [batch, tokens, channels] like x
  const void* dfinal_state;  // [sequences, channels, width - 1] contiguous, or nullptr
  void* dx;                  // [batch, tokens, channels] contiguous
  void* dweight;             // [channels, width] of weight_dtype
  void* dbias;               // [channels] of bias_dtype; nullptr without a bias
  void* dinitial_state;      // like initial_state; nullptr without one
  void* partial;             // [partials, width + 1, channels] fp32 (fp64): sums of token groups
  std::int64_t dy_batch_stride, dy_row_stride;
  std::int64_t tile, tiles, items, partials;  // causal_conv1d_config.h
};

struct CausalConv1dStepParams {
  const void* x;       // [batch, channels], row stride x_stride
  void* conv_state;    // [slots, channels, width - 1], slot stride state_stride
  const void* weight;  // [channels, width] of weight_dtype
  const void* bias;    // [channels] of bias_dtype, or nullptr
  const std::int32_t*
      state_indices;  // [batch] slots, negative: a padding row; nullptr: row i, slot i
  void* y;            // [batch, channels] contiguous
  std::int64_t batch, channels, slots;
  std::int64_t x_stride, state_stride;
  int width;
  bool silu;
  DType dtype, weight_dtype, bias_dtype;
};

Status causal_conv1d_cuda(const CausalConv1dParams& p, CUstream_st* stream);
Status causal_conv1d_backward_cuda(const CausalConv1dBackwardParams& p, CUstream_st* stream);
Status causal_conv1d_step_cuda(const CausalConv1dStepParams& p, CUstream_st* stream);

}  // namespace zebra

ZEBRA_CPU_KERNEL(causal_conv1d, ::zebra::CausalConv1dParams)
ZEBRA_CPU_KERNEL(causal_conv1d_backward, ::zebra::CausalConv1dBackwardParams)
ZEBRA_CPU_KERNEL(causal_conv1d_step, ::zebra::CausalConv1dStepParams)
