// What the registrations of CUDA kernels need beside torch_check.h.  Include it first: the stream
// shim must be declared weak before torch's headers see it, so that libzebra_cuda.so also loads in
// a CPU build of torch (where its operators can be inspected but not run).
#pragma once

#include <cstdint>

extern "C" __attribute__((weak)) std::int32_t aoti_torch_get_current_cuda_stream(
    std::int32_t device_index, void** ret_stream);

#include <torch/csrc/stable/accelerator.h>

#include "common/torch_check.h"

struct CUstream_st;

namespace zebra {

// Makes the tensor's device current for the scope and gives its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) != 0)
      throw std::runtime_error("zebra: this torch gives no CUDA stream");
    stream_ = static_cast<CUstream_st*>(stream);
  }
  CUstream_st* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_ = nullptr;
};

}  // namespace zebra
