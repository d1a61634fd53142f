// The assembly kernels around torch's attention; zebra/ops/_attention_cuda.py calls them.
#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "mla_attention/mla_attention.h"

namespace zebra {
namespace {

// 16-byte access to [B, S, G, width] (or [B, S, width]) of 16-bit elements.
void check_vectors(const Check& check, const char* name, const Tensor& t) {
  bool ok = t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
  ok = ok && reinterpret_cast<std::uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) ok = ok && (t.size(d) <= 1 || t.stride(d) % 8 == 0);
  check.that(ok, name, t, "16 bit, 16-byte aligned, with strides that are multiples of 8");
  check.last_dim_contiguous(name, t);
}

// The stride of a dimension of one element may be anything: none is used.
int64_t stride(const Tensor& t, int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; }

// The distance of batch rows, such that rows of one batch element merge with nothing.
int64_t batch_stride(const Tensor& t) {
  return t.size(0) > 1 ? t.stride(0) : t.size(1) * stride(t, 1);
}

Tensor keys(const Tensor& kv, const Tensor& k_rope, int64_t nope) {
  const CudaScope scope(kv);
  const Check check("_mla_attention_keys");
  check.shape("kv", kv, {-1, -1, -1, -1}, "[B, S, G, Dn + Dv]");
  const int64_t B = kv.size(0), S = kv.size(1), G = kv.size(2);
  check.like("k_rope", k_rope, kv, "kv");
  check.shape("k_rope", k_rope, {B, S, -1}, "[B, S, E]");
  const int64_t E = k_rope.size(2);
  check_vectors(check, "kv", kv);
  check_vectors(check, "k_rope", k_rope);
  check.that(nope >= 0 && nope <= kv.size(3) && nope % 8 == 0 && E % 8 == 0, "nope_dim",
             std::to_string(nope), "a multiple of 8, as E = ", E);
  Tensor key = torch::stable::new_empty(kv, {B, S, G, nope + E});
  MlaKeysParams p{};
  p.kv = kv.data_ptr(), p.k_rope = k_rope.data_ptr(), p.key = key.data_ptr();
  p.B = B, p.S = S, p.G = G, p.nope = nope, p.E = E;
  p.kv_stride[0] = batch_stride(kv), p.rope_stride[0] = batch_stride(k_rope);
  p.kv_stride[1] = stride(kv, 1), p.kv_stride[2] = stride(kv, 2);
  p.rope_stride[1] = stride(k_rope, 1);
  check.status(mla_attention_keys_cuda(p, scope.stream()));
  return key;
}

std::tuple<Tensor, Tensor> key_gradients(const Tensor& dkey, const Tensor& dvalue, int64_t nope) {
  const CudaScope scope(dkey);
  const Check check("_mla_attention_key_gradients");
  check.shape("dkey", dkey, {-1, -1, -1, -1}, "[B, S, G, Dn + E]");
  const int64_t B = dkey.size(0), S = dkey.size(1), G = dkey.size(2), E = dkey.size(3) - nope;
  check.like("dvalue", dvalue, dkey, "dkey");
  check.shape("dvalue", dvalue, {B, S, G, -1}, "[B, S, G, Dv]");
  const int64_t v_dim = dvalue.size(3);
  check_vectors(check, "dkey", dkey);
  check_vectors(check, "dvalue", dvalue);
  check.that(nope >= 0 && E >= 0 && nope % 8 == 0 && E % 8 == 0 && v_dim % 8 == 0, "nope_dim",
             std::to_string(nope), "a multiple of 8, as E = ", E, " and Dv = ", v_dim);
  Tensor dkv = torch::stable::new_empty(dkey, {B, S, G, nope + v_dim});
  Tensor dk_rope = torch::stable::new_empty(dkey, {B, S, E});
  MlaKeyGradientsParams p{};
  p.dkey = dkey.data_ptr(), p.dvalue = dvalue.data_ptr();
  p.dkv = dkv.data_ptr(), p.dk_rope = dk_rope.data_ptr();
  p.B = B, p.S = S, p.G = G, p.nope = nope, p.E = E, p.v_dim = v_dim;
  p.key_stride[0] = batch_stride(dkey), p.value_stride[0] = batch_stride(dvalue);
  for (int d = 1; d < 3; ++d) {
    p.key_stride[d] = stride(dkey, d);
    p.value_stride[d] = stride(dvalue, d);
  }
  p.dtype = check.floating("dkey", dkey);
  check.status(mla_attention_key_gradients_cuda(p, scope.stream()));
  return {dkv, dk_rope};
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("_mla_attention_keys", TORCH_BOX(&zebra::keys));
  m.impl("_mla_attention_key_gradients", TORCH_BOX(&zebra::key_gradients));
}
