// mla_attention for bf16 on the matrix unit of x86: packed keys, and the backward pass.
#pragma once

#include "common/cpu/flash_amx.h"
#include "common/cpu/parallel.h"
#include "mla_attention/mla_attention_cpu.h"

#ifdef ZEBRA_AMX

namespace zebra::ZEBRA_ISA {
namespace {

// Keys and values of every KV head as FlashAmx::fold takes them: packed once, read by every row
// block of the head.  Each sequence is padded to whole steps of 32 keys.
struct PackedKeys {
  const MlaAttentionShape& p;
  const std::int64_t ldk, ldv;
  Aligned<std::int64_t> first;  // [sequences + 1]: step where a sequence starts
  const std::int64_t steps;     // of one KV head
  Aligned<BFloat16> k;          // [G, steps, 32, ldk]
  Aligned<BFloat16> v_t;        // [G, steps, ldv, 32]

  explicit PackedKeys(const MlaAttentionShape& shape)
      : p(shape),
        ldk(pad_32(p.nope + p.E)),
        ldv(pad_32(p.v_dim)),
        first(p.sequences + 1),
        steps(count_steps()),
        k(p.G * steps * 32 * ldk),
        v_t(p.G * steps * 32 * ldv) {
    parallel_for(p.G * steps, 8, [&](std::int64_t begin, std::int64_t end) {
      Aligned<BFloat16> v(32 * ldv);
      std::int64_t i = 0, before = 0;
      for (std::int64_t at = begin; at < end; ++at) {
        const std::int64_t step = at % steps;
        if (step < before) i = 0;  // the next KV head
        before = step;
        while (first[i + 1] <= step) ++i;
        pack(Sequence(p, i), at / steps, (step - first[i]) * 32, keys_at(at), values_at(at), v);
      }
    });
  }

  BFloat16* keys_at(std::int64_t at) const { return k + at * 32 * ldk; }
  BFloat16* values_at(std::int64_t at) const { return v_t + at * 32 * ldv; }

 private:
  std::int64_t count_steps() {
    first[0] = 0;
    for (std::int64_t i = 0; i < p.sequences; ++i)
      first[i + 1] = first[i] + ceil_div<std::int64_t>(Sequence(p, i).keys, 32);
    return first[p.sequences];
  }

  void pack(const Sequence& s, std::int64_t g, std::int64_t token, BFloat16* keys, BFloat16* values,
            BFloat16* v) const {
    const std::int64_t count = s.keys - token < 32 ? s.keys - token : 32;
    for (std::int64_t j = 0; j < 32; ++j) {
      if (j >= count) {
        copy_padded(nullptr, 0, keys + j * ldk, ldk);
        copy_padded(nullptr, 0, v + j * ldv, ldv);
        continue;
      }
      const Key<BFloat16> key(p, s, g, token + j);
      copy_padded(key.nope, p.nope, keys + j * ldk, p.nope);
      copy_padded(key.rope, p.E, keys + j * ldk + p.nope, ldk - p.nope);
      copy_padded(key.value, p.v_dim, v + j * ldv, ldv);
    }
    transpose_32_rows(ldv, v, ldv, values);
  }
};

// The backward pass of one KV head.  With S^T = K Q^T and dP^T = V dO^T of 128 keys by 128 query
// rows, P^T and dS^T are rounded to bf16 once, and
//   dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T
struct GradientAmx {
  static constexpr std::int64_t kKeys = 128, kRows = 128;

  const MlaAttentionBackwardParams& params;
  const MlaAttentionShape& p;
  const std::int64_t depth, ldk, ldv, most;  // most: keys of the longest sequence, padded
  const float scale, to_log2;
  // of the KV head
  Aligned<BFloat16> k, v, k_t;  // [most, ldk], [most, ldv], [most / 32, ldk, 32]
  Aligned<float> dk, dv;        // [most, ldk or ldv]; dk without the scale
  // of the row block
  Aligned<BFloat16> q, dout;                   // [kRows, ldk or ldv]
  Aligned<std::uint32_t> q_t, dout_t;          // pairs [ldk or ldv / 2, kRows]
  Aligned<std::uint32_t> q_pairs, dout_pairs;  // pairs [kRows / 2, ldk or ldv]
  Aligned<float> dq_t, dq;                     // [ldk, kRows], [kRows, ldk]
  Aligned<float> lse, delta;                   // [kRows]; lse in units of log 2
  // of the block
  Aligned<BFloat16> probability, ds;  // [kKeys, kRows]
  Aligned<std::uint32_t> ds_pairs;    // [kKeys / 2, kRows]
  Aligned<float> s, dp;               // [32, 32]

