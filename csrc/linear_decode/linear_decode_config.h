// linear_decode, portable CUDA kernel: tiles as data.  Pure, so that tests can print and check
// them.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zebra {

constexpr int kLinearTileRows = 64;             // outputs of a CTA, 16 a warp
constexpr int kLinearTileK = 64;                // elements of K in shared memory at a time
constexpr int kLinearPitch = kLinearTileK + 8;  // elements from row to row there: no bank conflicts

struct LinearDecodeConfig {
  int threads;
  int tokens;  // rows of x of a CTA: 8, 16 or 32
  int stages;  // of W and x in shared memory
  int smem_bytes;
  std::int64_t ctas_outputs, ctas_tokens;  // the grid
};

// As few rows of x a CTA as hold them all, at most 32: the weight is read again for every 32.
constexpr LinearDecodeConfig select_linear_decode_config(std::int64_t rows, std::int64_t outputs,
                                                         bool swiglu) {
  LinearDecodeConfig c = {};
  c.threads = 128;
  c.tokens = rows <= 8 ? 8 : rows <= 16 ? 16 : 32;
  c.stages = 3;
  const int rows_held = (swiglu ? 2 : 1) * kLinearTileRows + c.tokens;
  c.smem_bytes = c.stages * rows_held * kLinearPitch * 2;
  c.ctas_outputs = ceil_div<std::int64_t>(outputs, kLinearTileRows);
  c.ctas_tokens = ceil_div<std::int64_t>(rows, c.tokens);
  return c;
}

}  // namespace zebra
