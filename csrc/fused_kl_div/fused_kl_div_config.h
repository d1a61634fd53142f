// fused_kl_div: how tokens and the vocabulary are cut.  A function of shapes only, so that results
// do not depend on the machine.
#pragma once

#include <cstdint>

namespace zebra {

constexpr std::int64_t kKlLogitBytes = 256 << 20;  // logits of both models, of one chunk of tokens
constexpr std::int64_t kKlPanelBytes = 32 << 20;   // a panel of a weight, in fp32
constexpr std::int64_t kKlMinRows = 16;            // fewer tokens would read the weights too often

// Tokens whose logits, `columns` of each model, are held at once: the whole vocabulary forward, one
// panel backward.
constexpr std::int64_t kl_chunk_rows(std::int64_t columns, std::int64_t element_bytes) {
  const std::int64_t rows = kKlLogitBytes / (2 * element_bytes * (columns > 0 ? columns : 1));
  return rows > kKlMinRows ? rows : kKlMinRows;
}

// Rows of a weight [vocab, width] that are multiplied at once.
constexpr std::int64_t kl_panel_rows(std::int64_t width, std::int64_t element_bytes) {
  const std::int64_t rows = kKlPanelBytes / (element_bytes * (width > 0 ? width : 1));
  return rows > 256 ? rows / 256 * 256 : 256;
}

}  // namespace zebra
