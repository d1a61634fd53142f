// fused_kl_div: how tokens and the vocabulary are cut.  A function of shapes only, so that results
// do not depend on the machine.
#pragma once

#include <cstdint>

namespace zebra {

constexpr std::int64_t kKlWorkBytes = 64 << 20;    // logits of a chunk of tokens, whole vocabulary
constexpr std::int64_t kKlPanelBytes = 4 << 20;    // logits of both models multiplied at once
constexpr std::int64_t kKlWeightBytes = 32 << 20;  // a panel of a weight, in fp32
constexpr std::int64_t kKlMostRows = 256;          // tokens of a chunk: more do not save time

// Rows of `row_bytes` that fit into `bytes`: a multiple of `step`, at least one step.
constexpr std::int64_t kl_rows(std::int64_t bytes, std::int64_t row_bytes, std::int64_t step) {
  const std::int64_t rows = bytes / (row_bytes > 0 ? row_bytes : 1) / step * step;
  return rows > step ? rows : step;
}

}  // namespace zebra
