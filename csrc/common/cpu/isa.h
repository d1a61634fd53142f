// Instruction sets of the CPU kernels, and the choice between them at run time.
//
// Every <op>_cpu.cpp is compiled once per instruction set, with ZEBRA_ISA set to its name, and
// keeps all of its code in namespace zebra::ZEBRA_ISA (or static): an inline function shared
// between two of these objects would be merged by the linker and could run AVX-512 code on a
// machine without it.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define ZEBRA_HAS_X86_ISAS 1
#endif

namespace zebra {

enum class Isa { kBaseline, kV3, kV4 };  // x86-64, x86-64-v3 (AVX2 + FMA), x86-64-v4 (AVX-512)

// The best instruction set of this machine; ZEBRA_CPU_ISA=baseline|v3|v4 lowers it (for tests).
Isa cpu_isa();
const char* cpu_isa_name();

// Whether kernels of x86-64-v4 may also use the bf16 matrix unit (AMX): the machine has it, the
// system lets this process use it, and ZEBRA_CPU_ISA is not set.
bool cpu_has_amx_bf16();

// Dwords of rows of bf16 as that unit takes them: tiles of 16 rows, each [pairs of columns, 16]
// with the columns padded to whole steps of 32.
constexpr std::int64_t amx_packed_size(std::int64_t rows, std::int64_t width) {
  return (rows + 15) / 16 * ((width + 31) / 32) * 256;
}

}  // namespace zebra

// Declares `void NAME(const PARAMS&)` in every instruction-set namespace, and zebra::NAME_cpu,
// which calls the best of them.
#ifdef ZEBRA_HAS_X86_ISAS
#define ZEBRA_CPU_KERNEL(NAME, PARAMS)      \
  namespace zebra {                         \
  namespace baseline {                      \
  void NAME(const PARAMS& p);               \
  }                                         \
  namespace v3 {                            \
  void NAME(const PARAMS& p);               \
  }                                         \
  namespace v4 {                            \
  void NAME(const PARAMS& p);               \
  }                                         \
  inline void NAME##_cpu(const PARAMS& p) { \
    switch (cpu_isa()) {                    \
      case Isa::kV4:                        \
        return v4::NAME(p);                 \
      case Isa::kV3:                        \
        return v3::NAME(p);                 \
      default:                              \
        return baseline::NAME(p);           \
    }                                       \
  }                                         \
  }
#else
#define ZEBRA_CPU_KERNEL(NAME, PARAMS)                                  \
  namespace zebra {                                                     \
  namespace baseline {                                                  \
  void NAME(const PARAMS& p);                                           \
  }                                                                     \
  inline void NAME##_cpu(const PARAMS& p) { return baseline::NAME(p); } \
  }
#endif
