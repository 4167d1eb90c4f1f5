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

// Checks that a small tensor can be read beside x.
inline void check(const Tensor& small, int64_t elements, const Tensor& x) {
  const ScalarType dtype = small.scalar_type(), of_x = x.scalar_type();
  STD_TORCH_CHECK(small.get_device_index() == x.get_device_index() && small.is_cuda() &&
                      small.numel() == elements,
                  "da_ops: a parameter is not on x's device or has the wrong size");
  const bool half = of_x == ScalarType::Half || of_x == ScalarType::BFloat16;
  STD_TORCH_CHECK(dtype == of_x || (half && dtype == ScalarType::Float),
                  "da_ops: parameters must have x's dtype, or be float32 with a half x");
}

// The given parameters' addresses. Copies that had to be made live as long as this.
class Addresses {
 public:
  Addresses(const Problem& p, const Tensor& x, const Arguments& given)
      : x_(x),
        pointers_(each(
            [this](const Parameter& parameter, int64_t size) { return address(parameter, size); },
            given, sizes(p))) {}

  const Parameters<const void*>& operator*() const { return pointers_; }
  bool wide() const { return dtype_.value_or(x_.scalar_type()) != x_.scalar_type(); }

 private:
  const void* address(const Parameter& parameter, int64_t elements) {
    if (!parameter) return nullptr;
    const ScalarType dtype = parameter->scalar_type();
    check(*parameter, elements, x_);
    STD_TORCH_CHECK(dtype_.value_or(dtype) == dtype, "da_ops: parameters must share a dtype");
    dtype_ = dtype;
    copies_.push_back(parameter->is_contiguous() ? *parameter
                                                 : torch::stable::contiguous(*parameter));
    return copies_.back().const_data_ptr();
  }

  const Tensor& x_;
  std::optional<ScalarType> dtype_;
  std::vector<Tensor> copies_;
  Parameters<const void*> pointers_;  // the last, for it is made with the others
};

}  // namespace da::cuda
