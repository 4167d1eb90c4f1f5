// What every backend's operators check, and allocate: the stable ABI of PyTorch, nothing else.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "parameters.h"
#include "problem.h"
#include "tuned.h"

namespace da {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Parameter = std::optional<Tensor>;

// On x's device.
inline Tensor allocate(const Tensor& x, const int64_t* sizes, const int64_t* strides, int64_t dim,
                       ScalarType dtype) {
  AtenTensorHandle handle;
  const bool cpu = x.is_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
      cpu ? 0 : x.get_device_index(), &handle));
  return Tensor(handle);
}

// Contiguous; of at most four dimensions.
inline Tensor allocate(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       ScalarType dtype) {
  int64_t strides[4] = {1, 1, 1, 1};
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return allocate(x, sizes.data(), strides, sizes.size(), dtype);
}

inline Tensor allocate_like(const Tensor& x) {
  return allocate(x, x.sizes().data(), x.strides().data(), x.dim(), x.scalar_type());
}

// For the gradient of a parameter: contiguous, in its shape and dtype; empty where there is none.
// Strides of dimensions of size 1 are the parameter's too: DistributedDataParallel compares them.
inline Tensor allocate_gradient(const Parameter& parameter, const Tensor& x) {
  if (!parameter) return allocate(x, {0}, x.scalar_type());
  const Tensor& p = *parameter;
  return p.is_contiguous()
             ? allocate(x, p.sizes().data(), p.strides().data(), p.dim(), p.scalar_type())
             : allocate(x, p.sizes(), p.scalar_type());
}

inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Dense in this order of dimensions, the outermost first; where a dimension is 1 its stride is
// free.
inline bool dense(const Tensor& t, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (auto d = std::rbegin(order); d != std::rend(order); d++) {
    if (t.size(*d) != 1 && t.stride(*d) != expected) return false;
    expected *= t.size(*d);
  }
  return true;
}

inline bool on_device_of(const Tensor& x, const Tensor& t) {
  return t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() &&
         t.get_device_index() == x.get_device_index();
}

// Whether kernels that take x take a parameter of this type: x's own, or float32 where that is half
// precision.
inline bool goes_with(const Tensor& x, ScalarType own) {
  const ScalarType dtype = x.scalar_type();
  const bool half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  return own == dtype || (half && own == ScalarType::Float);
}

// Refuses a tensor but one of x's shape, dtype, device and layout.
inline void check_like(const Problem& p, const Tensor& t, const char* name, const Tensor& x,
                       const char* name_of_x) {
  const auto sizes = t.sizes(), of_x = x.sizes();
  STD_TORCH_CHECK(on_device_of(x, t) && t.scalar_type() == x.scalar_type() &&
                      std::equal(sizes.begin(), sizes.end(), of_x.begin(), of_x.end()),
                  "da_ops: ", name, " must be like ", name_of_x);
  STD_TORCH_CHECK(p.n == 0 || (p.channels_last ? dense(t, {0, 2, 3, 1}) : dense(t, {0, 1, 2, 3})),
                  "da_ops: ", name, " must have the layout of ", name_of_x);
}

using Arguments = Parameters<const Parameter&>;

// Refuses parameters but those that the order and gate take, in their shapes, on x's device, and
// all in one dtype, which goes with x.
inline void check_parameters(const Problem& p, const Tensor& x, const Arguments& given) {
  using Shape = std::initializer_list<int64_t>;
  std::optional<ScalarType> shared;
  const auto check = [&](const char* name, const Parameter& parameter, bool wanted, Shape shape) {
    STD_TORCH_CHECK(parameter.has_value() == wanted, "da_ops: this order and gate ",
                    wanted ? "need " : "do not take ", name);
    if (!wanted) return;
    const auto sizes = parameter->sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()),
                    "da_ops: wrong shape of ", name);
    STD_TORCH_CHECK(on_device_of(x, *parameter), "da_ops: ", name, " must be on x's device");
    const ScalarType own = parameter->scalar_type();
    STD_TORCH_CHECK(own == shared.value_or(own) && goes_with(x, own), "da_ops: wrong dtype of ",
                    name);
    shared = own;
  };
  const bool spatial = p.spatial(), gated = p.gate_weights() > 0;
  const Shape gate = {p.gate_weights()};
  check("conv_weight", given.conv, spatial, {1, 1, 3, 3});
  check("dilated_weight", given.dilated, spatial, {1, 1, 3, 3});
  check("merge_weight", given.merge, spatial, {1, 2, 1, 1});
  check("spatial_bias", given.spatial_bias, spatial && given.spatial_bias, {1});
  check("gate_weight", given.gate, gated, gate);
  check("gate_bias", given.gate_bias, gated && p.gate != Gate::eca, gate);
}

