// One chunk of one head: what the forward and the backward pass share.
//
// With s the cumulative sum of a = A d inside the chunk (inclusive, always <= 0):
//   E_ij = exp(s_i - s_j) (C_i . B_j) for j <= i,    Y_i = sum_j E_ij d_j x_j + exp(s_i) C_i S
//   S' = exp(s_last) S + sum_j B_j (exp(s_last - s_j) d_j x_j)
// States are held transposed, [N, P], so that every product reads its right operand in rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <new>

#include "common/cpu/vec.h"
#include "common/math.h"
#include "ssd_scan/ssd_scan.h"
#include "ssd_scan/ssd_scan_gemm.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace zebra::ZEBRA_ISA {
namespace {

constexpr std::int64_t kChunk = 64;  // tokens; a multiple of every kPad

// Decayed products would become denormal numbers, a hundred times slower than zeros on x86.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// A task's scratch memory: taken once, sliced by take().
template <typename A>
class Arena {
 public:
  explicit Arena(std::int64_t elements)
      : begin_(static_cast<A*>(
            ::operator new(static_cast<std::size_t>(elements) * sizeof(A), std::align_val_t(64)))),
        next_(begin_) {
    for (std::int64_t i = 0; i < elements; ++i) begin_[i] = 0;
  }
  ~Arena() { ::operator delete(begin_, std::align_val_t(64)); }
  Arena(const Arena&) = delete;
  A* take(std::int64_t elements) {
    A* const p = next_;
    next_ += elements;
    return p;
  }

