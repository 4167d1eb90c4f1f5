// Launches, and how many of their blocks run at once. simt.cuh's vocabulary, continued.
#pragma once

#include "cuda/simt/simt.cuh"

#ifdef __CUDACC__

namespace simt {

inline const char* error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

namespace detail {

// A call that fails is reported by its result, and not once more to whoever asks next.
inline int settled(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Allows the kernel what the launch needs. Of shared memory all that a block of the current device
// can have: a kernel is set one number, and another thread might be about to launch it with more.
template <class... P>
cudaError_t permit(const Launch& launch, void (*kernel)(P...)) {
  constexpr size_t unasked = 48 << 10;
  constexpr unsigned portable = 8;
  cudaError_t error = cudaSuccess;
  if (launch.shared_bytes > unasked) {
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess && launch.cluster && launch.team > portable)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// With the attribute that a launch needs, if any.
inline cudaLaunchConfig_t config(const Launch& launch, cudaLaunchAttribute& attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  attribute = {};
  if (launch.cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {launch.team, 1, 1};
  } else if (launch.team > 1) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else if (launch.early) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else {
    config.numAttrs = 0;
  }
  return config;
}

}  // namespace detail

// 0, or CUDA's error code.
template <class... P, class... A>
int launch(const Launch& launch, void (*kernel)(P...), const A&... arguments) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = detail::config(launch, attribute);
  cudaError_t error = detail::permit(launch, kernel);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return detail::settled(error);
}

// Zeros, in the stream's order. 0, or CUDA's error code.
inline int clear(void* memory, size_t bytes, void* stream) {
  return detail::settled(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Whether the current device knows early launches: its kernels must have been compiled for sm_90 or
// later, or they would not wait, and the driver must be able to capture such launches into graphs.
// 0, or CUDA's error code.
template <class... P>
int early_launches(void (*kernel)(P...), bool& possible) {
  constexpr int first_driver = 12030, first_architecture = 90;
  int driver = 0;
  cudaFuncAttributes code = {};
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, kernel);
  possible =
      error == cudaSuccess && driver >= first_driver && code.ptxVersion >= first_architecture;
  return detail::settled(error);
}

// How many teams of this launch the current device can hold at once: 0 where it cannot run.
template <class... P>
int resident_teams(const Launch& launch, void (*kernel)(P...), int& teams) {
  teams = 0;
  cudaError_t error = detail::permit(launch, kernel);
  if (error != cudaSuccess) return detail::settled(error);
  if (launch.cluster) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = detail::config(launch, attribute);
    return detail::settled(cudaOccupancyMaxActiveClusters(&teams, kernel, &config));
  }
  int device = 0, processors = 0, blocks = 0;
  error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks, kernel, static_cast<int>(launch.block), launch.shared_bytes);
  teams = blocks * processors / static_cast<int>(launch.team);
  return detail::settled(error);
}

}  // namespace simt

#endif
