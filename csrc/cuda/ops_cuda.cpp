// The CUDA kernels behind da_ops::forward and da_ops::backward: checks, device, stream, allocation.
// The launchers get raw pointers.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda/choose.h"
#include "cuda/launch.h"

namespace da::cuda {
namespace {

void require(int error) {
  STD_TORCH_CHECK(error == cudaSuccess, "da_ops: a CUDA launch failed: ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

const Device& device_of(const Tensor& x) {
  constexpr int kMaxDevices = 64;
  static std::array<std::once_flag, kMaxDevices> known;
  static std::array<Device, kMaxDevices> devices;
  const int index = x.get_device_index();
  STD_TORCH_CHECK(index < kMaxDevices, "da_ops: more than 64 GPUs");
  std::call_once(known[index], [&] {
    devices[index] = {10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                          attribute(cudaDevAttrComputeCapabilityMinor, index),
                      attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrL2CacheSize, index)};
  });
  return devices[index];
}

int residents(Dtype dtype, const OnChip& chip) {
  int groups = 0;
  return resident_groups(dtype, chip, groups) == cudaSuccess ? groups : 0;
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
const Plan& planned(const Problem& p, const Tensor& x, bool backward, bool aligned) {
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, Dtype, Order, Gate, bool,
                         bool, bool, int, std::string>;
  constexpr size_t kMost = 1024;
  thread_local std::map<Key, Plan> plans;
  const char* const asked = std::getenv("DA_OPS_PLAN");
  const std::string measured = asked && *asked ? "" : tuned_plan(p, x, backward);
  const char* const text = measured.empty() ? asked : measured.c_str();
  const Key key{p.n,
                p.c,
                p.h,
                p.w,
                p.kernel_size,
                p.dtype,
                p.order,
                p.gate,
                p.channels_last,
                backward,
                aligned,
                x.get_device_index(),
                text ? text : ""};
  if (const auto found = plans.find(key); found != plans.end()) return found->second;

  Wish wish;
  STD_TORCH_CHECK(parse(std::get<std::string>(key), wish), kWishes, text);
  const Device& device = device_of(x);
  Plan plan = cuda::plan(p, device, aligned, wish.limits);
  const OnChip chip = choose(p, backward, device, aligned, wish,
                             [&](const OnChip& chip) { return residents(p.dtype, chip); });
  // A plan that was measured may be refused where a tensor begins elsewhere.
  STD_TORCH_CHECK(!chip.refused || wish.kind != Wish::Kind::exact || !measured.empty(),
                  "da_ops: DA_OPS_PLAN=", text, ": ", chip.refused,
                  "; unset it, or name another plan");
  if (!chip.refused)
    (backward ? plan.backward : plan.forward) = on_chip_direction(p, chip, wish.limits);
  if (plans.size() >= kMost) plans.clear();
  return plans.emplace(key, std::move(plan)).first->second;
}

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

bool aligned(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* t) {
    return reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0;
  });
}

// The given parameters' addresses. Copies that had to be made live as long as this.
class Addresses {
 public:
  Addresses(const Problem& p, const Tensor& x, const Arguments& given) : x_(x) {
    const int64_t gate = p.gate_weights();
    parameters_.conv = address(given.conv, kTaps);
    parameters_.dilated = address(given.dilated, kTaps);
    parameters_.merge = address(given.merge, 2);
    parameters_.spatial_bias = address(given.spatial_bias, 1);
    parameters_.gate = address(given.gate, gate);
    parameters_.gate_bias = address(given.gate_bias, gate);
    parameters_.wide = dtype_.value_or(x.scalar_type()) != x.scalar_type();
  }
  const Parameters& operator*() const { return parameters_; }

 private:
  const void* address(const Parameter& parameter, int64_t elements) {
    if (!parameter) return nullptr;
    const ScalarType dtype = parameter->scalar_type();
    STD_TORCH_CHECK(parameter->get_device_index() == x_.get_device_index() &&
                        parameter->is_cuda() && parameter->numel() == elements,
                    "da_ops: a parameter is not on x's device or has the wrong size");
    const bool half =
        x_.scalar_type() == ScalarType::Half || x_.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(dtype == x_.scalar_type() || (half && dtype == ScalarType::Float),
                    "da_ops: parameters must have x's dtype, or be float32 with a half x");
    STD_TORCH_CHECK(dtype_.value_or(dtype) == dtype, "da_ops: parameters must share a dtype");
    dtype_ = dtype;
    copies_.push_back(parameter->is_contiguous() ? *parameter
                                                 : torch::stable::contiguous(*parameter));
    return copies_.back().const_data_ptr();
  }

  const Tensor& x_;
  std::optional<ScalarType> dtype_;
  std::vector<Tensor> copies_;
  Parameters parameters_{};
};

Outputs forward_cuda(const Problem& p, const Tensor& x, const Arguments& given) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Addresses parameters(p, x, given);
  Tensor y = allocate_like(x);
  Tensor channel_mean = allocate_channel_mean(p, x), pooled = allocate_pooled(p, x);
  if (p.n > 0) {
    const Plan& plan = planned(p, x, false, aligned({&x, &y}));
    Tensor workspace = allocate(x, {plan.forward.workspace.elements}, accumulation_type(x));
    require(forward(p, plan, *parameters, x.const_data_ptr(), y.mutable_data_ptr(),
                    channel_mean.mutable_data_ptr(), pooled.mutable_data_ptr(),
                    workspace.mutable_data_ptr(), stream_of(x)));
  }
  return {y, channel_mean, pooled};
}

InputGradients backward_cuda(const Problem& p, const Tensor& dy, const Tensor& x,
                             const Arguments& given, const Tensor& channel_mean,
                             const Tensor& pooled) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Addresses parameters(p, x, given);
  Tensor dx = allocate_like(x);
  std::array<Tensor, 6> gradients = {
      allocate_gradient(given.conv, x),  allocate_gradient(given.dilated, x),
      allocate_gradient(given.merge, x), allocate_gradient(given.spatial_bias, x),
      allocate_gradient(given.gate, x),  allocate_gradient(given.gate_bias, x)};
  const auto address = [&](int i, const Parameter& parameter) {
    return parameter ? gradients[i].mutable_data_ptr() : nullptr;
  };
  const Gradients addresses{address(0, given.conv),  address(1, given.dilated),
                            address(2, given.merge), address(3, given.spatial_bias),
                            address(4, given.gate),  address(5, given.gate_bias)};
  const Plan& plan = planned(p, x, true, aligned({&x, &dy, &dx}));
  Tensor workspace = allocate(x, {plan.backward.workspace.elements}, accumulation_type(x));
  require(backward(p, plan, *parameters, dy.const_data_ptr(), x.const_data_ptr(),
                   channel_mean.const_data_ptr(), pooled.const_data_ptr(), dx.mutable_data_ptr(),
                   addresses, workspace.mutable_data_ptr(), stream_of(x)));
  return {dx, gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], gradients[5]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(da_ops, m) { m.def("_cuda_tune" DA_TUNE_SCHEMA); }

STABLE_TORCH_LIBRARY_IMPL(da_ops, CompositeExplicitAutograd, m) {
  m.impl("_cuda_tune", TORCH_BOX(&tune_operator<tune>));
}

STABLE_TORCH_LIBRARY_IMPL(da_ops, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward_operator<forward_cuda>));
  m.impl("backward", TORCH_BOX(&backward_operator<backward_cuda>));
}

}  // namespace da::cuda
