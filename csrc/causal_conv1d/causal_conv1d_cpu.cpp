// causal_conv1d on the CPU.  A task is a tile of tokens times a block of channels: its rows lie in
// L1 in the accumulation type, and loops run over channels, so that they vectorise.  A tile walks
// through the sequences that touch it, as the CUDA kernels do.
#include <type_traits>

#include "causal_conv1d/causal_conv1d.h"
#include "common/cpu/parallel.h"
#include "common/cpu/vec.h"
#include "common/math.h"

namespace zebra::ZEBRA_ISA {
namespace {

constexpr std::int64_t kTile = 128;     // tokens of a forward task
constexpr std::int64_t kBlock = 256;    // channels of a task
constexpr std::int64_t kGrain = 16384;  // elements below which a second thread costs too much
constexpr int kMaxWidth = 4;

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// n values of any dtype, `step` elements apart, from and to the accumulation type.
template <typename A>
struct Strided {
  void* memory;
  std::int64_t at, step;
  A* values;
  std::int64_t n;
  template <typename T>
  static void load(const Strided& s) {
    const T* src = static_cast<const T*>(s.memory) + s.at;
    for (std::int64_t i = 0; i < s.n; ++i) s.values[i] = static_cast<A>(to_acc(src[i * s.step]));
  }
  template <typename T>
  static void store(const Strided& s) {
    T* dst = static_cast<T*>(s.memory) + s.at;
    for (std::int64_t i = 0; i < s.n; ++i)
      dst[i * s.step] = from_acc<T>(static_cast<Acc<T>>(s.values[i]));
  }
};
template <typename A>
void load(DType dtype, const Strided<A>& s) {
  ZEBRA_DISPATCH_CPU(dtype, Strided<A>::template load, s);
}
template <typename A>
void store(DType dtype, const Strided<A>& s) {
  ZEBRA_DISPATCH_CPU(dtype, Strided<A>::template store, s);
}

// Weights and bias of the channels [c0, c0 + n).
template <typename A, int W>
struct Parameters {
  A w[W][kBlock], bias[kBlock];
  template <typename Params>
  Parameters(const Params& p, std::int64_t c0, std::int64_t n) {
    for (int k = 0; k < W; ++k)
      load<A>(p.weight_dtype, {const_cast<void*>(p.weight), c0 * W + k, W, w[k], n});
    for (std::int64_t c = 0; c < n; ++c) bias[c] = 0;
    if (p.bias != nullptr) load<A>(p.bias_dtype, {const_cast<void*>(p.bias), c0, 1, bias, n});
  }
};

struct Sequence {
  std::int64_t index, start, end;  // tokens [start, end) of a batch row
};

Sequence sequence(const CausalConv1dInputs& in, std::int64_t i) {
  if (in.cu_seqlens == nullptr) return {i, 0, in.tokens};
  return {i, in.cu_seqlens[i], in.cu_seqlens[i + 1]};
}

// The sequence that holds token t of batch row b.
Sequence sequence_at(const CausalConv1dInputs& in, std::int64_t b, std::int64_t t) {
  if (in.cu_seqlens == nullptr) return sequence(in, b);
  std::int64_t low = 0, high = in.sequences - 1;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (in.cu_seqlens[middle + 1] > t)
      high = middle;
    else
      low = middle + 1;
  }
  return sequence(in, low);
}

template <typename T>
const T* x_row(const CausalConv1dInputs& in, std::int64_t b, std::int64_t t) {
  return static_cast<const T*>(in.x) + b * in.x_batch_stride + t * in.x_row_stride;
}
std::int64_t batch_row(const CausalConv1dInputs& in, std::int64_t sequence) {
  return in.cu_seqlens == nullptr ? sequence : 0;
}

// Row r of sequence s as values: x, or before its start the initial state, or zero.
template <typename T>
void load_full_row(const CausalConv1dInputs& in, const Sequence& s, std::int64_t r, std::int64_t c0,
                   std::int64_t n, Acc<T>* dst) {
  const int taps = in.width - 1;
  if (r >= s.start) {
    load_row(x_row<T>(in, batch_row(in, s.index), r) + c0, dst, n);
  } else if (in.initial_state != nullptr) {
    load<Acc<T>>(in.dtype,
                 {const_cast<void*>(in.initial_state),
                  (s.index * in.channels + c0) * taps + r - s.start + taps, taps, dst, n});
  } else {
    for (std::int64_t c = 0; c < n; ++c) dst[c] = 0;
  }
}

// Rotates [r0, r1, ...] to [r1, ..., r0].
template <typename A, int W>
void rotate(A* (&rows)[W]) {
  A* const first = rows[0];
  for (int k = 0; k + 1 < W; ++k) rows[k] = rows[k + 1];
  rows[W - 1] = first;
}

template <typename T, int W, bool kSilu>
void forward_row(const Parameters<Acc<T>, W>& p, Acc<T>* const (&rows)[W], T* __restrict y,
                 std::int64_t n) {
  using A = Acc<T>;
  const A *x0 = rows[0], *x1 = rows[1], *x2 = rows[W > 2 ? 2 : 0], *x3 = rows[W > 3 ? 3 : 0];
#pragma omp simd
  for (std::int64_t c = 0; c < n; ++c) {
    A pre = p.bias[c] + p.w[0][c] * x0[c] + p.w[1][c] * x1[c];
    if constexpr (W > 2) pre += p.w[2][c] * x2[c];
    if constexpr (W > 3) pre += p.w[3][c] * x3[c];
    y[c] = from_acc<T>(kSilu ? silu(pre) : pre);
  }
}

template <typename T, int W, bool kSilu>
void forward(const CausalConv1dParams& p) {
  using A = Acc<T>;
  const CausalConv1dInputs& in = p.in;
  const std::int64_t tiles = ceil_div(in.tokens, kTile), blocks = ceil_div(in.channels, kBlock);
  parallel_for(
      in.batch * tiles * blocks,
      ceil_div(kGrain, smaller(kTile, in.tokens) * smaller(kBlock, in.channels) + 1),
      [&](std::int64_t begin, std::int64_t end) {
        A buffer[W][kBlock];
        for (std::int64_t task = begin; task < end; ++task) {
          const std::int64_t c0 = task % blocks * kBlock, n = smaller(kBlock, in.channels - c0);
          const std::int64_t t0 = task / blocks % tiles * kTile, b = task / blocks / tiles;
          const std::int64_t t1 = smaller(t0 + kTile, in.tokens);
          const Parameters<A, W> parameters(in, c0, n);
          T* y = static_cast<T*>(p.y) + (b * in.tokens + t0) * in.channels + c0;
          A* rows[W];
          for (int k = 0; k < W; ++k) rows[k] = buffer[k];
          std::int64_t t = t0;
          for (Sequence s = sequence_at(in, b, t0); t < t1; s = sequence(in, s.index + 1)) {
            if (s.end <= t) continue;  // an empty sequence
            for (int k = 0; k < W - 1; ++k)
              load_full_row<T>(in, s, t - (W - 1) + k, c0, n, rows[k]);
            for (const std::int64_t stop = smaller(s.end, t1); t < stop; ++t) {
              load_row(x_row<T>(in, b, t) + c0, rows[W - 1], n);
              forward_row<T, W, kSilu>(parameters, rows, y, n);
              rotate(rows);
              y += in.channels;
            }
          }
        }
      });
  parallel_for(
      in.sequences, ceil_div(kGrain, in.channels * W), [&](std::int64_t begin, std::int64_t end) {
        A row[kBlock];
        for (std::int64_t i = begin; i < end; ++i) {
          const Sequence s = sequence(in, i);
          for (std::int64_t c0 = 0; c0 < in.channels; c0 += kBlock) {
            const std::int64_t n = smaller(kBlock, in.channels - c0);
            for (int k = 0; k < W - 1; ++k) {
              load_full_row<T>(in, s, s.end - (W - 1) + k, c0, n, row);
              store<A>(in.dtype,
                       {p.final_state, (i * in.channels + c0) * (W - 1) + k, W - 1, row, n});
            }
          }
        }
      });
}

// Rows of one backward task.
template <typename A, int W>
struct Workspace {
  A x[W][kBlock];       // rows t-(W-1) .. t of x
  A dx[W][kBlock];      // sums of the same rows of dx: dx[0] is complete after token t
  A dw[W + 1][kBlock];  // of this task; the last row is dbias
  A g[kBlock];          // dy, then dpre
};

// One token: g = dpre; adds to dx and, where the token belongs to the tile, to dw.
template <typename A, int W, bool kSilu, bool kOwn>
void backward_row(const Parameters<A, W>& p, A* const (&rows)[W], A* const (&sums)[W],
                  A (&dw)[W + 1][kBlock], A* __restrict g, std::int64_t n) {
  const A *x0 = rows[0], *x1 = rows[1], *x2 = rows[W > 2 ? 2 : 0], *x3 = rows[W > 3 ? 3 : 0];
  if constexpr (kSilu) {
#pragma omp simd
    for (std::int64_t c = 0; c < n; ++c) {
      A pre = p.bias[c] + p.w[0][c] * x0[c] + p.w[1][c] * x1[c];
      if constexpr (W > 2) pre += p.w[2][c] * x2[c];
      if constexpr (W > 3) pre += p.w[3][c] * x3[c];
      g[c] *= silu_grad(pre);
    }
  }
  A* const last = sums[W - 1];
#pragma omp simd
  for (std::int64_t c = 0; c < n; ++c) last[c] = p.w[W - 1][c] * g[c];
  for (int k = 0; k < W - 1; ++k) {
    A* const sum = sums[k];
    const A* const w = p.w[k];
#pragma omp simd
    for (std::int64_t c = 0; c < n; ++c) sum[c] += w[c] * g[c];
  }
  if constexpr (kOwn) {
    for (int k = 0; k < W; ++k) {
      const A* const x = rows[k];
      A* const sum = dw[k];
#pragma omp simd
      for (std::int64_t c = 0; c < n; ++c) sum[c] += x[c] * g[c];
    }
    A* const bias = dw[W];
#pragma omp simd
    for (std::int64_t c = 0; c < n; ++c) bias[c] += g[c];
  }
}

// dx of tokens [t0, t1) of batch row b, and their part of dw.
template <typename T, int W, bool kSilu>
void backward_tile(const CausalConv1dBackwardParams& p, const Parameters<Acc<T>, W>& parameters,
                   Workspace<Acc<T>, W>& space, std::int64_t b, std::int64_t t0, std::int64_t t1,
                   std::int64_t c0, std::int64_t n) {
  using A = Acc<T>;
  const CausalConv1dInputs& in = p.in;
  A *rows[W], *sums[W];
  for (int k = 0; k < W; ++k) rows[k] = space.x[k], sums[k] = space.dx[k];
  std::int64_t t = t0;
  for (Sequence s = sequence_at(in, b, t0); t < t1; s = sequence(in, s.index + 1)) {
    if (s.end <= t) continue;  // an empty sequence
    const std::int64_t first = larger(t0, s.start);
    const auto emit = [&](std::int64_t r, const A* row) {
      if (r < first || r >= t1) return;
      store_row(row, static_cast<T*>(p.dx) + (b * in.tokens + r) * in.channels + c0, n);
    };
    for (int k = 0; k < W - 1; ++k) {
      load_full_row<T>(in, s, t - (W - 1) + k, c0, n, rows[k]);
      for (std::int64_t c = 0; c < n; ++c) sums[k][c] = 0;
    }
    // The next W-1 tokens of the sequence reach back into the tile.
    for (const std::int64_t stop = smaller(s.end, t1 + W - 1); t < stop; ++t) {
      load_row(x_row<T>(in, b, t) + c0, rows[W - 1], n);
      load_row(static_cast<const T*>(p.dy) + b * p.dy_batch_stride + t * p.dy_row_stride + c0,
               space.g, n);
      if (t < t1)
        backward_row<A, W, kSilu, true>(parameters, rows, sums, space.dw, space.g, n);
      else
        backward_row<A, W, kSilu, false>(parameters, rows, sums, space.dw, space.g, n);
      emit(t - (W - 1), sums[0]);
      rotate(rows);
      rotate(sums);
    }
    if (t < s.end) break;
    for (int k = 0; k < W - 1; ++k) {  // the last rows, which are also the final state
      const std::int64_t r = s.end - (W - 1) + k;
      if (p.dfinal_state != nullptr) {
        load<A>(in.dtype, {const_cast<void*>(p.dfinal_state),
                           (s.index * in.channels + c0) * (W - 1) + k, W - 1, space.g, n});
        for (std::int64_t c = 0; c < n; ++c) sums[k][c] += space.g[c];
      }
      emit(r, sums[k]);
    }
  }
}

// dinitial_state[i]: what the first W-1 tokens and, in short sequences, the final state give back.
template <typename T, int W, bool kSilu>
void backward_state(const CausalConv1dBackwardParams& p, std::int64_t i) {
  using A = Acc<T>;
  const CausalConv1dInputs& in = p.in;
  const Sequence s = sequence(in, i);
  const std::int64_t b = batch_row(in, i);
  A rows_of[W][kBlock], sums_of[W][kBlock], unused[W + 1][kBlock], g[kBlock];
  for (std::int64_t c0 = 0; c0 < in.channels; c0 += kBlock) {
    const std::int64_t n = smaller(kBlock, in.channels - c0);
    const Parameters<A, W> parameters(in, c0, n);
    A *rows[W], *sums[W];
    for (int k = 0; k < W; ++k) rows[k] = rows_of[k], sums[k] = sums_of[k];
    const auto emit = [&](std::int64_t k, A* row) {
      store<A>(in.dtype, {p.dinitial_state, (i * in.channels + c0) * (W - 1) + k, W - 1, row, n});
    };
    for (int k = 0; k < W - 1; ++k) {
      load_full_row<T>(in, s, s.start - (W - 1) + k, c0, n, rows[k]);
      for (std::int64_t c = 0; c < n; ++c) sums[k][c] = 0;
    }
    std::int64_t t = s.start;
    for (; t < smaller(s.end, s.start + W - 1); ++t) {
      load_full_row<T>(in, s, t, c0, n, rows[W - 1]);
      load_row(static_cast<const T*>(p.dy) + b * p.dy_batch_stride + t * p.dy_row_stride + c0, g,
               n);
      backward_row<A, W, kSilu, false>(parameters, rows, sums, unused, g, n);
      emit(t - s.start, sums[0]);
      rotate(rows);
      rotate(sums);
    }
    for (int k = 0; t - s.start + k < W - 1; ++k) {  // a sequence shorter than its state
      if (p.dfinal_state != nullptr) {
        load<A>(in.dtype, {const_cast<void*>(p.dfinal_state), (i * in.channels + c0) * (W - 1) + k,
                           W - 1, g, n});
        for (std::int64_t c = 0; c < n; ++c) sums[k][c] += g[c];
      }
      emit(t - s.start + k, sums[k]);
    }
  }
}

template <typename T, int W, bool kSilu>
void backward(const CausalConv1dBackwardParams& p) {
  using A = Acc<T>;
  const CausalConv1dInputs& in = p.in;
  const std::int64_t blocks = ceil_div(in.channels, kBlock);
  parallel_for(p.partials * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    Workspace<A, W>* const space = new Workspace<A, W>;
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t c0 = task % blocks * kBlock, n = smaller(kBlock, in.channels - c0);
      const std::int64_t group = task / blocks;
      const Parameters<A, W> parameters(in, c0, n);
      for (auto& row : space->dw)
        for (std::int64_t c = 0; c < n; ++c) row[c] = 0;
      const std::int64_t last = smaller((group + 1) * p.items, in.batch * p.tiles);
      for (std::int64_t item = group * p.items; item < last; ++item) {
        const std::int64_t t0 = item % p.tiles * p.tile;
        backward_tile<T, W, kSilu>(p, parameters, *space, item / p.tiles, t0,
                                   smaller(t0 + p.tile, in.tokens), c0, n);
      }
      for (int k = 0; k <= W; ++k) {
        A* const partial = static_cast<A*>(p.partial) + (group * (W + 1) + k) * in.channels + c0;
        for (std::int64_t c = 0; c < n; ++c) partial[c] = space->dw[k][c];
      }
    }
    delete space;
  });
  parallel_for(blocks, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t c0 = block * kBlock, n = smaller(kBlock, in.channels - c0);
      A sum[kBlock];
      for (int k = 0; k <= W; ++k) {
        if (k == W && p.dbias == nullptr) break;
        for (std::int64_t c = 0; c < n; ++c) sum[c] = 0;
        for (std::int64_t group = 0; group < p.partials; ++group) {
          const A* partial =
              static_cast<const A*>(p.partial) + (group * (W + 1) + k) * in.channels + c0;
          for (std::int64_t c = 0; c < n; ++c) sum[c] += partial[c];
        }
        if (k < W)
          store<A>(in.weight_dtype, {p.dweight, c0 * W + k, W, sum, n});
        else
          store<A>(in.bias_dtype, {p.dbias, c0, 1, sum, n});
      }
    }
  });
  if (p.dinitial_state != nullptr)
    parallel_for(in.sequences, ceil_div(kGrain, in.channels * W),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) backward_state<T, W, kSilu>(p, i);
                 });
}

