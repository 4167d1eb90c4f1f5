// Row sums and column sums of a slab, in one read of it: the `reduce` of kernels.h. Included by
// kernels.inl.

// Elements to fetch before they are read, or none.
template <class T>
struct Ahead {
  const T* p;  // or null
  DA_INLINE Ahead operator+(int64_t n) const { return {p ? p + n : nullptr}; }
  DA_INLINE void fetch_at(int64_t i) const {
    if (p) fetch(p + i);
  }
};

// The pointer, which stays in a register: from it the compiler does not make one for each of the
// places at fixed distances that are read, more than there are registers.
template <class T>
DA_INLINE const T* hold(const T* p) {
  __asm__("" : "+r"(p));
  return p;
}

// The terms of a row r's sums: read(row) loads the elements at column q, and keep(v) makes zeros of
// lanes that are none of them. from(r) begins at row r. fetch_ahead(i) fetches the i-th element
// from `ahead` on.
template <class T>
struct Elements {
  const T* x;
  Ahead<T> ahead;
  int64_t cols;
  DA_INLINE Elements from(int64_t r) const { return {hold(x + r * cols), ahead + r * cols, cols}; }
  template <class Read, class Keep>
  DA_INLINE auto at(int64_t r, int64_t, Read read, Keep) const {
    return read(x + r * cols);
  }
  DA_INLINE void fetch_ahead(int64_t i) const { ahead.fetch_at(i); }
};
template <class T>
struct Products {
  const T *x, *dy;
  Ahead<T> ahead, dy_ahead;
  int64_t cols;
  DA_INLINE Products from(int64_t r) const {
    const int64_t at = r * cols;
    return {hold(x + at), hold(dy + at), ahead + at, dy_ahead + at, cols};
  }
  template <class Read, class Keep>
  DA_INLINE auto at(int64_t r, int64_t, Read read, Keep) const {
    return read(x + r * cols) * read(dy + r * cols);
  }
  DA_INLINE void fetch_ahead(int64_t i) const {
    ahead.fetch_at(i);
    dy_ahead.fetch_at(i);
  }
};
template <bool kByRow, class T>
struct Deviations {
  const T* x;
  Ahead<T> ahead;
  const accumulate_t<T>* centre;  // of rows, or of columns
  int64_t cols;
  DA_INLINE Deviations from(int64_t r) const {
    return {hold(x + r * cols), ahead + r * cols, kByRow ? centre + r : centre, cols};
  }
  template <class Read, class Keep>
  DA_INLINE auto at(int64_t r, int64_t q, Read read, Keep keep) const {
    return read(x + r * cols) - keep(Along<kByRow, accumulate_t<T>>(centre, r)(q));
  }
  DA_INLINE void fetch_ahead(int64_t i) const { ahead.fetch_at(i); }
};

// Rows from r on.
template <class Source, int... kRows>
DA_INLINE auto rows_from(const Source& source, int64_t r, std::integer_sequence<int, kRows...>) {
  struct {
    Source rows[sizeof...(kRows)];
  } some = {{source.from(r + kRows)...}};
  return some;
}

// Zeros for n sums, and for the rest of their last vector.
template <class A>
DA_INLINE void clear(A* sums, int64_t n) {
  for (int64_t i = 0; i < n; i += Vector<A>::lanes) store(sums + i, vec<A>{});
}

// Row sums alone of long rows: one after the other, so that memory is read in one stream.
template <int kBlock, class T, class Source, class A = accumulate_t<T>>
DA_INLINE void sum_rows(Source source, const Tail<T>& tail, const A* col_weight, A* row_sums) {
  constexpr int64_t lanes = Vector<A>::lanes;
  LaneSums<kBlock, A> total;
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
      total.add(b, even + odd, q);
    }
    if (tail.n) {
      const auto read = [&](const T* row) DA_LAMBDA_INLINE { return tail.read_fresh(row); };
      const auto keep = [&](vec<A> t) DA_LAMBDA_INLINE { return tail.keep_fresh(t); };
      total.lanes[b] += source.at(0, tail.begin, read, keep) * load(col_weight + tail.begin);
    }
  }
  total.write(tail.full, row_sums);
}

// Row sums, column sums or both of a few rows together. The last columns' sums go to `tail_sums`:
// in memory they would overlap sums that have just been stored, and wait for them.
template <bool kRows, bool kCols, int kBlock, class T, class Source, class A = accumulate_t<T>>
DA_INLINE void sum_block(Source source, int64_t cols, const Tail<T>& tail, const A* row_weight,
                         const A* col_weight, A* row_sums, A* col_sums, vec<A>& tail_sums) {
  constexpr int64_t lanes = Vector<A>::lanes;
  LaneSums<kBlock, A> total;
  vec<A> sum[kBlock] = {}, weight[kBlock];
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
    for (int b = 0; kRows && b < kBlock; b++) total.add(b, sum[b], q), sum[b] = vec<A>{};
  }
  if (tail.n)
    tail_sums += columns(
        tail.begin, [&](const T* row) DA_LAMBDA_INLINE { return tail.read_fresh(row); },
        [&](vec<A> t) DA_LAMBDA_INLINE { return tail.keep_fresh(t); });
  if constexpr (kRows) {
    for (int b = 0; b < kBlock; b++) total.lanes[b] += sum[b];
    total.write(tail.full, row_sums);
  }
}

