// Backward pass: a task walks a sequence with a block of heads, forward for the states at the chunk
// starts, then in reverse for everything else.
//
// With G_ij = dy_i . x_j, E_ij = exp(s_i - s_j) C_i . B_j, F_ij = exp(s_i - s_j) G_ij d_j (j <= i),
// h the state before the chunk and g the gradient of the state after it:
//   q_j  = sum_i E_ij dy_i + exp(s_last - s_j) g B_j             dx_j = d_j q_j + D dy_j
//   dC_i = sum_j F_ij B_j + exp(s_i) h^T dy_i                    dB_j = sum_i F_ij C_i
//   g    = exp(s_last) g + sum_i exp(s_i) dy_i C_i^T                    + exp(s_last - s_j) d_j g^T
//   x_j da_k = sum_{i >= k} (row sum - column sum)_i of M + sum_{i >= k} exp(s_i) dy_i . h C_i
//        + sum_{j < k} exp(s_last - s_j) d_j x_j . g B_j + exp(s_last) <g, h>,  M = E_ij G_ij d_j,
//        j < i
// Row and column sums come from one tile M without its diagonal: their difference then loses only
// the rounding of fp32 where decay is strong.
#pragma once

#include "common/cpu/parallel.h"
#include "ssd_scan/ssd_scan_chunk.h"

namespace zebra::ZEBRA_ISA {
namespace {

template <typename T>
class BackwardWalk {
  using A = Acc<T>;

 public:
  BackwardWalk(const SsdScanBackwardParams& p, std::int64_t block, std::int64_t chunks)
      : p_(p),
        in_(p.in),
        l_(p.in),
        block_(block),
        chunks_(chunks),
        arena_(7 * l_.token_p() + 5 * l_.token_n() + (l_.P_pad + l_.N_pad) * kSquareRow<A> +
               4 * kSquare<A> + 2 * l_.P_pad * l_.ldn + block * (chunks + 1) * l_.state() +
               4 * l_.P_pad) {
    split(l_.token_p(), x_, w_, y_, dy_, edy_, q_, dx_);
    split(l_.token_n(), B_, C_, tmp_, dB_, dC_);
    x_t_ = arena_.take(l_.P_pad * kSquareRow<A>);
    B_t_ = arena_.take(l_.N_pad * kSquareRow<A>);
    split(kSquare<A>, scores_, L_, E_, F_);
    split(l_.P_pad * l_.ldn, state_t_, dstate_t_);
    states_ = arena_.take(block * chunks * l_.state());
    dstates_ = arena_.take(block * l_.state());
    split(l_.P_pad, z_, gate_, weight_, dweight_);
  }

  // Heads head .. head + block of sequence `index`.
  void run(std::int64_t index, std::int64_t head) {
    const Sequence seq = sequence(in_, index);
    const std::int64_t state_size = l_.P * l_.N;
    const std::int64_t chunks = ceil_div(seq.len, kChunk);
    for (std::int64_t h = 0; h < block_; ++h) {
      A* const s = sums(index, head + h);
      for (std::int64_t i = 0; i < 3 + l_.P; ++i) s[i] = 0;
      const std::int64_t at = (index * in_.heads + head + h) * state_size;
      if (in_.initial_state != nullptr && chunks > 0)
        load_state(l_, static_cast<const A*>(in_.initial_state) + at, state(h, 0));
      if (p_.dfinal_state != nullptr)
        load_state(l_, static_cast<const A*>(p_.dfinal_state) + at, dstate(h));
    }
    for (std::int64_t c = 0; c + 1 < chunks; ++c) {
      x_head_ = b_head_ = c_head_ = -1;
      for (std::int64_t h = 0; h < block_; ++h) advance(seq, c, head, h);
    }
    bool live = p_.dfinal_state != nullptr;  // false: the gradients of the states are zero
    for (std::int64_t c = chunks; c-- > 0;) {
      x_head_ = b_head_ = c_head_ = -1;
      for (std::int64_t h = 0; h < block_; ++h) reverse(index, seq, c, head, h, live);
      live = true;
    }
    if (p_.dinitial_state != nullptr)
      for (std::int64_t h = 0; h < block_; ++h)
        store_state(
            l_, live ? dstate(h) : nullptr,
            static_cast<A*>(p_.dinitial_state) + (index * in_.heads + head + h) * state_size);
  }

