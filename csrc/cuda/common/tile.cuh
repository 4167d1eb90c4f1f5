// Which part of an image a block works on, how its threads lie over it, and how they touch memory.
//
// Rows of 49 half-precision pixels, say, begin at elements 0, 49, 98, ...: at places 0, 1, 2, ...
// of an aligned vector of 8. The same places come again every 8 rows, a super-row, so each of its 8
// phases has threads of its own, which read aligned vectors and keep what belongs to their row:
//
//   vectors  |........|........|........| ... |........|........|
//   row 0    [------------------- 49 pixels ----]
//   row 1                                       [-- 49 ...
//
// Where a vector and a row begin is then fixed for a thread, and so are the columns that it holds.
#pragma once

#include "cuda/plan/plan.h"
#include "cuda/simt/simt.cuh"

namespace da::cuda {

template <class I>
DA_HD I min(I one, I other) {
  return other < one ? other : one;
}
template <class I>
DA_HD I max(I one, I other) {
  return one < other ? other : one;
}

// Calls add(i) for every fourth i below `end` in turn, so that four loads are on their way at once.
// A loop that nvcc unrolls by itself first counts its turns, and has one more loop for the last
// ones.
template <class Add>
SIMT_FN void every_fourth(int end, Add add) {
  SIMT_ROLLED
  for (int i = 0; i < end; i += 16) {
    SIMT_UNROLL
    for (int j = i; j < i + 16; j += 4)
      if (j < end) add(j);
  }
}

template <class T>
using accumulate_t = simt::Accumulator<T>;

// The quotient of any number; few take more than 32 bits.
SIMT_FN int64_t quotient(int64_t number, const Divisor& divisor) {
  const uint32_t low = static_cast<uint32_t>(number);
  return low == number ? divisor.quotient(low) : number / divisor.by;
}

// A block's part of an image.
struct Tile {
  const Tiling& tiling;
  int64_t image;
  int row_tile, col_tile;  // its place among the image's tiles
  int rows, cols;          // its size, smaller at the image's edges

  SIMT_FN Tile(const Tiling& t, int64_t index) : tiling(t), image(quotient(index, t.by_tiles)) {
    const uint32_t in_image = static_cast<uint32_t>(index - image * t.tiles());
    row_tile = t.by_col_tiles.quotient(in_image);
    col_tile = in_image - row_tile * static_cast<uint32_t>(t.col_tiles);
    rows = min<int64_t>(t.height, t.rows - row());
    cols = min<int64_t>(t.width, t.cols - col());
  }

  SIMT_FN int64_t row() const { return int64_t(row_tile) * tiling.height; }
  SIMT_FN int64_t col() const { return int64_t(col_tile) * tiling.width; }
  SIMT_FN int channel_tile() const { return tiling.by_pixel ? col_tile : row_tile; }
  SIMT_FN int pixel_tile() const { return tiling.by_pixel ? row_tile : col_tile; }
  SIMT_FN int64_t channel() const { return tiling.by_pixel ? col() : row(); }
  SIMT_FN int64_t pixel() const { return tiling.by_pixel ? row() : col(); }
  SIMT_FN int channels() const { return tiling.by_pixel ? cols : rows; }
  SIMT_FN int pixels() const { return tiling.by_pixel ? rows : cols; }
};

// Whether every row is a whole number of vectors, so that its period is one row and a vector lies
// in one row only; or rows may begin within a vector. Of the latter, a lane of one row has its own
// elements of a vector at the row's edges, and a lane of a super-row has whole vectors, which may
// reach across into the next row.
enum class Fit { whole, split, edges, across };

// A thread's vector in a super-row.
struct Lane {
  bool active;     // it has elements at all
  int super_row;   // which of those that the block reads at once
  int segment;     // which of the rows that the block reads at once
  int index;       // which of the row's vectors
  int phase;       // the row's place in the super-row
  int64_t offset;  // elements from the start of the super-row to the vector
  int col;         // of the vector's first element, from the tile's first; may be below 0
  int begin, end;  // the vector's elements that are this thread's
  int split;       // elements from here on are the next row's, from its column 0
  bool whole;      // known when compiled: rows are whole vectors, and so are arrays by column

  // The lane of one row's part of each vector that it touches, over `cols` columns from `col` on.
  template <int E, Fit How = Fit::split, class Plan>
  static SIMT_FN Lane of_row(const Plan& m, int64_t col, int cols) {
    Lane l;
    l.segment = m.by_lanes.quotient(simt::thread());
    l.index = simt::thread() - l.segment * m.lanes;
    l.super_row = How == Fit::whole ? l.segment : m.by_period.quotient(l.segment);
    l.phase = How == Fit::whole ? 0 : l.segment - l.super_row * m.period;
    const int64_t start = l.phase * m.cols + col;
    l.offset = start / E * E + l.index * E;
    l.col = static_cast<int>(l.offset - start);
    l.begin = max(0, -l.col);
    l.end = min(E, cols - l.col);
    l.split = E;
    l.active = l.super_row < m.super_rows && l.begin < l.end;
    l.whole = How == Fit::whole;
    if (l.whole) l.begin = 0, l.end = E;  // as an active lane's are
    return l;
  }

