// The CPU kernels behind the residual tail's operators; the work is in residual.cpp.
#include "residual.h"

#include <cmath>
#include <optional>
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

// Both directions are planned for the tensors of forward: u, out and the shortcut if there is one.
Plan tail_plan(const Problem& p, bool backward, bool shortcut) {
  return plan_here(p, backward, shortcut ? 3 : 2);
}

// Lets a batch's statistics have their share in running ones.
void keep_running(const Tensor& running, const std::vector<double>& of_batch, double factor,
                  double momentum) {
  with_elements(running, [&](auto* kept) {
    for (size_t i = 0; i < of_batch.size(); i++)
      kept[i] = (1 - momentum) * double(kept[i]) + momentum * (factor * of_batch[i]);
  });
}

// The norm of a shortcut, if it has one.
template <class A>
std::optional<Norm<A>> norm_of(const Problem& p, const GivenNorm& norm) {
  if (!norm.mean) return {};
  return norm_of<A>(p, norm.weight, norm.bias, *norm.mean, *norm.var, norm.eps);
}
template <class A>
const Norm<A>* or_null(const std::optional<Norm<A>>& norm) {
  return norm ? &*norm : nullptr;
}

// The batch's mean and variance, of which running ones take their share.
template <class T>
Moments statistics_of(const Problem& p, const Plan& plan, const Tensor& u, const Running& running) {
  using A = accumulate_t<T>;
  Tensor mean = allocate(u, {p.c}, accumulation_type(u));
  Tensor var = allocate(u, {p.c}, accumulation_type(u));
  std::vector<double> means(p.c), variances(p.c);
  statistics<T>(p, plan, kPool, static_cast<const T*>(u.const_data_ptr()), means.data(),
                variances.data());
  std::copy(means.begin(), means.end(), static_cast<A*>(mean.mutable_data_ptr()));
  std::copy(variances.begin(), variances.end(), static_cast<A*>(var.mutable_data_ptr()));
  if (running.mean) {
    keep_running(*running.mean, means, 1, running.momentum);
    keep_running(*running.var, variances, unbiased(double(p.n) * p.pixels()), running.momentum);
    if (running.batches) ++*static_cast<int64_t*>(running.batches->mutable_data_ptr());
  }
  return {mean, var};
}

Moments batch_statistics_cpu(const Problem& problem, const Tensor& u, const Running& running) {
  const Problem p = joined(problem);
  return with_storage(u.scalar_type(), [&](auto t) {
    return statistics_of<decltype(t)>(p, plan_here(p, false), u, running);
  });
}

// Writes to `out`, which may be u.
ResidualOutputs forward_into(const Tensor& out, const Problem& problem, const Tensor& u,
                             const GivenShortcut& shortcut, const GivenNorm& given_norm,
                             const Running& running, const Arguments& given) {
  const Problem p = joined(problem);
  return with_storage(u.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const Converted<A> converted(p, given);
    const T* data = static_cast<const T*>(u.const_data_ptr());
    T* const result = static_cast<T*>(out.mutable_data_ptr());
    Plan plan = tail_plan(p, false, shortcut.tensor.has_value());
    if (result == data) plan.stores = Stores::hot;  // what is overwritten has just been read
    const bool batch = !given_norm.mean;
    const auto [mean, var] = batch ? statistics_of<T>(p, plan, u, running)
                                   : Moments(allocate(u, {0}, accumulation_type(u)),
                                             allocate(u, {0}, accumulation_type(u)));
    const Norm<A> norm =
        norm_of<A>(p, given_norm.weight, given_norm.bias, batch ? mean : *given_norm.mean,
                   batch ? var : *given_norm.var, given_norm.eps);
    const std::optional<Norm<A>> of_shortcut = norm_of<A>(p, shortcut.norm);
    const auto& added = shortcut.tensor;
    Tensor channel_mean = allocate_channel_mean(p, u), pooled = allocate_pooled(p, u);
    residual_forward<T>(
        p, plan, kPool, norm, converted.weights, data,
        {added ? static_cast<const T*>(added->const_data_ptr()) : nullptr, or_null(of_shortcut)},
        result, static_cast<A*>(channel_mean.mutable_data_ptr()),
        static_cast<A*>(pooled.mutable_data_ptr()));
    return ResidualOutputs{out, mean, var, channel_mean, pooled};
  });
}