 private:
  template <typename... Tiles>
  void split(std::int64_t elements, Tiles&... tiles) {
    ((tiles = arena_.take(elements)), ...);
  }
  A* state(std::int64_t h, std::int64_t c) { return states_ + (h * chunks_ + c) * l_.state(); }
  A* dstate(std::int64_t h) { return dstates_ + h * l_.state(); }
  A* sums(std::int64_t index, std::int64_t head) {
    return static_cast<A*>(p_.sums) + (index * in_.heads + head) * (3 + l_.P);
  }
  std::int64_t x_ratio() const { return in_.heads / in_.x_heads; }
  std::int64_t b_ratio() const { return in_.heads / in_.b_heads; }
  std::int64_t c_ratio() const { return in_.heads / in_.c_heads; }
  std::int64_t length(const Sequence& seq, std::int64_t c) const {
    const std::int64_t left = seq.len - c * kChunk;
    return left < kChunk ? left : kChunk;
  }
  bool known(std::int64_t c) const { return c > 0 || in_.initial_state != nullptr; }

  // The state of head + h after chunk c from the one before it.
  void advance(const Sequence& seq, std::int64_t c, std::int64_t head, std::int64_t h) {
    const std::int64_t first = seq.first + c * kChunk;
    load_x_and_b(seq.batch, first, kChunk, head + h);
    decay_.compute(in_, seq.batch, first, kChunk, head + h);
    scale_rows(decay_.d, x_, w_, l_.ldp, kChunk, l_.P_pad);
    scale_rows(decay_.to_end, w_, w_, l_.ldp, kChunk, l_.P_pad);
    state_update(l_, B_, w_, known(c) ? state(h, c) : nullptr, decay_, kChunk, state(h, c + 1));
  }

  bool load_x_and_b(std::int64_t batch, std::int64_t first, std::int64_t len, std::int64_t head) {
    const std::int64_t xh = head / x_ratio(), bh = head / b_ratio();
    const bool new_x = xh != x_head_, new_b = bh != b_head_;
    if (new_x) load_tile<T>(in_.x, in_.x_stride, batch, first, len, xh, l_.P, x_, l_.ldp);
    if (new_b) load_tile<T>(in_.B, in_.b_stride, batch, first, len, bh, l_.N, B_, l_.ldn);
    x_head_ = xh, b_head_ = bh;
    new_x_ = new_x;
    return new_b;
  }

  void load_groups(std::int64_t batch, std::int64_t first, std::int64_t len, std::int64_t rows,
                   std::int64_t head) {
    const std::int64_t ch = head / c_ratio();
    const bool new_b = load_x_and_b(batch, first, len, head), new_c = ch != c_head_;
    if (new_x_) transpose(x_, l_.ldp, x_t_, kSquareRow<A>, rows, l_.P);
    if (new_b) transpose(B_, l_.ldn, B_t_, kSquareRow<A>, rows, l_.N);
    if (new_c) load_tile<T>(in_.C, in_.c_stride, batch, first, len, ch, l_.N, C_, l_.ldn);
    if (new_b || new_c) score_tile(l_, C_, B_t_, rows, scores_);
    c_head_ = ch;
  }

