// mla_decode on the CPU.
//   1. absorb    one task a (sequence, token): q~ = U_k^T q_nope, laid out transposed
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

template <typename T>
struct Decode {
  using A = Acc<T>;
  const MlaDecodeParams& p;
  const std::int64_t rows, blocks, depth, ldr;  // query rows of a sequence, their blocks
  std::int64_t* first_split = nullptr;          // [B + 1]: where a sequence's partials start
  const A* up = nullptr;                        // [G, nope + v_dim, ldr]: weight in fp32
  A* up_memory = nullptr;
  A* queries = nullptr;   // [B, blocks, depth, ld of the block]
  A* partial = nullptr;   // [splits, rows, ldr]
  A* stats = nullptr;     // [splits, rows, 2]: max and sum of every partial row
  A* latent_o = nullptr;  // [G, R, ldg]: o~ of every row of a KV head, transposed

  explicit Decode(const MlaDecodeParams& params)
      : p(params),
        rows(p.T * p.H),
        blocks(ceil_div(rows, kFlashRows)),
        depth(p.R + p.E),
        ldr(pad_lanes<A>(p.R)) {}
  ~Decode() {
    delete[] first_split;
    delete[] up_memory;
    delete[] queries;
    delete[] partial;
    delete[] stats;
    delete[] latent_o;
  }

  std::int64_t block_rows(std::int64_t block) const {
    const std::int64_t left = rows - block * kFlashRows;
    return left < kFlashRows ? left : kFlashRows;
  }
  std::int64_t query_size() const { return blocks * depth * pad_lanes<A>(kFlashRows); }
  A* query_block(std::int64_t b, std::int64_t block) const {
    return queries + b * query_size() + block * depth * pad_lanes<A>(kFlashRows);
  }
  std::int64_t group_rows() const { return p.B * p.T * (p.H / p.G); }

