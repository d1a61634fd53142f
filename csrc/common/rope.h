// Rotary embedding: the angles of every position, and the positions of tokens.
#pragma once

#include <cstdint>

namespace zebra {

// Rotation of adjacent pairs (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos) by position.
struct RopeTable {
  const float *cos, *sin;  // [max_positions, E / 2]
  const void* positions;   // [tokens] int32 or int64
  bool int64_positions;
  std::int64_t max_positions, E;

  std::int64_t position(std::int64_t token) const {
    return int64_positions ? static_cast<const std::int64_t*>(positions)[token]
                           : static_cast<const std::int32_t*>(positions)[token];
  }
};

}  // namespace zebra
