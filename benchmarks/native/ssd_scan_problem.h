// Problems of ssd_scan's driver: shapes, data, memory.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "ssd_scan/ssd_scan.h"

namespace zebra::native {

struct Case {
  const char* name;
  long batch, tokens, heads, x_heads, b_heads, c_heads;
  int P, N;
  bool bf16 = true, gate = true, norm = true, initial = false, strided = false;
  std::vector<int> lens = {};  // of packed sequences; batch is 1, tokens are their sum
  bool steep = false;          // steps and rates that forget within a few tokens
  bool invariant = false;
};

inline std::string describe(const Case& c) {
  std::string text = std::string(c.name) + ": " + std::to_string(c.batch) + " x " +
                     std::to_string(c.tokens) + ", heads " + std::to_string(c.heads) + " x " +
                     std::to_string(c.x_heads) + " B " + std::to_string(c.b_heads) + " C " +
                     std::to_string(c.c_heads) + ", P " + std::to_string(c.P) + " N " +
                     std::to_string(c.N) + (c.bf16 ? " bf16" : " fp16");
  for (const auto& flag :
       {std::make_pair(c.gate, " z"), std::make_pair(c.norm, " norm"),
        std::make_pair(c.initial, " h0"), std::make_pair(c.strided, " strided"),
        std::make_pair(c.steep, " steep"), std::make_pair(c.invariant, " invariant")})
    if (flag.first) text += flag.second;
  if (!c.lens.empty()) {
    text += " packed";
    for (std::size_t i = 0; i < c.lens.size() && i < 12; ++i)
      text += " " + std::to_string(c.lens[i]);
  }
  return text;
}

struct Problem {
  SsdScanParams p;
  void* workspace;
  std::int64_t workspace_bytes;
  long outputs() const { return p.batch * p.tokens * p.heads * p.head_dim; }
  long states() const { return p.sequences * p.heads * p.head_dim * p.state_dim; }
};

// [batch, tokens, heads, dim]; rows of a strided one have something else behind them.
template <typename T>
const T* make_input(Arena& arena, const Case& c, long heads, long dim, float scale, float shift,
                    unsigned seed, bool strided, SsdStrides* stride) {
  const long row = heads * dim, step = row + (strided ? 72 : 0);
  *stride = {c.tokens * step, step, dim};
  T* const data = arena.take_as_is<T>(c.batch * c.tokens * step + 8);
  if (strided) CUDA_OK(cudaMemset(data, 0xff, c.batch * c.tokens * step * sizeof(T)));
  fill(data, c.batch * c.tokens, row, step, scale, shift, seed);
  return data;
}

template <typename T>
Problem make_problem(Arena& arena, const Case& c, unsigned seed) {
  Problem made = {};
  SsdScanParams& p = made.p;
  p.batch = c.batch, p.tokens = c.tokens, p.heads = c.heads, p.x_heads = c.x_heads;
  p.b_heads = c.b_heads, p.c_heads = c.c_heads, p.head_dim = c.P, p.state_dim = c.N;
  p.sequences = c.lens.empty() ? c.batch : static_cast<long>(c.lens.size());
  p.dtype = c.bf16 ? DType::kBFloat16 : DType::kFloat16;
  p.dt_dtype = p.norm_weight_dtype = p.dtype;
  p.d_dtype = p.dt_bias_dtype = DType::kFloat32;
  p.dt_softplus = true, p.norm_eps = 1e-5;
  const float of_state = 1 / std::sqrt(static_cast<float>(c.N));
  p.x = make_input<T>(arena, c, c.x_heads, c.P, 1.f, 0.f, seed, c.strided, &p.x_stride);
  p.B = make_input<T>(arena, c, c.b_heads, c.N, 1.f, 0.f, seed + 1, c.strided, &p.b_stride);
  p.C = make_input<T>(arena, c, c.c_heads, c.N, of_state, 0.f, seed + 2, c.strided, &p.c_stride);
  p.dt = make_input<T>(arena, c, c.heads, 1, c.steep ? 4.f : 1.f, c.steep ? 0.f : -4.f, seed + 3,
                       c.strided, &p.dt_stride);
  if (c.gate)
    p.z = make_input<T>(arena, c, c.heads, c.P, 1.f, 0.f, seed + 4, c.strided, &p.z_stride);
  float* const rates = arena.take<float>(c.heads);
  fill(rates, 1, c.heads, c.heads, 4.f, -8.f, seed + 5);  // -15 to -1
  float* const skips = arena.take<float>(c.heads);
  fill(skips, 1, c.heads, c.heads, 0.5f, 1.f, seed + 6);
  float* const bias = arena.take<float>(c.heads);
  fill(bias, 1, c.heads, c.heads, 0.3f, 0.f, seed + 7);
  p.A = rates, p.D = skips, p.dt_bias = bias;
  if (c.norm) {
    T* const weight = arena.take<T>(c.heads * c.P);
    fill(weight, 1, c.heads * c.P, c.heads * c.P, 0.3f, 1.f, seed + 8);
    p.norm_weight = weight;
  }
  if (c.initial) {
    float* const h = arena.take_as_is<float>(made.states());
    fill(h, 1, made.states(), made.states(), 0.3f, 0.f, seed + 9);
    p.initial_state = h;
  }
  if (!c.lens.empty()) {
    std::vector<std::int32_t> ends = {0};
    for (const int n : c.lens) ends.push_back(ends.back() + n);
    std::int32_t* const device = arena.take<std::int32_t>(ends.size());
    to_device(device, ends);
    p.cu_seqlens = device;
  }
  p.y = arena.take_as_is<T>(made.outputs() + 8);
  p.final_state = arena.take_as_is<float>(made.states() + 8);
  made.workspace_bytes = ssd_scan_sm90_workspace(p);
  made.workspace = arena.take_as_is<char>(made.workspace_bytes + 16);
  CUDA_OK(cudaDeviceSynchronize());
  return made;
}

}  // namespace zebra::native
