// fused_kl_div on the CPU: checks, the loops over chunks of tokens and panels of the vocabulary,
// and ATen's matrix products between them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/torch_check.h"
#include "common/torch_mm.h"
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
  check.that(V > 0 && Ds > 0, "student_weight", student_weight, "[V, Ds] with V, Ds > 0");
  check.that(Dt > 0, "teacher_weight", teacher_weight, "[V, Dt] with Dt > 0");
  const DType dtype = check.floating("student_hidden", student_hidden);
  const auto mixable = [&](const char* argument, const Tensor& t) {
    const DType other = check.floating(argument, t);
    check.that((other == DType::kFloat64) == (dtype == DType::kFloat64), argument, t,
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

// Elements [at, at + rows * columns) of a flat workspace as a matrix.
Tensor matrix(Tensor flat, int64_t at, int64_t rows, int64_t columns) {
  return torch::stable::view(torch::stable::narrow(flat, 0, at, rows * columns), {rows, columns});
}

// Rows [first, first + count) in the accumulation dtype: a view, or converted into `workspace`.
Tensor rows_of(Tensor t, int64_t first, int64_t count, const Tensor& workspace) {
  const Tensor rows = torch::stable::narrow(t, 0, first, count);
  if (t.scalar_type() == workspace.scalar_type()) return rows;
  Tensor wide = matrix(workspace, 0, count, t.size(1));
  torch::stable::copy_(wide, rows);
  return wide;
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
  const int64_t chunk = std::min(kl_chunk_rows(s.vocab, s.element_bytes), s.tokens);
  const auto workspace = [&](int64_t count) {
    return empty_like_shape(student_hidden, {count}, s.acc);
  };
  const int64_t Ds = student_hidden.size(1), Dt = teacher_hidden.size(1);
  const int64_t panel = std::min(s.panel, s.vocab), half = chunk * s.vocab;
  const Tensor logits = workspace(2 * half);  // the student's panels, then the teacher's
  const Tensor wide_weight = workspace(panel * std::max(Ds, Dt));
  const Tensor wide_student = workspace(chunk * Ds), wide_teacher = workspace(chunk * Dt);
  for (int64_t first = 0; first < s.tokens; first += chunk) {
    const int64_t rows = std::min(chunk, s.tokens - first);
    const Tensor hs = rows_of(student_hidden, first, rows, wide_student);
    const Tensor ht = rows_of(teacher_hidden, first, rows, wide_teacher);
    std::vector<void*> student, teacher;
    for (int64_t v = 0; v < s.vocab; v += panel) {
      const int64_t columns = std::min(panel, s.vocab - v);
      const Tensor ls = matrix(logits, rows * v, rows, columns);
      const Tensor lt = matrix(logits, half + rows * v, rows, columns);
      matmul_into(hs, transposed(rows_of(student_weight, v, columns, wide_weight)), ls);
      matmul_into(ht, transposed(rows_of(teacher_weight, v, columns, wide_weight)), lt);
      student.push_back(ls.data_ptr());
      teacher.push_back(lt.data_ptr());
    }
    fused_kl_div_cpu({{student.data(), teacher.data(), rows, s.vocab, panel, s.dtype, temperature},
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

  const int64_t Ds = student_hidden.size(1), Dt = teacher_hidden.size(1);
  if (s.tokens == 0)
    return {torch::stable::new_empty(student_hidden, {0, Ds}),
            torch::stable::new_zeros(student_weight, {s.vocab, Ds})};

  // Only a panel of logits is needed at a time, for as many tokens as the workspace holds.  Where
  // that is all of them, a panel of the weight gradient is final and needs no fp32 sum.
  const int64_t panel = std::min(s.panel, s.vocab);
  const int64_t chunk = std::min(kl_chunk_rows(panel, s.element_bytes), s.tokens);
  const bool once = chunk == s.tokens;
  const auto workspace = [&](int64_t count) {
    return empty_like_shape(student_hidden, {count}, s.acc);
  };
  const Tensor logits = workspace(2 * chunk * panel);
  const Tensor wide_student_weight = workspace(panel * Ds),
               wide_teacher_weight = workspace(panel * Dt);
  const Tensor wide_student = workspace(chunk * Ds), wide_teacher = workspace(chunk * Dt);
  const Tensor part = workspace(std::max(panel, chunk) * Ds);
  Tensor dhidden = empty_like_shape(student_hidden, {s.tokens, Ds}, s.acc);
  Tensor dweight =
      empty_like_shape(student_weight, {s.vocab, Ds}, once ? student_weight.scalar_type() : s.acc);
  // total = a b, or total += a b.
  const auto accumulate = [&](Tensor total, const Tensor& a, const Tensor& b, bool first) {
    if (first && total.scalar_type() == s.acc) return matmul_into(a, b, total);
    const Tensor sum = matrix(part, 0, total.size(0), total.size(1));
    matmul_into(a, b, sum);
    if (first)
      torch::stable::copy_(total, sum);
    else
      fused_kl_div_add_cpu({total.data_ptr(), sum.data_ptr(), sum.numel(), s.dtype});
  };
  for (int64_t first = 0; first < s.tokens; first += chunk) {
    const int64_t rows = std::min(chunk, s.tokens - first);
    const Tensor hs = rows_of(student_hidden, first, rows, wide_student);
    const Tensor ht = rows_of(teacher_hidden, first, rows, wide_teacher);
    for (int64_t v = 0; v < s.vocab; v += panel) {
      const int64_t columns = std::min(panel, s.vocab - v);
      const Tensor ws = rows_of(student_weight, v, columns, wide_student_weight);
      const Tensor wt = rows_of(teacher_weight, v, columns, wide_teacher_weight);
      const Tensor ls = matrix(logits, 0, rows, columns);
      const Tensor lt = matrix(logits, chunk * panel, rows, columns);
      matmul_into(hs, transposed(ws), ls);
      matmul_into(ht, transposed(wt), lt);
      void* const panels[] = {ls.data_ptr(), lt.data_ptr()};
      fused_kl_div_backward_cpu({{panels, panels + 1, rows, columns, columns, s.dtype, temperature},
                                 static_cast<char*>(gradient.data_ptr()) + first * s.element_bytes,
                                 static_cast<double*>(student_lse.data_ptr()) + first,
                                 static_cast<double*>(teacher_lse.data_ptr()) + first});
      accumulate(torch::stable::narrow(dhidden, 0, first, rows), ls, ws, v == 0);
      accumulate(torch::stable::narrow(dweight, 0, v, columns), transposed(ls), hs, first == 0);
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
