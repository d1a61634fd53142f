// linear_decode: argument checks and output allocation, the same for every device.
#pragma once

#include <string>
#include <vector>

#include "common/torch_check.h"
#include "common/torch_mm.h"
#include "linear_decode/linear_decode.h"

namespace zebra {

// W h by ATen, [rows, outputs] or gate and up side by side: y itself where nothing follows.
inline Tensor linear_decode_products(const LinearDecodeParams& p, const Tensor& h,
                                     const Tensor& weight, const OptTensor& up_weight,
                                     const Tensor& y) {
  Tensor products = y;
  if (p.swiglu || p.bias != nullptr || p.residual != nullptr)
    products = torch::stable::new_empty(h, {p.rows, p.swiglu ? 2 * p.outputs : p.outputs});
  if (up_weight) {
    matmul_into(h, transposed(weight), torch::stable::narrow(products, 1, 0, p.outputs));
    matmul_into(h, transposed(*up_weight),
                torch::stable::narrow(products, 1, p.outputs, p.outputs));
  } else {
    matmul_into(h, transposed(weight), products);
  }
  return products;
}

// `launch(params, x, y)` fills y [rows, outputs] from x [rows, K] of a non-empty call.
template <typename Launch>
Tensor linear_decode_torch(const Tensor& x, const Tensor& weight, const OptTensor& norm_weight,
                           const OptTensor& bias, const OptTensor& residual,
                           const std::string& activation, double norm_eps,
                           const OptTensor& up_weight, Launch launch) {
  const Check check("linear_decode");
  check.that(activation == "none" || activation == "swiglu", "activation", "'" + activation + "'",
             "'none' or 'swiglu'");
  const bool swiglu = activation == "swiglu";
  const DType dtype = check.floating("x", x);
  check.that(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x", x, "[..., K] with K > 0");
  const int64_t K = x.size(x.dim() - 1), rows = x.numel() / K;
  const bool stacked = swiglu && !up_weight;  // gate and up rows are one weight
  check.like("weight", weight, x, "x");
  check.shape("weight", weight, {-1, K}, stacked ? "[2 N, K]" : "[N, K]");
  check.last_dim_contiguous("weight", weight);
  check.that(!stacked || weight.size(0) % 2 == 0, "weight", weight,
             "[2 N, K]: N gate rows, then N up rows");
  const int64_t outputs = stacked ? weight.size(0) / 2 : weight.size(0);
  const void* up = nullptr;
  if (up_weight) {
    check.that(swiglu, "up_weight", *up_weight, "None unless activation is 'swiglu'");
    check.like("up_weight", *up_weight, x, "x");
    check.shape("up_weight", *up_weight, {outputs, K}, "[N, K]");
    check.last_dim_contiguous("up_weight", *up_weight);
    check.that(outputs <= 1 || up_weight->stride(0) == weight.stride(0), "up_weight", *up_weight,
               "of rows as far apart as weight's, ", weight.stride(0));
    up = up_weight->data_ptr();
  } else if (swiglu) {
    Tensor all = weight;
    up = torch::stable::narrow(all, 0, outputs, outputs).data_ptr();
  }

  DType norm_dtype = dtype;
  if (norm_weight) {
    check.shape("norm_weight", *norm_weight, {K}, "[K]");
    check.that(
        norm_weight->scalar_type() == x.scalar_type() || norm_weight->scalar_type() == acc_dtype(x),
        "norm_weight", *norm_weight, dtype_name(x.scalar_type()), " like x, or ",
        dtype_name(acc_dtype(x)));
    check.same_device("norm_weight", *norm_weight, x);
    check.contiguous("norm_weight", *norm_weight);
    norm_dtype = check.floating("norm_weight", *norm_weight);
  }
  if (bias) {
    check.like("bias", *bias, x, "x");
    check.shape("bias", *bias, {swiglu ? 2 * outputs : outputs}, swiglu ? "[2 N]" : "[N]");
    check.contiguous("bias", *bias);
  }
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  shape.push_back(outputs);
  Tensor y = torch::stable::new_empty(x, shape);
  Tensor r = x;
  if (residual) {
    check.like("residual", *residual, x, "x");
    bool same = residual->dim() == y.dim();
    for (int64_t d = 0; same && d < y.dim(); ++d) same = residual->size(d) == y.size(d);
    check.that(same, "residual", *residual, "shaped like the result, ", y);
    r = torch::stable::view(torch::stable::contiguous(*residual), {rows, outputs});
  }
  if (rows == 0 || outputs == 0) return y;

  // One stride between the rows of x, a copy only where the strides do not allow it.
  bool one_stride = K == 1 || x.stride(x.dim() - 1) == 1;
  for (int64_t d = 0; d + 2 < x.dim(); ++d)
    one_stride = one_stride && (x.size(d) <= 1 || x.stride(d) == x.stride(d + 1) * x.size(d + 1));
  const Tensor in = torch::stable::view(one_stride ? x : torch::stable::contiguous(x), {rows, K});
  check.status(launch(
      LinearDecodeParams{
          in.data_ptr(), weight.data_ptr(), up, norm_weight ? norm_weight->data_ptr() : nullptr,
          bias ? bias->data_ptr() : nullptr, residual ? r.data_ptr() : nullptr, y.data_ptr(), rows,
          outputs, K, in.stride(0), weight.stride(0), outputs, dtype, norm_dtype, swiglu, norm_eps},
      in, torch::stable::view(y, {rows, outputs})));
  return y;
}

}  // namespace zebra
