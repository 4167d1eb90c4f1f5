// What both kinds of kernels end with: y = x s c, or (Backward) dx from dy, the masks and what is
// added by pixel and by channel:
//   spatial_channel, spatial   s (dy c + dg/P) + dm/C
//   channel_spatial, channel   c (dy s + dm/C) + dg/P
//   parallel                   dy s c + dg/P + dm/C
// Pixels and channels are rows and columns, or columns and rows: factors are the masks, terms what
// is added, and the term within the brackets is multiplied by the other axis' factor.
#pragma once

#include "cuda/common/tile.cuh"

namespace da::cuda {

// Of a thread's columns, and where rows' are found.
template <class T, int E, bool Backward>
struct Scaling {
  using A = accumulate_t<T>;
  A factor[E], term[E];
  const A *row_factor, *row_term;
  Outer outer;  // whose factor multiplies the other axis' term

  SIMT_FN Scaling(Outer outer, const Lane& lane, const A* col_factor, const A* col_term,
                  const A* row_factor, const A* row_term)
      : row_factor(row_factor), row_term(row_term), outer(outer) {
    load_columns<E>(col_factor, lane, factor);
    if (Backward) load_columns<E>(col_term, lane, term);
  }

  // Every at_once-th row from first_row on, Depth of them in flight: in and out point to the first
  // one's vector, load(in) reads one.
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
          const A f0 = row_factor[row], f1 = row_factor[next];
          const A b0 = Backward ? row_term[row] : A(0), b1 = Backward ? row_term[next] : A(0);
          SIMT_UNROLL
          for (int j = 0; j < E; j++) {
            const A f = j < lane.split ? f0 : f1, b = j < lane.split ? b0 : b1;
            if (!Backward)
              value[j] *= factor[j] * f;
            else if (Which == Outer::rows)
              value[j] = (value[j] * factor[j] + term[j]) * f + b;
            else if (Which == Outer::cols)
              value[j] = (value[j] * f + b) * factor[j] + term[j];
            else
              value[j] = value[j] * (factor[j] * f) + (term[j] + b);
          }
          V::store(out, value, lane.begin, lane.end);
        }
        out += stride;
      }
    }
  }
};

}  // namespace da::cuda
