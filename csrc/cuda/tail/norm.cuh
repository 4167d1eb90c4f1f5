// The norm's maps by channel, x = (u - centre) scale + shift: made where they are read, for each is
// a few instructions on what the norm has anyway.
#pragma once

#include "cuda/common/masks.cuh"
#include "cuda/tail/args.h"

namespace da::cuda {

template <class T>
SIMT_FN accumulate_t<T> of_norm(const OfNorm& values, int64_t c) {
  return Parameter<T>{values.data, values.wide}[c];
}

template <class T>
struct Norm {
  using A = accumulate_t<T>;
  const NormArgs& args;

  SIMT_FN A centre(int64_t c) const { return of_norm<T>(args.mean, c); }
  // One over the deviation.
  SIMT_FN A inverse(int64_t c) const {
    return simt::inverse_sqrt(of_norm<T>(args.var, c) + static_cast<A>(args.eps));
  }
  SIMT_FN A scale(int64_t c) const {
    const A of_one = inverse(c);
    return args.weight.data ? of_norm<T>(args.weight, c) * of_one : of_one;
  }
  SIMT_FN A shift(int64_t c) const { return args.bias.data ? of_norm<T>(args.bias, c) : A(0); }
};

}  // namespace da::cuda
