// mla_attention: launchers of the assembly kernels (mla_attention_assembly.cuh).
#include "common/cuda/launch.h"
#include "common/token_tile.h"
#include "mla_attention/mla_attention_assembly.cuh"

namespace zebra {
namespace {

constexpr std::int64_t kVec = 8;  // 16-bit elements of 16 bytes
constexpr int kSteps = select_token_tile(1).steps;

// The CTAs of B rows of S tokens.  Batch rows beyond the y limit of a grid are walked.
struct Launch {
  dim3 grid, block;
};

Launch cover(std::int64_t B, std::int64_t S, std::int64_t vecs) {
  constexpr std::int64_t kMaxGridY = 65535;
  const TokenTile tile = select_token_tile(vecs);
  return {dim3(static_cast<unsigned>(ceil_div(S, tile.tokens())),
               static_cast<unsigned>(B < kMaxGridY ? B : kMaxGridY)),
          dim3(tile.x, tile.y)};
}

// Whether batch rows follow each other at the distance of tokens: then they are one row.
bool merges(const std::int64_t* stride, std::int64_t S) { return stride[0] == S * stride[1]; }

}  // namespace

Status mla_attention_keys_cuda(const MlaKeysParams& p, CUstream_st* stream) {
  if (p.B * p.S == 0 || p.nope + p.E == 0) return {};
  KeysVecs v{static_cast<const Vec16*>(p.kv),
             static_cast<const Vec16*>(p.k_rope),
             static_cast<Vec16*>(p.key),
             p.B,
             p.S,
             static_cast<int>(p.G),
             static_cast<int>(p.nope / kVec),
             static_cast<int>(p.E / kVec),
             {},
             {}};
  for (int d = 0; d < 3; ++d) v.kv_stride[d] = p.kv_stride[d] / kVec;
  for (int d = 0; d < 2; ++d) v.rope_stride[d] = p.rope_stride[d] / kVec;
  if (merges(p.kv_stride, p.S) && merges(p.rope_stride, p.S)) v.S *= v.B, v.B = 1;
  const Launch launch = cover(v.B, v.S, v.G * (v.nope + v.rope));
  mla_attention_keys_kernel<kSteps><<<launch.grid, launch.block, 0, stream>>>(v);
  return launch_status();
}

Status mla_attention_key_gradients_cuda(const MlaKeyGradientsParams& p, CUstream_st* stream) {
  if (p.B * p.S == 0) return {};
  KeyGradientVecs v{static_cast<const Vec16*>(p.dkey),
                    static_cast<const Vec16*>(p.dvalue),
                    static_cast<Vec16*>(p.dkv),
                    static_cast<Vec16*>(p.dk_rope),
                    p.B,
                    p.S,
                    static_cast<int>(p.G),
                    static_cast<int>(p.nope / kVec),
                    static_cast<int>(p.E / kVec),
                    static_cast<int>(p.v_dim / kVec),
                    {},
                    {}};
  for (int d = 0; d < 3; ++d) {
    v.key_stride[d] = p.key_stride[d] / kVec;
    v.value_stride[d] = p.value_stride[d] / kVec;
  }
  if (merges(p.key_stride, p.S) && merges(p.value_stride, p.S)) v.S *= v.B, v.B = 1;
  const Launch launch = cover(v.B, v.S, v.G * (v.nope + v.value) + v.rope);
  if (p.dtype == DType::kBFloat16)
    mla_attention_key_gradients_kernel<__nv_bfloat16, kSteps>
        <<<launch.grid, launch.block, 0, stream>>>(v);
  else
    mla_attention_key_gradients_kernel<__half, kSteps><<<launch.grid, launch.block, 0, stream>>>(v);
  return launch_status();
}

}  // namespace zebra
