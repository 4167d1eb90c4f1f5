// The primitives of kernels.h, written once on vectors; included once per instruction set.
//
// A row is swept in whole vectors. What is left over is taken by one vector that ends where the row
// ends and overlaps its neighbour: sums mask the lanes counted before, stores write them again.

#include "simd.inl"

constexpr int64_t kChunk = 16;  // vectors added in one register before they are folded into a total
constexpr int64_t kFar = 2048;  // elements from what is read to what is fetched, at least
constexpr int64_t kTiny = 64;   // elements of a row up to which rows are taken together in any case
constexpr int64_t kBuffer = 16384;  // bytes of rows that are made before they are streamed
constexpr int64_t kShort = 512;     // elements of a row up to which rows are added up side by side

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
// A few rows on, and not too few elements.
template <class T>
DA_INLINE const T* next_rows(const T* x, int64_t cols) {
  return x + (8 * cols > kFar ? 8 * cols : kFar);
}

// What is added up of a row r: read(row) loads the elements at column q, and keep(v) makes zeros of
// what is none of them. from(r) begins at row r. fetch_ahead(i) fetches the i-th element of
// `ahead`.
template <class T>
struct Elements {
  const T *x, *ahead;
  int64_t cols;
  DA_INLINE Elements from(int64_t r) const { return {x + r * cols, ahead + r * cols, cols}; }
  template <class Read, class Keep>
  DA_INLINE auto at(int64_t r, int64_t, Read read, Keep) const {
    return read(x + r * cols);
  }
  DA_INLINE void fetch_ahead(int64_t i) const { fetch(ahead + i); }
};
template <class T>
struct Products {
  const T *x, *dy;
  int64_t cols;
  DA_INLINE Products from(int64_t r) const { return {x + r * cols, dy + r * cols, cols}; }
  template <class Read, class Keep>
  DA_INLINE auto at(int64_t r, int64_t, Read read, Keep) const {
    return read(x + r * cols) * read(dy + r * cols);
  }
  DA_INLINE void fetch_ahead(int64_t i) const {
    fetch(next_rows(x, cols) + i);
    fetch(next_rows(dy, cols) + i);
  }
};
template <bool kByRow, class T>
struct Deviations {
  const T *x, *ahead;
  const accumulate_t<T>* centre;  // of rows, or of columns
  int64_t cols;
  DA_INLINE Deviations from(int64_t r) const {
    return {x + r * cols, ahead + r * cols, kByRow ? centre + r : centre, cols};
  }
  template <class Read, class Keep>
  DA_INLINE auto at(int64_t r, int64_t q, Read read, Keep keep) const {
    return read(x + r * cols) - keep(Along<kByRow, accumulate_t<T>>(centre, r)(q));
  }
  DA_INLINE void fetch_ahead(int64_t i) const { fetch(ahead + i); }
};

// Zeros for n sums, and for the rest of their last vector.
template <class A>
DA_INLINE void clear(A* sums, int64_t n) {
  for (int64_t i = 0; i < n; i += Vector<A>::lanes) store(sums + i, vec<A>{});
}

// Row sums alone of long rows: one after the other, so that memory is read in one stream.
template <int kBlock, class T, class Source, class A = accumulate_t<T>>
DA_INLINE void sum_rows(Source source, const Tail<T>& tail, const A* col_weight, A* row_sums) {
  constexpr int64_t lanes = Vector<A>::lanes;
  vec<A> total[kBlock] = {};
  const auto all = [&](vec<A> t) DA_LAMBDA_INLINE { return t; };
  for (int b = 0; b < kBlock; b++, source = source.from(1)) {
    const auto at = [&](int64_t q) DA_LAMBDA_INLINE {
      const auto read = [=](const T* row) DA_LAMBDA_INLINE { return load(row + q); };
      source.fetch_ahead(q);
      return source.at(0, q, read, all) * load(col_weight + q);
    };
    for (int64_t q = 0; q < tail.full;) {
      const int64_t end = q + kChunk * lanes < tail.full ? q + kChunk * lanes : tail.full;
      vec<A> even = {}, odd = {};
      for (; q + lanes < end; q += 2 * lanes) even += at(q), odd += at(q + lanes);
      if (q < end) even += at(q), q += lanes;
      total[b] += even + odd;
    }
    if (tail.n) {
      const auto read = [&](const T* row) DA_LAMBDA_INLINE { return tail.read_fresh(row); };
      const auto keep = [&](vec<A> t) DA_LAMBDA_INLINE { return tail.keep_fresh(t); };
      total[b] += source.at(0, tail.begin, read, keep) * load(col_weight + tail.begin);
    }
  }
  sum_lanes<kBlock, A>(total, row_sums);
}

