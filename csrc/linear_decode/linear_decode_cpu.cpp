// linear_decode on the CPU: the weight is streamed once, converted in registers, and multiplied
// with register tiles of (weight rows) x (rows of x).  One task per block of outputs.
//
// The dot product of one weight row and one row of x is always the same sum (lane l takes columns
// l, l + kLanes, ...; then the lanes pairwise), whatever tile it is computed in: a row of y depends
// neither on the other rows nor on the number of threads.
#include "common/cpu/amx_weight.h"
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "common/math.h"
#include "linear_decode/linear_decode.h"

namespace zebra::ZEBRA_ISA {
namespace {

// out[j * out_stride + i] = weight row i . h row j.  h rows are padded with zeros to whole vectors.
template <int kOut, int kRows, typename T>
void tile(const T* weight, std::int64_t weight_stride, const Acc<T>* h, std::int64_t h_stride,
          std::int64_t K, Acc<T>* out, std::int64_t out_stride) {
  using A = Acc<T>;
  Vec<A> acc[kOut][kRows] = {};
  const auto multiply = [&](const T* w, std::int64_t stride, std::int64_t k) {
    Vec<A> wide[kOut];
    for (int i = 0; i < kOut; ++i) wide[i] = load(w + i * stride);
    for (int j = 0; j < kRows; ++j) {
      const Vec<A> x = load(h + j * h_stride + k);
      for (int i = 0; i < kOut; ++i) acc[i][j] += wide[i] * x;
    }
  };
  std::int64_t k = 0;
  for (; k + kLanes<A> <= K; k += kLanes<A>) multiply(weight + k, weight_stride, k);
  if (k < K) {
    T last[kOut * kLanes<A>] = {};
    for (int i = 0; i < kOut; ++i)
      std::memcpy(last + i * kLanes<A>, weight + i * weight_stride + k,
                  static_cast<std::size_t>(K - k) * sizeof(T));
    multiply(last, kLanes<A>, k);
  }
  for (int j = 0; j < kRows; ++j)
    for (int i = 0; i < kOut; ++i) out[j * out_stride + i] = sum_lanes<A>(acc[i][j]);
}

// `count` weight rows against kRows rows of h: tiles that fill the registers, then single rows.
template <int kRows, typename T>
void tiles(const T* weight, std::int64_t weight_stride, std::int64_t count, const Acc<T>* h,
           std::int64_t h_stride, std::int64_t K, Acc<T>* out, std::int64_t out_stride) {
  constexpr int kFit = (kVecRegisters - 2) / (kRows + 1);
  constexpr int kOut = kFit > 8 ? 8 : (kFit < 1 ? 1 : kFit);
  std::int64_t i = 0;
  for (; i + kOut <= count; i += kOut)
    tile<kOut, kRows>(weight + i * weight_stride, weight_stride, h, h_stride, K, out + i,
                      out_stride);
  for (; i < count; ++i)
    tile<1, kRows>(weight + i * weight_stride, weight_stride, h, h_stride, K, out + i, out_stride);
}

// `count` weight rows against all rows of h, kRows at a time, then the rest in smaller tiles.
template <int kRows, typename T>
void all_rows(const T* weight, std::int64_t weight_stride, std::int64_t count, const Acc<T>* h,
              std::int64_t h_stride, std::int64_t rows, std::int64_t K, Acc<T>* out,
              std::int64_t out_stride) {
  std::int64_t j = 0;
  for (; j + kRows <= rows; j += kRows)
    tiles<kRows>(weight, weight_stride, count, h + j * h_stride, h_stride, K, out + j * out_stride,
                 out_stride);
  if constexpr (kRows > 1)
    if (j < rows)
      all_rows<kRows / 2>(weight, weight_stride, count, h + j * h_stride, h_stride, rows - j, K,
                          out + j * out_stride, out_stride);
}

template <typename A>
struct NormWeight {
  const void* src;
  A* dst;
  std::int64_t n;
  template <typename W>
  static void load(const NormWeight& r) {
    for (std::int64_t i = 0; i < r.n; ++i)
      r.dst[i] = static_cast<A>(to_acc(static_cast<const W*>(r.src)[i]));
  }
};

// h = norm(x), or x itself, in the accumulation type; columns K .. h_stride are zero.
template <typename T>
void normalize(const LinearDecodeParams& p, Acc<T>* h, std::int64_t h_stride) {
  using A = Acc<T>;
  A* const weight = p.norm_weight != nullptr ? new A[p.K] : nullptr;
  if (weight != nullptr) {
    const NormWeight<A> r{p.norm_weight, weight, p.K};
    [&] { ZEBRA_DISPATCH_CPU(p.norm_weight_dtype, NormWeight<A>::template load, r); }();
  }
  parallel_for(p.rows, ceil_div<std::int64_t>(16384, p.K),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t j = begin; j < end; ++j) {
                   A* const row = h + j * h_stride;
                   load_row(static_cast<const T*>(p.x) + j * p.x_stride, row, p.K);
                   for (std::int64_t k = p.K; k < h_stride; ++k) row[k] = 0;
                   if (weight == nullptr) continue;
                   A square = 0;
#pragma omp simd reduction(+ : square)
                   for (std::int64_t k = 0; k < p.K; ++k) square += row[k] * row[k];
                   const A rstd =
                       A(1) / std::sqrt(square / static_cast<A>(p.K) + static_cast<A>(p.norm_eps));
#pragma omp simd
                   for (std::int64_t k = 0; k < p.K; ++k) row[k] = weight[k] * row[k] * rstd;
                 }
               });
  delete[] weight;
}

