// causal_conv1d: argument checks and output allocation, the same for every device.
#pragma once

#include <string>
#include <tuple>

#include "causal_conv1d/causal_conv1d.h"
#include "causal_conv1d/causal_conv1d_config.h"
#include "common/torch_check.h"

namespace zebra {

inline const void* pointer(const OptTensor& t) { return t ? t->data_ptr() : nullptr; }

inline int check_weight(const Check& check, const Tensor& weight, int64_t channels) {
  check.shape("weight", weight, {channels, -1}, "[C, W]");
  const int64_t width = weight.size(1);
  check.that(width >= 2 && width <= kCausalConv1dMaxWidth, "weight", describe(weight),
             "[C, W] with W 2, 3 or 4");
  return static_cast<int>(width);
}

inline bool check_activation(const Check& check, const std::string& activation) {
  check.that(activation == "silu" || activation == "none", "activation", "'" + activation + "'",
             "'silu' or 'none'");
  return activation == "silu";
}

struct CausalConv1dChecked {
  CausalConv1dInputs in;
  Tensor state;  // keeps a contiguous copy of initial_state alive
};

inline CausalConv1dChecked check_causal_conv1d(const Check& check, const Tensor& x,
                                               const Tensor& weight, const OptTensor& bias,
                                               const OptTensor& initial_state,
                                               const OptTensor& cu_seqlens,
                                               const std::string& activation) {
  check.shape("x", x, {-1, -1, -1}, "[B, T, C]");
  CausalConv1dInputs in = {};
  in.dtype = check.floating("x", x);
  in.batch = x.size(0), in.tokens = x.size(1), in.channels = x.size(2);
  check.that(in.channels > 0, "x", describe(x), "non-empty in its last dimension");
  check.last_dim_contiguous("x", x);
  in.width = check_weight(check, weight, in.channels);
  in.weight_dtype = check.parameter("weight", weight, x);
  if (bias) {
    check.shape("bias", *bias, {in.channels}, "[C]");
    in.bias_dtype = check.parameter("bias", *bias, x);
  }
  in.silu = check_activation(check, activation);
  in.sequences = cu_seqlens ? check.cu_seqlens(*cu_seqlens, x, "x", "[1, T, C]") : in.batch;
  Tensor state = x;
  if (initial_state) {
    check.shape("initial_state", *initial_state, {in.sequences, in.channels, in.width - 1},
                cu_seqlens ? "[n_seq, C, W-1]" : "[B, C, W-1]");
    check.like("initial_state", *initial_state, x, "x");
    state = torch::stable::contiguous(*initial_state);
    in.initial_state = state.data_ptr();
  }
  in.x = x.data_ptr();
  in.weight = weight.data_ptr();
  in.bias = pointer(bias);
  in.cu_seqlens = static_cast<const std::int32_t*>(pointer(cu_seqlens));
  in.x_batch_stride = in.batch > 1 ? x.stride(0) : 0;
  in.x_row_stride = in.tokens > 1 ? x.stride(1) : 0;
  return {in, state};
}

template <typename Launch>
std::tuple<Tensor, Tensor> causal_conv1d_torch(const Tensor& x, const Tensor& weight,
                                               const OptTensor& bias,
                                               const OptTensor& initial_state,
                                               const OptTensor& cu_seqlens,
                                               const std::string& activation, Launch launch) {
  const Check check("causal_conv1d");
  const CausalConv1dChecked c =
      check_causal_conv1d(check, x, weight, bias, initial_state, cu_seqlens, activation);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor state = torch::stable::new_empty(x, {c.in.sequences, c.in.channels, c.in.width - 1});
  check.status(launch(CausalConv1dParams{c.in, y.data_ptr(), state.data_ptr()}));
  return {y, state};
}

// `select(batch, tokens, channels)` chooses the tiles of the device.
template <typename Select, typename Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward_torch(
    const Tensor& dy, const OptTensor& dfinal_state, const Tensor& x, const Tensor& weight,
    const OptTensor& bias, const OptTensor& initial_state, const OptTensor& cu_seqlens,
    const std::string& activation, Select select, Launch launch) {
  const Check check("causal_conv1d_backward");
  const CausalConv1dChecked c =
      check_causal_conv1d(check, x, weight, bias, initial_state, cu_seqlens, activation);
  const CausalConv1dInputs& in = c.in;
  check.shape("dy", dy, {in.batch, in.tokens, in.channels}, "[B, T, C]");
  check.like("dy", dy, x, "x");
  const Tensor grad = in.channels == 1 || dy.stride(2) == 1 ? dy : torch::stable::contiguous(dy);
  Tensor dfinal = no_tensor(x);
  if (dfinal_state) {
    check.shape("dfinal_state", *dfinal_state, {in.sequences, in.channels, in.width - 1},
                "[.., C, W-1]");
    check.like("dfinal_state", *dfinal_state, x, "x");
    dfinal = torch::stable::contiguous(*dfinal_state);
  }
  const CausalConv1dConfig tiles = select(in.batch, in.tokens, in.channels);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes());
  Tensor dbias = bias ? torch::stable::new_empty(*bias, bias->sizes()) : no_tensor(x);
  Tensor dinitial =
      initial_state ? torch::stable::new_empty(x, initial_state->sizes()) : no_tensor(x);
  Tensor partial =
      torch::stable::new_empty(x, {tiles.partials, in.width + 1, in.channels}, acc_dtype(x));
  check.status(launch(CausalConv1dBackwardParams{
      in, grad.data_ptr(), dfinal_state ? dfinal.data_ptr() : nullptr, dx.data_ptr(),
      dweight.data_ptr(), bias ? dbias.data_ptr() : nullptr,
      initial_state ? dinitial.data_ptr() : nullptr, partial.data_ptr(),
      in.batch > 1 ? grad.stride(0) : 0, in.tokens > 1 ? grad.stride(1) : 0, tiles.tile,
      tiles.tiles, tiles.items, tiles.partials}));
  return {dx, dweight, dbias, dinitial};
}

