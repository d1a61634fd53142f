// mla_decode on the CPU.
//   1. absorb    one task a (KV head, 64 rows): q~ = U_k^T q_nope
//   2. attend    one task a (sequence, row block, split): flash blocks over the latents; the heads
//                and new tokens of a sequence share every latent block, converted once
//   3. merge     one task a (sequence, row block): splits in order
//   4. unabsorb  one task a (KV head, 64 rows): o = U_v o~
#include "common/cpu/flash_amx.h"
#include "common/cpu/flash_tile.h"
#include "common/cpu/parallel.h"
#include "mla_decode/mla_decode.h"

namespace zebra::ZEBRA_ISA {
namespace {

constexpr std::int64_t kMostKeys = 128;  // of a block

template <typename T>
struct Decode {
  using A = Acc<T>;
  const MlaDecodeParams& p;
  const std::int64_t rows, blocks, depth, ldr;  // query rows of a sequence, their blocks
  std::int64_t* first_split = nullptr;          // [B + 1]: where a sequence's partials start
  A* queries = nullptr;                         // [B, T, H, depth]: absorbed queries
  A* partial = nullptr;                         // [splits, rows, ldr]
  A* stats = nullptr;     // [splits, rows, 2]: max and sum of every partial row
  A* latent_o = nullptr;  // [B, T, H, ldr]: o~

  explicit Decode(const MlaDecodeParams& params)
      : p(params),
        rows(p.T * p.H),
        blocks(ceil_div(rows, kFlashRows)),
        depth(p.R + p.E),
        ldr(pad_lanes<A>(p.R)) {}
  ~Decode() {
    delete[] first_split;
    delete[] queries;
    delete[] partial;
    delete[] stats;
    delete[] latent_o;
  }

  std::int64_t block_rows(std::int64_t block) const {
    const std::int64_t left = rows - block * kFlashRows;
    return left < kFlashRows ? left : kFlashRows;
  }

  // Rows of one KV head, (token, head of the group), in chunks of kFlashRows.
  std::int64_t heads() const { return p.H / p.G; }
  std::int64_t chunks() const { return ceil_div(p.B * p.T * heads(), kFlashRows); }
  std::int64_t chunk_rows(std::int64_t chunk) const {
    const std::int64_t left = p.B * p.T * heads() - chunk * kFlashRows;
    return left < kFlashRows ? left : kFlashRows;
  }
  // Of [B, T, H].
  std::int64_t index(std::int64_t g, std::int64_t chunk, std::int64_t r) const {
    const std::int64_t row = chunk * kFlashRows + r;
    return row / heads() * p.H + g * heads() + row % heads();
  }
  const T* query(std::int64_t index) const {
    const std::int64_t token = index / p.H;
    return static_cast<const T*>(p.q) + token / p.T * p.q_stride[0] + token % p.T * p.q_stride[1] +
           index % p.H * p.q_stride[2];
  }
  // Row i of [nope + v_dim] of a KV head.
  const T* weight(std::int64_t g, std::int64_t i) const {
    return static_cast<const T*>(p.weight) + (g * (p.nope + p.v_dim) + i) * p.R;
  }

  void run() {
    first_split = new std::int64_t[p.B + 1];
    first_split[0] = 0;
    for (std::int64_t b = 0; b < p.B; ++b)
      first_split[b + 1] =
          first_split[b] + ceil_div<std::int64_t>(p.seq_lens[b * p.seq_lens_stride], p.split_size);
    const std::int64_t splits = first_split[p.B];
    if (p.weight != nullptr) {
      queries = new A[p.B * rows * depth];
      latent_o = new A[p.B * rows * ldr];
    }
    partial = new A[splits * rows * ldr];
    stats = new A[splits * rows * 2];
    bool amx = false;
#ifdef ZEBRA_AMX
    if constexpr (kIsBFloat16<T>) {
      amx = p.use_amx;
      if (amx) run_amx(splits);
    }
#endif
    if (!amx) run_vector(splits);
  }

