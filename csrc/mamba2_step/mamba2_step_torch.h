// mamba2_step: argument checks and output allocation, the same for every device.
#pragma once

#include "common/torch_check.h"
#include "mamba2_step/mamba2_step.h"

namespace zebra {

// A contiguous parameter of x's dtype or fp32 (fp64 for fp64); returns its dtype.
inline DType step_parameter(const Check& check, const char* argument, const Tensor& t,
                            const Tensor& x, std::initializer_list<int64_t> sizes,
                            const char* legend) {
  check.shape(argument, t, sizes, legend);
  check.that(t.scalar_type() == x.scalar_type() || t.scalar_type() == acc_dtype(x), argument, t,
             dtype_name(x.scalar_type()), " like zxbcdt, or ", dtype_name(acc_dtype(x)));
  check.same_device(argument, t, x);
  check.contiguous(argument, t);
  return check.floating(argument, t);
}

// `validate(check, slots)` checks the values of A and state_indices where the host can read them.
template <typename Validate, typename Launch>
Tensor mamba2_step_torch(const Tensor& zxbcdt, const Tensor& conv_state, const Tensor& ssm_state,
                         const Tensor& conv_weight, const OptTensor& conv_bias,
                         const Tensor& dt_bias, const Tensor& A, const Tensor& D,
                         const OptTensor& norm_weight, int64_t n_groups,
                         const OptTensor& state_indices, double norm_eps, bool A_is_log,
                         Validate validate, Launch launch) {
  const Check check("mamba2_step");
  check.shape("ssm_state", ssm_state, {-1, -1, -1, -1}, "[slots, H, P, N]");
  const int64_t slots = ssm_state.size(0), H = ssm_state.size(1), P = ssm_state.size(2),
                N = ssm_state.size(3);
  check.that(H > 0 && P > 0 && N > 0, "ssm_state", ssm_state, "[slots, H, P, N] with H, P, N > 0");
  check.that(n_groups > 0 && H % n_groups == 0, "n_groups", std::to_string(n_groups),
             "a divisor of H = ", H);
  const int64_t G = n_groups, channels = G * (P + N) + H * N;
  check.that(conv_weight.dim() == 2 && conv_weight.size(1) > 0, "conv_weight", conv_weight,
             "[C, W] with W > 0");
  const int64_t W = conv_weight.size(1);

  const DType dtype = check.floating("zxbcdt", zxbcdt);
  check.shape("zxbcdt", zxbcdt, {-1, H * P + channels + H}, "[B, H P + G (P + N) + H N + H]");
  check.last_dim_contiguous("zxbcdt", zxbcdt);
  const int64_t batch = zxbcdt.size(0);

  check.like("conv_state", conv_state, zxbcdt, "zxbcdt");
  check.shape("conv_state", conv_state, {slots, channels, W - 1}, "[slots, C, W-1]");
  check.slots("conv_state", conv_state);
  check.that(ssm_state.scalar_type() == zxbcdt.scalar_type() ||
                 ssm_state.scalar_type() == acc_dtype(zxbcdt),
             "ssm_state", ssm_state, dtype_name(acc_dtype(zxbcdt)), " or ",
             dtype_name(zxbcdt.scalar_type()), " like zxbcdt");
  check.same_device("ssm_state", ssm_state, zxbcdt);
  check.slots("ssm_state", ssm_state);

  const DType conv_weight_dtype =
      step_parameter(check, "conv_weight", conv_weight, zxbcdt, {channels, W}, "[C, W]");
  const DType conv_bias_dtype =
      conv_bias ? step_parameter(check, "conv_bias", *conv_bias, zxbcdt, {channels}, "[C]") : dtype;
  const DType dt_bias_dtype = step_parameter(check, "dt_bias", dt_bias, zxbcdt, {H}, "[H]");
  const DType D_dtype = step_parameter(check, "D", D, zxbcdt, {H}, "[H]");
  const DType norm_weight_dtype =
      norm_weight ? step_parameter(check, "norm_weight", *norm_weight, zxbcdt, {H * P}, "[H P]")
                  : dtype;
  check.shape("A", A, {H}, "[H]");
  check.dtype("A", A, acc_dtype(zxbcdt));
  check.same_device("A", A, zxbcdt);
  check.contiguous("A", A);

  if (state_indices) {
    check.shape("state_indices", *state_indices, {batch}, "[B]");
    check.dtype("state_indices", *state_indices, ScalarType::Int);
    check.same_device("state_indices", *state_indices, zxbcdt);
    check.contiguous("state_indices", *state_indices);
  } else {
    check.that(slots >= batch, "ssm_state", ssm_state, "[slots, H, P, N] with slots >= B = ", batch,
               " where state_indices is not given");
  }
  validate(check, slots);

  Tensor y = torch::stable::new_empty(zxbcdt, {batch, H * P});
  if (batch > 0)
    check.status(launch(Mamba2StepParams{
        zxbcdt.data_ptr(),
        conv_state.data_ptr(),
        ssm_state.data_ptr(),
        conv_weight.data_ptr(),
        conv_bias ? conv_bias->data_ptr() : nullptr,
        dt_bias.data_ptr(),
        A.data_ptr(),
        D.data_ptr(),
        norm_weight ? norm_weight->data_ptr() : nullptr,
        state_indices ? static_cast<const std::int32_t*>(state_indices->data_ptr()) : nullptr,
        y.data_ptr(),
        nullptr,
        slots,
        batch,
        H,
        P,
        N,
        G,
        W,
        zxbcdt.stride(0),
        conv_state.stride(0),
        ssm_state.stride(0),
        A_is_log,
        dtype,
        check.floating("ssm_state", ssm_state),
        conv_weight_dtype,
        conv_bias_dtype,
        dt_bias_dtype,
        D_dtype,
        norm_weight_dtype,
        norm_eps}));
  return y;
}

}  // namespace zebra
