// The residual tail's ReLU, and its argument where there is no shortcut: a mask, which is positive,
// times the number below, whose sign every pass sees alike.
#pragma once

#include "cuda/common/tile.cuh"

namespace da::cuda {

// Rounded once.
template <class A>
SIMT_FN A scaled(A deviation, A scale, A shift) {
  return simt::fma(deviation, scale, shift);
}

// The part of a gradient that passes a ReLU, whose argument or result this is. A NaN lets it pass.
template <class A>
SIMT_FN A passed(A gradient, A of_relu) {
  return of_relu <= 0 ? A(0) : gradient;
}

}  // namespace da::cuda
