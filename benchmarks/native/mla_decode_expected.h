// What mla_decode must give, in fp64 from its equation, and how results differ from it.
#pragma once

#include "mla_decode_problem.h"

namespace zebra::native {

inline Tally tally;

struct Output {
  std::vector<std::uint16_t> o;
  std::vector<float> lse;
  explicit Output(const Problem& problem)
      : o(to_host(static_cast<std::uint16_t*>(problem.p.o), problem.rows() * problem.p.v_dim)),
        lse(to_host(static_cast<float*>(problem.p.lse), problem.rows())) {}
  bool operator==(const Output& other) const {
    return same_bytes(o, other.o) && same_bytes(lse, other.lse);
  }
};

// In fp64, a CTA a row of q.  `size` is sum p |c|: what errors of o are relative to.
template <typename T>
__global__ void __launch_bounds__(128) expected_kernel(MlaDecodeParams p, double* o, double* size,
                                                       double* lse, double* scores, long most) {
  const long row = blockIdx.x, b = row / (p.T * p.H), t = row / p.H % p.T, h = row % p.H;
  const long limit = p.seq_lens[b] - p.T + t + 1;  // tokens that this one sees, if positive
  const T* const q =
      static_cast<const T*>(p.q) + b * p.q_stride[0] + t * p.q_stride[1] + h * p.q_stride[2];
  const auto cached = [&](long j) {
    const long page = p.block_table[b * p.table_stride + j / p.page];
    return static_cast<const T*>(p.cache) + page * p.page_stride + j % p.page * p.row_stride;
  };
  double* const score = scores + row * most;
  __shared__ double parts[128];
  double top = -INFINITY;
  for (long j = threadIdx.x; j < limit; j += 128) {
    const T* const c = cached(j);
    double sum = 0;
    for (long d = 0; d < p.R + p.E; ++d)
      sum += static_cast<double>(to_float(q[d])) * static_cast<double>(to_float(c[d]));
    score[j] = sum * p.scale;
    top = fmax(top, score[j]);
  }
  parts[threadIdx.x] = top;
  __syncthreads();
  for (int i = 0; i < 128; ++i) top = fmax(top, parts[i]);
  __syncthreads();
  double total = 0;
  for (long j = threadIdx.x; j < limit; j += 128) total += score[j] = exp(score[j] - top);
  parts[threadIdx.x] = total;
  __syncthreads();
  total = 0;
  for (int i = 0; i < 128; ++i) total += parts[i];
  for (long d = threadIdx.x; d < p.R; d += 128) {
    double sum = 0, absolute = 0;
    for (long j = 0; j < limit; ++j) {
      const double v = score[j] * static_cast<double>(to_float(cached(j)[d]));
      sum += v, absolute += fabs(v);
    }
    o[row * p.R + d] = limit > 0 ? sum / total : 0;
    size[row * p.R + d] = limit > 0 ? absolute / total : 0;
  }
  if (threadIdx.x == 0) lse[row] = limit > 0 ? top + log(total) : -INFINITY;
}

// Latent queries in fp64, rounded once; a CTA a row.
template <typename T>
__global__ void expected_queries_kernel(MlaDecodeParams p, T* latent) {
  const long row = blockIdx.x, b = row / (p.T * p.H), t = row / p.H % p.T, h = row % p.H;
  const T* const q =
      static_cast<const T*>(p.q) + b * p.q_stride[0] + t * p.q_stride[1] + h * p.q_stride[2];
  const T* const up = static_cast<const T*>(p.weight) + h / (p.H / p.G) * (p.nope + p.v_dim) * p.R;
  for (long r = threadIdx.x; r < p.R + p.E; r += blockDim.x) {
    double sum = 0;
    for (long d = 0; d < p.nope && r < p.R; ++d)
      sum += static_cast<double>(to_float(q[d])) * static_cast<double>(to_float(up[d * p.R + r]));
    latent[row * (p.R + p.E) + r] =
        r < p.R ? from_float<T>(static_cast<float>(sum)) : q[p.nope + r - p.R];
  }
}
// What the value rows of the weight make of latent outputs and their sizes; a CTA a row.
template <typename T>
__global__ void expected_values_kernel(MlaDecodeParams p, const double* latent,
                                       const double* latent_size, double* o, double* size) {
  const long row = blockIdx.x, h = row % p.H;
  const T* const up =
      static_cast<const T*>(p.weight) + (h / (p.H / p.G) * (p.nope + p.v_dim) + p.nope) * p.R;
  for (long d = threadIdx.x; d < p.v_dim; d += blockDim.x) {
    double sum = 0, absolute = 0;
    for (long r = 0; r < p.R; ++r) {
      const double w = static_cast<double>(to_float(up[d * p.R + r]));
      sum += w * latent[row * p.R + r], absolute += fabs(w) * latent_size[row * p.R + r];
    }
    o[row * p.v_dim + d] = sum, size[row * p.v_dim + d] = absolute;
  }
}

inline double to_double(std::uint16_t bits, bool bf16) {
  if (bf16) {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
  }
  return static_cast<float>(__half(__half_raw{bits}));
}

inline std::string counts(const char* name, const std::vector<long>& bad, std::size_t most) {
  std::string text = std::string("\n  bad by ") + name + ":";
  for (std::size_t i = 0; i < bad.size() && i < most; ++i) text += " " + std::to_string(bad[i]);
  return text;
}

// The absorption's own result, where it left it: a fault there would be one everywhere else.
inline void compare_queries(const Problem& problem, const std::vector<std::uint16_t>& want,
                            const Case& c, const char* route) {
  const MlaDecodeParams& p = problem.p;
  const bool portable = std::strcmp(route, "cp.async") == 0;
  const std::vector<std::uint16_t> got =
      to_host(reinterpret_cast<std::uint16_t*>(
                  static_cast<char*>(problem.workspace) +
                  round_up<std::int64_t>(config_of(p, portable).workspace_bytes, 256)),
              want.size());
  const double unit = c.bf16 ? 1. / 128 : 1. / 1024;  // the next number may be as near
  long bad = 0, first = -1;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double v = to_double(got[i], c.bf16), e = to_double(want[i], c.bf16);
    if (std::fabs(v - e) <= unit * std::fabs(e) + 1e-5) continue;
    if (bad++ == 0) first = static_cast<long>(i);
  }
  if (bad == 0) return;
  const long width = p.R + p.E;
  std::printf(
      "FAIL absorbed queries, %s\n  bad: %ld of %zu; first: row %ld, column %ld: got %g, "
      "expected %g\n",
      describe(c, route).c_str(), bad, want.size(), first / width, first % width,
      to_double(got[first], c.bf16), to_double(want[first], c.bf16));
  tally.fail();
}

