// The launch of linear_decode on Hopper, with what a measurement may fix.
#pragma once

#include "linear_decode/linear_decode_sm90.cuh"

namespace zebra::sm90 {

Status linear_decode_launch(const LinearDecodeParams& p, Early early,
                            const LinearDecodeSm90Tuning& tuning, cudaStream_t stream,
                            const LinearProjection* also = nullptr);

}  // namespace zebra::sm90
