// The CPU kernels behind da_ops::residual_forward and da_ops::residual_backward; the work is in
// residual.cpp.
#include "residual.h"

#include <cmath>
#include <string>

#include "residual_arguments.h"
#include "tensors.h"

namespace da::cpu {
namespace {

// The norm with these statistics; a norm without weight multiplies by one.
template <class A>
Norm<A> norm_of(const Problem& p, const Parameter& weight, const Parameter& bias,
                const Tensor& mean, const Tensor& var, double eps) {
  Norm<A> norm(p.c);
  std::vector<A> variance(p.c);
  read<A>(mean, p.c, norm.mean.data());
  read<A>(var, p.c, variance.data());
  read<A>(weight, p.c, norm.scale.data());
  read<A>(bias, p.c, norm.bias.data());
  for (int64_t i = 0; i < p.c; i++) {
    norm.inverse[i] = 1 / std::sqrt(double(variance[i]) + eps);
    norm.scale[i] = (weight ? norm.scale[i] : A(1)) * norm.inverse[i];
  }
  return norm;
}

ResidualOutputs residual_forward_cpu(const Tensor& u, const Tensor& shortcut,
                                     const Parameter& norm_weight, const Parameter& norm_bias,
                                     const Parameter& norm_mean, const Parameter& norm_var,
                                     double eps, const Parameter& conv_weight,
                                     const Parameter& dilated_weight, const Parameter& merge_weight,
                                     const Parameter& spatial_bias, const Parameter& gate_weight,
                                     const Parameter& gate_bias, const std::string& order,
                                     const std::string& gate) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe_residual(u, given, order, gate);
  check_like(p, shortcut, u, "shortcut");
  STD_TORCH_CHECK(norm_mean.has_value() == norm_var.has_value(),
                  "da_ops: norm_mean and norm_var go together");
  return with_storage(u.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const Converted<A> converted(p, given);
    const Plan plan = plan_here(p, false, 3);
    const T* data = static_cast<const T*>(u.const_data_ptr());
    const bool batch = !norm_mean;
    Tensor mean = allocate(u, {batch ? p.c : 0}, accumulation_type(u));
    Tensor var = allocate(u, {batch ? p.c : 0}, accumulation_type(u));
    if (batch) {
      std::vector<double> means(p.c), variances(p.c);
      statistics<T>(p, plan, kPool, data, means.data(), variances.data());
      std::copy(means.begin(), means.end(), static_cast<A*>(mean.mutable_data_ptr()));
      std::copy(variances.begin(), variances.end(), static_cast<A*>(var.mutable_data_ptr()));
    }
    const Norm<A> norm = norm_of<A>(p, norm_weight, norm_bias, batch ? mean : *norm_mean,
                                    batch ? var : *norm_var, eps);
    Tensor out = allocate_like(u);
    Tensor channel_mean = allocate_channel_mean(p, u), pooled = allocate_pooled(p, u);
    residual_forward<T>(p, plan, kPool, norm, converted.weights, data,
                        static_cast<const T*>(shortcut.const_data_ptr()),
                        static_cast<T*>(out.mutable_data_ptr()),
                        static_cast<A*>(channel_mean.mutable_data_ptr()),
                        static_cast<A*>(pooled.mutable_data_ptr()));
    return ResidualOutputs{out, mean, var, channel_mean, pooled};
  });
}

ResidualInputGradients residual_backward_cpu(
    const Tensor& dout, const Tensor& out, const Tensor& u, const Parameter& norm_weight,
    const Parameter& norm_bias, const Tensor& mean, const Tensor& var, bool batch, double eps,
    const Parameter& conv_weight, const Parameter& dilated_weight, const Parameter& merge_weight,
    const Parameter& spatial_bias, const Parameter& gate_weight, const Parameter& gate_bias,
    const Tensor& channel_mean, const Tensor& pooled, const std::string& order,
    const std::string& gate) {
  const Arguments given{conv_weight,  dilated_weight, merge_weight,
                        spatial_bias, gate_weight,    gate_bias};
  const Problem p = describe_residual(u, given, order, gate);
  check_backward(p, dout, u, channel_mean, pooled);
  check_like(p, out, u, "out");
  return with_storage(u.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const auto data = [](const Tensor& of) { return static_cast<const T*>(of.const_data_ptr()); };
    const auto map = [](const Tensor& of) { return static_cast<const A*>(of.const_data_ptr()); };
    const Converted<A> converted(p, given);
    const Norm<A> norm = norm_of<A>(p, norm_weight, norm_bias, mean, var, eps);
    Tensor du = allocate_like(u), d_shortcut = allocate_like(u);
    std::vector<double> d_weight(p.c), d_bias(p.c);
    const GradientValues values(p);
    residual_backward<T>(
        p, plan_here(p, true, 5), kPool, norm, converted.weights,
        {data(dout), data(out), data(u), map(channel_mean), map(pooled), batch},
        {static_cast<T*>(du.mutable_data_ptr()), static_cast<T*>(d_shortcut.mutable_data_ptr()),
         d_weight.data(), d_bias.data(), values.places});
    const Parameters<Tensor> d = values.tensors(given, u);
    return ResidualInputGradients{du,
                                  d_shortcut,
                                  gradient(norm_weight, u, d_weight.data()),
                                  gradient(norm_bias, u, d_bias.data()),
                                  d.conv,
                                  d.dilated,
                                  d.merge,
                                  d.spatial_bias,
                                  d.gate,
                                  d.gate_bias};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(da_ops, CPU, m) {
  m.impl("residual_forward", TORCH_BOX(&residual_forward_cpu));
  m.impl("residual_backward", TORCH_BOX(&residual_backward_cpu));
}

}  // namespace da::cpu