  void reverse(std::int64_t index, const Sequence& seq, std::int64_t c, std::int64_t head0,
               std::int64_t h, bool live) {
    const std::int64_t head = head0 + h, first = seq.first + c * kChunk, len = length(seq, c);
    const std::int64_t rows = round_up<std::int64_t>(len, kRows), P = l_.P;
    const A* const before = known(c) ? state(h, c) : nullptr;
    A* const g = dstate(h);
    load_groups(seq.batch, first, len, rows, head);
    decay_.compute(in_, seq.batch, first, len, head);
    const SsdStrides dy_stride{in_.tokens * in_.heads * P, in_.heads * P, P};
    const std::int64_t next_c = h + 1 < block_ ? (head + 1) / c_ratio() : c_head_;
    for (std::int64_t i = 0; i < rows; ++i) {
      if (i < len) {
        prefetch_row<T>(p_.dy, dy_stride, seq.batch, first + i, head, P);
        if (in_.z != nullptr) prefetch_row<T>(in_.z, in_.z_stride, seq.batch, first + i, head, P);
        if (next_c != c_head_)
          prefetch_row<T>(in_.C, in_.c_stride, seq.batch, first + i, next_c, l_.N);
      }
      const std::int64_t at = i * kSquareRow<A>;
      for (std::int64_t j = 0; j <= i; j += kLanes<A>) {
        const Vec<A> decay = decays(decay_, i, j);
        store(L_ + at + j, decay);
        store(E_ + at + j, decay * load(scores_ + at + j));
      }
    }
    scale_rows(decay_.d, x_, w_, l_.ldp, rows, l_.P_pad);
    load_tile<T>(p_.dy, dy_stride, seq.batch, first, len, head, P, dy_, l_.ldp);
    const A skip = element<A>(in_.D, in_.d_dtype, head);
    if (in_.z != nullptr) {
      output_tile(l_, E_, w_, C_, before, decay_, rows, y_);
      gate(seq.batch, first, len, head, skip, sums(index, head) + 3);
    }
    scale_rows(decay_.from_start, dy_, edy_, l_.ldp, rows, l_.P_pad);
    weigh_pairs(rows);

    const A one = 1;
    const bool first_c = starts(h, c_ratio()), first_b = starts(h, b_ratio());
    // dC, and u_i = exp(s_i) dy_i . h C_i
    if (first_c) zero(dC_, rows * l_.ldn);
    if (before != nullptr) {
      transpose(before, l_.ldp, state_t_, l_.ldn, l_.N, P);
      multiply<Part::kFull, A>(
          {{edy_, l_.ldp, 1}, state_t_, l_.ldn, tmp_, l_.ldn, rows, l_.N_pad, P});
      for (std::int64_t i = 0; i < len; ++i) {
        const std::int64_t at = i * l_.ldn;
        balance_[i] += static_cast<double>(dot(C_ + at, tmp_ + at, l_.N));
        for (std::int64_t n = at; n < at + l_.N; n += kLanes<A>)
          store(dC_ + n, load(dC_ + n) + load(tmp_ + n));
      }
    }
    multiply<Part::kLower, A>(
        {{F_, kSquareRow<A>, 1}, B_, l_.ldn, dC_, l_.ldn, rows, l_.N_pad, rows, &one, 0});

    // q, and r_j = exp(s_last - s_j) d_j x_j . g B_j
    A r[kChunk], xq[kChunk];
    for (std::int64_t j = 0; j < len; ++j) r[j] = 0;
    if (live) {
      multiply<Part::kFull, A>({{B_, l_.ldn, 1}, g, l_.ldp, q_, l_.ldp, rows, l_.P_pad, l_.N});
      for (std::int64_t j = 0; j < len; ++j)
        r[j] = decay_.to_end[j] * dot(w_ + j * l_.ldp, q_ + j * l_.ldp, P);
    }
    multiply<Part::kUpper, A>({{E_, 1, kSquareRow<A>},
                               dy_,
                               l_.ldp,
                               q_,
                               l_.ldp,
                               rows,
                               l_.P_pad,
                               len,
                               live ? decay_.to_end : nullptr,
                               1});
    double dD = 0;
    if (starts(h, x_ratio())) zero(dx_, rows * l_.ldp);
    for (std::int64_t j = 0; j < len; ++j) {
      const A d = decay_.d[j];
      const std::int64_t at = j * l_.ldp;
      xq[j] = dot(x_ + at, q_ + at, P);
      if (in_.D != nullptr) dD += static_cast<double>(dot(x_ + at, dy_ + at, P));
      for (std::int64_t i = at; i < at + P; i += kLanes<A>)
        store(dx_ + i, load(dx_ + i) + d * load(q_ + i) + skip * load(dy_ + i));
    }

    // dB
    if (first_b) zero(dB_, rows * l_.ldn);
    if (live) {
      transpose(g, l_.ldp, dstate_t_, l_.ldn, l_.N, P);
      scale_rows(decay_.to_end, w_, w_, l_.ldp, rows, l_.P_pad);
      multiply<Part::kFull, A>(
          {{w_, l_.ldp, 1}, dstate_t_, l_.ldn, dB_, l_.ldn, rows, l_.N_pad, P, &one, 0});
    }
    multiply<Part::kUpper, A>(
        {{F_, 1, kSquareRow<A>}, C_, l_.ldn, dB_, l_.ldn, rows, l_.N_pad, len, &one, 0});

    const double through =
        live && before != nullptr ? static_cast<double>(decay_.whole) * state_dot(g, before) : 0.0;
    step_gradients(index, seq.batch, first, len, head, r, xq, through, dD);

    multiply<Part::kFull, A>({{C_, 1, l_.ldn},
                              edy_,
                              l_.ldp,
                              g,
                              l_.ldp,
                              round_up<std::int64_t>(l_.N, kRows),
                              l_.P_pad,
                              len,
                              live ? &decay_.whole : nullptr,
                              0});
    flush(dx_, l_.ldp, P, h, head, x_ratio(), in_.x_heads, seq.batch, first, len, p_.dx,
          p_.dx_partial);
    flush(dB_, l_.ldn, l_.N, h, head, b_ratio(), in_.b_heads, seq.batch, first, len, p_.dB,
          p_.dB_partial);
    flush(dC_, l_.ldn, l_.N, h, head, c_ratio(), in_.c_heads, seq.batch, first, len, p_.dC,
          p_.dC_partial);
  }

