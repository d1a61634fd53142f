#include <torch/csrc/stable/library.h>

#include "mla_attention/mla_attention_torch.h"

namespace zebra {
namespace {

auto mla_attention_op(const Tensor& q, const Tensor& kv, const Tensor& k_rope, double scale,
                      const OptTensor& cu_seqlens, bool causal) {
  return mla_attention_torch(q, kv, k_rope, scale, cu_seqlens, causal, [](MlaAttentionParams& p) {
    p.in.use_amx = cpu_has_amx_bf16();
    mla_attention_cpu(p);
    return Status{};
  });
}

auto mla_attention_backward_op(const Tensor& dout, const OptTensor& dlse, const Tensor& q,
                               const Tensor& kv, const Tensor& k_rope, const Tensor& o,
                               const Tensor& lse, double scale, const OptTensor& cu_seqlens,
                               bool causal) {
  return mla_attention_backward_torch(dout, dlse, q, kv, k_rope, o, lse, scale, cu_seqlens, causal,
                                      [](MlaAttentionBackwardParams& p) {
                                        p.in.use_amx = cpu_has_amx_bf16();
                                        mla_attention_backward_cpu(p);
                                        return Status{};
                                      });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("mla_attention", TORCH_BOX(&zebra::mla_attention_op));
  m.impl("mla_attention_backward", TORCH_BOX(&zebra::mla_attention_backward_op));
}
