// The CUDA kernels behind the residual tail's operators: checks, device, stream, allocation. The
// launcher gets raw pointers.
#include <cstdlib>
#include <map>
#include <string>
#include <tuple>

#include "cuda/call.h"
#include "cuda/plan/choose.h"
#include "cuda/tail/launch.h"
#include "residual_arguments.h"

namespace da::cuda {
namespace {

// The launches, as this thread planned them before. Of DA_OPS_PLAN only the limits matter: the tail
// always runs by passes.
const TailPlan& planned(const Problem& p, TailKind kind, const Tensor& u, bool aligned) {
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, Dtype, Order, Gate, bool,
                         bool, bool, bool, bool, bool, bool, int, std::string>;
  constexpr size_t kMost = 1024;
  thread_local std::map<Key, TailPlan> plans;
  const char* const asked = std::getenv("DA_OPS_PLAN");
  const Key key{p.n,
                p.c,
                p.h,
                p.w,
                p.kernel_size,
                p.dtype,
                p.order,
                p.gate,
                p.channels_last,
                kind.batch,
                kind.shortcut,
                kind.shortcut_norm,
                kind.shortcut_batch,
                kind.statistics,
                aligned,
                u.get_device_index(),
                asked ? asked : ""};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  Wish wish;
  const std::string& text = std::get<std::string>(key);
  STD_TORCH_CHECK(parse(text, wish), kWishes, text);
  if (plans.size() >= kMost) plans.clear();
  return plans.emplace(key, tail_plan(p, kind, device_of(u), aligned, wish.limits)).first->second;
}

// The norms' tensors. Copies that had to be made live as long as this.
class NormTensors {
 public:
  explicit NormTensors(const Tensor& u) : u_(u) {}

  OfNorm operator()(const Parameter& given) {
    if (!given) return {};
    copies_.push_back(given->is_contiguous() ? *given : torch::stable::contiguous(*given));
    return {copies_.back().const_data_ptr(), given->scalar_type() != u_.scalar_type()};
  }
  NormArgs operator()(const GivenNorm& norm) {
    NormTensors& of = *this;
    return {of(norm.weight), of(norm.bias), of(norm.mean), of(norm.var), norm.eps};
  }
  // One that a kernel writes.
  KeptOfNorm kept(const Tensor& given) {
    return {given.mutable_data_ptr(), given.scalar_type() != u_.scalar_type()};
  }

