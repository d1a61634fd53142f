// mla_project from aten's matrix products and one pass over each token, on any device.
//
// A Device gives what differs:
//   norm, norm_backward, norm_partials  the kernels of rms_norm
//   rotate, unrotate                    those of mla_project
//   project                             all of mla_project_append at once, where it can
//   kInPlace                            whether `rotate` takes c and k in the latent itself
//   check_positions                     of values that the host can read
#pragma once

#include <optional>
#include <tuple>

#include "common/torch_mm.h"
#include "mla_project/mla_project_torch.h"
#include "rms_norm/rms_norm.h"

namespace zebra {

inline const char* at_column(const Tensor& t, int64_t column) {
  const int64_t bytes = t.scalar_type() == ScalarType::Double  ? 8
                        : t.scalar_type() == ScalarType::Float ? 4
                                                               : 2;
  return static_cast<const char*>(t.data_ptr()) + column * bytes;
}

inline Tensor columns(Tensor t, int64_t first, int64_t count) {
  return torch::stable::narrow(t, 1, first, count);
}

// Changes memory that t shares, not t.
inline void copy_rows(Tensor t, int64_t first, const Tensor& src) {
  Tensor rows = torch::stable::narrow(t, 0, first, src.size(0));
  torch::stable::copy_(rows, src);
}

template <typename Device>
class MlaProducts {
 public:
  MlaProducts(const Check& check, const MlaProjectInputs& in, const Device& device)
      : check_(check), in_(in), device_(device), d_(mla_project_dims(check, in)) {
    positions_ = torch::stable::contiguous(in.positions);
    rope_ = RopeTable{static_cast<const float*>(in.cos.data_ptr()),
                      static_cast<const float*>(in.sin.data_ptr()),
                      positions_.data_ptr(),
                      positions_.scalar_type() == ScalarType::Long,
                      in.cos.size(0),
                      d_.E};
    device.check_positions(check, rope_, d_);
  }

  const MlaProjectDims& dims() const { return d_; }

  // `cache` and `slot_mapping` are nullptr without a cache; `c_q` takes W_qa x for `backward`.
  std::tuple<Tensor, Tensor> forward(const Tensor* cache, const Tensor* slot_mapping,
                                     Tensor* c_q = nullptr) const {
    MlaProjectParams p{};
    p.rope = rope_;
    Tensor slots = positions_;
    if (cache != nullptr) {
      slots = check_append(check_, in_, d_, *cache, *slot_mapping);
      p.cache = cache->data_ptr();
      p.slot_mapping = static_cast<const int64_t*>(slots.data_ptr());
      p.pages = cache->size(0), p.page = cache->size(1);
      p.page_stride = cache->stride(0), p.row_stride = cache->stride(1);
    }
    const int64_t depth = d_.R + d_.E;
    const auto shaped = [&](const Tensor& q, const Tensor& latent) {
      return std::tuple{torch::stable::view(q, {d_.B, d_.T, d_.H, d_.q_dim}),
                        torch::stable::view(latent, {d_.B, d_.T, depth})};
    };
    Tensor x = rows();
    p.tokens = d_.tokens, p.H = d_.H, p.q_dim = d_.q_dim, p.R = d_.R;
    p.dtype = d_.dtype;
    if (const auto done = device_.project(check_, in_, d_, p, x))
      return shaped(std::get<0>(*done), std::get<1>(*done));
    if (in_.input_norm_weight != nullptr)
      x = norm(x, d_.D, *in_.input_norm_weight, in_.input_norm_eps).y;
    const Normed q_a = query_latent(x, std::nullopt);
    if (c_q != nullptr) *c_q = torch::stable::view(q_a.raw, {d_.B, d_.T, d_.rank_q});
    Tensor q = product(q_a.y, in_.q_b_weight);
    Tensor kv = product(x, in_.kv_a_weight);
    const Normed c = norm(kv, d_.R, in_.kv_a_norm_weight, in_.norm_eps);
    const bool in_place = Device::kInPlace && !in_.kv_a_norm_weight;
    Tensor latent = in_place ? kv : torch::stable::new_empty(kv, {d_.tokens, depth});
    p.q = q.data_ptr();
    p.c = c.y.data_ptr(), p.c_stride = c.y.stride(0);
    p.k = at_column(kv, d_.R), p.k_stride = depth;
    p.latent = latent.data_ptr();
    check_.status(device_.rotate(p));
    return shaped(q, latent);
  }

