#include <torch/csrc/stable/library.h>

#include "mla_decode/mla_decode_torch.h"

namespace zebra {
namespace {

// The values a CPU kernel would follow out of bounds.  Entries of the table past a sequence's
// pages are never read.
void check_values(const Check& check, const MlaDecodeParams& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t length = p.seq_lens[b * p.seq_lens_stride];
    check.that(length >= 0 && length <= p.max_pages * p.page, "seq_lens",
               std::to_string(length) + " at " + std::to_string(b),
               "0 to max_pages * page = ", p.max_pages * p.page);
    for (int64_t i = 0; i < ceil_div(length, p.page); ++i) {
      const int32_t page = p.block_table[b * p.table_stride + i];
      check.that(page >= 0 && page < p.pages, "block_table",
                 std::to_string(page) + " at [" + std::to_string(b) + ", " + std::to_string(i) +
                     "] with a sequence of " + std::to_string(length),
                 "0 to pages - 1 = ", p.pages - 1, " in the entries that a sequence uses");
    }
  }
}

auto mla_decode_op(const Tensor& q, const Tensor& cache, const Tensor& block_table,
                   const Tensor& seq_lens, double scale, const OptTensor& kv_b_weight,
                   int64_t num_kv_heads, int64_t kv_lora_rank, int64_t split_size) {
  return mla_decode_torch(
      {q, cache, block_table, seq_lens, scale, kv_b_weight, num_kv_heads, kv_lora_rank, split_size},
      [](const Check& check, MlaDecodeParams& p) {
        check_values(check, p);
        if (p.split_size == 0) p.split_size = kMlaDecodeCpuSplit;
        p.use_amx = cpu_has_amx_bf16();
        mla_decode_cpu(p);
        return Status{};
      });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) { m.impl("mla_decode", TORCH_BOX(&zebra::mla_decode_op)); }
