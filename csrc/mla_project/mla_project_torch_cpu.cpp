#include <torch/csrc/stable/library.h>

#include <tuple>

#include "mla_project/mla_project_torch.h"
#include "rms_norm/rms_norm.h"

namespace zebra {
namespace {

using torch::stable::contiguous;
using torch::stable::matmul;
using torch::stable::new_empty;
using torch::stable::view;

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

RopeTable rope_table(const Check& check, const MlaProjectInputs& in, const MlaProjectDims& d,
                     const Tensor& positions) {
  RopeTable rope{static_cast<const float*>(in.cos.data_ptr()),
                 static_cast<const float*>(in.sin.data_ptr()),
                 positions.data_ptr(),
                 positions.scalar_type() == ScalarType::Long,
                 in.cos.size(0),
                 d.E};
  for (int64_t t = 0; t < d.tokens; ++t)
    check.that(rope.position(t) >= 0 && rope.position(t) < rope.max_positions, "positions",
               std::to_string(rope.position(t)) + " at [" + std::to_string(t / d.T) + ", " +
                   std::to_string(t % d.T) + "]",
               "0 to maxpos - 1 = ", rope.max_positions - 1);
  return rope;
}

// A matrix product's rows, normalised where there is a weight.
struct Normed {
  Tensor raw, rstd, y;
};

Normed norm_rows(const Tensor& raw, int64_t dim, const OptTensor& weight, double eps,
                 const Check& check) {
  if (!weight) return {raw, raw, raw};
  const int64_t rows = raw.size(0);
  Tensor y = new_empty(raw, {rows, dim});
  Tensor rstd = new_empty(raw, {rows}, acc_dtype(raw));
  rms_norm_cpu(RmsNormParams{raw.data_ptr(), nullptr, weight->data_ptr(), y.data_ptr(), nullptr,
                             rstd.data_ptr(), rows, dim, raw.stride(0), 0,
                             check.floating("hidden", raw), check.floating("norm", *weight), eps});
  return {raw, rstd, y};
}

// Gradient of norm_rows: dx [rows, dim] contiguous, and the weight's.
std::tuple<Tensor, Tensor> norm_rows_backward(const void* dy, int64_t dy_stride, const Normed& n,
                                              int64_t dim, const Tensor& weight,
                                              const Check& check) {
  const int64_t rows = n.raw.size(0);
  Tensor dx = new_empty(n.raw, {rows, dim});
  Tensor dweight = new_empty(weight, {dim});
  Tensor partial = new_empty(n.raw, {kRmsNormCpuPartials, dim}, acc_dtype(n.raw));
  rms_norm_backward_cpu(RmsNormBackwardParams{
      dy, nullptr, n.raw.data_ptr(), weight.data_ptr(), n.rstd.data_ptr(), dx.data_ptr(),
      dweight.data_ptr(), partial.data_ptr(), rows, dim, kRmsNormCpuPartials, dy_stride,
      n.raw.stride(0), check.floating("hidden", n.raw), check.floating("norm", weight)});
  return {dx, dweight};
}

const char* at_column(const Tensor& t, int64_t column) {
  const int64_t bytes = t.scalar_type() == ScalarType::Double  ? 8
                        : t.scalar_type() == ScalarType::Float ? 4
                                                               : 2;
  return static_cast<const char*>(t.data_ptr()) + column * bytes;
}

// Both forms; `cache` and `slots` are nullptr without a cache.
std::tuple<Tensor, Tensor> project(const Check& check, const MlaProjectInputs& in,
                                   const Tensor* cache, const Tensor* slot_mapping) {
  const MlaProjectDims d = mla_project_dims(check, in);
  const Tensor positions = contiguous(in.positions);
  MlaProjectParams p{};
  p.rope = rope_table(check, in, d, positions);
  Tensor slots = positions;
  if (cache != nullptr) {
    slots = check_append(check, in, d, *cache, *slot_mapping);
    p.cache = cache->data_ptr();
    p.slot_mapping = static_cast<const int64_t*>(slots.data_ptr());
    p.pages = cache->size(0), p.page = cache->size(1);
    p.page_stride = cache->stride(0), p.row_stride = cache->stride(1);
  }
  const Tensor x = view(contiguous(in.hidden), {d.tokens, d.D});
  const Tensor c_q = in.q_a_weight ? matmul(x, transposed(*in.q_a_weight)) : x;
  const Normed q_a = norm_rows(c_q, d.rank_q, in.q_a_norm_weight, in.norm_eps, check);
  Tensor q = contiguous(matmul(q_a.y, transposed(in.q_b_weight)));
  const Tensor kv = contiguous(matmul(x, transposed(in.kv_a_weight)));
  const Normed c = norm_rows(kv, d.R, in.kv_a_norm_weight, in.norm_eps, check);
  Tensor latent = new_empty(kv, {d.B, d.T, d.R + d.E});
  p.q = q.data_ptr();
  p.c = c.y.data_ptr(), p.c_stride = c.y.stride(0);
  p.k = at_column(kv, d.R), p.k_stride = d.R + d.E;
  p.latent = latent.data_ptr();
  p.tokens = d.tokens, p.H = d.H, p.q_dim = d.q_dim, p.R = d.R;
  p.dtype = d.dtype;
  mla_project_cpu(p);
  return {view(q, {d.B, d.T, d.H, d.q_dim}), latent};
}

auto mla_project_op(const Tensor& hidden, const OptTensor& q_a_weight, const Tensor& q_b_weight,
                    const Tensor& kv_a_weight, const Tensor& cos, const Tensor& sin,
                    const Tensor& positions, int64_t num_heads, const OptTensor& q_a_norm_weight,
                    const OptTensor& kv_a_norm_weight, double norm_eps) {
  return project(Check("mla_project"),
                 {hidden, q_a_weight, q_b_weight, kv_a_weight, cos, sin, positions, num_heads,
                  q_a_norm_weight, kv_a_norm_weight, norm_eps},
                 nullptr, nullptr);
}

auto mla_project_append_op(const Tensor& hidden, const OptTensor& q_a_weight,
                           const Tensor& q_b_weight, const Tensor& kv_a_weight, const Tensor& cos,
                           const Tensor& sin, const Tensor& positions, int64_t num_heads,
                           Tensor cache, const Tensor& slot_mapping,
                           const OptTensor& q_a_norm_weight, const OptTensor& kv_a_norm_weight,
                           double norm_eps) {
  return project(Check("mla_project_append"),
                 {hidden, q_a_weight, q_b_weight, kv_a_weight, cos, sin, positions, num_heads,
                  q_a_norm_weight, kv_a_norm_weight, norm_eps},
                 &cache, &slot_mapping);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mla_project_backward_op(
    const Tensor& dq, const Tensor& dlatent, const Tensor& hidden, const OptTensor& q_a_weight,
    const Tensor& q_b_weight, const Tensor& kv_a_weight, const Tensor& cos, const Tensor& sin,
    const Tensor& positions, int64_t num_heads, const OptTensor& q_a_norm_weight,
    const OptTensor& kv_a_norm_weight, double norm_eps) {
  const Check check("mla_project_backward");
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  const MlaProjectDims d = mla_project_dims(check, in);
  const Tensor token_positions = contiguous(positions);
  MlaProjectBackwardParams p{};
  p.rope = rope_table(check, in, d, token_positions);
  check.like("dq", dq, hidden, "hidden");
  check.shape("dq", dq, {d.B, d.T, d.H, d.q_dim}, "[B, T, H, Dn + E]");
  check.like("dlatent", dlatent, hidden, "hidden");
  check.shape("dlatent", dlatent, {d.B, d.T, d.R + d.E}, "[B, T, R + E]");
  const Tensor dq_rows = contiguous(dq), dlatent_rows = contiguous(dlatent);
  const int64_t depth = d.R + d.E;

  // Only hidden is saved: the low-rank activations that gradients need are recomputed.
  const Tensor x = view(contiguous(hidden), {d.tokens, d.D});
  const Tensor c_q = q_a_weight ? matmul(x, transposed(*q_a_weight)) : x;
  const Normed q_a = norm_rows(c_q, d.rank_q, q_a_norm_weight, norm_eps, check);

  Tensor dc = dlatent_rows, dkv_a_norm = no_tensor(hidden);
  p.dc = dlatent_rows.data_ptr(), p.dc_stride = depth;
  if (kv_a_norm_weight) {
    const Tensor kv = contiguous(matmul(x, transposed(kv_a_weight)));
    const Normed c = norm_rows(kv, d.R, kv_a_norm_weight, norm_eps, check);
    std::tie(dc, dkv_a_norm) =
        norm_rows_backward(dlatent_rows.data_ptr(), depth, c, d.R, *kv_a_norm_weight, check);
    p.dc = dc.data_ptr(), p.dc_stride = d.R;
  }
  Tensor dq_raw = new_empty(hidden, {d.tokens, d.H * d.q_dim});
  Tensor dkv_raw = new_empty(hidden, {d.tokens, depth});
  p.dq = dq_rows.data_ptr();
  p.dk = at_column(dlatent_rows, d.R), p.dk_stride = depth;
  p.dq_raw = dq_raw.data_ptr(), p.dkv_raw = dkv_raw.data_ptr();
  p.tokens = d.tokens, p.H = d.H, p.q_dim = d.q_dim, p.R = d.R;
  p.dtype = d.dtype;
  mla_project_backward_cpu(p);

  const Tensor dq_b_weight = matmul(transposed(dq_raw), q_a.y);
  const Tensor dkv_a_weight = matmul(transposed(dkv_raw), x);
  Tensor dc_q = contiguous(matmul(dq_raw, q_b_weight)), dq_a_norm = no_tensor(hidden);
  if (q_a_norm_weight)
    std::tie(dc_q, dq_a_norm) =
        norm_rows_backward(dc_q.data_ptr(), d.rank_q, q_a, d.rank_q, *q_a_norm_weight, check);
  Tensor dq_a_weight = no_tensor(hidden), dx = dc_q;
  if (q_a_weight) {
    dq_a_weight = matmul(transposed(dc_q), x);
    dx = contiguous(matmul(dc_q, *q_a_weight));
  }
  const Tensor dx_kv = contiguous(matmul(dkv_raw, kv_a_weight));
  mla_project_add_cpu(AddParams{dx.data_ptr(), dx_kv.data_ptr(), d.tokens * d.D, d.dtype});
  return {view(dx, {d.B, d.T, d.D}), dq_a_weight, dq_b_weight, dkv_a_weight, dq_a_norm, dkv_a_norm};
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("mla_project", TORCH_BOX(&zebra::mla_project_op));
  m.impl("mla_project_append", TORCH_BOX(&zebra::mla_project_append_op));
  m.impl("mla_project_backward", TORCH_BOX(&zebra::mla_project_backward_op));
}
