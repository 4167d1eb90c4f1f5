// The CPU kernels behind da_ops::forward and da_ops::backward: checks, allocation, conversion of
// the few parameters; the work is in forward.cpp and backward.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "operator.h"

namespace da::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Parameter = std::optional<Tensor>;

// f(T()) with T the storage type of `dtype`.
template <class F>
auto with_storage(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Half:
      return f(float16());
    case ScalarType::BFloat16:
      return f(bfloat16());
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    default:
      STD_TORCH_CHECK(false, "da_ops: x must be float16, bfloat16, float32 or float64");
  }
}

// f(pointer) with the tensor's elements as C++ numbers.
template <class F>
void with_elements(const Tensor& t, F f) {
  void* data = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return f(static_cast<torch::headeronly::Half*>(data));
    case ScalarType::BFloat16:
      return f(static_cast<torch::headeronly::BFloat16*>(data));
    case ScalarType::Float:
      return f(static_cast<float*>(data));
    case ScalarType::Double:
      return f(static_cast<double*>(data));
    default:
      STD_TORCH_CHECK(false, "da_ops: parameters must be floating point");
  }
}

template <class A>
void read(const Parameter& parameter, int64_t n, A* out) {
  if (!parameter) {
    std::fill_n(out, n, A(0));
    return;
  }
  STD_TORCH_CHECK(parameter->is_cpu() && parameter->numel() == n,
                  "da_ops: a parameter is not on the CPU or has the wrong size");
  const Tensor dense =
      parameter->is_contiguous() ? *parameter : torch::stable::contiguous(*parameter);
  with_elements(dense, [&](auto* p) { std::copy_n(p, n, out); });
}

Tensor allocate(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Contiguous; of at most four dimensions.
Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t strides[4] = {1, 1, 1, 1};
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return allocate(sizes.data(), strides, sizes.size(), dtype);
}

// The gradient of `parameter`: in its shape and dtype, empty where there is none.
template <class A>
Tensor gradient(const Parameter& parameter, ScalarType dtype, const A* values) {
  if (!parameter) return allocate({0}, dtype);
  Tensor out = allocate(parameter->sizes(), parameter->scalar_type());
  with_elements(out, [&](auto* p) {
    for (int64_t i = 0; i < out.numel(); i++) p[i] = values[i];
  });
  return out;
}

// Dense in this order of dimensions, the outermost first; where a dimension is 1 its stride is
// free.
bool dense(const Tensor& t, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (auto d = std::rbegin(order); d != std::rend(order); d++) {
    if (t.size(*d) != 1 && t.stride(*d) != expected) return false;
    expected *= t.size(*d);
  }
  return true;
}

struct Parameters {
  const Parameter &conv, &dilated, &merge, &spatial_bias, &gate, &gate_bias;
};

// The parameters in accumulation precision.
template <class A>
struct Converted {
  std::vector<A> gate, gate_bias;
  Weights<A> weights;

  Converted(const Problem& p, const Parameters& given) : gate(p.gate_weights()) {
    if (p.channel() && (p.gate == Gate::affine || p.gate == Gate::scalar))
      gate_bias.resize(gate.size());
    read(given.conv, kTaps, weights.spatial.conv);
    read(given.dilated, kTaps, weights.spatial.dilated);
    read(given.merge, 2, weights.spatial.merge);
    read(given.spatial_bias, 1, &weights.spatial.bias);
    if (given.gate) read(given.gate, gate.size(), gate.data());
    if (given.gate_bias) read(given.gate_bias, gate_bias.size(), gate_bias.data());
    weights.gate = gate.data();
    weights.gate_bias = gate_bias.data();
  }
};

Problem describe(const Tensor& x, const Parameters& given, const std::string& order,
                 const std::string& gate) {
  Problem p;
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "da_ops: x must be a CPU tensor [N, C, H, W]");
  p.n = x.size(0), p.c = x.size(1), p.h = x.size(2), p.w = x.size(3);
  STD_TORCH_CHECK(p.c > 0 && p.h > 0 && p.w > 0, "da_ops: C, H and W must be positive");
  p.channels_last = !dense(x, {0, 1, 2, 3});
  STD_TORCH_CHECK(!p.channels_last || dense(x, {0, 2, 3, 1}) || p.n == 0,
                  "da_ops: x must be contiguous or channels_last");
  STD_TORCH_CHECK(parse(order, p.order) && parse(gate, p.gate), "da_ops: unknown order or gate");
  STD_TORCH_CHECK(!p.spatial() || (given.conv && given.dilated && given.merge),
                  "da_ops: this order needs conv_weight, dilated_weight and merge_weight");
  if (p.channel() && p.gate != Gate::sigmoid) {
    STD_TORCH_CHECK(given.gate.has_value(), "da_ops: this gate needs gate_weight");
    STD_TORCH_CHECK(p.gate == Gate::eca || given.gate_bias.has_value(),
                    "da_ops: this gate needs gate_bias");
    if (p.gate == Gate::eca) p.kernel_size = given.gate->numel();
  }
  p.dtype = with_storage(x.scalar_type(), [](auto t) {
    using T = decltype(t);
    return std::is_same_v<T, float16>    ? Dtype::float16
           : std::is_same_v<T, bfloat16> ? Dtype::bfloat16
           : std::is_same_v<T, float>    ? Dtype::float32
                                         : Dtype::float64;
  });
  return p;
}

