// ssd_scan: argument checks and output allocation, the same for every device.
#pragma once

#include <tuple>

#include "common/torch_check.h"
#include "ssd_scan/ssd_scan.h"

namespace zebra {

// The tensor arguments, as both operators take them.
struct SsdScanInputs {
  const Tensor &x, &dt, &A, &B, &C;
  const OptTensor &D, &z, &dt_bias, &norm_weight, &initial_state, &cu_seqlens;
};

namespace ssd_scan_detail {

inline SsdStrides strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// A [H] or [H * P] vector of x's dtype or float32; nullptr where it is absent.
inline const void* vector(const Check& check, const char* name, const OptTensor& t, const Tensor& x,
                          int64_t size, const char* legend, DType& dtype) {
  dtype = DType::kFloat32;
  if (!t) return nullptr;
  check.shape(name, *t, {size}, legend);
  dtype = check.parameter(name, *t, x);
  return t->data_ptr();
}

// [B, T, groups, dim] with H a multiple of groups; returns groups.
inline int64_t grouped(const Check& check, const char* name, const Tensor& t, const Tensor& x,
                       int64_t heads, const char* legend) {
  check.shape(name, t, {x.size(0), x.size(1), -1, -1}, legend);
  if (&t != &x) check.like(name, t, x, "x");
  const int64_t groups = t.size(2);
  check.that(groups > 0 && heads % groups == 0, name, describe(t),
             "of a number of heads that divides H = ", heads);
  check.that(t.size(3) > 0, name, describe(t), "non-empty in its last dimension");
  check.last_dim_contiguous(name, t);
  return groups;
}

inline std::string element(const char* name, int64_t i, double value) {
  std::ostringstream s;
  s << name << "[" << i << "] = " << value;
  return s.str();
}

// Values can be read without a synchronisation on the CPU only.
inline void check_rates(const Check& check, const Tensor& A) {
  const bool wide = A.scalar_type() == ScalarType::Double;
  for (int64_t h = 0; h < A.size(0); ++h) {
    const double rate = wide ? static_cast<const double*>(A.data_ptr())[h]
                             : static_cast<const float*>(A.data_ptr())[h];
    check.that(!(rate > 0), "A", element("A", h, rate), "<= 0 (a decay rate) for every head");
  }
}

}  // namespace ssd_scan_detail

// Checks everything and fills in what does not depend on the outputs.  `state` keeps a contiguous
// copy of the initial state alive.
inline SsdScanParams ssd_scan_inputs(const Check& check, const SsdScanInputs& in, bool dt_softplus,
                                     double norm_eps, Tensor& state) {
  using namespace ssd_scan_detail;
  const Tensor &x = in.x, &dt = in.dt, &A = in.A, &B = in.B, &C = in.C;
  SsdScanParams p{};
  check.shape("x", x, {-1, -1, -1, -1}, "[B, T, Gx, P]");
  p.dtype = check.floating("x", x);
  check.shape("A", A, {-1}, "[H]");
  const int64_t H = A.size(0);
  check.that(H > 0, "A", describe(A), "of at least one head");
  check.dtype("A", A, acc_dtype(x));
  check.same_device("A", A, x);
  check.contiguous("A", A);
  p.batch = x.size(0), p.tokens = x.size(1), p.heads = H;
  p.x_heads = grouped(check, "x", x, x, H, "[B, T, Gx, P]");
  p.b_heads = grouped(check, "B", B, x, H, "[B, T, Gb, N]");
  p.c_heads = grouped(check, "C", C, x, H, "[B, T, Gc, N]");
  p.head_dim = x.size(3), p.state_dim = B.size(3);
  check.shape("C", C, {p.batch, p.tokens, p.c_heads, p.state_dim}, "[B, T, Gc, N]");
  check.shape("dt", dt, {p.batch, p.tokens, H}, "[B, T, H]");
  p.dt_dtype = check.floating("dt", dt);
  check.that(dt.scalar_type() == x.scalar_type() || p.dt_dtype == DType::kFloat32, "dt",
             describe(dt), dtype_name(x.scalar_type()), " like x, or float32");
  check.same_device("dt", dt, x);
  check.last_dim_contiguous("dt", dt);
  p.D = vector(check, "D", in.D, x, H, "[H]", p.d_dtype);
  p.dt_bias = vector(check, "dt_bias", in.dt_bias, x, H, "[H]", p.dt_bias_dtype);
  if (in.z) {
    check.shape("z", *in.z, {p.batch, p.tokens, H, p.head_dim}, "[B, T, H, P]");
    check.like("z", *in.z, x, "x");
    check.last_dim_contiguous("z", *in.z);
    p.z = in.z->data_ptr();
    p.z_stride = strides(*in.z);
  }
  p.norm_weight = vector(check, "norm_weight", in.norm_weight, x, H * p.head_dim, "[H * P]",
                         p.norm_weight_dtype);
  if (in.norm_weight)
    check.that(in.z.has_value(), "z", "None", "given with norm_weight (the norm follows the gate)");
  p.sequences = p.batch;
  if (in.cu_seqlens) {
    p.sequences = check.cu_seqlens(*in.cu_seqlens, x, "x", "[1, T, Gx, P]");
    p.cu_seqlens = static_cast<const int32_t*>(in.cu_seqlens->data_ptr());
  }
  if (in.initial_state) {
    const Tensor& s = *in.initial_state;
    check.shape("initial_state", s, {p.sequences, H, p.head_dim, p.state_dim},
                in.cu_seqlens ? "[n_seq, H, P, N]" : "[B, H, P, N]");
    check.dtype("initial_state", s, acc_dtype(x));
    check.same_device("initial_state", s, x);
    state = torch::stable::contiguous(s);
    p.initial_state = state.data_ptr();
  }
  if (x.is_cpu()) check_rates(check, A);
  p.x = x.data_ptr(), p.dt = dt.data_ptr(), p.A = A.data_ptr(), p.B = B.data_ptr();
  p.C = C.data_ptr();
  p.x_stride = strides(x), p.b_stride = strides(B), p.c_stride = strides(C);
  p.dt_stride = {dt.stride(0), dt.stride(1), 1};
  p.dt_softplus = dt_softplus;
  p.norm_eps = norm_eps;
  return p;
}

template <typename Launch>
std::tuple<Tensor, Tensor> ssd_scan_torch(const SsdScanInputs& in, bool dt_softplus,
                                          double norm_eps, Launch launch) {
  Tensor state = in.x;
  SsdScanParams p = ssd_scan_inputs(Check("ssd_scan"), in, dt_softplus, norm_eps, state);
  Tensor y = torch::stable::new_empty(in.x, {p.batch, p.tokens, p.heads, p.head_dim});
  Tensor final_state = torch::stable::new_empty(
      in.x, {p.sequences, p.heads, p.head_dim, p.state_dim}, acc_dtype(in.x));
  p.y = y.data_ptr();
  p.final_state = final_state.data_ptr();
  launch(p);
  return {y, final_state};
}

// Gradients in the order of the schema; a Launch takes SsdScanBackwardParams.
template <typename Launch>
auto ssd_scan_backward_torch(const Tensor& dy, const OptTensor& dfinal_state,
                             const SsdScanInputs& in, bool dt_softplus, double norm_eps,
                             Launch launch) {
  const Check check("ssd_scan_backward");
  const Tensor& x = in.x;
  Tensor state = x, dfinal = x;
  SsdScanBackwardParams p{};
  p.in = ssd_scan_inputs(check, in, dt_softplus, norm_eps, state);
  const int64_t H = p.in.heads, P = p.in.head_dim, N = p.in.state_dim;
  check.shape("dy", dy, {p.in.batch, p.in.tokens, H, P}, "[B, T, H, P]");
  check.like("dy", dy, x, "x");
  const Tensor grad = torch::stable::contiguous(dy);
  p.dy = grad.data_ptr();
  if (dfinal_state) {
    check.shape("dfinal_state", *dfinal_state, {p.in.sequences, H, P, N},
                in.cu_seqlens ? "[n_seq, H, P, N]" : "[B, H, P, N]");
    check.dtype("dfinal_state", *dfinal_state, acc_dtype(x));
    check.same_device("dfinal_state", *dfinal_state, x);
    dfinal = torch::stable::contiguous(*dfinal_state);
    p.dfinal_state = dfinal.data_ptr();
  }
  const auto like = [](const Tensor& t, void*& out) {
    Tensor g = torch::stable::new_empty(t, t.sizes());
    out = g.data_ptr();
    return g;
  };
  const auto like_optional = [&](const OptTensor& t, void*& out) {
    return t ? like(*t, out) : no_tensor(x);
  };
  Tensor dx = like(x, p.dx), ddt = like(in.dt, p.ddt), dA = like(in.A, p.dA);
  Tensor dB = like(in.B, p.dB), dC = like(in.C, p.dC), dD = like_optional(in.D, p.dD);
  Tensor dz = like_optional(in.z, p.dz), ddt_bias = like_optional(in.dt_bias, p.ddt_bias);
  Tensor dnorm_weight = like_optional(in.norm_weight, p.dnorm_weight);
  Tensor dinitial_state = like_optional(in.initial_state, p.dinitial_state);

  const int64_t block = ssd_scan_head_block(H, p.in.x_heads, p.in.b_heads, p.in.c_heads);
  const auto workspace = [&](std::initializer_list<int64_t> sizes, void*& out) {
    Tensor t = torch::stable::new_empty(x, sizes, acc_dtype(x));
    out = t.data_ptr();
    return t;
  };
  const auto partial = [&](int64_t groups, int64_t dim, void*& out) {
    return H / groups > block ? workspace({H / block, p.in.batch, p.in.tokens, dim}, out)
                              : no_tensor(x);
  };
  const Tensor sums = workspace({p.in.sequences, H, 3 + P}, p.sums);
  const Tensor dx_partial = partial(p.in.x_heads, P, p.dx_partial);
  const Tensor dB_partial = partial(p.in.b_heads, N, p.dB_partial);
  const Tensor dC_partial = partial(p.in.c_heads, N, p.dC_partial);
  launch(p);
  return std::make_tuple(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dnorm_weight, dinitial_state);
}

}  // namespace zebra
