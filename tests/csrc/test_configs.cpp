// Tile configurations are pure functions: check their promises over many problems, without CUDA.
#include <cstdio>
#include <initializer_list>

#include "rms_norm/rms_norm_config.h"

namespace {

int failures = 0;

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++failures;                                                          \
      std::printf("%s:%d: %s fails for ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf("\n");                                                   \
    }                                                                      \
  } while (0)

void rms_norm_tiles_cover_a_row() {
  for (std::int64_t dim = 1; dim <= 70000; dim += dim < 600 ? 1 : 97)
    for (const int bytes : {2, 4})
      for (const bool aligned : {false, true}) {
        if (aligned && dim % (16 / bytes) != 0) continue;
        const zebra::RmsNormConfig c = zebra::select_rms_norm_config(dim, bytes, aligned);
        EXPECT(c.threads % 32 == 0 && c.threads <= 512, "dim %ld", static_cast<long>(dim));
        EXPECT(c.vec == (aligned ? 16 / bytes : 1), "dim %ld", static_cast<long>(dim));
        const std::int64_t held = std::int64_t{c.threads} * c.vec * c.vecs_per_thread;
        EXPECT(c.vecs_per_thread == 0 || held >= dim, "dim %ld", static_cast<long>(dim));
        EXPECT(c.vecs_per_thread == 0 || c.threads == 32 || held < 4 * dim,
               "dim %ld wastes threads", static_cast<long>(dim));
      }
  static_assert(zebra::rms_norm_backward_ctas(0) == 1, "a launch needs a CTA");
  static_assert(zebra::rms_norm_backward_ctas(1 << 20) == 528, "bounded partials");
}

}  // namespace

int main() {
  rms_norm_tiles_cover_a_row();
  std::printf(failures == 0 ? "configs: all promises hold\n" : "configs: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
