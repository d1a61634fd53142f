// ssd_scan: the tile of the portable CUDA kernel.  Pure, so that tests can print and check the
// choice.
#pragma once

#include <cstdint>

namespace zebra {

// A CTA walks one (sequence, head) in chunks of tokens, a warp for 16 rows of the head dimension.
struct SsdScanConfig {
  int threads;
  int chunk;        // tokens
  int ctas_per_sm;  // that registers are budgeted for
  int smem_bytes;   // of a CTA
  std::int64_t ctas;
};

constexpr int kSsdScanChunk = 32;     // the decays of a chunk are the lanes of a warp
constexpr int kSsdScanStages = 2;     // chunks of inputs in shared memory
constexpr int kSsdScanScoreRow = 40;  // elements; an odd number of 16-byte words: no bank conflicts

// The sizes of P and of N that the CUDA kernels take.
constexpr bool ssd_scan_takes(std::int64_t size) { return size == 64 || size == 128; }

constexpr int ssd_scan_threads(int head_dim) { return 2 * head_dim; }

constexpr int ssd_scan_smem_bytes(int head_dim, int state_dim) {
  const int inputs = kSsdScanStages * kSsdScanChunk * 2 * (head_dim + state_dim);  // x, z, B, C
  const int staged = kSsdScanChunk * (head_dim + kSsdScanScoreRow);                // y, scores
  const int decays = (2 * 5 + 1) * kSsdScanChunk, sums = head_dim / 16 * kSsdScanChunk;
  const int constants = 20 + head_dim;  // the weight of the norm among them
  return 2 * (inputs + staged) + 4 * (decays + constants + sums);
}

// As many as run at once where shared memory is largest (227 KB, H200), at 128 registers or more.
constexpr int ssd_scan_ctas_per_sm(int head_dim, int state_dim) {
  const int by_memory = 227 * 1024 / (ssd_scan_smem_bytes(head_dim, state_dim) + 1024);
  const int by_registers = 512 / ssd_scan_threads(head_dim);
  return by_memory < by_registers ? by_memory : by_registers;
}

constexpr SsdScanConfig select_ssd_scan_config(std::int64_t sequences, std::int64_t heads,
                                               int head_dim, int state_dim) {
  const int threads = ssd_scan_threads(head_dim);
  return {threads, kSsdScanChunk, ssd_scan_ctas_per_sm(head_dim, state_dim),
          ssd_scan_smem_bytes(head_dim, state_dim), sequences * heads};
}

static_assert(ssd_scan_smem_bytes(128, 128) <= 99 * 1024, "fits every GPU from sm_80 on");

}  // namespace zebra
