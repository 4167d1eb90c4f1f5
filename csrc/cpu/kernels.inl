// The primitives of kernels.h, written once on vectors; included once per instruction set.
//
// A row is swept in whole vectors. What is left over is taken by one vector that ends where the row
// ends and overlaps its neighbour: sums mask the lanes counted before, stores write them again.

#include "simd.inl"

constexpr int64_t kChunk = 16;  // vectors added in one register before they are folded into a total
constexpr int64_t kTiny = 64;   // elements of a row up to which rows are taken together in any case
constexpr int64_t kShort = 512;  // elements of a row up to which rows are added up side by side
constexpr int kUnrolled = 8;     // vectors of a row of which sums fit the registers

// Vectors of a row of 7 x 7 pixels, as most networks end with.
template <class A>
constexpr int kNarrow = (49 + Vector<A>::lanes - 1) / Vector<A>::lanes;

template <class T>
struct Tail {
  using A = accumulate_t<T>;
  static constexpr int64_t lanes = Vector<A>::lanes;
  int64_t full, n, begin;  // elements in whole vectors, left over, and where the last vector begins
  ivec<A> fresh;           // all ones in the lanes that no whole vector covers

  explicit DA_INLINE Tail(int64_t cols)
      : full(cols / lanes * lanes), n(cols - full), begin(full ? cols - lanes : 0), fresh{} {
    for (int64_t i = 0; i < lanes; i++) fresh[i] = full <= begin + i && begin + i < cols ? -1 : 0;
  }
  DA_INLINE vec<A> read(const T* row) const { return full ? load(row + begin) : load_part(row, n); }
  DA_INLINE vec<A> read_fresh(const T* row) const { return keep_fresh(read(row)); }
  DA_INLINE void write(T* row, vec<A> v) const {
    full ? store(row + begin, v) : store_part(row, v, n);
  }
  DA_INLINE vec<A> keep_fresh(vec<A> v) const { return bits<vec<A>>(bits<ivec<A>>(v) & fresh); }
};

// Sums of rows by lane. What a lane of a long row holds goes to a double before it has grown so
// large that it loses much of what it is given.
template <int kRows, class A>
struct LaneSums {
  static constexpr int64_t kSpan = kChunk * kChunk * Vector<A>::lanes;  // elements of a row
  vec<A> lanes[kRows] = {};
  double before[kRows] = {};

  // After every kChunk vectors of row r, which end before column q.
  DA_INLINE void add(int r, vec<A> sum, int64_t q) {
    lanes[r] += sum;
    if (q % kSpan != 0) return;
    A all;
    sum_lanes<1, A>(lanes + r, &all);
    before[r] += all, lanes[r] = vec<A>{};
  }
  // The sums of rows that had `full` elements in whole vectors.
  DA_INLINE void write(int64_t full, A* sums) const {
    sum_lanes<kRows, A>(lanes, sums);
    if (full < kSpan) return;
    for (int r = 0; r < kRows; r++) sums[r] = before[r] + sums[r];
  }
};

// An array along one side of the matrix, at row r: the row's value, or those of the columns.
template <bool kByRow, class A>
struct Along {
  vec<A> value;
  DA_INLINE Along(const A* values, int64_t r) : value(splat(values[r])) {}
  DA_INLINE vec<A> operator()(int64_t) const { return value; }
};
template <class A>
struct Along<false, A> {
  const A* values;
  DA_INLINE Along(const A* values, int64_t) : values(values) {}
  DA_INLINE vec<A> operator()(int64_t q) const { return load(values + q); }
};

// Into the second-level cache, what is read soon. Many short rows side by side are more streams
// than the hardware follows.
template <class T>
DA_INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// f of constants, true or false as the flags are.
template <class F>
DA_INLINE void with_constants(F f) {
  f();
}
template <class F, class... Flags>
DA_INLINE void with_constants(F f, bool first, Flags... rest) {
  if (first)
    with_constants([&](auto... others) { f(std::true_type(), others...); }, rest...);
  else
    with_constants([&](auto... others) { f(std::false_type(), others...); }, rest...);
}