// Reports what is wrong with the outputs that a kernel has just written.
template <typename T>
void compare(Arena& arena, const Problem& problem, const Case& c, const char* route) {
  ++tally.runs;
  const MlaDecodeParams& p = problem.p;
  const long rows = problem.rows(), row_count = p.T * p.H;
  const long most = std::max(1, *std::max_element(c.lens.begin(), c.lens.end()));
  const std::size_t mark = arena.mark();
  double* device_o = arena.take_as_is<double>(rows * p.R);
  double* device_size = arena.take_as_is<double>(rows * p.R);
  double* const device_lse = arena.take_as_is<double>(rows);
  double* const scores = arena.take_as_is<double>(rows * most);
  const unsigned grid = static_cast<unsigned>(rows);
  MlaDecodeParams latent = p;
  T* queries = nullptr;
  if (p.weight != nullptr) {
    queries = arena.take_as_is<T>(rows * (p.R + p.E));
    expected_queries_kernel<T><<<grid, 128>>>(p, queries);
    latent.q = queries, latent.q_stride[2] = p.R + p.E;
    latent.q_stride[1] = p.H * latent.q_stride[2], latent.q_stride[0] = p.T * latent.q_stride[1];
  }
  expected_kernel<T><<<grid, 128>>>(latent, device_o, device_size, device_lse, scores, most);
  if (p.weight != nullptr) {
    double* const from = device_o;
    double* const from_size = device_size;
    device_o = arena.take_as_is<double>(rows * p.v_dim);
    device_size = arena.take_as_is<double>(rows * p.v_dim);
    expected_values_kernel<T><<<grid, 128>>>(p, from, from_size, device_o, device_size);
  }
  CUDA_OK(cudaGetLastError());
  const long count = rows * p.v_dim;
  const std::vector<double> want = to_host(device_o, count), size = to_host(device_size, count);
  const std::vector<double> want_lse = to_host(device_lse, rows);
  if (p.weight != nullptr)
    compare_queries(problem, to_host(reinterpret_cast<std::uint16_t*>(queries), rows * (p.R + p.E)),
                    c, route);
  arena.release(mark);
  const Output got(problem);

  // p and o are rounded once each, by half of `unit`; twice that, and what exponents of steep
  // scores lose in fp32.
  const double unit = c.bf16 ? 1. / 256 : 1. / 2048, most_rms = c.bf16 ? 4e-3 : 6e-4;
  // Absorbed queries are rounded to 16 bits, and the next number may be as near as the expected
  // one: a few of them move a score by some units of 2^-9 (fp16: 2^-12) over the root of their
  // number.
  const double lse_unit = p.weight == nullptr ? 2e-4 : c.bf16 ? 2e-3 : 4e-4;
  std::vector<long> by_column(ceil_div<long>(p.v_dim, 16)), by_row(row_count), by_sequence(p.B);
  long bad = 0, first = -1, bad_lse = 0, first_lse = -1;
  double errors = 0, sizes = 0;
  for (long i = 0; i < count; ++i) {
    const double error = std::fabs(to_double(got.o[i], c.bf16) - want[i]);
    errors += error * error, sizes += size[i] * size[i];
    if (error <= unit * (std::fabs(want[i]) + size[i]) + 5e-4 * size[i]) continue;
    if (bad++ == 0) first = i;
    const long row = i / p.v_dim;
    ++by_column[i % p.v_dim / 16], ++by_row[row % row_count], ++by_sequence[row / row_count];
  }
  for (long i = 0; i < rows; ++i) {
    const double v = got.lse[i], e = want_lse[i];
    if (std::isinf(e) ? v == e : std::fabs(v - e) <= lse_unit * std::max(1., std::fabs(e)))
      continue;
    if (bad_lse++ == 0) first_lse = i;
  }
  const double rms = sizes > 0 ? std::sqrt(errors / sizes) : 0;
  if (bad == 0 && bad_lse == 0 && rms <= most_rms) return;

  std::printf(
      "FAIL %s\n  bad: %ld of %ld of o, %ld of %ld of lse; relative error %.2e (at most %.1e)",
      describe(c, route).c_str(), bad, count, bad_lse, rows, rms, most_rms);
  const auto where = [&](long row) {
    return "[b " + std::to_string(row / row_count) + ", t " + std::to_string(row / p.H % p.T) +
           ", h " + std::to_string(row % p.H) + "]";
  };
  if (first >= 0)
    std::printf("\n  first of o %s, d %ld: got %g, expected %g", where(first / p.v_dim).c_str(),
                first % p.v_dim, to_double(got.o[first], c.bf16), want[first]);
  if (first_lse >= 0)
    std::printf("\n  first of lse %s: got %g, expected %g", where(first_lse).c_str(),
                static_cast<double>(got.lse[first_lse]), want_lse[first_lse]);
  if (bad > 0)
    std::printf("%s%s%s", counts("16 columns", by_column, 16).c_str(),
                counts("row (t, h)", by_row, 40).c_str(),
                counts("sequence", by_sequence, 24).c_str());
  std::printf("\n");
  print_config(config_of(p, std::strcmp(route, "cp.async") == 0));
  tally.fail();
}

}  // namespace zebra::native
