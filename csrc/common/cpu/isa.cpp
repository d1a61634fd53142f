#include "common/cpu/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool detect_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  // Kernels round to bf16 with AVX512_BF16, which every such processor has unless it is hidden.
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax & kAvx512Bf16) == 0) return false;
  // Linux grants the tile registers to a process on request.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool cpu_has_amx_bf16() {
  static const bool has =
      std::getenv("ZEBRA_CPU_ISA") == nullptr && cpu_isa() == Isa::kV4 && detect_amx_bf16();
  return has;
}

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
