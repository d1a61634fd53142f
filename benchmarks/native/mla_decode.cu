// Checks and times mla_decode's CUDA kernels without torch: see README.md.
#include "driver.h"
#include "mla_decode_expected.h"

namespace zebra::native {
namespace {

// ---- check

void poison_outputs(const Problem& problem) {
  CUDA_OK(cudaMemset(problem.p.o, 0xff, problem.rows() * problem.p.v_dim * 2));
  CUDA_OK(cudaMemset(problem.p.lse, 0xff, problem.rows() * 4));
  CUDA_OK(cudaMemset(problem.workspace, 0xff, problem.workspace_bytes));
}

void launch(const Problem& problem, bool portable, cudaStream_t stream = nullptr) {
  launched(portable ? mla_decode_portable(problem.p, problem.workspace, stream)
                    : mla_decode_cuda(problem.p, problem.workspace, stream));
}

void expect_same(const Output& a, const Output& b, const std::string& what) {
  ++tally.runs;
  if (a == b) return;
  std::printf("FAIL %s differs, from element %zu of o, %zu of lse\n", what.c_str(),
              first_difference(a.o, b.o), first_difference(a.lse, b.lse));
  tally.fail();
}

Output run_once(const Problem& problem, bool portable) {
  poison_outputs(problem);
  launch(problem, portable);
  CUDA_OK(cudaDeviceSynchronize());
  return Output(problem);
}

template <typename T>
void check_typed(Arena& arena, const Case& c, unsigned seed) {
  arena.release(0);
  current_case = describe(c, "data");
  const Problem problem = make_problem<T>(arena, c, seed);
  for (const bool portable : {false, true}) {
    const bool tma = takes_tma(problem.p), wide = takes_wide(problem.p);
    if (portable && (wide ? !mla_decode_takes(c.R, c.E) : !tma)) continue;  // none, or it was that
    const char* const route = portable ? "cp.async" : wide ? "wide" : tma ? "TMA" : "cp.async";
    current_case = describe(c, route);
    const Output first = run_once(problem, portable);
    compare<T>(arena, problem, c, route);
    for (int i = 0; i < 2; ++i)
      expect_same(first, run_once(problem, portable), "a repeat of " + current_case);
  }
}
void check_case(Arena& arena, const Case& c) {
  static unsigned seed = 0;
  ++seed;
  if (c.bf16)
    check_typed<__nv_bfloat16>(arena, c, seed);
  else
    check_typed<__half>(arena, c, seed);
}

void check_lengths_and_pages(Arena& arena) {
  for (const int page : {1, 16, 17, 32, 48, 64, 128, 256})
    for (const int T : {1, 4})
      check_case(arena,
                 {"edges",
                  {0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, page - 1, page, page + 1, 1000},
                  T,
                  24,
                  128,
                  64,
                  page});
  check_case(arena, {"one huge", {4641, 45118, 1730, 1696}, 1, 32, 160, 64, 64});
  check_case(arena, {"one large", {4641, 9118, 1730, 1696}, 4, 24, 128, 64, 16});
  std::vector<int> lens(300);
  for (int i = 0; i < 300; ++i) lens[i] = i * 37 % 91;
  check_case(arena, {"many small", lens, 1, 32, 128, 32, 16});
  lens.resize(700);
  for (int i = 0; i < 700; ++i) lens[i] = i % 5 == 0 ? 0 : i * 131 % 513;
  check_case(arena, {"many", lens, 1, 8, 64, 64, 64});
  check_case(arena, {"all empty", std::vector<int>(300, 0), 1, 16, 128, 64, 64});
  check_case(arena, {"many equal", std::vector<int>(256, 257), 1, 32, 160, 64, 64});
  lens.assign(140, 100);
  lens.back() = 9000;
  check_case(arena, {"last huge", lens, 2, 32, 160, 64, 64});
}

Case with_weight(Case c, int G, int nope, int v_dim) {
  c.name = "kv_b_weight", c.G = G, c.nope = nope, c.v_dim = v_dim;
  return c;
}

void check_weight(Arena& arena) {
  for (const bool bf16 : {true, false}) {
    check_case(arena, with_weight({"", {64}, 1, 32, 160, 64, 64, bf16}, 8, 64, 128));
    check_case(arena, with_weight({"", {5000}, 1, 32, 160, 64, 64, bf16}, 8, 64, 128));
    check_case(arena, with_weight({"", {40000}, 1, 32, 160, 64, 64, bf16}, 8, 64, 128));
    check_case(arena, with_weight({"", {700, 0, 33, 64, 1}, 1, 24, 128, 64, 64, bf16}, 8, 64, 128));
    check_case(arena, with_weight({"", {700, 0, 33, 64, 1}, 3, 32, 128, 32, 64, bf16}, 8, 32, 64));
  }
  check_case(arena, with_weight({"", std::vector<int>(40, 0), 1, 4, 64, 64, 64}, 2, 64, 64));
  for (const int batch : {2, 7, 8, 16, 33, 64, 140, 256, 300, 700}) {
    std::vector<int> lens(batch);
    for (int i = 0; i < batch; ++i) lens[i] = i % 9 == 4 ? 0 : (i * 131 + batch) % 400;
    check_case(arena, with_weight({"", lens, 1, 32, 160, 64, 64}, 8, 64, 128));
    lens[batch / 2] = 3000;
    check_case(arena, with_weight({"", lens, 2, 24, 128, 64, 16, false}, 8, 64, 128));
  }
  // Sizes that tiles do not divide, heads with a KV head each or one for all, more than one pass.
  constexpr int kSizes[][5] = {{8, 8, 8, 8, 2},       {16, 0, 8, 24, 4},       {48, 8, 24, 40, 1},
                               {80, 24, 40, 136, 3},  {96, 64, 128, 128, 8},   {112, 8, 0, 16, 2},
                               {160, 64, 72, 264, 2}, {192, 64, 128, 128, 16}, {248, 56, 200, 8, 4},
                               {256, 64, 512, 512, 2}};
  for (const auto& [R, E, nope, v_dim, G] : kSizes)
    for (const int group : {1, 3, 9})
      for (const int T : {1, 5}) {
        Case c = {"", {900, 17, 0, 130, 64, 4}, T, G * group, R, E, 64, (T + group) % 4 == 0};
        c.q_pad = group == 3, c.row_pad = group == 9 ? 8 : 0, c.split = T == 5 ? 100 : 0;
        check_case(arena, with_weight(c, G, nope, v_dim));
      }
}

// Many rows, or latents wider than 256.
void check_wide(Arena& arena) {
  for (const int tokens : {1, 64, 128, 5000})
    for (const int H : {64, 128}) check_case(arena, {"wide", {tokens}, 1, H, 512, 64, 64});
  for (const bool bf16 : {true, false})
    for (const int E : {0, 8, 64}) {
      for (const int R : {264, 320, 448, 480, 512})
        check_case(arena, {"wide", {700, 0, 33, 64, 1}, 1, 64, R, E, 64, bf16});
      for (const int R : {8, 64, 120, 128, 136, 160, 192, 256})
        check_case(arena, {"many rows", {700, 0, 33, 64, 1}, 2, 32, R, E, 64, bf16});
    }
  for (const int H : {1, 3, 16, 17, 40, 64, 65, 100, 126, 128})
    for (const int T : {1, 2, 5})
      check_case(arena, {"wide", {1, 65, 200, T}, T, H, 512, 64, 64, (H + T) % 2 == 0});
  for (const int page : {8, 16, 24, 32, 48, 64, 128, 256})
    for (const int T : {1, 2}) {
      const std::vector<int> lens = {0, 1, 31, 63, 64, 65, 127, 128, 129, page, page + 1, 1000};
      check_case(arena, {"wide edges", lens, T, 64, 512, 64, page});
      check_case(arena, {"many rows, edges", lens, T + 1, 24, 128, 64, page});
    }
  std::vector<int> lens(300);
  for (int i = 0; i < 300; ++i) lens[i] = i % 5 == 0 ? 0 : i * 131 % 513;
  check_case(arena, {"wide, many", lens, 1, 128, 512, 64, 64});
  check_case(arena, {"wide, empty", std::vector<int>(300, 0), 1, 128, 512, 64, 64});
  lens.assign(70, 100), lens.back() = 25000;
  check_case(arena, {"wide, last huge", lens, 1, 128, 512, 64, 64});
  Case odd = {"wide strides", {1333, 1, 77}, 2, 24, 512, 64, 64};
  odd.row_pad = 8, odd.q_pad = true;
  check_case(arena, odd);
  odd.q_pad = false, odd.far = true;
  check_case(arena, odd);
  for (const Content content :
       {Content::kRising, Content::kFalling, Content::kSpikes, Content::kEqual, Content::kSteps})
    for (const bool bf16 : {true, false})
      for (const int split : {0, 64})
        for (const int R : {512, 160})
          check_case(arena, {"wide, steep", {300, 2000}, 2, 32, R, 64, 64, bf16, split, content});
  for (const int batch : {1, 7, 40, 300}) {
    lens.assign(batch, 0);
    for (int i = 0; i < batch; ++i) lens[i] = i % 9 == 4 ? 0 : (i * 131 + batch) % 400;
    lens[batch / 2] = 3000;
    check_case(arena, with_weight({"", lens, 1, 128, 512, 64, 64}, 128, 128, 128));
    check_case(arena, with_weight({"", lens, 2, 16, 512, 64, 64, false, 100}, 4, 128, 128));
    check_case(arena, with_weight({"", lens, 2, 32, 160, 64, 64}, 8, 64, 128));
  }
}

void check_random(Arena& arena) {
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < 120; ++i) {
    Case c = {"random",
              std::vector<int>(1 + below(9)),
              1 + below(4),
              1 + below(i % 3 == 0 ? 130 : 40),
              8 * (1 + below(i % 3 == 0 ? 64 : 32)),
              8 * below(9),
              1};
    for (int& length : c.lens) length = below(4) == 0 ? below(3) : below(1500);
    constexpr int kPages[] = {1, 8, 16, 32, 64, 128, 256};
    c.page = kPages[c.R > 256 ? 1 + below(6) : below(7)], c.bf16 = below(2) == 0;
    c.split = below(3) == 0 ? 1 + below(600) : 0;
    c.content = static_cast<Content>(below(4) == 0 ? below(6) : 0);
    c.row_pad = 8 * below(2), c.q_pad = below(2) == 0;
    check_case(arena, c);
  }
}

// With split_size the result of a sequence does not depend on its batch.
void check_invariance(Arena& arena, const Case& c) {
  arena.release(0);
  const Problem all = make_problem<__nv_bfloat16>(arena, c, 99);
  const Output together = run_once(all, false);
  for (int b = 0; b < 4; ++b) {
    current_case = "sequence " + std::to_string(b) + " alone, of " + describe(c, "dispatched");
    Problem one = all;
    one.p.B = 1;
    one.p.q = static_cast<const __nv_bfloat16*>(all.p.q) + b * all.p.q_stride[0];
    one.p.block_table += b * all.p.table_stride, one.p.seq_lens += b;
    Output expected = together;
    const long rows = one.rows();
    expected.lse.assign(together.lse.begin() + b * rows, together.lse.begin() + (b + 1) * rows);
    expected.o.assign(together.o.begin() + b * rows * all.p.v_dim,
                      together.o.begin() + (b + 1) * rows * all.p.v_dim);
    expect_same(expected, run_once(one, false), current_case);
  }
}

// A graph serves whatever lengths the device holds when it runs.
void check_graph(Arena& arena, cudaStream_t stream, Case c) {
  arena.release(0);
  const Problem problem = make_problem<__nv_bfloat16>(arena, c, 123);
  launch(problem, false, stream);
  CUDA_OK(cudaStreamSynchronize(stream));
  const Graph graph(stream, [&] { launch(problem, false, stream); });
  const std::vector<std::vector<int>> changes = {
      {2000, 1300, 64, 1}, {1, 0, 64, 0}, {0, 0, 0, 0}, {1999, 33, 0, 1}, {2000, 1300, 64, 1}};
  for (const std::vector<int>& lens : changes) {
    c.lens = lens;
    current_case = describe(c, "replayed");
    to_device(const_cast<int*>(problem.p.seq_lens), lens);
    poison_outputs(problem);
    graph.launch();
    CUDA_OK(cudaStreamSynchronize(stream));
    compare<__nv_bfloat16>(arena, problem, c, "replayed");
  }
  const Output first(problem);
  for (int i = 0; i < 300; ++i) {
    graph.launch();
    CUDA_OK(cudaStreamSynchronize(stream));
    expect_same(first, Output(problem), "replay " + std::to_string(i) + " of " + current_case);
  }
}

// Two streams with workspaces of their own do not disturb each other.
void check_streams(Arena& arena) {
  const Case c = {"two streams", {3000, 1300, 64, 1}, 1, 24, 128, 64, 64};
  current_case = describe(c, "both");
  arena.release(0);
  Problem problems[2];
  cudaStream_t streams[2];
  for (int i = 0; i < 2; ++i) {
    problems[i] = make_problem<__nv_bfloat16>(arena, c, 7u + i);
    poison_outputs(problems[i]);
    CUDA_OK(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
  }
  CUDA_OK(cudaDeviceSynchronize());
  for (int n = 0; n < 200; ++n)
    for (int i = 0; i < 2; ++i) launch(problems[i], false, streams[i]);
  CUDA_OK(cudaDeviceSynchronize());
  for (int i = 0; i < 2; ++i) {
    compare<__nv_bfloat16>(arena, problems[i], c, i == 0 ? "stream 0" : "stream 1");
    CUDA_OK(cudaStreamDestroy(streams[i]));
  }
}

// Short products follow each other closest, where a missing barrier shows now and then.
void check_repeats(Arena& arena, bool wide) {
  Case c = {"repeats", {777, 3, 4100}, 1, 32, 64, 64, 64};
  if (wide) c.T = 2, c.H = 64, c.R = 512;
  arena.release(0);
  const Problem problem = make_problem<__nv_bfloat16>(arena, c, 17);
  const Output first = run_once(problem, false);
  for (int i = 0; i < 1000; ++i) {
    current_case = "repeat " + std::to_string(i) + " of " + describe(c, "dispatched");
    launch(problem, false);
    CUDA_OK(cudaDeviceSynchronize());
    expect_same(first, Output(problem), current_case);
  }
}

int check() {
  Arena arena(kFarBytes + (std::size_t{2} << 30));
  check_case(arena, {"one block", {32}, 1, 16, 64, 64, 64});
  check_case(arena, {"one token", {1}, 1, 1, 64, 32, 16});
  check_case(arena, {"two blocks", {64}, 1, 32, 160, 64, 64});
  check_case(arena, {"one sequence", {300}, 1, 32, 160, 64, 64});
  check_case(arena, {"one sequence, cut", {5000}, 1, 32, 160, 64, 64});
  tally.section("plain");
  check_weight(arena);
  tally.section("kv_b_weight");

  for (const bool bf16 : {true, false})
    for (const int R : {64, 96, 128, 160, 192, 256})
      for (const int E : {0, 32, 64})
        check_case(arena, {"instances", {700, 0, 33, 64, 1}, 1, 32, R, E, 64, bf16});
  for (const int R : {8, 16, 48, 80, 112, 144, 176, 208, 240, 248})
    for (const int E : {8, 64})
      check_case(arena, {"padded instances", {129, 31}, 1, 24, R, E, 32, R % 32 == 0});
  tally.section("instances");

  for (const int H : {1, 3, 4, 8, 16, 17, 24, 32, 33, 48, 64, 100, 126, 128})
    for (const int T : {1, 2, 5, 16})
      check_case(arena, {"rows", {1, 65, 200, T}, T, H, 128, 64, 64, (H + T) % 2 == 0});
  for (const int T : {1, 3})
    for (const int H : {16, 32, 64, 128}) {
      check_case(arena, {"rows of rank 256", {1, 65, 200}, T, H, 256, 64, 64});
      check_case(arena, {"rows of rank 192", {700, 65, 200}, T, H, 192, 64, 16, false});
    }
  tally.section("rows");

  check_lengths_and_pages(arena);
  tally.section("lengths and pages");

  Case strided = {"strides", {333, 1, 77}, 2, 24, 128, 64, 64};
  strided.row_pad = 8, strided.q_pad = true;
  check_case(arena, strided);
  strided.R = 160, strided.page = 16, strided.bf16 = false, strided.row_pad = 40;
  check_case(arena, strided);
  Case far = {"far", {1333, 1, 77}, 1, 32, 160, 64, 64};
  far.far = true;
  check_case(arena, far);
  far.R = 128, far.E = 32, far.page = 16, far.row_pad = 8;
  check_case(arena, far);
  tally.section("strides");

  for (const Content content :
       {Content::kRising, Content::kFalling, Content::kSpikes, Content::kEqual, Content::kSteps})
    for (const bool bf16 : {true, false})
      for (const int split : {0, 64})
        check_case(arena, {"steep", {300, 2000}, 1, 16, 64, 64, 64, bf16, split, content});
  tally.section("steep scores");

  for (const int split : {1, 32, 64, 100, 512, 4096})
    for (const int T : {1, 3}) {
      check_case(arena, {"split", {1500, 3, 0, 700}, T, 32, 160, 64, 64, true, split});
      check_case(arena, {"split", {1500, 3, 0, 700, 65}, T, 128, 256, 64, 16, false, split});
    }
  tally.section("split_size");
  check_wide(arena);
  tally.section("many rows, wide latents");

  check_random(arena);
  tally.section("random");

  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  const Case invariant = {"invariance", {900, 3, 1500, 64}, 2, 32, 160, 64, 64, true, 256};
  check_invariance(arena, invariant);
  check_invariance(arena, with_weight(invariant, 8, 64, 128));
  check_invariance(arena, {"invariance", {900, 3, 1500, 64}, 1, 128, 512, 64, 64, true, 256});
  const Case replayed = {"graph", {2000, 1300, 64, 1}, 1, 32, 160, 64, 64};
  check_graph(arena, stream, replayed);
  check_graph(arena, stream, with_weight(replayed, 8, 64, 128));
  const Case wide = {"graph", {2000, 1300, 64, 1}, 1, 128, 512, 64, 64};
  check_graph(arena, stream, wide);
  check_graph(arena, stream, with_weight(wide, 128, 128, 128));
  CUDA_OK(cudaStreamDestroy(stream));
  check_streams(arena);
  for (const bool wide : {false, true}) check_repeats(arena, wide);
  return tally.finish();
}

// ---- time

constexpr std::size_t kPoolBytes = std::size_t{4} << 30;

struct Shape {
  const char* model;
  int B, tokens, H, R, E;
};

Problem make_shape(Arena& arena, const Shape& s, int T, void* pool, bool has_weight) {
  constexpr int kPage = 64;
  Problem made;
  MlaDecodeParams& p = made.p;
  p.B = s.B, p.T = T, p.H = s.H, p.G = 1, p.R = p.v_dim = s.R, p.E = s.E, p.page = kPage;
  p.scale = 1 / std::sqrt(static_cast<double>(s.R + s.E)), p.dtype = DType::kBFloat16;
  p.row_stride = s.R + s.E, p.page_stride = p.row_stride * kPage;
  p.max_pages = p.table_stride = ceil_div(s.tokens, kPage), p.pages = p.B * p.max_pages;
  p.cache = pool;
  if (p.pages * p.page_stride * 2 > static_cast<long>(kPoolBytes)) stop("time", "a small pool");
  std::vector<int> table(p.pages);
  for (long i = 0; i < p.pages; ++i) table[i] = static_cast<int>(i);
  std::shuffle(table.begin(), table.end(), std::mt19937(3));
  int* const device_table = arena.take<int>(table.size());
  to_device(device_table, table);
  p.block_table = device_table;
  int* const lens = arena.take<int>(s.B);
  to_device(lens, std::vector<int>(s.B, s.tokens));
  p.seq_lens = lens, p.seq_lens_stride = 1;
  if (has_weight) {
    const bool is_1b = std::strcmp(s.model, "1B") == 0;
    if (s.R > 256)
      take_weight<__nv_bfloat16>(arena, p, s.H, 128, 128, 4);
    else
      take_weight<__nv_bfloat16>(arena, p, 8, is_1b ? 32 : 64, is_1b ? 64 : 128, 4);
  }
  const long width = has_weight ? p.nope + p.E : p.row_stride;
  p.q_stride[2] = width, p.q_stride[1] = width * s.H, p.q_stride[0] = p.q_stride[1] * T;
  auto* const q = arena.take<__nv_bfloat16>(p.B * p.q_stride[0]);
  fill(q, made.rows(), width, width, 1.f, 0.f, 5);
  p.q = q;
  take_outputs(arena, made);
  CUDA_OK(cudaDeviceSynchronize());
  return made;
}

// One call with a cold L2 full of dirty lines; beside it, one whose L2 was clean, one after the
// same call, and both of the first where other kernels ran in between, so that its code comes from
// HBM, too, as it does in a decoding step.
void time_shape(const Bench& bench, Arena& arena, char* pool, const Shape& s, int T) {
  const std::size_t mark = arena.mark();
  const Problem problem = make_shape(arena, s, T, pool, false);
  const Problem whole = make_shape(arena, s, T, pool, true);
  const double cache_bytes = 2. * s.B * s.tokens * (s.R + s.E);
  const double bytes = cache_bytes + 2. * static_cast<double>(problem.rows()) * (2 * s.R + s.E);
  const int replays = bytes > 3e8 ? 7 : 15;
  const auto dirty = [&] { bench.flush_by_write(); };
  const double read_us = graph_us(bench.stream, replays, dirty,
                                  [&] { bench.read(pool, static_cast<std::size_t>(bytes)); });
  constexpr const char* kForms[] = {"dispatched", "cp.async", "kv_b_weight"};
  const double flops = 2. * static_cast<double>(problem.rows()) * s.tokens * (2. * s.R + s.E);
  for (int form = 0; form < 3; ++form) {
    if (form == 1 && !mla_decode_takes(s.R, s.E)) continue;
    char name[96];
    std::snprintf(name, sizeof(name), "%s B %3d, %6d tokens, H %3d, T %d, %s", s.model, s.B,
                  s.tokens, s.H, T, kForms[form]);
    current_case = name;
    const auto call = [&] { launch(form == 2 ? whole : problem, form == 1, bench.stream); };
    const double us = graph_us(bench.stream, replays, dirty, call);
    const double clean_us = graph_us(bench.stream, replays, [&] { bench.flush_by_read(); }, call);
    const auto with_code = [&](void (Bench::*flush)() const) {
      return graph_us(bench.stream, replays, [&] { bench.forget_code(), (bench.*flush)(); }, call);
    };
    const double code_us = with_code(&Bench::flush_by_write);
    const double clean_code_us = with_code(&Bench::flush_by_read);
    const double hot_us = graph_us(bench.stream, replays, [] {}, call);
    bench.print_row(name, bytes, read_us, us);
    std::printf("  clean L2 %.1f, again %.1f us; code cold: %.1f, clean %.1f us; %.0f TFLOP/s\n",
                clean_us, hot_us, code_us, clean_code_us, flops / us * 1e-6);
  }
  arena.release(mark);
}

int time() {
  constexpr Shape kShapes[] = {
      {"8B", 1, 2048, 32, 160, 64},    {"8B", 1, 32768, 32, 160, 64},
      {"8B", 8, 8192, 32, 160, 64},    {"8B", 64, 8192, 32, 160, 64},
      {"8B", 64, 32768, 32, 160, 64},  {"8B", 256, 2048, 32, 160, 64},
      {"8B", 256, 8192, 32, 160, 64},  {"3B", 1, 2048, 24, 128, 64},
      {"3B", 8, 8192, 24, 128, 64},    {"3B", 8, 32768, 24, 128, 64},
      {"3B", 64, 2048, 24, 128, 64},   {"3B", 64, 8192, 24, 128, 64},
      {"3B", 64, 32768, 24, 128, 64},  {"3B", 256, 8192, 24, 128, 64},
      {"3B", 256, 32768, 24, 128, 64}, {"1B", 64, 8192, 32, 128, 32},
      {"1B", 64, 32768, 32, 128, 32},
  };
  Arena arena(kPoolBytes + (std::size_t{1} << 30));
  char* const pool = arena.take_as_is<char>(kPoolBytes);
  fill(reinterpret_cast<__nv_bfloat16*>(pool), 1, kPoolBytes / 2, kPoolBytes / 2, 1.f, 0.f, 1);
  CUDA_OK(cudaDeviceSynchronize());
  const Bench bench(arena, pool, kPoolBytes);
  Bench::print_header("bf16, pages of 64 tokens; after a write of 256 MB");
  for (const Shape& s : kShapes) time_shape(bench, arena, pool, s, 1);
  for (const int T : {2, 4}) time_shape(bench, arena, pool, {"8B", 64, 8192, 32, 160, 64}, T);
  for (const int H : {8, 16, 64, 128})
    time_shape(bench, arena, pool, {"8B", 64, 8192, H, 160, 64}, 1);
  constexpr Shape kWide[] = {{"DeepSeek", 1, 32768, 128, 512, 64},
                             {"DeepSeek", 8, 8192, 128, 512, 64},
                             {"DeepSeek", 64, 8192, 128, 512, 64},
                             {"DeepSeek", 64, 8192, 64, 512, 64},
                             {"DeepSeek", 64, 8192, 16, 512, 64}};
  for (const Shape& s : kWide) time_shape(bench, arena, pool, s, 1);
  return 0;
}

}  // namespace
}  // namespace zebra::native

int main(int argc, char** argv) {
  return zebra::native::run(argc, argv, zebra::native::check, zebra::native::time);
}
