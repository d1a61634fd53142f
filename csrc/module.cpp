// zebra._C: what is not an operator.  Build facts and the tile configurations, for `zebra info` and
// for tests that have no GPU.  The operators work without this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "causal_conv1d/causal_conv1d_config.h"
#include "linear_decode/linear_decode_sm90_config.h"
#include "mla_decode/mla_decode_wide_config.h"
#include "rms_norm/rms_norm_config.h"
#include "ssd_scan/ssd_scan_config.h"
#include "ssd_scan/ssd_scan_sm90_config.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict d;
  d["version"] = ZEBRA_VERSION;
  d["compiler"] = "gcc " __VERSION__;
  d["cuda"] = ZEBRA_CUDA_VERSION;  // nvcc's version; empty when the CUDA library was not built
  d["cuda_archs"] = ZEBRA_CUDA_ARCHS;
  d["torch_abi"] = ZEBRA_TORCH_TARGET;
  return d;
}

py::dict rms_norm_config(std::int64_t dim, int element_bytes, bool aligned) {
  const zebra::RmsNormConfig c = zebra::select_rms_norm_config(dim, element_bytes, aligned);
  return py::dict(py::arg("threads") = c.threads, py::arg("vec") = c.vec,
                  py::arg("vecs_per_thread") = c.vecs_per_thread);
}

py::dict causal_conv1d_config(std::int64_t batch, std::int64_t tokens, std::int64_t channels,
                              int element_bytes, bool aligned, bool backward) {
  const zebra::CausalConv1dConfig c =
      backward
          ? zebra::select_causal_conv1d_backward_config(batch, tokens, channels, element_bytes,
                                                        aligned)
          : zebra::select_causal_conv1d_config(batch, tokens, channels, element_bytes, aligned);
  return py::dict(py::arg("threads") = c.threads, py::arg("vec") = c.vec,
                  py::arg("channel_blocks") = c.channel_blocks, py::arg("tile") = c.tile,
                  py::arg("tiles") = c.tiles, py::arg("items") = c.items,
                  py::arg("partials") = c.partials);
}

py::dict linear_decode_sm90_config(std::int64_t rows, std::int64_t outputs, std::int64_t K,
                                   bool swiglu, int sms, bool norm) {
  if (rows < 1 || rows > zebra::kLinearMostTokens || outputs < 1 || K < 1)
    throw py::value_error("zebra: linear_decode has CUDA tiles for 1 to 128 rows");
  const zebra::LinearDecodeSm90Config c =
      zebra::select_linear_decode_sm90_config({rows, outputs, K, swiglu, norm}, sms);
  return py::dict(py::arg("tokens") = c.tokens, py::arg("row_tiles") = c.row_tiles,
                  py::arg("cluster") = c.cluster, py::arg("slices") = c.slices,
                  py::arg("unit") = c.unit, py::arg("units") = c.units,
                  py::arg("clusters") = c.clusters, py::arg("box_rows") = c.box_rows,
                  py::arg("boxes") = c.boxes, py::arg("steps") = c.steps,
                  py::arg("norms") = c.norms, py::arg("last_loads") = c.last_loads,
                  py::arg("stages") = c.stages, py::arg("stage_bytes") = c.stage_bytes,
                  py::arg("smem_bytes") = c.smem_bytes);
}

py::dict ssd_scan_config(std::int64_t sequences, std::int64_t heads, int head_dim, int state_dim) {
  if (!zebra::ssd_scan_takes(head_dim) || !zebra::ssd_scan_takes(state_dim))
    throw py::value_error("zebra: ssd_scan has CUDA tiles for head_dim and state_dim 64 and 128");
  const zebra::SsdScanConfig c =
      zebra::select_ssd_scan_config(sequences, heads, head_dim, state_dim);
  return py::dict(py::arg("threads") = c.threads, py::arg("chunk") = c.chunk,
                  py::arg("ctas_per_sm") = c.ctas_per_sm, py::arg("smem_bytes") = c.smem_bytes,
                  py::arg("ctas") = c.ctas);
}

py::dict ssd_scan_sm90_config(std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                              std::int64_t x_heads, std::int64_t b_heads, std::int64_t c_heads,
                              int head_dim, int state_dim, bool norm, std::int64_t sequences,
                              std::int64_t sms, double gb_s, bool batch_invariant) {
  if (!zebra::ssd_scan_takes(head_dim) || !zebra::ssd_scan_takes(state_dim))
    throw py::value_error("zebra: ssd_scan has CUDA tiles for head_dim and state_dim 64 and 128");
  const zebra::SsdScanSm90Config c = zebra::select_ssd_scan_sm90_config(
      {batch, sequences, tokens, heads, x_heads, b_heads, c_heads, head_dim, state_dim, norm},
      {sms, gb_s}, batch_invariant);
  return py::dict(py::arg("heads") = c.heads, py::arg("head_slots") = c.head_slots,
                  py::arg("stages") = c.stages, py::arg("stage_bytes") = c.stage_bytes,
                  py::arg("zy_slots") = c.zy_slots, py::arg("smem_bytes") = c.smem_bytes,
                  py::arg("width") = c.width, py::arg("bundles") = c.bundles,
                  py::arg("line") = c.line, py::arg("units") = c.units, py::arg("cut") = c.cut,
                  py::arg("items") = c.items, py::arg("state_items") = c.state_items,
                  py::arg("state_smem_bytes") = c.state_smem_bytes);
}

