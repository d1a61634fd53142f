// Forward pass: a task walks a sequence with a few heads, chunk by chunk, states in fp32 (fp64).
#pragma once

#include "common/cpu/parallel.h"
#include "ssd_scan/ssd_scan_chunk.h"

namespace zebra::ZEBRA_ISA {
namespace {

constexpr std::int64_t kForwardHeads = 8;  // walked together: they share the tiles of x, B, C and S

template <typename T>
class ForwardWalk {
  using A = Acc<T>;

 public:
  explicit ForwardWalk(const SsdScanParams& p)
      : p_(p),
        l_(p),
        arena_(3 * l_.token_p() + 2 * l_.token_n() + l_.N_pad * kSquareRow<A> + 2 * kSquare<A> +
               kForwardHeads * l_.state() + 2 * l_.P_pad) {
    x_ = arena_.take(l_.token_p());
    w_ = arena_.take(l_.token_p());
    y_ = arena_.take(l_.token_p());
    B_ = arena_.take(l_.token_n());
    C_ = arena_.take(l_.token_n());
    B_t_ = arena_.take(l_.N_pad * kSquareRow<A>);
    scores_ = arena_.take(kSquare<A>);
    E_ = arena_.take(kSquare<A>);
    states_ = arena_.take(kForwardHeads * l_.state());
    z_ = arena_.take(l_.P_pad);
    weight_ = arena_.take(l_.P_pad);
  }

  // Heads head .. head + count of sequence `index`.
  void run(std::int64_t index, std::int64_t head, std::int64_t count) {
    const Sequence seq = sequence(p_, index);
    const std::int64_t state_size = l_.P * l_.N;
    const std::int64_t at = (index * p_.heads + head) * state_size;
    bool live = p_.initial_state != nullptr;  // false: the states are zero and not stored
    for (std::int64_t h = 0; live && h < count; ++h)
      load_state(l_, static_cast<const A*>(p_.initial_state) + at + h * state_size,
                 states_ + h * l_.state());
    for (std::int64_t c = 0; c < seq.len; c += kChunk) {
      const std::int64_t len = seq.len - c < kChunk ? seq.len - c : kChunk;
      x_head_ = b_head_ = c_head_ = -1;
      for (std::int64_t h = 0; h < count; ++h) {
        next_c_head_ = h + 1 < count ? c_group(head + h + 1) : -1;
        chunk(seq.batch, seq.first + c, len, head + h, states_ + h * l_.state(), live);
      }
      live = true;
    }
    for (std::int64_t h = 0; h < count; ++h)
      store_state(l_, live ? states_ + h * l_.state() : nullptr,
                  static_cast<A*>(p_.final_state) + at + h * state_size);
  }

 private:
  void chunk(std::int64_t batch, std::int64_t first, std::int64_t len, std::int64_t head, A* state,
             bool live) {
    const std::int64_t rows = round_up<std::int64_t>(len, kRows);
    load_groups(batch, first, len, head, rows);
    decay_.compute(p_, batch, first, len, head);
    for (std::int64_t i = 0; i < rows; ++i) {
      if (i < len) prefetch(batch, first + i, head);
      const std::int64_t at = i * kSquareRow<A>;
      for (std::int64_t j = 0; j <= i; j += kLanes<A>)
        store(E_ + at + j, decays(decay_, i, j) * load(scores_ + at + j));
    }
    scale_rows(decay_.d, x_, w_, l_.ldp, rows, l_.P_pad);
    output_tile(l_, E_, w_, C_, live ? state : nullptr, decay_, rows, y_);
    scale_rows(decay_.to_end, w_, w_, l_.ldp, rows, l_.P_pad);
    state_update(l_, B_, w_, live ? state : nullptr, decay_, len, state);
    epilogue(batch, first, len, head);
  }

  std::int64_t c_group(std::int64_t head) const { return head / (p_.heads / p_.c_heads); }

  void prefetch(std::int64_t batch, std::int64_t token, std::int64_t head) const {
    if (p_.z != nullptr) prefetch_row<T>(p_.z, p_.z_stride, batch, token, head, l_.P);
    if (next_c_head_ >= 0 && next_c_head_ != c_head_)
      prefetch_row<T>(p_.C, p_.c_stride, batch, token, next_c_head_, l_.N);
  }

