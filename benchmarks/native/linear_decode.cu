// Checks and times linear_decode's CUDA kernels without torch: see README.md.
#include "driver.h"
#include "linear_decode/linear_decode_sm90_launch.h"
#include "linear_decode_problem.h"
#include "linear_project.h"

namespace zebra::native {
namespace {

using sm90::Early;
using Tuning = LinearDecodeSm90Tuning;

Tally tally;

// When W is asked for, and what a measurement may fix.
struct Route {
  const char* name;
  Early early;
  Tuning tuning;
};
const Route kHopper{"Hopper", Early::kIntoShared, {}};
const Route kHopperL2{"Hopper, W into L2", Early::kIntoL2, {}};
const Route kHopperLate{"Hopper, W not early", Early::kNothing, {}};

LinearDecodeSm90Config config_of(const LinearDecodeParams& p, const Tuning& tuning) {
  return select_linear_decode_sm90_config(
      {p.rows, p.outputs, p.K, p.swiglu, p.norm_weight != nullptr}, multiprocessors(), tuning);
}
bool takes(const LinearDecodeParams& p, const Route& r) {
  return linear_decode_sm90_takes(p) && linear_ring_turns(config_of(p, r.tuning));
}
void launch(const LinearDecodeParams& p, const Route& r, cudaStream_t stream = nullptr) {
  launched(sm90::linear_decode_launch(p, r.early, r.tuning, stream));
}
void print_config(const LinearDecodeSm90Config& c) {
  std::printf(
      "  tokens %d, row tiles %d, slices %d, cluster %d, unit %d x %d, clusters %d, boxes %d, "
      "steps %d, stages %d, shared %d, last loads %d\n",
      c.tokens, c.row_tiles, c.slices, c.cluster, c.unit, c.units, c.clusters, c.boxes, c.steps,
      c.stages, c.smem_bytes, c.last_loads);
}

// ---- check

// Every route `repeats` times: right, and to the bit the same each time.
template <typename T>
void check_typed(Arena& arena, const Case& c, const std::vector<Route>& routes, int repeats) {
  current_case = describe(c, "data");
  const Problem<T> problem = make_problem<T>(arena, c);
  for (const Route& r : routes) {
    if (!takes(problem.p, r)) continue;
    std::vector<T> first;
    for (int i = 0; i < repeats; ++i) {
      current_case = describe(c, r.name);
      ++tally.runs;
      CUDA_OK(cudaMemset(problem.guarded, 0xff, problem.guarded_size * sizeof(T)));
      launch(problem.p, r);
      CUDA_OK(cudaDeviceSynchronize());
      const std::vector<T> got = to_host(problem.guarded, problem.guarded_size);
      if (i == 0) first = got;
      std::string errors = find_errors(problem, got);
      if (!same_bytes(first, got))
        errors += "  differs from the first repeat, from element " +
                  std::to_string(static_cast<long>(first_difference(first, got)) - kGuard) + "\n";
      if (errors.empty()) continue;
      std::printf("FAIL %s, repeat %d: %s", current_case.c_str(), i, errors.c_str());
      print_config(config_of(problem.p, r.tuning));
      tally.fail();
      break;
    }
  }
}
void check_case(Arena& arena, const Case& c, const std::vector<Route>& routes, int repeats) {
  if (c.bf16)
    check_typed<__nv_bfloat16>(arena, c, routes, repeats);
  else
    check_typed<__half>(arena, c, routes, repeats);
}

// y_i = norm-linear(y_{i-1}) + y_{i-1} in a graph with programmatic edges, where a launch starts
// while the ones before it run, against the same launches one by one.
void check_chain(Arena& arena, long rows, long dim, int layers, bool swiglu, const Route& route) {
  if (!linear_ring_turns(select_linear_decode_sm90_config({rows, dim, dim, swiglu, true},
                                                          multiprocessors(), route.tuning)))
    return;
  using T = __nv_bfloat16;
  char name[160];
  std::snprintf(name, sizeof(name),
                "chain of %d, %ld rows, dim %ld, swiglu %d, %s, shared %d, last bytes %d", layers,
                rows, dim, swiglu, route.name, route.tuning.smem_bytes, route.tuning.last_bytes);
  current_case = name;
  ++tally.runs;
  arena.release(0);
  const long weight_rows = swiglu ? 2 * dim : dim, size = rows * dim;
  T* const weight = arena.take<T>(layers * weight_rows * dim);
  T* const gain = arena.take<T>(dim);
  T* const h = arena.take<T>(size);
  T* const alone = arena.take<T>((layers + 1) * size);
  T* const chained = arena.take<T>((layers + 1) * size);
  fill(weight, layers * weight_rows, dim, dim, 1.f / std::sqrt(static_cast<float>(dim)), 0.f, 5);
  fill(gain, 1, dim, dim, 0.1f, 1.f, 6);
  for (T* y : {alone, chained}) fill(y, rows, dim, dim, 1.f, 0.f, 7);
  const auto layer = [&](T* y, int i, const Route& r, cudaStream_t stream) {
    LinearDecodeParams p = {};
    p.x = p.residual = y + i * size, p.y = y + (i + 1) * size, p.h = h;
    p.weight = weight + i * weight_rows * dim;
    p.up_weight = swiglu ? weight + (i * weight_rows + dim) * dim : nullptr;
    p.norm_weight = i % 3 == 2 ? nullptr : gain;  // launches with and without a norm before them
    p.rows = rows, p.outputs = p.K = p.x_stride = p.weight_stride = p.residual_stride = dim;
    p.dtype = p.norm_weight_dtype = DType::kBFloat16, p.swiglu = swiglu, p.norm_eps = 1e-5;
    launch(p, r, stream);
  };
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  CUDA_OK(cudaDeviceSynchronize());
  for (int i = 0; i < layers; ++i) {
    layer(alone, i, kHopperLate, stream);
    CUDA_OK(cudaStreamSynchronize(stream));
  }
  const std::vector<T> want = to_host(alone, (layers + 1) * size);
  const Graph graph(stream, [&] {
    for (int i = 0; i < layers; ++i) layer(chained, i, route, stream);
  });
  for (int replay = 0; replay < 20; ++replay) {
    CUDA_OK(cudaMemsetAsync(chained + size, 0xff, layers * size * sizeof(T), stream));
    graph.launch();
    CUDA_OK(cudaStreamSynchronize(stream));
    const std::vector<T> got = to_host(chained, (layers + 1) * size);
    if (same_bytes(want, got)) continue;
    const auto at = static_cast<long>(first_difference(want, got));
    std::printf(
        "FAIL %s, replay %d: differs first at layer %ld, token %ld, output %ld: %g, one by "
        "one %g\n",
        name, replay, at / size, at % size / dim, at % dim,
        static_cast<double>(static_cast<float>(got[at])),
        static_cast<double>(static_cast<float>(want[at])));
    tally.fail();
    break;
  }
  CUDA_OK(cudaStreamDestroy(stream));
}

int check() {
  Arena arena(std::size_t{3} << 30);
  for (const long M : {1, 8, 16, 32, 64, 128})
    for (const long K : {64, 128, 1024})
      for (const long N : {8, 64, 1056})
        for (const int norm : {0, 1, 2})
          check_case(arena, {M, N, K, false, norm, false, false, true, 0, 0}, {kHopper}, 2);
  tally.section("plain");

  // Shares of every kind and ragged ends, with everything fused in turn.
  constexpr long kShapes[][2] = {{1, 8},      {7, 64},     {40, 96},     {65, 136},    {131, 1000},
                                 {1059, 520}, {16, 1024},  {2048, 2048}, {2112, 520},  {2113, 256},
                                 {4224, 328}, {4225, 64},  {2208, 2048}, {4096, 512},  {4320, 1024},
                                 {8447, 264}, {8449, 200}, {16897, 128}, {20000, 256}, {34000, 72}};
  int turn = 0;
  for (const long M : {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128})
    for (const auto& [N, K] : kShapes) {
      if (N * M > 2200000) continue;  // the expected result takes too long
      ++turn;
      const int norm = turn % 12 % 4 == 3 ? 2 : turn % 2;
      check_case(arena,
                 {M, N, K, turn % 3 == 1, norm, turn / 3 % 2 == 0, turn / 5 % 2 == 0, turn % 7 < 4,
                  turn % 3 * 8, turn % 4 * 8},
                 {kHopper, kHopperL2, kHopperLate}, 1);
    }
  for (const long M : {1, 9, 40, 128})  // K that fills no box, which a norm's kernel does not take
    for (const long N : {50, 2500, 5000})
      check_case(arena, {M, N, 100, N == 50, 0, true, true, true, 4, 12}, {kHopper, kHopperL2}, 1);
  tally.section("shapes");

  for (const bool bf16 : {true, false})
    for (const bool swiglu : {false, true})
      for (const int norm : {0, 1, 2})
        for (const long M : {1, 8, 16, 32, 64, 128}) {
          check_case(arena, {M, 4096, 4096, swiglu, norm, true, true, bf16, 0, 0}, {kHopper}, 3);
          check_case(arena, {M, 1500, 1032, swiglu, norm, false, true, bf16, 8, 16},
                     {kHopper, kHopperL2}, 2);
        }
  tally.section("fusions");

  for (const long M : {1, 3, 8, 9, 16, 32, 64, 128})
    for (const auto& [N, K] : {std::pair{8l, 64l}, {131l, 1000l}, {1500l, 520l}, {9000l, 264l}})
      for (const int up : {1, 2})
        check_case(
            arena,
            {M, N, K, true, static_cast<int>(M % 3), M % 2 == 1, up == 1, K != 520, up * 8, 8, up},
            {kHopper, kHopperL2}, 2);
  tally.section("gate and up apart");

  // Rows that CTAs normalise themselves: all counts, ends of K that fill no box, several units.
  for (const long M : {1, 2, 3, 4, 5, 6, 7, 8})
    for (const auto& [N, K] : {std::pair{8l, 8l},
                               {40l, 72l},
                               {2048l, 2048l},
                               {3072l, 3072l},
                               {300l, 4096l},
                               {5000l, 6136l},
                               {500l, 6152l},
                               {20000l, 520l}})
      for (const int norm : {1, 2})
        for (const bool swiglu : {false, true})
          check_case(arena,
                     {M, N, K, swiglu, norm, false, M % 2 == 0, M % 4 < 2, 8, M % 3 * 8, swiglu},
                     {kHopper, kHopperL2, kHopperLate}, 1);
  tally.section("norms");

  check_projections(tally, arena);
  tally.section("projections");

  for (const long M : {8, 32, 64, 128})
    for (const int cluster : {1, 2})
      for (const int boxes : {1, 2, 4, 8})
        for (const int smem : {100000, 200000})
          for (const long N : {300, 4096, 9000})
            for (const int norm : {0, 1}) {
              const Tuning t{cluster, boxes, smem};
              check_case(arena, {M, N, 1000, norm == 1 && N == 300, norm, false, false, true, 0, 0},
                         {{"Hopper, tuned", Early::kIntoShared, t},
                          {"Hopper, tuned, W into L2", Early::kIntoL2, t}},
                         1);
            }
  tally.section("tunings");

  constexpr int kHalf = kLinearHalfSmemBytes, kWhole = kLinearWholeSmemBytes;
  for (Route r : {kHopperLate, kHopperL2, kHopper})
    for (const long M : {1, 8, 16, 32, 64, 128}) {
      check_chain(arena, M, 4096, 12, false, r);
      check_chain(arena, M, 2048, 24, false, r);
      check_chain(arena, M, 1024, 24, true, r);
      if (r.early == Early::kNothing) continue;
      for (const Tuning& t : {Tuning{0, 0, kHalf, 1 << 20}, Tuning{0, 0, kWhole, 0}}) {
        const Route tuned{r.name, r.early, t};
        check_chain(arena, M, 4096, 12, false, tuned);
        check_chain(arena, M, 2048, 24, false, tuned);
      }
    }
  return tally.finish();
}

// ---- time

constexpr std::size_t kPoolBytes = std::size_t{8} << 30;

// Layers with weights of their own, one after another in a graph: what decoding does, and what
// keeps the L2 cold.  The time of one of them.
void time_shape(const Bench& bench, Arena& arena, char* pool, long rows, long outputs, long K,
                bool swiglu, bool fused, const Tuning& tuning = {}) {
  using T = __nv_bfloat16;
  char name[96];
  std::snprintf(name, sizeof(name), "%3ld rows, N %6ld, K %5ld%s%s%s", rows, outputs, K,
                swiglu ? ", swiglu" : "", fused ? ", norm" : "",
                tuning.smem_bytes != 0 ? ", tuned" : "");
  current_case = name;
  const std::size_t mark = arena.mark();
  const std::size_t weight_bytes = static_cast<std::size_t>(swiglu ? 2 : 1) * outputs * K * 2;
  const std::size_t most = weight_bytes > (std::size_t{400} << 20) ? 6 : 48;
  const auto layers = static_cast<int>(std::min(kPoolBytes / weight_bytes, most));
  T* const x = arena.take<T>(rows * K);
  T* const y = arena.take<T>(rows * outputs);
  T* const h = arena.take<T>(rows * K);
  T* const gain = arena.take<T>(layers * K);
  fill(gain, layers, K, K, 0.1f, 1.f, 4);
  CUDA_OK(cudaDeviceSynchronize());
  const bool chained = outputs == K && !swiglu;  // each layer waits for the one before
  LinearDecodeParams p = {};
  p.h = h, p.rows = rows, p.outputs = outputs, p.K = p.x_stride = p.weight_stride = K;
  p.residual_stride = outputs, p.swiglu = swiglu, p.norm_eps = 1e-5;
  p.dtype = p.norm_weight_dtype = DType::kBFloat16;
  const auto before = [&] { fill(x, rows, K, K, 1.f, 0.f, 1, bench.stream); };
  const double us = graph_us(bench.stream, 5, before, [&] {
    for (int i = 0; i < layers; ++i) {
      const bool back = chained && i % 2 == 1;
      p.x = back ? y : x, p.y = back ? x : y;
      p.weight = pool + i * weight_bytes;
      p.up_weight = swiglu ? pool + i * weight_bytes + weight_bytes / 2 : nullptr;
      p.norm_weight = fused ? gain + i * K : nullptr;
      p.residual = fused && outputs == K ? p.x : nullptr;
      launch(p, {"Hopper", Early::kIntoShared, tuning}, bench.stream);
    }
  });
  const double read_us = graph_us(
      bench.stream, 5, [] {},
      [&] {
        for (int i = 0; i < layers; ++i) bench.read(pool + i * weight_bytes, weight_bytes);
      });
  bench.print_row(name, static_cast<double>(weight_bytes), read_us / layers, us / layers);
  print_config(config_of(p, tuning));
  arena.release(mark);
}

int time() {
  Arena arena(kPoolBytes + (std::size_t{1} << 30));
  char* const pool = arena.take_as_is<char>(kPoolBytes);
  // A chain of 4096 columns neither grows nor fades.
  fill(reinterpret_cast<__nv_bfloat16*>(pool), 1, kPoolBytes / 2, kPoolBytes / 2, 1.f / 64, 0.f, 3);
  CUDA_OK(cudaDeviceSynchronize());
  const Bench bench(arena, pool, kPoolBytes);
  Bench::print_header("bf16; one layer of a chain");
  struct Shape {
    std::vector<long> rows;
    long outputs, K;
    bool swiglu, fused;
  };
  const Shape shapes[] = {
      {{1, 16, 32, 64, 128}, 4096, 4096, false, false},
      {{1, 4, 8, 9, 16, 48, 64, 128}, 4096, 4096, false, true},
      {{1, 16, 32, 64}, 2048, 2048, false, false},
      {{1, 8, 16, 64}, 2048, 2048, false, true},
      {{16, 32}, 3072, 3072, false, false},
      {{8, 16, 32, 64}, 3264, 3072, false, true},
      {{1, 16, 32, 64}, 5152, 2048, false, false},
      {{1, 16, 32, 64}, 5152, 2048, false, true},
      {{1, 48}, 4320, 4096, false, false},
      {{1, 16, 48, 64}, 4320, 4096, false, true},
      {{1, 48}, 10272, 4096, false, false},
      {{1, 48}, 10272, 4096, false, true},
      {{1, 16, 64, 128}, 14336, 4096, false, false},
      {{1, 16, 32, 48, 64}, 14336, 4096, true, false},
      {{48}, 8192, 2048, true, false},
      {{48}, 8192, 3072, true, false},
      {{1, 48, 64}, 14336, 4096, true, true},
      {{32}, 3072, 8192, false, false},
      {{1, 32, 48, 64}, 4096, 14336, false, false},
      {{1, 16, 32, 48, 64}, 128256, 4096, false, false},
      {{1, 4, 64}, 128256, 4096, false, true},
  };
  time_projections(bench, arena, pool, kPoolBytes);
  for (const Shape& s : shapes)
    for (const long rows : s.rows)
      time_shape(bench, arena, pool, rows, s.outputs, s.K, s.swiglu, s.fused);
  // Whether the launch of a norm finds room beside the products: with 24 KB more of it.
  for (const long rows : {16, 48, 128})
    time_shape(bench, arena, pool, rows, 4096, 4096, false, true, {0, 0, 204800, -1});
  return 0;
}

}  // namespace
}  // namespace zebra::native

int main(int argc, char** argv) {
  return zebra::native::run(argc, argv, zebra::native::check, zebra::native::time);
}
