#include "common/cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace zebra {
namespace {

Isa detect() {
  Isa best = Isa::kBaseline;
#ifdef ZEBRA_HAS_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    best = Isa::kV3;
  if (best == Isa::kV3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    best = Isa::kV4;
#endif
  const char* limit = std::getenv("ZEBRA_CPU_ISA");
  if (limit == nullptr) return best;
  const Isa wanted = std::strcmp(limit, "v4") == 0   ? Isa::kV4
                     : std::strcmp(limit, "v3") == 0 ? Isa::kV3
                                                     : Isa::kBaseline;
  return wanted < best ? wanted : best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case Isa::kV4:
      return "x86-64-v4";
    case Isa::kV3:
      return "x86-64-v3";
    default:
      return "baseline";
  }
}

}  // namespace zebra