template <typename Launch>
Tensor causal_conv1d_step_torch(const Tensor& x, Tensor conv_state, const Tensor& weight,
                                const OptTensor& bias, const std::string& activation,
                                const OptTensor& state_indices, Launch launch) {
  const Check check("causal_conv1d_step");
  check.shape("x", x, {-1, -1}, "[B, C]");
  CausalConv1dStepParams p = {};
  p.dtype = check.floating("x", x);
  p.batch = x.size(0), p.channels = x.size(1);
  check.that(p.channels > 0, "x", describe(x), "non-empty in its last dimension");
  check.last_dim_contiguous("x", x);
  p.width = check_weight(check, weight, p.channels);
  p.weight_dtype = check.parameter("weight", weight, x);
  if (bias) {
    check.shape("bias", *bias, {p.channels}, "[C]");
    p.bias_dtype = check.parameter("bias", *bias, x);
  }
  p.silu = check_activation(check, activation);
  const int64_t taps = p.width - 1;
  check.shape("conv_state", conv_state, {-1, p.channels, taps}, "[slots, C, W-1]");
  check.like("conv_state", conv_state, x, "x");
  check.slots("conv_state", conv_state);
  p.slots = conv_state.size(0);
  if (state_indices) {
    check.shape("state_indices", *state_indices, {p.batch}, "[B]");
    check.dtype("state_indices", *state_indices, ScalarType::Int);
    check.same_device("state_indices", *state_indices, x);
    check.contiguous("state_indices", *state_indices);
    p.state_indices = static_cast<const std::int32_t*>(state_indices->data_ptr());
    for (int64_t b = 0; x.is_cpu() && b < p.batch; ++b)
      check.that(p.state_indices[b] < p.slots, "state_indices",
                 std::to_string(p.state_indices[b]) + " at index " + std::to_string(b),
                 "below slots = ", p.slots);
  } else {
    check.that(p.slots >= p.batch, "conv_state", describe(conv_state), "[slots, C, W-1] with at ",
               "least B = ", p.batch, " slots when there are no state_indices");
  }
  Tensor y = torch::stable::new_empty(x, x.sizes());
  p.x = x.data_ptr(), p.conv_state = conv_state.data_ptr(), p.weight = weight.data_ptr();
  p.bias = pointer(bias), p.y = y.data_ptr();
  p.x_stride = p.batch > 1 ? x.stride(0) : 0;
  p.state_stride = p.slots > 1 ? conv_state.stride(0) : 0;
  if (p.batch > 0) check.status(launch(p));
  return y;
}

}  // namespace zebra
