// Maps of a matrix's elements by values of their row and their column: `scale` and `combine` of
// kernels.h. Included by kernels.inl.

// A few rows of `out`, which share what they read of the columns: row(q, read) is a row's vector at
// column q, and read(in) loads a row of its arguments there. Rows are `step` elements apart. `out`
// may be one of these: the last vector, which shares elements with the one before, is made first.
template <bool kStream, class T, class... Rows>
DA_INLINE void map_block(T* out, int64_t step, const Tail<T>& tail, Rows... row) {
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
      T* p = out + at++ * step + q;
      kStream ? stream(p, result) : store(p, result);
    }
  }
  if (tail.n) {
    int64_t at = 0;
    for (const V& result : last) tail.write(out + at++ * step, result);
  }
}

// Whether vectors from `out` on may be written past the caches, `step` elements apart.
template <class T>
DA_INLINE bool streams(const T* out, int64_t step, Stores stores) {
  constexpr int64_t lanes = Vector<accumulate_t<T>>::lanes;
  return kStreams && stores == Stores::streamed && step % lanes == 0 &&
         reinterpret_cast<uintptr_t>(out) % (lanes * sizeof(T)) == 0;
}

// f(r) is row r's function of the column and of what is read there. Rows are `step` elements apart;
// together, four are taken at a time.
template <class T, class F>
DA_INLINE void map_rows(T* out, int64_t step, int64_t rows, int64_t cols, Stores stores, Rows how,
                        F f) {
  const Tail<T> tail(cols);
  const auto all = [&](auto stream) DA_LAMBDA_INLINE {
    constexpr bool kStream = decltype(stream)::value;
    int64_t r = 0;
    for (; how == Rows::together && r + 4 <= rows; r += 4)
      map_block<kStream>(out + r * step, step, tail, f(r), f(r + 1), f(r + 2), f(r + 3));
    for (; r < rows; r++) map_block<kStream>(out + r * step, step, tail, f(r));
  };
  if (streams(out, step, stores)) {
    all(std::true_type());
    finish_streams();
  } else {
    all(std::false_type());
  }
}

// out = f(i, read, row, col) at element i, where read(p) loads p[i], and `row` and `col` are there
// the arrays by row and by column. Rows that end inside a vector are taken as many together as are
// whole vectors. Returns how many rows were taken.
template <class T, size_t kByRow, size_t kByCol, class F, class A = accumulate_t<T>>
DA_INLINE int64_t map_across(T* out, int64_t rows, int64_t cols, Stores stores,
                             const A* const (&by_row)[kByRow], const A* const (&by_col)[kByCol],
                             F f) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const int64_t period = lanes / (cols & -cols);  // rows that are whole vectors together
  if (!kPicks || cols <= lanes || period <= 1) return 0;
  const int64_t last = cols - lanes;
  A seam[kByCol][2 * lanes];  // the columns' last values, and after them the first again
  for (size_t k = 0; k < kByCol; k++) {
    store(seam[k], load(by_col[k] + last));
    store(seam[k] + lanes, load(by_col[k]));
  }
  int64_t r = 0;
  const auto take = [&](auto groups, auto stream_it) DA_LAMBDA_INLINE {
    constexpr int kGroups = decltype(groups)::value;
    for (; r + kGroups * period <= rows; r += kGroups * period) {
      vec<A> of_rows[kGroups][kByRow];
      for (int g = 0; g < kGroups; g++)
        for (size_t k = 0; k < kByRow; k++)
          of_rows[g][k] = load_part(by_row[k] + r + g * period, period);
      const int64_t size = period * cols;
      int64_t row = 0, q = 0;  // of a vector's first element
      for (int64_t at = r * cols; at < r * cols + size; at += lanes) {
        const auto which = rows_from<A>(row, cols - q);
        vec<A> col[kByCol];
        for (size_t k = 0; k < kByCol; k++)
          col[k] = load(q <= last ? by_col[k] + q : seam[k] + (q - last));
        for (int g = 0; g < kGroups; g++) {
          const int64_t i = at + g * size;
          vec<A> of_row[kByRow];
          for (size_t k = 0; k < kByRow; k++) of_row[k] = pick(of_rows[g][k], which);
          const auto read = [=](const T* p) DA_LAMBDA_INLINE { return load(p + i); };
          const vec<A> v = f(i, read, of_row, col);
          decltype(stream_it)::value ? stream(out + i, v) : store(out + i, v);
        }
        q += lanes;
        if (q >= cols) q -= cols, row++;
      }
    }
  };
  const auto all = [&](auto stream_it) DA_LAMBDA_INLINE {
    // Four groups share the columns' vectors and whose rows they have, if what they take of the
    // arrays fits the registers. Lines that are far are rather written one by one, each as a whole.
    if constexpr (kByRow + kByCol <= 4)
      if (stores == Stores::hot) take(std::integral_constant<int, 4>(), stream_it);
    take(std::integral_constant<int, 1>(), stream_it);
  };
  if (streams(out, period * cols, stores)) {
    all(std::true_type());
    finish_streams();
  } else {
    all(std::false_type());
  }
  return r;
}

