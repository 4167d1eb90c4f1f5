// What the CUDA operators share: device, stream, addresses of what is given.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

#include "arguments.h"
#include "cuda/launch.h"
#include "cuda/plan/device.h"

namespace da::cuda {

inline void require(int error) {
  STD_TORCH_CHECK(error == cudaSuccess, "da_ops: a CUDA launch failed: ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

inline const Device& device_of(const Tensor& x) {
  constexpr int kMaxDevices = 64;
  static std::array<std::once_flag, kMaxDevices> known;
  static std::array<Device, kMaxDevices> devices;
  const int index = x.get_device_index();
  STD_TORCH_CHECK(index < kMaxDevices, "da_ops: more than 64 GPUs");
  std::call_once(known[index], [&] {
    bool early = false;
    require(early_launches(early));
    devices[index] = {10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                          attribute(cudaDevAttrComputeCapabilityMinor, index),
                      attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrL2CacheSize, index), early};
  });
  return devices[index];
}

inline void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

inline bool aligned(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* t) {
    return reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0;
  });
}

// The addresses of parameters that describe() has checked. Copies that had to be made live as long
// as this.
class Addresses {
 public:
  Addresses(const Tensor& x, const Arguments& given)
      : x_(x),
        pointers_(each([this](const Parameter& parameter) { return address(parameter); }, given)) {}

  const Parameters<const void*>& operator*() const { return pointers_; }
  // Whether they are float32 beside an x in half precision.
  bool wide() const { return wide_; }

 private:
  const void* address(const Parameter& parameter) {
    if (!parameter) return nullptr;
    wide_ = parameter->scalar_type() != x_.scalar_type();
    copies_.push_back(parameter->is_contiguous() ? *parameter
                                                 : torch::stable::contiguous(*parameter));
    return copies_.back().const_data_ptr();
  }

  const Tensor& x_;
  bool wide_ = false;
  std::vector<Tensor> copies_;
  Parameters<const void*> pointers_;  // the last, for it is made with the others
};

}  // namespace da::cuda
