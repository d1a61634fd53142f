// RMSNorm on the CPU: one task per row; the weight gradient in a fixed number of row groups.
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/vec.h"
#include "common/math.h"
#include "rms_norm/rms_norm.h"

namespace zebra::ZEBRA_ISA {
namespace {

constexpr std::int64_t kGrainElements =
    16384;  // below this a second thread costs more than it gives

// Reads a weight vector of any dtype into the accumulation type.
template <typename A>
struct WeightRow {
  const void* src;
  A* dst;
  std::int64_t n;
  template <typename W>
  static void load(const WeightRow& r) {
    const W* w = static_cast<const W*>(r.src);
    for (std::int64_t i = 0; i < r.n; ++i) r.dst[i] = static_cast<A>(to_acc(w[i]));
  }
  template <typename W>
  static void store(const WeightRow& r) {
    W* w = static_cast<W*>(const_cast<void*>(r.src));
    for (std::int64_t i = 0; i < r.n; ++i) w[i] = from_acc<W>(static_cast<Acc<W>>(r.dst[i]));
  }
};

template <typename A>
void load_weight(const void* w, DType dtype, A* dst, std::int64_t n) {
  ZEBRA_DISPATCH_CPU(dtype, WeightRow<A>::template load, {w, dst, n});
}
template <typename A>
void store_weight(void* w, DType dtype, A* src, std::int64_t n) {
  ZEBRA_DISPATCH_CPU(dtype, WeightRow<A>::template store, {w, src, n});
}

// sum a b: short runs in the vector lanes, added up in fp64, so that long rows keep their digits on
// narrow vectors too.
template <typename A>
double dot(const A* a, const A* b, std::int64_t n) {
  constexpr std::int64_t kRun = 512;
  double total = 0;
  for (std::int64_t first = 0; first < n; first += kRun) {
    const std::int64_t last = first + kRun < n ? first + kRun : n;
    A run = 0;
#pragma omp simd reduction(+ : run)
    for (std::int64_t i = first; i < last; ++i) run += a[i] * b[i];
    total += run;
  }
  return total;
}

template <typename T>
void forward(const RmsNormParams& p) {
  using A = Acc<T>;
  const std::int64_t dim = p.dim;
  A* const weight = new A[dim];
  load_weight<A>(p.weight, p.weight_dtype, weight, dim);
  parallel_for(p.rows, ceil_div(kGrainElements, dim), [&](std::int64_t begin, std::int64_t end) {
    A* const s = new A[2 * dim];
    A* const other = s + dim;
    for (std::int64_t r = begin; r < end; ++r) {
      load_row(static_cast<const T*>(p.x) + r * p.x_stride, s, dim);
      if (p.residual != nullptr) {
        load_row(static_cast<const T*>(p.residual) + r * p.residual_stride, other, dim);
#pragma omp simd
        for (std::int64_t i = 0; i < dim; ++i) s[i] += other[i];
        store_row(s, static_cast<T*>(p.sum) + r * dim, dim);
      }
      const A square = static_cast<A>(dot(s, s, dim));
      const A rstd = A(1) / std::sqrt(square / static_cast<A>(dim) + static_cast<A>(p.eps));
      static_cast<A*>(p.rstd)[r] = rstd;
#pragma omp simd
      for (std::int64_t i = 0; i < dim; ++i) other[i] = weight[i] * s[i] * rstd;
      store_row(other, static_cast<T*>(p.y) + r * dim, dim);
    }
    delete[] s;
  });
  delete[] weight;
}

template <typename T>
void backward(const RmsNormBackwardParams& p) {
  using A = Acc<T>;
  const std::int64_t dim = p.dim;
  A* const weight = new A[dim];
  load_weight<A>(p.weight, p.weight_dtype, weight, dim);
  const std::int64_t group = ceil_div(p.rows, p.partials);
  parallel_for(p.partials, 1, [&](std::int64_t begin, std::int64_t end) {
    A* const dy = new A[2 * dim];
    A* const s = dy + dim;
    for (std::int64_t g = begin; g < end; ++g) {
      A* const dw = static_cast<A*>(p.partial) + g * dim;
      for (std::int64_t i = 0; i < dim; ++i) dw[i] = 0;
      const std::int64_t last = (g + 1) * group < p.rows ? (g + 1) * group : p.rows;
      for (std::int64_t r = g * group; r < last; ++r) {
        load_row(static_cast<const T*>(p.dy) + r * p.dy_stride, dy, dim);
        load_row(static_cast<const T*>(p.sum) + r * p.sum_stride, s, dim);
        const A rstd = static_cast<const A*>(p.rstd)[r];
#pragma omp simd
        for (std::int64_t i = 0; i < dim; ++i) {
          dw[i] += dy[i] * s[i] * rstd;
          dy[i] *= weight[i];
        }
        const A c = static_cast<A>(dot(dy, s, dim)) * rstd * rstd / static_cast<A>(dim);
#pragma omp simd
        for (std::int64_t i = 0; i < dim; ++i) dy[i] = rstd * (dy[i] - s[i] * c);
        if (p.dsum != nullptr) {
          load_row(static_cast<const T*>(p.dsum) + r * dim, s, dim);
#pragma omp simd
          for (std::int64_t i = 0; i < dim; ++i) dy[i] += s[i];
        }
        store_row(dy, static_cast<T*>(p.dx) + r * dim, dim);
      }
    }
    delete[] dy;
  });
  for (std::int64_t i = 0; i < dim; ++i) weight[i] = 0;
  for (std::int64_t g = 0; g < p.partials; ++g) {
    const A* const dw = static_cast<const A*>(p.partial) + g * dim;
    for (std::int64_t i = 0; i < dim; ++i) weight[i] += dw[i];
  }
  store_weight<A>(p.dweight, p.weight_dtype, weight, dim);
  delete[] weight;
}

}  // namespace

void rms_norm(const RmsNormParams& p) { ZEBRA_DISPATCH_CPU(p.dtype, forward, p); }

void rms_norm_backward(const RmsNormBackwardParams& p) { ZEBRA_DISPATCH_CPU(p.dtype, backward, p); }

}  // namespace zebra::ZEBRA_ISA
