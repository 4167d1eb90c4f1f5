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

// The norm's arguments of forward: statistics of its own, or none where the batch's are taken.
struct GivenNorm {
  const Parameter &weight, &bias, &mean, &var;
  double eps;
};

// The shortcut, and the norm that it goes through, which has a mean then, and statistics of its
// own.
struct GivenShortcut {
  const Parameter& tensor;
  const GivenNorm norm;

  bool normed() const { return norm.mean.has_value(); }
};

// Running statistics, of which those of the batch take a share of `momentum`; null where there are
// none.
struct Running {
  const Tensor *mean, *var, *batches;
  double momentum;
};

// Refuses tensors of a norm but those of one number a channel, on u's device, in a dtype that goes
// with u.
inline void check_norm(const Problem& p, const Tensor& u,
                       std::initializer_list<const Tensor*> given) {
  for (const Tensor* t : given) {
    if (!t) continue;
    STD_TORCH_CHECK(on_device_of(u, *t), "da_ops: the norm's tensors must be on u's device");
    STD_TORCH_CHECK(t->numel() == p.c, "da_ops: the norm's tensors must be one number a channel");
    STD_TORCH_CHECK(goes_with(u, t->scalar_type()),
                    "da_ops: the norm's tensors must have u's dtype, or be float32 with a half u");
  }
}

inline const Tensor* address(const Parameter& parameter) {
  return parameter ? &*parameter : nullptr;
}

// Refuses running statistics that cannot be updated where they are.
inline void check_running(const Problem& p, const Tensor& u, const Running& running) {
  for (const Tensor* t : {running.mean, running.var})
    STD_TORCH_CHECK(!t || t->is_contiguous(), "da_ops: running statistics must be contiguous");
  check_norm(p, u, {running.mean, running.var});
  if (!running.batches) return;
  STD_TORCH_CHECK(
      running.batches->numel() == 1 && running.batches->scalar_type() == ScalarType::Long,
      "da_ops: batches must be one number of int64");
  STD_TORCH_CHECK(on_device_of(u, *running.batches), "da_ops: batches must be on u's device");
}

inline void check_batch(const Problem& p) {
  STD_TORCH_CHECK(p.n * p.pixels() > 1,
                  "da_ops: more than one value a channel is needed by a norm in training");
}

// Refuses a norm of no shortcut, too.
inline void check_shortcut(const Problem& p, const Tensor& u, const GivenShortcut& shortcut) {
  const GivenNorm& norm = shortcut.norm;
  if (shortcut.tensor) check_like(p, *shortcut.tensor, "shortcut", u, "u");
  STD_TORCH_CHECK(norm.mean.has_value() == norm.var.has_value(),
                  "da_ops: shortcut_mean and shortcut_var go together");
  STD_TORCH_CHECK(!shortcut.normed() || shortcut.tensor, "da_ops: a shortcut's norm needs one");
  STD_TORCH_CHECK(shortcut.normed() || !(norm.weight || norm.bias),
                  "da_ops: a shortcut's norm needs statistics");
  check_norm(p, u,
             {address(norm.weight), address(norm.bias), address(norm.mean), address(norm.var)});
}

// Refuses a backward call, too, of a normed shortcut without what forward made of it.
inline void check_backward(const Problem& p, const Tensor& u, const Parameter& out,
                           const GivenShortcut& shortcut) {
  check_shortcut(p, u, shortcut);
  STD_TORCH_CHECK(out || !shortcut.normed(), "da_ops: a shortcut's norm needs forward's out");
}

// Refuses a forward call, too, of no images, or of one value a channel where the statistics are to
// be the batch's.
inline void check_forward(const Problem& p, const Tensor& u, const GivenShortcut& shortcut,
                          const GivenNorm& norm, const Running& running) {
  STD_TORCH_CHECK(p.n > 0, "da_ops: u must hold at least one image");
  if (!norm.mean) check_batch(p);
  check_norm(p, u,
             {address(norm.weight), address(norm.bias), address(norm.mean), address(norm.var)});
  check_running(p, u, running);
  check_shortcut(p, u, shortcut);
}

