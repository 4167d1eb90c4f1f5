// Both directions over a whole batch; forward.cpp and backward.cpp. Free of torch.
#pragma once

#include "image.h"

namespace da::cpu {

// y and, for the orders that have them, channel_mean [n, h, w] and pooled [n, c].
template <class T>
void forward(const Problem& problem, const Plan& plan, const Pool& pool,
             const Weights<accumulate_t<T>>& weights, const T* x, T* y,
             accumulate_t<T>* channel_mean, accumulate_t<T>* pooled);

template <class A>
struct Gradients {
  SpatialWeights<double>* spatial;
  A* gate;
  A* gate_bias;
};

// dx and the parameters' gradients, from what forward kept.
template <class T>
void backward(const Problem& problem, const Plan& plan, const Pool& pool,
              const Weights<accumulate_t<T>>& weights, const T* dy, const T* x,
              const accumulate_t<T>* channel_mean, const accumulate_t<T>* pooled, T* dx,
              const Gradients<accumulate_t<T>>& gradients);

}  // namespace da::cpu
