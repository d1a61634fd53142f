// linear_decode for Hopper (sm_90a): TMA, wgmma, programmatic dependent launch.
//
// Computes       y of linear_decode.h for 16-bit dtypes and at most 128 rows of x (tokens).
// Idea           reading W is the cost, so W is the operand of 64 rows and x, padded to 8, 16, 32,
//                64 or 128 columns, the narrow one.  Every multiprocessor reads an even share of
//                the rows of W, in multiples of 8 where that leaves most of them one, and a product
//                of 64 rows ignores what lies behind them.  So sums need no other CTA, no workspace
//                and no atomics, and one launch is enough.
// Grid           clusters of 1 or 2 CTAs, at most one CTA a multiprocessor; a cluster computes
//                `units` units of outputs in turn (linear_decode_sm90_config.h).  With 32 tokens
//                and more, and few rows, two CTAs share rows and halve K, so that x is read from L2
//                half as often; they exchange sums, each finishes half of the tokens.
// Warps          load (one thread of a warpgroup) | product, 2 warpgroups: 64 rows each where
//                a unit has more than 64, else every other piece of K, or half of 128 tokens.  One
//                warpgroup alone would decide: products of few tokens take as long to issue as HBM
//                takes to bring their weight.
// Long runs      a stage holds 4 boxes along K up to 16 tokens and 2 up to 64, where the ring keeps
//                4 stages: HBM likes runs of 512 bytes.
// Rehearsal      the end of a unit runs once without a store while the first weights are under way.
// End of a unit  nothing hides it in a launch of one unit: four sums are under way at once.  y is
//                what L2 gives up last; behind W it would go to HBM, again and again.  So is x.
// Slices         where a share has at most 16 or 32 rows, the 64 rows of a product are those of 4
//                or 2 pieces of K: a quarter or half of the products, of which the diagonal is
//                summed.
// Norm           of at most 4 rows of x, every CTA makes h = norm(x) in its shared memory while its
//                ring fills; of more, a launch before this one (linear_decode_sm90_norm.cuh).
// Swiglu         the first warpgroup multiplies gate rows, the second the same outputs' up rows.
//                One tensor map has both, of one weight or of two: how far they lie apart is the
//                stride of a dimension.
// Shared memory  a ring of stages (W 12 KB and x), 1 KB of barriers, sums on their way out.
//                Where a CTA reads little more than a multiprocessor holds, and no norm is
//                launched before it, 112 KB: CTAs of two launches fit side by side, and the next
//                launch fills its ring while this one ends.  Else 225 KB.
// Barriers       full (copies), empty of a stage; the peer's sums, twice.  Every warp that waits
//                for stages waits for each: a phase that is let pass looks like the one after the
//                next.
// Launch         with the programmatic attribute.  Under stream capture W is requested into shared
//                memory before the preceding kernels have ended: in a graph they must not write it.
//                Otherwise it is requested into L2, where any write to it is seen.  Dependents
//                may start when a CTA has 64 KB left to ask for, 128 KB with up to 8 tokens.
// Registers      at most 80 a thread up to 64 tokens, so that two CTAs fit; 128 with 128.
// Alignment      rows of x and W, and norm_weight, to 16 bytes; other calls take ATen's product
//                (linear_decode_cuda.cu).
// Bound          HBM: W once.  Through L2 x is read once a CTA (tokens / unit of W's bytes).
// Predicted      in a chain with programmatic edges: the time of reading W at 0.96 of HBM's rate,
//                and 1.2 us (2.2 us where a CTA takes a whole multiprocessor); a norm 0.3 us more
//                with at most 4 rows of x, 1.6 us with more.
// Measured       H200, 2026-11-29 (22a8970): 4096 x 4096 with 1 / 16 / 32 / 64 / 128 rows
//                9.0 / 9.6 / 9.6 / 10.6 / 12.5 us a link: 85 / 80 / 80 / 72 / 61 % of 4.4 TB/s.
//                benchmarks/bench_linear_decode.py --device cuda
#include "linear_decode/linear_decode_sm90_launch.h"

#include "common/cuda/launch.h"
#include "common/sm90/tma.h"
#include "linear_decode/linear_decode_sm90_norm.cuh"

