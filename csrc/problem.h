// The call as plain data. Free of torch and of CUDA: planners, kernels and tests all speak it.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>

#include "schedule.h"

namespace da {

enum class Dtype { float16, bfloat16, float32, float64 };
enum class Gate { affine, scalar, eca, sigmoid };

struct Problem {
  int64_t n = 0, c = 0, h = 0, w = 0;
  bool channels_last = false;
  Dtype dtype = Dtype::float32;
  Order order = Order::spatial_channel;
  Gate gate = Gate::affine;
  int64_t kernel_size = 0;  // of the eca gate, odd

  int64_t pixels() const { return h * w; }
  int64_t elements() const { return n * c * h * w; }
  int64_t bytes() const { return elements() * element_size(); }
  int64_t element_size() const {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
  }
  bool spatial() const { return masks(order).pixels; }
  bool channel() const { return masks(order).channels; }
  // An image is a matrix: channels x pixels in NCHW, pixels x channels in NHWC. With one pixel a
  // channel the channels are dense in either layout.
  bool by_pixel() const { return channels_last || pixels() == 1; }
  int64_t rows() const { return by_pixel() ? pixels() : c; }
  int64_t cols() const { return by_pixel() ? c : pixels(); }
  int64_t gate_weights() const {
    if (!channel() || gate == Gate::sigmoid) return 0;
    return gate == Gate::affine ? c : gate == Gate::scalar ? 1 : kernel_size;
  }
};

// False when the name is not one of the enumerators.
inline bool parse(const std::string& name, Order& order) {
  for (size_t i = 0; i < std::size(kOrders); i++)
    if (name == kOrders[i].order) return order = static_cast<Order>(i), true;
  return false;
}

inline bool parse(const std::string& name, Gate& gate) {
  constexpr const char* names[] = {"affine", "scalar", "eca", "sigmoid"};
  for (int i = 0; i < 4; i++)
    if (name == names[i]) return gate = static_cast<Gate>(i), true;
  return false;
}

inline bool parse(const std::string& name, Dtype& dtype) {
  constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64"};
  for (int i = 0; i < 4; i++)
    if (name == names[i]) return dtype = static_cast<Dtype>(i), true;
  return false;
}

}  // namespace da
