// mla_decode on GPUs from sm_80 on: cp.async brings the cache, whatever its pages.
#include <cstring>

#include "mla_decode/mla_decode_launch.cuh"
#include "mla_decode/mla_decode_wide_launch.h"

namespace zebra {
namespace {

bool takes_tma(const MlaDecodeParams& p) {
  return takes_sm90() && mla_decode_tma_takes(p.R, p.E, p.page);
}
bool takes_wide(const MlaDecodeParams& p) {
  return takes_sm90() && mla_wide_takes(p.R, p.E, p.page) && mla_wide_is_better(p.T * p.H, p.R);
}

}  // namespace

bool mla_decode_cuda_takes(const MlaDecodeParams& p) {
  return (mla_decode_takes(p.R, p.E) || takes_wide(p)) &&
         (p.weight == nullptr || mla_weight_takes(p.nope, p.v_dim, p.R));
}

std::int64_t mla_decode_cuda_workspace(const MlaDecodeParams& p) {
  const std::int64_t bytes =
      (takes_wide(p) ? mla_wide_config(p) : mla_config(p, takes_tma(p))).workspace_bytes;
  return p.weight == nullptr
             ? bytes
             : round_up<std::int64_t>(bytes, 256) + mla_weight_config(p).workspace_bytes;
}

Status mla_decode_cuda(const MlaDecodeParams& p, void* workspace, cudaStream_t stream) {
  if (takes_wide(p)) return mla_decode_wide(p, workspace, stream);
  return takes_tma(p) ? mla_decode_sm90(p, workspace, stream)
                      : mla_decode_portable(p, workspace, stream);
}

Status mla_decode_portable(const MlaDecodeParams& p, void* workspace, cudaStream_t stream) {
  const MlaDecodeConfig c = mla_config(p, false);
  MlaArgs a;
  std::memset(&a, 0, sizeof(a));
  const Status s = mla_arguments(p, c, workspace, a);
  if (s.error != nullptr) return s;
  MlaMaps maps;
  std::memset(&maps, 0, sizeof(maps));
  return mla_launch<false>(p, a, c, maps, stream);
}

}  // namespace zebra
