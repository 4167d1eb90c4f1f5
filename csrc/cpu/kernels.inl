// The primitives of kernels.h, written once on vectors; included once per instruction set.
//
// A row is swept in whole vectors. What is left over is taken by one vector that ends where the row
// ends and overlaps its neighbour: sums mask the lanes counted before, stores write them again.

#include "simd.inl"

constexpr int64_t kChunk = 16;  // vectors added in one register before they are folded into a total

template <class T>
struct Tail {
  using A = accumulate_t<T>;
  static constexpr int64_t lanes = Vector<A>::lanes;
  int64_t full, n, begin;  // elements in whole vectors, left over, and where the last vector begins
  ivec<A> fresh;           // all ones in the lanes that no whole vector covers

  explicit DA_INLINE Tail(int64_t cols)
      : full(cols / lanes * lanes), n(cols - full), begin(full ? cols - lanes : 0), fresh{} {
    for (int64_t i = 0; i < lanes; i++) fresh[i] = begin + i >= full ? -1 : 0;
  }
  DA_INLINE vec<A> read(const T* row) const { return full ? load(row + begin) : load_part(row, n); }
  DA_INLINE vec<A> read_fresh(const T* row) const {
    return bits<vec<A>>(bits<ivec<A>>(read(row)) & fresh);
  }
  DA_INLINE void write(T* row, vec<A> v) const {
    full ? store(row + begin, v) : store_part(row, v, n);
  }
};

// Row sums alone: one row after the other, so that memory is read in one stream.
template <bool kProduct, int kBlock, class T, class A = accumulate_t<T>>
DA_INLINE void sum_rows(const T* x, const T* dy, const Tail<T>& tail, int64_t cols,
                        const A* col_weight, A* row_sums) {
  constexpr int64_t lanes = Vector<A>::lanes;
  vec<A> total[kBlock] = {};
  for (int b = 0; b < kBlock; b++, x += cols, dy += kProduct ? cols : 0) {
    const auto term = [&](int64_t q, auto read) DA_LAMBDA_INLINE {
      vec<A> t = read(x);
      if constexpr (kProduct) t *= read(dy);
      return t * load(col_weight + q);
    };
    const auto at = [&](int64_t q) DA_LAMBDA_INLINE {
      return term(q, [=](const T* row) DA_LAMBDA_INLINE { return load(row + q); });
    };
    for (int64_t q = 0; q < tail.full;) {
      const int64_t end = q + kChunk * lanes < tail.full ? q + kChunk * lanes : tail.full;
      vec<A> even = {}, odd = {};
      for (; q + lanes < end; q += 2 * lanes) even += at(q), odd += at(q + lanes);
      if (q < end) even += at(q), q += lanes;
      total[b] += even + odd;
    }
    if (tail.n)
      total[b] +=
          term(tail.begin, [&](const T* row) DA_LAMBDA_INLINE { return tail.read_fresh(row); });
  }
  sum_lanes<kBlock, A>(total, row_sums);
}

