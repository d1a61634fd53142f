// How the vectors of every token are laid over thread blocks, for kernels that move and rotate
// rows.  Pure, so that tests can print and check the choice.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zebra {

// A CTA has x threads along a token's vectors and y tokens; each thread serves `steps` tokens, so
// that it has that many loads in flight and computes where a vector lies only once.
struct TokenTile {
  int x, y, steps;
  int passes;  // of the x threads over the vectors of a token

  constexpr std::int64_t tokens() const { return static_cast<std::int64_t>(y) * steps; }
};

constexpr TokenTile select_token_tile(std::int64_t vecs) {
  constexpr int kThreads = 256, kWarp = 32, kSteps = 4;
  const int passes = static_cast<int>(ceil_div<std::int64_t>(vecs, kThreads));
  if (passes == 0) return {kWarp, 1, kSteps, 0};
  const int x =
      static_cast<int>(round_up<std::int64_t>(ceil_div<std::int64_t>(vecs, passes), kWarp));
  return {x, kThreads / x, kSteps, passes};
}

}  // namespace zebra
