// mla_decode on GPUs from sm_80 on: cp.async brings the cache, whatever its pages.
#include <cstring>

#include "mla_decode/mla_decode_launch.cuh"

namespace zebra {
namespace {

bool takes_tma(const MlaDecodeParams& p) {
  return takes_sm90() && mla_decode_tma_takes(p.R, p.E, p.page);
}

}  // namespace

std::int64_t mla_decode_cuda_workspace(const MlaDecodeParams& p) {
  const std::int64_t bytes = mla_config(p, takes_tma(p)).workspace_bytes;
  return p.weight == nullptr
             ? bytes
             : round_up<std::int64_t>(bytes, 256) + mla_weight_config(p).workspace_bytes;
}

Status mla_decode_cuda(const MlaDecodeParams& p, void* workspace, cudaStream_t stream) {
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
