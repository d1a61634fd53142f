// mamba2_step: one token of a Mamba2 mixer between its two projections, for rows of a batch that
// own one state slot each.  The contract between registrations and kernels.
//
//   [x | B | C] = silu(conv(conv_state, [x | B | C])),   d = softplus(dt + dt_bias)
//   S = exp(A d) S + d x B^T,   y = S C + D x,   u = y silu(z),   y = w u / sqrt(mean_P(u^2) + eps)
//
// x and B have G heads (KV heads), C, dt, z and the state have H: head h reads group h / (H / G).
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/status.h"

struct CUstream_st;

namespace zebra {

struct Mamba2StepParams {
  const void* zxbcdt;  // [batch, z(H P) | x(G P) | B(G N) | C(H N) | dt(H)], row stride row_stride
  void* conv_state;    // [slots, channels, width - 1], slot stride conv_slot_stride
  void* ssm_state;     // [slots, H, P, N] of state_dtype, slot stride ssm_slot_stride
  const void* conv_weight;            // [channels, width]
  const void* conv_bias;              // [channels] or nullptr
  const void* dt_bias;                // [H]
  const void* A;                      // [H] fp32 (fp64 for fp64)
  const void* D;                      // [H]
  const void* norm_weight;            // [H P] or nullptr: no norm
  const std::int32_t* state_indices;  // [batch], negative: padding row; or nullptr: row b, slot b
  void* y;                            // [batch, H P] contiguous
  float* conv;                        // CUDA: scratch [batch, channels] for silu(conv(...))
  std::int64_t slots, batch, heads, headdim, d_state, groups, width;
  std::int64_t row_stride, conv_slot_stride, ssm_slot_stride;
  bool A_is_log;  // A holds log(-A)
  DType dtype, state_dtype;
  DType conv_weight_dtype, conv_bias_dtype, dt_bias_dtype, D_dtype, norm_weight_dtype;
  double norm_eps;
};

// A slot that the state does not have gives a row of NaN and touches nothing.
Status mamba2_step_cuda(const Mamba2StepParams& p, CUstream_st* stream);

}  // namespace zebra

ZEBRA_CPU_KERNEL(mamba2_step, ::zebra::Mamba2StepParams)