  void run_vector(std::int64_t splits) {
    for_chunks([&](std::int64_t begin, std::int64_t end) {
      A* const nope = new A[kFlashRows * p.nope + p.nope * ldr + kFlashRows * ldr];
      for (std::int64_t i = begin; i < end; ++i) absorb(i / chunks(), i % chunks(), nope);
      delete[] nope;
    });
    parallel_for(splits * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
      FlashTile<A> tile(depth, p.R, p.scale, true);
      attend_range(begin, end, kFlashKeys, tile,
                   [&](std::int64_t count, const T* const* latents, std::int64_t coming,
                       const T* const* next, const std::int32_t* visible) {
                     for (std::int64_t j = 0; j < count; ++j) {
                       if (j < coming) prefetch(next[j]);
                       tile.load_key(j, latents[j], depth);
                     }
                     tile.fold(count, visible);
                   });
    });
    merge_all();
    for_chunks([&](std::int64_t begin, std::int64_t end) {
      const std::int64_t ld = pad_lanes<A>(kFlashRows);
      const std::int64_t size = p.R * ld + p.v_dim * (ldr + ld);
      A* const columns = new A[size];
      // Zeros: padding that held denormal numbers would slow the products down.
      for (std::int64_t i = 0; i < size; ++i) columns[i] = A(0);
      for (std::int64_t i = begin; i < end; ++i) unabsorb(i / chunks(), i % chunks(), columns);
      delete[] columns;
    });
  }

  template <typename Body>
  void for_chunks(const Body& body) {
    if (p.weight != nullptr) parallel_for(p.G * chunks(), 1, body);
  }

  // n rows of the weight of a KV head, from row i, as [n, ldr] in the accumulation type.
  const A* widen(std::int64_t g, std::int64_t i, std::int64_t n, A* memory) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (ldr == p.R) return weight(g, i);
    }
    for (std::int64_t j = 0; j < n; ++j) {
      load_row(weight(g, i + j), memory + j * ldr, p.R);
      for (std::int64_t r = p.R; r < ldr; ++r) memory[j * ldr + r] = A(0);
    }
    return memory;
  }

  void absorb(std::int64_t g, std::int64_t chunk, A* nope) {
    A* const memory = nope + kFlashRows * p.nope;
    A* const out = memory + p.nope * ldr;
    const std::int64_t n = chunk_rows(chunk);
    for (std::int64_t r = 0; r < n; ++r)
      load_row(query(index(g, chunk, r)), nope + r * p.nope, p.nope);
    gemm<false, true>(n, p.R, p.nope, nope, p.nope, widen(g, 0, p.nope, memory), ldr, out, ldr);
    for (std::int64_t r = 0; r < n; ++r) store_absorbed(index(g, chunk, r), out + r * ldr);
  }

  void store_absorbed(std::int64_t row, const A* latent) {
    A* const out = queries + row * depth;
    for (std::int64_t i = 0; i < p.R; ++i) out[i] = latent[i];
    load_row(query(row) + p.nope, out + p.R, p.E);
  }

  void unabsorb(std::int64_t g, std::int64_t chunk, A* columns) {
    const std::int64_t n = chunk_rows(chunk), ld = pad_lanes<A>(n);
    A* const out = columns + p.R * pad_lanes<A>(kFlashRows);
    A* const memory = out + p.v_dim * pad_lanes<A>(kFlashRows);
    for (std::int64_t r = 0; r < n; ++r) {
      const A* const row = latent_o + index(g, chunk, r) * ldr;
      for (std::int64_t i = 0; i < p.R; ++i) columns[i * ld + r] = row[i];
    }
    gemm<false, true>(p.v_dim, n, p.R, widen(g, p.nope, p.v_dim, memory), ldr, columns, ld, out,
                      ld);
    for (std::int64_t r = 0; r < n; ++r) {
      T* const o = static_cast<T*>(p.o) + index(g, chunk, r) * p.v_dim;
      for (std::int64_t i = 0; i < p.v_dim; ++i) o[i] = from_acc<T>(out[i * ld + r]);
    }
  }