  // The lane of whole vectors, each once, of rows as wide as the image.
  template <int E>
  static SIMT_FN Lane of_super_row(int cols, int period, int super_rows) {
    Lane l;
    const int lanes = period * cols / E;
    l.segment = 0;
    l.super_row = simt::thread() / lanes;
    l.index = simt::thread() % lanes;
    l.offset = l.index * E;
    l.phase = l.index * E / cols;
    l.col = l.index * E % cols;
    l.begin = 0;
    l.end = E;
    l.split = min(E, cols - l.col);
    l.whole = false;
    l.active = l.super_row < super_rows;
    return l;
  }
};

// Loads the entries at a thread's columns from an array, all ones if it is null; 0 where an element
// is not the thread's.
template <int E, class A>
SIMT_FN void load_columns(const A* from, const Lane& lane, A* to) {
  constexpr int n = simt::kPerVector<A>;
  if constexpr (E % n == 0) {
    const bool vectors =
        lane.whole || (lane.begin == 0 && min(lane.end, lane.split) == E &&
                       reinterpret_cast<uintptr_t>(from + lane.col) % sizeof(simt::Vector) == 0);
    if (from && lane.active && vectors) {
      SIMT_UNROLL
      for (int j = 0; j < E; j += n) {
        A some[n];
        simt::unpack<A>(simt::load16(from + lane.col + j), some);
        SIMT_UNROLL
        for (int i = 0; i < n; i++) to[j + i] = some[i];
      }
      return;
    }
  }
  SIMT_UNROLL
  for (int j = 0; j < E; j++) {
    const int col = j < lane.split ? lane.col + j : j - lane.split;
    const bool own = lane.active && lane.begin <= j && j < lane.end;
    const bool loads = from && !(lane.whole && E % n == 0);  // or else that is done
    to[j] = own ? loads ? from[col] : A(1) : A(0);
  }
}

// Stores the entries at the thread's own columns, of a row's lane.
template <int E, class A>
SIMT_FN void store_columns(A* to, const Lane& lane, const A* from) {
  constexpr int n = simt::kPerVector<A>;
  if (!lane.active) return;
  if constexpr (E % n == 0) {
    if (lane.begin == 0 && lane.end == E && lane.col % n == 0) {
      SIMT_UNROLL
      for (int j = 0; j < E; j += n) {
        simt::store16(to + lane.col + j, simt::pack<A>(from + j));
      }
      return;
    }
  }
  SIMT_UNROLL
  for (int j = 0; j < E; j++)
    if (lane.begin <= j && j < lane.end) to[lane.col + j] = from[j];
}

// E elements of type T at once: an aligned vector, or (E = 1) one element.
template <class T, int E>
struct Access {
  using A = accumulate_t<T>;
  using Raw = simt::Vector;
  static_assert(E * sizeof(T) == sizeof(Raw), "");

  static SIMT_FN Raw zero() { return Raw{}; }
  static SIMT_FN Raw load(const T* p) { return simt::load16(p); }
  static SIMT_FN Raw load_once(const T* p) { return simt::load16_once(p); }
  static SIMT_FN Raw load_last(const T* p) { return simt::load16_last(p); }
  static SIMT_FN void unpack(const Raw& raw, A* out) { simt::unpack<T>(raw, out); }

  // The bits of elements [begin, end).
  static SIMT_FN Raw mask(int begin, int end) {
    Raw m;
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) {
      const int first = max(begin * int(sizeof(T)) - 4 * i, 0);
      const int last = min(end * int(sizeof(T)) - 4 * i, 4);
      m.word[i] = first < last ? ~0u >> (32 - 8 * (last - first)) << (8 * first) : 0u;
    }
    return m;
  }
  static SIMT_FN Raw keep(Raw raw, const Raw& mask) {
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) raw.word[i] &= mask.word[i];
    return raw;
  }

  // `in` where element j's bits are in the mask, or else `out`; without a predicate.
  static SIMT_FN A pick(const Raw& mask, int j, A in, A out) {
    if constexpr (sizeof(A) == 8) {
      return mask.word[2 * j] ? in : out;
    } else {
      const uint32_t word = mask.word[j * sizeof(T) / 4];
      const uint32_t half =
          j % 2 ? word >> 16 | (word & 0xffff0000u) : word << 16 | (word & 0xffffu);
      const uint32_t bits = sizeof(T) == 2 ? half : word;
      return simt::of_bits((simt::bits_of(in) & bits) | (simt::bits_of(out) & ~bits));
    }
  }

  // Stores elements [begin, end) of a vector, and writes no other.
  static SIMT_FN void store(T* p, const A* in, int begin, int end) {
    const Raw raw = simt::pack<T>(in);
    if (begin == 0 && end == E) {
      simt::store16_once(p, raw);
      return;
    }
    SIMT_UNROLL
    for (int i = 0; i < E; i++)
      if (begin <= i && i < end) p[i] = simt::to<T>(in[i]);
  }
};

template <class T>
struct Access<T, 1> {
  using A = accumulate_t<T>;
  using Raw = T;

  static SIMT_FN Raw zero() { return simt::to<T>(A(0)); }
  static SIMT_FN Raw load(const T* p) { return *p; }
  static SIMT_FN Raw load_once(const T* p) { return simt::load_once(p); }
  static SIMT_FN Raw load_last(const T* p) { return simt::load_last(p); }
  static SIMT_FN void unpack(const Raw& raw, A* out) { out[0] = simt::to<A>(raw); }
  static SIMT_FN Raw mask(int, int) { return zero(); }
  static SIMT_FN Raw keep(Raw raw, const Raw&) { return raw; }
  static SIMT_FN A pick(const Raw&, int, A in, A) { return in; }
  static SIMT_FN void store(T* p, const A* in, int, int) {
    simt::store_once(p, simt::to<T>(in[0]));
  }
};

}  // namespace da::cuda
