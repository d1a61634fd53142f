// linear_decode for Hopper (sm_90a): TMA, wgmma, programmatic dependent launch.
//
// Computes       y of linear_decode.h for 16-bit dtypes and at most 128 rows of x (tokens).
// Idea           reading W is the cost, so W is the operand of 64 rows and x, padded to 8, 16, 32,
//                64 or 128 tokens, the narrow one.  Every multiprocessor reads an even share of
//                the rows of W, to the row: a copy brings as many rows as the share has, and a
//                product of 64 rows ignores what lies behind them.  So sums need no other CTA, no
//                workspace and no atomics, and one launch is enough.
// Grid           clusters of 1 or 2 CTAs, at most one CTA a multiprocessor; a cluster computes
//                `units` units of outputs in turn (linear_decode_sm90_config.h).  With 64 tokens
//                and more, and few rows, two CTAs share rows and halve K, so that x is read from L2
//                half as often; they exchange sums, each finishes half of the tokens.
// Warps          load (one thread) | squares of x, 3 warps | product, a warpgroup for 64 rows (1 or
//                2).
// Slices         where a share has at most 16 or 32 rows, the 64 rows of a product are those of 4
//                or 2 pieces of K: a quarter or half of the products, of which the diagonal is
//                summed.  So small weights, which are in shared memory before x is, do not wait on
//                the tensor cores.
// Norm           y = rms(x)^-1 (W gain) x: with a norm W goes through registers, where it is
//                multiplied by the gain, whatever the number of tokens; the squares of x are summed
//                beside the products, whose sums are scaled at the end.  (Multiplying x by the gain
//                in shared memory, between copy and product, made every stage wait for it.)
// Swiglu         the first warpgroup multiplies gate rows, the second the same outputs' up rows.
// Shared memory  a ring of stages (W 8 KB or more, x), their gains, 3 KB of barriers, sums on
//                their way out.  Where 64 rows of W meet at most 64 tokens, 113 KB: CTAs of two
//                launches fit side by side, and the next launch fills its ring while this one ends.
// L2             what the ring does not hold is asked for into L2 while x is not there yet, so that
//                HBM does not idle from one launch to the next.
// Barriers       full (copies), empty of a stage; squares; the peer's sums, twice.
// Launch         with the programmatic attribute.  Under stream capture W is requested into shared
//                memory before the preceding kernel has ended: in a graph it must not be written by
//                the launch just before.  Otherwise it is requested into L2, where any write to it
//                is seen.  Dependents start when the last copy is issued.
// Registers      at most 128 a thread with 64 rows of W (128 tokens: 88 and 168, moved between the
//                warpgroups), 80 with 128 rows and up to 32 tokens, 168 beyond.
// Alignment      rows of x and W, and norm_weight, to 16 bytes; other calls take the portable
//                kernel (linear_decode_cuda.cu).
// Bound          HBM: W once.  Through L2 x is read once a CTA (tokens / unit of W's bytes).
// Predicted      in a chain with programmatic edges, over the time of reading W: 4096 x 4096 1.08
// up
//                to 16 tokens, 1.15 at 32, 1.2 at 64, 1.5 at 128, a norm 0.03 more; 128256 x 4096
//                1.05 up to 64 tokens.  2048 x 2048 is bound by latency: 4 us up to 16 tokens.
// Measured       not yet.
#include "linear_decode/linear_decode_sm90_launch.h"

#include "common/cuda/launch.h"
#include "common/sm90/tma.h"

