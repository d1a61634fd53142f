// fused_kl_div: KL(teacher || student) of every token from chunks of logits, and its gradient with
// respect to the student's logits.  The matrix products around it are ATen's.
//
//   KL = sum_v p_T (log p_T - log p_S),   p = softmax(logits / temperature)
//
// Computed as sum_v p_T f(log p_S - log p_T) with f(d) = exp(d) - 1 - d, which is the same because
// both distributions sum to one, but has no term of either sign to cancel: a KL of 1e-9 keeps its
// digits, and no KL is negative.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace zebra {

// Logits of some rows as panels of `panel` columns (the last one may be narrower): column v of row
// r is student[v / panel][r * width + v % panel], width the width of that panel.
struct FusedKlDivLogits {
  void* const* student;
  void* const* teacher;
  std::int64_t rows, vocab, panel;
  DType dtype;  // of logits and results: fp32, or fp64
  double temperature;
};

struct FusedKlDivParams {
  FusedKlDivLogits logits;
  void* kl;           // [rows]
  void* student_lse;  // [rows] fp64: log sum exp(logits / temperature)
  void* teacher_lse;  // [rows] fp64
};

// Overwrites the student's panels with dlogits = (p_S - p_T) dkl / temperature.
struct FusedKlDivBackwardParams {
  FusedKlDivLogits logits;
  const void* dkl;          // [rows]
  const void* student_lse;  // [rows] fp64
  const void* teacher_lse;  // [rows] fp64
};

// total += part: gradients summed over chunks of tokens, or panels of the vocabulary.
struct FusedKlDivAddParams {
  void* total;
  const void* part;
  std::int64_t count;
  DType dtype;
};

}  // namespace zebra

ZEBRA_CPU_KERNEL(fused_kl_div, ::zebra::FusedKlDivParams)
ZEBRA_CPU_KERNEL(fused_kl_div_backward, ::zebra::FusedKlDivBackwardParams)
ZEBRA_CPU_KERNEL(fused_kl_div_add, ::zebra::FusedKlDivAddParams)
