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
       {static_cast<std::uint64_t>(p.pages), static_cast<std::uint64_t>(p.page_stride), 1}},
      CU_TENSOR_MAP_SWIZZLE_128B,
      // Up to 256 a block's tiles are waited for one by one, not memory.
      p.R > 256 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
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

template <typename T>
Status launch(const MlaDecodeParams& p, const MlaArgs& a, const MlaDecodeConfig& c,
              const MlaWideMaps& maps, cudaStream_t stream) {
  const auto kernel = c.rank == 128   ? mla_wide_kernel<T, MlaWideShape<128>>
                      : c.rank == 256 ? mla_wide_kernel<T, MlaWideShape<256>>
                                      : mla_wide_kernel<T, MlaWideShape<512>>;
  const dim3 grid(static_cast<unsigned>(c.ctas + c.rehearses),
                  c.groups * 16 > kMlaWideRows ? 2 : 1);
  return mla_launch_attention<T>(kernel, grid, kMlaProducts + 128, p, a, c, maps, stream);
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
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(p, a, c, maps, stream)
                                     : launch<__half>(p, a, c, maps, stream);
}

}  // namespace zebra
