// Both directions over a whole batch, in forward.cpp and backward.cpp. Free of torch.
#pragma once

#include "image.h"

namespace da::cpu {

// f(0) + ... + f(count - 1), as several sums side by side: no addition waits for the one before.
template <class F>
double sum_of(int64_t count, F f) {
  constexpr int64_t kParts = 16;
  double parts[kParts] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts)
    for (int64_t k = 0; k < kParts; k++) parts[k] += f(i + k);
  for (; i < count; i++) sum += f(i);
  for (double part : parts) sum += part;
  return sum;
}
template <class A>
double sum_of(const A* values, int64_t count) {
  return sum_of(count, [=](int64_t i) { return double(values[i]); });
}

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
