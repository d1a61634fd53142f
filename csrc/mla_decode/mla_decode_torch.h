// mla_decode: argument checks and output allocation, the same for every device.
#pragma once

#include <tuple>

#include "common/torch_check.h"
#include "mla_decode/mla_decode.h"

namespace zebra {

struct MlaDecodeInputs {
  const Tensor &q, &cache, &block_table, &seq_lens;
  double scale;
  const OptTensor& kv_b_weight;
  int64_t num_kv_heads, kv_lora_rank, split_size;
};

// The checked problem, without its outputs.  `weight` owns a copy of kv_b_weight where one is
// needed.
inline MlaDecodeParams mla_decode_params(const Check& check, const MlaDecodeInputs& in,
                                         Tensor& weight) {
  const auto& [q, cache, block_table, seq_lens, scale, kv_b_weight, num_kv_heads, kv_lora_rank,
               split_size] = in;
  const DType dtype = check.floating("q", q);
  check.that(q.dim() == 4 && q.size(1) > 0 && q.size(2) > 0 && q.size(3) > 0, "q", describe(q),
             "[B, T, H, Dn + E] with T, H >= 1");
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), q_dim = q.size(3);
  check.last_dim_contiguous("q", q);
  check.like("cache", cache, q, "q");
  check.that(cache.dim() == 3 && cache.size(1) > 0 && cache.size(2) > 0, "cache", describe(cache),
             "[pages, page, R + E]");
  check.last_dim_contiguous("cache", cache);
  const int64_t depth = cache.size(2);
  int64_t R = kv_lora_rank, G = 1, nope = 0, v_dim = R;
  if (kv_b_weight) {
    check.like("kv_b_weight", *kv_b_weight, q, "q");
    check.that(kv_b_weight->dim() == 2, "kv_b_weight", describe(*kv_b_weight),
               "[G * (Dn + Dv), R]");
    G = num_kv_heads;
    check.that(G > 0 && H % G == 0, "num_kv_heads", std::to_string(G),
               "given with kv_b_weight and divide H = ", H);
    R = kv_b_weight->size(1);
    check.that(kv_lora_rank == 0 || kv_lora_rank == R, "kv_lora_rank", std::to_string(kv_lora_rank),
               "0 or R = ", R, ", the columns of kv_b_weight");
    check.that(R > 0 && R <= depth, "kv_b_weight", describe(*kv_b_weight),
               "[G * (Dn + Dv), R] with 1 <= R <= R + E = ", depth);
    nope = q_dim - (depth - R);
    check.that(nope >= 0, "q", describe(q), "at least E = ", depth - R, " wide");
    const int64_t rows = kv_b_weight->size(0);
    check.that(rows % G == 0 && rows / G > nope, "kv_b_weight", describe(*kv_b_weight),
               "[G * (Dn + Dv), R] with G = ", G, ", Dn = ", nope, " and Dv >= 1");
    v_dim = rows / G - nope;
    weight = torch::stable::contiguous(*kv_b_weight);
  } else {
    check.that(R > 0 && R <= depth, "kv_lora_rank", std::to_string(R), "1 to R + E = ", depth,
               " where kv_b_weight is not given");
    check.shape("q", q, {-1, -1, -1, depth}, "[B, T, H, R + E]");
  }
  check.dtype("block_table", block_table, ScalarType::Int);
  check.same_device("block_table", block_table, q);
  check.shape("block_table", block_table, {B, -1}, "[B, max_pages]");
  check.last_dim_contiguous("block_table", block_table);
  check.dtype("seq_lens", seq_lens, ScalarType::Int);
  check.same_device("seq_lens", seq_lens, q);
  check.shape("seq_lens", seq_lens, {B}, "[B]");
  check.that(split_size >= 0, "split_size", std::to_string(split_size),
             "0 (automatic) or a number of tokens");
  MlaDecodeParams p{};
  p.q = q.data_ptr();
  p.cache = cache.data_ptr();
  p.weight = kv_b_weight ? weight.data_ptr() : nullptr;
  p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  p.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  p.B = B, p.T = T, p.H = H, p.G = G, p.R = R, p.E = depth - R;
  p.nope = nope, p.v_dim = v_dim;
  p.pages = cache.size(0), p.page = cache.size(1), p.max_pages = block_table.size(1);
  for (int d = 0; d < 3; ++d) p.q_stride[d] = q.stride(d);
  p.page_stride = cache.stride(0), p.row_stride = cache.stride(1);
  p.table_stride = block_table.stride(0), p.seq_lens_stride = seq_lens.stride(0);
  p.split_size = split_size;
  p.scale = scale;
  p.dtype = dtype;
  return p;
}

template <typename Launch>
std::tuple<Tensor, Tensor> mla_decode_torch(const MlaDecodeInputs& in, Launch launch) {
  const Check check("mla_decode");
  Tensor weight = in.q;
  MlaDecodeParams p = mla_decode_params(check, in, weight);
  Tensor o = torch::stable::new_empty(in.q, {p.B, p.T, p.H, p.v_dim});
  Tensor lse = torch::stable::new_empty(in.q, {p.B, p.T, p.H}, acc_dtype(in.q));
  p.o = o.data_ptr();
  p.lse = lse.data_ptr();
  if (p.B > 0) check.status(launch(check, p));
  return {o, lse};
}

}  // namespace zebra
