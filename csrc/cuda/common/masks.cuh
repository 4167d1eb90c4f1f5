// Parts of the masks and of their gradients, for kernels of either kind.
#pragma once

#include "cuda/common/args.h"
#include "cuda/common/tile.cuh"

namespace da::cuda {

// A parameter's values, in x's type T or (`wide`) in float32.
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

// The sum over a warp, in every lane.
template <class A>
SIMT_FN A warp_sum(A value) {
  SIMT_UNROLL
  for (int step = simt::kWarp / 2; step > 0; step /= 2) value += simt::shuffle_xor(value, step);
  return value;
}

// A map as the stencil sees it: its values at the pixels from `pixel` on, and in their halo.
template <class A>
struct Surroundings {
  const A* values;
  Halo halo;
  uint32_t height, width;  // of the image
  uint32_t row0, col0;     // of the pixel

  SIMT_FN Surroundings(const Args<A>& args, int64_t pixel, const A* values, const Halo& halo)
      : values(values), halo(halo), height(args.height), width(args.width) {
    row0 = pixel / args.width;
    col0 = pixel % args.width;
  }

  SIMT_FN A centre(int i) const { return values[halo.at(0, width) + i]; }

  // visit(value) if the i-th pixel has a neighbour at this tap of the near (step 1) or far (step 3)
  // kernel. A coordinate below zero is a large one.
  template <class Visit>
  SIMT_FN void neighbour(int i, int step, int tap, Visit visit) const {
    const int down = step * (tap / 3 - 1), right = step * (tap % 3 - 1);
    const uint32_t row = row0 + (col0 + i) / width, col = (col0 + i) % width;
    if (row + down < height && col + right < width) visit(values[halo.at(down, width) + i + right]);
  }

  // The sum over all taps of coefficient times value, without the bias.
  SIMT_FN A stencil(int i, const A* coefficients) const {
    A sum = 0;
    for (int kernel = 0; kernel < 2; kernel++) {
      SIMT_UNROLL
      for (int tap = 0; tap < kTaps; tap++)
        neighbour(i, kernel == 0 ? 1 : kReach, tap,
                  [&](A value) { sum += coefficients[kernel * kTaps + tap] * value; });
    }
    return sum;
  }
};

enum class Taps { as_given, turned };  // turned by 180 degrees they are the adjoint's

// Puts the stencil's coefficients and bias into shared memory; of the adjoint, the bias is 0. The
// caller syncs.
template <class T, class A>
SIMT_FN void load_stencil(const Args<A>& args, A* stencil, Taps taps) {
  const Parameters<const void*>& p = args.parameters;
  const bool turned = taps == Taps::turned;
  const int t = simt::thread();
  if (t < 2 * kTaps) {
    const Parameter<T> kernel{t < kTaps ? p.conv : p.dilated, args.wide};
    const int tap = t % kTaps;
    stencil[t] =
        Parameter<T>{p.merge, args.wide}[t / kTaps] * kernel[turned ? kTaps - 1 - tap : tap];
  } else if (t == 2 * kTaps) {
    stencil[t] = p.spatial_bias && !turned ? Parameter<T>{p.spatial_bias, args.wide}[0] : A(0);
  }
}

// Calls keep(i, sum) for each of the 19 sums behind the spatial parameters' gradients, over these
// pixels' share: sum_p dz[p] m[p + t] is sum_q m[q] dz[q - t], whose dz is at hand. A warp takes a
// sum at a time.
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