#ifdef ZEBRA_AMX
  void run_amx(std::int64_t splits) {
    for_chunks([&](std::int64_t begin, std::int64_t end) {
      const AmxScope scope;
      AmxProjection work(p);
      for (std::int64_t i = begin; i < end; ++i) absorb(i / chunks(), i % chunks(), work);
    });
    parallel_for(splits * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
      const AmxScope scope;
      // Absorbed queries keep 16 bits of mantissa.
      FlashAmx tile(depth, p.R, p.scale, p.weight != nullptr ? 2 : 1);
      Aligned<BFloat16> k(FlashAmx::kKeys * tile.ldk), v_t(FlashAmx::kKeys * tile.ldo);
      attend_range(begin, end, FlashAmx::kKeys, tile,
                   [&](std::int64_t count, const T* const* latents, std::int64_t coming,
                       const T* const* next, const std::int32_t* visible) {
                     // Half of the prefetches beside the packing, half beside the scores: at once
                     // they would fill the queue of misses, and wait.
                     const auto ahead = [&](std::int64_t at) {
                       for (std::int64_t j = at; j < at + 32 && j < coming; j += 2)
                         prefetch(next[j]);
                     };
                     for (std::int64_t at = 0; at < count; at += 32) {
                       ahead(at + 1);
                       for (std::int64_t j = at; j < at + 32; ++j)
                         copy_padded(j < count ? latents[j] : nullptr, j < count ? depth : 0,
                                     k + j * tile.ldk, tile.ldk);
                       transpose_32_rows(tile.ldo, k + at * tile.ldk, tile.ldk,
                                         v_t + at * tile.ldo);
                     }
                     tile.fold(count, visible, k, v_t, ahead);
                   });
    });
    merge_all();
    for_chunks([&](std::int64_t begin, std::int64_t end) {
      const AmxScope scope;
      AmxProjection work(p);
      for (std::int64_t i = begin; i < end; ++i) unabsorb(i / chunks(), i % chunks(), work);
    });
  }

  // Memory of one thread to multiply kFlashRows rows with the weight of a KV head.
  struct AmxProjection {
    const std::int64_t nope, R, v_dim;  // padded
    Aligned<BFloat16> rows, weight;     // [2, kFlashRows, nope or R], [nope or v_dim, R]
    Aligned<std::uint32_t> pairs;       // of weight, or of rows transposed
    Aligned<float> out, turned;         // [kFlashRows, R or v_dim] and transposed
    explicit AmxProjection(const MlaDecodeParams& p)
        : nope(pad_32(p.nope)),
          R(pad_32(p.R)),
          v_dim(pad_32(p.v_dim)),
          rows(2 * kFlashRows * (nope > R ? nope : R)),
          weight((nope > v_dim ? nope : v_dim) * R),
          pairs((nope > 2 * kFlashRows ? nope : 2 * kFlashRows) * R / 2),
          out(kFlashRows * (R > v_dim ? R : v_dim)),
          turned(kFlashRows * v_dim) {}
  };

  // n rows of the weight of a KV head, from row i, padded to whole tiles.
  void copy_weight(std::int64_t g, std::int64_t i, std::int64_t n, std::int64_t padded,
                   AmxProjection& work) const {
    for (std::int64_t j = 0; j < padded; ++j)
      copy_padded(j < n ? weight(g, i + j) : nullptr, j < n ? p.R : 0, work.weight + j * work.R,
                  work.R);
  }

  // q~ = q_nope U_k, of bf16 operands as they are.
  void absorb(std::int64_t g, std::int64_t chunk, AmxProjection& work) {
    const std::int64_t n = chunk_rows(chunk);
    for (std::int64_t r = 0; r < pad_32(n); ++r)
      copy_padded(r < n ? query(index(g, chunk, r)) : nullptr, r < n ? p.nope : 0,
                  work.rows + r * work.nope, work.nope);
    copy_weight(g, 0, p.nope, work.nope, work);
    rows_to_pairs(work.nope, work.R, work.weight, work.R, work.pairs, work.R);
    amx_product<false>(pad_32(n), work.R, work.nope, work.rows, work.nope, 32, work.pairs, work.R,
                       work.out, work.R);
    for (std::int64_t r = 0; r < n; ++r) store_absorbed(index(g, chunk, r), work.out + r * work.R);
  }

  // o^T = U_v o~^T, with o~ in two bf16 parts.
  void unabsorb(std::int64_t g, std::int64_t chunk, AmxProjection& work) {
    const std::int64_t n = chunk_rows(chunk), ld = pad_32(n);
    std::memset(work.rows, 0, static_cast<std::size_t>(2 * kFlashRows * work.R) * 2);
    for (std::int64_t r = 0; r < n; ++r)
      split_row(latent_o + index(g, chunk, r) * ldr, work.rows + r * work.R,
                work.rows + (kFlashRows + r) * work.R, p.R);
    copy_weight(g, p.nope, p.v_dim, work.v_dim, work);
    const std::int64_t part = work.R / 2 * ld;
    for (std::int64_t i = 0; i < 2; ++i)
      transpose_to_pairs(ld, work.R, work.rows + i * kFlashRows * work.R, work.R,
                         work.pairs + i * part, ld);
    amx_product<false>(work.v_dim, ld, work.R, work.weight, work.R, 32, work.pairs, ld, work.turned,
                       ld, 2, part);
    transpose_dwords(work.v_dim, ld, work.turned, ld, work.out, work.v_dim);
    for (std::int64_t r = 0; r < n; ++r)
      store_row(work.out + r * work.v_dim, static_cast<T*>(p.o) + index(g, chunk, r) * p.v_dim,
                p.v_dim);
  }