// Column sums, and row sums if asked for, of a few rows together. What is left over of the columns
// goes to `tail_sums`: in memory it would overlap what has just been stored, and wait for it.
template <bool kProduct, bool kRows, int kBlock, class T, class A = accumulate_t<T>>
DA_INLINE void sum_block(const T* x, const T* dy, const Tail<T>& tail, int64_t cols,
                         const A* row_weight, const A* col_weight, A* row_sums, A* col_sums,
                         vec<A>& tail_sums) {
  constexpr int64_t lanes = Vector<A>::lanes;
  vec<A> total[kBlock] = {}, sum[kBlock] = {};
  // The next block's rows are fetched while these are summed: many short rows are more streams than
  // the hardware follows.
  const auto columns = [&](int64_t q, auto read) DA_LAMBDA_INLINE {
    vec<A> parts[2] = {};
    for (int b = 0; b < kBlock; b++) {
      __builtin_prefetch(x + (b + kBlock) * cols + q);
      if constexpr (kProduct) __builtin_prefetch(dy + (b + kBlock) * cols + q);
      vec<A> t = read(x + b * cols);
      if constexpr (kProduct) t *= read(dy + b * cols);
      if constexpr (kRows) sum[b] += t * load(col_weight + q);
      parts[b % 2] += t * row_weight[b];
    }
    return parts[0] + parts[1];
  };
  for (int64_t q = 0; q < tail.full;) {
    const int64_t end = q + kChunk * lanes < tail.full ? q + kChunk * lanes : tail.full;
    for (; q < end; q += lanes) {
      const auto read = [&](const T* row) DA_LAMBDA_INLINE { return load(row + q); };
      store(col_sums + q, load(col_sums + q) + columns(q, read));
    }
    for (int b = 0; kRows && b < kBlock; b++) total[b] += sum[b], sum[b] = vec<A>{};
  }
  if (tail.n)
    tail_sums +=
        columns(tail.begin, [&](const T* row) DA_LAMBDA_INLINE { return tail.read_fresh(row); });
  if constexpr (kRows) {
    for (int b = 0; b < kBlock; b++) total[b] += sum[b];
    sum_lanes<kBlock, A>(total, row_sums);
  }
}

template <bool kProduct, bool kRows, bool kCols, class T, class A = accumulate_t<T>>
void reduce_slab(const T* x, const T* dy, int64_t rows, int64_t cols, const A* row_weight,
                 const A* col_weight, A* row_sums, A* col_sums, Rows how) {
  constexpr int kBlock = kRows ? 4 : 8;
  const Tail<T> tail(cols);
  vec<A> tail_sums = {};
  int64_t r = 0;
  const auto block = [&](auto size) DA_LAMBDA_INLINE {
    constexpr int kSize = decltype(size)::value;
    for (; r + kSize <= rows; r += kSize) {
      const T *xr = x + r * cols, *dyr = kProduct ? dy + r * cols : nullptr;
      A* sums = kRows ? row_sums + r : nullptr;
      if constexpr (kCols)
        sum_block<kProduct, kRows, kSize>(xr, dyr, tail, cols, row_weight + r, col_weight, sums,
                                          col_sums, tail_sums);
      else
        sum_rows<kProduct, kSize>(xr, dyr, tail, cols, col_weight, sums);
    }
  };
  if constexpr (kCols) __builtin_memset(col_sums, 0, padded(cols) * sizeof(A));
  if (!kCols || how == Rows::together) block(std::integral_constant<int, kBlock>());
  block(std::integral_constant<int, 1>());
  if (kCols && tail.n) store(col_sums + tail.begin, load(col_sums + tail.begin) + tail_sums);
}

template <class T, class A = accumulate_t<T>>
void reduce(const T* x, const T* dy, int64_t rows, int64_t cols, const A* row_weight,
            const A* col_weight, A* row_sums, A* col_sums, Rows how) {
  const auto slab = dy                     ? row_sums && col_sums ? reduce_slab<true, true, true, T>
                                             : row_sums           ? reduce_slab<true, true, false, T>
                                                                  : reduce_slab<true, false, true, T>
                    : row_sums && col_sums ? reduce_slab<false, true, true, T>
                    : row_sums             ? reduce_slab<false, true, false, T>
                                           : reduce_slab<false, false, true, T>;
  slab(x, dy, rows, cols, row_weight, col_weight, row_sums, col_sums, how);
}

// out = row(q, in) for a few rows at a time, which share what `row` reads of the columns.
template <bool kStream, class T, class... Rows>
DA_INLINE void map_block(const T* in, T* out, int64_t cols, const Tail<T>& tail, Rows... row) {
  using V = vec<accumulate_t<T>>;
  constexpr int64_t lanes = Vector<accumulate_t<T>>::lanes;
  for (int64_t q = 0; q < tail.full; q += lanes) {
    int64_t b = 0, at = 0;
    const V results[] = {row(q, load(in + b++ * cols + q))...};
    for (const V& result : results) {
      T* p = out + at++ * cols + q;
      kStream ? stream(p, result) : store(p, result);
    }
  }
  if (tail.n) {
    int64_t b = 0, at = 0;
    const V results[] = {row(tail.begin, tail.read(in + b++ * cols))...};
    for (const V& result : results) tail.write(out + at++ * cols, result);
  }
}