// Outputs [first, first + n) of row j from their products (gate and up of swiglu).
template <typename T>
void finish(const LinearDecodeParams& p, std::int64_t j, std::int64_t first, std::int64_t n,
            Acc<T>* product, Acc<T>* up, Acc<T>* other) {
  using A = Acc<T>;
  const T* bias = static_cast<const T*>(p.bias);
  const auto add = [&](const T* from, A* to) {
    load_row(from, other, n);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) to[i] += other[i];
  };
  if (bias != nullptr) add(bias + first, product);
  if (p.swiglu) {
    if (bias != nullptr) add(bias + p.outputs + first, up);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) product[i] = silu(product[i]) * up[i];
  }
  if (p.residual != nullptr)
    add(static_cast<const T*>(p.residual) + j * p.residual_stride + first, product);
  store_row(product, static_cast<T*>(p.y) + j * p.outputs + first, n);
}

template <typename T>
void forward(const LinearDecodeParams& p) {
  using A = Acc<T>;
  constexpr std::int64_t kBlock = 24;  // outputs of one task: whole tiles of every height
  const std::int64_t h_stride = round_up<std::int64_t>(p.K, kLanes<A>);
  A* const h = new A[p.rows * h_stride];
  normalize<T>(p, h, h_stride);
  const auto *const weight = static_cast<const T*>(p.weight), *const up_weight =
                                                                  static_cast<const T*>(
                                                                      p.up_weight);
  parallel_for(ceil_div(p.outputs, kBlock), 1, [&](std::int64_t begin, std::int64_t end) {
    A* const product = new A[(2 * p.rows + 1) * kBlock];
    A *const up = product + p.rows * kBlock, *const other = up + p.rows * kBlock;
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * kBlock, left = p.outputs - first;
      const std::int64_t n = left < kBlock ? left : kBlock;
      all_rows<8>(weight + first * p.weight_stride, p.weight_stride, n, h, h_stride, p.rows, p.K,
                  product, kBlock);
      if (p.swiglu)
        all_rows<8>(up_weight + first * p.weight_stride, p.weight_stride, n, h, h_stride, p.rows,
                    p.K, up, kBlock);
      for (std::int64_t j = 0; j < p.rows; ++j)
        finish<T>(p, j, first, n, product + j * kBlock, up + j * kBlock, other);
    }
    delete[] product;
  });
  delete[] h;
}