template <typename T, int W, bool kSilu>
void step(const CausalConv1dStepParams& p) {
  using A = Acc<T>;
  const std::int64_t blocks = ceil_div(p.channels, kBlock);
  parallel_for(blocks, ceil_div(kGrain, p.batch * smaller(kBlock, p.channels) * W),
               [&](std::int64_t begin, std::int64_t end) {
                 A buffer[W][kBlock];
                 A* rows[W];
                 for (int k = 0; k < W; ++k) rows[k] = buffer[k];
                 for (std::int64_t block = begin; block < end; ++block) {
                   const std::int64_t c0 = block * kBlock, n = smaller(kBlock, p.channels - c0);
                   const Parameters<A, W> parameters(p, c0, n);
                   for (std::int64_t b = 0; b < p.batch; ++b) {
                     T* const y = static_cast<T*>(p.y) + b * p.channels + c0;
                     const std::int64_t slot = p.state_indices == nullptr ? b : p.state_indices[b];
                     if (slot < 0) {
                       for (std::int64_t c = 0; c < n; ++c) y[c] = from_acc<T>(A(0));
                       continue;
                     }
                     T* const state =
                         static_cast<T*>(p.conv_state) + slot * p.state_stride + c0 * (W - 1);
                     const T* const x = static_cast<const T*>(p.x) + b * p.x_stride + c0;
                     for (std::int64_t c = 0; c < n; ++c) {
                       for (int k = 0; k < W - 1; ++k) rows[k][c] = to_acc(state[c * (W - 1) + k]);
                       for (int k = 0; k < W - 2; ++k)
                         state[c * (W - 1) + k] = state[c * (W - 1) + k + 1];
                       state[c * (W - 1) + W - 2] = x[c];
                     }
                     load_row(x, rows[W - 1], n);
                     forward_row<T, W, kSilu>(parameters, rows, y, n);
                   }
                 }
               });
}