// Row sums, column sums or both of a few rows together. What is left over of the columns goes to
// `tail_sums`: in memory it would overlap what has just been stored, and wait for it.
template <bool kRows, bool kCols, int kBlock, class T, class Source, class A = accumulate_t<T>>
DA_INLINE void sum_block(Source source, int64_t cols, const Tail<T>& tail, const A* row_weight,
                         const A* col_weight, A* row_sums, A* col_sums, vec<A>& tail_sums) {
  constexpr int64_t lanes = Vector<A>::lanes;
  vec<A> total[kBlock] = {}, sum[kBlock] = {}, weight[kBlock];
  for (int b = 0; kCols && b < kBlock; b++) weight[b] = splat(row_weight[b]);
  const auto columns = [&](int64_t q, auto read, auto keep) DA_LAMBDA_INLINE {
    vec<A> parts[2] = {};
    for (int b = 0; b < kBlock; b++) {
      source.fetch_ahead(kBlock * q + b * lanes);
      const vec<A> t = source.at(b, q, read, keep);
      if constexpr (kRows) sum[b] += t * load(col_weight + q);
      if constexpr (kCols) parts[b % 2] += t * weight[b];
    }
    return parts[0] + parts[1];
  };
  for (int64_t q = 0; q < tail.full;) {
    const int64_t end = q + kChunk * lanes < tail.full ? q + kChunk * lanes : tail.full;
    for (; q < end; q += lanes) {
      const auto read = [&](const T* row) DA_LAMBDA_INLINE { return load(row + q); };
      const auto all = [&](vec<A> t) DA_LAMBDA_INLINE { return t; };
      const vec<A> sums = columns(q, read, all);
      if constexpr (kCols) store(col_sums + q, load(col_sums + q) + sums);
    }
    for (int b = 0; kRows && b < kBlock; b++) total[b] += sum[b], sum[b] = vec<A>{};
  }
  if (tail.n)
    tail_sums += columns(
        tail.begin, [&](const T* row) DA_LAMBDA_INLINE { return tail.read_fresh(row); },
        [&](vec<A> t) DA_LAMBDA_INLINE { return tail.keep_fresh(t); });
  if constexpr (kRows) {
    for (int b = 0; b < kBlock; b++) total[b] += sum[b];
    sum_lanes<kBlock, A>(total, row_sums);
  }
}

template <bool kRows, bool kCols, class T, class Source, class A = accumulate_t<T>>
DA_INLINE void reduce_slab(const Source& source, int64_t rows, int64_t cols, const A* row_weight,
                           const A* col_weight, A* row_sums, A* col_sums, Rows how) {
  constexpr int kBlock = kRows ? 4 : 8;
  const Tail<T> tail(cols);
  const bool together = cols <= kShort || (kCols && how == Rows::together);
  vec<A> tail_sums = {};
  int64_t r = 0;
  const auto block = [&](auto size) DA_LAMBDA_INLINE {
    constexpr int kSize = decltype(size)::value;
    for (; r + kSize <= rows; r += kSize) {
      A* sums = kRows ? row_sums + r : nullptr;
      if (kCols || together)
        sum_block<kRows, kCols, kSize, T>(source.from(r), cols, tail,
                                          kCols ? row_weight + r : nullptr, col_weight, sums,
                                          col_sums, tail_sums);
      else if constexpr (!kCols)
        sum_rows<kSize, T>(source.from(r), tail, col_weight, sums);
    }
  };
  if constexpr (kCols) clear(col_sums, cols);
  if (together || !kCols) block(std::integral_constant<int, kBlock>());
  block(std::integral_constant<int, 1>());
  if (kCols && tail.n) store(col_sums + tail.begin, load(col_sums + tail.begin) + tail_sums);
}

template <class T, class Source, class A = accumulate_t<T>>
void reduce_of(const Source& source, int64_t rows, int64_t cols, const A* row_weight,
               const A* col_weight, A* row_sums, A* col_sums, Rows how) {
  if (row_sums && col_sums)
    reduce_slab<true, true, T>(source, rows, cols, row_weight, col_weight, row_sums, col_sums, how);
  else if (row_sums)
    reduce_slab<true, false, T>(source, rows, cols, row_weight, col_weight, row_sums, col_sums,
                                how);
  else
    reduce_slab<false, true, T>(source, rows, cols, row_weight, col_weight, row_sums, col_sums,
                                how);
}

template <class T, class A = accumulate_t<T>>
void reduce(const T* x, const T* dy, const T* ahead, int64_t rows, int64_t cols,
            const A* row_weight, const A* col_weight, A* row_sums, A* col_sums, Rows how) {
  if (dy)
    reduce_of<T>(Products<T>{x, dy, cols}, rows, cols, row_weight, col_weight, row_sums, col_sums,
                 how);
  else
    reduce_of<T>(Elements<T>{x, ahead ? ahead : next_rows(x, cols), cols}, rows, cols, row_weight,
                 col_weight, row_sums, col_sums, how);
}

