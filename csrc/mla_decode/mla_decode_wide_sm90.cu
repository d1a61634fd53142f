// mla_decode on Hopper for many query rows, or latents wider than 256.
#include <cstring>

#include "common/sm90/tma.h"
#include "mla_decode/mla_decode_wide.cuh"
#include "mla_decode/mla_decode_wide_launch.h"

namespace zebra {
namespace {

Status encode(CUtensorMap* map, const MlaDecodeParams& p, std::int64_t first, std::int64_t columns,
              int box) {
  return sm90::encode_tensor_map(
      map, p.dtype == DType::kBFloat16, static_cast<const char*>(p.cache) + 2 * first,
      {{static_cast<std::uint64_t>(columns), 1, 64},
       {static_cast<std::uint64_t>(p.page), static_cast<std::uint64_t>(p.row_stride),
        static_cast<std::uint32_t>(box)},
       {static_cast<std::uint64_t>(p.pages), static_cast<std::uint64_t>(p.page_stride), 1}});
}

Status maps_of(const MlaDecodeParams& p, MlaWideMaps& maps) {
  std::memset(&maps, 0, sizeof(maps));
  maps.box = mla_wide_box(p.page);
  while (1 << maps.log_box < maps.box) ++maps.log_box;
  if (p.pages == 0) return {};
  const Status s = encode(&maps.latent, p, 0, p.R, maps.box);
  if (s.error != nullptr) return s;
  if (p.E > 0) return encode(&maps.rope, p, p.R, p.E, maps.box);
  maps.rope = maps.latent, maps.rope_column = 512;  // past its end: zeros
  return {};
}

template <typename T, int kRank>
Status launch(const MlaArgs& a, const MlaDecodeConfig& c, const MlaWideMaps& maps,
              cudaStream_t stream) {
  const auto kernel = mla_wide_kernel<T, MlaWideShape<kRank>>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c.smem_bytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  const dim3 grid(static_cast<unsigned>(c.ctas), c.groups * 16 > kMlaWideRows ? 2 : 1);
  kernel<<<grid, kMlaProducts + 128, c.smem_bytes, stream>>>(a, maps);
  const Status s = launch_status();
  return s.error != nullptr || c.units == 0 ? s : mla_launch_combine<T>(a, c, stream);
}

template <typename T>
Status launch(const MlaArgs& a, const MlaDecodeConfig& c, const MlaWideMaps& maps,
              cudaStream_t stream) {
  return c.rank == 128   ? launch<T, 128>(a, c, maps, stream)
         : c.rank == 256 ? launch<T, 256>(a, c, maps, stream)
                         : launch<T, 512>(a, c, maps, stream);
}

}  // namespace

Status mla_decode_wide(const MlaDecodeParams& p, void* workspace, cudaStream_t stream) {
  const MlaDecodeConfig c = mla_wide_config(p);
  MlaArgs a;
  std::memset(&a, 0, sizeof(a));
  Status s = mla_arguments(p, c, workspace, a);
  MlaWideMaps maps;
  if (a.scale == 0.f) a.scale = 1e-30f;  // times minus infinity must not be NaN
  if (s.error == nullptr) s = maps_of(p, maps);
  if (s.error != nullptr) return s;
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(a, c, maps, stream)
                                     : launch<__half>(a, c, maps, stream);
}

}  // namespace zebra
