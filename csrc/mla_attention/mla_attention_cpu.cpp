// mla_attention on the CPU.  Query rows are (token, head of the group), so that the H / G heads of
// a KV head share each block of keys and values.
//   forward   one task a (sequence, KV head, row block): flash blocks over the keys
//   backward  one task a (sequence, KV head): row blocks in order, each over its visible keys;
//             scores recomputed from lse; then dk_rope summed over KV heads in order
#include "mla_attention/mla_attention_cpu.h"
#include "common/cpu/flash_tile.h"
#include "common/cpu/parallel.h"
#include "mla_attention/mla_attention.h"
#include "mla_attention/mla_attention_cpu_amx.h"

namespace zebra::ZEBRA_ISA {
namespace {

// fold(tile, at, count, visible) folds keys at to at + count in.
template <typename T, typename Tile, typename Fold>
void forward_block(const MlaAttentionParams& params, const Sequence& s, std::int64_t g,
                   std::int64_t block, std::int64_t most_keys, Tile& tile, const Fold& fold) {
  using A = Acc<T>;
  const MlaAttentionShape& p = params.in;
  const Rows rows(p, s, block);
  tile.start(rows.count);
  for (std::int64_t r = 0; r < rows.count; ++r)
    tile.load_query(r, query<T>(p, s, rows.token(r), rows.head(r, g)));
  tile.queries_ready();
  const std::int64_t end = s.seen(p, rows.token(rows.count - 1));
  for (std::int64_t at = 0; at < end; at += most_keys) {
    const std::int64_t count = end - at < most_keys ? end - at : most_keys;
    std::int32_t visible[kFlashRows];
    fold(at, count, block_mask(p, s, rows, at, count, visible));
  }
  tile.finish();
  for (std::int64_t r = 0; r < rows.count; ++r) {
    A* const o = tile.o + r * tile.ldo;
    const A inverse = tile.sum[r] == A(0) ? A(0) : A(1) / tile.sum[r];
    for (std::int64_t i = 0; i < p.v_dim; ++i) o[i] *= inverse;
    const std::int64_t row = output_row(p, s, rows.token(r), rows.head(r, g));
    store_row(o, static_cast<T*>(params.o) + row * p.v_dim, p.v_dim);
    static_cast<A*>(params.lse)[row] = tile.lse(r);
  }
}

// body(i, sequence i, KV head, row block) for the tasks of a range.
template <typename Body>
void for_tasks(const MlaAttentionShape& p, const std::int64_t* first_task, std::int64_t begin,
               std::int64_t end, const Body& body) {
  std::int64_t i = 0;
  for (std::int64_t task = begin; task < end; ++task) {
    while (first_task[i + 1] <= task) ++i;
    const Sequence s(p, i);
    const std::int64_t blocks = row_blocks(p, s), at = task - first_task[i];
    // Long and short blocks alternate, so that ranges of tasks cost the same.
    const std::int64_t turn = at % blocks;
    body(i, s, at / blocks, turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2);
  }
}

template <typename T>
void forward_vector(const MlaAttentionParams& params, const std::int64_t* first_task,
                    std::int64_t tasks) {
  const MlaAttentionShape& p = params.in;
  parallel_for(tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    FlashTile<Acc<T>> tile(p.nope + p.E, p.v_dim, p.scale, false);
    for_tasks(p, first_task, begin, end,
              [&](std::int64_t, const Sequence& s, std::int64_t g, std::int64_t block) {
                forward_block<T>(
                    params, s, g, block, kFlashKeys, tile,
                    [&](std::int64_t at, std::int64_t count, const std::int32_t* visible) {
                      for (std::int64_t j = 0; j < count; ++j) {
                        const Key<T> key(p, s, g, at + j);
                        tile.load_key(j, key.nope, p.nope);
                        tile.load_key(j, key.rope, p.E, p.nope);
                        tile.load_value(j, key.value);
                      }
                      tile.fold(count, visible);
                    });
              });
  });
}

#ifdef ZEBRA_AMX
void forward_amx(const MlaAttentionParams& params, const std::int64_t* first_task,
                 std::int64_t tasks) {
  const MlaAttentionShape& p = params.in;
  const PackedKeys keys(p);
  parallel_for(tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    const AmxScope scope;
    FlashAmx tile(p.nope + p.E, p.v_dim, p.scale, 1);
    for_tasks(p, first_task, begin, end,
              [&](std::int64_t i, const Sequence& s, std::int64_t g, std::int64_t block) {
                const std::int64_t step = g * keys.steps + keys.first[i];
                forward_block<BFloat16>(
                    params, s, g, block, FlashAmx::kKeys, tile,
                    [&](std::int64_t at, std::int64_t count, const std::int32_t* visible) {
                      tile.fold(count, visible, keys.keys_at(step + at / 32),
                                keys.values_at(step + at / 32), [](std::int64_t) {});
                    });
              });
  });
}
#endif

