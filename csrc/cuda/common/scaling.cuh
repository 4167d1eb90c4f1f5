// What both kinds of kernels end with: y = x s c, or (Backward) dx from dy, the masks and the terms
// by pixel and by channel:
//   spatial_channel, spatial   s (dy c + dg/P) + dm/C
//   channel_spatial, channel   c (dy s + dm/C) + dg/P
//   parallel                   dy s c + dg/P + dm/C
// Pixels and channels are rows and columns, or columns and rows. Factors are the masks; the term
// within the brackets is multiplied by the mask of the other, outer axis.
#pragma once

#include "cuda/common/tile.cuh"

namespace da::cuda {

// A thread's next vectors.
template <class T, int E, int Depth>
struct Vectors {
  using V = Access<T, E>;
  typename V::Raw raw[Depth];  // a vector that is not there stays as it was
  const T* next;

  SIMT_FN explicit Vectors(const T* first) : next(first) {
    SIMT_UNROLL
    for (int d = 0; d < Depth; d++) raw[d] = V::zero();
  }

  // Asks for those that come, of rows that are `stride` apart: the d-th if there(d).
  template <class Load, class There>
  SIMT_FN void ask(int64_t stride, Load load, There there) {
    SIMT_UNROLL
    for (int d = 0; d < Depth; d++) {
      if (there(d)) raw[d] = load(next);
      next += stride;
    }
  }
};

template <class T, int E, bool Backward>
struct Scaling {
  using A = accumulate_t<T>;
  A factor[E], term[E];              // at the thread's columns
  const A *row_factors, *row_terms;  // arrays by row
  Outer outer;                       // the lines whose factor multiplies the other lines' term

  SIMT_FN Scaling(Outer outer, const Lane& lane, const A* col_factors, const A* col_terms,
                  const A* row_factors, const A* row_terms)
      : row_factors(row_factors), row_terms(row_terms), outer(outer) {
    load_columns<E>(col_factors, lane, factor);
    if (Backward) load_columns<E>(col_terms, lane, term);
  }

  // Every at_once-th row from first_row on, Depth of them in flight. `in` and `out` point to the
  // thread's vector in the first one, load(in) reads a vector.
  template <int Depth, Fit How, class Load>
  SIMT_FN void rows(const Lane& lane, int first_row, int rows, int at_once, int64_t stride,
                    const T* in, T* out, Load load) const {
    Vectors<T, E, Depth> vectors(in);
    by_outer<Depth, How, Ahead::no>(lane, first_row, rows, at_once, stride, vectors, out, load);
  }

  // The same where the first vectors have been asked for.
  template <int Depth, Fit How, class Load>
  SIMT_FN void rows_from(Vectors<T, E, Depth>& vectors, const Lane& lane, int first_row, int rows,
                         int at_once, int64_t stride, T* out, Load load) const {
    by_outer<Depth, How, Ahead::yes>(lane, first_row, rows, at_once, stride, vectors, out, load);
  }

 private:
  enum class Ahead { no, yes };

  template <int Depth, Fit How, Ahead Asked, class Load>
  SIMT_FN void by_outer(const Lane& lane, int first_row, int rows, int at_once, int64_t stride,
                        Vectors<T, E, Depth>& in, T* out, Load load) const {
    if (!Backward || outer == Outer::none)
      loop<Depth, How, Asked, Outer::none>(lane, first_row, rows, at_once, stride, in, out, load);
    else if (outer == Outer::rows)
      loop<Depth, How, Asked, Outer::rows>(lane, first_row, rows, at_once, stride, in, out, load);
    else
      loop<Depth, How, Asked, Outer::cols>(lane, first_row, rows, at_once, stride, in, out, load);
  }

  template <int Depth, Fit How, Ahead Asked, Outer Which, class Load>
  SIMT_FN void loop(const Lane& lane, int first_row, int rows, int at_once, int64_t stride,
                    Vectors<T, E, Depth>& in, T* out, Load load) const {
    using V = Access<T, E>;
    constexpr bool one_row = How == Fit::whole || How == Fit::edges;
    constexpr bool all = How == Fit::whole || How == Fit::across;  // of a vector is the thread's
    // nvcc runs out of predicates for dx. Masks take registers, which suffice on 8.0 to 9.0 only.
    constexpr bool by_mask = Backward && simt::kArch != 75 && simt::kArch < 100;
    int row0 = first_row;
    const typename V::Raw mine = V::mask(0, lane.split);
    // Pointers that move stay in registers; other addresses are computed anew for every vector.
    const A *factors = row_factors + first_row, *terms = row_terms + first_row;
    // The next Depth rows; `full`: all of them are there.
    const auto round = [&](auto full) {
      if (Asked == Ahead::no)
        in.ask(stride, load, [&](int d) { return full || row0 + d * at_once < rows; });
      SIMT_UNROLL
      for (int d = 0; d < Depth; d++) {
        if (full || row0 + d * at_once < rows) {
          A value[E];
          V::unpack(in.raw[d], value);
          const int row = d * at_once;
          const int next = How == Fit::across || lane.split < E ? row + 1 : row;
          const A this_factor = factors[row], next_factor = one_row ? A(0) : factors[next];
          const A this_term = Backward ? terms[row] : A(0);
          const A next_term = Backward && !one_row ? terms[next] : A(0);
          SIMT_UNROLL
          for (int j = 0; j < E; j++) {
            const auto of = [&](A here, A next) {
              if (one_row || j == 0) return here;
              if (by_mask) return V::pick(mine, j, here, next);
              return j < lane.split ? here : next;
            };
            const auto by_row = [&](A in) {
              if constexpr (How == Fit::across)
                if (j > 0)
                  return simt::fma_either(j < lane.split, in, this_factor, this_term, next_factor,
                                          next_term);
              return in * of(this_factor, next_factor) + of(this_term, next_term);
            };
            if (!Backward)
              value[j] *= factor[j] * of(this_factor, next_factor);
            else if (Which == Outer::rows)
              value[j] = by_row(value[j] * factor[j] + term[j]);
            else if (Which == Outer::cols)
              value[j] = by_row(value[j]) * factor[j] + term[j];
            else
              value[j] = by_row(value[j] * factor[j]) + term[j];
          }
          V::store(out, value, all ? 0 : lane.begin, all ? E : lane.end);
        }
        out += stride;
      }
      row0 += Depth * at_once, factors += Depth * at_once, terms += Depth * at_once;
      if (Asked == Ahead::yes && full)
        in.ask(stride, load, [&](int d) { return row0 + d * at_once < rows; });
    };
    SIMT_ROLLED
    while (row0 + (Depth - 1) * at_once < rows) round(std::true_type());
    if (row0 < rows) round(std::false_type());
  }
};

}  // namespace da::cuda