// out = f(i, read, row, col) as above, of all rows, and of so many columns at once.
template <class T, size_t kByRow, size_t kByCol, class F, class A = accumulate_t<T>>
DA_INLINE void map_matrix(T* out, int64_t rows, int64_t cols, Stores stores, Rows how,
                          const A* const (&by_row)[kByRow], const A* const (&by_col)[kByCol],
                          int64_t width, F f) {
  const int64_t done = map_across<T>(out, rows, cols, stores, by_row, by_col, f);
  for (int64_t c = 0; c < cols && done < rows; c += width) {
    const auto of_row = [&](int64_t i) DA_LAMBDA_INLINE {
      const int64_t r = done + i;
      struct {
        vec<A> values[kByRow];
      } row;
      for (size_t k = 0; k < kByRow; k++) row.values[k] = splat(by_row[k][r]);
      return [&, row, c, from = r * cols + c](int64_t q, auto read) DA_LAMBDA_INLINE {
        vec<A> col[kByCol];
        for (size_t k = 0; k < kByCol; k++) col[k] = load(by_col[k] + c + q);
        const auto read_here = [&](const T* p) DA_LAMBDA_INLINE { return read(p + from); };
        return f(from + q, read_here, row.values, col);
      };
    };
    const int64_t some = c + width < cols ? width : cols - c;
    map_rows(out + done * cols + c, cols, rows - done, some, stores, how, of_row);
  }
}

template <class T, class A = accumulate_t<T>>
void scale(const T* x, const T* ahead, T* y, int64_t rows, int64_t cols, const A* row_scale,
           const A* col_scale, Stores stores) {
  map_matrix<T, 1, 1>(y, rows, cols, stores, Rows::singly, {row_scale}, {col_scale}, cols,
                      [=](int64_t i, auto read, const auto& row, const auto& col) DA_LAMBDA_INLINE {
                        if (ahead) fetch(ahead + i);
                        return read(x) * col[0] * row[0];
                      });
}

template <Outer kOuter, class T, class A = accumulate_t<T>>
void combine_terms(const T* dy, const T* ahead, T* dx, int64_t rows, int64_t cols,
                   const A* row_scale, const A* col_scale, const Terms<A>& terms, Stores stores,
                   Rows how) {
  map_matrix<T, 2, 2>(dx, rows, cols, stores, how, {row_scale, terms.row_bias},
                      {col_scale, terms.col_bias}, cols,
                      [=](int64_t i, auto read, const auto& row, const auto& col) DA_LAMBDA_INLINE {
                        if (ahead) fetch(ahead + i);
                        if constexpr (kOuter == Outer::none)
                          return read(dy) * (row[0] * col[0]) + (row[1] + col[1]);
                        else if constexpr (kOuter == Outer::rows)
                          return (read(dy) * col[0] + col[1]) * row[0] + row[1];
                        else
                          return (read(dy) * row[0] + row[1]) * col[0] + col[1];
                      });
}

template <class T, class A = accumulate_t<T>>
void combine(const T* dy, const T* ahead, T* dx, int64_t rows, int64_t cols, const A* row_scale,
             const A* col_scale, const Terms<A>& terms, Stores stores, Rows how) {
  const auto of = terms.outer == Outer::none   ? combine_terms<Outer::none, T>
                  : terms.outer == Outer::rows ? combine_terms<Outer::rows, T>
                                               : combine_terms<Outer::cols, T>;
  const Rows as = cols <= kTiny ? Rows::together : how;
  of(dy, ahead, dx, rows, cols, row_scale, col_scale, terms, stores, as);
}
