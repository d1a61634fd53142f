#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "mla_decode/mla_decode_torch.h"

namespace zebra {
namespace {

// Rows of `t` must start at multiples of `bytes`.
void check_aligned(const Check& check, const char* name, const Tensor& t, std::uintptr_t bytes) {
  const auto remainder = reinterpret_cast<std::uintptr_t>(t.data_ptr()) % bytes;
  const auto elements = static_cast<int64_t>(bytes / 2);
  bool ok = remainder == 0;
  for (int64_t d = 0; d < t.dim() - 1; ++d)
    ok = ok && (t.size(d) <= 1 || t.stride(d) % elements == 0);
  if (ok) return;
  std::ostringstream got;
  got << describe(t) << ", " << remainder << " bytes past a boundary";
  check.that(false, name, got.str(), bytes, "-byte aligned with strides that are multiples of ",
             elements, " (CUDA, 16 bit)");
}

std::tuple<Tensor, Tensor> composite(const MlaDecodeInputs& in) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{
      from(in.q),         from(in.cache),       from(in.block_table),  from(in.seq_lens),
      from(in.scale),     from(in.kv_b_weight), from(in.num_kv_heads), from(in.kv_lora_rank),
      from(in.split_size)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("zebra::_mla_decode_composite", "", stack.data(), TORCH_ABI_VERSION));
  Tensor o = torch::stable::detail::to<Tensor>(stack[0]);
  return {o, torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> mla_decode_op(const Tensor& q, const Tensor& cache,
                                         const Tensor& block_table, const Tensor& seq_lens,
                                         double scale, const OptTensor& kv_b_weight,
                                         int64_t num_kv_heads, int64_t kv_lora_rank,
                                         int64_t split_size) {
  const CudaScope scope(q);
  const MlaDecodeInputs in{q,           cache,        block_table,  seq_lens,  scale,
                           kv_b_weight, num_kv_heads, kv_lora_rank, split_size};
  // Checked here: a message from below would not survive the dispatcher.
  Tensor weight = q;
  const MlaDecodeParams wanted = mla_decode_params(Check("mla_decode"), in, weight);
  if (q.scalar_type() == ScalarType::Float || !mla_decode_cuda_takes(wanted)) return composite(in);
  return mla_decode_torch(in, [&](const Check& check, const MlaDecodeParams& p) {
    check_aligned(check, "q", q, 4);
    check_aligned(check, "cache", cache, 16);
    if (kv_b_weight) check_aligned(check, "kv_b_weight", *kv_b_weight, 16);
    const Tensor workspace =
        torch::stable::new_empty(q, {mla_decode_cuda_workspace(p)}, ScalarType::Byte);
    return mla_decode_cuda(p, workspace.data_ptr(), scope.stream());
  });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) {
  m.impl("mla_decode", TORCH_BOX(&zebra::mla_decode_op));
}
