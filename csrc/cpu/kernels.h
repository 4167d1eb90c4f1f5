// The vectorised primitives of the CPU backend. Each works on a slab of whole rows of one image
// seen as a matrix (channels x pixels in NCHW, pixels x channels in NHWC), so that one set of
// kernels serves both layouts and all orders. Compiled once per instruction set; chosen at run
// time.
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
constexpr int64_t kMaxLanes = 16;   // of any instruction set, in accumulation elements

inline int64_t padded(int64_t n) { return (n + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// A map with a border of kReach zeros on every side, and zeros to the right up to whole vectors.
inline int64_t plane_stride(int64_t w) { return padded(w) + 2 * kReach; }
inline int64_t plane_size(int64_t h, int64_t w) {
  return (h + 2 * kReach) * plane_stride(w) + kMaxLanes;
}

template <class T>
struct Kernels {
  using A = accumulate_t<T>;

  // With t = x, or x*dy where dy is given:
  //   row_sums[r] = sum_q t[r,q] v[q]   and   col_sums[q] = sum_r u[r] t[r,q];  null skips one.
  // `together`: several rows at a time; row sums alone are always so.
  void (*reduce)(const T* x, const T* dy, int64_t rows, int64_t cols, const A* u, const A* v,
                 A* row_sums, A* col_sums, bool together);

  // y[r,q] = x[r,q] u[r] v[q];  `stream` bypasses the caches.
  void (*scale)(const T* x, T* y, int64_t rows, int64_t cols, const A* u, const A* v, bool stream);

  // dx[r,q] = dy[r,q] u[r] v[q] + a[r] f[q] + e[r] b[q];  `together`: several rows at a time.
  void (*combine)(const T* dy, T* dx, int64_t rows, int64_t cols, const A* u, const A* v,
                  const A* a, const A* f, const A* e, const A* b, bool stream, bool together);

  // out[i*w + j] = the stencil at (i, j) of a bordered plane, for rows begin <= i < end.
  void (*stencil)(const A* plane, int64_t w, int64_t begin, int64_t end, const Stencil<A>& stencil,
                  A* out);

  // values[i] = sigmoid(values[i]) for i < n.
  void (*sigmoid)(A* values, int64_t n);

  // sums[t] = sum_p dz[p] m[p + t] over both convolutions' taps, then sum_p dz[p]; bordered planes,
  // rows begin <= i < end.
  void (*tap_sums)(const A* dz, const A* m, int64_t w, int64_t begin, int64_t end, A* sums);
};

// One table per storage type and instruction set; null where the compiler had no such target.
template <class T>
const Kernels<T>* generic_kernels();
template <class T>
const Kernels<T>* avx2_kernels();
template <class T>
const Kernels<T>* avx512_kernels();

// Those of instruction_set().
template <class T>
const Kernels<T>& kernels();

#define DA_EACH_STORAGE(M) M(float16) M(bfloat16) M(float) M(double)

}  // namespace da::cpu
