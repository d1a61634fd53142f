// ssd_scan, forward, for every GPU from sm_80 on: mma.sync, ldmatrix, cp.async.
//
// Computes       y and the final state of ssd_scan.h for 16-bit dtypes, P and N of 64 or 128.
// Grid           sequences x heads, heads fastest, so that heads of a group share x and B in L2.  A
//                CTA walks its sequence from its own start: a result does not depend on packing.
// Tiles          ssd_scan_config.h: chunks of 32 tokens, a warp for 16 rows of P and all of N.  The
//                state stays in fp32 registers, transposed (ssd_scan_portable.cuh).
// Shared memory  two stages of x, z, B and C by cp.async, the scores, the decays of two chunks and
//                the output on its way to whole rows: 77 KiB at P = N = 128, 57 to 61 KiB at 64 and
//                128, 41 KiB at 64.  16-byte segments are permuted by row: no bank conflicts.
// Barriers       three a chunk: inputs there, scores there, sums of the norm there (with it only).
// Registers      at most 128 (two CTAs of 256 threads, four of 128), 168 at P = 64, N = 128 (three
//                by shared memory); no spills.  What a whole CTA shares stays in shared memory.
// Decay          the cumulative sums of a chunk in fp64, kept as two floats: exp2(s_i - s_j) keeps
//                its digits after a huge step.
// Tail           tokens beyond the end have no step and zero rows: 0 * NaN is NaN in a product.
// Bound          shared memory: at P = N = 128 a chunk reads 220 KB of operands, 1730 clk at 128
//                B/clk, against 620 products of 16 x 8 x 16, about 1000 clk.
// Predicted      one H200, 32 heads of 128 x 128: 0.12 ms per 16,384 tokens were nothing in its
//                way, twice that with barriers.  Few long sequences leave multiprocessors idle.
// Measured       H200, 2026-11-28, ZEBRA_PORTABLE=1: the same heads, 8 x 2048 tokens 0.22 ms,
//                2 x 8192 0.58 ms (the Hopper kernels 0.18).
//                benchmarks/bench_ssd_scan.py --device cuda
#include "common/cuda/launch.h"
#include "ssd_scan/ssd_scan_portable.cuh"

namespace zebra {
namespace {

template <typename T, int P, int N>
Status launch(const SsdScanParams& p, CUstream_st* stream) {
  const SsdScanConfig c = select_ssd_scan_config(p.sequences, p.heads, P, N);
  const auto kernel = ssd_scan_kernel<T, P, N>;
  const Status s = allow_shared_memory(kernel, c.smem_bytes);
  if (s.error != nullptr) return s;
  kernel<<<static_cast<unsigned>(c.ctas), c.threads, c.smem_bytes, stream>>>(p);
  return launch_status();
}

template <typename T>
Status with_dims(const SsdScanParams& p, CUstream_st* stream) {
  if (p.head_dim == 64 && p.state_dim == 64) return launch<T, 64, 64>(p, stream);
  if (p.head_dim == 64 && p.state_dim == 128) return launch<T, 64, 128>(p, stream);
  if (p.head_dim == 128 && p.state_dim == 64) return launch<T, 128, 64>(p, stream);
  if (p.head_dim == 128 && p.state_dim == 128) return launch<T, 128, 128>(p, stream);
  return Status{"P and N must each be 64 or 128 on CUDA in 16 bit"};
}

}  // namespace

Status ssd_scan_portable(const SsdScanParams& p, CUstream_st* stream) {
  constexpr std::int64_t kInt = std::int64_t{1} << 31;
  if (p.tokens >= kInt - 2 * kChunk || p.sequences * p.heads >= kInt)
    return Status{"x must have fewer than 2^31 tokens, and sequences times heads be below 2^31"};
  if (p.sequences == 0) return Status{};
  return p.dtype == DType::kFloat16 ? with_dims<__half>(p, stream)
                                    : with_dims<__nv_bfloat16>(p, stream);
}

std::int64_t ssd_scan_cuda_workspace(const SsdScanParams& p) {
  return takes_sm90() ? ssd_scan_sm90_workspace(p) : 0;
}

Status ssd_scan_cuda(const SsdScanParams& p, void* workspace, CUstream_st* stream) {
  return takes_sm90() ? ssd_scan_sm90(p, workspace, stream) : ssd_scan_portable(p, stream);
}

}  // namespace zebra
