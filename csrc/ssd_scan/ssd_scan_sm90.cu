// ssd_scan, forward, for Hopper (sm_90a): wgmma, TMA, mbarriers.
//
// Computes       y and the final state of ssd_scan.h for 16-bit dtypes, P and N of 64 or 128.
//                Derivation, steps and what was rejected: docs/kernels/ssd_scan.md.
// Work           all chunks of all sequences of all bundles of heads in equal shares, cut as near
//                to the front of sequences as can be: ssd_scan_sm90_config.h.  A share that begins
//                inside a sequence starts from states that a first kernel walked up to there,
//                without outputs, in equal shares of its own.
// Kernels        plan (packed sequences that may be cut: where shares begin), states (where
//                sequences are cut), forward, which starts while states ends.
// Grid           persistent, one CTA a multiprocessor; a CTA walks one head of P = 128 or two of 64
//                in chunks of 64 tokens.
// Warps          forward, 16: norm, decays, gate and store, load | 4 scores | 4 + 4 states.
//                states, 12: load, 3 decays | 4 + 4 states.
// Registers      forward 40, 72 (N = 64: 88) and 200 (192) of a thread; no spills.
// Shared memory  forward, P = N = 128 with the norm, 222 KiB: three stages of C, B and x (144),
//                three slots of z and y (48), two of masked scores (16), sums of squares (9), four
//                of decays (4).  states: six stages of B and x (192).
// Barriers       full / empty of a stage, of decays, of scores; z there, y there; squares, 1 / rms.
// Bound          HBM by bytes (3090 clk a chunk); measured, the chain of the state warps.
// Measured       H200, 2026-11-28, 2 x 8192 tokens with gate and norm: 8B layer 180 us (63 % of the
//                memory floor), 3B 148 us (60 %), 1B 104 us (54 %); Mamba-2 2.7B 228 us (54 %).
//                benchmarks/bench_ssd_scan.py --device cuda
#include <cstring>
#include <tuple>

#include "common/cuda/launch.h"
#include "common/sm90/tma.h"
#include "ssd_scan/ssd_scan_sm90_forward.cuh"
#include "ssd_scan/ssd_scan_sm90_states.cuh"

namespace zebra {
namespace {

using sm90::SsdArgs;
using sm90::TmaDim;

struct Workspace {
  std::int64_t states, decays, table, ends, bytes;  // offsets
};

// Needed where sequences are cut.
Workspace workspace_of(const SsdScanParams& p, const SsdScanSm90Config& c) {
  Workspace w = {};
  if (!c.cut) return w;
  w.decays = c.state_slots * 128 * p.state_dim * 4;
  w.table = w.decays + round_up<std::int64_t>(c.state_slots * c.heads * 4, 16);
  w.ends = w.table + (p.cu_seqlens == nullptr ? 0 : (c.units + 1) * 16);
  w.bytes = w.ends + (p.cu_seqlens == nullptr ? 0 : p.sequences * 4);
  return w;
}

SsdMachine machine() {
  constexpr double kReached = 0.88;  // by a copy, of the memory's peak
  const double ghz = 1e-6 * device_attribute(cudaDevAttrMemoryClockRate);
  return {multiprocessors(),
          kReached * 2 * ghz * device_attribute(cudaDevAttrGlobalMemoryBusWidth) / 8};
}

// Planning takes microseconds and calls come in runs of one shape: the last plan is kept.
SsdScanSm90Config config_of(const SsdScanParams& p) {
  const SsdScanSm90Shape shape = {p.batch,
                                  p.cu_seqlens == nullptr ? 0 : p.sequences,
                                  p.tokens,
                                  p.heads,
                                  p.x_heads,
                                  p.b_heads,
                                  p.c_heads,
                                  static_cast<int>(p.head_dim),
                                  static_cast<int>(p.state_dim),
                                  p.norm_weight != nullptr};
  const SsdMachine on = machine();
  const bool invariant = env_is_set("ZEBRA_BATCH_INVARIANT");
  const auto key = [&](const SsdScanSm90Shape& s, const SsdMachine& m, bool i) {
    return std::make_tuple(s.rows, s.sequences, s.tokens, s.heads, s.x_heads, s.b_heads, s.c_heads,
                           s.head_dim, s.state_dim, s.norm, m.sms, m.gb_s, i);
  };
  struct Plan {
    decltype(key(shape, on, invariant)) of;
    SsdScanSm90Config config;
  };
  static thread_local Plan last = {};
  const auto wanted = key(shape, on, invariant);
  if (last.of != wanted) last = {wanted, select_ssd_scan_sm90_config(shape, on, invariant)};
  return last.config;
}

// A [B, T, heads, dim] tensor in boxes of 64 tokens x `box` columns of one head.
Status encode(CUtensorMap* map, const SsdScanParams& p, const void* data, std::int64_t heads,
              std::int64_t dim, SsdStrides stride) {
  const auto size = [](std::int64_t n) { return static_cast<std::uint64_t>(n < 1 ? 1 : n); };
  const auto step = [](std::int64_t n, std::int64_t s) {
    return static_cast<std::uint64_t>(n > 1 ? s : 64);
  };
  return sm90::encode_tensor_map(map, p.dtype == DType::kBFloat16, data,
                                 {{64, 1, 64},
                                  {size(p.tokens), step(p.tokens, stride.token), 64},
                                  {size(dim / 64), 64, static_cast<std::uint32_t>(dim / 64)},
                                  {size(heads), step(heads, stride.head), 1},
                                  {size(p.batch), step(p.batch, stride.batch), 1}});
}

// `early`: may start before the kernel in front of it has ended; waits for it itself.
template <typename Kernel>
Status launch(Kernel kernel, const SsdArgs& args, std::int64_t items, int threads, int smem,
              cudaStream_t stream, bool early) {
  const Status s = allow_shared_memory(kernel, smem);
  if (s.error != nullptr) return s;
  const int sms = multiprocessors();
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(items < sms ? items : sms));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(smem);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args);
  return launch_status();
}

