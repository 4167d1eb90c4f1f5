// The CUDA kernels behind da_ops::forward and da_ops::backward: checks, device, stream, allocation.
// The launchers get raw pointers.
#include <cstdlib>
#include <map>
#include <tuple>

#include "cuda/call.h"
#include "cuda/first_call.h"
#include "cuda/plan/choose.h"

namespace da::cuda {
namespace {

int residents(Dtype dtype, const OnChip& chip) {
  int teams = 0;
  return resident_teams(dtype, chip, teams) == cudaSuccess ? teams : 0;
}

// Plans that were measured, by device: texts as DA_OPS_PLAN has them.
TunedPlans<std::string> tuned;

void tune(const Problem& p, bool backward, const std::string& device, const std::string& text) {
  Wish wish;
  STD_TORCH_CHECK(parse(text, wish), kWishes, text);
  tuned.set(p, backward, device, text.empty() ? std::nullopt : std::optional<std::string>(text));
}

// x's device as da_ops/backends/tuned.py names it.
const std::string& device_name(const Tensor& x) {
  thread_local std::map<int, std::string> names;  // to ask takes longer than a launch
  std::string& name = names[x.get_device_index()];
  if (name.empty()) {
    cudaDeviceProp properties;
    int driver = 0;
    require(cudaGetDeviceProperties(&properties, x.get_device_index()));
    require(cudaDriverGetVersion(&driver));
    name = properties.name + (", driver " + std::to_string(driver));
  }
  return name;
}

// Empty where none was measured.
std::string tuned_plan(const Problem& p, const Tensor& x, bool backward) {
  return tuned.any() ? tuned.find(p, backward, device_name(x)).value_or("") : "";
}

// One direction's launches, as this thread planned them before: a plan costs more than a launch.
const Plan& planned(const Problem& p, const Tensor& x, Way way, bool aligned) {
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, Dtype, Order, Gate, bool, Way,
                         bool, int, std::string>;
  constexpr size_t kMost = 1024;
  thread_local std::map<Key, Plan> plans;
  const char* const asked = std::getenv("DA_OPS_PLAN");
  const bool free = !asked || !*asked;  // to run by what was measured
  std::string measured = free ? tuned_plan(p, x, way == Way::backward) : "";
  Key key{p.n,
          p.c,
          p.h,
          p.w,
          p.kernel_size,
          p.dtype,
          p.order,
          p.gate,
          p.channels_last,
          way,
          aligned,
          x.get_device_index(),
          free ? measured : asked};
  auto found = plans.find(key);
  if (found == plans.end() && free && measured.empty()) {
    tell_of_first_call(p, x, way == Way::backward);
    std::get<std::string>(key) = measured = tuned_plan(p, x, way == Way::backward);
    found = plans.find(key);
  }
  if (found != plans.end()) return found->second;

  Wish wish;
  const std::string& text = std::get<std::string>(key);
  STD_TORCH_CHECK(parse(text, wish), kWishes, text);
  const Device& device = device_of(x);
  Plan plan = cuda::plan(p, device, aligned, wish.limits);
  const OnChip chip = choose(p, way, device, aligned, wish,
                             [&](const OnChip& chip) { return residents(p.dtype, chip); });
  // A plan that was measured may be refused where a tensor begins elsewhere.
  STD_TORCH_CHECK(!chip.refused || wish.kind != Wish::Kind::exact || !measured.empty(),
                  "da_ops: DA_OPS_PLAN=", text, ": ", chip.refused,
                  "; unset it, or name another plan");
  if (!chip.refused)
    (way == Way::backward ? plan.backward : plan.forward) = on_chip_direction(p, chip, wish.limits);
  if (plans.size() >= kMost) plans.clear();
  return plans.emplace(key, std::move(plan)).first->second;
}

Outputs forward_cuda(const Problem& p, const Tensor& x, const Arguments& given) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Addresses parameters(x, given);
  Tensor y = allocate_like(x);
  Tensor channel_mean = allocate_channel_mean(p, x), pooled = allocate_pooled(p, x);
  if (p.n > 0) {
    const Plan& plan = planned(p, x, Way::forward, aligned({&x, &y}));
    Tensor workspace = allocate(x, {plan.forward.workspace.elements}, accumulation_type(x));
    Pointers at{};
    at.x = x.const_data_ptr(), at.out = y.mutable_data_ptr();
    at.channel_mean = channel_mean.mutable_data_ptr(), at.pooled = pooled.mutable_data_ptr();
    at.parameters = *parameters, at.wide = parameters.wide();
    at.workspace = workspace.mutable_data_ptr(), at.stream = stream_of(x);
    require(run(p, plan, Way::forward, at));
  }
  return {y, channel_mean, pooled};
}

InputGradients backward_cuda(const Problem& p, const Tensor& dy, const Tensor& x,
                             const Arguments& given, const Tensor& channel_mean,
                             const Tensor& pooled) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Addresses parameters(x, given);
  Tensor dx = allocate_like(x);
  const Parameters<Tensor> gradients =
      each([&](const Parameter& parameter) { return allocate_gradient(parameter, x); }, given);
  const Plan& plan = planned(p, x, Way::backward, aligned({&x, &dy, &dx}));
  Tensor workspace = allocate(x, {plan.backward.workspace.elements}, accumulation_type(x));
  Pointers at{};
  at.x = x.const_data_ptr(), at.dy = dy.const_data_ptr(), at.out = dx.mutable_data_ptr();
  at.channel_mean = const_cast<void*>(channel_mean.const_data_ptr());
  at.pooled = const_cast<void*>(pooled.const_data_ptr());
  at.parameters = *parameters, at.wide = parameters.wide();
  at.gradients = each(
      [](const Parameter& parameter, const Tensor& gradient) -> void* {
        return parameter ? gradient.mutable_data_ptr() : nullptr;
      },
      given, gradients);
  at.workspace = workspace.mutable_data_ptr(), at.stream = stream_of(x);
  require(run(p, plan, Way::backward, at));
  return input_gradients(dx, gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(da_ops, m) {
  m.def("_cuda_tune" DA_TUNE_SCHEMA);
  m.def("_cuda_first_call" DA_FIRST_CALL_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(da_ops, CompositeExplicitAutograd, m) {
  m.impl("_cuda_tune", TORCH_BOX(&tune_operator<tune>));
  m.impl("_cuda_first_call", TORCH_BOX(&no_first_call));
}

STABLE_TORCH_LIBRARY_IMPL(da_ops, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward_operator<forward_cuda>));
  m.impl("backward", TORCH_BOX(&backward_operator<backward_cuda>));
}

}  // namespace da::cuda
