// The residual tail over a whole batch, out = relu(DA(batch_norm(u)) + shortcut), in residual.cpp.
// The shortcut may be null, and nothing is added then, or go through a batch norm of its own. Free
// of torch.
#pragma once

#include <vector>

#include "image.h"

namespace da::cpu {

// A batch norm by channel: (u - mean) scale + bias, with `inverse` one over the deviation and
// `scale` the weight times that. Each array is padded with zeros.
template <class A>
struct Norm {
  std::vector<A> mean, inverse, scale, bias;

  explicit Norm(int64_t channels)
      : mean(padded(channels)), inverse(mean), scale(mean), bias(mean) {}
};

template <class T>
struct Shortcut {
  const T* data;
  const Norm<accumulate_t<T>>* norm;  // null where the shortcut is added as it is
};

// Each channel's mean and biased variance, [c].
template <class T>
void statistics(const Problem& problem, const Plan& plan, const Pool& pool, const T* u,
                double* mean, double* variance);

// out, which may be u, and, for the orders that have them, channel_mean [n, h, w] and the pooled
// u - mean [n, c].
template <class T>
void residual_forward(const Problem& problem, const Plan& plan, const Pool& pool,
                      const Norm<accumulate_t<T>>& norm, const Weights<accumulate_t<T>>& weights,
                      const T* u, const Shortcut<T>& shortcut, T* out,
                      accumulate_t<T>* channel_mean, accumulate_t<T>* pooled);

template <class T>
struct ResidualCall {
  const T *dout, *out, *u;
  const accumulate_t<T>*channel_mean, *pooled;  // forward's
  bool batch;                                   // the norm's statistics are the batch's
  Shortcut<T> shortcut;                         // whose data is looked at where it has a norm
  bool shortcut_batch;                          // that norm's statistics are the batch's
};

// Gradients of a norm's weight and bias, [c].
struct NormGradients {
  double *weight, *bias;
};

// Gradients of u and the shortcut (null where there is none), of their norms, and of the
// parameters.
template <class T>
struct ResidualGradients {
  T *du, *d_shortcut;
  NormGradients norm, shortcut_norm;
  Parameters<double*> parameters;
};

template <class T>
void residual_backward(const Problem& problem, const Plan& plan, const Pool& pool,
                       const Norm<accumulate_t<T>>& norm, const Weights<accumulate_t<T>>& weights,
                       const ResidualCall<T>& call, const ResidualGradients<T>& gradients);

}  // namespace da::cpu