inline Problem describe(const Tensor& x, const Arguments& given, const std::string& order,
                        const std::string& gate) {
  Problem p;
  STD_TORCH_CHECK(x.dim() == 4, "da_ops: x must be a tensor [N, C, H, W]");
  p.n = x.size(0), p.c = x.size(1), p.h = x.size(2), p.w = x.size(3);
  STD_TORCH_CHECK(p.c > 0 && p.h > 0 && p.w > 0, "da_ops: C, H and W must be positive");
  p.channels_last = !dense(x, {0, 1, 2, 3});
  STD_TORCH_CHECK(!p.channels_last || dense(x, {0, 2, 3, 1}) || p.n == 0,
                  "da_ops: x must be contiguous or channels_last");
  STD_TORCH_CHECK(parse(order, p.order) && parse(gate, p.gate), "da_ops: unknown order or gate");
  if (p.channel() && p.gate == Gate::eca) {
    p.kernel_size = given.gate ? given.gate->numel() : 0;
    STD_TORCH_CHECK(p.kernel_size % 2 == 1, "da_ops: this gate needs an odd gate_weight");
  }
  check_parameters(p, x, given);
  switch (x.scalar_type()) {
    case ScalarType::Half:
      p.dtype = Dtype::float16;
      break;
    case ScalarType::BFloat16:
      p.dtype = Dtype::bfloat16;
      break;
    case ScalarType::Float:
      p.dtype = Dtype::float32;
      break;
    case ScalarType::Double:
      p.dtype = Dtype::float64;
      break;
    default:
      STD_TORCH_CHECK(false, "da_ops: x must be float16, bfloat16, float32 or float64");
  }
  return p;
}

// Refuses maps that cannot be forward's.
inline void check_maps(const Problem& p, const Tensor& x, const Tensor& channel_mean,
                       const Tensor& pooled) {
  const auto is_forwards = [&](const Tensor& map, int64_t numel) {
    return map.numel() == numel && map.is_contiguous() && on_device_of(x, map) &&
           map.scalar_type() == accumulation_type(x);
  };
  STD_TORCH_CHECK(is_forwards(channel_mean, p.spatial() ? p.n * p.pixels() : 0) &&
                      is_forwards(pooled, p.channel() ? p.n * p.c : 0),
                  "da_ops: channel_mean and pooled must be forward's");
}

// What forward gives besides y, kept for backward; empty where the order has no such half.
inline Tensor allocate_channel_mean(const Problem& p, const Tensor& x) {
  return p.spatial() ? allocate(x, {p.n, p.h, p.w}, accumulation_type(x))
                     : allocate(x, {0}, accumulation_type(x));
}
inline Tensor allocate_pooled(const Problem& p, const Tensor& x) {
  return p.channel() ? allocate(x, {p.n, p.c}, accumulation_type(x))
                     : allocate(x, {0}, accumulation_type(x));
}

// y, channel_mean, pooled.
using Outputs = std::tuple<Tensor, Tensor, Tensor>;
// dx, then the parameters' gradients.
using InputGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline InputGradients input_gradients(const Tensor& dx, const Parameters<Tensor>& d) {
  return {dx, d.conv, d.dilated, d.merge, d.spatial_bias, d.gate, d.gate_bias};
}

// The operators, by a backend's function of the checked call.
template <Outputs (*kForward)(const Problem&, const Tensor& x, const Arguments&)>
Outputs forward_operator(const Tensor& x, const Parameter& conv_weight,
                         const Parameter& dilated_weight, const Parameter& merge_weight,
                         const Parameter& spatial_bias, const Parameter& gate_weight,
                         const Parameter& gate_bias, const std::string& order,
                         const std::string& gate) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  return kForward(describe(x, given, order, gate), x, given);
}

template <InputGradients (*kBackward)(const Problem&, const Tensor& dy, const Tensor& x,
                                      const Arguments&, const Tensor& channel_mean,
                                      const Tensor& pooled)>
InputGradients backward_operator(const Tensor& dy, const Tensor& x, const Parameter& conv_weight,
                                 const Parameter& dilated_weight, const Parameter& merge_weight,
                                 const Parameter& spatial_bias, const Parameter& gate_weight,
                                 const Parameter& gate_bias, const Tensor& channel_mean,
                                 const Tensor& pooled, const std::string& order,
                                 const std::string& gate) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe(x, given, order, gate);
  check_like(p, dy, "dy", x, "x");
  check_maps(p, x, channel_mean, pooled);
  return kBackward(p, dy, x, given, channel_mean, pooled);
}

// The operator that sets a plan that was measured, for calls of one kind in one place; an empty
// text takes it away. This is what follows its name in the schema.
#define DA_TUNE_SCHEMA                                                                \
  "(int n, int c, int h, int w, bool channels_last, str dtype, str order, str gate, " \
  "bool backward, str place, str plan) -> ()"

template <void (*kSet)(const Problem&, bool backward, const std::string& place,
                       const std::string& plan)>
void tune_operator(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last,
                   const std::string& dtype, const std::string& order, const std::string& gate,
                   bool backward, const std::string& place, const std::string& plan) {
  Problem p;
  p.n = n, p.c = c, p.h = h, p.w = w, p.channels_last = channels_last;
  STD_TORCH_CHECK(parse(dtype, p.dtype) && parse(order, p.order) && parse(gate, p.gate),
                  "da_ops: unknown dtype, order or gate: ", dtype, ", ", order, ", ", gate);
  kSet(p, backward, place, plan);
}

}  // namespace da
