// mla_decode's kernels for few rows, on the CPU: barriers, TMA, cp.async and mma.sync as
// sm90_on_host.h has them.
#include "sm90_on_host.h"
// The device's code.
#include "mla_decode/mla_decode_kernel.cuh"
#include "mla_decode/mla_decode_tma.cuh"
// What runs it.
#include "mla_decode_problem.h"

namespace {

template <typename T, int kRank, int kRope, bool kTma_>
struct Rows {
  using Maps = zebra::MlaMaps;
  static constexpr bool kTma = kTma_;
  static constexpr int kThreads = kTma ? zebra::kMlaTmaThreads : 32 * zebra::kMlaWarps;

  static MlaDecodeConfig configure(const zebra::MlaDecodeShape& shape, int sms) {
    const MlaDecodeConfig config =
        zebra::select_mla_decode_config(shape, sms, zebra::kMlaSm90SmemBytes);
    if (config.rank != kRank || config.rope != kRope) zebra::stuck("another instance", kRank);
    return config;
  }
  static constexpr int kRehearsing = 0;
  static int ctas_of_rows(const MlaDecodeConfig&) { return 1; }
  static Maps map(CUtensorMap rows, int, int) {
    Maps maps;
    rows.box[0] = 64, rows.box[1] = zebra::kMlaTmaStage, rows.box[2] = 1;
    maps.tile = maps.half = rows;
    maps.half.box[0] = 32;
    return maps;
  }
  static void run(const MlaArgs& a, const Maps& maps) {
    if constexpr (kTma)
      zebra::mla_decode_tma_kernel<T, kRank, kRope>(a, maps);
    else
      zebra::mla_decode_kernel<T, kRank, kRope>(a, maps);
  }
};

template <typename T, int kRank, int kRope>
void by_both(const Case& c) {
  Problem<T, Rows<T, kRank, kRope, false>>(c).check();
  if (zebra::mla_decode_tma_takes(c.R, c.E, c.page) && c.T * c.H <= 32)  // more: the wide kernel
    Problem<T, Rows<T, kRank, kRope, true>>(c).check();
}

}  // namespace

int main() {
  using B = __nv_bfloat16;
  by_both<B, 64, 32>({{300, 0, 1, 64}, 1, 24, 64, 32, 64, 3});
  by_both<B, 64, 32>({{130, 70}, 3, 5, 40, 24, 16, 2, 0, true});
  by_both<__half, 96, 64>({{200, 9}, 1, 32, 96, 64, 64, 2, 64, true, true});
  by_both<B, 192, 64>({{150, 30}, 2, 32, 192, 64, 128, 2, 0, true});
  by_both<B, 192, 64>({{40, 0, 257}, 1, 32, 192, 64, 128, 4});
  std::printf("mla_decode, few rows: %d checked, %d failures\n", checked, failures);
  return failures == 0 ? 0 : 1;
}