// A few rows of `out`, which share what they read of the columns: row(q, read) is a row's vector at
// column q, and read(in) loads a row of its arguments there. `out` may be one of these: the last
// vector, which shares elements with the one before, is made first.
template <bool kStream, class T, class... Rows>
DA_INLINE void map_block(T* out, int64_t cols, const Tail<T>& tail, Rows... row) {
  using V = vec<accumulate_t<T>>;
  constexpr int64_t lanes = Vector<accumulate_t<T>>::lanes;
  V last[sizeof...(row)];
  if (tail.n) {
    const auto read = [&](const T* in) DA_LAMBDA_INLINE { return tail.read(in); };
    int64_t at = 0;
    ((last[at++] = row(tail.begin, read)), ...);
  }
  for (int64_t q = 0; q < tail.full; q += lanes) {
    const auto read = [=](const T* in) DA_LAMBDA_INLINE { return load(in + q); };
    const V results[] = {row(q, read)...};
    int64_t at = 0;
    for (const V& result : results) {
      T* p = out + at++ * cols + q;
      kStream ? stream(p, result) : store(p, result);
    }
  }
  if (tail.n) {
    int64_t at = 0;
    for (const V& result : last) tail.write(out + at++ * cols, result);
  }
}

// How many rows of `out` at a time are whole aligned vectors, which can be written past the caches;
// 0 where none are to be. Several rows are made in a buffer of kBuffer bytes.
template <class T>
DA_INLINE int64_t streamed_rows(const T* out, int64_t cols, Stores stores) {
  constexpr int64_t lanes = Vector<accumulate_t<T>>::lanes;
  const int64_t even = cols & -cols;  // the largest power of two that divides it
  const int64_t rows = even < lanes ? lanes / even : 1;
  if (!kStreams || stores == Stores::cached) return 0;
  if (reinterpret_cast<uintptr_t>(out) % (lanes * sizeof(T)) != 0) return 0;
  return rows == 1 || rows * cols * int64_t(sizeof(T)) <= kBuffer ? rows : 0;
}

// f(r) is row r's function of the column and of what is read there; together, four rows are taken
// at a time.
template <class T, class F>
DA_INLINE void map_rows(T* out, int64_t rows, int64_t cols, Stores stores, Rows how, F f) {
  constexpr int64_t lanes = Vector<accumulate_t<T>>::lanes;
  const Tail<T> tail(cols);
  const int64_t streamed = streamed_rows(out, cols, stores);
  int64_t r = 0;
  if (streamed > 1) {
    alignas(kAlignment) T buffer[kBuffer / sizeof(T)];
    for (; r + streamed <= rows; r += streamed) {
      int64_t i = 0;
      const auto stream_until = [&](int64_t end) DA_LAMBDA_INLINE {
        for (; i + lanes <= end; i += lanes) stream(out + r * cols + i, buffer + i);
      };
      // Each row is streamed while the next is made: memory reads and writes at a time, and what
      // has just been stored is not waited for.
      for (int64_t b = 0; b < streamed; b++) {
        map_block<false>(buffer + b * cols, cols, tail, f(r + b));
        stream_until(b * cols);
      }
      stream_until(streamed * cols);
    }
  }
  const auto rest = [&](auto stream) DA_LAMBDA_INLINE {
    constexpr bool kStream = decltype(stream)::value;
    for (; how == Rows::together && r + 4 <= rows; r += 4)
      map_block<kStream>(out + r * cols, cols, tail, f(r), f(r + 1), f(r + 2), f(r + 3));
    for (; r < rows; r++) map_block<kStream>(out + r * cols, cols, tail, f(r));
  };
  streamed == 1 ? rest(std::true_type()) : rest(std::false_type());
  if (streamed) finish_streams();
}

template <class T, class A = accumulate_t<T>>
void scale(const T* x, T* y, int64_t rows, int64_t cols, const A* row_scale, const A* col_scale,
           Stores stores) {
  map_rows(y, rows, cols, stores, Rows::singly, [=](int64_t r) DA_LAMBDA_INLINE {
    return [=, row = x + r * cols, by_row = row_scale[r]](int64_t q, auto read)
               DA_LAMBDA_INLINE { return read(row) * load(col_scale + q) * by_row; };
  });
}

template <class T, class A = accumulate_t<T>>
void combine(const T* dy, T* dx, int64_t rows, int64_t cols, const A* row_scale, const A* col_scale,
             const Terms<A>& terms, Stores stores, Rows how) {
  const Rows as = cols <= kTiny ? Rows::together : how;
  map_rows(dx, rows, cols, stores, as, [=](int64_t r) DA_LAMBDA_INLINE {
    return [=, row = dy + r * cols, by_row = row_scale[r], row_bias = terms.row_bias[r],
            row_outer = terms.row_outer[r]](int64_t q, auto read) DA_LAMBDA_INLINE {
      return read(row) * (load(col_scale + q) * by_row) +
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

#include "residual.inl"

template <class T>
const Kernels<T>* table() {
  using A = accumulate_t<T>;
  static const Kernels<T> kernels = {
      reduce<T>,
      scale<T>,
      combine<T>,
      stencil<A>,
      sigmoid<A>,
      tap_sums<A>,
      {moments<T>, reduce_deviations<T>, rectify<T>, gradients<T>, combine_residual<T>}};
  return &kernels;
}
