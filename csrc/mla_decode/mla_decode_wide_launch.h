// mla_decode for many rows: the configuration of a problem on this GPU.
#pragma once

#include "mla_decode/mla_decode_launch.cuh"
#include "mla_decode/mla_decode_wide_config.h"

namespace zebra {
namespace {

inline MlaDecodeConfig mla_wide_config(const MlaDecodeParams& p) {
  return select_mla_wide_config(
      {p.B, p.T * p.H, p.R, p.E, mla_max_tokens(p), p.split_size, true, p.weight != nullptr},
      multiprocessors());
}

}  // namespace
}  // namespace zebra
