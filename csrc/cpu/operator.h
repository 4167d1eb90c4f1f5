// Both directions over a whole batch, in forward.cpp and backward.cpp. Free of torch.
#pragma once

#include "image.h"

namespace da::cpu {

// y and, for the orders that have them, channel_mean [n, h, w] and pooled [n, c].
template <class T>
void forward(const Problem& problem, const Plan& plan, const Pool& pool,
             const Weights<accumulate_t<T>>& weights, const T* x, T* y,
             accumulate_t<T>* channel_mean, accumulate_t<T>* pooled);

// dx, and the parameters' gradients as arrays of the sizes that formula.h says, from the maps that
// forward kept.
template <class T>
void backward(const Problem& problem, const Plan& plan, const Pool& pool,
              const Weights<accumulate_t<T>>& weights, const T* dy, const T* x,
              const accumulate_t<T>* channel_mean, const accumulate_t<T>* pooled, T* dx,
              const Parameters<double*>& gradients);

// The parameters' gradients, as arrays of the sizes that formula.h says, from each image's
// gradients of the gate's logits and pooled channels, [n, c], and the sums that spatial_gradients
// takes.
template <class A>
void parameter_gradients(const Problem& problem, const Weights<A>& weights, const A* dt,
                         const A* pooled, const double* tap_sums,
                         const Parameters<double*>& gradients);

}  // namespace da::cpu
