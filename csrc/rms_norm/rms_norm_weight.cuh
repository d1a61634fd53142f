// What rms_norm's kernels share.
#pragma once

#include "common/cuda/vec.cuh"

namespace zebra {

constexpr int kRmsNormMaxWarps = 16;  // of a CTA

// N weights from column `at`, stored as T or as fp32.
template <typename T, int N>
__device__ __forceinline__ void rms_norm_weight(const void* w, bool is_float, std::int64_t at,
                                                float (&dst)[N]) {
  if (is_float) {
    constexpr int kVec = N < 4 ? N : 4;
#pragma unroll
    for (int i = 0; i < N; i += kVec) {
      const Vec<float, kVec> v =
          *reinterpret_cast<const Vec<float, kVec>*>(static_cast<const float*>(w) + at + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) dst[i + k] = v.v[k];
    }
  } else {
    load_vec(static_cast<const T*>(w) + at, dst);
  }
}

}  // namespace zebra
