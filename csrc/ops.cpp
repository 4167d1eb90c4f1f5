// The operators' schema, one operator a direction; backends register their kernels elsewhere.
// Absent parameters, and results that an order or gate does not have, are None and empty tensors.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(da_ops, m) {
  m.def(
      "forward(Tensor x, Tensor? conv_weight, Tensor? dilated_weight, Tensor? merge_weight, "
      "Tensor? spatial_bias, Tensor? gate_weight, Tensor? gate_bias, str order, str gate) "
      "-> (Tensor y, Tensor channel_mean, Tensor pooled)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? conv_weight, Tensor? dilated_weight, "
      "Tensor? merge_weight, Tensor? spatial_bias, Tensor? gate_weight, Tensor? gate_bias, "
      "Tensor channel_mean, Tensor pooled, str order, str gate) "
      "-> (Tensor dx, Tensor d_conv_weight, Tensor d_dilated_weight, Tensor d_merge_weight, "
      "Tensor d_spatial_bias, Tensor d_gate_weight, Tensor d_gate_bias)");
  // The residual tail, with or without a shortcut. Without norm_mean and norm_var the batch's are
  // taken, and given back; order "none" leaves attention out. With shortcut_mean and shortcut_var
  // the shortcut goes through a norm of its own, which has these statistics.
#define DA_PARAMETERS                                                   \
  "Tensor? conv_weight, Tensor? dilated_weight, Tensor? merge_weight, " \
  "Tensor? spatial_bias, Tensor? gate_weight, Tensor? gate_bias, str order, str gate"
#define DA_SHORTCUT_NORM                                                                     \
  ", Tensor? shortcut_weight=None, Tensor? shortcut_bias=None, Tensor? shortcut_mean=None, " \
  "Tensor? shortcut_var=None, float shortcut_eps=0."
#define DA_TAIL                                                                   \
  "Tensor? shortcut, Tensor? norm_weight, Tensor? norm_bias, Tensor? norm_mean, " \
  "Tensor? norm_var, float eps, " DA_PARAMETERS DA_SHORTCUT_NORM
#define DA_RESULTS "(Tensor out, Tensor mean, Tensor var, Tensor channel_mean, Tensor pooled)"
  m.def("residual_forward(Tensor u, " DA_TAIL ") -> " DA_RESULTS);
  // The same with `out` in the place of u.
  m.def("residual_forward_(Tensor(a!) u, " DA_TAIL ") -> (Tensor mean, Tensor var)");
  // The same by the batch's statistics, of which the running ones take a share of `momentum`; one
  // more batch is counted.
  m.def(
      "residual_training(Tensor u, Tensor? shortcut, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, float momentum, "
      "float eps, " DA_PARAMETERS DA_SHORTCUT_NORM ") -> " DA_RESULTS);
#undef DA_RESULTS
#undef DA_TAIL
#undef DA_PARAMETERS
  // The mean and the biased variance of each channel, of which the running ones take a share.
  m.def(
      "batch_statistics(Tensor u, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? batches, float momentum) -> (Tensor mean, Tensor var)");
  // `out` is None without a shortcut; the shortcut itself is given where it has a norm. Gives du,
  // d_shortcut where there is one, and a gradient of each of the norm's, the attention's and the
  // shortcut's norm's parameters that are given.
  m.def(
      "residual_backward(Tensor dout, Tensor? out, Tensor u, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor mean, Tensor var, bool batch, float eps, Tensor? conv_weight, "
      "Tensor? dilated_weight, Tensor? merge_weight, Tensor? spatial_bias, Tensor? gate_weight, "
      "Tensor? gate_bias, Tensor channel_mean, Tensor pooled, str order, str gate, "
      "Tensor? shortcut=None" DA_SHORTCUT_NORM ", bool shortcut_batch=False) -> Tensor[]");
#undef DA_SHORTCUT_NORM
}