template <typename T, int kP, int kN>
Status run(SsdArgs& args, cudaStream_t stream) {
  const SsdScanSm90Config& c = args.cfg;
  if (args.states != nullptr) {
    const Status s = launch(sm90::ssd_scan_states_kernel<T, kP, kN>, args, c.state_items,
                            sm90::kStatesThreads, c.state_smem_bytes, stream, false);
    if (s.error != nullptr) return s;
  }
  return launch(sm90::ssd_scan_forward_kernel<T, kP, kN>, args, c.items, sm90::kForwardThreads,
                c.smem_bytes, stream, args.states != nullptr);
}

template <typename T>
Status run(SsdArgs& args, cudaStream_t stream) {
  const bool p64 = args.p.head_dim == 64, n64 = args.p.state_dim == 64;
  if (p64) return n64 ? run<T, 64, 64>(args, stream) : run<T, 64, 128>(args, stream);
  return n64 ? run<T, 128, 64>(args, stream) : run<T, 128, 128>(args, stream);
}

}  // namespace

std::int64_t ssd_scan_sm90_workspace(const SsdScanParams& p) {
  return workspace_of(p, config_of(p)).bytes;
}

Status ssd_scan_sm90(const SsdScanParams& p, void* workspace, cudaStream_t stream) {
  SsdArgs args;
  std::memset(&args, 0, sizeof(args));
  args.p = p;
  args.cfg = config_of(p);
  constexpr std::int64_t kInt = std::int64_t{1} << 31;
  const SsdScanSm90Config& c = args.cfg;
  if (p.tokens >= kInt - 2 * kSsdChunk || c.line >= kInt || c.items >= kInt ||
      c.state_slots >= kInt)
    return {"x must have fewer than 2^31 tokens, and sequences times heads be below 2^31"};
  if (p.sequences == 0 || args.cfg.items == 0) return {};
  const SsdStrides y = {p.tokens * p.heads * p.head_dim, p.heads * p.head_dim, p.head_dim};
  // Nothing is read where there are no tokens, but a map needs an address.
  const auto data = [&](const void* t) { return p.tokens == 0 ? p.final_state : t; };
  Status s = encode(&args.x, p, data(p.x), p.x_heads, p.head_dim, p.x_stride);
  if (s.error == nullptr) s = encode(&args.B, p, data(p.B), p.b_heads, p.state_dim, p.b_stride);
  if (s.error == nullptr) s = encode(&args.C, p, data(p.C), p.c_heads, p.state_dim, p.c_stride);
  if (s.error == nullptr) s = encode(&args.y, p, data(p.y), p.heads, p.head_dim, y);
  if (s.error == nullptr && p.z != nullptr)
    s = encode(&args.z, p, data(p.z), p.heads, p.head_dim, p.z_stride);
  if (s.error != nullptr) return s;
  const Workspace w = workspace_of(p, args.cfg);
  if (w.bytes > 0) {
    char* const base = static_cast<char*>(workspace);
    args.states = reinterpret_cast<float4*>(base + w.states);
    args.decays = reinterpret_cast<float*>(base + w.decays);
    if (p.cu_seqlens != nullptr) {
      int4* const table = reinterpret_cast<int4*>(base + w.table);
      sm90::ssd_scan_plan_kernel<<<1, 1024, 0, stream>>>(args, table,
                                                         reinterpret_cast<int*>(base + w.ends));
      const Status planned = launch_status();
      if (planned.error != nullptr) return planned;
      args.table = table;
    }
  }
  return p.dtype == DType::kBFloat16 ? run<__nv_bfloat16>(args, stream) : run<__half>(args, stream);
}

}  // namespace zebra
