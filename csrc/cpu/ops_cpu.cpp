// The CPU kernels behind da_ops::forward and da_ops::backward: checks, allocation, conversion of
// the few parameters; the work is in forward.cpp and backward.cpp.
#include <cstdlib>
#include <string>
#include <tuple>

#include "operator.h"
#include "tensors.h"

namespace da::cpu {
namespace {

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

// The limits of DA_OPS_CPU_PLAN, which is read once, since a small call takes a few microseconds.
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

}  // namespace

Plan plan_here(const Problem& problem, bool backward, int tensors) {
  const int64_t threads = torch::stable::get_num_threads();
  if (tuned.any() && !wish().wished)
    if (const auto limits = tuned.find(problem, backward, std::to_string(threads)))
      return plan(problem, {threads, *limits}, tensors);
  return plan(problem, {threads, wish().limits}, tensors);
}

namespace {

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
    const GradientValues gradients(p);
    backward<T>(p, plan_here(p, true), kPool, converted.weights,
                static_cast<const T*>(dy.const_data_ptr()),
                static_cast<const T*>(x.const_data_ptr()),
                static_cast<const A*>(channel_mean.const_data_ptr()),
                static_cast<const A*>(pooled.const_data_ptr()),
                static_cast<T*>(dx.mutable_data_ptr()), gradients.places);
    return input_gradients(dx, gradients.tensors(given, x));
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