 private:
  A *begin_, *next_;
};

// Row strides of tiles: whole vectors, and never a multiple of 256 bytes (cache sets).
template <typename A>
struct Layout {
  explicit Layout(const SsdScanParams& p)
      : P(p.head_dim), N(p.state_dim), P_pad(pad(P)), N_pad(pad(N)), ldp(row(P)), ldn(row(N)) {}
  static std::int64_t pad(std::int64_t n) { return round_up<std::int64_t>(n, kPad<A>); }
  static std::int64_t row(std::int64_t n) {
    const std::int64_t padded = pad(n);
    return padded % (256 / sizeof(A)) == 0 ? padded + 64 / sizeof(A) : padded;
  }
  std::int64_t token_p() const { return kChunk * ldp; }  // elements of a [tokens, P] tile
  std::int64_t token_n() const { return kChunk * ldn; }
  std::int64_t state() const { return N_pad * ldp; }  // [N, P]
  std::int64_t P, N, P_pad, N_pad, ldp, ldn;
};
template <typename A>
constexpr std::int64_t kSquareRow = kChunk + 64 / sizeof(A);  // of [tokens, tokens] tiles
template <typename A>
constexpr std::int64_t kSquare = kChunk * kSquareRow<A>;

template <typename A>
struct Gather {
  const void* src;
  std::int64_t stride, n;
  A* dst;
  template <typename S>
  static void run(const Gather& g) {
    const S* s = static_cast<const S*>(g.src);
    for (std::int64_t i = 0; i < g.n; ++i) g.dst[i] = static_cast<A>(to_acc(s[i * g.stride]));
  }
};

template <typename A>
struct Scatter {
  const A* src;
  void* dst;
  std::int64_t stride, n;
  template <typename D>
  static void run(const Scatter& s) {
    D* d = static_cast<D*>(s.dst);
    for (std::int64_t i = 0; i < s.n; ++i)
      d[i * s.stride] = from_acc<D>(static_cast<Acc<D>>(s.src[i]));
  }
};

inline std::int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// n elements to `offset` of a vector of any dtype; nothing where the tensor is absent.
template <typename A>
void scatter(const A* src, void* dst, DType dtype, std::int64_t offset, std::int64_t stride,
             std::int64_t n) {
  if (dst == nullptr) return;
  void* const first = static_cast<char*>(dst) + offset * bytes_of(dtype);
  ZEBRA_DISPATCH_CPU(dtype, Scatter<A>::template run, {src, first, stride, n});
}

// n elements from `offset` of a vector of any dtype; zeros where the tensor is absent.
template <typename A>
void gather(const void* src, DType dtype, std::int64_t offset, std::int64_t stride, std::int64_t n,
            A* dst) {
  if (src == nullptr) {
    for (std::int64_t i = 0; i < n; ++i) dst[i] = 0;
    return;
  }
  const void* const first = static_cast<const char*>(src) + offset * bytes_of(dtype);
  ZEBRA_DISPATCH_CPU(dtype, Gather<A>::template run, {first, stride, n, dst});
}

// Element i of a vector of any dtype; zero where the tensor is absent.
template <typename A>
A element(const void* src, DType dtype, std::int64_t i) {
  A value = 0;
  gather(src, dtype, i, 1, 1, &value);
  return value;
}

// A [H] holds the accumulation type.
template <typename A>
A decay_rate(const SsdScanParams& p, std::int64_t head) {
  return static_cast<const A*>(p.A)[head];
}

// Rows `first` .. `first + len` of a sequence; rows up to a multiple of kRows become zeros.
template <typename T>
void load_tile(const void* base, const SsdStrides& stride, std::int64_t batch, std::int64_t first,
               std::int64_t len, std::int64_t head, std::int64_t cols, Acc<T>* dst,
               std::int64_t ld) {
  const T* const src = static_cast<const T*>(base) + batch * stride.batch + first * stride.token +
                       head * stride.head;
  for (std::int64_t i = 0; i < len; ++i) load_row(src + i * stride.token, dst + i * ld, cols);
  for (std::int64_t i = len; i < round_up<std::int64_t>(len, kRows); ++i)
    for (std::int64_t c = 0; c < ld; ++c) dst[i * ld + c] = 0;
}

// A row of a head lies in a page of its own, so that hardware does not foresee it: asks for it
// while something else is computed.
template <typename T>
inline void prefetch_row(const void* base, const SsdStrides& stride, std::int64_t batch,
                         std::int64_t token, std::int64_t head, std::int64_t cols) {
  const char* const row =
      reinterpret_cast<const char*>(static_cast<const T*>(base) + batch * stride.batch +
                                    token * stride.token + head * stride.head);
  for (std::int64_t at = 0; at < cols * static_cast<std::int64_t>(sizeof(T)); at += 64)
    __builtin_prefetch(row + at, 0, 2);
}

template <typename A>
struct Decay {
  A raw[kChunk];                // dt + dt_bias
  A d[kChunk];                  // step; 0 past the end
  A high[kChunk], low[kChunk];  // s = high + low, so that s_i - s_j is exact after a huge step
  A from_start[kChunk];         // exp(s_i)
  A to_end[kChunk];             // exp(s_last - s_j)
  A whole;                      // exp(s_last)

  void compute(const SsdScanParams& p, std::int64_t batch, std::int64_t first, std::int64_t len,
               std::int64_t head) {
    const A rate = decay_rate<A>(p, head);
    const A bias = element<A>(p.dt_bias, p.dt_bias_dtype, head);
    gather(p.dt, p.dt_dtype, batch * p.dt_stride.batch + first * p.dt_stride.token + head,
           p.dt_stride.token, len, raw);
    for (std::int64_t i = len; i < kChunk; ++i) raw[i] = 0;
    for (std::int64_t i = 0; i < kChunk; i += kLanes<A>) {
      const Vec<A> step = load(raw + i) + bias;
      store(raw + i, step);
      store(d + i, p.dt_softplus ? softplus_of<A>(step) : step);
    }
    for (std::int64_t i = len; i < kChunk; ++i) d[i] = 0;
    double s[kChunk], sum = 0;
    for (std::int64_t i = 0; i < kChunk; ++i) {
      sum += static_cast<double>(rate) * static_cast<double>(d[i]);
      sum = sum < -1e30 ? -1e30 : sum;  // an infinite step forgets everything before it
      s[i] = sum;
    }
    for (std::int64_t i = 0; i < kChunk; ++i) {
      high[i] = static_cast<A>(s[i]);
      low[i] = static_cast<A>(s[i] - static_cast<double>(high[i]));
      to_end[i] = static_cast<A>(sum - s[i]);
    }
    for (std::int64_t i = 0; i < kChunk; i += kLanes<A>) {
      store(from_start + i, exp_decay(load(high + i)));
      store(to_end + i, exp_decay(load(to_end + i)));
    }
    whole = from_start[kChunk - 1];
  }
};

// Of exp(s_i - s_j), the vector at column j; what lies right of the diagonal is not meant to be
// read.
template <typename A>
inline Vec<A> decays(const Decay<A>& decay, std::int64_t i, std::int64_t j) {
  return exp_decay((decay.high[i] - load(decay.high + j)) + (decay.low[i] - load(decay.low + j)));
}

// out = scale * in, row by row, whole vectors.
template <typename A>
inline void scale_rows(const A* scale, const A* in, A* out, std::int64_t ld, std::int64_t rows,
                       std::int64_t cols) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t c = i * ld; c < i * ld + cols; c += kLanes<A>)
      store(out + c, scale[i] * load(in + c));
}

