// Checks and times ssd_scan's Hopper kernels without torch: see README.md.
#include <random>

#include "driver.h"
#include "ssd_scan/ssd_scan_sm90_config.h"
#include "ssd_scan_problem.h"

namespace zebra::native {
namespace {

Tally tally;

void set_invariant(bool on) {
  if (on)
    setenv("ZEBRA_BATCH_INVARIANT", "1", 1);
  else
    unsetenv("ZEBRA_BATCH_INVARIANT");
}

// ---- check

// In fp64, token by token: a CTA a head of a sequence, a thread a row of its state.
template <typename T>
__global__ void __launch_bounds__(128) expected_kernel(SsdScanParams p, double* y, double* state) {
  const int sequence = blockIdx.x / p.heads, head = blockIdx.x % p.heads, row = threadIdx.x;
  const long P = p.head_dim, N = p.state_dim;
  long begin = 0, length = p.tokens, batch = sequence;
  if (p.cu_seqlens != nullptr)
    begin = p.cu_seqlens[sequence], length = p.cu_seqlens[sequence + 1] - begin, batch = 0;
  const auto at = [&](const void* t, const SsdStrides& s, long heads, long token) {
    return static_cast<const T*>(t) + batch * s.batch + (begin + token) * s.token +
           head / (p.heads / heads) * s.head;
  };
  const auto value = [](T v) { return static_cast<double>(to_float(v)); };
  const double rate = static_cast<const float*>(p.A)[head];
  const double skip = static_cast<const float*>(p.D)[head];
  const double bias = static_cast<const float*>(p.dt_bias)[head];
  __shared__ double squares[128];
  double h[128];
  const long offset = ((sequence * p.heads + head) * P + row) * N;
  for (int n = 0; n < N; ++n)
    h[n] = p.initial_state == nullptr ? 0 : static_cast<const float*>(p.initial_state)[offset + n];
  for (long t = 0; t < length; ++t) {
    const double v = value(*at(p.dt, p.dt_stride, p.heads, t)) + bias;
    const double step = v > 30 ? v : log1p(exp(v)), decay = exp(rate * step);
    const double x = value(at(p.x, p.x_stride, p.x_heads, t)[row]);
    const T* const B = at(p.B, p.b_stride, p.b_heads, t);
    const T* const C = at(p.C, p.c_stride, p.c_heads, t);
    double out = skip * x;
    for (int n = 0; n < N; ++n) {
      h[n] = decay * h[n] + step * x * value(B[n]);
      out += h[n] * value(C[n]);
    }
    if (p.z != nullptr) {
      const double z = value(at(p.z, p.z_stride, p.heads, t)[row]);
      out *= z / (1 + exp(-z));
    }
    if (p.norm_weight != nullptr) {
      squares[row] = out * out;
      __syncthreads();
      double sum = 0;
      for (int i = 0; i < P; ++i) sum += squares[i];
      __syncthreads();
      out *= value(static_cast<const T*>(p.norm_weight)[head * P + row]) /
             sqrt(sum / static_cast<double>(P) + p.norm_eps);
    }
    y[((batch * p.tokens + begin + t) * p.heads + head) * P + row] = out;
  }
  for (int n = 0; n < N; ++n) state[offset + n] = h[n];
}

double to_double(std::uint16_t bits, bool bf16) {
  if (!bf16) return static_cast<float>(__half(__half_raw{bits}));
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return v;
}

struct Output {
  std::vector<std::uint16_t> y;
  std::vector<float> state;
  explicit Output(const Problem& problem)
      : y(to_host(static_cast<std::uint16_t*>(problem.p.y), problem.outputs())),
        state(to_host(static_cast<float*>(problem.p.final_state), problem.states())) {}
};

// Outputs and workspace are NaN before.
Output run_once(const Problem& problem) {
  CUDA_OK(cudaMemset(problem.p.y, 0xff, problem.outputs() * 2));
  CUDA_OK(cudaMemset(problem.p.final_state, 0xff, problem.states() * 4));
  CUDA_OK(cudaMemset(problem.workspace, 0xff, problem.workspace_bytes));
  launched(ssd_scan_sm90(problem.p, problem.workspace, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  return Output(problem);
}

// Errors of the chunks of one head of one sequence, relative to what is typical there.
struct Sums {
  double error = 0, size = 0;
  bool finite = true;
  void add(double got, double want) {
    finite = finite && std::isfinite(got);
    error += (got - want) * (got - want), size += want * want;
  }
  double relative() const {
    return !finite ? INFINITY : size > 0 ? std::sqrt(error / size) : std::sqrt(error);
  }
};

template <typename T>
void compare(Arena& arena, const Problem& problem, const Case& c, const Output& got) {
  ++tally.runs;
  const SsdScanParams& p = problem.p;
  const long P = p.head_dim, N = p.state_dim;
  const std::size_t mark = arena.mark();
  double* const device_y = arena.take_as_is<double>(problem.outputs() + 1);
  double* const device_state = arena.take_as_is<double>(problem.states() + 1);
  expected_kernel<T><<<static_cast<unsigned>(p.sequences * p.heads), static_cast<unsigned>(P)>>>(
      p, device_y, device_state);
  CUDA_OK(cudaGetLastError());
  const std::vector<double> y = to_host(device_y, problem.outputs());
  const std::vector<double> state = to_host(device_state, problem.states());
  arena.release(mark);

  const double most = c.bf16 ? 4e-3 : 6e-4;
  Sums all_y, all_state;
  int bad = 0;
  std::string report;
  for (long s = 0, begin = 0; s < p.sequences; ++s) {
    const long length = c.lens.empty() ? p.tokens : c.lens[s];
    if (c.lens.empty()) begin = s * p.tokens;
    for (long head = 0; head < p.heads; ++head) {
      std::string where = "\n  sequence " + std::to_string(s) + " head " + std::to_string(head);
      int here = 0;
      for (long t = 0; t < length; t += kSsdChunk) {
        Sums sums;
        long first = -1;
        for (long i = t; i < std::min<long>(t + kSsdChunk, length); ++i)
          for (long k = 0; k < P; ++k) {
            const long at = ((begin + i) * p.heads + head) * P + k;
            const double v = to_double(got.y[at], c.bf16);
            sums.add(v, y[at]), all_y.add(v, y[at]);
            if (first < 0 && !(std::fabs(v - y[at]) <= 0.02 * std::fabs(y[at]) + 0.02)) first = at;
          }
        if (sums.relative() <= 2.5 * most) continue;
        if (here++ == 0 && first >= 0)
          where += ", y of token " + std::to_string(first / P / p.heads - begin) + " row " +
                   std::to_string(first % P) + " is " +
                   std::to_string(to_double(got.y[first], c.bf16)) + " for " +
                   std::to_string(y[first]);
        if (here == 1) where += "; bad chunks:";
        if (here <= 10)
          where +=
              " " + std::to_string(t / kSsdChunk) + " (" + std::to_string(sums.relative()) + ")";
      }
      Sums sums;
      for (long k = 0; k < P * N; ++k) {
        const long at = (s * p.heads + head) * P * N + k;
        sums.add(got.state[at], state[at]), all_state.add(got.state[at], state[at]);
      }
      if (!(sums.relative() <= 2.5 * most))
        ++here, where += "; final state: " + std::to_string(sums.relative());
      if (here > 0 && ++bad <= 6) report += where;
    }
    if (!c.lens.empty()) begin += length;
  }
  if (bad == 0 && all_y.relative() <= most && all_state.relative() <= most) return;
  std::printf(
      "FAIL %s\n  %d heads of sequences are bad; relative error of y %.2e, of the state %.2e "
      "(at most %.1e)%s\n",
      describe(c).c_str(), bad, all_y.relative(), all_state.relative(), most, report.c_str());
  tally.fail();
}

template <typename T>
void check_typed(Arena& arena, const Case& c, unsigned seed) {
  arena.release(0);
  current_case = describe(c);
  set_invariant(c.invariant);
  const Problem problem = make_problem<T>(arena, c, seed);
  const Output first = run_once(problem);
  compare<T>(arena, problem, c, first);
  for (int i = 0; i < 2; ++i) {
    const Output again = run_once(problem);
    ++tally.runs;
    if (same_bytes(first.y, again.y) && same_bytes(first.state, again.state)) continue;
    std::printf("FAIL a repeat of %s differs, from element %zu of y, %zu of the state\n",
                current_case.c_str(), first_difference(first.y, again.y),
                first_difference(first.state, again.state));
    tally.fail();
  }
  set_invariant(false);
}
void check_case(Arena& arena, Case c) {
  static unsigned seed = 0;
  seed += 16;
  if (!c.lens.empty()) {
    c.batch = 1, c.tokens = 0;
    for (const int n : c.lens) c.tokens += n;
  }
  if (c.bf16)
    check_typed<__nv_bfloat16>(arena, c, seed);
  else
    check_typed<__half>(arena, c, seed);
}

void check_random(Arena& arena, int cases) {
  std::mt19937 random(5);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const auto coin = [&] { return below(2) == 0; };
  for (int i = 0; i < cases; ++i) {
    constexpr int kGroups[] = {1, 2, 3, 4};
    const int group = kGroups[below(4)], groups = 1 + below(3), heads = group * groups;
    Case c = {"random",
              1 + below(4),
              1 + below(below(3) == 0 ? 5000 : 700),
              heads,
              coin() ? groups : heads,
              coin() ? groups : 1,
              coin() ? groups : heads,
              coin() ? 64 : 128,
              coin() ? 64 : 128};
    c.bf16 = below(3) > 0, c.gate = coin(), c.norm = coin(), c.initial = coin();
    c.strided = coin(), c.steep = below(4) == 0, c.invariant = below(4) == 0;
    if (below(3) == 0) {
      c.lens.resize(1 + below(12));
      for (int& n : c.lens) n = below(4) == 0 ? below(3) : below(900);
      c.lens.push_back(1);
    }
    check_case(arena, c);
  }
}

int check() {
  Arena arena(std::size_t{6} << 30);
  for (const int P : {64, 128})
    for (const int N : {64, 128})
      for (const bool bf16 : {true, false}) {
        check_case(arena, {"one token", 1, 1, 1, 1, 1, 1, P, N, bf16});
        check_case(arena, {"one chunk", 1, 64, 1, 1, 1, 1, P, N, bf16});
        check_case(arena, {"chunks", 2, 200, 4, 2, 2, 4, P, N, bf16, true, true, true});
        check_case(arena, {"plain", 2, 321, 3, 1, 3, 1, P, N, bf16, false, false});
      }
  tally.section("short");
  for (const int P : {64, 128})
    for (const int N : {64, 128}) {
      // Few heads: as many shares as there are multiprocessors.
      for (const long tokens : {700, 1999, 4096})
        for (const long batch : {1, 2, 3}) {
          check_case(arena, {"cut", batch, tokens, 4, 2, 2, 4, P, N, true, true, true, batch == 2});
          check_case(arena, {"cut", batch, tokens, 6, 2, 1, 6, P, N, false, true, false, true});
        }
      check_case(arena, {"cut, invariant",
                         2,
                         6500,
                         2,
                         1,
                         1,
                         2,
                         P,
                         N,
                         true,
                         true,
                         true,
                         true,
                         true,
                         {},
                         false,
                         true});
      check_case(arena, {"long", 1, 30000, 2, 1, 1, 2, P, N});
    }
  tally.section("cut");
  // Shares of sequences besides whole ones; heads as the models have them.
  check_case(arena, {"3B", 2, 2048, 24, 8, 8, 24, 128, 128, true, true, true, true});
  check_case(arena, {"3B", 5, 1100, 24, 8, 8, 24, 128, 128});
  check_case(arena, {"3B", 9, 600, 24, 8, 8, 24, 128, 128});
  check_case(arena, {"8B", 2, 2048, 32, 8, 8, 32, 128, 128});
  check_case(arena, {"8B", 3, 1100, 32, 8, 8, 32, 128, 128});
  check_case(arena, {"8B", 7, 500, 32, 8, 8, 32, 128, 128});
  check_case(arena, {"1B", 2, 2048, 32, 8, 8, 32, 64, 64});
  check_case(arena, {"1B", 11, 700, 32, 8, 8, 32, 64, 64, true, true, true, true});
  check_case(arena, {"2.7b", 2, 2048, 80, 80, 1, 1, 64, 128, true, true, false});
  check_case(arena, {"2.7b", 1, 4000, 80, 80, 1, 1, 64, 128, true, true, false, true});
  check_case(arena, {"2.7b", 5, 900, 80, 80, 1, 1, 64, 128, true, true, false});
  tally.section("layers");
  for (const bool invariant : {false, true})
    for (const int P : {64, 128}) {
      Case c = {"packed", 1, 0, 4, 2, 2, 4, P, 128, true, true, true, true};
      c.invariant = invariant;
      for (const std::vector<int>& lens :
           {std::vector<int>{0, 1, 0, 63, 64, 65, 0}, std::vector<int>{5000, 3, 0, 1200},
            std::vector<int>(60, 100), std::vector<int>{300, 4097, 1, 700, 64}}) {
        c.lens = lens;
        check_case(arena, c);
      }
    }
  tally.section("packed");
  check_random(arena, 120);
  tally.section("random");
  return tally.finish();
}

// ---- time

double bytes_of(const SsdScanParams& p) {
  const double tokens = static_cast<double>(p.batch * p.tokens);
  const double width = static_cast<double>(p.x_heads * p.head_dim + p.b_heads * p.state_dim +
                                           p.c_heads * p.state_dim + 2 * p.heads * p.head_dim);
  return tokens * 2 * (width + static_cast<double>(p.heads)) +
         4. * static_cast<double>(p.sequences * p.heads * p.head_dim * p.state_dim);
}

// A kernel of a captured launch, to be run alone.
class Node {
 public:
  Node(cudaStream_t stream, const Problem& problem, std::size_t which) : stream_(stream) {
    cudaGraph_t graph;
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launched(ssd_scan_sm90(problem.p, problem.workspace, stream));
    CUDA_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_OK(cudaGraphGetNodes(graph, nullptr, &count));
    std::vector<cudaGraphNode_t> nodes(count);
    CUDA_OK(cudaGraphGetNodes(graph, nodes.data(), &count));
    cudaKernelNodeParams params;
    CUDA_OK(cudaGraphKernelNodeGetParams(nodes[std::min(which, count - 1)], &params));
    cudaGraph_t alone;
    cudaGraphNode_t node;
    CUDA_OK(cudaGraphCreate(&alone, 0));
    CUDA_OK(cudaGraphAddKernelNode(&node, alone, nullptr, 0, &params));
    CUDA_OK(cudaGraphInstantiate(&executable_, alone, 0));
    CUDA_OK(cudaGraphDestroy(alone));
    CUDA_OK(cudaGraphDestroy(graph));
  }
  ~Node() { cudaGraphExecDestroy(executable_); }
  void launch() const { CUDA_OK(cudaGraphLaunch(executable_, stream_)); }
  std::size_t count = 0;  // kernels of the launch

 private:
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

// The median, in us, of a graph after a flush.
double us_of(const Bench& bench, int replays, const std::function<void()>& launch) {
  return replay_us(bench.stream, replays, [&] { bench.flush_by_write(); }, launch);
}

int time() {
  constexpr std::size_t kPoolBytes = std::size_t{2} << 30;
  Arena arena(std::size_t{8} << 30);
  const std::size_t start = arena.mark();
  char* const pool = arena.take_as_is<char>(kPoolBytes);
  CUDA_OK(cudaMemset(pool, 1, kPoolBytes));
  arena.release(start);
  const Bench bench(arena, pool, kPoolBytes);
  const std::size_t mark = arena.mark();
  Bench::print_header("bf16, gate; cold L2 (written)");
  const Case layers[] = {
      {"8B", 0, 0, 32, 8, 8, 32, 128, 128},
      {"3B", 0, 0, 24, 8, 8, 24, 128, 128},
      {"1B", 0, 0, 32, 8, 8, 32, 64, 64},
      {"2.7b", 0, 0, 80, 80, 1, 1, 64, 128, true, true, false},
  };
  const std::pair<long, long> sizes[] = {{2, 8192}, {8, 2048}, {1, 32768}, {4, 16384}};
  for (Case c : layers)
    for (const auto& [batch, tokens] : sizes) {
      arena.release(mark);
      c.batch = batch, c.tokens = tokens;
      current_case = describe(c);
      const Problem problem = make_problem<__nv_bfloat16>(arena, c, 1);
      launched(ssd_scan_sm90(problem.p, problem.workspace, bench.stream));
      CUDA_OK(cudaStreamSynchronize(bench.stream));
      const Graph graph(bench.stream, [&] {
        launched(ssd_scan_sm90(problem.p, problem.workspace, bench.stream));
      });
      const double us = us_of(bench, 15, [&] { graph.launch(); });
      const double again = us_of(bench, 15, [&] { graph.launch(); });
      const Node first(bench.stream, problem, 0), last(bench.stream, problem, 9);
      const double forward = us_of(bench, 7, [&] { last.launch(); });
      const double states = first.count > 1 ? us_of(bench, 7, [&] { first.launch(); }) : 0;
      const std::string name =
          std::string(c.name) + " " + std::to_string(batch) + " x " + std::to_string(tokens);
      bench.print_row(name.c_str(), bytes_of(problem.p), us, us);
      std::printf("  again %.1f; alone: states %.1f, forward %.1f\n", again, states, forward);
    }
  return 0;
}

}  // namespace
}  // namespace zebra::native

int main(int argc, char** argv) {
  return zebra::native::run(argc, argv, zebra::native::check, zebra::native::time);
}
