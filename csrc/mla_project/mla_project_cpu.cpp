// mla_project on the CPU: one task a token.
#include "common/cpu/parallel.h"
#include "common/cpu/vec.h"
#include "common/math.h"
#include "mla_project/mla_project.h"

namespace zebra::ZEBRA_ISA {
namespace {

constexpr std::int64_t kGrainElements = 16384;

// dst = R src (or R^T src) of one token's E elements; src may be dst.
template <typename T>
void rotate(const RopeTable& rope, std::int64_t token, bool transposed, const T* src, T* dst) {
  using A = Acc<T>;
  const std::int64_t half = rope.E / 2, row = rope.position(token) * half;
  const float* const cos = rope.cos + row;
  const float* const sin = rope.sin + row;
  const A sign = transposed ? A(-1) : A(1);
  for (std::int64_t i = 0; i < half; ++i) {
    const A c = static_cast<A>(cos[i]), s = sign * static_cast<A>(sin[i]);
    const A even = to_acc(src[2 * i]), odd = to_acc(src[2 * i + 1]);
    dst[2 * i] = from_acc<T>(even * c - odd * s);
    dst[2 * i + 1] = from_acc<T>(even * s + odd * c);
  }
}

template <typename T>
void forward(const MlaProjectParams& p) {
  const std::int64_t E = p.rope.E, depth = p.R + E;
  const std::int64_t grain = ceil_div(kGrainElements, p.H * E + depth);
  parallel_for(p.tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t h = 0; h < p.H; ++h) {
        T* const tail = static_cast<T*>(p.q) + (t * p.H + h + 1) * p.q_dim - E;
        rotate(p.rope, t, false, tail, tail);
      }
      T* const latent = static_cast<T*>(p.latent) + t * depth;
      std::memcpy(latent, static_cast<const T*>(p.c) + t * p.c_stride, p.R * sizeof(T));
      rotate(p.rope, t, false, static_cast<const T*>(p.k) + t * p.k_stride, latent + p.R);
    }
  });
  if (p.cache == nullptr) return;
  // In the order of the tokens: of two with the same slot the later one stays.
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    const std::int64_t slot = p.slot_mapping[t];
    if (slot < 0) continue;
    T* const row =
        static_cast<T*>(p.cache) + slot / p.page * p.page_stride + slot % p.page * p.row_stride;
    std::memcpy(row, static_cast<const T*>(p.latent) + t * depth, depth * sizeof(T));
  }
}

template <typename T>
void backward(const MlaProjectBackwardParams& p) {
  const std::int64_t E = p.rope.E, depth = p.R + E, nope = p.q_dim - E;
  const std::int64_t grain = ceil_div(kGrainElements, p.H * p.q_dim + depth);
  parallel_for(p.tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t h = 0; h < p.H; ++h) {
        const T* const dq = static_cast<const T*>(p.dq) + (t * p.H + h) * p.q_dim;
        T* const raw = static_cast<T*>(p.dq_raw) + t * p.dq_raw_stride + h * p.q_dim;
        std::memcpy(raw, dq, nope * sizeof(T));
        rotate(p.rope, t, true, dq + nope, raw + nope);
      }
      T* const raw = static_cast<T*>(p.dkv_raw) + t * p.dkv_raw_stride;
      std::memcpy(raw, static_cast<const T*>(p.dc) + t * p.dc_stride, p.R * sizeof(T));
      rotate(p.rope, t, true, static_cast<const T*>(p.dk) + t * p.dk_stride, raw + p.R);
    }
  });
}

}  // namespace

void mla_project(const MlaProjectParams& p) { ZEBRA_DISPATCH_CPU(p.dtype, forward, p); }

void mla_project_backward(const MlaProjectBackwardParams& p) {
  ZEBRA_DISPATCH_CPU(p.dtype, backward, p);
}

}  // namespace zebra::ZEBRA_ISA
