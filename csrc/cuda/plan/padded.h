// How the stencil sees a map: each row of the image is followed by as many zeros as taps reach,
// which are the next row's margin as well. Every pixel within reach of a tap has a place then, so
// no tap asks whether it is there:
//
//   row -1   0 0 0 0 0 0 0 0 | 0 0 0
//   row 0    m m m m m m m m | 0 0 0     width 8, pitch 11
//   row 1    m m m m m m m m | 0 0 0
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/plan/divisor.h"
#include "problem.h"

namespace da::cuda {

// An image's padded rows.
struct Padded {
  Divisor width, pitch;

  Padded() = default;
  explicit Padded(int64_t width) : width(width), pitch(width + kReach) {}
};

// A window on a padded map: some pixels that follow each other, and all that taps reach from them.
// One piece has it all; or five, of the rows -3, -1, 0, 1, 3, where rows are long.
struct Halo {
  int pieces, length;
  int near, far;  // from a pixel's place to that of the pixel one row below, and three
  int centre;     // the first pixel's place

  DA_HD int row_of(int piece) const {
    const int row = piece - 2;
    return pieces == 1 || row == -2 ? -kReach : row == 2 ? kReach : row;
  }
};

// Refuses images whose places have no room in 32 bits.
inline void require_places(const Problem& p) {
  constexpr int64_t most = INT32_MAX / (kReach + 1);  // rows or columns, for taps reach so far
  if (p.spatial() && std::max(p.h, p.w) > most)
    throw std::runtime_error("da_ops: expected an image of at most " + std::to_string(most) +
                             " pixels a side, where the CUDA kernels make a spatial mask; got " +
                             std::to_string(p.h) + " x " + std::to_string(p.w) +
                             "; use backend=\"eager\"");
}

// A window on so many pixels of rows of this width, wherever they begin.
inline Halo halo(int64_t pixels, int64_t width) {
  const int64_t pitch = width + kReach;
  const int64_t places = pixels + kReach * ((width + std::max<int64_t>(pixels, 1) - 2) / width);
  const int64_t piece = places + 2 * kReach, all = piece + 2 * kReach * pitch;
  if (all <= 5 * piece) {
    const int row = static_cast<int>(pitch);
    return {1, static_cast<int>(all), row, kReach * row, kReach * row + kReach};
  }
  const int length = static_cast<int>(piece);
  return {5, length, length, 2 * length, 2 * length + kReach};
}

}  // namespace da::cuda