  // The gate and the norm: dy_ becomes the gradient of y_ (+ D x), dz is stored.
  void gate(std::int64_t batch, std::int64_t first, std::int64_t len, std::int64_t head, A skip,
            A* dnorm) {
    const std::int64_t P = l_.P;
    constexpr int L = kLanes<A>;
    const bool norm = in_.norm_weight != nullptr;
    if (norm) gather(in_.norm_weight, in_.norm_weight_dtype, head * P, 1, P, weight_);
    zero(dweight_, l_.P_pad);
    for (std::int64_t i = 0; i < len; ++i) {
      A* const y = y_ + i * l_.ldp;
      A* const dy = dy_ + i * l_.ldp;
      const A* const x = x_ + i * l_.ldp;
      load_row(static_cast<const T*>(in_.z) + batch * in_.z_stride.batch +
                   (first + i) * in_.z_stride.token + head * in_.z_stride.head,
               z_, P);
      for (std::int64_t c = P; c < l_.P_pad; ++c) y[c] = dy[c] = 0;
      Vec<A> square{}, product{};
      for (std::int64_t c = 0; c < P; c += L) {
        const Vec<A> full = load(y + c) + skip * load(x + c), s = sigmoid_of<A>(load(z_ + c));
        const Vec<A> u = full * load(z_ + c) * s;
        square += u * u;
        product += load(weight_ + c) * load(dy + c) * u;
        store(y + c, full);
        store(gate_ + c, s);
      }
      A rstd = 1, pull = 0;  // du = rstd (w do - u pull)
      if (norm) {
        const A inverse = A(1) / static_cast<A>(P);
        rstd = A(1) / std::sqrt(sum_lanes<A>(square) * inverse + static_cast<A>(in_.norm_eps));
        pull = sum_lanes<A>(product) * inverse * rstd * rstd;
      }
      for (std::int64_t c = 0; c < P; c += L) {
        const Vec<A> out = load(y + c), z = load(z_ + c), s = load(gate_ + c);
        const Vec<A> u = out * z * s, grad = load(dy + c);
        store(dweight_ + c, load(dweight_ + c) + grad * u * rstd);
        const Vec<A> du = norm ? rstd * (load(weight_ + c) * grad - u * pull) : grad;
        store(dy + c, du * z * s);
        store(gate_ + c, du * out * s * (A(1) + z * (A(1) - s)));
      }
      store_row(gate_,
                static_cast<T*>(p_.dz) + ((batch * in_.tokens + first + i) * in_.heads + head) * P,
                P);
    }
    if (norm)
      for (std::int64_t c = 0; c < P; ++c) dnorm[c] += dweight_[c];
  }