template <typename T>
void forward(const MlaAttentionParams& params) {
  const MlaAttentionShape& p = params.in;
  std::int64_t* const first_task = new std::int64_t[p.sequences + 1];
  first_task[0] = 0;
  for (std::int64_t i = 0; i < p.sequences; ++i)
    first_task[i + 1] = first_task[i] + p.G * row_blocks(p, Sequence(p, i));
  const std::int64_t tasks = first_task[p.sequences];
  bool amx = false;
#ifdef ZEBRA_AMX
  if constexpr (kIsBFloat16<T>) {
    amx = p.use_amx;
    if (amx) forward_amx(params, first_task, tasks);
  }
#endif
  if (!amx) forward_vector<T>(params, first_task, tasks);
  delete[] first_task;
}

// Memory of one thread in the backward pass.
template <typename A>
struct Gradient {
  std::int64_t ldk, ldv, most;  // row strides of keys and values; keys of the longest sequence
  A* memory;
  A *k, *v, *dk, *dv;  // [most, ldk or ldv] of the KV head
  A *q, *dq, *dout;    // [kFlashRows, ldk or ldv] of the row block
  A *q_t, *dout_t;     // the same transposed, [depth or v_dim, ld]; q_t is scaled
  A *s, *ds;           // [kFlashKeys, ld]
  A *lse, *delta;      // [ld]

  Gradient(const MlaAttentionShape& p, std::int64_t most_keys)
      : ldk(pad_lanes<A>(p.nope + p.E)), ldv(pad_lanes<A>(p.v_dim)), most(most_keys) {
    const std::int64_t ld = pad_lanes<A>(kFlashRows);
    const std::int64_t sizes[] = {most * ldk,
                                  most * ldv,
                                  most * ldk,
                                  most * ldv,
                                  kFlashRows * ldk,
                                  kFlashRows * ldk,
                                  kFlashRows * ldv,
                                  ldk * ld,
                                  ldv * ld,
                                  kFlashKeys * ld,
                                  kFlashKeys * ld,
                                  ld,
                                  ld};
    A** const parts[] = {&k, &v, &dk, &dv, &q, &dq, &dout, &q_t, &dout_t, &s, &ds, &lse, &delta};
    std::int64_t total = 0;
    for (const std::int64_t size : sizes) total += size;
    memory = new A[total];
    for (std::int64_t i = 0; i < total; ++i) memory[i] = A(0);
    std::int64_t at = 0;
    for (int i = 0; i < 13; ++i) {
      *parts[i] = memory + at;
      at += sizes[i];
    }
  }
  Gradient(const Gradient&) = delete;
  Gradient& operator=(const Gradient&) = delete;
  ~Gradient() { delete[] memory; }
};

// dst[i * ld] = scale * src[i]: a row becomes a column.
template <typename T, typename A>
void load_column(const T* src, A* dst, std::int64_t n, std::int64_t ld, A scale) {
  for (std::int64_t i = 0; i < n; ++i) dst[i * ld] = scale * to_acc(src[i]);
}