// out, mean, var, channel_mean, pooled.
using ResidualOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the operator of backward gives: of these, in this order, the gradients that there are.
inline std::vector<Tensor> present(const Parameter& du, const Parameter& d_shortcut,
                                   const Parameter& d_weight, const Parameter& d_bias,
                                   const Parameters<Parameter>& d,
                                   const Parameter& d_shortcut_weight,
                                   const Parameter& d_shortcut_bias) {
  std::vector<Tensor> found;
  for (const Parameter* gradient :
       {&du, &d_shortcut, &d_weight, &d_bias, &d.conv, &d.dilated, &d.merge, &d.spatial_bias,
        &d.gate, &d.gate_bias, &d_shortcut_weight, &d_shortcut_bias})
    if (*gradient) found.push_back(**gradient);
  return found;
}

// The problem of a checked call of backward.
inline Problem describe_residual_backward(const Tensor& dout, const Parameter& out, const Tensor& u,
                                          std::initializer_list<const Tensor*> norm,
                                          const Arguments& given, const Tensor& channel_mean,
                                          const Tensor& pooled, const std::string& order,
                                          const std::string& gate) {
  const Problem p = describe_residual(u, given, order, gate);
  check_like(p, dout, "dout", u, "u");
  if (out) check_like(p, *out, "out", u, "u");
  check_maps(p, u, channel_mean, pooled);
  check_norm(p, u, norm);
  return p;
}

// The operators, by a backend's function of the checked call.
using ResidualForward = ResidualOutputs(const Problem&, const Tensor& u, const GivenShortcut&,
                                        const GivenNorm&, const Running&, const Arguments&);

// Mean and biased variance, [C].
using Moments = std::tuple<Tensor, Tensor>;

template <Moments (*kStatistics)(const Problem&, const Tensor& u, const Running&)>
Moments batch_statistics_operator(const Tensor& u, const Parameter& running_mean,
                                  const Parameter& running_var, const Parameter& batches,
                                  double momentum) {
  const Parameter none;
  const Problem p = describe_residual(u, {none, none, none, none, none, none}, "none", "");
  const Running running{address(running_mean), address(running_var), address(batches), momentum};
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "da_ops: running_mean and running_var go together");
  check_batch(p);
  check_running(p, u, running);
  return kStatistics(p, u, running);
}

template <ResidualForward* kForward>
ResidualOutputs residual_forward_operator(
    const Tensor& u, const Parameter& shortcut, const Parameter& norm_weight,
    const Parameter& norm_bias, const Parameter& norm_mean, const Parameter& norm_var, double eps,
    const Parameter& conv_weight, const Parameter& dilated_weight, const Parameter& merge_weight,
    const Parameter& spatial_bias, const Parameter& gate_weight, const Parameter& gate_bias,
    const std::string& order, const std::string& gate, const Parameter& shortcut_weight,
    const Parameter& shortcut_bias, const Parameter& shortcut_mean, const Parameter& shortcut_var,
    double shortcut_eps) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe_residual(u, given, order, gate);
  STD_TORCH_CHECK(norm_mean.has_value() == norm_var.has_value(),
                  "da_ops: norm_mean and norm_var go together");
  const GivenNorm norm{norm_weight, norm_bias, norm_mean, norm_var, eps};
  const GivenShortcut added{
      shortcut, {shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps}};
  check_forward(p, u, added, norm, {});
  return kForward(p, u, added, norm, {}, given);
}

template <ResidualForward* kForward>
ResidualOutputs residual_training_operator(
    const Tensor& u, const Parameter& shortcut, const Parameter& norm_weight,
    const Parameter& norm_bias, const Tensor& running_mean, const Tensor& running_var,
    const Parameter& batches, double momentum, double eps, const Parameter& conv_weight,
    const Parameter& dilated_weight, const Parameter& merge_weight, const Parameter& spatial_bias,
    const Parameter& gate_weight, const Parameter& gate_bias, const std::string& order,
    const std::string& gate, const Parameter& shortcut_weight, const Parameter& shortcut_bias,
    const Parameter& shortcut_mean, const Parameter& shortcut_var, double shortcut_eps) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe_residual(u, given, order, gate);
  const Parameter none;
  const GivenNorm norm{norm_weight, norm_bias, none, none, eps};
  const Running running{&running_mean, &running_var, address(batches), momentum};
  const GivenShortcut added{
      shortcut, {shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps}};
  check_forward(p, u, added, norm, running);
  return kForward(p, u, added, norm, running, given);
}

}  // namespace da
