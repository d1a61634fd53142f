// The result of a launch as a Status.
#pragma once

#include <cuda_runtime_api.h>

#include "common/status.h"

namespace zebra {

inline Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

}  // namespace zebra