// Loads the queries and output gradients of a row block.
template <typename T, typename A>
void load_block(const MlaAttentionBackwardParams& params, const Sequence& s, std::int64_t g,
                const Rows& rows, std::int64_t ld, Gradient<A>& w) {
  const MlaAttentionShape& p = params.in;
  const std::int64_t depth = p.nope + p.E;
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const std::int64_t row = output_row(p, s, rows.token(r), rows.head(r, g));
    A* const q = w.q + r * w.ldk;
    A* const dout = w.dout + r * w.ldv;
    load_row(query<T>(p, s, rows.token(r), rows.head(r, g)), q, depth);
    load_row(static_cast<const T*>(params.dout) + row * p.v_dim, dout, p.v_dim);
    load_column(q, w.q_t + r, depth, ld, static_cast<A>(p.scale));
    load_column(dout, w.dout_t + r, p.v_dim, ld, A(1));
    const T* const o = static_cast<const T*>(params.o) + row * p.v_dim;
    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (std::int64_t i = 0; i < p.v_dim; ++i) dot += to_acc(o[i]) * dout[i];
    w.delta[r] = dot - (params.dlse != nullptr ? static_cast<const A*>(params.dlse)[row] : A(0));
    const A lse = static_cast<const A*>(params.lse)[row];
    // A row without keys gets exp(s - inf) = 0.
    w.lse[r] = lse == -std::numeric_limits<A>::infinity() ? -lse : lse;
    for (std::int64_t i = 0; i < w.ldk; ++i) w.dq[r * w.ldk + i] = A(0);
  }
}

template <typename T>
void backward_block(const MlaAttentionBackwardParams& params, const Sequence& s, std::int64_t g,
                    std::int64_t block, Gradient<Acc<T>>& w) {
  using A = Acc<T>;
  const MlaAttentionShape& p = params.in;
  const Rows rows(p, s, block);
  const std::int64_t n = rows.count, ld = pad_lanes<A>(n), depth = p.nope + p.E;
  const A scale = static_cast<A>(p.scale);
  load_block<T>(params, s, g, rows, ld, w);
  const std::int64_t end = s.seen(p, rows.token(n - 1));
  for (std::int64_t at = 0; at < end; at += kFlashKeys) {
    const std::int64_t count = end - at < kFlashKeys ? end - at : kFlashKeys;
    const A* const k = w.k + at * w.ldk;
    const A* const v = w.v + at * w.ldv;
    gemm<false, true>(count, ld, depth, k, w.ldk, w.q_t, ld, w.s, ld);
    gemm<false, true>(count, ld, p.v_dim, v, w.ldv, w.dout_t, ld, w.ds, ld);
    std::int32_t visible[kFlashRows];
    const bool masked = block_mask(p, s, rows, at, count, visible) != nullptr;
    for (std::int64_t j = 0; j < count; ++j) {
      A* const __restrict sj = w.s + j * ld;
      A* const __restrict dsj = w.ds + j * ld;
      const A* const __restrict lse = w.lse;
      const A* const __restrict delta = w.delta;
      const std::int32_t key = static_cast<std::int32_t>(j);
      if (masked) {
#pragma omp simd
        for (std::int64_t r = 0; r < n; ++r)
          sj[r] = key < visible[r] ? sj[r] : -std::numeric_limits<A>::infinity();
      }
#pragma omp simd
      for (std::int64_t r = 0; r < n; ++r) {
        const A probability = fast_exp(sj[r] - lse[r]);
        sj[r] = probability;
        dsj[r] = scale * probability * (dsj[r] - delta[r]);
      }
    }
    gemm<true, true>(count, p.v_dim, n, w.s, ld, w.dout, w.ldv, w.dv + at * w.ldv, w.ldv);
    gemm<true, true>(count, depth, n, w.ds, ld, w.q, w.ldk, w.dk + at * w.ldk, w.ldk);
    gemm<true, false>(n, depth, count, w.ds, ld, k, w.ldk, w.dq, w.ldk);
  }
  for (std::int64_t r = 0; r < n; ++r) {
    const std::int64_t row = output_row(p, s, rows.token(r), rows.head(r, g));
    store_row(w.dq + r * w.ldk, static_cast<T*>(params.dq) + row * depth, depth);
  }
}

