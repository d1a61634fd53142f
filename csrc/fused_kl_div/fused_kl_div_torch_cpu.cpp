// fused_kl_div on the CPU: checks, the loops over chunks of tokens and panels of the vocabulary,
// and the matrix products between them: ATen's, or for the logits of bf16 models our own, because
// ATen would round them to bf16.
#include <torch/csrc/stable/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "common/math.h"
#include "common/torch_check.h"
#include "common/torch_mm.h"
#include "fused_kl_div/fused_kl_div.h"
#include "fused_kl_div/fused_kl_div_config.h"

namespace zebra {
namespace {

struct Shape {
  int64_t tokens, vocab, bytes;  // of an element of the accumulation type
  ScalarType acc, kept;          // kept: of the gradient of the logits
  DType dtype;                   // acc
};

DType kernel_dtype(ScalarType t) {
  return t == ScalarType::BFloat16 ? DType::kBFloat16
         : t == ScalarType::Double ? DType::kFloat64
                                   : DType::kFloat32;
}

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
  const ScalarType acc = acc_dtype(student_hidden);
  const bool bf16 = student_hidden.scalar_type() == ScalarType::BFloat16 &&
                    student_weight.scalar_type() == ScalarType::BFloat16;
  return {M,
          V,
          acc == ScalarType::Double ? 8 : 4,
          acc,
          bf16 ? ScalarType::BFloat16 : acc,
          kernel_dtype(acc)};
}

// Elements [first, first + count) of a dimension.
Tensor narrowed(Tensor t, int64_t dim, int64_t first, int64_t count) {
  return torch::stable::narrow(t, dim, first, count);
}

// Memory that is about to be written for the first time, in large pages where the system has them:
// touching it in pages of 4 KiB costs more than the arithmetic whose results it takes.
Tensor in_large_pages(const Tensor& t) {
#ifdef __linux__
  constexpr std::uintptr_t kPage = 4096, kLarge = 2 << 20;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(t.data_ptr());
  const std::uintptr_t end = begin + static_cast<std::uintptr_t>(t.numel()) * t.element_size();
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last >= first + 2 * kLarge)  // advice only: without it everything works as well
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#endif
  return t;
}

// Elements [0, rows * columns) of a flat workspace as a matrix.
Tensor matrix(Tensor flat, int64_t rows, int64_t columns) {
  return torch::stable::view(narrowed(flat, 0, 0, rows * columns), {rows, columns});
}

// Rows [first, first + count) in the workspace's dtype: a view, or converted into `workspace`.
Tensor rows_of(Tensor t, int64_t first, int64_t count, const Tensor& workspace) {
  const Tensor rows = narrowed(t, 0, first, count);
  if (t.scalar_type() == workspace.scalar_type()) return rows;
  Tensor wide = matrix(workspace, count, t.size(1));
  torch::stable::copy_(wide, rows);
  return wide;
}

char* at_row(const Tensor& t, int64_t row, int64_t element_bytes) {
  return static_cast<char*>(t.data_ptr()) + row * t.stride(0) * element_bytes;
}

// One model: its logits for chunks of tokens.
class Model {
 public:
  Model(const Shape& s, const Tensor& hidden, const Tensor& weight, int64_t chunk)
      : s_(s),
        hidden_(hidden),
        weight_(weight),
        width_(hidden.size(1)),
        amx_(cpu_has_amx_bf16() && hidden.scalar_type() == ScalarType::BFloat16 &&
             weight.scalar_type() == ScalarType::BFloat16 && hidden.stride(1) == 1 &&
             weight.stride(1) == 1),
        panel_(std::min(s.vocab, std::min(kl_rows(kKlPanelBytes / 2, chunk * s.bytes, kKlSlabRows),
                                          kl_rows(kKlWeightBytes, width_ * s.bytes, kKlSlabRows)))),
        wide_(empty_like_shape(hidden, {amx_ ? amx_packed_size(chunk, width_) : chunk * width_},
                               s.acc)),
        wide_weight_(empty_like_shape(
            hidden, {weight.scalar_type() == s.acc || amx_ ? 0 : panel_ * width_}, s.acc)) {}

  bool amx() const { return amx_; }
  int64_t panel() const { return panel_; }

