// The vectorised primitives of the CPU backend. Each works on a slab of whole rows of one image
// seen as a matrix (channels x pixels in NCHW, pixels x channels in NHWC), so that one set of
// kernels serves both layouts and all orders. They are compiled once for each instruction set, and
// chosen at run time. While they read x they fetch `ahead`, which is as large, and while they read
// dy what lies as far from dy as `ahead` from x; nothing where `ahead` may be null and is.
#pragma once

#include <cstdint>

#include "formula.h"

namespace da::cpu {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

constexpr int64_t kAlignment = 64;  // bytes; scratch arrays are aligned to it and padded with zeros
constexpr int64_t kMaxLanes = 16;   // accumulation elements in a vector of any instruction set
constexpr int64_t kFar = 2048;      // elements from what is read to what is fetched, at least

inline int64_t padded(int64_t n) { return (n + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// A map with a border of kReach zeros on every side, and zeros to the right up to whole vectors.
inline int64_t plane_stride(int64_t w) { return padded(w) + 2 * kReach; }
inline int64_t plane_size(int64_t h, int64_t w) {
  return (h + 2 * kReach) * plane_stride(w) + kMaxLanes;
}

enum class Rows { singly, together };  // whether several rows are taken at a time
enum class Stores {
  hot,       // to lines that the nearest caches hold
  cached,    // to lines that may have to be fetched
  streamed,  // past the caches
};

// The terms of dx besides dy, one by row and one by column. The scale of the outer axis
// multiplies the other axis' term, too.
enum class Outer { none, rows, cols };
template <class A>
struct Terms {
  const A *row_bias, *col_bias;
  Outer outer;
};

// x of the residual tail by channel, (u - centre) scale + bias; a mask may have been multiplied in.
template <class A>
struct Affine {
  const A *centre, *scale, *bias;
};

// Backward's first read of the residual tail, which writes d, the gradient at the ReLU's argument:
// d is dout where `out` is not 0. Without a shortcut x has out's sign, for masks are positive, and
// neither is `out` read nor d written. It sums
//   sums[c] = sum_p mask[p] d    and    products[c] = sum_p mask[p] d (u - centre[c])
//   pixel_sums[p] = sum_c d x    with the channel mask in x; null where it is not wanted
template <class T>
struct Gradients {
  using A = accumulate_t<T>;
  const T *dout, *out, *u;
  T* d;  // null without a shortcut
  int64_t rows, cols;
  bool channels_last;
  Affine<A> x;
  const A* mask;  // by pixel
  A *sums, *products, *pixel_sums;
  Stores stores;
};

// du is made of
//   d scale[c] mask[p] + bias[c] pixel_outer[p] + outer[c] pixel_bias[p]
//     + (u - centre[c]) slope[c] + offset[c]
// of which the last line is there only where the norm's statistics are the batch's.
template <class A>
struct ResidualTerms {
  const A *scale, *bias, *outer, *slope, *offset;  // by channel
  Affine<A> x;
  const A *mask, *pixel_bias, *pixel_outer;  // by pixel
  bool rectify;                              // d is dout where the ReLU let it pass, and else 0
  bool masked;                               // there is attention; else masks are 1 and terms 0
  bool batch;                                // the norm's statistics are the batch's
};

// The residual tail's primitives. Its rows are channels, or pixels where `channels_last`, and an
// array along the rows begins at the slab's first.
template <class T>
struct ResidualKernels {
  using A = accumulate_t<T>;

  // Each channel's mean and sum of squared deviations over the slab.
  void (*moments)(const T* u, int64_t rows, int64_t cols, bool channels_last, double* mean,
                  double* squares);

  // Kernels::reduce of u - centre.
  void (*reduce)(const T* u, const T* ahead, const A* centre, int64_t rows, int64_t cols,
                 bool channels_last, const A* row_weight, const A* col_weight, A* row_sums,
                 A* col_sums, Rows how);

  // out = relu(x mask[p] + shortcut), without the sum where `shortcut` is null. `of_shortcut` is
  // the norm that the shortcut goes through, or null. out may be u, and `ahead` is not null.
  void (*rectify)(const T* u, const T* shortcut, const T* ahead, T* out, int64_t rows, int64_t cols,
                  bool channels_last, const Affine<A>& x, const A* mask,
                  const Affine<A>* of_shortcut, Stores stores);

  void (*gradients)(const Gradients<T>& call);

  void (*combine)(const T* d, const T* u, T* du, int64_t rows, int64_t cols, bool channels_last,
                  const ResidualTerms<A>& terms, Stores stores);
};

template <class T>
struct Kernels {
  using A = accumulate_t<T>;

  // With t = x, or x*dy where dy is given:
  //   row_sums[r] = sum_q t[r,q] col_weight[q]   and   col_sums[q] = sum_r row_weight[r] t[r,q]
  // Null sums are not made. `how` is for rows that are not short, where columns are added up, too.
  void (*reduce)(const T* x, const T* dy, const T* ahead, int64_t rows, int64_t cols,
                 const A* row_weight, const A* col_weight, A* row_sums, A* col_sums, Rows how);

  // sums[i] += more[i] for i < n, or sums[i] = more[i] where these are the `first`.
  void (*add)(A* sums, const A* more, int64_t n, bool first);

  // y[r,q] = x[r,q] row_scale[r] col_scale[q]
  void (*scale)(const T* x, const T* ahead, T* y, int64_t rows, int64_t cols, const A* row_scale,
                const A* col_scale, Stores stores);

  // dx[r,q] = (dy[r,q] inner_scale + inner_bias) outer_scale + outer_bias, or, where neither axis
  // is the outer one, dy[r,q] row_scale[r] col_scale[q] + row_bias[r] + col_bias[q]
  void (*combine)(const T* dy, const T* ahead, T* dx, int64_t rows, int64_t cols,
                  const A* row_scale, const A* col_scale, const Terms<A>& terms, Stores stores,
                  Rows how);

  // out[i*w + j] = the stencil at (i, j) of a bordered plane, for rows begin <= i < end.
  void (*stencil)(const A* plane, int64_t w, int64_t begin, int64_t end, const Stencil<A>& stencil,
                  A* out);

  // values[i] = sigmoid(values[i]) for i < n.
  void (*sigmoid)(A* values, int64_t n);

  // sums[t] = sum_p dz[p] m[p + t] over both convolutions' taps, then sum_p dz[p]; bordered planes,
  // rows begin <= i < end.
  void (*tap_sums)(const A* dz, const A* m, int64_t w, int64_t begin, int64_t end, double* sums);

  ResidualKernels<T> residual;
};

// A table for each storage type and instruction set; null where the compiler has no such target.
template <class T>
const Kernels<T>* generic_kernels();
template <class T>
const Kernels<T>* avx2_kernels();
template <class T>
const Kernels<T>* avx512_kernels();

// The table for instruction_set().
template <class T>
const Kernels<T>& kernels();

#define DA_EACH_STORAGE(M) M(float16) M(bfloat16) M(float) M(double)

}  // namespace da::cpu
