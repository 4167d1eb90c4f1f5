// The operator's scalar formulas, shared by every kernel: the stencil's taps, the gate and the
// derivatives of both. `A` is the accumulation type (float, or double for float64 inputs).
#pragma once

#include <cstdint>

#include "parameters.h"
#include "problem.h"

#ifdef __CUDACC__
#define DA_HD __host__ __device__ inline
#else
#define DA_HD inline
#endif

namespace da {

constexpr int kTaps = 9;                     // of one 3x3 convolution
constexpr int kReach = 3;                    // the dilated convolution looks three pixels far
constexpr int kSpatialSums = 2 * kTaps + 1;  // what the spatial parameters' gradients need

// Elements of each parameter that the problem has; of the gate's, 0 where it has none.
inline Parameters<int64_t> sizes(const Problem& p) {
  const int64_t gate = p.gate_weights();
  return {kTaps, kTaps, 2, 1, gate, p.gate == Gate::eca ? 0 : gate};
}

// The factor that makes the variance of so many numbers an estimate without bias.
DA_HD double unbiased(double count) { return count / (count - 1); }

// z = sum_t near[t] m[p + t] + far[t] m[p + 3t] + bias: both convolutions with the merge folded in.
template <class A>
struct Stencil {
  A near[kTaps], far[kTaps], bias;
};

// The spatial parameters as given; absent tensors are zeros.
template <class A>
struct SpatialWeights {
  A conv[kTaps], dilated[kTaps], merge[2], bias;

  DA_HD Stencil<A> stencil() const {
    Stencil<A> s;
    for (int t = 0; t < kTaps; t++) {
      s.near[t] = merge[0] * conv[t];
      s.far[t] = merge[1] * dilated[t];
    }
    s.bias = bias;
    return s;
  }

  // The adjoint of the stencil: the same sums with both kernels turned by 180 degrees.
  DA_HD Stencil<A> transposed_stencil() const {
    Stencil<A> s = stencil(), r;
    for (int t = 0; t < kTaps; t++) {
      r.near[t] = s.near[kTaps - 1 - t];
      r.far[t] = s.far[kTaps - 1 - t];
    }
    r.bias = A(0);
    return r;
  }
};

// Gradients of the spatial parameters from sums[t] = sum_p dz[p] m[p + t] (9 near, 9 far taps) and
// sums[18] = sum_p dz[p].
template <class A>
DA_HD SpatialWeights<double> spatial_gradients(const SpatialWeights<A>& weights,
                                               const double* sums) {
  SpatialWeights<double> d;  // the merge's sums cancel: in double
  d.merge[0] = d.merge[1] = 0;
  for (int t = 0; t < kTaps; t++) {
    d.conv[t] = weights.merge[0] * sums[t];
    d.dilated[t] = weights.merge[1] * sums[kTaps + t];
    d.merge[0] += weights.conv[t] * sums[t];
    d.merge[1] += weights.dilated[t] * sums[kTaps + t];
  }
  d.bias = sums[2 * kTaps];
  return d;
}

// d sigmoid(z) / dz, written in the mask = sigmoid(z).
template <class V>
DA_HD V sigmoid_slope(V mask) {
  return mask * (V(1) - mask);
}

// t_c = F(g)_c, what the channel mask's sigmoid is taken of. Weights, bias and the `channels`
// pooled values are arrays, or compute what they are asked for.
template <class A, class Weight, class Vector>
DA_HD A gate_logit(Gate gate, Weight weight, Weight bias, int64_t kernel_size, Vector pooled,
                   int64_t channels, int64_t c) {
  if (gate != Gate::eca) {
    const A own = pooled[c];
    const int64_t i = gate == Gate::affine ? c : 0;
    return gate == Gate::sigmoid ? own : weight[i] * own + bias[i];
  }
  A sum = A(0);
  const int64_t half = kernel_size / 2;
  for (int64_t k = 0; k < kernel_size; k++) {
    const int64_t i = c + k - half;
    if (i >= 0 && i < channels) sum += weight[k] * pooled[i];
  }
  return sum;
}

// dg_c = (F' transposed) dt, with `dt` the gradient of the logits.
template <class A, class Weight, class Vector>
DA_HD A gate_transposed(Gate gate, Weight weight, int64_t kernel_size, Vector dt, int64_t channels,
                        int64_t c) {
  if (gate != Gate::eca) {
    const A own = dt[c];
    return gate == Gate::sigmoid ? own : weight[gate == Gate::affine ? c : 0] * own;
  }
  A sum = A(0);
  const int64_t half = kernel_size / 2;
  for (int64_t k = 0; k < kernel_size; k++) {
    const int64_t i = c - k + half;
    if (i >= 0 && i < channels) sum += weight[k] * dt[i];
  }
  return sum;
}

}  // namespace da
