// ssd_scan: S_t = exp(A d_t) S_{t-1} + d_t x_t B_t^T, y_t = S_t C_t + D x_t, then the gate and the
// per-head norm; and its backward.  (Dao and Gu 2024, "Transformers are SSMs", eq. 1 and 2.)
// The contract between registrations and kernels: pointers, shapes, strides in elements.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/status.h"

struct CUstream_st;

namespace zebra {

// Strides of a [B, T, heads, dim] tensor whose last dimension is contiguous.
struct SsdStrides {
  std::int64_t batch, token, head;
};

// Optional tensors are nullptr.  "acc" is fp32, or fp64 where x is fp64.
struct SsdScanParams {
  const void* x;                   // [B, T, x_heads, P] of dtype
  const void* dt;                  // [B, T, H] of dt_dtype
  const void* A;                   // [H] of acc, <= 0
  const void* B;                   // [B, T, b_heads, N] of dtype
  const void* C;                   // [B, T, c_heads, N] of dtype
  const void* D;                   // [H]
  const void* z;                   // [B, T, H, P] of dtype
  const void* dt_bias;             // [H]
  const void* norm_weight;         // [H * P]
  const void* initial_state;       // [sequences, H, P, N] of acc, contiguous
  const std::int32_t* cu_seqlens;  // [sequences + 1]
  void* y;                         // [B, T, H, P] of dtype, contiguous
  void* final_state;               // [sequences, H, P, N] of acc, contiguous
  std::int64_t batch, tokens, heads, x_heads, b_heads, c_heads, head_dim, state_dim, sequences;
  SsdStrides x_stride, dt_stride, b_stride, c_stride, z_stride;  // dt_stride.head is 1
  DType dtype, dt_dtype, d_dtype, dt_bias_dtype, norm_weight_dtype;
  bool dt_softplus;
  double norm_eps;
};

struct SsdScanBackwardParams {
  SsdScanParams in;          // y and final_state are not used
  const void* dy;            // [B, T, H, P] of dtype, contiguous
  const void* dfinal_state;  // [sequences, H, P, N] of acc, contiguous; or nullptr
  // Gradients, contiguous, each of its input's shape and dtype; nullptr without the input.
  void *dx, *ddt, *dA, *dB, *dC, *dD, *dz, *ddt_bias, *dnorm_weight, *dinitial_state;
  // Workspaces of acc.  sums [sequences, H, 3 + P]: dA, dD, ddt_bias and dnorm_weight of one
  // sequence.  The others hold a partial gradient for each block of heads, [H / block, B, T, dim],
  // where more heads share a group than one block holds; nullptr otherwise.
  void *sums, *dx_partial, *dB_partial, *dC_partial;
};

// Heads that one task of the backward pass walks together.  A block holds whole groups of x, B and
// C or divides them, and depends on shapes only, so sums over a group have one order on every
// machine.
constexpr std::int64_t ssd_scan_head_block(std::int64_t heads, std::int64_t x_heads,
                                           std::int64_t b_heads, std::int64_t c_heads) {
  constexpr std::int64_t kMost = 8;  // keeps the states of a block in the L2 cache
  const std::int64_t shared[3] = {heads / x_heads, heads / b_heads, heads / c_heads};
  std::int64_t largest = 1;
  for (const std::int64_t r : shared) largest = r > largest ? r : largest;
  for (std::int64_t block = largest < kMost ? largest : kMost; block > 1; --block) {
    bool fits = heads % block == 0;
    for (const std::int64_t r : shared) fits = fits && (block % r == 0 || r % block == 0);
    if (fits) return block;
  }
  return 1;
}

// 16-bit dtypes, P and N of 64 or 128, x, B, C and z in 16-byte units.  `workspace`: device memory
// of ssd_scan_cuda_workspace(p) bytes, which depends on shapes only.
std::int64_t ssd_scan_cuda_workspace(const SsdScanParams& p);
Status ssd_scan_cuda(const SsdScanParams& p, void* workspace, CUstream_st* stream);
Status ssd_scan_portable(const SsdScanParams& p, CUstream_st* stream);  // every GPU from sm_80 on
std::int64_t ssd_scan_sm90_workspace(const SsdScanParams& p);
Status ssd_scan_sm90(const SsdScanParams& p, void* workspace, CUstream_st* stream);

}  // namespace zebra

ZEBRA_CPU_KERNEL(ssd_scan, ::zebra::SsdScanParams)
ZEBRA_CPU_KERNEL(ssd_scan_backward, ::zebra::SsdScanBackwardParams)
