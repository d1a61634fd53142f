#include "common/cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace zebra {

void parallel_ranges(std::int64_t count, std::int64_t grain, RangeFn fn, void* context) {
  if (count <= 0) return;
  torch::stable::parallel_for(
      0, count, grain > 0 ? grain : 1,
      [&](std::int64_t begin, std::int64_t end) { fn(begin, end, context); });
}

}  // namespace zebra