  // F, and balance_i = (row sum - column sum)_i of M.
  void weigh_pairs(std::int64_t rows) {
    multiply_lower_output<A>(
        {{dy_, l_.ldp, 1}, x_t_, kSquareRow<A>, F_, kSquareRow<A>, rows, rows, l_.P});
    double columns[kChunk];
    for (double& c : columns) c = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t at = i * kSquareRow<A>;
      A* const f = F_ + at;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t j = 0; j < round_up<std::int64_t>(i + 1, kPad<A>); ++j) {
        const A weighted = f[j] * decay_.d[j];
        const A pair = E_[at + j] * weighted;
        const double m = static_cast<double>(j < i ? pair : A(0));
        sum += m;
        columns[j] += m;
        f[j] = L_[at + j] * weighted;
      }
      balance_[i] = sum;
    }
    for (std::int64_t i = 0; i < rows; ++i) balance_[i] -= columns[i];
  }

  void step_gradients(std::int64_t index, std::int64_t batch, std::int64_t first, std::int64_t len,
                      std::int64_t head, const A* r, const A* xq, double through, double dD) {
    const A rate = decay_rate<A>(in_, head);
    A ddt[kChunk];
    double suffix = 0, prefix = 0, da[kChunk], dA = 0, dbias = 0;
    for (std::int64_t k = len; k-- > 0;) {
      suffix += balance_[k];
      da[k] = suffix + through;
    }
    for (std::int64_t k = 0; k < len; ++k) {
      da[k] += prefix;
      prefix += static_cast<double>(r[k]);
      dA += static_cast<double>(decay_.d[k]) * da[k];
      double grad = static_cast<double>(xq[k]) + static_cast<double>(rate) * da[k];
      if (in_.dt_softplus) grad *= static_cast<double>(sigmoid(decay_.raw[k]));
      ddt[k] = static_cast<A>(grad);
      dbias += grad;
    }
    scatter(ddt, p_.ddt, in_.dt_dtype, (batch * in_.tokens + first) * in_.heads + head, in_.heads,
            len);
    A* const s = sums(index, head);
    s[0] += static_cast<A>(dA);
    s[1] += static_cast<A>(dD);
    s[2] += static_cast<A>(dbias);
  }

  // Whether head h of the block is the first that adds to its group's tile, and whether it is the
  // last.
  static bool starts(std::int64_t h, std::int64_t ratio) { return h % ratio == 0; }
  bool ends(std::int64_t h, std::int64_t ratio) const {
    return h + 1 == block_ || (h + 1) % ratio == 0;
  }

  void flush(const A* tile, std::int64_t ld, std::int64_t dim, std::int64_t h, std::int64_t head,
             std::int64_t ratio, std::int64_t groups, std::int64_t batch, std::int64_t first,
             std::int64_t len, void* out, void* partial) {
    if (!ends(h, ratio)) return;
    const std::int64_t token = batch * in_.tokens + first;
    for (std::int64_t i = 0; i < len; ++i) {
      const A* const row = tile + i * ld;
      if (ratio <= block_) {
        store_row(row, static_cast<T*>(out) + ((token + i) * groups + head / ratio) * dim, dim);
      } else {
        A* const dst =
            static_cast<A*>(partial) + (head / block_ * in_.batch * in_.tokens + token + i) * dim;
        for (std::int64_t c = 0; c < dim; ++c) dst[c] = row[c];
      }
    }
  }