py::dict mla_decode_config(std::int64_t batch, std::int64_t rows, std::int64_t rank,
                           std::int64_t rope, std::int64_t max_tokens, std::int64_t split_size,
                           std::int64_t sms, int smem_limit, bool tma) {
  const zebra::MlaDecodeShape shape = {batch, rows, rank, rope, max_tokens, split_size, tma};
  const bool wide = tma && zebra::mla_wide_takes(rank, rope, zebra::kMlaTmaStage) &&
                    zebra::mla_wide_is_better(rows, rank);
  if (!wide && !zebra::mla_decode_takes(rank, rope))
    throw py::value_error(
        "zebra: mla_decode has CUDA tiles for ranks up to 256, with TMA 512, and rope widths up to"
        " 64, multiples of 8");
  if (!wide && tma && !zebra::mla_decode_tma_takes(rank, rope, zebra::kMlaTmaStage))
    throw py::value_error("zebra: TMA brings no columns that are filled with zeros");
  const zebra::MlaDecodeConfig c = wide ? zebra::select_mla_wide_config(shape, sms)
                                        : zebra::select_mla_decode_config(shape, sms, smem_limit);
  return py::dict(py::arg("rank") = c.rank, py::arg("rope") = c.rope, py::arg("stage") = c.stage,
                  py::arg("groups") = c.groups, py::arg("passes") = c.passes,
                  py::arg("halves") = c.halves, py::arg("streams") = c.streams,
                  py::arg("slots") = c.slots, py::arg("merge_parts") = c.merge_parts,
                  py::arg("smem_bytes") = c.smem_bytes, py::arg("ctas") = c.ctas,
                  py::arg("split") = c.split, py::arg("pieces") = c.pieces,
                  py::arg("partials") = c.partials, py::arg("combine_lanes") = c.combine_lanes,
                  py::arg("workspace_bytes") = c.workspace_bytes);
}

// select_config("rms_norm", dim=4096, ...): the tile that a launcher would choose, as a dict.
py::dict select_config(const std::string& op, const py::kwargs& problem) {
  const py::module_ self = py::module_::import("zebra._C");
  const std::string name = "_" + op + "_config";
  if (!py::hasattr(self, name.c_str()))
    throw py::value_error("zebra: no tile configuration for operator '" + op + "'");
  return self.attr(name.c_str())(**problem);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and tile configurations of zebra.";
  m.def("build_info", &build_info);
  m.def("select_config", &select_config);
  m.def("_rms_norm_config", &rms_norm_config, py::arg("dim"), py::arg("element_bytes") = 2,
        py::arg("aligned") = true);
  m.def("_causal_conv1d_config", &causal_conv1d_config, py::arg("batch"), py::arg("tokens"),
        py::arg("channels"), py::arg("element_bytes") = 2, py::arg("aligned") = true,
        py::arg("backward") = false);
  m.def("_mla_decode_config", &mla_decode_config, py::arg("batch"), py::arg("rows"),
        py::arg("rank"), py::arg("rope"), py::arg("max_tokens"), py::arg("split_size") = 0,
        py::arg("sms") = 132, py::arg("smem_limit") = zebra::kMlaSm90SmemBytes,
        py::arg("tma") = false);
  m.def("_linear_decode_sm90_config", &linear_decode_sm90_config, py::arg("rows"),
        py::arg("outputs"), py::arg("K"), py::arg("swiglu") = false, py::arg("sms") = 132,
        py::arg("norm") = false);
  m.def("_ssd_scan_config", &ssd_scan_config, py::arg("sequences"), py::arg("heads"),
        py::arg("head_dim"), py::arg("state_dim"));
  m.def("_ssd_scan_sm90_config", &ssd_scan_sm90_config, py::arg("batch"), py::arg("tokens"),
        py::arg("heads"), py::arg("x_heads"), py::arg("b_heads"), py::arg("c_heads"),
        py::arg("head_dim"), py::arg("state_dim"), py::arg("norm") = true, py::arg("sequences") = 0,
        py::arg("sms") = 132, py::arg("gb_s") = 4250., py::arg("batch_invariant") = false);
}
