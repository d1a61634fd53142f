// mla_project: argument checks, the same for every device.
#pragma once

#include "common/torch_check.h"
#include "mla_project/mla_project.h"

namespace zebra {

// The arguments that all of the operators share.
struct MlaProjectInputs {
  const Tensor& hidden;
  const OptTensor& q_a_weight;
  const Tensor& q_b_weight;
  const Tensor& kv_a_weight;
  const Tensor &cos, &sin, &positions;
  int64_t num_heads;
  const OptTensor &q_a_norm_weight, &kv_a_norm_weight;
  double norm_eps;
  const OptTensor* input_norm_weight = nullptr;  // of mla_project_append
  double input_norm_eps = 0;
};

struct MlaProjectDims {
  DType dtype;
  int64_t B, T, tokens, D, H, q_dim, rank_q, R, E;
};

inline MlaProjectDims mla_project_dims(const Check& check, const MlaProjectInputs& in) {
  MlaProjectDims d{};
  const Tensor& x = in.hidden;
  d.dtype = check.floating("hidden", x);
  check.that(x.dim() == 3 && x.size(2) > 0, "hidden", describe(x), "[B, T, D] with D >= 1");
  d.B = x.size(0), d.T = x.size(1), d.tokens = d.B * d.T, d.D = x.size(2);
  const auto weight = [&](const char* name, const Tensor& w, int64_t columns, const char* legend) {
    check.like(name, w, x, "hidden");
    check.shape(name, w, {-1, columns}, legend);
    check.that(w.size(0) > 0, name, describe(w), "non-empty");
  };
  const auto norm = [&](const char* name, const OptTensor& w, int64_t size, const char* legend) {
    if (!w) return;
    check.same_device(name, *w, x);
    check.that(check.floating(name, *w) == d.dtype || w->scalar_type() == ScalarType::Float, name,
               describe(*w), dtype_name(x.scalar_type()), " like hidden, or float32");
    check.shape(name, *w, {size}, legend);
    check.contiguous(name, *w);
  };
  d.rank_q = d.D;
  if (in.q_a_weight) {
    weight("q_a_weight", *in.q_a_weight, d.D, "[Rq, D]");
    d.rank_q = in.q_a_weight->size(0);
  }
  weight("q_b_weight", in.q_b_weight, d.rank_q,
         in.q_a_weight ? "[H * (Dn + E), Rq]" : "[H * (Dn + E), D]");
  weight("kv_a_weight", in.kv_a_weight, d.D, "[R + E, D]");
  for (const auto& [name, table] : {std::pair<const char*, const Tensor&>{"cos", in.cos},
                                    std::pair<const char*, const Tensor&>{"sin", in.sin}}) {
    check.dtype(name, table, ScalarType::Float);
    check.same_device(name, table, x);
    check.shape(name, table,
                {name[0] == 's' ? in.cos.size(0) : -1, name[0] == 's' ? in.cos.size(1) : -1},
                "[maxpos, E / 2]");
    check.contiguous(name, table);
  }
  d.E = 2 * in.cos.size(1), d.R = in.kv_a_weight.size(0) - d.E, d.H = in.num_heads;
  check.that(d.R > 0, "kv_a_weight", describe(in.kv_a_weight),
             "[R + E, D] with more rows than E = ", d.E);
  const int64_t rows = in.q_b_weight.size(0);
  check.that(d.H > 0 && rows % d.H == 0, "num_heads", std::to_string(d.H),
             "a divisor of the rows of q_b_weight, ", rows);
  d.q_dim = rows / d.H;
  check.that(d.q_dim >= d.E, "q_b_weight", describe(in.q_b_weight),
             "[H * (Dn + E), Rq] with H = ", d.H, " and Dn + E >= E = ", d.E);
  const Tensor& pos = in.positions;
  check.that(pos.scalar_type() == ScalarType::Int || pos.scalar_type() == ScalarType::Long,
             "positions", describe(pos), "int32 or int64");
  check.same_device("positions", pos, x);
  check.shape("positions", pos, {d.B, d.T}, "[B, T]");
  norm("q_a_norm_weight", in.q_a_norm_weight, d.rank_q, "[Rq]");
  norm("kv_a_norm_weight", in.kv_a_norm_weight, d.R, "[R]");
  if (in.input_norm_weight != nullptr) norm("input_norm_weight", *in.input_norm_weight, d.D, "[D]");
  return d;
}

// The cache of mla_project_append, and where its rows go: contiguous.  On the CPU the values are
// checked too.
inline Tensor check_append(const Check& check, const MlaProjectInputs& in, const MlaProjectDims& d,
                           const Tensor& cache, const Tensor& slot_mapping) {
  check.like("cache", cache, in.hidden, "hidden");
  check.shape("cache", cache, {-1, -1, d.R + d.E}, "[pages, page, R + E]");
  check.separate_rows("cache", cache);
  check.dtype("slot_mapping", slot_mapping, ScalarType::Long);
  check.same_device("slot_mapping", slot_mapping, in.hidden);
  check.shape("slot_mapping", slot_mapping, {d.B, d.T}, "[B, T]");
  const Tensor slots = torch::stable::contiguous(slot_mapping);
  const int64_t rows = cache.size(0) * cache.size(1);
  const int64_t* const slot = static_cast<const int64_t*>(slots.data_ptr());
  for (int64_t t = 0; slots.is_cpu() && t < d.tokens; ++t)
    check.that(slot[t] < rows, "slot_mapping",
               std::to_string(slot[t]) + " at [" + std::to_string(t / d.T) + ", " +
                   std::to_string(t % d.T) + "]",
               "negative (not stored) or at most pages * page - 1 = ", rows - 1);
  return slots;
}

}  // namespace zebra