 private:
  const Tensor& u_;
  std::vector<Tensor> copies_;
};

// The batch's statistics, and running ones that take a share of them.
void set_statistics(TailPointers& at, const Tensor& mean, const Tensor& var, const Running& running,
                    NormTensors& of_norm) {
  at.new_mean = mean.mutable_data_ptr(), at.new_var = var.mutable_data_ptr();
  if (!running.mean) return;
  at.running_mean = of_norm.kept(*running.mean), at.running_var = of_norm.kept(*running.var);
  at.momentum = running.momentum;
  if (running.batches) at.batches = static_cast<int64_t*>(running.batches->mutable_data_ptr());
}

Moments batch_statistics_cuda(const Problem& p, const Tensor& u, const Running& running) {
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  TailKind kind{};
  kind.batch = kind.statistics = true;
  const TailPlan& plan = planned(p, kind, u, aligned({&u}));
  const Tensor mean = allocate(u, {p.c}, accumulation_type(u));
  const Tensor var = allocate(u, {p.c}, accumulation_type(u));
  const Tensor workspace = allocate(u, {plan.forward.workspace.elements}, accumulation_type(u));
  NormTensors of_norm(u);
  TailPointers at{};
  at.u = u.const_data_ptr();
  set_statistics(at, mean, var, running, of_norm);
  at.workspace = workspace.mutable_data_ptr(), at.stream = stream_of(u);
  require(run_tail(p, plan, Way::forward, at));
  return {mean, var};
}

ResidualOutputs residual_forward_cuda(const Problem& p, const Tensor& u, const GivenShortcut& added,
                                      const GivenNorm& norm, const Running& running,
                                      const Arguments& given) {
  const Parameter& shortcut = added.tensor;
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  const bool batch = !norm.mean;
  const Addresses parameters(u, given);
  NormTensors of_norm(u);
  Tensor out = allocate_like(u);
  Tensor mean = allocate(u, {batch ? p.c : 0}, accumulation_type(u));
  Tensor var = allocate(u, {batch ? p.c : 0}, accumulation_type(u));
  Tensor channel_mean = allocate_channel_mean(p, u), pooled = allocate_pooled(p, u);
  TailKind kind{};
  kind.batch = batch, kind.shortcut = shortcut.has_value(), kind.shortcut_norm = added.normed();
  const TailPlan& plan = planned(p, kind, u, aligned({&u, shortcut ? &*shortcut : &u, &out}));
  Tensor workspace = allocate(u, {plan.forward.workspace.elements}, accumulation_type(u));
  TailPointers at{};
  at.u = u.const_data_ptr(), at.shortcut = shortcut ? shortcut->const_data_ptr() : nullptr;
  at.result = out.mutable_data_ptr();
  at.channel_mean = channel_mean.mutable_data_ptr(), at.pooled = pooled.mutable_data_ptr();
  at.norm = of_norm(norm);
  if (batch) set_statistics(at, mean, var, running, of_norm);
  if (added.normed()) at.shortcut_norm = of_norm(added.norm);
  at.parameters = *parameters, at.wide = parameters.wide();
  at.workspace = workspace.mutable_data_ptr(), at.stream = stream_of(u);
  require(run_tail(p, plan, Way::forward, at));
  return {out, mean, var, channel_mean, pooled};
}

std::vector<Tensor> residual_backward_cuda(
    const Tensor& dout, const Parameter& out, const Tensor& u, const Parameter& norm_weight,
    const Parameter& norm_bias, const Tensor& mean, const Tensor& var, bool batch, double eps,
    const Parameter& conv_weight, const Parameter& dilated_weight, const Parameter& merge_weight,
    const Parameter& spatial_bias, const Parameter& gate_weight, const Parameter& gate_bias,
    const Tensor& channel_mean, const Tensor& pooled, const std::string& order,
    const std::string& gate, const Parameter& shortcut, const Parameter& shortcut_weight,
    const Parameter& shortcut_bias, const Parameter& shortcut_mean, const Parameter& shortcut_var,
    double shortcut_eps, bool shortcut_batch) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe_residual_backward(
      dout, out, u, {address(norm_weight), address(norm_bias), &mean, &var}, given, channel_mean,
      pooled, order, gate);
  const GivenShortcut added{
      shortcut, {shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps}};
  check_backward(p, u, out, added);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  const Addresses parameters(u, given);
  NormTensors of_norm(u);
  const Tensor du = allocate_like(u);
  const Parameter d = out ? Parameter(allocate_like(u)) : Parameter();
  const auto like = [&](const Parameter& parameter) {
    return parameter ? Parameter(allocate_gradient(parameter, u)) : Parameter();
  };
  const Parameter d_weight = like(norm_weight), d_bias = like(norm_bias);
  const Parameter d_shortcut_weight = like(shortcut_weight), d_shortcut_bias = like(shortcut_bias);
  const Parameters<Parameter> gradients = each(like, given);
  const bool all_aligned = aligned({&u, &dout, &du}) && (!out || aligned({&*out, &*d})) &&
                           (!added.normed() || aligned({&*shortcut}));
  const TailKind kind{batch, out.has_value(), added.normed(), shortcut_batch, false};
  const TailPlan& plan = planned(p, kind, u, all_aligned);
  const Parameter d_shortcut = added.normed() && !plan.in_place() ? Parameter(allocate_like(u)) : d;
  Tensor workspace = allocate(u, {plan.backward.workspace.elements}, accumulation_type(u));
  const auto address = [](const Parameter& gradient) -> void* {
    return gradient ? gradient->mutable_data_ptr() : nullptr;
  };
  TailPointers at{};
  at.u = u.const_data_ptr(), at.dout = dout.const_data_ptr(), at.result = du.mutable_data_ptr();
  if (out) at.out = out->const_data_ptr();
  at.d = address(d);
  at.channel_mean = const_cast<void*>(channel_mean.const_data_ptr());
  at.pooled = const_cast<void*>(pooled.const_data_ptr());
  at.batch = batch;
  at.norm = {of_norm(norm_weight), of_norm(norm_bias), of_norm(mean), of_norm(var), eps};
  at.d_weight = address(d_weight), at.d_bias = address(d_bias);
  if (added.normed()) {
    at.shortcut = shortcut->const_data_ptr(), at.d_shortcut = address(d_shortcut);
    at.shortcut_batch = shortcut_batch, at.shortcut_norm = of_norm(added.norm);
    at.d_shortcut_weight = address(d_shortcut_weight);
    at.d_shortcut_bias = address(d_shortcut_bias);
  }
  at.parameters = *parameters, at.wide = parameters.wide();
  at.gradients = each(address, gradients);
  at.workspace = workspace.mutable_data_ptr(), at.stream = stream_of(u);
  require(run_tail(p, plan, Way::backward, at));
  return present(du, d_shortcut, d_weight, d_bias, gradients, d_shortcut_weight, d_shortcut_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(da_ops, CUDA, m) {
  m.impl("residual_forward", TORCH_BOX(&residual_forward_operator<residual_forward_cuda>));
  m.impl("residual_training", TORCH_BOX(&residual_training_operator<residual_forward_cuda>));
  m.impl("batch_statistics", TORCH_BOX(&batch_statistics_operator<batch_statistics_cuda>));
  m.impl("residual_backward", TORCH_BOX(&residual_backward_cuda));
}

}  // namespace da::cuda