template <typename T>
void backward_head(const MlaAttentionBackwardParams& params, const Sequence& s, std::int64_t g,
                   Gradient<Acc<T>>& w) {
  const MlaAttentionShape& p = params.in;
  for (std::int64_t j = 0; j < s.keys; ++j) {
    const Key<T> key(p, s, g, j);
    load_row(key.nope, w.k + j * w.ldk, p.nope);
    load_row(key.rope, w.k + j * w.ldk + p.nope, p.E);
    load_row(key.value, w.v + j * w.ldv, p.v_dim);
  }
  for (std::int64_t i = 0; i < s.keys * w.ldk; ++i) w.dk[i] = 0;
  for (std::int64_t i = 0; i < s.keys * w.ldv; ++i) w.dv[i] = 0;
  const std::int64_t blocks = row_blocks(p, s);
  for (std::int64_t block = 0; block < blocks; ++block) backward_block<T>(params, s, g, block, w);
  for (std::int64_t j = 0; j < s.keys; ++j) {
    const std::int64_t token = s.batch * p.S + s.first + j;
    T* const dkv = static_cast<T*>(params.dkv) + (token * p.G + g) * (p.nope + p.v_dim);
    store_row(w.dk + j * w.ldk, dkv, p.nope);
    store_row(w.dv + j * w.ldv, dkv + p.nope, p.v_dim);
    Acc<T>* const rope = static_cast<Acc<T>*>(params.partial) + (g * p.B * p.S + token) * p.E;
    for (std::int64_t i = 0; i < p.E; ++i) rope[i] = w.dk[j * w.ldk + p.nope + i];
  }
}

template <typename T>
void backward(const MlaAttentionBackwardParams& params) {
  using A = Acc<T>;
  const MlaAttentionShape& p = params.in;
  std::int64_t most = 0;
  for (std::int64_t i = 0; i < p.sequences; ++i) {
    const std::int64_t keys = Sequence(p, i).keys;
    most = keys > most ? keys : most;
  }
  parallel_for(p.sequences * p.G, 1, [&](std::int64_t begin, std::int64_t end) {
#ifdef ZEBRA_AMX
    if constexpr (kIsBFloat16<T>) {
      if (p.use_amx) {
        const AmxScope scope;
        GradientAmx w(params, most);
        for (std::int64_t task = begin; task < end; ++task)
          w.head(Sequence(p, task / p.G), task % p.G);
        return;
      }
    }
#endif
    Gradient<A> w(p, most);
    for (std::int64_t task = begin; task < end; ++task)
      backward_head<T>(params, Sequence(p, task / p.G), task % p.G, w);
  });
  const std::int64_t tokens = p.B * p.S;
  parallel_for(p.E == 0 ? 0 : tokens, 256, [&](std::int64_t begin, std::int64_t end) {
    const A* const partial = static_cast<const A*>(params.partial);
    A* const sum = new A[p.E];
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t i = 0; i < p.E; ++i) sum[i] = A(0);
      for (std::int64_t g = 0; g < p.G; ++g)
        for (std::int64_t i = 0; i < p.E; ++i) sum[i] += partial[(g * tokens + t) * p.E + i];
      store_row(sum, static_cast<T*>(params.dk_rope) + t * p.E, p.E);
    }
    delete[] sum;
  });
}

}  // namespace

void mla_attention(const MlaAttentionParams& p) { ZEBRA_DISPATCH_CPU(p.in.dtype, forward, p); }

void mla_attention_backward(const MlaAttentionBackwardParams& p) {
  ZEBRA_DISPATCH_CPU(p.in.dtype, backward, p);
}

}  // namespace zebra::ZEBRA_ISA