  // a . b over n elements.
  static A dot(const A* a, const A* b, std::int64_t n) {
    Vec<A> total{};
    std::int64_t c = 0;
    for (; c + kLanes<A> <= n; c += kLanes<A>) total += load(a + c) * load(b + c);
    A rest = 0;
    for (; c < n; ++c) rest += a[c] * b[c];
    return sum_lanes<A>(total) + rest;
  }
  double state_dot(const A* a, const A* b) const {
    double sum = 0;
    for (std::int64_t n = 0; n < l_.N; ++n)
      sum += static_cast<double>(dot(a + n * l_.ldp, b + n * l_.ldp, l_.P));
    return sum;
  }
  static void zero(A* p, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) p[i] = 0;
  }

  const SsdScanBackwardParams& p_;
  const SsdScanParams& in_;
  const Layout<A> l_;
  const std::int64_t block_, chunks_;
  Arena<A> arena_;
  Decay<A> decay_;
  double balance_[kChunk];
  A *x_, *w_, *y_, *dy_, *edy_, *q_, *dx_, *B_, *C_, *tmp_, *dB_, *dC_, *x_t_, *B_t_;
  A *scores_, *L_, *E_, *F_, *state_t_, *dstate_t_, *states_, *dstates_, *z_, *gate_, *weight_,
      *dweight_;
  std::int64_t x_head_, b_head_, c_head_;  // whose tiles are loaded
  bool new_x_;
};

// The gradient of a group from the partial gradients of its blocks of heads, in order.
template <typename T>
void add_partials(const void* partial, void* out, std::int64_t tokens, std::int64_t groups,
                  std::int64_t blocks, std::int64_t dim) {
  using A = Acc<T>;
  if (partial == nullptr) return;
  parallel_for(tokens, 64, [&](std::int64_t begin, std::int64_t end) {
    A* const row = new A[dim];
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t g = 0; g < groups; ++g) {
        for (std::int64_t c = 0; c < dim; ++c) row[c] = 0;
        for (std::int64_t b = g * blocks; b < (g + 1) * blocks; ++b) {
          const A* const src = static_cast<const A*>(partial) + (b * tokens + t) * dim;
#pragma omp simd
          for (std::int64_t c = 0; c < dim; ++c) row[c] += src[c];
        }
        store_row(row, static_cast<T*>(out) + (t * groups + g) * dim, dim);
      }
    delete[] row;
  });
}

template <typename T>
void backward(const SsdScanBackwardParams& p) {
  using A = Acc<T>;
  const SsdScanParams& in = p.in;
  const std::int64_t H = in.heads, P = in.head_dim;
  const std::int64_t block = ssd_scan_head_block(H, in.x_heads, in.b_heads, in.c_heads);
  std::int64_t longest = 0;
  for (std::int64_t i = 0; i < in.sequences; ++i) {
    const std::int64_t len = sequence(in, i).len;
    longest = len > longest ? len : longest;
  }
  const std::int64_t blocks = H / block, chunks = ceil_div(longest, kChunk);
  parallel_for(in.sequences * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    const FlushDenormals flush;
    BackwardWalk<T> walk(p, block, chunks);
    for (; begin < end; ++begin) walk.run(begin / blocks, begin % blocks * block);
  });
  const std::int64_t tokens = in.batch * in.tokens;
  add_partials<T>(p.dx_partial, p.dx, tokens, in.x_heads, blocks / in.x_heads, P);
  add_partials<T>(p.dB_partial, p.dB, tokens, in.b_heads, blocks / in.b_heads, in.state_dim);
  add_partials<T>(p.dC_partial, p.dC, tokens, in.c_heads, blocks / in.c_heads, in.state_dim);
  parallel_for(H, 8, [&](std::int64_t begin, std::int64_t end) {
    A* const total = new A[3 + P];
    for (std::int64_t h = begin; h < end; ++h) {
      for (std::int64_t i = 0; i < 3 + P; ++i) total[i] = 0;
      for (std::int64_t s = 0; s < in.sequences; ++s) {
        const A* const sums = static_cast<const A*>(p.sums) + (s * H + h) * (3 + P);
        for (std::int64_t i = 0; i < 3 + P; ++i) total[i] += sums[i];
      }
      static_cast<A*>(p.dA)[h] = total[0];
      scatter(total + 1, p.dD, in.d_dtype, h, 1, 1);
      scatter(total + 2, p.ddt_bias, in.dt_bias_dtype, h, 1, 1);
      scatter(total + 3, p.dnorm_weight, in.norm_weight_dtype, h * P, 1, P);
    }
    delete[] total;
  });
}

}  // namespace
}  // namespace zebra::ZEBRA_ISA