  // Starts the chunk of tokens [first, first + rows).  `home`: where all of its logits are kept,
  // [V, >= rows] of the accumulation type; or without columns, then a panel is kept.
  void start(int64_t first, int64_t rows, const Tensor& home) {
    rows_ = rows;
    home_ = home;
    if (!amx_) {
      chunk_ = rows_of(hidden_, first, rows, wide_);
    } else {
      fused_kl_div_pack_cpu({at_row(hidden_, first, 2), hidden_.stride(0), rows, width_,
                             static_cast<std::uint32_t*>(wide_.data_ptr())});
    }
  }

  // Logits of vocabulary rows [v, v + count): to be computed by the kernel, or computed here.
  KlLogits logits(int64_t v, int64_t count) {
    const bool kept = home_.size(1) > 0;
    if (amx_) {
      // Tile after tile: a strip of tokens is contiguous.
      return {kept ? static_cast<float*>(home_.data_ptr()) + v * 16 : nullptr,
              16,
              home_.size(0) * 16,
              at_row(weight_, v, 2),
              static_cast<std::uint32_t*>(wide_.data_ptr()),
              width_,
              weight_.stride(0)};
    }
    const int64_t ld = kl_padded_tokens(rows_);
    if (!kept && panel_logits_.numel() < panel_ * ld)
      panel_logits_ = empty_like_shape(hidden_, {panel_ * ld}, s_.acc);
    const Tensor all = kept ? narrowed(home_, 0, v, count) : matrix(panel_logits_, count, ld);
    const Tensor out = narrowed(all, 1, 0, rows_);
    matmul_into(rows_of(weight_, v, count, wide_weight_), transposed(chunk_), out);
    return {out.data_ptr(), out.stride(0), 16, nullptr, nullptr, 0, 0};
  }

 private:
  const Shape& s_;
  Tensor hidden_, weight_;
  int64_t width_, rows_ = 0;
  bool amx_;
  int64_t panel_;
  Tensor wide_, wide_weight_, chunk_, home_, panel_logits_;
};

