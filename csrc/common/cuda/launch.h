// What launchers share: the result of a launch as a Status, and the switch between kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
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

// Of the current device.
inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Lets launches of a kernel have so much dynamic shared memory.  What it may have only grows: host
// threads that launch it with different sizes would take it from each other.
inline Status allow_shared_memory(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> allowed;  // by device
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{device, kernel}];
  if (bytes <= most) return {};
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  most = bytes;
  return {};
}
template <typename... Params>
Status allow_shared_memory(void (*kernel)(Params...), int bytes) {
  return allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

// Asks for as much of L1 as can be to be shared memory.  A multiprocessor changes what it is split
// into only when it is empty, so kernels that are to share one while launches overlap all ask for
// the same.
template <typename... Params>
Status take_largest_carveout(void (*kernel)(Params...)) {
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

// Whether the current device takes the Hopper kernels (sm_90a).
inline bool takes_sm90() {
  return !env_is_set("ZEBRA_PORTABLE") &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
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
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = grid, launch.blockDim = block, launch.dynamicSmemBytes = smem;
  launch.stream = stream, launch.attrs = attributes;
  if (options.is_dependent && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
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
