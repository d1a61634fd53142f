// linear_decode's projections for its driver: two weights in a launch, rotated parts, a paged
// cache.
#pragma once

#include <cmath>

#include "driver.h"
#include "linear_decode/linear_decode_sm90_launch.h"
#include "linear_decode_problem.h"

namespace zebra::native {

struct ProjectCase {
  Case c;        // the first weight; without activation, bias and residual
  long second;   // outputs of the second, 0: none
  long head, E;  // outputs of a head of the first, 0: not turned; turned outputs
  bool cache;
  bool int64_positions;
};

template <typename T>
struct ProjectProblem {
  Problem<T> first, second;
  LinearProjection also;
  std::vector<std::int64_t> slots;
  std::size_t cache_size = 0;

  // Elements from the cache's start to a token's row; -1: not stored.
  long row_of(long token) const {
    const long slot = also.cache == nullptr ? -1 : slots[token];
    if (slot < 0 || slot >= also.pages * also.page) return -1;
    return slot / also.page * also.page_stride + slot % also.page * also.row_stride;
  }
};

inline std::string describe(const ProjectCase& c, const char* route) {
  char text[96];
  std::snprintf(text, sizeof(text), "; second %ld, head %ld, E %ld, cache %d", c.second, c.head,
                c.E, c.cache);
  return describe(c.c, route) + text;
}

template <typename T>
ProjectProblem<T> make_project_problem(Arena& arena, const ProjectCase& pc) {
  constexpr long kPositions = 37;
  const Case& c = pc.c;
  ProjectProblem<T> made = {};
  made.first = make_problem<T>(arena, c);
  made.second = made.first;
  LinearDecodeParams& p = made.first.p;
  LinearProjection& q = made.also;
  const auto seed = static_cast<unsigned>(c.rows * 3 + c.outputs * 5 + c.K);
  const long half = pc.E / 2;
  std::vector<float> cos(kPositions * half + 1), sin(cos.size());
  for (long i = 0; i < kPositions * half; ++i) {
    const double angle = hash(i * 77 + seed) * 1e-5;
    cos[i] = static_cast<float>(1.3 * std::cos(angle)),
    sin[i] = static_cast<float>(std::sin(angle));
  }
  std::vector<std::int64_t> positions(c.rows);
  std::vector<std::int32_t> narrow(c.rows);
  for (long t = 0; t < c.rows; ++t) {  // a few outside of the tables
    positions[t] = static_cast<long>(hash(t * 31 + seed) % (kPositions + 3)) - 1;
    narrow[t] = static_cast<std::int32_t>(positions[t]);
  }
  float* const cos_at = arena.take<float>(cos.size());
  float* const sin_at = arena.take<float>(sin.size());
  to_device(cos_at, cos), to_device(sin_at, sin);
  auto* const wide_at = arena.take<std::int64_t>(c.rows);
  auto* const narrow_at = arena.take<std::int32_t>(c.rows);
  to_device(wide_at, positions), to_device(narrow_at, narrow);
  const void* const at = pc.int64_positions ? static_cast<const void*>(wide_at) : narrow_at;
  q.rope = {cos_at, sin_at, at, pc.int64_positions, kPositions, pc.E};
  q.head = pc.head, q.outputs = pc.second;
  // A latent's rows are longer than K where they want to be, and apart from the first weight's.
  q.weight_stride = c.K + 8;
  if (pc.second > 0) {
    Problem<T>& second = made.second;
    T* const weight = arena.take<T>(pc.second * q.weight_stride);
    fill(weight, pc.second, c.K, q.weight_stride, 1.f / std::sqrt(static_cast<float>(c.K)), 0.f,
         seed + 1);
    q.weight = weight;
    second.p.weight = weight, second.p.weight_stride = q.weight_stride;
    second.p.outputs = pc.second;
    second.guarded_size = c.rows * pc.second + 2 * kGuard;
    second.guarded = arena.take<T>(second.guarded_size);
    q.y = second.p.y = second.guarded + kGuard;
    double* const expected = arena.take<double>(c.rows * pc.second);
    expected_kernel<T>
        <<<dim3(static_cast<unsigned>(pc.second), static_cast<unsigned>(c.rows)), 32>>>(second.p,
                                                                                        expected);
    CUDA_OK(cudaGetLastError());
    second.expected = to_host(expected, c.rows * pc.second);
  }
  const auto turn = [&](std::vector<double>& y, long outputs, long head) {
    for (long t = 0; t < c.rows && head > 0; ++t)
      for (long n = head - pc.E; n < outputs; n += n % head == head - 2 ? head - pc.E + 2 : 2) {
        if (pc.E == 0) break;
        double& even = y[t * outputs + n];
        double& odd = y[t * outputs + n + 1];
        const long position = positions[t], pair = (n % head - (head - pc.E)) / 2;
        const bool known = position >= 0 && position < kPositions;
        const double by = known ? cos[position * half + pair] : std::nan("");
        const double across = known ? sin[position * half + pair] : 0;
        const double turned = even * by - odd * across;
        odd = even * across + odd * by, even = turned;
      }
  };
  turn(made.first.expected, p.outputs, pc.head);
  turn(made.second.expected, pc.second, pc.second);
  if (!pc.cache) return made;
  q.page = 5, q.pages = c.rows / 5 + 2;
  q.row_stride = pc.second + 6, q.page_stride = q.row_stride * q.page + 10;
  made.cache_size = q.pages * q.page_stride;
  q.cache = arena.take<T>(made.cache_size);
  for (long t = 0; t < c.rows; ++t)  // some not stored, some beyond the cache; backwards
    made.slots.push_back(t % 7 == 3 ? -1 - t : t % 11 == 5 ? q.pages * q.page + t : c.rows - t);
  auto* const slots = arena.take<std::int64_t>(c.rows);
  to_device(slots, made.slots);
  q.slot_mapping = slots;
  return made;
}

// What is wrong with the cache, given what is right in the latents.
template <typename T>
std::string find_cache_errors(const ProjectProblem<T>& problem, const std::vector<T>& latent) {
  if (problem.also.cache == nullptr) return "";
  const long outputs = problem.also.outputs;
  const std::vector<T> got = to_host(static_cast<const T*>(problem.also.cache), problem.cache_size);
  std::vector<T> want(problem.cache_size);
  std::memset(static_cast<void*>(want.data()), 0xff, want.size() * sizeof(T));
  for (long t = 0; t < problem.first.p.rows; ++t)
    if (problem.row_of(t) >= 0)
      std::memcpy(static_cast<void*>(&want[problem.row_of(t)]), &latent[kGuard + t * outputs],
                  outputs * sizeof(T));
  if (same_bytes(got, want)) return "";
  return "  the cache differs from the latents from element " +
         std::to_string(first_difference(got, want)) + " of " + std::to_string(want.size()) + "\n";
}

template <typename T>
void check_project_typed(Tally& tally, Arena& arena, const ProjectCase& c, sm90::Early early,
                         int repeats) {
  current_case = describe(c, "projection");
  const ProjectProblem<T> problem = make_project_problem<T>(arena, c);
  const LinearDecodeParams& p = problem.first.p;
  if (!linear_project_sm90_takes(p, problem.also)) return stop("a projection", "it is not taken");
  std::vector<T> before[2];
  for (int i = 0; i < repeats; ++i) {
    ++tally.runs;
    for (const Problem<T>* of : {&problem.first, &problem.second})
      CUDA_OK(cudaMemset(of->guarded, 0xff, of->guarded_size * sizeof(T)));
    if (problem.cache_size > 0)
      CUDA_OK(cudaMemset(problem.also.cache, 0xff, problem.cache_size * sizeof(T)));
    launched(sm90::linear_decode_launch(p, early, {}, nullptr, &problem.also));
    CUDA_OK(cudaDeviceSynchronize());
    const std::vector<T> q = to_host(problem.first.guarded, problem.first.guarded_size);
    std::string errors = find_errors(problem.first, q);
    if (!errors.empty()) errors = "of the first weight: " + errors;
    std::vector<T> latent;
    if (c.second > 0) {
      latent = to_host(problem.second.guarded, problem.second.guarded_size);
      const std::string others = find_errors(problem.second, latent);
      if (!others.empty()) errors += "of the second weight: " + others;
      errors += find_cache_errors(problem, latent);
    }
    if (i == 0) before[0] = q, before[1] = latent;
    if (!same_bytes(before[0], q) || !same_bytes(before[1], latent))
      errors += "  differs from the first repeat\n";
    if (errors.empty()) continue;
    std::printf("FAIL %s, repeat %d: %s", current_case.c_str(), i, errors.c_str());
    tally.fail();
    break;
  }
}

inline void check_projections(Tally& tally, Arena& arena) {
  using sm90::Early;
  struct Shape {
    long N, K, second, head, E;
  };
  // The models, merged; the launches of two with a bottleneck; and every kind of unit.
  constexpr Shape kShapes[] = {
      {2048, 2048, 160, 64, 32},  {3072, 3072, 192, 128, 64}, {4096, 4096, 224, 128, 64},
      {2048, 1024, 224, 0, 64},   {4096, 2048, 0, 128, 64},   {8, 8, 2, 8, 2},
      {24, 72, 6, 6, 4},          {96, 520, 130, 12, 12},     {300, 64, 576, 10, 6},
      {1536, 264, 576, 0, 64},    {6000, 136, 34, 12, 0},     {20000, 128, 10, 20, 10},
      {24576, 200, 576, 192, 64}, {130, 1000, 0, 26, 2}};
  int turn = 0;
  for (const long M : {1, 2, 7, 8, 9, 16, 30, 32, 33, 48, 64, 65, 128})
    for (const Shape& s : kShapes) {
      if (s.N * M > 2200000) continue;
      ++turn;
      const bool bf16 = turn % 3 != 0;
      const int norm = turn % 4 == 3 ? 2 : turn % 2;
      const ProjectCase c = {
          {M, s.N, s.K, false, norm, false, false, bf16, turn % 3 * 8, turn % 2 * 8},
          s.second,
          s.head,
          s.E,
          s.second > 0 && turn % 5 != 0,
          turn % 2 == 0};
      const Early early = turn % 3 == 0   ? Early::kNothing
                          : turn % 3 == 1 ? Early::kIntoShared
                                          : Early::kIntoL2;
      if (bf16)
        check_project_typed<__nv_bfloat16>(tally, arena, c, early, 2);
      else
        check_project_typed<__half>(tally, arena, c, early, 2);
    }
}

// Layers one after another, q being the next one's x: merged (rank 0), or two launches.
inline void time_projection(const Bench& bench, Arena& arena, char* pool, std::size_t pool_bytes,
                            long rows, long D, long rank, long second, long head, long E,
                            bool fused) {
  using T = __nv_bfloat16;
  char name[96];
  std::snprintf(name, sizeof(name), "%3ld rows, D %ld, %ld + %ld%s", rows, D, rank > 0 ? rank : D,
                second, fused ? ", norm" : "");
  current_case = name;
  const std::size_t mark = arena.mark();
  const std::size_t bytes = static_cast<std::size_t>((rank > 0 ? 2 * rank : D) + second) * D * 2;
  const auto layers = static_cast<int>(std::min<std::size_t>(pool_bytes / bytes, 48));
  T* const x[2] = {arena.take<T>(rows * D), arena.take<T>(rows * D)};
  T* const c_q = arena.take<T>(rows * D);
  T* const h = arena.take<T>(rows * D);
  T* const gain = arena.take<T>(D);
  T* const latent = arena.take<T>(rows * second);
  T* const cache = arena.take<T>(rows * 64 * second);
  float* const table = arena.take<float>(64 * E);
  auto* const tokens = arena.take<std::int64_t>(rows);
  fill(gain, 1, D, D, 0.1f, 1.f, 4);
  fill(table, 64, E / 2, E / 2, 0.1f, 1.f, 5);
  std::vector<std::int64_t> numbers(rows);
  for (long t = 0; t < rows; ++t) numbers[t] = t % 64;
  to_device(tokens, numbers);
  CUDA_OK(cudaDeviceSynchronize());
  LinearDecodeParams p = {};
  p.h = h, p.rows = rows, p.norm_eps = 1e-5, p.dtype = p.norm_weight_dtype = DType::kBFloat16;
  LinearProjection q = {};
  q.rope = {table, table, tokens, true, 64, E};
  q.y = latent, q.cache = cache, q.slot_mapping = tokens;
  q.pages = rows, q.page = 64, q.page_stride = 64 * second, q.row_stride = second;
  const auto before = [&] { fill(x[0], rows, D, D, 1.f, 0.f, 1, bench.stream); };
  const double us = graph_us(bench.stream, 5, before, [&] {
    for (int i = 0; i < layers; ++i) {
      const T* weight = reinterpret_cast<const T*>(pool + i * bytes);
      p.x = x[i % 2], p.K = p.x_stride = p.weight_stride = q.weight_stride = D;
      p.weight = weight, p.outputs = rank > 0 ? rank : D;
      p.y = rank > 0 ? c_q : x[1 - i % 2];
      p.norm_weight = fused ? gain : nullptr;
      q.weight = weight + p.outputs * D, q.outputs = second, q.head = rank > 0 ? 0 : head;
      launched(sm90::linear_decode_launch(p, sm90::Early::kIntoShared, {}, bench.stream, &q));
      if (rank == 0) continue;
      weight += (rank + second) * D;
      p.x = c_q, p.K = p.x_stride = p.weight_stride = rank;
      p.weight = weight, p.outputs = D, p.y = x[1 - i % 2], p.norm_weight = nullptr;
      q.outputs = 0, q.head = head;
      launched(sm90::linear_decode_launch(p, sm90::Early::kIntoShared, {}, bench.stream, &q));
    }
  });
  const double read_us = graph_us(
      bench.stream, 5, [] {},
      [&] {
        for (int i = 0; i < layers; ++i) bench.read(pool + i * bytes, bytes);
      });
  bench.print_row(name, static_cast<double>(bytes), read_us / layers, us / layers);
  std::printf("  projection\n");
  arena.release(mark);
}

inline void time_projections(const Bench& bench, Arena& arena, char* pool, std::size_t bytes) {
  for (const bool fused : {false, true})
    for (const long rows : {1, 8, 16, 48, 64}) {
      time_projection(bench, arena, pool, bytes, rows, 4096, 0, 224, 128, 64, fused);
      if (rows != 1 && rows != 48) continue;
      time_projection(bench, arena, pool, bytes, rows, 2048, 0, 160, 64, 32, fused);
      time_projection(bench, arena, pool, bytes, rows, 3072, 0, 192, 128, 64, fused);
      time_projection(bench, arena, pool, bytes, rows, 4096, 2048, 224, 128, 64, fused);
    }
}

}  // namespace zebra::native