namespace zebra {
namespace sm90 {
namespace {

int multiprocessors() {
  int device = 0, sms = 132;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  return sms;
}

template <typename T, int kTokens, int kRowTiles, int kSlices>
Status start(const LinearArgs& args, cudaStream_t stream) {
  const auto kernel = linear_decode_sm90_kernel<T, kTokens, kRowTiles, kSlices>;
  const LinearDecodeSm90Config& c = args.cfg;
  // The largest carve-out always: launches of different carve-outs cannot share a multiprocessor.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c.smem_bytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(c.cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(c.clusters * c.cluster));
  config.blockDim = dim3(128 * (1 + kRowTiles));
  config.dynamicSmemBytes = static_cast<std::size_t>(c.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = c.cluster == 1 ? 1 : 2;
  error = cudaLaunchKernelEx(&config, kernel, args);
  return error == cudaSuccess ? launch_status() : Status{cudaGetErrorString(error)};
}

template <typename T, int kTokens>
Status with_rows(const LinearArgs& args, cudaStream_t stream) {
  if constexpr (kTokens <= kLinearMostSlicedTokens) {
    if (args.cfg.slices == 2) return start<T, kTokens, 1, 2>(args, stream);
    if (args.cfg.slices == 4) return start<T, kTokens, 1, 4>(args, stream);
  }
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

// Rows of K elements in boxes of `box_rows` x kLinearBox; `blocks` of them side by side along K, or
// 0: single boxes of a matrix, whose last may reach beyond K.
Status encode(CUtensorMap* map, const LinearDecodeParams& p, const void* data, std::int64_t rows,
              std::int64_t stride, int box_rows, int blocks) {
  const std::int64_t step = rows > 1 ? stride : round_up<std::int64_t>(p.K, 8);
  const TmaDim along = {static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(step),
                        static_cast<std::uint32_t>(box_rows)};
  const bool bf16 = p.dtype == DType::kBFloat16;
  if (blocks == 0)
    return encode_tensor_map(map, bf16, data,
                             {{static_cast<std::uint64_t>(p.K), 1, kLinearBox}, along});
  return encode_tensor_map(map, bf16, data,
                           {{kLinearBox, 1, kLinearBox},
                            along,
                            {static_cast<std::uint64_t>(p.K / kLinearBox), kLinearBox,
                             static_cast<std::uint32_t>(blocks)}});
}

}  // namespace

Status linear_decode_launch(const LinearDecodeParams& p, Early early,
                            const LinearDecodeSm90Tuning& tuning, cudaStream_t stream) {
  LinearArgs args = {};
  args.p = p;
  args.early = early;
  args.starts_next_first = tuning.starts_next_first;
  args.cfg =
      select_linear_decode_sm90_config({p.rows, p.outputs, p.K, p.swiglu, p.norm_weight != nullptr,
                                        p.norm_weight_dtype == DType::kFloat32 ? 4 : 2},
                                       multiprocessors(), tuning);
  if (!linear_ring_turns(args.cfg)) return {"the ring does not fit in shared memory"};
  const std::int64_t weight_rows = p.swiglu ? 2 * p.outputs : p.outputs;
  const LinearDecodeSm90Config& c = args.cfg;
  args.x_whole = p.K % kLinearBox == 0;
  // One copy leaves no gap between boxes.
  args.weight_whole = args.x_whole && c.unit * 2 * kLinearBox == c.weight_box;
  Status s = encode(&args.weight, p, p.weight, weight_rows, p.weight_stride, c.unit,
                    args.weight_whole ? c.boxes : 0);
  if (s.error == nullptr)
    s = encode(&args.x, p, p.x, p.rows, p.x_stride, c.tokens, args.x_whole ? c.boxes : 0);
  if (s.error != nullptr) return s;
  return p.dtype == DType::kBFloat16 ? with_tokens<__nv_bfloat16>(args, stream)
                                     : with_tokens<__half>(args, stream);
}

}  // namespace sm90

bool linear_decode_sm90_takes(const LinearDecodeParams& p) {
  const auto aligned = [](const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  };
  const auto apart = [&](std::int64_t rows, std::int64_t stride) {
    return rows == 1 || (stride % 8 == 0 && stride >= p.K);
  };
  constexpr std::int64_t kMost = std::int64_t{1} << 30;  // coordinates are 32-bit
  return aligned(p.x) && aligned(p.weight) && apart(p.rows, p.x_stride) &&
         apart(p.swiglu ? 2 : p.outputs, p.weight_stride) &&
         (p.norm_weight == nullptr || (aligned(p.norm_weight) && p.K % 8 == 0)) && p.K < kMost &&
         p.outputs < kMost;
}

Status linear_decode_sm90(const LinearDecodeParams& p, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  const bool captured = capture == cudaStreamCaptureStatusActive;
  return sm90::linear_decode_launch(p, captured ? sm90::Early::kIntoShared : sm90::Early::kIntoL2,
                                    {}, stream);
}

}  // namespace zebra