// body(v, panel) for panels of the vocabulary, with their logits.
template <typename Body>
void for_panels(const Shape& s, double temperature, Model& student, Model& teacher, int64_t rows,
                const Body& body) {
  const int64_t step =
      student.amx() && teacher.amx() ? s.vocab : std::min(student.panel(), teacher.panel());
  for (int64_t v = 0; v < s.vocab; v += step) {
    const int64_t count = std::min(step, s.vocab - v);
    const KlLogits ls = student.logits(v, count), lt = teacher.logits(v, count);
    body(v, KlPanel{ls, lt, count, rows, s.dtype, temperature});
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_kl_div_op(
    const Tensor& student_hidden, const Tensor& student_weight, const Tensor& teacher_hidden,
    const Tensor& teacher_weight, double temperature, int64_t kept_tokens) {
  const Check check("fused_kl_div");
  const Shape s = check_inputs(check, student_hidden, student_weight, teacher_hidden,
                               teacher_weight, temperature);
  check.that(kept_tokens >= 0, "kept_tokens", kept_tokens, "0 or more");
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return empty_like_shape(student_hidden, shape, dtype);
  };
  Tensor kl = empty({s.tokens}, s.acc);
  Tensor student_lse = empty({s.tokens}, ScalarType::Double);
  Tensor teacher_lse = empty({s.tokens}, ScalarType::Double);
  const int64_t kept = std::min(s.tokens, kl_padded_tokens(kept_tokens));
  Tensor dlogits = kept_tokens > 0
                       ? in_large_pages(empty({s.vocab, kl_padded_tokens(kept)}, s.kept))
                       : empty({0}, s.kept);

  int64_t most = std::min(s.tokens, kKlMostRows);
  if (kept > 0) most = std::min(most, kl_rows(kKlWorkBytes, 2 * s.vocab * s.bytes, 16));
  Model student(s, student_hidden, student_weight, most);
  Model teacher(s, teacher_hidden, teacher_weight, most);
  const int64_t slabs = ceil_div(s.vocab, kKlSlabRows);
  const Tensor partial = empty({slabs * kKlStatistics * kl_padded_tokens(most)}, s.acc);
  // Logits of a chunk: the student's may lie where their gradient will be.
  const Tensor nowhere = empty({s.vocab, 0}, s.acc);
  const int64_t padded_vocab = round_up<int64_t>(s.vocab, 32), ld = kl_padded_tokens(most);
  const auto home = [&](bool needed) {
    return needed ? in_large_pages(empty({padded_vocab, ld}, s.acc)) : nowhere;
  };
  const bool in_place = s.kept == s.acc && !student.amx();
  const Tensor student_home = home(kept > 0 && !in_place), teacher_home = home(kept > 0);
  for (int64_t first = 0, rows; first < s.tokens; first += rows) {
    const bool keep = first < kept;
    rows = std::min(most, (keep ? kept : s.tokens) - first);
    const Tensor gradient = keep ? narrowed(dlogits, 1, first, kl_padded_tokens(rows)) : nowhere;
    student.start(first, rows, !keep ? nowhere : in_place ? gradient : student_home);
    teacher.start(first, rows, keep ? teacher_home : nowhere);
    KlPanel all{};
    for_panels(s, temperature, student, teacher, rows, [&](int64_t v, const KlPanel& panel) {
      if (v == 0) all = panel;
      fused_kl_div_statistics_cpu(
          {panel, static_cast<char*>(partial.data_ptr()) +
                      v / kKlSlabRows * kKlStatistics * kl_padded_tokens(rows) * s.bytes});
    });
    double* const lse_s = static_cast<double*>(student_lse.data_ptr()) + first;
    double* const lse_t = static_cast<double*>(teacher_lse.data_ptr()) + first;
    fused_kl_div_reduce_cpu({partial.data_ptr(), slabs, rows, s.dtype,
                             static_cast<char*>(kl.data_ptr()) + first * s.bytes, lse_s, lse_t});
    if (!keep) continue;
    all.vocab = s.vocab;
    all.student.weight = all.teacher.weight = nullptr;  // the logits are there
    fused_kl_div_gradient_cpu({all, nullptr, lse_s, lse_t, gradient.data_ptr(), gradient.stride(0),
                               kernel_dtype(s.kept)});
  }
  return {kl, student_lse, teacher_lse, dlogits};
}

// Row m of t times g[m], rounded once to `dtype`.
Tensor scaled_rows(const Tensor& t, const Tensor& g, ScalarType dtype) {
  const Tensor column = torch::stable::view(g, {g.size(0), 1});
  std::array<StableIValue, 2> stack{torch::stable::detail::from(t),
                                    torch::stable::detail::from(column)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::to(torch::stable::detail::to<Tensor>(stack[0]), dtype);
}

std::tuple<Tensor, Tensor> fused_kl_div_backward_op(
    const Tensor& dkl, const Tensor& student_hidden, const Tensor& student_weight,
    const Tensor& teacher_hidden, const Tensor& teacher_weight, const Tensor& student_lse,
    const Tensor& teacher_lse, const Tensor& dlogits, double temperature) {
  const Check check("fused_kl_div_backward");
  const Shape s = check_inputs(check, student_hidden, student_weight, teacher_hidden,
                               teacher_weight, temperature);
  check.shape("dkl", dkl, {s.tokens}, "[M]");
  check.dtype("dkl", dkl, s.acc);
  const Tensor g = torch::stable::contiguous(dkl);
  for (const auto& [name, lse] :
       {std::pair{"student_lse", student_lse}, std::pair{"teacher_lse", teacher_lse}}) {
    check.shape(name, lse, {s.tokens}, "[M]");
    check.dtype(name, lse, ScalarType::Double);
    check.contiguous(name, lse);
  }
  check.dtype("dlogits", dlogits, s.kept);
  check.contiguous("dlogits", dlogits);
  const bool any_kept = dlogits.dim() == 2;
  if (any_kept) check.shape("dlogits", dlogits, {s.vocab, -1}, "[V, kept tokens]");
  const int64_t kept = any_kept ? std::min(s.tokens, dlogits.size(1)) : 0;

  const int64_t Ds = student_hidden.size(1);
  if (s.tokens == 0)
    return {torch::stable::new_empty(student_hidden, {0, Ds}),
            torch::stable::new_zeros(student_weight, {s.vocab, Ds})};

  // Products run in `type`: the dtype of the gradient of the logits where the student has it too.
  const bool bf16 = s.kept == ScalarType::BFloat16 && cpu_has_amx_bf16();
  const ScalarType type = bf16 ? s.kept : s.acc;
  const bool direct = student_hidden.scalar_type() == type && student_weight.scalar_type() == type;
  const int64_t kept_bytes = s.kept == ScalarType::BFloat16 ? 2 : s.bytes;
  const int64_t most = std::min(s.tokens, kl_rows(kKlWorkBytes, s.vocab * kept_bytes, 16));
  const int64_t recomputed = std::min(most, s.tokens - kept);
  const int64_t chunk = std::max(kept, recomputed);  // tokens of one product
  const bool once = kept == s.tokens || (kept == 0 && most == s.tokens);
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return empty_like_shape(student_hidden, shape, dtype);
  };
  const int64_t panel = std::min(s.vocab, kl_rows(kKlWeightBytes, Ds * s.bytes, kKlSlabRows));
  Model student(s, student_hidden, student_weight, std::min(recomputed, kKlMostRows));
  Model teacher(s, teacher_hidden, teacher_weight, std::min(recomputed, kKlMostRows));
  const Tensor nowhere = empty({s.vocab, 0}, s.acc);
  const Tensor gradient = in_large_pages(empty({s.vocab * kl_padded_tokens(recomputed)}, s.kept));
  const Tensor wide_gradient = empty({s.kept == type ? 0 : panel * kl_padded_tokens(chunk)}, type);
  const Tensor wide_weight = empty({direct ? 0 : panel * Ds}, type);
  const Tensor wide_hidden = empty({chunk * Ds}, type);
  const Tensor part = in_large_pages(empty({std::max(panel, chunk) * Ds}, type));

  Tensor dhidden = in_large_pages(empty({s.tokens, Ds}, direct ? type : s.acc));
  Tensor dweight = in_large_pages(
      empty_like_shape(student_weight, {s.vocab, Ds}, once ? student_weight.scalar_type() : s.acc));
  // total = a b, or total += a b.
  const auto accumulate = [&](Tensor total, const Tensor& a, const Tensor& b, bool first) {
    if (first && total.scalar_type() == type) return matmul_into(a, b, total);
    const Tensor sum = matrix(part, total.size(0), total.size(1));
    matmul_into(a, b, sum);
    if (first)
      torch::stable::copy_(total, sum);
    else
      fused_kl_div_add_cpu(
          {total.data_ptr(), sum.data_ptr(), sum.numel(), s.dtype, kernel_dtype(type)});
  };
  for (int64_t first = 0, rows; first < s.tokens; first += rows) {
    const bool is_kept = first < kept;
    rows = is_kept ? kept : std::min(most, s.tokens - first);
    const int64_t ld = kl_padded_tokens(rows);
    const Tensor d = is_kept ? dlogits : matrix(gradient, s.vocab, ld);
    for (int64_t at = 0, some; !is_kept && at < rows; at += some) {
      some = std::min(kKlMostRows, rows - at);
      student.start(first + at, some, nowhere);
      teacher.start(first + at, some, nowhere);
      const int64_t token = first + at;
      for_panels(s, temperature, student, teacher, some, [&](int64_t v, const KlPanel& p) {
        fused_kl_div_gradient_cpu({p, static_cast<char*>(g.data_ptr()) + token * s.bytes,
                                   static_cast<double*>(student_lse.data_ptr()) + token,
                                   static_cast<double*>(teacher_lse.data_ptr()) + token,
                                   static_cast<char*>(d.data_ptr()) + (v * ld + at) * kept_bytes,
                                   ld, kernel_dtype(s.kept)});
      });
    }
    // Kept gradients are those of dkl = 1.
    const Tensor rows_g = narrowed(g, 0, first, rows);
    const Tensor hidden = rows_of(student_hidden, first, rows, wide_hidden);
    const Tensor scaled = is_kept ? scaled_rows(hidden, rows_g, type) : hidden;
    Tensor dh = narrowed(dhidden, 0, first, rows);
    if (direct) matmul_into(transposed(narrowed(d, 1, 0, rows)), student_weight, dh);
    const int64_t step = direct && once ? s.vocab : panel;
    for (int64_t v = 0; v < s.vocab; v += step) {
      const int64_t count = std::min(step, s.vocab - v);
      const Tensor dv = narrowed(rows_of(d, v, count, wide_gradient), 1, 0, rows);
      if (!direct)
        accumulate(dh, transposed(dv), rows_of(student_weight, v, count, wide_weight), v == 0);
      accumulate(narrowed(dweight, 0, v, count), dv, scaled, first == 0);
    }
    if (is_kept) torch::stable::copy_(dh, scaled_rows(dh, rows_g, dh.scalar_type()));
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