  GradientAmx(const MlaAttentionBackwardParams& params_, std::int64_t most_keys)
      : params(params_),
        p(params_.in),
        depth(p.nope + p.E),
        ldk(pad_32(depth)),
        ldv(pad_32(p.v_dim)),
        most(pad_32(most_keys)),
        scale(static_cast<float>(p.scale)),
        to_log2(static_cast<float>(p.scale) * kLog2E),
        k(most * ldk),
        v(most * ldv),
        k_t(most * ldk),
        dk(most * ldk),
        dv(most * ldv),
        q(kRows * ldk),
        dout(kRows * ldv),
        q_t(kRows * ldk / 2),
        dout_t(kRows * ldv / 2),
        q_pairs(kRows * ldk / 2),
        dout_pairs(kRows * ldv / 2),
        dq_t(kRows * ldk),
        dq(kRows * ldk),
        lse(kRows),
        delta(kRows),
        probability(kKeys * kRows),
        ds(kKeys * kRows),
        ds_pairs(kKeys * kRows / 2),
        s(32 * 32),
        dp(32 * 32) {}

  void head(const Sequence& seq, std::int64_t g) {
    const std::int64_t padded = pad_32(seq.keys);
    for (std::int64_t j = 0; j < padded; ++j) {
      BFloat16 *const kj = k + j * ldk, *const vj = v + j * ldv;
      if (j >= seq.keys) {
        copy_padded(nullptr, 0, kj, ldk);
        copy_padded(nullptr, 0, vj, ldv);
        continue;
      }
      const Key<BFloat16> key(p, seq, g, j);
      copy_padded(key.nope, p.nope, kj, p.nope);
      copy_padded(key.rope, p.E, kj + p.nope, ldk - p.nope);
      copy_padded(key.value, p.v_dim, vj, ldv);
    }
    for (std::int64_t j = 0; j < padded; j += 32)
      transpose_32_rows(ldk, k + j * ldk, ldk, k_t + j * ldk);
    std::memset(dk, 0, static_cast<std::size_t>(padded * ldk) * 4);
    std::memset(dv, 0, static_cast<std::size_t>(padded * ldv) * 4);
    const std::int64_t blocks = row_blocks(p, seq, kRows);
    for (std::int64_t block = 0; block < blocks; ++block)
      row_block(seq, g, Rows(p, seq, block, kRows));
    for (std::int64_t j = 0; j < seq.keys; ++j) {
      const std::int64_t token = seq.batch * p.S + seq.first + j;
      BFloat16* const dkv =
          static_cast<BFloat16*>(params.dkv) + (token * p.G + g) * (p.nope + p.v_dim);
      float* const dkj = dk + j * ldk;
      for (std::int64_t i = 0; i < depth; ++i) dkj[i] *= scale;
      store_row(dkj, dkv, p.nope);
      store_row(dv + j * ldv, dkv + p.nope, p.v_dim);
      float* const rope = static_cast<float*>(params.partial) + (g * p.B * p.S + token) * p.E;
      for (std::int64_t i = 0; i < p.E; ++i) rope[i] = dkj[p.nope + i];
    }
  }

 private:
  void load_rows(const Sequence& seq, std::int64_t g, const Rows& rows) {
    for (std::int64_t r = 0; r < kRows; ++r) {
      BFloat16 *const qr = q + r * ldk, *const dor = dout + r * ldv;
      if (r >= rows.count) {  // probability 0
        copy_padded(nullptr, 0, qr, ldk);
        copy_padded(nullptr, 0, dor, ldv);
        lse[r] = std::numeric_limits<float>::infinity(), delta[r] = 0.0f;
        continue;
      }
      const std::int64_t t = rows.token(r), h = rows.head(r, g), row = output_row(p, seq, t, h);
      const BFloat16* const dor_in = static_cast<const BFloat16*>(params.dout) + row * p.v_dim;
      copy_padded(query<BFloat16>(p, seq, t, h), depth, qr, ldk);
      copy_padded(dor_in, p.v_dim, dor, ldv);
      const BFloat16* const o = static_cast<const BFloat16*>(params.o) + row * p.v_dim;
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (std::int64_t i = 0; i < p.v_dim; ++i) dot += to_acc(o[i]) * to_acc(dor_in[i]);
      delta[r] = dot - (params.dlse ? static_cast<const float*>(params.dlse)[row] : 0.0f);
      const float natural = static_cast<const float*>(params.lse)[row];
      // A row without keys gets 2^(s - inf) = 0.
      lse[r] = std::isinf(natural) && natural < 0.0f ? -natural : natural * kLog2E;
    }
    transpose_to_pairs(kRows, ldk, q, ldk, q_t, kRows);
    transpose_to_pairs(kRows, ldv, dout, ldv, dout_t, kRows);
    rows_to_pairs(kRows, ldk, q, ldk, q_pairs, ldk);
    rows_to_pairs(kRows, ldv, dout, ldv, dout_pairs, ldv);
  }

