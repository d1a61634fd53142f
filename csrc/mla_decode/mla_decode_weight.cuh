// mla_decode on CUDA with kv_b_weight: the launches before and after the attention kernel.
//
// Three grids in a chain of programmatic edges.  What one reads before it waits must not be written
// by the grids ahead of it, and those that end before its predecessor's wait returns have ended for
// it, too: the absorption lets the attention kernel start only after its own wait, so lengths,
// table and cache are there.  The weight is asked for ahead of all earlier grids under stream
// capture only, where nobody could write it in between but the graph itself.
#pragma once

#include "common/cuda/launch.h"
#include "mla_decode/mla_decode_absorb.cuh"
#include "mla_decode/mla_decode_expand.cuh"

namespace zebra {
namespace {

inline MlaWeightConfig mla_weight_config(const MlaDecodeParams& p) {
  return select_mla_weight_config(
      {p.B * p.T * p.H, p.H, p.G, p.nope, p.v_dim, p.R, p.E, p.split_size > 0}, multiprocessors(),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Launches one of the kernels of a call.
template <typename... Args>
Status mla_launch_kernel(const LaunchOptions& options, void (*kernel)(Args...), dim3 grid,
                         int threads, int smem, cudaStream_t stream, const Args&... args) {
  const Status s = take_largest_carveout(kernel);
  if (s.error != nullptr) return s;
  return launch_kernel(options, kernel, grid, dim3(static_cast<unsigned>(threads)),
                       static_cast<std::size_t>(smem), stream, args...);
}

inline bool mla_is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  return capture == cudaStreamCaptureStatusActive;
}

// Writes latent queries [B, T, H, R + E] in p.dtype.
template <typename T>
Status mla_launch_absorb(const MlaDecodeParams& p, void* latent, cudaStream_t stream) {
  const MlaWeightConfig c = mla_weight_config(p);
  MlaAbsorbArgs a = {};
  a.q = p.q, a.weight = p.weight, a.latent = latent;
  for (int d = 0; d < 3; ++d) a.q_stride[d] = p.q_stride[d];
  a.head_stride = (p.nope + p.v_dim) * p.R;
  a.tokens = mla_divisor(p.T), a.group = mla_divisor(p.H / p.G);
  a.rows = static_cast<int>(p.B * p.T * (p.H / p.G)), a.heads = static_cast<int>(p.H);
  a.nope = static_cast<int>(p.nope), a.R = static_cast<int>(p.R), a.E = static_cast<int>(p.E);
  a.weight_pitch = c.absorb_weight_pitch, a.q_pitch = c.absorb_q_pitch;
  std::int64_t alignment = reinterpret_cast<std::intptr_t>(p.q);
  for (int d = 0; d < 3; ++d) alignment |= p.q_stride[d] * 2;
  a.q_is_aligned = alignment % 16 == 0;
  a.is_weight_early = mla_is_captured(stream);
  const auto kernel = mla_absorb_kernel<T>;
  const Status s = allow_shared_memory(kernel, c.absorb_smem_bytes);
  if (s.error != nullptr) return s;
  const dim3 grid(static_cast<unsigned>(p.G), c.absorb_slices, c.absorb_columns);
  return mla_launch_kernel({true}, kernel, grid, kMlaAbsorbThreads, c.absorb_smem_bytes, stream, a);
}

// What an attention kernel leaves: latent outputs of items that it had whole (a unit's count is 1),
// partial results of the others, nothing for those without tokens (0).
struct MlaPartials {
  const MlaLine* line;   // that the attention kernel dealt; nullptr: `units` alone tell
  const MlaUnit* units;  // [sequences x passes]
  const float2* stats;   // [partials, pass_rows]: reference to base 2, sum
  const float* sums;     // [partials, pass_rows, rank]
  const void* latent;    // [B, T, H, R] in p.dtype
  int rank, pass_rows, passes;
};

// Writes o, and lse of items in more than one partial result.
template <typename T>
Status mla_launch_expand(const MlaDecodeParams& p, const MlaPartials& from, cudaStream_t stream) {
  const MlaWeightConfig c = mla_weight_config(p);
  MlaExpandArgs a = {};
  if (from.line != nullptr) a.line = *from.line;
  a.finds_units = from.line != nullptr && from.line->batch <= kMlaLaneBatch;
  a.units = from.units, a.stats = from.stats;
  a.sums = reinterpret_cast<const float4*>(from.sums);
  a.latent = static_cast<const uint2*>(from.latent);
  a.weight = static_cast<const T*>(p.weight) + p.nope * p.R;
  a.o = p.o, a.lse = static_cast<float*>(p.lse);
  a.head_stride = (p.nope + p.v_dim) * p.R;
  a.tokens = mla_divisor(p.T), a.group = mla_divisor(p.H / p.G);
  a.quads = mla_divisor(p.R / 4), a.slots = mla_divisor(c.rows * p.R / 4);
  a.pass = mla_divisor(from.pass_rows), a.passes = from.passes;
  a.rows = static_cast<int>(p.B * p.T * (p.H / p.G)), a.heads = static_cast<int>(p.H);
  a.rank_quads = from.rank / 4, a.R = static_cast<int>(p.R), a.v_dim = static_cast<int>(p.v_dim);
  a.tile_rows = c.rows, a.lanes = c.lanes, a.width = c.width, a.pitch = c.pitch;
  a.is_weight_early = mla_is_captured(stream);
  const auto kernel = mla_expand_kernel<T>;
  const Status s = allow_shared_memory(kernel, c.expand_smem_bytes);
  if (s.error != nullptr) return s;
  const dim3 grid(static_cast<unsigned>(p.G), c.expand_slices, c.widths);
  return mla_launch_kernel({true}, kernel, grid, c.threads, c.expand_smem_bytes, stream, a);
}

}  // namespace
}  // namespace zebra
