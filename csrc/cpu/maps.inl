// Maps of a matrix's elements by values of their row and their column: `scale` and `combine` of
// kernels.h. Included by kernels.inl.

// A few rows of `out`, which share what they read of the columns: row(q, read) is a row's vector at
// column q, and read(in) loads a row of its arguments there. `out` may be one of these: the last
// vector, which shares elements with the one before, is made first.
template <bool kStream, class T, class... Rows>
DA_INLINE void map_block(T* out, int64_t cols, const Tail<T>& tail, Rows... row) {
  using V = vec<accumulate_t<T>>;
  constexpr int64_t lanes = Vector<accumulate_t<T>>::lanes;
  V last[sizeof...(row)] = {};
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
      // Each row is streamed while the next is made: memory then reads and writes at once, and
      // nothing waits for what has just been stored.
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

// Rows that end inside a vector, as many together as are whole vectors: out = f(in, row, col), with
// the vectors' values of the arrays by row and by column. Returns how many rows were taken.
template <class T, size_t kArrays, class F, class A = accumulate_t<T>>
DA_INLINE int64_t map_across(const T* in, T* out, int64_t rows, int64_t cols, Stores stores,
                             const A* const (&by_row)[kArrays], const A* const (&by_col)[kArrays],
                             F f) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const int64_t period = lanes / (cols & -cols);  // rows that are whole vectors together
  if (!kPicks || cols <= lanes || period <= 1) return 0;
  const int64_t last = cols - lanes;
  A seam[kArrays][2 * lanes];  // the columns' last values, and after them the first again
  for (size_t i = 0; i < kArrays; i++) {
    store(seam[i], load(by_col[i] + last));
    store(seam[i] + lanes, load(by_col[i]));
  }
  int64_t r = 0;
  const auto take = [&](auto groups, auto stream_it) DA_LAMBDA_INLINE {
    constexpr int kGroups = decltype(groups)::value;
    for (; r + kGroups * period <= rows; r += kGroups * period) {
      vec<A> of_rows[kGroups][kArrays];
      for (int g = 0; g < kGroups; g++)
        for (size_t i = 0; i < kArrays; i++)
          of_rows[g][i] = load_part(by_row[i] + r + g * period, period);
      const int64_t size = period * cols;
      int64_t row = 0, q = 0;  // of a vector's first element
      for (int64_t at = r * cols; at < r * cols + size; at += lanes) {
        const auto which = rows_from<A>(row, cols - q);
        vec<A> col[kArrays];
        for (size_t i = 0; i < kArrays; i++)
          col[i] = load(q <= last ? by_col[i] + q : seam[i] + (q - last));
        for (int g = 0; g < kGroups; g++) {
          vec<A> of_row[kArrays];
          for (size_t i = 0; i < kArrays; i++) of_row[i] = pick(of_rows[g][i], which);
          const vec<A> v = f(load(in + at + g * size), of_row, col);
          T* p = out + at + g * size;
          decltype(stream_it)::value ? stream(p, v) : store(p, v);
        }
        q += lanes;
        if (q >= cols) q -= cols, row++;
      }
    }
  };
  const auto all = [&](auto stream_it) DA_LAMBDA_INLINE {
    take(std::integral_constant<int, 4>(), stream_it);
    take(std::integral_constant<int, 1>(), stream_it);
  };
  if (kStreams && stores == Stores::streamed &&
      reinterpret_cast<uintptr_t>(out) % (lanes * sizeof(T)) == 0) {
    all(std::true_type());
    finish_streams();
  } else {
    all(std::false_type());
  }
  return r;
}

// out = f(in, row, col) as above, of all rows.
template <class T, size_t kArrays, class F, class A = accumulate_t<T>>
DA_INLINE void map_matrix(const T* in, T* out, int64_t rows, int64_t cols, Stores stores, Rows how,
                          const A* const (&by_row)[kArrays], const A* const (&by_col)[kArrays],
                          F f) {
  const int64_t begin = map_across(in, out, rows, cols, stores, by_row, by_col, f);
  map_rows(out + begin * cols, rows - begin, cols, stores, how, [&](int64_t i) DA_LAMBDA_INLINE {
    const int64_t r = begin + i;
    struct {
      vec<A> values[kArrays];
    } row;
    for (size_t k = 0; k < kArrays; k++) row.values[k] = splat(by_row[k][r]);
    return [&, row, x = in + r * cols](int64_t q, auto read) DA_LAMBDA_INLINE {
      vec<A> col[kArrays];
      for (size_t k = 0; k < kArrays; k++) col[k] = load(by_col[k] + q);
      return f(read(x), row.values, col);
    };
  });
}

template <class T, class A = accumulate_t<T>>
void scale(const T* x, T* y, int64_t rows, int64_t cols, const A* row_scale, const A* col_scale,
           Stores stores) {
  map_matrix<T, 1>(x, y, rows, cols, stores, Rows::singly, {row_scale}, {col_scale},
                   [=](vec<A> x, const vec<A>(&row)[1], const vec<A>(&col)[1])
                       DA_LAMBDA_INLINE { return x * col[0] * row[0]; });
}

template <Outer kOuter, class T, class A = accumulate_t<T>>
void combine_terms(const T* dy, T* dx, int64_t rows, int64_t cols, const A* row_scale,
                   const A* col_scale, const Terms<A>& terms, Stores stores, Rows how) {
  map_matrix<T, 2>(dy, dx, rows, cols, stores, how, {row_scale, terms.row_bias},
                   {col_scale, terms.col_bias},
                   [=](vec<A> dy, const vec<A>(&row)[2], const vec<A>(&col)[2]) DA_LAMBDA_INLINE {
                     if constexpr (kOuter == Outer::none)
                       return dy * (row[0] * col[0]) + (row[1] + col[1]);
                     else if constexpr (kOuter == Outer::rows)
                       return (dy * col[0] + col[1]) * row[0] + row[1];
                     else
                       return (dy * row[0] + row[1]) * col[0] + col[1];
                   });
}

template <class T, class A = accumulate_t<T>>
void combine(const T* dy, T* dx, int64_t rows, int64_t cols, const A* row_scale, const A* col_scale,
             const Terms<A>& terms, Stores stores, Rows how) {
  const auto of = terms.outer == Outer::none   ? combine_terms<Outer::none, T>
                  : terms.outer == Outer::rows ? combine_terms<Outer::rows, T>
                                               : combine_terms<Outer::cols, T>;
  const Rows as = cols <= kTiny ? Rows::together : how;
  of(dy, dx, rows, cols, row_scale, col_scale, terms, stores, as);
}