#ifdef ZEBRA_AMX
// More rows, in bf16: h is rounded to bf16, products are summed in fp32 by the matrix unit.
void forward_amx(const LinearDecodeParams& p) {
  constexpr std::int64_t kBlock = 4 * kAmxRows;  // outputs of one task
  const std::int64_t padded = round_up<std::int64_t>(p.rows, 16), ld = pad_32(p.K);
  Aligned<float> h(p.rows * p.K);
  Aligned<std::uint32_t> pairs(amx_packed_size(p.rows, p.K));
  normalize<BFloat16>(p, h, p.K);
  parallel_for(padded / 16, 1, [&](std::int64_t begin, std::int64_t end) {
    Aligned<BFloat16> rows(16 * ld);
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t r = 0; r < 16; ++r) {
        const std::int64_t n = i * 16 + r < p.rows ? p.K : 0;
        if (n > 0) store_row(h + (i * 16 + r) * p.K, rows + r * ld, n);
        copy_padded(nullptr, 0, rows + r * ld + n, ld - n);
      }
      amx_pack_tile(rows, p.K, pairs + i * amx_packed_size(16, p.K));
    }
  });
  const auto *const weight = static_cast<const BFloat16*>(p.weight),
                    *const up_weight = static_cast<const BFloat16*>(p.up_weight);
  parallel_for(ceil_div(p.outputs, kBlock), 1, [&](std::int64_t begin, std::int64_t end) {
    const AmxScope amx;
    Aligned<float> tiles(padded * kBlock), product(padded * kBlock), up(padded * kBlock);
    Aligned<float> other(kBlock);
    Aligned<BFloat16> scratch(kAmxRows * kAmxDepth);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * kBlock, left = p.outputs - first;
      const std::int64_t n = left < kBlock ? left : kBlock;
      const auto multiply = [&](const BFloat16* from, float* out) {
        amx_weight_product(from + first * p.weight_stride, p.weight_stride, n, p.K, pairs, p.rows,
                           tiles, 16, kBlock * 16, scratch);
        for (std::int64_t j = 0; j < p.rows; ++j)
          for (std::int64_t i = 0; i < n; ++i)
            out[j * kBlock + i] = tiles[j / 16 * kBlock * 16 + i * 16 + j % 16];
      };
      multiply(weight, product);
      if (p.swiglu) multiply(up_weight, up);
      for (std::int64_t j = 0; j < p.rows; ++j)
        finish<BFloat16>(p, j, first, n, product + j * kBlock, up + j * kBlock, other);
    }
  });
}
#endif

template <typename T>
void norm_only(const LinearDecodeEnds& e) {
  using A = Acc<T>;
  A* const h = new A[e.p.rows * e.p.K];
  normalize<T>(e.p, h, e.p.K);
  store_row(h, static_cast<T*>(e.h), e.p.rows * e.p.K);
  delete[] h;
}

template <typename T>
void epilogue(const LinearDecodeEnds& e) {
  using A = Acc<T>;
  const LinearDecodeParams& p = e.p;
  const std::int64_t width = p.swiglu ? 2 * p.outputs : p.outputs;
  parallel_for(p.rows, ceil_div<std::int64_t>(16384, width),
               [&](std::int64_t begin, std::int64_t end) {
                 A* const product = new A[width + p.outputs];
                 for (std::int64_t j = begin; j < end; ++j) {
                   load_row(static_cast<const T*>(e.products) + j * width, product, width);
                   finish<T>(p, j, 0, p.outputs, product, product + p.outputs, product + width);
                 }
                 delete[] product;
               });
}

}  // namespace

void linear_decode(const LinearDecodeParams& p) {
#ifdef ZEBRA_AMX
  if (p.use_amx) return forward_amx(p);
#endif
  ZEBRA_DISPATCH_CPU(p.dtype, forward, p);
}

void linear_decode_norm(const LinearDecodeEnds& e) { ZEBRA_DISPATCH_CPU(e.p.dtype, norm_only, e); }

void linear_decode_epilogue(const LinearDecodeEnds& e) {
  ZEBRA_DISPATCH_CPU(e.p.dtype, epilogue, e);
}

}  // namespace zebra::ZEBRA_ISA
