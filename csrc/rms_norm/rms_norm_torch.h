// rms_norm: argument checks and output allocation, the same for every device.
#pragma once

#include <tuple>

#include "common/torch_check.h"
#include "rms_norm/rms_norm.h"

namespace zebra {

// Rows of x as [rows, dim] with one stride: a view where the strides allow it, otherwise a copy.
inline Tensor as_rows(const Tensor& t) {
  const int64_t dim = t.size(t.dim() - 1), rows = dim == 0 ? 0 : t.numel() / dim;
  bool one_stride = t.dim() > 1 && (dim <= 1 || t.stride(t.dim() - 1) == 1);
  for (int64_t d = 0; d + 2 < t.dim(); ++d)
    one_stride = one_stride && (t.size(d) <= 1 || t.stride(d) == t.stride(d + 1) * t.size(d + 1));
  return torch::stable::view(one_stride ? t : torch::stable::contiguous(t), {rows, dim});
}

template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> rms_norm_torch(const Tensor& x, const Tensor& weight,
                                                  const OptTensor& residual, double eps,
                                                  Launch launch) {
  const Check check("rms_norm");
  check.that(x.dim() >= 1, "x", describe(x), "at least 1-D, [..., D]");
  const int64_t dim = x.size(x.dim() - 1);
  const DType dtype = check.floating("x", x);
  check.that(dim > 0, "x", describe(x), "non-empty in its last dimension");
  check.shape("weight", weight, {dim}, "[D]");
  const DType weight_dtype = check.parameter("weight", weight, x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor sum = no_tensor(x), r = x;
  if (residual) {
    check.like("residual", *residual, x, "x");
    bool same = residual->dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = residual->size(d) == x.size(d);
    check.that(same, "residual", describe(*residual), "shaped like x, ", describe(x));
    sum = torch::stable::new_empty(x, x.sizes());
    r = as_rows(*residual);
  }
  const Tensor rows = as_rows(x);
  Tensor rstd = torch::stable::new_empty(x, {rows.size(0)}, acc_dtype(x));
  if (rows.size(0) > 0)
    check.status(launch(RmsNormParams{
        rows.data_ptr(), residual ? r.data_ptr() : nullptr, weight.data_ptr(), y.data_ptr(),
        residual ? sum.data_ptr() : nullptr, rstd.data_ptr(), rows.size(0), dim, rows.stride(0),
        residual ? r.stride(0) : 0, dtype, weight_dtype, eps}));
  return {y, sum, rstd};
}

template <typename Launch>
std::tuple<Tensor, Tensor> rms_norm_backward_torch(const Tensor& dy, const OptTensor& dsum,
                                                   const Tensor& sum, const Tensor& weight,
                                                   const Tensor& rstd, int64_t partials,
                                                   Launch launch) {
  const Check check("rms_norm_backward");
  check.like("dy", dy, sum, "sum");
  const DType dtype = check.floating("sum", sum);
  const int64_t dim = sum.size(sum.dim() - 1);
  check.that(dy.numel() == sum.numel(), "dy", describe(dy), "shaped like sum, ", describe(sum));
  check.shape("weight", weight, {dim}, "[D]");
  check.shape("rstd", rstd, {sum.numel() / dim}, "[rows]");
  check.dtype("rstd", rstd, acc_dtype(sum));
  const Tensor dy_rows = as_rows(dy), rows = as_rows(sum);
  Tensor ds = no_tensor(sum);
  if (dsum) {
    check.like("dsum", *dsum, sum, "sum");
    check.that(dsum->numel() == sum.numel(), "dsum", describe(*dsum), "shaped like sum");
    ds = torch::stable::contiguous(*dsum);
  }
  Tensor dx = torch::stable::new_empty(sum, sum.sizes());
  Tensor dweight = torch::stable::new_empty(weight, {dim});
  Tensor partial = torch::stable::new_empty(sum, {partials, dim}, acc_dtype(sum));
  check.status(launch(RmsNormBackwardParams{
      dy_rows.data_ptr(), dsum ? ds.data_ptr() : nullptr, rows.data_ptr(), weight.data_ptr(),
      rstd.data_ptr(), dx.data_ptr(), dweight.data_ptr(), partial.data_ptr(), rows.size(0), dim,
      partials, dy_rows.stride(0), rows.stride(0), dtype, check.floating("weight", weight)}));
  return {dx, dweight};
}

}  // namespace zebra