// f(r) is row r's function of the column and the element; together, four rows are taken at a time.
template <class T, class F>
DA_INLINE void map_rows(const T* in, T* out, int64_t rows, int64_t cols, Stores stores, Rows how,
                        F f) {
  const Tail<T> tail(cols);
  const bool streamed = stores == Stores::streamed && !tail.n &&
                        reinterpret_cast<uintptr_t>(out) % DA_VECTOR_BYTES == 0;
  const auto all = [&](auto stream) DA_LAMBDA_INLINE {
    constexpr bool kStream = decltype(stream)::value;
    int64_t r = 0;
    for (; how == Rows::together && r + 4 <= rows; r += 4)
      map_block<kStream>(in + r * cols, out + r * cols, cols, tail, f(r), f(r + 1), f(r + 2),
                         f(r + 3));
    for (; r < rows; r++) map_block<kStream>(in + r * cols, out + r * cols, cols, tail, f(r));
    if constexpr (kStream) finish_streams();
  };
  streamed ? all(std::true_type()) : all(std::false_type());
}

template <class T, class A = accumulate_t<T>>
void scale(const T* x, T* y, int64_t rows, int64_t cols, const A* row_scale, const A* col_scale,
           Stores stores) {
  map_rows(x, y, rows, cols, stores, Rows::singly, [=](int64_t r) DA_LAMBDA_INLINE {
    return [=, by_row = row_scale[r]](int64_t q, vec<A> t)
               DA_LAMBDA_INLINE { return t * load(col_scale + q) * by_row; };
  });
}

template <class T, class A = accumulate_t<T>>
void combine(const T* dy, T* dx, int64_t rows, int64_t cols, const A* row_scale, const A* col_scale,
             const Terms<A>& terms, Stores stores, Rows how) {
  map_rows(dy, dx, rows, cols, stores, how, [=](int64_t r) DA_LAMBDA_INLINE {
    return [=, by_row = row_scale[r], row_bias = terms.row_bias[r], row_outer = terms.row_outer[r]](
               int64_t q, vec<A> t) DA_LAMBDA_INLINE {
      return t * (load(col_scale + q) * by_row) +
             (load(terms.col_outer + q) * row_bias + load(terms.col_bias + q) * row_outer);
    };
  });
}

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

template <class A>
void tap_sums(const A* dz, const A* m, int64_t w, int64_t begin, int64_t end, A* sums) {
  const int64_t stride = plane_stride(w);
  vec<A> total[kSpatialSums] = {};
  for (int64_t i = begin; i < end; i++) {
    const int64_t row = (i + kReach) * stride + kReach;
    for (int half = 0; half < 2; half++) {  // nine sums at a time: they fit the registers
      vec<A> sum[kTaps] = {}, all = {};
      for (int64_t j = 0; j < w; j += Vector<A>::lanes) {
        const vec<A> d = load(dz + row + j);
        for_taps(m + row + j, stride, half ? kReach : 1,
                 [&](int t, const A* p) DA_LAMBDA_INLINE { sum[t] += d * load(p); });
        all += d;
      }
      for (int t = 0; t < kTaps; t++) total[half * kTaps + t] += sum[t];
      if (half) total[2 * kTaps] += all;
    }
  }
  for (int t = 0; t < kSpatialSums; t++) sum_lanes<1, A>(total + t, sums + t);
}

template <class T>
const Kernels<T>* table() {
  using A = accumulate_t<T>;
  static const Kernels<T> kernels = {reduce<T>,  scale<T>,   combine<T>,
                                     stencil<A>, sigmoid<A>, tap_sums<A>};
  return &kernels;
}
