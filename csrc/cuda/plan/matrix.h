// How a block's threads lie over the rows of an image: written once, for the portable passes and
// for the launch that keeps an image on the chip.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cuda/plan/divisor.h"
#include "problem.h"

namespace da::cuda {

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t round_up(int64_t count, int64_t size) { return ceil_div(count, size) * size; }

// An image is a matrix: channels x pixels in NCHW, pixels x channels in NHWC; rows are dense in
// memory. Where a row is no whole number of vectors, rows begin at different places within a
// vector; after `period` rows, a super-row, the places come again. A row's place in its super-row
// is its phase.
//
// Tiling and OnChip each declare the following fields, because from a struct within a plan kernels
// read them with up to an eighth more instructions.
//   by_pixel       the rows are pixels and the columns channels, or else the reverse
//   rows, cols     of an image
//   vector         elements that a thread reads at once: of 16 bytes, or one
//   period         rows of a super-row
//   width          columns of a tile; a row's last tile may have fewer
//   col_tiles      tiles that a row is cut into
//   lanes          threads that cover a tile's row, a vector each
//   super_rows     super-rows that a block reads at once
//   by_lanes, by_period   divide by lanes and by period

// Sets by_pixel, rows and cols.
template <class Plan>
void set_matrix(Plan& m, const Problem& p) {
  m.by_pixel = p.by_pixel();
  m.rows = p.rows();
  m.cols = p.cols();
}

// Whether an image can be read by vectors of so many elements: a vector may reach into the next
// row, but neither into the one after that nor into the next image.
template <class Plan>
bool holds_vectors(const Plan& m, int64_t vector) {
  return m.cols >= vector && int64_t(m.rows) * m.cols % vector == 0;
}

// Sets the other fields: cuts rows into about `least_tiles` tiles, or as many more as it takes,
// each of whole units of columns and covered by at most `most_lanes` of the block's threads;
// lanes_of(vectors) is how many cover a tile's row that touches so many vectors.
template <class Plan, class Lanes>
void cut_rows(Plan& m, int vector, int threads, int64_t most_lanes, Lanes lanes_of,
              int64_t least_tiles = 1, int64_t unit = 1) {
  const int step = std::gcd(int64_t(m.cols), int64_t(vector));  // rows begin at its multiples
  m.vector = vector;
  m.period = vector / step;
  most_lanes = std::min<int64_t>(most_lanes, threads / m.period / 32 * 32);
  const int64_t widest = most_lanes * vector - (vector - step);
  const int64_t tiles = std::max(ceil_div(m.cols, widest), least_tiles);
  const int64_t even = round_up(ceil_div(m.cols, tiles), std::max<int64_t>(vector, unit));
  m.width = std::min<int64_t>(even, m.cols);
  if (m.width > widest) m.width = widest / vector * vector;
  m.col_tiles = ceil_div(m.cols, m.width);
  m.lanes = lanes_of(static_cast<int>(ceil_div(vector - step + m.width, vector)));
  m.super_rows = threads / (m.lanes * m.period);
  m.by_lanes = Divisor(m.lanes), m.by_period = Divisor(m.period);
}

}  // namespace da::cuda