ResidualOutputs residual_forward_cpu(const Problem& p, const Tensor& u,
                                     const GivenShortcut& shortcut, const GivenNorm& norm,
                                     const Running& running, const Arguments& given) {
  return forward_into(allocate_like(u), p, u, shortcut, norm, running, given);
}

ResidualOutputs over_u(const Problem& p, const Tensor& u, const GivenShortcut& shortcut,
                       const GivenNorm& norm, const Running& running, const Arguments& given) {
  return forward_into(u, p, u, shortcut, norm, running, given);
}

std::tuple<Tensor, Tensor> residual_forward_in_place_cpu(
    const Tensor& u, const Parameter& shortcut, const Parameter& norm_weight,
    const Parameter& norm_bias, const Parameter& norm_mean, const Parameter& norm_var, double eps,
    const Parameter& conv_weight, const Parameter& dilated_weight, const Parameter& merge_weight,
    const Parameter& spatial_bias, const Parameter& gate_weight, const Parameter& gate_bias,
    const std::string& order, const std::string& gate, const Parameter& shortcut_weight,
    const Parameter& shortcut_bias, const Parameter& shortcut_mean, const Parameter& shortcut_var,
    double shortcut_eps) {
  const ResidualOutputs outputs = residual_forward_operator<over_u>(
      u, shortcut, norm_weight, norm_bias, norm_mean, norm_var, eps, conv_weight, dilated_weight,
      merge_weight, spatial_bias, gate_weight, gate_bias, order, gate, shortcut_weight,
      shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps);
  return {std::get<1>(outputs), std::get<2>(outputs)};
}

std::vector<Tensor> residual_backward_cpu(
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
  const Problem problem = describe_residual_backward(
      dout, out, u, {address(norm_weight), address(norm_bias), &mean, &var}, given, channel_mean,
      pooled, order, gate);
  const GivenShortcut added{
      shortcut, {shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps}};
  check_backward(problem, u, out, added);
  const Problem p = joined(problem);
  return with_storage(u.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const auto data = [](const Tensor& of) { return static_cast<const T*>(of.const_data_ptr()); };
    const auto map = [](const Tensor& of) { return static_cast<const A*>(of.const_data_ptr()); };
    const auto to = [](const Tensor& of) { return static_cast<T*>(of.mutable_data_ptr()); };
    const Converted<A> converted(p, given);
    const Norm<A> norm = norm_of<A>(p, norm_weight, norm_bias, mean, var, eps);
    const Tensor du = allocate_like(u);
    const Parameter d_shortcut = out ? Parameter(allocate_like(u)) : Parameter();
    const std::optional<Norm<A>> of_shortcut = norm_of<A>(p, added.norm);
    std::vector<double> d_weight(p.c), d_bias(p.c);
    std::vector<double> d_shortcut_weight(added.normed() ? p.c : 0),
        d_shortcut_bias(d_shortcut_weight);
    const GradientValues values(p);
    residual_backward<T>(p, tail_plan(p, true, out.has_value()), kPool, norm, converted.weights,
                         {data(dout),
                          out ? data(*out) : nullptr,
                          data(u),
                          map(channel_mean),
                          map(pooled),
                          batch,
                          {shortcut ? data(*shortcut) : nullptr, or_null(of_shortcut)},
                          shortcut_batch},
                         {to(du),
                          out ? to(*d_shortcut) : nullptr,
                          {d_weight.data(), d_bias.data()},
                          {d_shortcut_weight.data(), d_shortcut_bias.data()},
                          values.places});
    const auto of = [&](const Parameter& parameter, const double* d) {
      return parameter ? Parameter(gradient(parameter, u, d)) : Parameter();
    };
    return present(du, d_shortcut, of(norm_weight, d_weight.data()), of(norm_bias, d_bias.data()),
                   each(of, given, values.places), of(shortcut_weight, d_shortcut_weight.data()),
                   of(shortcut_bias, d_shortcut_bias.data()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(da_ops, CPU, m) {
  m.impl("residual_forward", TORCH_BOX(&residual_forward_operator<residual_forward_cpu>));
  m.impl("residual_forward_", TORCH_BOX(&residual_forward_in_place_cpu));
  m.impl("residual_training", TORCH_BOX(&residual_training_operator<residual_forward_cpu>));
  m.impl("batch_statistics", TORCH_BOX(&batch_statistics_operator<batch_statistics_cpu>));
  m.impl("residual_backward", TORCH_BOX(&residual_backward_cpu));
}

}  // namespace da::cpu