  void load_groups(std::int64_t batch, std::int64_t first, std::int64_t len, std::int64_t head,
                   std::int64_t rows) {
    const std::int64_t xh = head / (p_.heads / p_.x_heads), bh = head / (p_.heads / p_.b_heads),
                       ch = c_group(head);
    if (xh != x_head_) load_tile<T>(p_.x, p_.x_stride, batch, first, len, xh, l_.P, x_, l_.ldp);
    if (bh != b_head_) {
      load_tile<T>(p_.B, p_.b_stride, batch, first, len, bh, l_.N, B_, l_.ldn);
      transpose(B_, l_.ldn, B_t_, kSquareRow<A>, rows, l_.N);
    }
    if (ch != c_head_) load_tile<T>(p_.C, p_.c_stride, batch, first, len, ch, l_.N, C_, l_.ldn);
    if (bh != b_head_ || ch != c_head_) score_tile(l_, C_, B_t_, rows, scores_);
    x_head_ = xh, b_head_ = bh, c_head_ = ch;
  }

  // y + D x, the gate, the norm over the head, one rounding.
  void epilogue(std::int64_t batch, std::int64_t first, std::int64_t len, std::int64_t head) {
    constexpr int L = kLanes<A>;
    const std::int64_t P = l_.P;
    const A skip = element<A>(p_.D, p_.d_dtype, head);
    if (p_.norm_weight != nullptr)
      gather(p_.norm_weight, p_.norm_weight_dtype, head * P, 1, P, weight_);
    for (std::int64_t i = 0; i < len; ++i) {
      A* const y = y_ + i * l_.ldp;
      const A* const x = x_ + i * l_.ldp;
      const A* const z = z_;
      if (p_.z != nullptr)
        load_row(static_cast<const T*>(p_.z) + batch * p_.z_stride.batch +
                     (first + i) * p_.z_stride.token + head * p_.z_stride.head,
                 z_, P);
      for (std::int64_t c = P; c < l_.P_pad; ++c) y[c] = 0;
      Vec<A> square{};
      for (std::int64_t c = 0; c < P; c += L) {
        Vec<A> u = load(y + c);
        if (p_.D != nullptr) u += skip * load(x + c);
        if (p_.z != nullptr) u *= load(z + c) * sigmoid_of<A>(load(z + c));
        square += u * u;
        store(y + c, u);
      }
      if (p_.norm_weight != nullptr) {
        const A mean = sum_lanes<A>(square) / static_cast<A>(P);
        const A rstd = A(1) / std::sqrt(mean + static_cast<A>(p_.norm_eps));
        for (std::int64_t c = 0; c < P; c += L)
          store(y + c, load(y + c) * load(weight_ + c) * rstd);
      }
      store_row(y, static_cast<T*>(p_.y) + ((batch * p_.tokens + first + i) * p_.heads + head) * P,
                P);
    }
  }

  const SsdScanParams& p_;
  const Layout<A> l_;
  Arena<A> arena_;
  Decay<A> decay_;
  A *x_, *w_, *y_, *B_, *C_, *B_t_, *scores_, *E_, *states_, *z_, *weight_;
  std::int64_t x_head_, b_head_, c_head_;  // whose tiles are loaded
  std::int64_t next_c_head_;               // whose rows of C come next, or -1
};

template <typename T>
void forward(const SsdScanParams& p) {
  parallel_for(p.sequences * p.heads, 1, [&](std::int64_t begin, std::int64_t end) {
    const FlushDenormals flush;
    ForwardWalk<T> walk(p);
    while (begin < end) {
      const std::int64_t index = begin / p.heads, head = begin % p.heads;
      std::int64_t count = end - begin < kForwardHeads ? end - begin : kForwardHeads;
      count = count < p.heads - head ? count : p.heads - head;
      walk.run(index, head, count);
      begin += count;
    }
  });
}

}  // namespace
}  // namespace zebra::ZEBRA_ISA
