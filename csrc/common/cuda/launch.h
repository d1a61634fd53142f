// What launchers share: the result of a launch as a Status, and the switch between kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "common/status.h"

namespace zebra {

inline Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

// Whether an environment variable is 1.  Read at each launch, so that a test can set it.
//   ZEBRA_PORTABLE         every GPU takes the portable kernels
//   ZEBRA_BATCH_INVARIANT  work is cut by a sequence's own length alone: its result does not depend
//                          on the rest of the batch
inline bool env_is_set(const char* name) {
  const char* const value = std::getenv(name);
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// Whether the current device takes the Hopper kernels (sm_90a).
inline bool takes_sm90() {
  if (env_is_set("ZEBRA_PORTABLE")) return false;
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
}

inline int multiprocessors() {
  int device = 0, sms = 132;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  return sms;
}

// Whether a kernel may start before the one ahead of it has ended, where it says that it can.  Not
// for compute-sanitizer's racecheck, which takes the accesses of overlapping kernels for one's.
#ifdef ZEBRA_RACECHECK
constexpr bool kLaunchesOverlap = false;
#else
constexpr bool kLaunchesOverlap = true;
#endif

struct LaunchOptions {
  bool is_dependent = false;  // calls grid_dependency_wait(): from sm_90 on the kernel may start
                              // before the one ahead of it in the stream has ended
  unsigned cluster_y = 1;     // CTAs (x, y), (x, y + 1), ... that start side by side; sm_90
};

template <typename... Params, typename... Args>
Status launch_kernel(const LaunchOptions& options, void (*kernel)(Params...), dim3 grid, dim3 block,
                     std::size_t smem, cudaStream_t stream, Args&&... args) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = grid, launch.blockDim = block, launch.dynamicSmemBytes = smem;
  launch.stream = stream, launch.attrs = attributes;
  if (options.is_dependent && major >= 9) {
    cudaLaunchAttribute& early = attributes[launch.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = kLaunchesOverlap;
  }
  if (options.cluster_y > 1) {
    cudaLaunchAttribute& cluster = attributes[launch.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = cluster.val.clusterDim.z = 1;
    cluster.val.clusterDim.y = options.cluster_y;
  }
  const cudaError_t error = cudaLaunchKernelEx(&launch, kernel, std::forward<Args>(args)...);
  return error == cudaSuccess ? launch_status() : Status{cudaGetErrorString(error)};
}

template <typename... Params, typename... Args>
Status launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t smem,
                        cudaStream_t stream, Args&&... args) {
  return launch_kernel({true}, kernel, grid, block, smem, stream, std::forward<Args>(args)...);
}

}  // namespace zebra
