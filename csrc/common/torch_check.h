// Argument checks of registrations: every message names the operator, the argument, what was
// expected with the symbols resolved, and what came.  The only place that turns shapes into text.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/status.h"

namespace zebra {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device:") + std::to_string(t.get_device_index());
}

// "[2, 128, 64] bfloat16 on cuda:0, strides [8192, 64, 1]"
inline std::string describe(const Tensor& t) {
  std::ostringstream s;
  const auto list = [&s](const auto& values) {
    s << "[";
    for (size_t i = 0; i < values.size(); ++i) s << (i ? ", " : "") << values[i];
    s << "]";
  };
  list(t.sizes());
  s << " " << dtype_name(t.scalar_type()) << " on " << device_name(t);
  if (!t.is_contiguous()) {
    s << ", strides ";
    list(t.strides());
  }
  return s.str();
}

// Tensors in messages are described only when the message is needed.
inline std::string as_text(const Tensor& t) { return describe(t); }
template <typename T>
const T& as_text(const T& value) {
  return value;
}

// The checks of one operator.  Usage: `Check check("ssd_scan"); check.shape("x", x, {B, T, -1},
// "[B, T, C]");`
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // Throws unless `ok`; `expected` continues "<argument> must be".
  template <typename Got, typename... Parts>
  void that(bool ok, const char* argument, const Got& got, const Parts&... expected) const {
    if (ok) return;
    std::ostringstream s;
    s << "zebra::" << op_ << ": " << argument << " must be ";
    ((s << as_text(expected)), ...);
    s << ", got " << as_text(got);
    throw std::runtime_error(s.str());
  }

  // `sizes`: -1 accepts any size there; `legend` names the dimensions, such as "[B, T, C]".
  void shape(const char* argument, const Tensor& t, std::initializer_list<int64_t> sizes,
             const char* legend) const {
    bool ok = t.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (const int64_t size : sizes) {
      ok = ok && (size < 0 || t.size(d) == size);
      ++d;
    }
    if (ok) return;
    std::ostringstream want;
    want << legend << " = [";
    d = 0;
    for (const int64_t size : sizes) {
      want << (d++ ? ", " : "");
      if (size < 0)
        want << "any";
      else
        want << size;
    }
    want << "]";
    that(false, argument, t, want.str());
  }

  // One of float32, bfloat16, float16, or (CPU only) float64; returns it as DType.
  DType floating(const char* argument, const Tensor& t) const {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::Half:
        return DType::kFloat16;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Double:
        if (t.is_cpu()) return DType::kFloat64;
        [[fallthrough]];
      default:
        that(false, argument, t, "float32, bfloat16 or float16",
             t.is_cpu() ? " or float64" : " (float64 on the CPU only)");
    }
    return DType::kFloat32;
  }

  // A weight, bias or other parameter beside activations `x`: x's dtype or float32, on x's device,
  // contiguous; returns its dtype.
  DType parameter(const char* argument, const Tensor& t, const Tensor& x) const {
    const DType dtype = floating(argument, t);
    if (t.scalar_type() != x.scalar_type() && dtype != DType::kFloat32)
      that(false, argument, describe(t), dtype_name(x.scalar_type()), " like x, or float32");
    same_device(argument, t, x);
    contiguous(argument, t);
    return dtype;
  }

  void dtype(const char* argument, const Tensor& t, ScalarType want) const {
    that(t.scalar_type() == want, argument, t, dtype_name(want));
  }

  void same_device(const char* argument, const Tensor& t, const Tensor& as) const {
    that(t.is_cpu() == as.is_cpu() && t.is_cuda() == as.is_cuda() &&
             t.get_device_index() == as.get_device_index(),
         argument, t, "on ", device_name(as));
  }

  // Same dtype and device as `as`, which is called `as_name`.
  void like(const char* argument, const Tensor& t, const Tensor& as, const char* as_name) const {
    that(t.scalar_type() == as.scalar_type(), argument, t, dtype_name(as.scalar_type()), " like ",
         as_name);
    same_device(argument, t, as);
  }

  void last_dim_contiguous(const char* argument, const Tensor& t) const {
    that(t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, argument, t,
         "contiguous in its last dimension");
  }

  void contiguous(const char* argument, const Tensor& t) const {
    that(t.is_contiguous(), argument, t, "contiguous");
  }

  // States [slots, ...] that are written in place: each slot contiguous in itself, none
  // overlapping.
  void slots(const char* argument, const Tensor& t) const {
    int64_t slot = 1;
    bool ok = true;
    for (int64_t d = t.dim() - 1; d > 0; --d) {
      ok = ok && (t.size(d) <= 1 || t.stride(d) == slot);
      slot *= t.size(d);
    }
    that(t.numel() == 0 || (ok && (t.size(0) <= 1 || t.stride(0) >= slot)), argument, t,
         "contiguous within a slot, with slots at least ", slot, " elements apart");
  }

  // Rows [pages, page, width] that are written in place, each contiguous; none shares memory with
  // another, in whichever order pages and rows lie.
  void separate_rows(const char* argument, const Tensor& t) const {
    last_dim_contiguous(argument, t);
    int64_t need = t.size(2);  // elements from the first to the last of what is counted so far
    bool ok = true;
    const bool pages_first = t.stride(0) < t.stride(1);
    for (const int64_t d : {pages_first ? 0 : 1, pages_first ? 1 : 0}) {
      if (t.size(d) <= 1) continue;
      ok = ok && t.stride(d) >= need;
      need += (t.size(d) - 1) * t.stride(d);
    }
    that(t.numel() == 0 || ok, argument, t, "of rows that do not overlap");
  }

  // The bounds of the sequences packed in x [1, T, ...]: [n_seq + 1] int32 beside x; returns n_seq.
  // `legend` is x's shape then.  The values are checked on the CPU only; a GPU's kernels stay in
  // bounds whatever they are.
  int64_t cu_seqlens(const Tensor& cu, const Tensor& x, const char* x_name,
                     const char* legend) const {
    shape("cu_seqlens", cu, {-1}, "[n_seq + 1]");
    dtype("cu_seqlens", cu, ScalarType::Int);
    same_device("cu_seqlens", cu, x);
    contiguous("cu_seqlens", cu);
    that(x.size(0) == 1, x_name, x, legend, " with cu_seqlens");
    const int64_t sequences = cu.size(0) - 1, tokens = x.size(1);
    that(sequences >= 1 || (sequences == 0 && tokens == 0), "cu_seqlens", cu,
         "[n_seq + 1] with T = ", tokens, " tokens in at least one sequence");
    const int32_t* const bound = static_cast<const int32_t*>(cu.data_ptr());
    for (int64_t i = 0; cu.is_cpu() && i <= sequences; ++i) {
      const bool ok = (i == 0 ? bound[i] == 0 : bound[i] >= bound[i - 1]) &&
                      (i < sequences || bound[i] == tokens);
      that(ok, "cu_seqlens", std::to_string(bound[i]) + " at index " + std::to_string(i),
           "non-decreasing from 0 to T = ", tokens);
    }
    return sequences;
  }

  void status(const Status& s) const {
    if (s.error != nullptr) throw std::runtime_error(std::string("zebra::") + op_ + ": " + s.error);
  }

 private:
  const char* op_;
};

// Accumulation dtype of an element type: fp64 for fp64, fp32 otherwise.
inline ScalarType acc_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_like_shape(const Tensor& like, std::initializer_list<int64_t> sizes,
                               ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The placeholder of an output that a call does not produce: Python turns it back into None.
inline Tensor no_tensor(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

}  // namespace zebra
