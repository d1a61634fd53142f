// mla_decode on CUDA with kv_b_weight: how the products with it are dealt to CTAs.  Pure, as
// mla_decode_config.h.
//
// Rows here are those of a KV head: (sequence, new token, query head of the group), 16 a tile.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zebra {

constexpr int kMlaAbsorbThreads = 128;
constexpr int kMlaAbsorbColumns = 64;  // of a CTA, 16 a warp
constexpr int kMlaExpandThreads = 1024;
constexpr int kMlaExpandMostWidth = 128;  // value columns of a CTA
constexpr int kMlaExpandMostLanes = 32;   // threads that share the partial results of an element

// Whether the kernels take kv_b_weight with these columns a head and this latent rank.
constexpr bool mla_weight_takes(std::int64_t nope, std::int64_t v_dim, std::int64_t rank) {
  return nope >= 0 && nope <= 512 && nope % 8 == 0 && v_dim > 0 && v_dim % 8 == 0 && rank > 0 &&
         rank <= 512 && rank % 8 == 0;
}

struct MlaWeightShape {
  std::int64_t rows;  // sequences x new tokens x heads
  std::int64_t heads, kv_heads;
  std::int64_t nope, v_dim, rank, rope;
  bool is_split;  // the order of summation must not depend on the batch
};

struct MlaWeightConfig {
  // Absorption: grid [kv_heads, slices, column tiles]; a CTA walks tiles slice, slice + slices, ...
  int absorb_slices, absorb_columns, absorb_weight_pitch, absorb_q_pitch, absorb_smem_bytes;
  // Expansion: grid [kv_heads, slices, width tiles] of `threads`, `rows` of a tile.
  int rows, lanes, threads, expand_slices, width, widths, pitch, expand_smem_bytes;
  // From the end of the attention kernel's workspace on: latent queries, latent outputs.
  std::int64_t latent_bytes, workspace_bytes;
};

// Shared memory of the expansion: sums, statistics of threads; latent rows; the weight's rows.
constexpr int mla_expand_bytes(int threads, int width, int pitch) {
  return threads * (16 + 8) + (16 + width) * pitch;
}

constexpr MlaWeightConfig select_mla_weight_config(const MlaWeightShape& s, std::int64_t sms,
                                                   int smem_limit) {
  MlaWeightConfig c = {};
  const std::int64_t rows = s.rows / s.heads * (s.heads / s.kv_heads);  // of a KV head
  const int nope = static_cast<int>(round_up<std::int64_t>(s.nope, 16));
  c.absorb_columns = static_cast<int>(ceil_div<std::int64_t>(s.rank, kMlaAbsorbColumns));
  c.absorb_weight_pitch = kMlaAbsorbColumns * 2 + 16;  // odd 16-byte units, as ldmatrix likes them
  c.absorb_q_pitch = nope * 2 + 16;
  c.absorb_smem_bytes = nope * c.absorb_weight_pitch + 16 * c.absorb_q_pitch;
  const std::int64_t tiles = ceil_div<std::int64_t>(rows, 16);
  const std::int64_t absorb = ceil_div<std::int64_t>(4 * sms, s.kv_heads * c.absorb_columns);
  c.absorb_slices = static_cast<int>(tiles < absorb ? tiles : absorb);

  c.pitch = static_cast<int>(round_up<std::int64_t>(s.rank, 32)) * 2 + 16;
  c.width = kMlaExpandMostWidth;
  while (c.width / 2 >= s.v_dim ||
         mla_expand_bytes(kMlaExpandThreads, c.width, c.pitch) > smem_limit)
    c.width /= 2;
  if (c.width < 8) c.width = 8;
  c.widths = static_cast<int>(ceil_div<std::int64_t>(s.v_dim, c.width));
  // As few rows a CTA as still gives every multiprocessor one: who combines reads the fewer.
  const auto ctas = [&](int r) { return s.kv_heads * c.widths * ceil_div<std::int64_t>(rows, r); };
  c.rows = s.is_split ? 4 : 16;
  while (!s.is_split && c.rows > 1 && ctas(c.rows / 2) <= sms) c.rows /= 2;
  c.threads = s.is_split || ctas(c.rows) <= sms ? kMlaExpandThreads : kMlaExpandThreads / 2;
  const int per_sm = kMlaExpandThreads / c.threads;
  const std::int64_t all = ceil_div<std::int64_t>(rows, c.rows);
  const std::int64_t most = ceil_div<std::int64_t>(per_sm * sms, s.kv_heads * c.widths);
  c.expand_slices = static_cast<int>(all < most ? all : most);
  const int slots = c.rows * static_cast<int>(s.rank / 4);
  c.lanes = c.threads / slots;
  c.lanes = c.lanes < 1 ? 1 : c.lanes > kMlaExpandMostLanes ? kMlaExpandMostLanes : c.lanes;
  c.expand_smem_bytes = mla_expand_bytes(c.threads, c.width, c.pitch);
  c.latent_bytes = round_up<std::int64_t>(s.rows * (s.rank + s.rope) * 2, 256);
  c.workspace_bytes = c.latent_bytes + s.rows * s.rank * 2;
  return c;
}

}  // namespace zebra
