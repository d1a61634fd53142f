// mamba2_step on the CPU: one task per (row, KV group), which convolves the group's channels, then
// streams the state of each of its heads once.  Every channel and head belongs to one task.
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "mamba2_step/mamba2_step.h"

namespace zebra::ZEBRA_ISA {
namespace {

template <typename A>
struct Span {
  const void* src;
  std::int64_t first;
  A* dst;
  std::int64_t n;
  template <typename W>
  static void load(const Span& s) {
    const W* w = static_cast<const W*>(s.src) + s.first;
    for (std::int64_t i = 0; i < s.n; ++i) s.dst[i] = static_cast<A>(to_acc(w[i]));
  }
};

// dst = src[first : first + n] of any dtype.
template <typename A>
void load_span(const void* src, DType dtype, std::int64_t first, A* dst, std::int64_t n) {
  ZEBRA_DISPATCH_CPU(dtype, Span<A>::template load, {src, first, dst, n});
}

// Scratch of one thread, in elements of the accumulation type.
template <typename A>
struct Scratch {
  A *x, *B, *C, *z, *weight, *past, *bias, *in, *y;
  A* const base;

  explicit Scratch(const Mamba2StepParams& p)
      : base(new A[2 * (p.headdim + p.d_state) + (p.heads / p.groups) * p.d_state + 2 * p.headdim +
                   channels(p) * (2 * p.width + 2)]) {
    x = base;
    B = x + 2 * p.headdim;
    C = B + 2 * p.d_state;
    z = C + (p.heads / p.groups) * p.d_state;
    y = z + p.headdim;
    weight = y + p.headdim;
    past = weight + channels(p) * p.width;
    bias = past + channels(p) * p.width;
    in = bias + channels(p);
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { delete[] base; }

  // Channels of the largest block convolved at once.
  static std::int64_t channels(const Mamba2StepParams& p) {
    const std::int64_t c = (p.heads / p.groups) * p.d_state;
    return c > p.headdim ? c : p.headdim;
  }
};

// out[c] = sum_k weight[c, k] past[c, k] + weight[c, W-1] in[c] + bias[c]; kWidth 0: any width.
template <int kWidth, typename A>
void taps(const A* __restrict weight, const A* __restrict past, const A* __restrict in,
          const A* __restrict bias, A* __restrict out, std::int64_t n, std::int64_t any_width) {
  const std::int64_t width = kWidth > 0 ? kWidth : any_width;
#pragma omp simd
  for (std::int64_t c = 0; c < n; ++c) {
    A sum = bias[c];
    for (std::int64_t k = 0; k + 1 < width; ++k)
      sum += weight[c * width + k] * past[c * (width - 1) + k];
    out[c] = sum + weight[c * width + width - 1] * in[c];
  }
}

// Convolves channels [first, first + n) of a row into `out` and shifts their state by one token.
template <typename T, typename A>
void conv_update(const Mamba2StepParams& p, const T* row, T* slot, std::int64_t first,
                 std::int64_t n, const Scratch<A>& s, A* out) {
  const std::int64_t width = p.width, kept = width - 1;
  const T* in = row + p.heads * p.headdim + first;
  T* state = slot + first * kept;
  load_row(in, s.in, n);
  load_row(state, s.past, n * kept);
  load_span(p.conv_weight, p.conv_weight_dtype, first * width, s.weight, n * width);
  if (p.conv_bias != nullptr)
    load_span(p.conv_bias, p.conv_bias_dtype, first, s.bias, n);
  else
    for (std::int64_t c = 0; c < n; ++c) s.bias[c] = 0;
  if (width == 4)
    taps<4>(s.weight, s.past, s.in, s.bias, out, n, width);
  else
    taps<0>(s.weight, s.past, s.in, s.bias, out, n, width);
#pragma omp simd
  for (std::int64_t c = 0; c < n; ++c) out[c] = silu(out[c]);
  if (kept > 0) {  // all channels move left by one, then every channel's last place is new
    std::memmove(state, state + 1, static_cast<std::size_t>(n * kept - 1) * sizeof(T));
    for (std::int64_t c = 0; c < n; ++c) state[c * kept + kept - 1] = in[c];
  }
}

// kRows rows of one head's state: S = decay S + dx B^T, y = S C.
template <int kRows, typename S, typename A>
void update_rows(S* state, const A* B, const A* C, A decay, const A* dx, A* y, std::int64_t N) {
  Vec<A> sum[kRows] = {};
  std::int64_t n = 0;
  for (; n + kLanes<A> <= N; n += kLanes<A>) {
    const Vec<A> b = load(B + n), c = load(C + n);
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> v = decay * load(state + i * N + n) + dx[i] * b;
      store(state + i * N + n, v);
      sum[i] += v * c;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    y[i] = sum_lanes<A>(sum[i]);
    for (std::int64_t m = n; m < N; ++m) {
      const A v = decay * to_acc(state[i * N + m]) + dx[i] * B[m];
      state[i * N + m] = from_acc<S>(v);
      y[i] += v * C[m];
    }
  }
}

template <typename T, typename S, typename A>
void head_step(const Mamba2StepParams& p, const T* row, S* state, std::int64_t h, const A* C,
               const Scratch<A>& s, T* y) {
  const std::int64_t P = p.headdim, N = p.d_state;
  const std::int64_t dt_at = p.heads * P + p.groups * (P + N) + p.heads * N;
  A bias, D;
  load_span(p.dt_bias, p.dt_bias_dtype, h, &bias, 1);
  load_span(p.D, p.D_dtype, h, &D, 1);
  const A d = softplus(to_acc(row[dt_at + h]) + bias);
  const A a = static_cast<const A*>(p.A)[h];
  const A decay = std::exp(d * (p.A_is_log ? -std::exp(a) : a));
  A* const dx = s.x + P;
  for (std::int64_t i = 0; i < P; ++i) dx[i] = d * s.x[i];
  std::int64_t i = 0;
  for (; i + 4 <= P; i += 4) update_rows<4>(state + i * N, s.B, C, decay, dx + i, s.y + i, N);
  for (; i < P; ++i) update_rows<1>(state + i * N, s.B, C, decay, dx + i, s.y + i, N);

  load_row(row + h * P, s.z, P);
  A square = 0;
#pragma omp simd reduction(+ : square)
  for (std::int64_t j = 0; j < P; ++j) {
    const A u = (s.y[j] + D * s.x[j]) * silu(s.z[j]);
    s.y[j] = u;
    square += u * u;
  }
  if (p.norm_weight != nullptr) {
    const A rstd = A(1) / std::sqrt(square / static_cast<A>(P) + static_cast<A>(p.norm_eps));
    load_span(p.norm_weight, p.norm_weight_dtype, h * P, s.z, P);
#pragma omp simd
    for (std::int64_t j = 0; j < P; ++j) s.y[j] *= s.z[j] * rstd;
  }
  store_row(s.y, y + h * P, P);
}

template <typename T, typename S>
void step(const Mamba2StepParams& p) {
  using A = Acc<T>;
  const std::int64_t P = p.headdim, N = p.d_state, share = p.heads / p.groups;
  parallel_for(p.batch * p.groups, 1, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<A> s(p);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t b = task / p.groups, g = task % p.groups;
      const std::int64_t slot = p.state_indices != nullptr ? p.state_indices[b] : b;
      const T* row = static_cast<const T*>(p.zxbcdt) + b * p.row_stride;
      T* y = static_cast<T*>(p.y) + b * p.heads * P;
      if (slot < 0) {
        for (std::int64_t i = g * share * P; i < (g + 1) * share * P; ++i) y[i] = from_acc<T>(A(0));
        continue;
      }
      T* conv = static_cast<T*>(p.conv_state) + slot * p.conv_slot_stride;
      S* state = static_cast<S*>(p.ssm_state) + slot * p.ssm_slot_stride;
      conv_update(p, row, conv, g * P, P, s, s.x);
      conv_update(p, row, conv, p.groups * P + g * N, N, s, s.B);
      conv_update(p, row, conv, p.groups * (P + N) + g * share * N, share * N, s, s.C);
      for (std::int64_t h = g * share; h < (g + 1) * share; ++h)
        head_step(p, row, state + h * P * N, h, s.C + (h - g * share) * N, s, y);
    }
  });
}

template <typename T>
void any_state(const Mamba2StepParams& p) {
  if (p.state_dtype == p.dtype)
    step<T, T>(p);
  else
    step<T, Acc<T>>(p);
}

}  // namespace

void mamba2_step(const Mamba2StepParams& p) { ZEBRA_DISPATCH_CPU(p.dtype, any_state, p); }

}  // namespace zebra::ZEBRA_ISA
