// What surrounds the matrix products of mla_project, for every GPU from sm_80 on.
//
// Computes       forward: q's rope columns rotated in place, latent = [c | rotated k], and the
//                latent's row in the paged cache; backward: the same turned back, out of place.
// Grid           x: groups of tokens (TokenTile); a thread serves one vector of several tokens.
// Tiles          kPairs pairs: 16 bytes where every row allows it, else one pair.
// Shared memory  none; cos and sin are read through L1, once a (token, pair) from L2.
// Registers      at most 64, for 1024 threads an SM with 64 bytes each in flight.
// Bound          HBM.  Bytes of a token, 16 bit, 8B shape: forward 4 KB read and 4 KB written of q,
//                0.1-0.4 KB of the latent each way; backward 8.4 KB each way.
// Measured       H200, 2026-11-28, 8 x 2048 tokens, 8B / 3B / 1B: 49 / 34 / 32 us behind the
//                products, 2.4 to 3.4 TB/s.  benchmarks/bench_prefill.py --device cuda
#pragma once

#include "common/cuda/vec.cuh"
#include "mla_project/mla_project.h"

namespace zebra {

// Two adjacent elements, the unit of rotation: packed, so that a vector of them is four registers.
template <typename T>
struct PairType {
  using type = float2;
};
template <>
struct PairType<__half> {
  using type = __half2;
};
template <>
struct PairType<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <typename T>
using Pair = typename PairType<T>::type;

__device__ __forceinline__ float2 wide(float2 v) { return v; }
__device__ __forceinline__ float2 wide(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 wide(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ __forceinline__ void narrow(float2 v, float2& to) { to = v; }
__device__ __forceinline__ void narrow(float2 v, __half2& to) { to = __float22half2_rn(v); }
__device__ __forceinline__ void narrow(float2 v, __nv_bfloat162& to) {
  to = __float22bfloat162_rn(v);
}

// An assignment would be split into four where the vector was loaded from the same place.
__device__ __forceinline__ void store_words(void* dst, uint4 v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(dst)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  *static_cast<uint4*>(dst) = v;
#endif
}

// One vector of `count` elements; more than one pair means aligned 16-byte access, count being all.

template <typename T, int kPairs>
__device__ __forceinline__ void load_some(const T* src, int count, Pair<T> (&dst)[kPairs]) {
  if constexpr (kPairs > 1) {
    static_assert(sizeof(dst) == sizeof(uint4));
    const uint4 words = *reinterpret_cast<const uint4*>(src);
    memcpy(dst, &words, sizeof(words));
  } else {
    dst[0].x = src[0];
    dst[0].y = count > 1 ? src[1] : src[0];
  }
}
template <typename T, int kPairs>
__device__ __forceinline__ void store_some(T* dst, int count, const Pair<T> (&src)[kPairs]) {
  if constexpr (kPairs > 1) {
    static_assert(sizeof(src) == sizeof(uint4));
    uint4 words;
    memcpy(&words, src, sizeof(words));
    store_words(dst, words);
  } else {
    dst[0] = src[0].x;
    if (count > 1) dst[1] = src[0].y;
  }
}

// Rotates pairs from `first` on by the token's angles; `sign` -1 turns back.  A position outside
// the tables gives NaN: nothing reads values on the host.
template <typename P, int kPairs>
__device__ __forceinline__ void rotate(const RopeTable& rope, std::int64_t token, int first,
                                       float sign, P (&x)[kPairs]) {
  const std::int64_t position =
      rope.int64_positions
          ? static_cast<const std::int64_t*>(rope.positions)[token]
          : static_cast<std::int64_t>(static_cast<const std::int32_t*>(rope.positions)[token]);
  float c[kPairs], s[kPairs];
  if (position >= 0 && position < rope.max_positions) {
    const std::int64_t at = position * (rope.E / 2) + first;
    if constexpr (kPairs == 4) {
      load_vec(rope.cos + at, c);
      load_vec(rope.sin + at, s);
    } else {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) c[i] = rope.cos[at + i], s[i] = rope.sin[at + i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) c[i] = __int_as_float(0x7fc00000), s[i] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float2 v = wide(x[i]);
    const float turn = sign * s[i];
    narrow(make_float2(v.x * c[i] - v.y * turn, v.x * turn + v.y * c[i]), x[i]);
  }
}

// Vectors of a token: first those of q, then of c, then of k.
struct ProjectVecs {
  int q, c, k;   // how many
  int per_head;  // vectors of one head of q that are touched
};

template <typename T, int kPairs, int kSteps>
__global__ void __launch_bounds__(256, 4)
    mla_project_kernel(const MlaProjectParams p, const ProjectVecs n) {
  constexpr int kVec = 2 * kPairs;
  const std::int64_t depth = p.R + p.rope.E;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.y * kSteps) + threadIdx.y;
  for (int v = threadIdx.x; v < n.q + n.c + n.k; v += blockDim.x) {
    if (v < n.q) {
      const int head = v / n.per_head, at = (v % n.per_head) * kVec;
      T* const q = static_cast<T*>(p.q) + (head + 1) * p.q_dim - p.rope.E + at;
      const std::int64_t row = p.H * p.q_dim;
      Pair<T> x[kSteps][kPairs];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const std::int64_t token = first + i * static_cast<std::int64_t>(blockDim.y);
        if (token < p.tokens) load_some<T>(q + token * row, kVec, x[i]);
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const std::int64_t token = first + i * static_cast<std::int64_t>(blockDim.y);
        if (token < p.tokens) {
          rotate(p.rope, token, at / 2, 1.f, x[i]);
          store_some<T>(q + token * row, kVec, x[i]);
        }
      }
      continue;
    }
    const bool is_k = v >= n.q + n.c;
    const int column = (v - n.q - (is_k ? n.c : 0)) * kVec;
    const int count = is_k || p.R - column > kVec ? kVec : static_cast<int>(p.R - column);
    const T* const src =
        is_k ? static_cast<const T*>(p.k) + column : static_cast<const T*>(p.c) + column;
    const std::int64_t stride = is_k ? p.k_stride : p.c_stride;
    const std::int64_t to = is_k ? p.R + column : column;
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const std::int64_t token = first + i * static_cast<std::int64_t>(blockDim.y);
      if (token >= p.tokens) break;
      Pair<T> x[kPairs];
      load_some<T>(src + token * stride, count, x);
      if (is_k) rotate(p.rope, token, column / 2, 1.f, x);
      // c may lie in the latent already
      if (is_k || p.c != p.latent)
        store_some<T>(static_cast<T*>(p.latent) + token * depth + to, count, x);
      if (p.cache == nullptr) continue;
      const std::int64_t slot = p.slot_mapping[token];
      if (slot < 0 || slot >= p.pages * p.page) continue;
      T* const row =
          static_cast<T*>(p.cache) + slot / p.page * p.page_stride + slot % p.page * p.row_stride;
      store_some<T>(row + to, count, x);
    }
  }
}

