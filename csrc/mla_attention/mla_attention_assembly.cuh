// The passes around the attention of a library, for every GPU from sm_80 on.
//
// Computes       key[b, s, g] = [kv[b, s, g, :nope] | k_rope[b, s]], and from its gradients
//                dkv = [dkey nope | dvalue] and dk_rope = the sum of dkey's rope part over g.
//                A value is a view of kv: it is never copied.
// Grid           x: groups of tokens, y: batch rows (TokenTile); a thread moves one 16-byte vector
//                of several tokens.
// Shared memory  none.
// Bound          HBM.  Bytes of a token, 16 bit, 3B and 8B shapes: keys 1 KB + 128 B read and 2 KB
//                written; gradients 4 KB read, 3 KB + 128 B written.
// Measured       H200, 2026-11-28, 8 x 2048 tokens, forward + backward: 82 us (8B), 48 us (1B), 1
//                and 2 % of the module.  benchmarks/bench_prefill.py --device cuda
#pragma once

#include "common/cuda/vec.cuh"
#include "mla_attention/mla_attention.h"

namespace zebra {

using Vec16 = Vec<std::uint32_t, 4>;

// Strides and widths below are counted in 16-byte vectors.
struct KeysVecs {
  const Vec16 *kv, *k_rope;
  Vec16* key;  // [B, S, G, nope + rope] contiguous
  std::int64_t B, S;
  int G, nope, rope;
  std::int64_t kv_stride[3], rope_stride[2];
};

template <int kSteps>
__global__ void mla_attention_keys_kernel(const KeysVecs p) {
  const int width = p.nope + p.rope, vecs = p.G * width;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.y * kSteps) + threadIdx.y;
  for (std::int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    for (int v = threadIdx.x; v < vecs; v += blockDim.x) {
      const int g = v / width, column = v % width;
      const bool rope = column >= p.nope;
      const Vec16* const src = rope ? p.k_rope + b * p.rope_stride[0] + (column - p.nope)
                                    : p.kv + b * p.kv_stride[0] + g * p.kv_stride[2] + column;
      const std::int64_t stride = rope ? p.rope_stride[1] : p.kv_stride[1];
      Vec16* const dst = p.key + b * p.S * vecs + v;
      Vec16 held[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const std::int64_t s = first + i * static_cast<std::int64_t>(blockDim.y);
        if (s < p.S) held[i] = src[s * stride];
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const std::int64_t s = first + i * static_cast<std::int64_t>(blockDim.y);
        if (s < p.S) dst[s * vecs] = held[i];
      }
    }
  }
}

struct KeyGradientVecs {
  const Vec16 *dkey, *dvalue;
  Vec16* dkv;      // [B, S, G, nope + value] contiguous
  Vec16* dk_rope;  // [B, S, rope] contiguous
  std::int64_t B, S;
  int G, nope, rope, value;
  std::int64_t key_stride[3], value_stride[3];
};

template <typename T, int kSteps>
__global__ void mla_attention_key_gradients_kernel(const KeyGradientVecs p) {
  constexpr int kVec = 16 / sizeof(T);
  const int width = p.nope + p.value, copies = p.G * width;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.y * kSteps) + threadIdx.y;
  for (std::int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    for (int v = threadIdx.x; v < copies + p.rope; v += blockDim.x) {
      if (v < copies) {
        const int g = v / width, column = v % width;
        const bool value = column >= p.nope;
        const Vec16* const src =
            value ? p.dvalue + b * p.value_stride[0] + g * p.value_stride[2] + (column - p.nope)
                  : p.dkey + b * p.key_stride[0] + g * p.key_stride[2] + column;
        const std::int64_t stride = value ? p.value_stride[1] : p.key_stride[1];
        Vec16* const dst = p.dkv + b * p.S * copies + v;
        Vec16 held[kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const std::int64_t s = first + i * static_cast<std::int64_t>(blockDim.y);
          if (s < p.S) held[i] = src[s * stride];
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const std::int64_t s = first + i * static_cast<std::int64_t>(blockDim.y);
          if (s < p.S) dst[s * copies] = held[i];
        }
        continue;
      }
      const int column = v - copies;
      const Vec16* const src = p.dkey + b * p.key_stride[0] + p.nope + column;
      Vec16* const dst = p.dk_rope + b * p.S * p.rope + column;
      for (int i = 0; i < kSteps; ++i) {
        const std::int64_t s = first + i * static_cast<std::int64_t>(blockDim.y);
        if (s >= p.S) break;
        float sum[kVec] = {};
#pragma unroll 8
        for (int g = 0; g < p.G; ++g) {  // in order: the sum does not depend on the launch
          float part[kVec];
          load_vec(reinterpret_cast<const T*>(src + s * p.key_stride[1] + g * p.key_stride[2]),
                   part);
#pragma unroll
          for (int k = 0; k < kVec; ++k) sum[k] += part[k];
        }
        store_vec(reinterpret_cast<T*>(dst + s * p.rope), sum);
      }
    }
  }
}

}  // namespace zebra
