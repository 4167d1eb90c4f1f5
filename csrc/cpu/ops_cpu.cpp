// The CPU kernels behind da_ops::forward and da_ops::backward: checks, allocation, conversion of
// the few parameters; the work is in forward.cpp and backward.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "operator.h"

namespace da::cpu {
namespace {

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

// Copies a parameter of n elements to `out`, zeros where it is absent.
template <class A>
A* read(const Parameter& parameter, int64_t n, A* out) {
  if (!parameter) return std::fill_n(out, n, A(0)), out;
  STD_TORCH_CHECK(parameter->is_cpu() && parameter->numel() == n,
                  "da_ops: a parameter is not on the CPU or has the wrong size");
  const Tensor dense =
      parameter->is_contiguous() ? *parameter : torch::stable::contiguous(*parameter);
  with_elements(dense, [&](auto* p) { std::copy_n(p, n, out); });
  return out;
}

// The gradient of `parameter`: in its shape and dtype, empty where there is none.
Tensor gradient(const Parameter& parameter, const Tensor& x, const double* values) {
  Tensor out = allocate_gradient(parameter, x);
  if (!parameter) return out;
  with_elements(out, [&](auto* p) {
    for (int64_t i = 0; i < out.numel(); i++) p[i] = values[i];
  });
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

Limits limits_of(const std::string& text) {
  Limits limits;
  STD_TORCH_CHECK(parse(text, limits), kLimits, text);
  return limits;
}

// The limits of all calls: the machine's own, or what somebody wished.
struct Wish {
  explicit Wish(const std::string& text) : limits(limits_of(text)), wished(!text.empty()) {}
  Limits limits;
  bool wished;
};

// That of the environment; read once, since a small call takes a few microseconds.
Wish& wish() {
  static Wish wish([] {
    const char* text = std::getenv("DA_OPS_CPU_PLAN");
    return text ? text : "";
  }());
  return wish;
}

// Other limits for all calls from now on, as DA_OPS_CPU_PLAN says them. For tests, while none runs.
void set_limits(const std::string& text) { wish() = Wish(text); }

// Limits that were measured, by call and number of threads.
TunedPlans<Limits> tuned;

void tune(const Problem& p, bool backward, const std::string& threads, const std::string& text) {
  tuned.set(p, backward, threads,
            text.empty() ? std::nullopt : std::optional<Limits>(limits_of(text)));
}

Plan plan_here(const Problem& problem, bool backward) {
  const int64_t threads = torch::stable::get_num_threads();
  if (tuned.any() && !wish().wished)
    if (const auto limits = tuned.find(problem, backward, std::to_string(threads)))
      return plan(problem, {threads, *limits});
  return plan(problem, {threads, wish().limits});
}

const Pool kPool = {[](int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    if (begin < end) body(context, begin, end);
  });
}};

Outputs forward_cpu(const Problem& p, const Tensor& x, const Arguments& given) {
  return with_storage(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const Converted<A> converted(p, given);
    Tensor y = allocate_like(x);
    Tensor channel_mean = allocate_channel_mean(p, x), pooled = allocate_pooled(p, x);
    forward<T>(p, plan_here(p, false), kPool, converted.weights,
               static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
               static_cast<A*>(channel_mean.mutable_data_ptr()),
               static_cast<A*>(pooled.mutable_data_ptr()));
    return std::make_tuple(y, channel_mean, pooled);
  });
}

InputGradients backward_cpu(const Problem& p, const Tensor& dy, const Tensor& x,
                            const Arguments& given, const Tensor& channel_mean,
                            const Tensor& pooled) {
  return with_storage(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const Converted<A> converted(p, given);
    Tensor dx = allocate_like(x);
    std::vector<double> values(2 * kTaps + 3 + 2 * p.gate_weights());
    double* next = values.data();
    const Parameters<double*> gradients =
        each([&](int64_t n) { return std::exchange(next, next + n); }, sizes(p));
    backward<T>(p, plan_here(p, true), kPool, converted.weights,
                static_cast<const T*>(dy.const_data_ptr()),
                static_cast<const T*>(x.const_data_ptr()),
                static_cast<const A*>(channel_mean.const_data_ptr()),
                static_cast<const A*>(pooled.const_data_ptr()),
                static_cast<T*>(dx.mutable_data_ptr()), gradients);
    const auto result = [&](const Parameter& parameter, const double* values) {
      return gradient(parameter, x, values);
    };
    return input_gradients(dx, each(result, given, gradients));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(da_ops, m) {
  m.def("_cpu_plan(str limits) -> ()");
  m.def("_cpu_tune" DA_TUNE_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(da_ops, CompositeExplicitAutograd, m) {
  m.impl("_cpu_plan", TORCH_BOX(&set_limits));
  m.impl("_cpu_tune", TORCH_BOX(&tune_operator<tune>));
}

STABLE_TORCH_LIBRARY_IMPL(da_ops, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward_operator<forward_cpu>));
  m.impl("backward", TORCH_BOX(&backward_operator<backward_cpu>));
}

}  // namespace da::cpu