template <typename T, int kPairs, int kSteps>
__global__ void __launch_bounds__(256, 4)
    mla_project_backward_kernel(const MlaProjectBackwardParams p, const ProjectVecs n) {
  constexpr int kVec = 2 * kPairs;
  const std::int64_t nope = p.q_dim - p.rope.E;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.y * kSteps) + threadIdx.y;
  for (int v = threadIdx.x; v < n.q + n.c + n.k; v += blockDim.x) {
    const bool is_q = v < n.q, is_k = v >= n.q + n.c;
    // Where the vector begins in a row of the source and of the result, and which pair it turns.
    std::int64_t from, to, stride, row;
    int pair = -1, count = kVec;
    const T* src;
    T* dst;
    if (is_q) {
      const int head = v / n.per_head, part = v % n.per_head;
      const int straight = n.per_head - static_cast<int>(p.rope.E / kVec);  // vectors of nope
      std::int64_t column = static_cast<std::int64_t>(part) * kVec;
      if (part >= straight) {
        column = nope + static_cast<std::int64_t>(part - straight) * kVec;
        pair = (part - straight) * (kVec / 2);
      } else if (nope - column < kVec) {
        count = static_cast<int>(nope - column);
      }
      src = static_cast<const T*>(p.dq), dst = static_cast<T*>(p.dq_raw);
      from = to = head * p.q_dim + column;
      stride = p.H * p.q_dim, row = p.dq_raw_stride;
    } else {
      const int column = (v - n.q - (is_k ? n.c : 0)) * kVec;
      if (is_k)
        pair = column / 2;
      else if (p.R - column < kVec)
        count = static_cast<int>(p.R - column);
      src = static_cast<const T*>(is_k ? p.dk : p.dc), dst = static_cast<T*>(p.dkv_raw);
      from = column, to = is_k ? p.R + column : column;
      stride = is_k ? p.dk_stride : p.dc_stride, row = p.dkv_raw_stride;
    }
    Pair<T> x[kSteps][kPairs];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const std::int64_t token = first + i * static_cast<std::int64_t>(blockDim.y);
      if (token < p.tokens) load_some<T>(src + token * stride + from, count, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const std::int64_t token = first + i * static_cast<std::int64_t>(blockDim.y);
      if (token < p.tokens) {
        if (pair >= 0) rotate(p.rope, token, pair, -1.f, x[i]);
        store_some<T>(dst + token * row + to, count, x[i]);
      }
    }
  }
}

}  // namespace zebra