  // Where c_q was not kept it is computed again, as norms and what they apply to always are.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dq,
                                                                      const Tensor& dlatent,
                                                                      const OptTensor& c_q) const {
    const int64_t depth = d_.R + d_.E;
    check_.like("dq", dq, in_.hidden, "hidden");
    check_.shape("dq", dq, {d_.B, d_.T, d_.H, d_.q_dim}, "[B, T, H, Dn + E]");
    check_.like("dlatent", dlatent, in_.hidden, "hidden");
    check_.shape("dlatent", dlatent, {d_.B, d_.T, depth}, "[B, T, R + E]");
    if (c_q) {
      check_.that(in_.q_a_weight.has_value(), "c_q", describe(*c_q), "None without q_a_weight");
      check_.like("c_q", *c_q, in_.hidden, "hidden");
      check_.shape("c_q", *c_q, {d_.B, d_.T, d_.rank_q}, "[B, T, Rq]");
    }
    const Tensor dq_rows = torch::stable::contiguous(dq);
    const Tensor dlatent_rows = torch::stable::contiguous(dlatent);
    const Tensor x = rows();
    const Normed q_a = query_latent(x, c_q);

    MlaProjectBackwardParams p{};
    p.rope = rope_;
    Tensor dc = dlatent_rows, dkv_a_norm = no_tensor(in_.hidden);
    p.dc = dlatent_rows.data_ptr(), p.dc_stride = depth;
    if (in_.kv_a_norm_weight) {
      const Normed c = norm(product(x, in_.kv_a_weight), d_.R, in_.kv_a_norm_weight, in_.norm_eps);
      std::tie(dc, dkv_a_norm) =
          norm_backward(dlatent_rows.data_ptr(), depth, c, d_.R, *in_.kv_a_norm_weight);
      p.dc = dc.data_ptr(), p.dc_stride = d_.R;
    }
    // The gradients of all products of hidden lie side by side, so that one product with the
    // weights one above the other gives hidden's own.
    const bool hidden_norm =
        !in_.q_a_weight && in_.q_a_norm_weight;  // q_b does not apply to hidden
    const int64_t head = hidden_norm ? 0 : in_.q_a_weight ? d_.rank_q : d_.H * d_.q_dim;
    const Tensor down = new_rows(d_.tokens, head + depth);
    const Tensor dkv_raw = columns(down, head, depth);
    const Tensor dq_raw = in_.q_a_weight || hidden_norm ? new_rows(d_.tokens, d_.H * d_.q_dim)
                                                        : columns(down, 0, head);
    p.dq = dq_rows.data_ptr();
    p.dk = at_column(dlatent_rows, d_.R), p.dk_stride = depth;
    p.dq_raw = dq_raw.data_ptr(), p.dq_raw_stride = dq_raw.stride(0);
    p.dkv_raw = dkv_raw.data_ptr(), p.dkv_raw_stride = dkv_raw.stride(0);
    p.tokens = d_.tokens, p.H = d_.H, p.q_dim = d_.q_dim, p.R = d_.R;
    p.dtype = d_.dtype;
    check_.status(device_.unrotate(p));

    const Tensor dq_b_weight = product(transposed(dq_raw), transposed(q_a.y));
    const Tensor dkv_a_weight = product(transposed(dkv_raw), transposed(x));
    Tensor dq_a_weight = no_tensor(in_.hidden), dq_a_norm = no_tensor(in_.hidden);
    Tensor dnormed = dq_raw;
    if (in_.q_a_norm_weight) {
      const Tensor dy = product(dq_raw, transposed(in_.q_b_weight));
      std::tie(dnormed, dq_a_norm) =
          norm_backward(dy.data_ptr(), d_.rank_q, q_a, d_.rank_q, *in_.q_a_norm_weight);
    }
    if (in_.q_a_weight) {
      Tensor dc_q = columns(down, 0, head);
      if (in_.q_a_norm_weight)
        torch::stable::copy_(dc_q, dnormed);
      else
        matmul_into(dq_raw, in_.q_b_weight, dc_q);
      dq_a_weight = product(transposed(dc_q), transposed(x));
    }
    const Tensor weights = new_rows(head + depth, d_.D);
    if (head > 0) copy_rows(weights, 0, in_.q_a_weight ? *in_.q_a_weight : in_.q_b_weight);
    copy_rows(weights, head, in_.kv_a_weight);
    Tensor dx = new_rows(d_.tokens, d_.D);
    matmul_into(down, weights, dx);
    if (hidden_norm) dx = torch::stable::subtract(dx, dnormed, -1.0);
    return {torch::stable::view(dx, {d_.B, d_.T, d_.D}),
            dq_a_weight,
            dq_b_weight,
            dkv_a_weight,
            dq_a_norm,
            dkv_a_norm};
  }

