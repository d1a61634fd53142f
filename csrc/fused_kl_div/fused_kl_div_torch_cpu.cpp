// fused_kl_div on the CPU: checks, the loops over chunks of tokens and panels of the vocabulary,
// and ATen's matrix products between them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/torch_check.h"
#include "fused_kl_div/fused_kl_div.h"
#include "fused_kl_div/fused_kl_div_config.h"

namespace zebra {
namespace {

struct Shape {
  int64_t tokens, vocab, panel, element_bytes;
  ScalarType acc;
  DType dtype;
};

// Checks the four inputs; student and teacher may differ in width and (but for float64) in dtype.
Shape check_inputs(const Check& check, const Tensor& student_hidden, const Tensor& student_weight,
                   const Tensor& teacher_hidden, const Tensor& teacher_weight, double temperature) {
  check.shape("student_hidden", student_hidden, {-1, -1}, "[M, Ds]");
  const int64_t M = student_hidden.size(0), Ds = student_hidden.size(1);
  check.shape("student_weight", student_weight, {-1, Ds}, "[V, Ds]");
  const int64_t V = student_weight.size(0);
  check.shape("teacher_hidden", teacher_hidden, {M, -1}, "[M, Dt]");
  const int64_t Dt = teacher_hidden.size(1);
  check.shape("teacher_weight", teacher_weight, {V, Dt}, "[V, Dt]");
  check.that(V > 0 && Ds > 0, "student_weight", describe(student_weight), "[V, Ds] with V, Ds > 0");
  check.that(Dt > 0, "teacher_weight", describe(teacher_weight), "[V, Dt] with Dt > 0");
  const DType dtype = check.floating("student_hidden", student_hidden);
  const auto mixable = [&](const char* argument, const Tensor& t) {
    const DType other = check.floating(argument, t);
    check.that((other == DType::kFloat64) == (dtype == DType::kFloat64), argument, describe(t),
               dtype == DType::kFloat64 ? "float64 like student_hidden"
                                        : "float32, bfloat16 or float16 beside student_hidden");
    check.same_device(argument, t, student_hidden);
  };
  mixable("student_weight", student_weight);
  mixable("teacher_hidden", teacher_hidden);
  mixable("teacher_weight", teacher_weight);
  check.that(temperature > 0 && std::isfinite(temperature), "temperature",
             std::to_string(temperature), "positive and finite");
  const int64_t bytes = dtype == DType::kFloat64 ? 8 : 4;
  return {M,
          V,
          kl_panel_rows(std::max(Ds, Dt), bytes),
          bytes,
          acc_dtype(student_hidden),
          bytes == 8 ? DType::kFloat64 : DType::kFloat32};
}

// Rows [first, first + count) in the accumulation dtype, contiguous.
Tensor rows_of(Tensor t, int64_t first, int64_t count, ScalarType acc) {
  return torch::stable::contiguous(
      torch::stable::to(torch::stable::narrow(t, 0, first, count), acc));
}

// a b, or a b^T, as a contiguous tensor of a's dtype (autocast may have chosen another).
Tensor product(const Tensor& a, Tensor b, bool transposed) {
  const Tensor right = transposed ? torch::stable::transpose(b, 0, 1) : b;
  return torch::stable::contiguous(
      torch::stable::to(torch::stable::matmul(a, right), a.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> fused_kl_div_op(const Tensor& student_hidden,
                                                   const Tensor& student_weight,
                                                   const Tensor& teacher_hidden,
                                                   const Tensor& teacher_weight,
                                                   double temperature) {
  const Check check("fused_kl_div");
  const Shape s = check_inputs(check, student_hidden, student_weight, teacher_hidden,
                               teacher_weight, temperature);
  Tensor kl = empty_like_shape(student_hidden, {s.tokens}, s.acc);
  Tensor student_lse = empty_like_shape(student_hidden, {s.tokens}, ScalarType::Double);
  Tensor teacher_lse = empty_like_shape(student_hidden, {s.tokens}, ScalarType::Double);
  const int64_t chunk = kl_chunk_rows(s.vocab, s.element_bytes);
  for (int64_t first = 0; first < s.tokens; first += chunk) {
    const int64_t rows = std::min(chunk, s.tokens - first);
    const Tensor hs = rows_of(student_hidden, first, rows, s.acc);
    const Tensor ht = rows_of(teacher_hidden, first, rows, s.acc);
    std::vector<Tensor> logits;  // keeps the panels alive
    std::vector<void*> student, teacher;
    for (int64_t v = 0; v < s.vocab; v += s.panel) {
      const int64_t columns = std::min(s.panel, s.vocab - v);
      logits.push_back(product(hs, rows_of(student_weight, v, columns, s.acc), true));
      student.push_back(logits.back().data_ptr());
      logits.push_back(product(ht, rows_of(teacher_weight, v, columns, s.acc), true));
      teacher.push_back(logits.back().data_ptr());
    }
    fused_kl_div_cpu(
        {{student.data(), teacher.data(), rows, s.vocab, s.panel, s.dtype, temperature},
         static_cast<char*>(kl.data_ptr()) + first * s.element_bytes,
         static_cast<double*>(student_lse.data_ptr()) + first,
         static_cast<double*>(teacher_lse.data_ptr()) + first});
  }
  return {kl, student_lse, teacher_lse};
}

std::tuple<Tensor, Tensor> fused_kl_div_backward_op(const Tensor& dkl, const Tensor& student_hidden,
                                                    const Tensor& student_weight,
                                                    const Tensor& teacher_hidden,
                                                    const Tensor& teacher_weight,
                                                    const Tensor& student_lse,
                                                    const Tensor& teacher_lse, double temperature) {
  const Check check("fused_kl_div_backward");
  const Shape s = check_inputs(check, student_hidden, student_weight, teacher_hidden,
                               teacher_weight, temperature);
  check.shape("dkl", dkl, {s.tokens}, "[M]");
  check.dtype("dkl", dkl, s.acc);
  const Tensor gradient = torch::stable::contiguous(dkl);
  for (const auto& [name, lse] :
       {std::pair{"student_lse", student_lse}, std::pair{"teacher_lse", teacher_lse}}) {
    check.shape(name, lse, {s.tokens}, "[M]");
    check.dtype(name, lse, ScalarType::Double);
    check.contiguous(name, lse);
  }

  // Only a panel of logits is needed at a time, for as many tokens as the workspace holds.
  const int64_t chunk = kl_chunk_rows(std::min(s.panel, s.vocab), s.element_bytes);
  const int64_t width = student_hidden.size(1);
  Tensor dhidden = torch::stable::new_zeros(student_hidden, {s.tokens, width}, s.acc);
  Tensor dweight = s.tokens > 0 ? empty_like_shape(student_weight, {s.vocab, width}, s.acc)
                                : torch::stable::new_zeros(student_weight, {s.vocab, width}, s.acc);
  const auto add = [&](Tensor& total, int64_t row, const Tensor& part, bool first) {
    fused_kl_div_add_cpu({static_cast<char*>(total.data_ptr()) + row * width * s.element_bytes,
                          part.data_ptr(), part.numel(), s.dtype, first});
  };
  for (int64_t first = 0; first < s.tokens; first += chunk) {
    const int64_t rows = std::min(chunk, s.tokens - first);
    const Tensor hs = rows_of(student_hidden, first, rows, s.acc);
    const Tensor ht = rows_of(teacher_hidden, first, rows, s.acc);
    for (int64_t v = 0; v < s.vocab; v += s.panel) {
      const int64_t columns = std::min(s.panel, s.vocab - v);
      const Tensor weight = rows_of(student_weight, v, columns, s.acc);
      Tensor student = product(hs, weight, true);
      const Tensor teacher = product(ht, rows_of(teacher_weight, v, columns, s.acc), true);
      void* const panels[] = {student.data_ptr(), teacher.data_ptr()};
      fused_kl_div_backward_cpu({{panels, panels + 1, rows, columns, columns, s.dtype, temperature},
                                 static_cast<char*>(gradient.data_ptr()) + first * s.element_bytes,
                                 static_cast<double*>(student_lse.data_ptr()) + first,
                                 static_cast<double*>(teacher_lse.data_ptr()) + first});
      add(dhidden, first, product(student, weight, false), false);
      add(dweight, v, product(torch::stable::transpose(student, 0, 1), hs, false), first == 0);
    }
  }
  return {torch::stable::to(dhidden, student_hidden.scalar_type()),
          torch::stable::to(dweight, student_weight.scalar_type())};
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("fused_kl_div", TORCH_BOX(&zebra::fused_kl_div_op));
  m.impl("fused_kl_div_backward", TORCH_BOX(&zebra::fused_kl_div_backward_op));
}
