// The residual tail's operators, like those of arguments.h.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace da {

// Order "none" leaves attention out.
inline Problem describe_residual(const Tensor& u, const Arguments& given, const std::string& order,
                                 const std::string& gate) {
  if (order != "none") return describe(u, given, order, gate);
  Problem p = describe(u, given, "channel", "sigmoid");  // which needs no parameter
  p.order = Order::none;
  return p;
}

inline void check_like(const Problem& p, const Tensor& t, const Tensor& u, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() == u.is_cpu() && t.get_device_index() == u.get_device_index() &&
                      t.dim() == 4 && t.numel() == u.numel() && t.scalar_type() == u.scalar_type(),
                  "da_ops: ", name, " must be like u");
  STD_TORCH_CHECK(p.n == 0 || (p.channels_last ? dense(t, {0, 2, 3, 1}) : dense(t, {0, 1, 2, 3})),
                  "da_ops: ", name, " must have u's layout");
}

// The norm's arguments of forward: statistics of its own, or none where the batch's are taken.
struct GivenNorm {
  const Parameter &weight, &bias, &mean, &var;
  double eps;
};

// Running statistics, of which those of the batch take a share of `momentum`; null where there are
// none.
struct Running {
  const Tensor *mean, *var, *batches;
  double momentum;
};

// The factor that makes a batch's variance an estimate without bias.
inline double unbiased(const Problem& p) {
  const double count = double(p.n) * p.pixels();
  return count / (count - 1);
}

// out, mean, var, channel_mean, pooled.
using ResidualOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the operator of backward gives: of these, in this order, the gradients that there are.
inline std::vector<Tensor> present(const Parameter& du, const Parameter& d_shortcut,
                                   const Parameter& d_weight, const Parameter& d_bias,
                                   const Parameters<Parameter>& d) {
  std::vector<Tensor> found;
  for (const Parameter* gradient : {&du, &d_shortcut, &d_weight, &d_bias, &d.conv, &d.dilated,
                                    &d.merge, &d.spatial_bias, &d.gate, &d.gate_bias})
    if (*gradient) found.push_back(**gradient);
  return found;
}

// The operators, by a backend's function of the checked call.
using ResidualForward = ResidualOutputs(const Problem&, const Tensor& u, const Parameter& shortcut,
                                        const GivenNorm&, const Running&, const Arguments&);

template <ResidualForward* kForward>
ResidualOutputs residual_forward_operator(
    const Tensor& u, const Parameter& shortcut, const Parameter& norm_weight,
    const Parameter& norm_bias, const Parameter& norm_mean, const Parameter& norm_var, double eps,
    const Parameter& conv_weight, const Parameter& dilated_weight, const Parameter& merge_weight,
    const Parameter& spatial_bias, const Parameter& gate_weight, const Parameter& gate_bias,
    const std::string& order, const std::string& gate) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe_residual(u, given, order, gate);
  if (shortcut) check_like(p, *shortcut, u, "shortcut");
  STD_TORCH_CHECK(norm_mean.has_value() == norm_var.has_value(),
                  "da_ops: norm_mean and norm_var go together");
  return kForward(p, u, shortcut, {norm_weight, norm_bias, norm_mean, norm_var, eps}, {}, given);
}

template <ResidualForward* kForward>
ResidualOutputs residual_training_operator(
    const Tensor& u, const Parameter& shortcut, const Parameter& norm_weight,
    const Parameter& norm_bias, const Tensor& running_mean, const Tensor& running_var,
    const Parameter& batches, double momentum, double eps, const Parameter& conv_weight,
    const Parameter& dilated_weight, const Parameter& merge_weight, const Parameter& spatial_bias,
    const Parameter& gate_weight, const Parameter& gate_bias, const std::string& order,
    const std::string& gate) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe_residual(u, given, order, gate);
  if (shortcut) check_like(p, *shortcut, u, "shortcut");
  for (const Tensor* t : {&running_mean, &running_var})
    STD_TORCH_CHECK(t->numel() == p.c && t->is_contiguous(),
                    "da_ops: running statistics must be one number a channel, contiguous");
  if (batches) {
    STD_TORCH_CHECK(batches->numel() == 1 && batches->scalar_type() == ScalarType::Long,
                    "da_ops: batches must be one number of int64");
    STD_TORCH_CHECK(batches->is_cpu() == u.is_cpu() && batches->is_cuda() == u.is_cuda() &&
                        batches->get_device_index() == u.get_device_index(),
                    "da_ops: batches must be on u's device");
  }
  const Parameter none;
  return kForward(p, u, shortcut, {norm_weight, norm_bias, none, none, eps},
                  {&running_mean, &running_var, batches ? &*batches : nullptr, momentum}, given);
}

}  // namespace da
