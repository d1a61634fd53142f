// mla_decode's kernel for many rows, on the CPU: barriers, TMA and wgmma as sm90_on_host.h has
// them.
#include "sm90_on_host.h"
// The device's code.
#include "mla_decode/mla_decode_wide.cuh"
// What runs it.
#include "mla_decode_problem.h"

namespace {

template <typename T, int kRank>
struct Wide {
  using Maps = zebra::MlaWideMaps;
  static constexpr int kThreads = zebra::kMlaProducts + 128;
  static constexpr bool kTma = true;
  static constexpr int kRehearsing = 1;  // CTAs without work

  static MlaDecodeConfig configure(const zebra::MlaDecodeShape& shape, int sms) {
    return zebra::select_mla_wide_config(shape, sms);
  }
  static int ctas_of_rows(const MlaDecodeConfig& config) {
    return config.groups * 16 > zebra::kMlaWideRows ? 2 : 1;
  }
  static Maps map(CUtensorMap rows, int R, int E) {
    Maps maps;
    maps.box = zebra::mla_wide_box(static_cast<int>(rows.sizes[1]));
    maps.log_box = maps.rope_column = 0;
    while (1 << maps.log_box < maps.box) ++maps.log_box;
    rows.box[0] = 64, rows.box[1] = maps.box, rows.box[2] = 1;
    maps.latent = maps.rope = rows;
    maps.latent.sizes[0] = R;
    maps.rope.base += R, maps.rope.sizes[0] = E;
    if (E == 0) maps.rope = maps.latent, maps.rope_column = 512;
    return maps;
  }
  static void run(const MlaArgs& a, const Maps& maps) {
    zebra::mla_wide_kernel<T, zebra::MlaWideShape<kRank>>(a, maps);
  }
};

}  // namespace

int main() {
  using B = __nv_bfloat16;
  Problem<B, Wide<B, 512>>({{200, 0, 1, 70}, 1, 16, 512, 64, 64, 2}).check();
  Problem<B, Wide<B, 512>>({{130, 70}, 2, 40, 512, 64, 16, 4, 0, true}).check();
  Problem<B, Wide<B, 512>>({{260}, 1, 70, 448, 32, 32, 2, 128, true, true}).check();
  Problem<__half, Wide<__half, 256>>({{130, 65, 7}, 2, 32, 160, 64, 64, 2, 0, true, true}).check();
  Problem<B, Wide<B, 128>>({{100, 129, 64}, 3, 12, 128, 32, 128, 2}).check();
  std::printf("mla_decode, wide: %d checked, %d failures\n", checked, failures);
  return failures == 0 ? 0 : 1;
}