 private:
  // A matrix product's rows, normalised where there is a weight.
  struct Normed {
    Tensor raw, rstd, y;
  };

  Tensor new_rows(int64_t rows, int64_t width) const {
    return torch::stable::new_empty(in_.hidden, {rows, width});
  }

  // t [B, T, width], contiguous, by token
  Tensor rows_of(const Tensor& t, int64_t width) const {
    return torch::stable::view(torch::stable::contiguous(t), {d_.tokens, width});
  }

  Tensor rows() const { return rows_of(in_.hidden, d_.D); }

  // a w^T, contiguous
  Tensor product(const Tensor& a, const Tensor& w) const {
    Tensor out = new_rows(a.size(0), w.size(0));
    matmul_into(a, transposed(w), out);
    return out;
  }

  Normed query_latent(const Tensor& x, const OptTensor& c_q) const {
    const Tensor raw = c_q              ? rows_of(*c_q, d_.rank_q)
                       : in_.q_a_weight ? product(x, *in_.q_a_weight)
                                        : x;
    return norm(raw, d_.rank_q, in_.q_a_norm_weight, in_.norm_eps);
  }

  // The first `dim` columns of raw, normalised where there is a weight.
  Normed norm(const Tensor& raw, int64_t dim, const OptTensor& weight, double eps) const {
    if (!weight) return {raw, raw, raw};
    const int64_t rows = raw.size(0);
    Tensor y = new_rows(rows, dim);
    Tensor rstd = torch::stable::new_empty(raw, {rows}, acc_dtype(raw));
    if (rows > 0)
      check_.status(device_.norm(RmsNormParams{
          raw.data_ptr(), nullptr, weight->data_ptr(), y.data_ptr(), nullptr, rstd.data_ptr(), rows,
          dim, raw.stride(0), 0, d_.dtype, check_.floating("norm", *weight), eps}));
    return {raw, rstd, y};
  }

  // Gradient of norm: dx [rows, dim] contiguous, and the weight's.
  std::tuple<Tensor, Tensor> norm_backward(const void* dy, int64_t dy_stride, const Normed& n,
                                           int64_t dim, const Tensor& weight) const {
    const int64_t rows = n.raw.size(0), partials = device_.norm_partials(rows);
    Tensor dx = new_rows(rows, dim);
    Tensor dweight = torch::stable::new_empty(weight, {dim});
    Tensor partial = torch::stable::new_empty(n.raw, {partials, dim}, acc_dtype(n.raw));
    check_.status(device_.norm_backward(RmsNormBackwardParams{
        dy, nullptr, n.raw.data_ptr(), weight.data_ptr(), n.rstd.data_ptr(), dx.data_ptr(),
        dweight.data_ptr(), partial.data_ptr(), rows, dim, partials, dy_stride, n.raw.stride(0),
        d_.dtype, check_.floating("norm", weight)}));
    return {dx, dweight};
  }

  const Check& check_;
  const MlaProjectInputs& in_;
  const Device& device_;
  MlaProjectDims d_;
  Tensor positions_;
  RopeTable rope_;
};

}  // namespace zebra
