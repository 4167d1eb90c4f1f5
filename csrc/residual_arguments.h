// What the residual tail's operators check, besides arguments.h.
#pragma once

#include <string>
#include <tuple>

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

inline void check_shortcut(const Problem& p, const Parameter& shortcut, const Tensor& u) {
  if (shortcut) check_like(p, *shortcut, u, "shortcut");
}

inline void check_statistics(const Parameter& mean, const Parameter& var) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value(),
                  "da_ops: norm_mean and norm_var go together");
}

// out, mean, var, channel_mean, pooled.
using ResidualOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
// du, d_shortcut (empty without a shortcut), the norm's weight's and bias's, then the parameters'
// gradients.
using ResidualInputGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace da
