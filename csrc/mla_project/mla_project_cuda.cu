// mla_project: launchers of the rotation kernels (mla_project_rotate.cuh).
#include "common/cuda/launch.h"
#include "common/token_tile.h"
#include "mla_project/mla_project_rotate.cuh"

namespace zebra {
namespace {

constexpr int kSteps = select_token_tile(1).steps;

// Runs launch(kVec, grid, block) for the vectors of a token.
template <typename Launch>
Status over_tokens(std::int64_t tokens, const ProjectVecs& n, const Launch& launch) {
  const TokenTile tile = select_token_tile(n.q + n.c + n.k);
  if (tokens == 0 || tile.passes == 0) return {};
  launch(static_cast<unsigned>(ceil_div(tokens, tile.tokens())), dim3(tile.x, tile.y));
  return launch_status();
}

int vecs(std::int64_t elements, int vec) {
  return static_cast<int>(ceil_div<std::int64_t>(elements, vec));
}

template <typename T, int kVec>
Status forward_tiled(const MlaProjectParams& p, CUstream_st* stream) {
  ProjectVecs n{};
  n.per_head = vecs(p.rope.E, kVec);
  n.q = static_cast<int>(p.H) * n.per_head;
  n.k = n.per_head;
  if (p.c != p.latent || p.cache != nullptr) n.c = vecs(p.R, kVec);
  return over_tokens(p.tokens, n, [&](unsigned grid, dim3 block) {
    mla_project_kernel<T, kVec / 2, kSteps><<<grid, block, 0, stream>>>(p, n);
  });
}

template <typename T, int kVec>
Status backward_tiled(const MlaProjectBackwardParams& p, CUstream_st* stream) {
  ProjectVecs n{};
  n.per_head = vecs(p.q_dim - p.rope.E, kVec) + vecs(p.rope.E, kVec);
  n.q = static_cast<int>(p.H) * n.per_head;
  n.c = vecs(p.R, kVec), n.k = vecs(p.rope.E, kVec);
  return over_tokens(p.tokens, n, [&](unsigned grid, dim3 block) {
    mla_project_backward_kernel<T, kVec / 2, kSteps><<<grid, block, 0, stream>>>(p, n);
  });
}

// Both tables are fp32: a vector of 8 pairs' worth of them needs 16-byte rows too.
bool tables_aligned(const RopeTable& rope) {
  return rows_aligned<float>(rope.E / 2, {rope.cos, rope.sin}, {});
}

template <typename T>
Status forward(const MlaProjectParams& p, CUstream_st* stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool wide =
      tables_aligned(p.rope) &&
      rows_aligned<T>(p.rope.E, {p.q, p.c, p.k, p.latent, p.cache},
                      {p.q_dim, p.R, p.c_stride, p.k_stride, p.page_stride, p.row_stride});
  return wide ? forward_tiled<T, kVec>(p, stream) : forward_tiled<T, 2>(p, stream);
}

template <typename T>
Status backward(const MlaProjectBackwardParams& p, CUstream_st* stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool wide =
      tables_aligned(p.rope) &&
      rows_aligned<T>(p.rope.E, {p.dq, p.dc, p.dk, p.dq_raw, p.dkv_raw},
                      {p.q_dim, p.R, p.dc_stride, p.dk_stride, p.dq_raw_stride, p.dkv_raw_stride});
  return wide ? backward_tiled<T, kVec>(p, stream) : backward_tiled<T, 2>(p, stream);
}

}  // namespace

Status mla_project_cuda(const MlaProjectParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.dtype, forward, p, stream);
}

Status mla_project_backward_cuda(const MlaProjectBackwardParams& p, CUstream_st* stream) {
  ZEBRA_DISPATCH_CUDA(p.dtype, backward, p, stream);
}

}  // namespace zebra