// How many channels a pass takes at once over all pixels, so that what it has of so many arrays by
// channel stays in the first cache from pixel to pixel: all where they fit. (By pixel, where rows
// are channels, that was slower by a sixth: rows are then read in pieces.)
template <class A>
DA_INLINE int64_t channels_at_once(int64_t channels, int64_t arrays) {
  constexpr int64_t kFits = 32 * 1024, kWidth = 512;
  return arrays * channels * int64_t(sizeof(A)) > kFits ? kWidth : channels;
}

#include "maps.inl"
#include "sums.inl"

// Nine taps, `dilation` pixels apart, around an element of a bordered plane.
template <class A, class F>
DA_INLINE void for_taps(const A* centre, int64_t stride, int64_t dilation, F f) {
  for (int64_t i = -1; i <= 1; i++)
    for (int64_t j = -1; j <= 1; j++)
      f(3 * (i + 1) + (j + 1), centre + dilation * (i * stride + j));
}

template <class A>
void stencil(const A* plane, int64_t w, int64_t begin, int64_t end, const Stencil<A>& taps,
             A* out) {
  const int64_t stride = plane_stride(w);
  const Tail<A> tail(w);
  const auto at = [&](const A* centre) DA_LAMBDA_INLINE {
    vec<A> near = splat(taps.bias), far = {};
    for_taps(centre, stride, 1,
             [&](int t, const A* p) DA_LAMBDA_INLINE { near += load(p) * taps.near[t]; });
    for_taps(centre, stride, kReach,
             [&](int t, const A* p) DA_LAMBDA_INLINE { far += load(p) * taps.far[t]; });
    return near + far;
  };
  for (int64_t i = begin; i < end; i++) {
    const A* row = plane + (i + kReach) * stride + kReach;
    for (int64_t j = 0; j < tail.full; j += Vector<A>::lanes) store(out + i * w + j, at(row + j));
    if (tail.n) tail.write(out + i * w, at(row + tail.begin));
  }
}

DA_INLINE vec<float> sigmoid_of(vec<float> z) { return 1.f / (1.f + exponential(-z)); }
DA_INLINE vec<double> sigmoid_of(vec<double> z) {
  for (int64_t i = 0; i < Vector<double>::lanes; i++) z[i] = 1. / (1. + exp(-z[i]));
  return z;
}

template <class A>
void sigmoid(A* values, int64_t n) {
  constexpr int64_t lanes = Vector<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(values + i, sigmoid_of(load(values + i)));
  if (i < n) store_part(values + i, sigmoid_of(load_part(values + i, n - i)), n - i);
}

// Columns are taken in pieces, each of which A adds up without losing much of what comes last.
template <class A>
void tap_sums(const A* dz, const A* m, int64_t w, int64_t begin, int64_t end, double* sums) {
  constexpr int64_t lanes = Vector<A>::lanes, kPiece = 4 * kChunk * lanes;
  const int64_t stride = plane_stride(w);
  for (int t = 0; t < kSpatialSums; t++) sums[t] = 0;
  for (int64_t left = 0; left < w; left += kPiece) {
    const int64_t right = left + kPiece < w ? left + kPiece : w;
    vec<A> total[kSpatialSums] = {};
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = (i + kReach) * stride + kReach;
      for (int half = 0; half < 2; half++) {  // nine sums at a time: they fit the registers
        vec<A> sum[kTaps] = {}, all = {};
        for (int64_t j = left; j < right; j += lanes) {
          const vec<A> d = load(dz + row + j);
          for_taps(m + row + j, stride, half ? kReach : 1,
                   [&](int t, const A* p) DA_LAMBDA_INLINE { sum[t] += d * load(p); });
          all += d;
        }
        for (int t = 0; t < kTaps; t++) total[half * kTaps + t] += sum[t];
        if (half) total[2 * kTaps] += all;
      }
    }
    for (int t = 0; t < kSpatialSums; t++) {
      A sum;
      sum_lanes<1, A>(total + t, &sum);
      sums[t] += sum;
    }
  }
}

#include "residual.inl"

template <class T>
const Kernels<T>* table() {
  using A = accumulate_t<T>;
  static const Kernels<T> kernels = {
      reduce<T>,
      add<A>,
      scale<T>,
      combine<T>,
      stencil<A>,
      sigmoid<A>,
      tap_sums<A>,
      {moments<T>, reduce_deviations<T>, rectify<T>, gradients<T>, combine_residual<T>}};
  return &kernels;
}