// The same of all rows, each of kNarrow vectors, the last of which ends where the row ends: the
// columns' sums stay in registers.
template <bool kRows, bool kCols, class T, class Source, class A = accumulate_t<T>>
DA_INLINE void sum_narrow(const Source& source, int64_t rows, int64_t cols, const A* row_weight,
                          const A* col_weight, A* row_sums, A* col_sums) {
  constexpr int64_t lanes = Vector<A>::lanes;
  constexpr int kVectors = kNarrow<A>;
  const int64_t begin = cols - lanes;
  ivec<A> fresh{};  // all ones in the last vector's lanes that no other covers
  for (int64_t i = 0; i < lanes; i++) fresh[i] = begin + i < (kVectors - 1) * lanes ? 0 : -1;
  const auto keep_fresh = [&](vec<A> t)
                              DA_LAMBDA_INLINE { return bits<vec<A>>(bits<ivec<A>>(t) & fresh); };
  vec<A> sums[kVectors] = {};
  const auto block = [&](auto size, int64_t r) DA_LAMBDA_INLINE {
    constexpr int kSize = decltype(size)::value;
    const auto here = rows_from(source, r, std::make_integer_sequence<int, kSize>());
    vec<A> total[kSize] = {}, weight[kSize];
    for (int b = 0; kCols && b < kSize; b++) weight[b] = splat(row_weight[r + b]);
    const auto add = [&](int v, int64_t q, auto read, auto keep) DA_LAMBDA_INLINE {
      vec<A> parts[2] = {};
      for (int b = 0; b < kSize; b++) {
        here.rows[0].fetch_ahead(kSize * v * lanes + b * lanes);
        const vec<A> t = here.rows[b].at(0, q, read, keep);
        if constexpr (kRows) total[b] += t * load(col_weight + q);
        if constexpr (kCols) parts[b % 2] += t * weight[b];
      }
      if constexpr (kCols) sums[v] += parts[0] + parts[1];
    };
    for (int v = 0; v < kVectors - 1; v++)
      add(
          v, v * lanes, [=](const T* row) DA_LAMBDA_INLINE { return load(row + v * lanes); },
          [&](vec<A> t) DA_LAMBDA_INLINE { return t; });
    add(
        kVectors - 1, begin,
        [&](const T* row) DA_LAMBDA_INLINE { return keep_fresh(load(row + begin)); }, keep_fresh);
    if constexpr (kRows) sum_lanes<kSize, A>(total, row_sums + r);
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) block(std::integral_constant<int, 4>(), r);
  for (; r < rows; r++) block(std::integral_constant<int, 1>(), r);
  if constexpr (kCols) {
    clear(col_sums, cols);
    for (int v = 0; v < kVectors - 1; v++) store(col_sums + v * lanes, sums[v]);
    store(col_sums + begin, load(col_sums + begin) + sums[kVectors - 1]);
  }
}

template <bool kRows, bool kCols, class T, class Source, class A = accumulate_t<T>>
DA_INLINE void reduce_slab(const Source& source, int64_t rows, int64_t cols, const A* row_weight,
                           const A* col_weight, A* row_sums, A* col_sums, Rows how) {
  constexpr int64_t lanes = Vector<A>::lanes;
  if constexpr (kNarrow<A> <= kUnrolled)
    if ((kNarrow<A> - 1) * lanes < cols && cols <= kNarrow<A> * lanes)
      return sum_narrow<kRows, kCols, T>(source, rows, cols, row_weight, col_weight, row_sums,
                                         col_sums);
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
    reduce_of<T>(Products<T>{x, dy, {ahead}, {ahead ? dy + (ahead - x) : nullptr}, cols}, rows,
                 cols, row_weight, col_weight, row_sums, col_sums, how);
  else
    reduce_of<T>(Elements<T>{x, {ahead}, cols}, rows, cols, row_weight, col_weight, row_sums,
                 col_sums, how);
}

template <class A>
void add(A* sums, const A* more, int64_t n, bool first) {
  constexpr int64_t lanes = Vector<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    store(sums + i, first ? load(more + i) : load(sums + i) + load(more + i));
  for (; i < n; i++) sums[i] = first ? more[i] : sums[i] + more[i];
}
