// mla_decode on CUDA: how its kernels are launched, by cp.async or by TMA.
#pragma once

#include "common/cuda/launch.h"
#include "mla_decode/mla_decode_combine.cuh"
#include "mla_decode/mla_decode_kernel.cuh"
#include "mla_decode/mla_decode_tma.cuh"
#include "mla_decode/mla_decode_weight.cuh"

namespace zebra {
namespace {

inline std::int64_t mla_max_tokens(const MlaDecodeParams& p) {
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 8192;  // sums of tokens stay in int
  if (p.pages == 0) return 0;
  return p.max_pages > kMost / p.page ? kMost : p.max_pages * p.page;
}

inline MlaDecodeConfig mla_config(const MlaDecodeParams& p, bool tma) {
  return select_mla_decode_config(
      {p.B, p.T * p.H, p.R, p.E, mla_max_tokens(p), p.split_size, tma, p.weight != nullptr},
      multiprocessors(), device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// The arguments of a launch, or why there can be none.
inline Status mla_arguments(const MlaDecodeParams& p, const MlaDecodeConfig& c, void* workspace,
                            MlaArgs& a) {
  constexpr std::int64_t kInt = std::int64_t{1} << 31;
  const std::int64_t items = p.B * c.passes, max_tokens = mla_max_tokens(p);
  if (p.T * p.H >= kInt / 2 || p.page >= kInt || p.pages >= kInt || items >= kInt / 2)
    return {"T * H, pages, page and B * T * H / 128 must be below 2^30"};
  if (items * (max_tokens / c.stage + 3) >= kInt)
    return {
        "the cached tokens that block_table has room for, over all sequences, must be below "
        "2^36"};
  const auto log2 = [](int n) {
    int bits = 0;
    while (1 << bits < n) ++bits;
    return bits;
  };
  char* const base = static_cast<char*>(workspace);
  a.q = p.q, a.cache = p.cache, a.block_table = p.block_table, a.seq_lens = p.seq_lens;
  a.o = p.o, a.lse = static_cast<float*>(p.lse);
  a.stats = reinterpret_cast<float2*>(base);
  a.sums = reinterpret_cast<float*>(base + c.sums_offset);
  a.units = reinterpret_cast<MlaUnit*>(base + c.units_offset);
  for (int d = 0; d < 3; ++d) a.q_stride[d] = p.q_stride[d];
  a.page_stride = p.page_stride, a.row_stride = p.row_stride;
  a.table_stride = p.table_stride, a.seq_lens_stride = p.seq_lens_stride;
  a.page = mla_divisor(p.page), a.heads = mla_divisor(p.H);
  a.unit = mla_divisor(c.split > 0 ? c.split : c.stage);
  a.batch = static_cast<int>(p.B), a.tokens = static_cast<int>(p.T);
  a.rows = static_cast<int>(p.T * p.H);
  a.R = static_cast<int>(p.R), a.E = static_cast<int>(p.E), a.pages = static_cast<int>(p.pages);
  a.max_tokens = static_cast<int>(max_tokens);
  a.passes = c.passes, a.halves = c.halves, a.groups = c.groups;
  a.log_groups = log2(c.groups), a.log_team = log2(c.groups * c.halves);
  a.streams = c.streams, a.slots = c.slots, a.least = c.split > 0 ? 0 : log2(c.streams);
  const std::int64_t entries = (p.B - 1) * p.table_stride + p.max_pages;
  const std::int64_t lines = p.B > 0 && p.max_pages > 0 ? ceil_div<std::int64_t>(entries, 32) : 0;
  a.table_lines = static_cast<int>(lines < 8 * c.ctas ? lines : 8 * c.ctas);
  a.ctas = mla_divisor(c.ctas), a.merge_parts = c.merge_parts;
  std::int64_t alignment = reinterpret_cast<std::intptr_t>(p.q);
  for (int d = 0; d < 3; ++d) alignment |= p.q_stride[d] * 2;
  a.q_is_aligned = alignment % 16 == 0;
  a.q_offset = c.q_offset, a.ring_offset = c.ring_offset, a.item_cost = c.item_cost;
  a.pieces = static_cast<int>(c.pieces), a.unit_count = static_cast<int>(c.units);
  a.is_split = c.split > 0, a.unit_per_item = c.unit_per_item;
  a.scale = static_cast<float>(p.scale * 1.44269504088896340736);
  if (p.weight == nullptr) return {};
  if (p.B * p.T * p.H >= kInt) return {"B * T * H must be below 2^31 with kv_b_weight"};
  // The latent queries are the absorption's, and o is the expansion's.
  a.q = base + round_up<std::int64_t>(c.workspace_bytes, 256);
  a.o = base + round_up<std::int64_t>(c.workspace_bytes, 256) + mla_weight_config(p).latent_bytes;
  a.q_stride[2] = p.R + p.E, a.q_stride[1] = p.H * a.q_stride[2];
  a.q_stride[0] = p.T * a.q_stride[1];
  a.q_is_aligned = true;
  return {};
}

// `attending`: CTAs of the attention kernel that have work.
template <typename T>
Status mla_launch_combine(const MlaArgs& a, const MlaDecodeConfig& c, int attending,
                          cudaStream_t stream) {
  const int rows = 16 * c.groups, quads = c.rank / 8;
  MlaCombineArgs args = {};
  args.line = a, args.finds_units = a.unit_per_item && a.batch <= kMlaLineThreads;
  args.units = a.units, args.stats = a.stats;
  args.sums = reinterpret_cast<const float4*>(a.sums);
  args.o = a.o, args.lse = a.lse;
  args.quads = mla_divisor(quads), args.passes = mla_divisor(c.passes);
  args.rows = a.rows, args.pass_rows = rows, args.R = a.R;
  while (1 << args.log_lanes < c.combine_lanes) ++args.log_lanes;
  const int used = rows < a.rows ? rows : a.rows;
  args.parts = ceil_div(used * quads, 32 * kMlaWarps / c.combine_lanes);
  // One wave at most: where nobody cut an item, all that its CTAs do is start.
  const int sms = multiprocessors();
  const std::int64_t most = sms * 2 / c.units;
  const int parts = args.parts < most ? args.parts : most > 1 ? static_cast<int>(most) : 1;
  const dim3 grid(static_cast<unsigned>(c.units), static_cast<unsigned>(parts));
  if (args.finds_units && attending < sms) args.rehearsing = sms - attending;
  // The first multiprocessor that is free would take several CTAs, if there were room for them.
  int smem = 0;
  if (c.units * parts <= sms) {
    smem = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / 2;
    const Status s = allow_shared_memory(mla_combine_kernel<T>, smem);
    if (s.error != nullptr) return s;
  }
  return mla_launch_kernel({true}, mla_combine_kernel<T>, grid, 32 * kMlaWarps, smem, stream, args);
}

// An attention kernel, and before and after it what else the call needs.
template <typename T, typename Maps>
Status mla_launch_attention(void (*kernel)(MlaArgs, Maps), dim3 grid, int threads,
                            const MlaDecodeParams& p, const MlaArgs& a, const MlaDecodeConfig& c,
                            const Maps& maps, cudaStream_t stream) {
  Status s = allow_shared_memory(kernel, c.smem_bytes);
  if (s.error != nullptr) return s;
  if (p.weight != nullptr) s = mla_launch_absorb<T>(p, const_cast<void*>(a.q), stream);
  if (s.error == nullptr)
    s = mla_launch_kernel({p.weight != nullptr, grid.y}, kernel, grid, threads, c.smem_bytes,
                          stream, a, maps);
  if (p.weight == nullptr)
    return s.error != nullptr || c.units == 0
               ? s
               : mla_launch_combine<T>(a, c, c.ctas * static_cast<int>(grid.y), stream);
  const MlaPartials partials = {&a, a.units, a.stats, a.sums, a.o, c.rank, 16 * c.groups, c.passes};
  return s.error != nullptr ? s : mla_launch_expand<T>(p, partials, stream);
}

template <typename T, int kRank, int kRope, bool kTma>
Status mla_launch(const MlaDecodeParams& p, const MlaArgs& a, const MlaDecodeConfig& c,
                  const MlaMaps& maps, cudaStream_t stream) {
  if constexpr (kTma)
    return mla_launch_attention<T>(mla_decode_tma_kernel<T, kRank, kRope>, dim3(c.ctas),
                                   kMlaTmaThreads, p, a, c, maps, stream);
  else
    return mla_launch_attention<T>(mla_decode_kernel<T, kRank, kRope>, dim3(c.ctas), 32 * kMlaWarps,
                                   p, a, c, maps, stream);
}

template <typename T, bool kTma>
Status mla_launch(const MlaDecodeParams& p, const MlaArgs& a, const MlaDecodeConfig& c,
                  const MlaMaps& maps, cudaStream_t stream) {
  const bool narrow = c.rope == 32;
  switch (c.rank) {
    case 64:
      return narrow ? mla_launch<T, 64, 32, kTma>(p, a, c, maps, stream)
                    : mla_launch<T, 64, 64, kTma>(p, a, c, maps, stream);
    case 96:
      return mla_launch<T, 96, 64, kTma>(p, a, c, maps, stream);
    case 128:
      return narrow ? mla_launch<T, 128, 32, kTma>(p, a, c, maps, stream)
                    : mla_launch<T, 128, 64, kTma>(p, a, c, maps, stream);
    case 160:
      return mla_launch<T, 160, 64, kTma>(p, a, c, maps, stream);
    case 192:
      return mla_launch<T, 192, 64, kTma>(p, a, c, maps, stream);
    default:
      return mla_launch<T, 256, 64, kTma>(p, a, c, maps, stream);
  }
}

template <bool kTma>
Status mla_launch(const MlaDecodeParams& p, const MlaArgs& a, const MlaDecodeConfig& c,
                  const MlaMaps& maps, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? mla_launch<__nv_bfloat16, kTma>(p, a, c, maps, stream)
                                     : mla_launch<__half, kTma>(p, a, c, maps, stream);
}

}  // namespace
}  // namespace zebra
