// A parallel loop over torch's own threads, for kernels that do not know torch.
#pragma once

#include <cstdint>

namespace zebra {

using RangeFn = void (*)(std::int64_t begin, std::int64_t end, void* context);

// Splits [0, count) into ranges of at least `grain` and runs them on torch's thread pool.
// The body must not throw.  Results must not depend on how the range was split.
void parallel_ranges(std::int64_t count, std::int64_t grain, RangeFn fn, void* context);

}  // namespace zebra

#ifdef ZEBRA_ISA
namespace zebra::ZEBRA_ISA {

// parallel_for(count, grain, [&](int64_t begin, int64_t end) { ... });
template <typename Body>
static inline void parallel_for(std::int64_t count, std::int64_t grain, const Body& body) {
  const auto call = [](std::int64_t begin, std::int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  parallel_ranges(count, grain, call, const_cast<Body*>(&body));
}

}  // namespace zebra::ZEBRA_ISA
#endif