// Calls fn(width, silu) with both as compile-time constants.
template <typename Fn>
void specialise(int width, bool silu, const Fn& fn) {
  const auto with_silu = [&](auto w) {
    if (silu)
      fn(w, std::true_type());
    else
      fn(w, std::false_type());
  };
  switch (width) {
    case 2:
      return with_silu(std::integral_constant<int, 2>());
    case 3:
      return with_silu(std::integral_constant<int, 3>());
    default:
      return with_silu(std::integral_constant<int, kMaxWidth>());
  }
}

template <typename T>
void forward_of(const CausalConv1dParams& p) {
  specialise(p.in.width, p.in.silu, [&](auto w, auto silu) { forward<T, w(), silu()>(p); });
}
template <typename T>
void backward_of(const CausalConv1dBackwardParams& p) {
  specialise(p.in.width, p.in.silu, [&](auto w, auto silu) { backward<T, w(), silu()>(p); });
}
template <typename T>
void step_of(const CausalConv1dStepParams& p) {
  specialise(p.width, p.silu, [&](auto w, auto silu) { step<T, w(), silu()>(p); });
}

}  // namespace

void causal_conv1d(const CausalConv1dParams& p) { ZEBRA_DISPATCH_CPU(p.in.dtype, forward_of, p); }

void causal_conv1d_backward(const CausalConv1dBackwardParams& p) {
  ZEBRA_DISPATCH_CPU(p.in.dtype, backward_of, p);
}

void causal_conv1d_step(const CausalConv1dStepParams& p) {
  ZEBRA_DISPATCH_CPU(p.dtype, step_of, p);
}

}  // namespace zebra::ZEBRA_ISA
