// fused_kl_div: KL(teacher || student) of every token, and its gradient with respect to the
// student's logits.
//
//   KL = sum_v p_T (log p_T - log p_S),   p = softmax(logits / temperature)
//
// Logits lie transposed, [vocab, tokens]: a vector holds one logit of several tokens, and no sum
// runs across lanes.  A slab of kKlSlabRows logits of every token is reduced in one pass, with
// e = exp(logit / temperature - the slab's largest) and d = log e_S - log e_T, to
//
//   S = sum e_S,  T = sum e_T,  B = sum e_T d,  A = sum e_T (exp(d) - 1 - d) = S - T - B
//
// from which KL = log(S / T) - B / T.  A is summed by itself because its terms have one sign: near
// equal models log(S / T) = log1p((A + B) / T), and a KL of 1e-9 keeps its digits.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace zebra {

// The logits of a panel of the vocabulary.  Either they are there, or `weight` says how to compute
// them with the matrix unit; then `logits` may be nullptr, or is where they are kept.  The logit of
// token t is at (t / 16) tile_stride + v row_stride + t % 16.
struct KlLogits {
  void* logits;             // fp32, or fp64
  std::int64_t row_stride;  // of the vocabulary
  std::int64_t tile_stride;
  const void* weight;          // nullptr, or bf16 [vocab, width], row stride weight_stride
  const std::uint32_t* pairs;  // the hidden states from fused_kl_div_pack
  std::int64_t width, weight_stride;
};

// Tokens of a chunk against some of the vocabulary.
struct KlPanel {
  KlLogits student, teacher;
  std::int64_t vocab, tokens;
  DType dtype;  // of logits: fp32, or fp64
  double temperature;
};

// Hidden states bf16 [tokens, width] in the order of the matrix unit.
struct KlPack {
  const void* hidden;
  std::int64_t stride, tokens, width;
  std::uint32_t* pairs;  // [amx_packed_size(tokens, width)]
};

constexpr std::int64_t kl_padded_tokens(std::int64_t tokens) { return (tokens + 15) / 16 * 16; }

constexpr std::int64_t kKlSlabRows = 512;
constexpr int kKlStatistics = 6;  // largest student and teacher logit / temperature, S, T, A, B

struct KlStatisticsParams {
  KlPanel panel;
  void* partial;  // [slabs of the panel, kKlStatistics, padded tokens] of the panel's dtype
};

struct KlReduceParams {
  const void* partial;  // [slabs of the vocabulary, kKlStatistics, padded tokens]
  std::int64_t slabs, tokens;
  DType dtype;
  void* kl;             // [tokens]
  double* student_lse;  // [tokens]: log sum exp(logits / temperature)
  double* teacher_lse;  // [tokens]
};

struct KlGradientParams {
  KlPanel panel;
  const void* dkl;  // [tokens] of the panel's dtype, or nullptr: 1
  const double* student_lse;
  const double* teacher_lse;
  void* dlogits;    // [vocab, tokens], row stride ld >= the padded tokens: (p_S - p_T) dkl /
  std::int64_t ld;  // temperature, and 0 in the padding; it may be where the student's logits are
  DType dlogits_dtype;  // the panel's dtype, or bf16
};

// total += part: gradients summed over chunks of tokens, or panels of the vocabulary.
struct KlAddParams {
  void* total;
  const void* part;
  std::int64_t count;
  DType dtype, part_dtype;  // fp32 or fp64; the same, or bf16
};

}  // namespace zebra

ZEBRA_CPU_KERNEL(fused_kl_div_pack, ::zebra::KlPack)
ZEBRA_CPU_KERNEL(fused_kl_div_statistics, ::zebra::KlStatisticsParams)
ZEBRA_CPU_KERNEL(fused_kl_div_reduce, ::zebra::KlReduceParams)
ZEBRA_CPU_KERNEL(fused_kl_div_gradient, ::zebra::KlGradientParams)
ZEBRA_CPU_KERNEL(fused_kl_div_add, ::zebra::KlAddParams)
