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

}  // namespace zebra
