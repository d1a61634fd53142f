// mla_decode on Hopper: TMA brings the cache, where pages are whole stages of 64 tokens.
#include <cstring>

#include "common/sm90/tma.h"
#include "mla_decode/mla_decode_launch.cuh"

namespace zebra {
namespace {

Status encode(CUtensorMap* map, const MlaDecodeParams& p, std::uint32_t columns) {
  const std::uint64_t width = static_cast<std::uint64_t>(p.R + p.E);
  return sm90::encode_tensor_map(
      map, p.dtype == DType::kBFloat16, p.cache,
      {{width, 1, columns},
       {static_cast<std::uint64_t>(p.page), static_cast<std::uint64_t>(p.row_stride), kMlaTmaStage},
       {static_cast<std::uint64_t>(p.pages), static_cast<std::uint64_t>(p.page_stride), 1}},
      columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace

Status mla_decode_sm90(const MlaDecodeParams& p, void* workspace, cudaStream_t stream) {
  const MlaDecodeConfig c = mla_config(p, true);
  MlaArgs a;
  std::memset(&a, 0, sizeof(a));
  Status s = mla_arguments(p, c, workspace, a);
  MlaMaps maps;
  std::memset(&maps, 0, sizeof(maps));
  if (s.error == nullptr && p.pages > 0) s = encode(&maps.tile, p, 64);
  if (s.error == nullptr && p.pages > 0 && (p.R + p.E) % 64 != 0) s = encode(&maps.half, p, 32);
  return s.error != nullptr ? s : mla_launch<true>(p, a, c, maps, stream);
}

}  // namespace zebra