// scores[i][j] = C_i . B_j on and below the diagonal; B_t is B transposed.
template <typename A>
void score_tile(const Layout<A>& l, const A* C, const A* B_t, std::int64_t rows, A* scores) {
  multiply_lower_output<A>(
      {{C, l.ldn, 1}, B_t, kSquareRow<A>, scores, kSquareRow<A>, rows, rows, l.N});
}

// Y = E (d x) + exp(s) C state; state nullptr: the sequence starts at zero.
template <typename A>
void output_tile(const Layout<A>& l, const A* E, const A* dx, const A* C, const A* state,
                 const Decay<A>& decay, std::int64_t rows, A* Y) {
  if (state != nullptr)
    multiply<Part::kFull, A>({{C, l.ldn, 1}, state, l.ldp, Y, l.ldp, rows, l.P_pad, l.N});
  multiply<Part::kLower, A>({{E, kSquareRow<A>, 1},
                             dx,
                             l.ldp,
                             Y,
                             l.ldp,
                             rows,
                             l.P_pad,
                             rows,
                             state == nullptr ? nullptr : decay.from_start,
                             1});
}

// next = exp(s_last) state + B^T w, w_j = exp(s_last - s_j) d_j x_j.
template <typename A>
void state_update(const Layout<A>& l, const A* B, const A* w, const A* state, const Decay<A>& decay,
                  std::int64_t len, A* next) {
  multiply<Part::kFull, A>({{B, 1, l.ldn},
                            w,
                            l.ldp,
                            next,
                            l.ldp,
                            round_up<std::int64_t>(l.N, kRows),
                            l.P_pad,
                            len,
                            state == nullptr ? nullptr : &decay.whole,
                            0,
                            state});
}

// [P, N] contiguous in memory to and from the [N, P] tile.
template <typename A>
void load_state(const Layout<A>& l, const A* src, A* tile) {
  for (std::int64_t p = 0; p < l.P; ++p)
    for (std::int64_t n = 0; n < l.N; ++n) tile[n * l.ldp + p] = src[p * l.N + n];
}
template <typename A>
void store_state(const Layout<A>& l, const A* tile, A* dst) {
  for (std::int64_t p = 0; p < l.P; ++p)
    for (std::int64_t n = 0; n < l.N; ++n)
      dst[p * l.N + n] = tile == nullptr ? A(0) : tile[n * l.ldp + p];
}

struct Sequence {
  std::int64_t batch, first, len;
};
inline Sequence sequence(const SsdScanParams& p, std::int64_t i) {
  if (p.cu_seqlens == nullptr) return {i, 0, p.tokens};
  return {0, p.cu_seqlens[i], p.cu_seqlens[i + 1] - p.cu_seqlens[i]};
}

}  // namespace
}  // namespace zebra::ZEBRA_ISA