  void row_block(const Sequence& seq, std::int64_t g, const Rows& rows) {
    load_rows(seq, g, rows);
    std::memset(dq_t, 0, static_cast<std::size_t>(ldk * kRows) * 4);
    const std::int64_t end = seq.seen(p, rows.token(rows.count - 1));
    for (std::int64_t at = 0; at < end; at += kKeys) {
      const std::int64_t count = end - at < kKeys ? end - at : kKeys, keys = pad_32(count);
      std::int32_t visible[kRows] = {};
      const bool masked = block_mask(p, seq, rows, at, count, visible) != nullptr;
      if (!masked)
        for (std::int32_t& n : visible) n = static_cast<std::int32_t>(count);
      for (std::int64_t j = 0; j < keys; j += 32)
        for (std::int64_t r = 0; r < kRows; r += 32)
          probabilities(at + j, j, r, masked || j + 32 > count, visible);
      amx_product<true>(keys, ldv, kRows, probability, kRows, 32, dout_pairs, ldv, dv + at * ldv,
                        ldv);
      amx_product<true>(keys, ldk, kRows, ds, kRows, 32, q_pairs, ldk, dk + at * ldk, ldk);
      amx_product<true>(ldk, kRows, keys, k_t + at * ldk, 32, 32 * ldk, ds_pairs, kRows, dq_t,
                        kRows);
    }
    transpose_dwords(ldk, kRows, dq_t, kRows, dq, ldk);
    for (std::int64_t r = 0; r < rows.count; ++r) {
      float* const dqr = dq + r * ldk;
      for (std::int64_t i = 0; i < depth; ++i) dqr[i] *= scale;
      const std::int64_t row = output_row(p, seq, rows.token(r), rows.head(r, g));
      store_row(dqr, static_cast<BFloat16*>(params.dq) + row * depth, depth);
    }
  }

  // P^T and dS^T (without the scale) of 32 keys by 32 rows: key `token` of the head, row j of the
  // block.
  void probabilities(std::int64_t token, std::int64_t j, std::int64_t r, bool masked,
                     const std::int32_t* visible) {
    amx_product<false>(32, 32, ldk, k + token * ldk, ldk, 32, q_t + r, kRows, s, 32);
    amx_product<false>(32, 32, ldv, v + token * ldv, ldv, 32, dout_t + r, kRows, dp, 32);
    Float16 base[2], shift[2];
    __m512i limit[2];
    for (int half = 0; half < 2; ++half) {
      base[half] = lanes(lse + r + half * 16);
      shift[half] = lanes(delta + r + half * 16);
      limit[half] = _mm512_loadu_si512(visible + r + half * 16);
    }
    for (std::int64_t i = 0; i < 32; i += 2) {
      Float16 e[2][2], d[2][2];  // [key, half]
#pragma GCC unroll 2
      for (int key = 0; key < 2; ++key) {
        const __m512i at = _mm512_set1_epi32(static_cast<int>(j + i) + key);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const std::int64_t from = (i + key) * 32 + half * 16;
          const __mmask16 keep =
              masked ? _mm512_cmp_epi32_mask(at, limit[half], _MM_CMPINT_LT) : 0xffff;
          exp2_lanes(lanes(s + from) * to_log2 - base[half], keep, e[key][half]);
          const Float16 difference = lanes(dp + from) - shift[half];
          d[key][half] = _mm512_maskz_mul_ps(keep, e[key][half], difference);
        }
        const std::int64_t to = (j + i + key) * kRows + r;
        _mm512_storeu_si512(probability + to, round_lanes(e[key][0], e[key][1]));
        _mm512_storeu_si512(ds + to, round_lanes(d[key][0], d[key][1]));
      }
      for (int half = 0; half < 2; ++half)
        store_pairs(d[0][half], d[1][half], ds_pairs + (j + i) / 2 * kRows + r + half * 16);
    }
  }

  static Float16& lanes(float* at) { return *reinterpret_cast<Float16*>(at); }
};

}  // namespace
}  // namespace zebra::ZEBRA_ISA
#endif
