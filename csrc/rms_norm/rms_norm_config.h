// rms_norm: how a row is laid over a thread block.  Pure, so that tests can print and check the
// choice.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/math.h"

namespace zebra {

struct RmsNormConfig {
  int threads;          // of one CTA
  int vec;              // elements of one 16-byte access
  int vecs_per_thread;  // accesses of one thread over a row; 0: the row does not fit in registers
};

// A row of `dim` elements of `element_bytes` stays in the registers of one CTA when it can: 16-byte
// accesses, at most 8 of them a thread (64 fp32 values), at most 512 threads.
constexpr RmsNormConfig select_rms_norm_config(std::int64_t dim, int element_bytes, bool aligned) {
  const int vec = aligned ? 16 / element_bytes : 1;
  const std::int64_t vecs = ceil_div<std::int64_t>(dim, vec);
  if (!aligned) return {512, 1, 0};
  for (const int per_thread : {1, 2, 4, 8})
    for (int threads = 32; threads <= (per_thread == 8 ? 512 : 256); threads *= 2)
      if (static_cast<std::int64_t>(threads) * per_thread >= vecs)
        return {threads, vec, per_thread};
  return {512, vec, 0};
}

// Vectors of one tensor that a backward thread has under way: one or more rows of its own vectors.
constexpr int kRmsNormRingVecs = 4;
constexpr int kRmsNormMostSmemBytes = 99 * 1024;  // of a CTA on every GPU since sm_80

struct RmsNormBackwardConfig {
  int threads;          // along a row, whole warps
  int rows;             // side by side in a CTA
  int vec;              // elements of one 16-byte access
  int vecs_per_thread;  // accesses of one thread over a row; 0: the row is walked twice
  int smem_bytes;       // the ring
};

// CTAs of some 256 threads where rows allow it: two fit on every multiprocessor.
constexpr RmsNormBackwardConfig select_rms_norm_backward_config(std::int64_t dim, int element_bytes,
                                                                bool aligned, bool has_dsum) {
  const int vec = aligned ? 16 / element_bytes : 1;
  const std::int64_t vecs = ceil_div<std::int64_t>(dim, vec);
  if (!aligned || vecs > 2048) return {512, 1, vec, 0, 0};
  const int per_thread = vecs <= 32 ? 1 : vecs <= 640 ? 2 : 4;
  const int threads = round_up(ceil_div(static_cast<int>(vecs), per_thread), 32);
  const int rows = threads < 256 ? 256 / threads : 1;
  return {threads, rows, vec, per_thread, rows * threads * kRmsNormRingVecs * (has_dsum ? 48 : 32)};
}

}  // namespace zebra
