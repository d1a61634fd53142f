// What the CPU kernels of mla_attention share: where a sequence, its query rows and its keys lie.
#pragma once

#include "common/cpu/flash_tile.h"
#include "mla_attention/mla_attention.h"

namespace zebra::ZEBRA_ISA {
namespace {

// One sequence: where it lies, and how its queries see its keys.
struct Sequence {
  std::int64_t batch, first;  // row of the batch, first token
  std::int64_t queries, keys;

  Sequence(const MlaAttentionShape& p, std::int64_t i)
      : batch(p.cu_seqlens ? 0 : i),
        first(p.cu_seqlens ? p.cu_seqlens[i] : 0),
        queries(p.cu_seqlens ? p.cu_seqlens[i + 1] - p.cu_seqlens[i] : p.T),
        keys(p.cu_seqlens ? queries : p.S) {}

  // Keys that query token t sees: a prefix.
  std::int64_t seen(const MlaAttentionShape& p, std::int64_t t) const {
    return p.causal ? keys - queries + t + 1 : keys;
  }
};

// Query rows of one KV head in a sequence, in blocks of `size`.
struct Rows {
  std::int64_t first, count;
  std::int64_t heads;  // H / G
  Rows(const MlaAttentionShape& p, const Sequence& s, std::int64_t block,
       std::int64_t size = kFlashRows)
      : first(block * size), heads(p.H / p.G) {
    const std::int64_t left = s.queries * heads - first;
    count = left < size ? left : size;
  }
  std::int64_t token(std::int64_t r) const { return (first + r) / heads; }
  std::int64_t head(std::int64_t r, std::int64_t g) const {
    return g * heads + (first + r) % heads;
  }
};

std::int64_t row_blocks(const MlaAttentionShape& p, const Sequence& s,
                        std::int64_t size = kFlashRows) {
  return ceil_div(s.queries * (p.H / p.G), size);
}

// Where key token j of a KV head lies.
template <typename T>
struct Key {
  const T *nope, *rope, *value;
  Key(const MlaAttentionShape& p, const Sequence& s, std::int64_t g, std::int64_t j) {
    const std::int64_t token = s.first + j;
    nope = static_cast<const T*>(p.kv) + s.batch * p.kv_stride[0] + token * p.kv_stride[1] +
           g * p.kv_stride[2];
    rope = static_cast<const T*>(p.k_rope) + s.batch * p.rope_stride[0] + token * p.rope_stride[1];
    value = nope + p.nope;
  }
};

template <typename T>
const T* query(const MlaAttentionShape& p, const Sequence& s, std::int64_t t, std::int64_t h) {
  return static_cast<const T*>(p.q) + s.batch * p.q_stride[0] + (s.first + t) * p.q_stride[1] +
         h * p.q_stride[2];
}

std::int64_t output_row(const MlaAttentionShape& p, const Sequence& s, std::int64_t t,
                        std::int64_t h) {
  return (s.batch * p.T + s.first + t) * p.H + h;
}

// The mask of a block of keys: nullptr where every row sees all of it.
const std::int32_t* block_mask(const MlaAttentionShape& p, const Sequence& s, const Rows& rows,
                               std::int64_t first, std::int64_t count, std::int32_t* visible) {
  if (s.seen(p, rows.token(0)) >= first + count) return nullptr;
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const std::int64_t seen = s.seen(p, rows.token(r)) - first;
    visible[r] = static_cast<std::int32_t>(seen < 0 ? 0 : seen < count ? seen : count);
  }
  return visible;
}

}  // namespace
}  // namespace zebra::ZEBRA_ISA