  void run() {
    first_split = new std::int64_t[p.B + 1];
    first_split[0] = 0;
    for (std::int64_t b = 0; b < p.B; ++b)
      first_split[b + 1] =
          first_split[b] + ceil_div<std::int64_t>(p.seq_lens[b * p.seq_lens_stride], p.split_size);
    const std::int64_t splits = first_split[p.B];
    if (p.weight != nullptr) {
      widen_weight();
      // Zeros: padding that held denormal numbers would slow the products down.
      const std::int64_t size = p.G * p.R * pad_lanes<A>(group_rows());
      latent_o = new A[size];
      for (std::int64_t i = 0; i < size; ++i) latent_o[i] = A(0);
    }
    queries = new A[p.B * query_size()];
    partial = new A[splits * rows * ldr];
    stats = new A[splits * rows * 2];
    parallel_for(p.B * p.T, 1, [&](std::int64_t begin, std::int64_t end) {
      A* const latent = new A[p.H * ldr + p.nope * p.H];
      for (std::int64_t i = begin; i < end; ++i) absorb(i / p.T, i % p.T, latent);
      delete[] latent;
    });
    parallel_for(splits * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
#ifdef ZEBRA_FLASH_AMX
      if constexpr (kIsBFloat16<T>) {
        if (p.use_amx) {
          const AmxScope scope;
          return attend_range<FlashAmx>(begin, end);
        }
      }
#endif
      attend_range<FlashTile<A>>(begin, end);
    });
    parallel_for(p.B * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
      A* const row = new A[ldr];
      for (std::int64_t i = begin; i < end; ++i) merge(i / blocks, i % blocks, row);
      delete[] row;
    });
    if (p.weight == nullptr) return;
    const std::int64_t chunks = ceil_div(group_rows(), kFlashRows);
    parallel_for(p.G * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
      A* const out = new A[p.v_dim * pad_lanes<A>(kFlashRows)];
      for (std::int64_t i = begin; i < end; ++i) unabsorb(i / chunks, i % chunks, out);
      delete[] out;
    });
  }

  void widen_weight() {
    const T* const w = static_cast<const T*>(p.weight);
    if constexpr (sizeof(T) == sizeof(A)) {
      if (ldr == p.R) {
        up = w;
        return;
      }
    }
    const std::int64_t n = p.G * (p.nope + p.v_dim);
    up_memory = new A[n * ldr];
    up = up_memory;
    parallel_for(n, 256, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        load_row(w + i * p.R, up_memory + i * ldr, p.R);
        for (std::int64_t r = p.R; r < ldr; ++r) up_memory[i * ldr + r] = A(0);
      }
    });
  }

  // Writes the scaled queries of one token as columns of their row block.
  void absorb(std::int64_t b, std::int64_t t, A* latent) {
    const T* const q = static_cast<const T*>(p.q) + b * p.q_stride[0] + t * p.q_stride[1];
    const A scale = static_cast<A>(p.scale);
    if (p.weight != nullptr) {
      A* const nope = latent + p.H * ldr;
      for (std::int64_t h = 0; h < p.H; ++h)
        load_row(q + h * p.q_stride[2], nope + h * p.nope, p.nope);
      const std::int64_t heads = p.H / p.G;
      for (std::int64_t g = 0; g < p.G; ++g)
        gemm<false, true>(heads, p.R, p.nope, nope + g * heads * p.nope, p.nope,
                          up + g * (p.nope + p.v_dim) * ldr, ldr, latent + g * heads * ldr, ldr);
    }
    for (std::int64_t h = 0; h < p.H; ++h) {
      const std::int64_t row = t * p.H + h, block = row / kFlashRows;
      const std::int64_t ld = pad_lanes<A>(block_rows(block));
      A* const column = query_block(b, block) + row % kFlashRows;
      const T* const qh = q + h * p.q_stride[2];
      if (p.weight != nullptr) {
        load_column(latent + h * ldr, column, p.R, ld, scale);
        load_column(qh + p.nope, column + p.R * ld, p.E, ld, scale);
      } else {
        load_column(qh, column, depth, ld, scale);
      }
    }
  }

  // The cache row of a token.
  const T* latent(std::int64_t b, std::int64_t token) const {
    const std::int64_t page = p.block_table[b * p.table_stride + token / p.page];
    return static_cast<const T*>(p.cache) + page * p.page_stride + token % p.page * p.row_stride;
  }

  template <typename Tile>
  void attend_range(std::int64_t begin, std::int64_t end) {
    Tile tile(depth, p.R, true);
    std::int64_t b = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t split = i / blocks;
      while (first_split[b + 1] <= split) ++b;
      attend(b, i % blocks, split, tile);
    }
  }

  template <typename Tile>
  void attend(std::int64_t b, std::int64_t block, std::int64_t split, Tile& tile) {
    const std::int64_t length = p.seq_lens[b * p.seq_lens_stride];
    const std::int64_t first = (split - first_split[b]) * p.split_size;
    const std::int64_t last = first + p.split_size < length ? first + p.split_size : length;
    const std::int64_t n = block_rows(block), row0 = block * kFlashRows;
    tile.start(n);
    const A* const q = query_block(b, block);
    for (std::int64_t i = 0; i < depth; ++i)
      for (std::int64_t r = 0; r < n; ++r) tile.q[i * tile.ld + r] = q[i * tile.ld + r];
    tile.queries_ready();
    // The first row sees the fewest tokens: only blocks that reach past them need a mask.
    const std::int64_t fewest = length - p.T + row0 / p.H + 1;
    for (std::int64_t at = first; at < last; at += kFlashKeys) {
      const std::int64_t count = last - at < kFlashKeys ? last - at : kFlashKeys;
      for (std::int64_t j = 0; j < count; ++j) tile.load_key(j, latent(b, at + j), depth);
      // Pages are scattered, which hardware prefetching does not follow.
      for (std::int64_t j = at + count; j < last && j < at + count + kFlashKeys; ++j) {
        const char* const next = reinterpret_cast<const char*>(latent(b, j));
        for (std::int64_t i = 0; i < depth * static_cast<std::int64_t>(sizeof(T)); i += 64)
          __builtin_prefetch(next + i, 0, 2);
      }
      std::int32_t visible[kFlashRows];
      const bool masked = at + count > fewest;
      for (std::int64_t r = 0; masked && r < n; ++r) {
        const std::int64_t seen = length - p.T + (row0 + r) / p.H + 1 - at;
        visible[r] = static_cast<std::int32_t>(seen < 0 ? 0 : seen < count ? seen : count);
      }
      tile.fold(count, masked ? visible : nullptr);
    }
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t at = split * rows + row0 + r;
      for (std::int64_t i = 0; i < ldr; ++i) partial[at * ldr + i] = tile.o[r * tile.ldo + i];
      stats[at * 2] = tile.max[r];
      stats[at * 2 + 1] = tile.sum[r];
    }
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
      const std::int64_t heads = p.H / p.G, h = row % p.H, g = h / heads;
      const std::int64_t ldg = pad_lanes<A>(group_rows());
      A* const column = latent_o + g * p.R * ldg + (b * p.T + row / p.H) * heads + h % heads;
      for (std::int64_t i = 0; i < p.R; ++i) column[i * ldg] = sum_o[i];
    }
  }

  void unabsorb(std::int64_t g, std::int64_t chunk, A* out) {
    const std::int64_t heads = p.H / p.G, total = group_rows(), ldg = pad_lanes<A>(total);
    const std::int64_t first = chunk * kFlashRows;
    const std::int64_t n = total - first < kFlashRows ? total - first : kFlashRows;
    const std::int64_t ld = pad_lanes<A>(n);
    gemm<false, true>(p.v_dim, n, p.R, up + (g * (p.nope + p.v_dim) + p.nope) * ldr, ldr,
                      latent_o + g * p.R * ldg + first, ldg, out, ld);
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t token = (first + r) / heads, h = g * heads + (first + r) % heads;
      T* const o = static_cast<T*>(p.o) + (token * p.H + h) * p.v_dim;
      for (std::int64_t i = 0; i < p.v_dim; ++i) o[i] = from_acc<T>(out[i * ld + r]);
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
