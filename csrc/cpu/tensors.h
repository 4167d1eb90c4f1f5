// What the CPU operators share: from tensors to the kernels' plain data, and back.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <utility>
#include <vector>

#include "arguments.h"
#include "image.h"

namespace da::cpu {

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

// Copies a parameter of n elements, which has been checked, to `out`, zeros where it is absent.
template <class A>
A* read(const Parameter& parameter, int64_t n, A* out) {
  if (!parameter) return std::fill_n(out, n, A(0)), out;
  const Tensor dense =
      parameter->is_contiguous() ? *parameter : torch::stable::contiguous(*parameter);
  with_elements(dense, [&](auto* p) { std::copy_n(p, n, out); });
  return out;
}

// The gradient of `parameter`: in its shape and dtype, empty where there is none.
inline Tensor gradient(const Parameter& parameter, const Tensor& x, const double* values) {
  Tensor out = allocate_gradient(parameter, x);
  if (!parameter) return out;
  with_elements(out, [&, n = out.numel()](auto* p) { std::copy_n(values, n, p); });
  return out;
}

// The parameters in accumulation precision.
template <class A>
struct Converted {
  std::vector<A> gate;  // weights, then biases
  Weights<A> weights;

  Converted(const Problem& p, const Arguments& given) : gate(2 * p.gate_weights()) {
    SpatialWeights<A>& s = weights.spatial;
    A *const gate_weight = gate.data(), *const gate_bias = gate_weight + p.gate_weights();
    each(read<A>, given, sizes(p),
         Parameters<A*>{s.conv, s.dilated, s.merge, &s.bias, gate_weight, gate_bias});
    weights.gate = gate_weight;
    weights.gate_bias = gate_bias;
  }
};

// Places for each parameter's gradient, in one array.
class GradientValues {
 public:
  explicit GradientValues(const Problem& p) : values_(2 * kTaps + 3 + 2 * p.gate_weights()) {
    double* next = values_.data();
    places = each([&](int64_t n) { return std::exchange(next, next + n); }, sizes(p));
  }
  GradientValues(const GradientValues&) = delete;
  Parameters<Tensor> tensors(const Arguments& given, const Tensor& x) const {
    return each([&](const Parameter& parameter,
                    const double* values) { return gradient(parameter, x, values); },
                given, places);
  }
  Parameters<double*> places;

 private:
  std::vector<double> values_;
};

inline const Pool kPool = {[](int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    if (begin < end) body(context, begin, end);
  });
}};

// The plan of a call here whose forward reads and writes so many tensors of the size of x: as
// measured, as wished, or the machine's own.
Plan plan_here(const Problem& problem, bool backward, int tensors = 2);

}  // namespace da::cpu
