// Cases of mla_decode as its driver makes them on the device.
#pragma once

#include <cmath>
#include <random>

#include "driver.h"
#include "mla_decode/mla_decode.h"
#include "mla_decode/mla_decode_config.h"
#include "mla_decode/mla_decode_weight_config.h"
#include "mla_decode/mla_decode_wide_config.h"

namespace zebra::native {
// What the first column of the cached latents holds, on which the scores then depend.
enum class Content { kRandom, kRising, kFalling, kSpikes, kEqual, kSteps };

struct Case {
  const char* name;
  std::vector<int> lens;
  int T, H, R, E, page;
  bool bf16 = true;
  int split = 0;
  Content content = Content::kRandom;
  int row_pad = 0;     // elements between cached rows; more of them between pages
  bool q_pad = false;  // rows of q apart, and aligned to 4 bytes only
  bool far = false;    // the pages end 6 GiB into the cache: offsets beyond 2^31 elements
  int G = 0, nope = 0, v_dim = 0;  // kv_b_weight's, for G > 0
};

inline std::string describe(const Case& c, const char* route) {
  std::string lens;
  for (std::size_t i = 0; i < c.lens.size() && i < 8; ++i)
    lens += (i > 0 ? " " : "") + std::to_string(c.lens[i]);
  if (c.lens.size() > 8) lens += " ... (" + std::to_string(c.lens.size()) + ")";
  char text[320];
  std::snprintf(text, sizeof(text),
                "%s, %s: R %d + %d, H %d, T %d, page %d, %s, split %d, content %d, row pad %d%s%s, "
                "KV heads %d (%d + %d), lengths %s",
                c.name, route, c.R, c.E, c.H, c.T, c.page, c.bf16 ? "bf16" : "fp16", c.split,
                static_cast<int>(c.content), c.row_pad, c.q_pad ? ", padded q" : "",
                c.far ? ", far" : "", c.G, c.nope, c.v_dim, lens.c_str());
  return text;
}

inline bool takes_tma(const MlaDecodeParams& p) { return mla_decode_tma_takes(p.R, p.E, p.page); }
inline bool takes_wide(const MlaDecodeParams& p) {
  return mla_wide_takes(p.R, p.E, p.page) && mla_wide_is_better(p.T * p.H, p.R);
}
// As the launchers choose, for their workspaces and for reports.
inline MlaDecodeConfig config_of(const MlaDecodeParams& p, bool portable) {
  const MlaDecodeShape shape = {p.B,
                                p.T * p.H,
                                p.R,
                                p.E,
                                p.max_pages * p.page,
                                p.split_size,
                                !portable && takes_tma(p),
                                p.weight != nullptr};
  return !portable && takes_wide(p)
             ? select_mla_wide_config(shape, multiprocessors())
             : select_mla_decode_config(shape, multiprocessors(),
                                        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}
inline MlaWeightConfig weight_config_of(const MlaDecodeParams& p) {
  return select_mla_weight_config(
      {p.B * p.T * p.H, p.H, p.G, p.nope, p.v_dim, p.R, p.E, p.split_size > 0}, multiprocessors(),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

inline void print_config(const MlaDecodeConfig& c) {
  std::printf(
      "  instance %d + %d, groups %d, passes %d, halves %d, streams %d, slots %d, CTAs %d, units "
      "%ld, partials %ld\n",
      c.rank, c.rope, c.groups, c.passes, c.halves, c.streams, c.slots, c.ctas,
      static_cast<long>(c.units), static_cast<long>(c.partials));
}

template <typename T>
__global__ void fill_cache_kernel(T* cache, MlaDecodeParams p, unsigned seed, Content content) {
  const long b = blockIdx.y;
  for (int t = blockIdx.x; t < p.seq_lens[b]; t += gridDim.x) {
    const long page = p.block_table[b * p.table_stride + t / p.page];
    T* const row = cache + page * p.page_stride + t % p.page * p.row_stride;
    for (int d = threadIdx.x; d < p.R + p.E; d += blockDim.x) {
      float v = random_value(b * 100000007 + t * 1031l + d, seed);
      if (content == Content::kEqual) v = 0.5f;
      if (d == 0) {
        if (content == Content::kRising) v = 3.f * t;
        if (content == Content::kFalling) v = -3.f * t;
        if (content == Content::kSpikes) v = t % 7 == 0 ? 100.f : -100.f;
        if (content == Content::kSteps) v = 4.f * (t / 64);
      }
      row[d] = from_float<T>(v);
    }
  }
}

struct Problem {
  MlaDecodeParams p = {};
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  long rows() const { return p.B * p.T * p.H; }
};

// Where outputs and partial results go, for whichever kernel needs more.
inline void take_outputs(Arena& arena, Problem& problem) {
  MlaDecodeParams& p = problem.p;
  p.o = arena.take<std::uint16_t>(problem.rows() * p.v_dim);
  p.lse = arena.take<float>(problem.rows());
  std::int64_t bytes = config_of(p, false).workspace_bytes;
  if (mla_decode_takes(p.R, p.E)) bytes = std::max(bytes, config_of(p, true).workspace_bytes);
  if (p.weight != nullptr)
    bytes = round_up<std::int64_t>(bytes, 256) + weight_config_of(p).workspace_bytes;
  problem.workspace_bytes = bytes;
  problem.workspace = arena.take<char>(problem.workspace_bytes);
}

// kv_b_weight of p's sizes, such that latent queries and outputs have a variance of about 1.
template <typename T>
void take_weight(Arena& arena, MlaDecodeParams& p, int G, int nope, int v_dim, unsigned seed) {
  p.G = G, p.nope = nope, p.v_dim = v_dim;
  T* const weight = arena.take<T>(G * (nope + v_dim) * p.R);
  const float scale = 1 / std::sqrt(static_cast<float>(nope > 0 ? nope : 1));
  fill(weight, G * (nope + v_dim), p.R, p.R, scale, 0.f, seed);
  p.weight = weight;
}

constexpr std::size_t kFarBytes = std::size_t{6} << 30;

template <typename T>
Problem make_problem(Arena& arena, const Case& c, unsigned seed) {
  Problem made;
  MlaDecodeParams& p = made.p;
  const int width = c.R + c.E;
  p.B = static_cast<long>(c.lens.size()), p.T = c.T, p.H = c.H, p.G = 1;
  p.R = p.v_dim = c.R, p.E = c.E, p.page = c.page, p.split_size = c.split;
  p.scale = 1 / std::sqrt(static_cast<double>(width));
  p.dtype = c.bf16 ? DType::kBFloat16 : DType::kFloat16;
  long used = 0;
  for (const int length : c.lens) {
    const long pages = ceil_div(length, c.page);
    used += pages;
    p.max_pages = std::max<long>(p.max_pages, pages);
  }
  p.max_pages += 1, p.table_stride = p.max_pages + 2, p.seq_lens_stride = 1;
  p.row_stride = width + c.row_pad;
  p.page_stride = p.row_stride * c.page + (c.row_pad > 0 ? 16 : 0);

  const long pages = used + 3;
  long first_page = 0;
  T* cache;
  if (c.far) {
    first_page = static_cast<long>(kFarBytes / sizeof(T)) / p.page_stride - pages;
    cache = arena.take_as_is<T>(kFarBytes / sizeof(T));
    CUDA_OK(
        cudaMemset(cache + first_page * p.page_stride, 0xff, pages * p.page_stride * sizeof(T)));
  } else {
    cache = arena.take<T>(pages * p.page_stride);
  }
  p.cache = cache, p.pages = first_page + pages;
  std::vector<int> ids(pages);
  for (long i = 0; i < pages; ++i) ids[i] = static_cast<int>(first_page + i);
  std::shuffle(ids.begin(), ids.end(), std::mt19937(seed));
  // No page where no token is: far outside, or negative.
  std::vector<int> table(p.B * p.table_stride, 2147480000);
  long next = 0;
  for (long b = 0; b < p.B; ++b) {
    int* const row = &table[b * p.table_stride];
    const long own = ceil_div(c.lens[b], c.page);
    for (long i = 0; i < own; ++i) row[i] = ids[next++];
    row[p.max_pages - 1] = -1;
  }
  int* const device_table = arena.take<int>(table.size());
  to_device(device_table, table);
  p.block_table = device_table;
  int* const lens = arena.take<int>(c.lens.size());
  to_device(lens, c.lens);
  p.seq_lens = lens;
  fill_cache_kernel<T><<<dim3(64, static_cast<unsigned>(p.B)), 128>>>(cache, p, seed, c.content);
  CUDA_OK(cudaGetLastError());

  const int q_width = c.G > 0 ? c.nope + c.E : width;
  if (c.G > 0) take_weight<T>(arena, p, c.G, c.nope, c.v_dim, seed + 9);
  p.q_stride[2] = q_width + (c.q_pad ? 24 : 0);
  p.q_stride[1] = p.q_stride[2] * c.H, p.q_stride[0] = p.q_stride[1] * c.T;
  T* const q = arena.take<T>(p.B * p.q_stride[0] + 8) + (c.q_pad ? 2 : 0);
  fill(q, made.rows(), q_width, p.q_stride[2], 1.f, 0.f, seed + 5);
  p.q = q;
  take_outputs(arena, made);
  CUDA_OK(cudaDeviceSynchronize());
  return made;
}

}  // namespace zebra::native