#endif

  // The cache rows of n tokens.  One division, not one a token: it would cost as much as a row.
  void locate(std::int64_t b, std::int64_t token, std::int64_t n, const T** latents) const {
    const std::int32_t* page = p.block_table + b * p.table_stride + token / p.page;
    std::int64_t at = token % p.page;
    for (std::int64_t j = 0; j < n; ++j) {
      latents[j] = static_cast<const T*>(p.cache) +
                   static_cast<std::int64_t>(*page) * p.page_stride + at * p.row_stride;
      if (++at == p.page) at = 0, ++page;
    }
  }

  // Pages are scattered, which hardware prefetching does not follow.
  void prefetch(const T* latent) const {
    const char* const row = reinterpret_cast<const char*>(latent);
    for (std::int64_t i = 0; i < depth * static_cast<std::int64_t>(sizeof(T)); i += 64)
      __builtin_prefetch(row + i, 0, 2);
  }

  // fold(count, latents, coming, next, visible) folds `count` tokens of a sequence in, and may
  // prefetch the `coming` ones that follow.
  template <typename Tile, typename Fold>
  void attend_range(std::int64_t begin, std::int64_t end, std::int64_t most_keys, Tile& tile,
                    const Fold& fold) {
    std::int64_t b = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t split = i / blocks;
      while (first_split[b + 1] <= split) ++b;
      attend(b, i % blocks, split, most_keys, tile, fold);
    }
  }

  template <typename Tile, typename Fold>
  void attend(std::int64_t b, std::int64_t block, std::int64_t split, std::int64_t most_keys,
              Tile& tile, const Fold& fold) {
    const std::int64_t length = p.seq_lens[b * p.seq_lens_stride];
    const std::int64_t first = (split - first_split[b]) * p.split_size;
    const std::int64_t last = first + p.split_size < length ? first + p.split_size : length;
    const std::int64_t n = block_rows(block), row0 = block * kFlashRows;
    tile.start(n);
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t row = b * rows + row0 + r;
      if (p.weight != nullptr)
        tile.load_query(r, queries + row * depth);
      else
        tile.load_query(r, query(row));
    }
    tile.queries_ready();
    // The first row sees the fewest tokens: only blocks that reach past them need a mask.
    const std::int64_t fewest = length - p.T + row0 / p.H + 1;
    const T* latents[2][kMostKeys];  // of this block and the next, in turn
    const T **now = latents[0], **next = latents[1];
    locate(b, first, last - first < most_keys ? last - first : most_keys, now);
    for (std::int64_t at = first; at < last; at += most_keys) {
      const std::int64_t count = last - at < most_keys ? last - at : most_keys;
      const std::int64_t left = last - at - count;
      const std::int64_t coming = left < most_keys ? left : most_keys;
      locate(b, at + count, coming, next);
      std::int32_t visible[kFlashRows];
      const bool masked = at + count > fewest;
      for (std::int64_t r = 0; masked && r < n; ++r) {
        const std::int64_t seen = length - p.T + (row0 + r) / p.H + 1 - at;
        visible[r] = static_cast<std::int32_t>(seen < 0 ? 0 : seen < count ? seen : count);
      }
      fold(count, now, coming, next, masked ? visible : nullptr);
      const T** const spare = now;
      now = next, next = spare;
    }
    tile.finish();
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t at = split * rows + row0 + r;
      const A* const o = tile.o + r * tile.ldo;
      for (std::int64_t i = 0; i < ldr; ++i) partial[at * ldr + i] = o[i];
      stats[at * 2] = tile.unit(r);
      stats[at * 2 + 1] = tile.sum[r];
    }
  }

  void merge_all() {
    parallel_for(p.B * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
      A* const row = new A[ldr];
      for (std::int64_t i = begin; i < end; ++i) merge(i / blocks, i % blocks, row);
      delete[] row;
    });
  }

  void merge(std::int64_t b, std::int64_t block, A* sum_o) {
    for (std::int64_t r = 0; r < block_rows(block); ++r) {
      const std::int64_t row = block * kFlashRows + r;
      const std::int64_t begin = first_split[b], end = first_split[b + 1];
      A max = -std::numeric_limits<A>::infinity(), sum = 0;
      for (std::int64_t s = begin; s < end; ++s) {
        const A m = stats[(s * rows + row) * 2];
        max = m > max ? m : max;
      }
      const A base = max == -std::numeric_limits<A>::infinity() ? A(0) : max;
      for (std::int64_t i = 0; i < ldr; ++i) sum_o[i] = A(0);
      for (std::int64_t s = begin; s < end; ++s) {
        const std::int64_t at = s * rows + row;
        const A factor = fast_exp(stats[at * 2] - base);
        const A* const __restrict part = partial + at * ldr;
        A* const __restrict total = sum_o;
        sum += factor * stats[at * 2 + 1];
#pragma omp simd
        for (std::int64_t i = 0; i < ldr; ++i) total[i] += factor * part[i];
      }
      const A inverse = sum == A(0) ? A(0) : A(1) / sum;
      for (std::int64_t i = 0; i < ldr; ++i) sum_o[i] *= inverse;
      const std::int64_t index = b * rows + row;  // of [B, T, H]
      static_cast<A*>(p.lse)[index] =
          sum == A(0) ? -std::numeric_limits<A>::infinity() : max + std::log(sum);
      if (p.weight == nullptr) {
        store_row(sum_o, static_cast<T*>(p.o) + index * p.R, p.R);
        continue;
      }
      A* const latent = latent_o + index * ldr;
      for (std::int64_t i = 0; i < ldr; ++i) latent[i] = sum_o[i];
    }
  }
};

template <typename T>
void decode(const MlaDecodeParams& p) {
  Decode<T>(p).run();
}

}  // namespace

void mla_decode(const MlaDecodeParams& p) { ZEBRA_DISPATCH_CPU(p.dtype, decode, p); }

}  // namespace zebra::ZEBRA_ISA