Plan plan_here(const Problem& problem) {
  return plan(problem, this_machine(torch::stable::get_num_threads()));
}

const Pool kPool = {[](int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    if (begin < end) body(context, begin, end);
  });
}};

std::tuple<Tensor, Tensor, Tensor> forward_cpu(
    const Tensor& x, const Parameter& conv_weight, const Parameter& dilated_weight,
    const Parameter& merge_weight, const Parameter& spatial_bias, const Parameter& gate_weight,
    const Parameter& gate_bias, const std::string& order, const std::string& gate) {
  const Parameters given{conv_weight,  dilated_weight, merge_weight,
                         spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe(x, given, order, gate);
  return with_storage(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const ScalarType acc = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
    const Converted<A> converted(p, given);
    Tensor y = allocate(x.sizes().data(), x.strides().data(), 4, x.scalar_type());
    Tensor channel_mean = p.spatial() ? allocate({p.n, p.h, p.w}, acc) : allocate({0}, acc);
    Tensor pooled = p.channel() ? allocate({p.n, p.c}, acc) : allocate({0}, acc);
    forward<T>(p, plan_here(p), kPool, converted.weights, static_cast<const T*>(x.const_data_ptr()),
               static_cast<T*>(y.mutable_data_ptr()),
               static_cast<A*>(channel_mean.mutable_data_ptr()),
               static_cast<A*>(pooled.mutable_data_ptr()));
    return std::make_tuple(y, channel_mean, pooled);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& dy, const Tensor& x, const Parameter& conv_weight,
    const Parameter& dilated_weight, const Parameter& merge_weight, const Parameter& spatial_bias,
    const Parameter& gate_weight, const Parameter& gate_bias, const Tensor& channel_mean,
    const Tensor& pooled, const std::string& order, const std::string& gate) {
  const Parameters given{conv_weight,  dilated_weight, merge_weight,
                         spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe(x, given, order, gate);
  STD_TORCH_CHECK(dy.is_cpu() && dy.dim() == 4 && dy.numel() == x.numel() &&
                      dy.scalar_type() == x.scalar_type(),
                  "da_ops: dy must be like x");
  STD_TORCH_CHECK(p.n == 0 || (p.channels_last ? dense(dy, {0, 2, 3, 1}) : dense(dy, {0, 1, 2, 3})),
                  "da_ops: dy must have x's layout");
  STD_TORCH_CHECK(channel_mean.numel() == (p.spatial() ? p.n * p.pixels() : 0) &&
                      pooled.numel() == (p.channel() ? p.n * p.c : 0) &&
                      channel_mean.is_contiguous() && pooled.is_contiguous(),
                  "da_ops: channel_mean and pooled must be forward's");
  return with_storage(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const Converted<A> converted(p, given);
    Tensor dx = allocate(x.sizes().data(), x.strides().data(), 4, x.scalar_type());
    SpatialWeights<double> spatial{};
    std::vector<A> d_gate(converted.gate.size()), d_gate_bias(converted.gate_bias.size());
    backward<T>(
        p, plan_here(p), kPool, converted.weights, static_cast<const T*>(dy.const_data_ptr()),
        static_cast<const T*>(x.const_data_ptr()),
        static_cast<const A*>(channel_mean.const_data_ptr()),
        static_cast<const A*>(pooled.const_data_ptr()), static_cast<T*>(dx.mutable_data_ptr()),
        {&spatial, d_gate.data(), d_gate_bias.data()});
    const ScalarType dtype = x.scalar_type();
    return std::make_tuple(dx, gradient(given.conv, dtype, spatial.conv),
                           gradient(given.dilated, dtype, spatial.dilated),
                           gradient(given.merge, dtype, spatial.merge),
                           gradient(given.spatial_bias, dtype, &spatial.bias),
                           gradient(given.gate, dtype, d_gate.data()),
                           gradient(given.gate_bias, dtype, d_gate_bias.data()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(da_ops, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward_cpu));
  m.impl("backward", TORCH_BOX(&backward_cpu));
}

}  // namespace da::cpu
