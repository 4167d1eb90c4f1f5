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
  template <int Depth, class Load>
  SIMT_FN void rows(const Lane& lane, int first_row, int rows, int at_once, int64_t stride,
                    const T* in, T* out, Load load) const {
    if (!Backward || outer == Outer::none)
      loop<Depth, Outer::none>(lane, first_row, rows, at_once, stride, in, out, load);
    else if (outer == Outer::rows)
      loop<Depth, Outer::rows>(lane, first_row, rows, at_once, stride, in, out, load);
    else
      loop<Depth, Outer::cols>(lane, first_row, rows, at_once, stride, in, out, load);
  }

 private:
  template <int Depth, Outer Which, class Load>
  SIMT_FN void loop(const Lane& lane, int first_row, int rows, int at_once, int64_t stride,
                    const T* in, T* out, Load load) const {
    using V = Access<T, E>;
    SIMT_ROLLED
    for (int row0 = first_row; row0 < rows; row0 += Depth * at_once) {
      typename V::Raw raw[Depth];
      SIMT_UNROLL
      for (int d = 0; d < Depth; d++) {
        raw[d] = row0 + d * at_once < rows ? load(in) : V::zero();
        in += stride;
      }
      SIMT_UNROLL
      for (int d = 0; d < Depth; d++) {
        const int row = row0 + d * at_once;
        if (row < rows) {
          A value[E];
          V::unpack(raw[d], value);
          const int next = lane.split < E ? row + 1 : row;
          const A this_factor = row_factors[row], next_factor = row_factors[next];
          const A this_term = Backward ? row_terms[row] : A(0);
          const A next_term = Backward ? row_terms[next] : A(0);
          SIMT_UNROLL
          for (int j = 0; j < E; j++) {
            const A row_factor = j < lane.split ? this_factor : next_factor;
            const A row_term = j < lane.split ? this_term : next_term;
            if (!Backward)
              value[j] *= factor[j] * row_factor;
            else if (Which == Outer::rows)
              value[j] = (value[j] * factor[j] + term[j]) * row_factor + row_term;
            else if (Which == Outer::cols)
              value[j] = (value[j] * row_factor + row_term) * factor[j] + term[j];
            else
              value[j] = value[j] * (factor[j] * row_factor) + (term[j] + row_term);
          }
          V::store(out, value, lane.begin, lane.end);
        }
        out += stride;
      }
    }
  }
};

}  // namespace da::cuda