namespace zebra {
namespace sm90 {
namespace {

// Bytes between the gate rows and the up rows.
std::uint64_t linear_parts_distance(const LinearDecodeParams& p) {
  const auto gate = reinterpret_cast<std::uintptr_t>(p.weight),
             up = reinterpret_cast<std::uintptr_t>(p.up_weight);
  return gate < up ? up - gate : gate - up;
}

template <typename T, int kTokens, int kRowTiles, int kSlices>
Status start(const LinearArgs& args, cudaStream_t stream) {
  const auto kernel = linear_decode_sm90_kernel<T, kTokens, kRowTiles, kSlices>;
  const LinearDecodeSm90Config& c = args.cfg;
  Status s = allow_shared_memory(kernel, c.smem_bytes);
  if (s.error == nullptr) s = take_largest_carveout(kernel);
  if (s.error != nullptr) return s;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = kLaunchesOverlap;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(c.cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(c.clusters * c.cluster));
  config.blockDim = dim3(kLinearThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(c.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = c.cluster == 1 ? 1 : 2;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  return error == cudaSuccess ? launch_status() : Status{cudaGetErrorString(error)};
}

template <typename T, int kTokens>
Status with_rows(const LinearArgs& args, cudaStream_t stream) {
  if constexpr (2 * kTokens <= kLinearMostSlicedColumns)
    if (args.cfg.slices == 2) return start<T, kTokens, 1, 2>(args, stream);
  if constexpr (4 * kTokens <= kLinearMostSlicedColumns)
    if (args.cfg.slices == 4) return start<T, kTokens, 1, 4>(args, stream);
  return args.cfg.row_tiles == 1 ? start<T, kTokens, 1, 1>(args, stream)
                                 : start<T, kTokens, 2, 1>(args, stream);
}

template <typename T>
Status with_tokens(const LinearArgs& args, cudaStream_t stream) {
  switch (args.cfg.tokens) {
    case 8:
      return with_rows<T, 8>(args, stream);
    case 16:
      return with_rows<T, 16>(args, stream);
    case 32:
      return with_rows<T, 32>(args, stream);
    case 64:
      return with_rows<T, 64>(args, stream);
    default:
      return with_rows<T, 128>(args, stream);
  }
}

// The maps of the weight (boxes of all boxes' rows, of gate and of up rows with swiglu) and of x.
Status encode_maps(LinearArgs& args) {
  const LinearDecodeParams& p = args.p;
  const LinearDecodeSm90Config& c = args.cfg;
  const bool bf16 = p.dtype == DType::kBFloat16;
  const auto pitch = [&](std::int64_t rows, std::int64_t stride) {
    return static_cast<std::uint64_t>(rows > 1 ? stride : round_up<std::int64_t>(p.K, 8));
  };
  const std::uint32_t halves = p.swiglu ? 2 : 1;
  const std::uint64_t step = pitch(p.outputs, p.weight_stride);
  // Gate and up rows are two halves of one tensor, wherever they lie, the lower ones first.
  args.up_first = p.swiglu && p.up_weight < p.weight;
  const void* const weight = args.up_first ? p.up_weight : p.weight;
  const auto outputs = static_cast<std::uint64_t>(p.outputs);
  const TmaDim single = {static_cast<std::uint64_t>(p.K), 1, kLinearBox};
  const TmaDim along = {kLinearBox, 1, kLinearBox};
  const TmaDim blocks = {static_cast<std::uint64_t>(p.K / kLinearBox), kLinearBox,
                         static_cast<std::uint32_t>(c.boxes)};
  const TmaDim rows = {outputs, step, static_cast<std::uint32_t>(c.box_rows)};
  const TmaDim both = {halves, p.swiglu ? linear_parts_distance(p) / 2 : outputs * step, halves};
  const TmaDim tokens = {static_cast<std::uint64_t>(p.rows), pitch(p.rows, p.x_stride),
                         static_cast<std::uint32_t>(c.x_rows)};
  const auto encode = [&](CUtensorMap* map, const void* from, const TmaDim& dim,
                          const TmaDim& parts) {
    return args.whole ? encode_tensor_map(map, bf16, from, {along, dim, parts, blocks})
                      : encode_tensor_map(map, bf16, from, {single, dim, parts});
  };
  Status s = encode(&args.weight, weight, rows, both);
  if (s.error == nullptr && c.projects && args.also.outputs > 0) {
    const auto others = static_cast<std::uint64_t>(args.also.outputs);
    const std::uint64_t far = pitch(args.also.outputs, args.also.weight_stride);
    s = encode(&args.second, args.also.weight, {others, far, rows.box}, {1, others * far, 1});
  }
  if (s.error != nullptr || args.cfg.norms) return s;  // x is not copied as it is
  return args.whole ? encode_tensor_map(&args.x, bf16, p.x, {along, tokens, blocks})
                    : encode_tensor_map(&args.x, bf16, p.x, {single, tokens});
}

template <typename T, typename Gain>
Status start_norm(const LinearDecodeParams& p, cudaStream_t stream) {
  const auto kernel = linear_decode_norm_kernel<T, Gain>;
  const Status s = take_largest_carveout(kernel);  // to share a multiprocessor with the products
  if (s.error != nullptr) return s;
  return launch_dependent(kernel, dim3(static_cast<unsigned>(p.rows)), dim3(kLinearNormThreads),
                          kLinearNormSmemBytes, stream, static_cast<const T*>(p.x), p.x_stride,
                          static_cast<const Gain*>(p.norm_weight), static_cast<T*>(p.h),
                          static_cast<int>(p.K), static_cast<float>(p.norm_eps));
}

template <typename T>
Status with_norm(LinearArgs& args, cudaStream_t stream) {
  LinearDecodeParams& p = args.p;
  if (p.norm_weight != nullptr && !args.cfg.norms) {
    if (p.h == nullptr) return {"linear_decode on Hopper needs a workspace for the norm"};
    const Status s = p.norm_weight_dtype == DType::kFloat32 ? start_norm<T, float>(p, stream)
                                                            : start_norm<T, T>(p, stream);
    if (s.error != nullptr) return s;
    p.x = p.h, p.x_stride = p.K, p.norm_weight = nullptr;
  }
  const Status s = encode_maps(args);
  return s.error != nullptr ? s : with_tokens<T>(args, stream);
}

}  // namespace

Status linear_decode_launch(const LinearDecodeParams& p, Early early,
                            const LinearDecodeSm90Tuning& tuning, cudaStream_t stream,
                            const LinearProjection* also) {
  LinearArgs args = {};
  args.p = p;
  args.early = early;
  if (also != nullptr) args.also = *also;
  args.cfg =
      select_linear_decode_sm90_config({p.rows, p.outputs, p.K, p.swiglu, p.norm_weight != nullptr,
                                        also != nullptr, args.also.outputs},
                                       multiprocessors(), tuning);
  if (!linear_ring_turns(args.cfg)) return {"the ring does not fit in shared memory"};
  args.whole = p.K % kLinearBox == 0;
  return p.dtype == DType::kBFloat16 ? with_norm<__nv_bfloat16>(args, stream)
                                     : with_norm<__half>(args, stream);
}

}  // namespace sm90

bool linear_decode_sm90_takes(const LinearDecodeParams& p) {
  const auto aligned = [](const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  };
  const auto apart = [&](std::int64_t rows, std::int64_t stride) {
    return rows == 1 || (stride % 8 == 0 && stride >= p.K);
  };
  constexpr std::int64_t kMost = std::int64_t{1} << 30;   // coordinates are 32-bit
  constexpr std::uint64_t kFar = std::uint64_t{1} << 40;  // strides of a tensor map are 40-bit
  if (p.swiglu) {
    const std::uint64_t distance = sm90::linear_parts_distance(p);
    if (!aligned(p.up_weight) || distance == 0 || distance >= kFar) return false;
  }
  return aligned(p.x) && aligned(p.weight) && apart(p.rows, p.x_stride) &&
         apart(p.outputs, p.weight_stride) &&
         (p.norm_weight == nullptr || (aligned(p.norm_weight) && p.K % 8 == 0)) && p.K < kMost &&
         p.outputs < kMost;
}

bool linear_project_sm90_takes(const LinearDecodeParams& p, const LinearProjection& also) {
  LinearDecodeParams second = p;
  second.weight = also.weight, second.weight_stride = also.weight_stride;
  second.outputs = also.outputs;
  const bool pairs = (p.outputs | also.outputs | also.head | also.rope.E) % 2 == 0;
  const bool stored =
      also.cache == nullptr || (reinterpret_cast<std::uintptr_t>(also.cache) % 4 == 0 &&
                                also.page_stride % 2 == 0 && also.row_stride % 2 == 0);
  return !p.swiglu && p.bias == nullptr && p.residual == nullptr && pairs && stored &&
         linear_decode_sm90_takes(p) && (also.outputs == 0 || linear_decode_sm90_takes(second));
}

namespace {

sm90::Early early_on(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  return capture == cudaStreamCaptureStatusActive ? sm90::Early::kIntoShared : sm90::Early::kIntoL2;
}

}  // namespace

Status linear_decode_sm90(const LinearDecodeParams& p, cudaStream_t stream) {
  return sm90::linear_decode_launch(p, early_on(stream), {}, stream);
}

Status linear_project_sm90(const LinearDecodeParams& p, const LinearProjection& also,
                           cudaStream_t stream) {
  return sm90::linear_decode_launch(p, early_on(stream), {}, stream, &also);
}

}  // namespace zebra
