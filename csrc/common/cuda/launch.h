// What launchers share: the result of a launch as a Status, and the switch between kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "common/status.h"

namespace zebra {

inline Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

// ZEBRA_PORTABLE=1 makes every GPU take the portable kernels.  Read at each launch, so that a test
// can set it.
inline bool portable_forced() {
  const char* const value = std::getenv("ZEBRA_PORTABLE");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

}  // namespace zebra
