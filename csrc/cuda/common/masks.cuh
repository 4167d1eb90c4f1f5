// What the masks and their gradients are made of, in kernels of either kind.
#pragma once

#include "cuda/common/args.h"
#include "cuda/common/tile.cuh"

namespace da::cuda {

template <class T>
struct Parameter {
  using A = accumulate_t<T>;
  const void* data;
  bool wide;

  SIMT_FN A operator[](int64_t i) const {
    return wide ? A(static_cast<const float*>(data)[i])
                : simt::to<A>(static_cast<const T*>(data)[i]);
  }
};

template <class A>
SIMT_FN A sigmoid(A z) {
  return A(1) / (A(1) + simt::exp(-z));
}

// The same sum in every lane.
template <class A>
SIMT_FN A warp_sum(A value) {
  SIMT_UNROLL
  for (int step = simt::kWarp / 2; step > 0; step /= 2) value += simt::shuffle_xor(value, step);
  return value;
}

// What the stencil sees of a staged map.
template <class A>
struct Surroundings {
  const A* staged;
  Staging staging;
  uint32_t height, width, row0, col0;  // of the tile's first pixel

  SIMT_FN Surroundings(const Args<A>& a, int64_t pixel, const A* staged, const Staging& staging)
      : staged(staged), staging(staging), height(a.height), width(a.width) {
    row0 = pixel / a.width;
    col0 = pixel % a.width;
  }

  SIMT_FN A centre(int i) const { return staged[staging.at(0, width) + i]; }

  // f(value) if the tile's i-th pixel has a neighbour at this tap of the near (step 1) or far
  // (step 3) kernel. A coordinate below zero is a large one.
  template <class F>
  SIMT_FN void neighbour(int i, int step, int tap, F f) const {
    const int down = step * (tap / 3 - 1), right = step * (tap % 3 - 1);
    const uint32_t row = row0 + (col0 + i) / width, col = (col0 + i) % width;
    if (row + down < height && col + right < width) f(staged[staging.at(down, width) + i + right]);
  }

  // sum_t coefficients[t] value(t), without the bias.
  SIMT_FN A stencil(int i, const A* coefficients) const {
    A sum = 0;
    for (int k = 0; k < 2; k++) {
      SIMT_UNROLL
      for (int t = 0; t < kTaps; t++)
        neighbour(i, k == 0 ? 1 : kReach, t,
                  [&](A value) { sum += coefficients[k * kTaps + t] * value; });
    }
    return sum;
  }
};

// The stencil's coefficients, or those of its adjoint; visible after the next sync.
template <class T, class A>
SIMT_FN void load_stencil(const Args<A>& a, A* stencil, bool transposed) {
  const Parameters& p = a.parameters;
  const int t = simt::thread();
  if (t < 2 * kTaps) {
    const Parameter<T> kernel{t < kTaps ? p.conv : p.dilated, p.wide};
    const int tap = t % kTaps;
    stencil[t] =
        Parameter<T>{p.merge, p.wide}[t / kTaps] * kernel[transposed ? kTaps - 1 - tap : tap];
  } else if (t == 2 * kTaps) {
    stencil[t] = p.spatial_bias && !transposed ? Parameter<T>{p.spatial_bias, p.wide}[0] : A(0);
  }
}

// keep(i, sum) for each of the 19 sums behind the spatial parameters' gradients, of these pixels'
// share: sum_p dz[p] m[p + t] is sum_q m[q] dz[q - t], whose dz is at hand. A warp takes a sum at a
// time.
template <class A, class Keep>
SIMT_FN void spatial_sums(const Surroundings<A>& dz, const A* mean, int pixels, int warps,
                          Keep keep) {
  const int lane = simt::thread() % simt::kWarp;
  for (int part = simt::thread() / simt::kWarp; part < kSpatialSums; part += warps) {
    const int step = part < kTaps ? 1 : kReach, tap = kTaps - 1 - part % kTaps;
    A sum = 0;
    SIMT_ROLLED
    for (int i = lane; i < pixels; i += simt::kWarp) {
      if (part == 2 * kTaps)
        sum += dz.centre(i);
      else
        dz.neighbour(i, step, tap, [&](A value) { sum += mean[i] * value; });
    }
    sum = warp_sum(sum);
    if (lane == 0) keep(part, sum);
  }
}

}  // namespace da::cuda
