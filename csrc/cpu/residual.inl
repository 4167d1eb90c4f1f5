// The residual tail's primitives, of kernels.h: u is centred where it is read, so that no sum of it
// loses what a large mean would drown. Included once per instruction set, by kernels.inl.

constexpr int64_t kShort = 512;  // elements up to which the next few rows are fetched ahead

// Each column's mean and sum of squared deviations. The squares are first taken about the mean of
// eight rows: these are at most 1 + rows / 8 times those about the mean, however large it is.
template <class T, class A = accumulate_t<T>>
void column_moments(const T* u, int64_t rows, int64_t cols, double* mean, double* squares) {
  constexpr int64_t lanes = Vector<A>::lanes, kTile = 2048, kFirst = 8;
  alignas(kAlignment) A centre[kTile], sums[kTile], square_sums[kTile];
  for (int64_t begin = 0; begin < cols; begin += kTile, u += kTile) {
    const int64_t n = begin + kTile < cols ? kTile : cols - begin, full = n / lanes * lanes;
    // f(q, value) for all the tile's vectors, with value[b] that of the b-th row from `row` on.
    const auto columns = [&](const T* row, auto size, auto f) DA_LAMBDA_INLINE {
      constexpr int kSize = decltype(size)::value;
      vec<A> value[kSize];
      for (int64_t q = 0; q < full; q += lanes) {
        for (int b = 0; b < kSize; b++) {
          if (kSize > 1) __builtin_prefetch(row + (2 * cols + q) * kSize + b * lanes);
          value[b] = load(row + b * cols + q);
        }
        f(q, value);
      }
      if (full == n) return;
      for (int b = 0; b < kSize; b++) value[b] = load_part(row + b * cols + full, n - full);
      f(full, value);
    };
    for (A* array : {centre, sums, square_sums}) __builtin_memset(array, 0, padded(n) * sizeof(A));
    const int64_t first = rows < kFirst ? rows : kFirst;
    const A share = A(1) / first;
    for (int64_t r = 0; r < first; r++)
      columns(u + r * cols, std::integral_constant<int, 1>(),
              [&](int64_t q, const vec<A>* value)
                  DA_LAMBDA_INLINE { store(centre + q, load(centre + q) + value[0] * share); });
    int64_t r = 0;
    const auto block = [&](auto size) DA_LAMBDA_INLINE {
      constexpr int kSize = decltype(size)::value;
      for (; r + kSize <= rows; r += kSize)
        columns(u + r * cols, size, [&](int64_t q, const vec<A>* value) DA_LAMBDA_INLINE {
          vec<A> sum[2] = {}, square[2] = {};
          for (int b = 0; b < kSize; b++) {
            const vec<A> v = value[b] - load(centre + q);
            sum[b % 2] += v, square[b % 2] += v * v;
          }
          store(sums + q, load(sums + q) + (sum[0] + sum[1]));
          store(square_sums + q, load(square_sums + q) + (square[0] + square[1]));
        });
    };
    block(std::integral_constant<int, 4>());
    block(std::integral_constant<int, 1>());
    for (int64_t q = 0; q < n; q++) {
      const double off = double(sums[q]) / rows;
      mean[begin + q] = centre[q] + off;
      squares[begin + q] = square_sums[q] - off * sums[q];
    }
  }
}

// A few rows' sums of deviations from their centres, and of the deviations' squares if asked for.
template <bool kSquares, int kBlock, class T, class A = accumulate_t<T>>
DA_INLINE void deviations(const T* row, int64_t cols, const Tail<T>& tail, const A* centre, A* sums,
                          A* squares) {
  constexpr int64_t lanes = Vector<A>::lanes;
  vec<A> total[2][kBlock] = {};
  for (int b = 0; b < kBlock; b++, row += cols) {
    const auto add = [&](vec<A> v, vec<A>(&to)[2]) DA_LAMBDA_INLINE {
      to[0] += v;
      if constexpr (kSquares) to[1] += v * v;
    };
    const auto keep = [&](const vec<A>(&from)[2]) DA_LAMBDA_INLINE {
      total[0][b] += from[0];
      if constexpr (kSquares) total[1][b] += from[1];
    };
    for (int64_t q = 0; q < tail.full;) {
      const int64_t end = q + kChunk * lanes < tail.full ? q + kChunk * lanes : tail.full;
      vec<A> even[2] = {}, odd[2] = {};
      for (; q + lanes < end; q += 2 * lanes) {
        add(load(row + q) - centre[b], even);
        add(load(row + q + lanes) - centre[b], odd);
      }
      if (q < end) add(load(row + q) - centre[b], even), q += lanes;
      keep(even), keep(odd);
    }
    vec<A> last[2] = {};
    if (tail.n) add(tail.keep_fresh(tail.read(row) - centre[b]), last), keep(last);
  }
  sum_lanes<kBlock, A>(total[0], sums);
  if constexpr (kSquares) sum_lanes<kBlock, A>(total[1], squares);
}

// Of each row: once for a centre near its mean, and from cache again for the deviations from it.
template <class T, class A = accumulate_t<T>>
void row_moments(const T* u, int64_t rows, int64_t cols, double* mean, double* squares) {
  const Tail<T> tail(cols);
  int64_t r = 0;
  const auto block = [&](auto size) DA_LAMBDA_INLINE {
    constexpr int kSize = decltype(size)::value;
    for (; r + kSize <= rows; r += kSize) {
      const T* row = u + r * cols;
      A centre[kSize], sums[kSize] = {}, square_sums[kSize];
      deviations<false, kSize>(row, cols, tail, sums, centre, square_sums);
      for (int b = 0; b < kSize; b++) centre[b] /= cols;
      deviations<true, kSize>(row, cols, tail, centre, sums, square_sums);
      for (int b = 0; b < kSize; b++) {
        const double off = double(sums[b]) / cols;
        mean[r + b] = centre[b] + off;
        squares[r + b] = square_sums[b] - off * sums[b];
      }
    }
  };
  block(std::integral_constant<int, 4>());
  block(std::integral_constant<int, 1>());
}

template <class T>
void moments(const T* u, int64_t rows, int64_t cols, bool channels_last, double* mean,
             double* squares) {
  const auto of = channels_last ? column_moments<T> : row_moments<T>;
  of(u, rows, cols, mean, squares);
}

template <class T, class A = accumulate_t<T>>
void reduce_deviations(const T* u, const A* centre, int64_t rows, int64_t cols, bool channels_last,
                       const A* row_weight, const A* col_weight, A* row_sums, A* col_sums,
                       Rows how) {
  if (channels_last)
    reduce_of<T>(Deviations<false, T>{u, centre, cols}, rows, cols, row_weight, col_weight,
                 row_sums, col_sums, how);
  else
    reduce_of<T>(Deviations<true, T>{u, centre, cols}, rows, cols, row_weight, col_weight, row_sums,
                 col_sums, how);
}

// By channel and by pixel, at row r: along the rows, or the columns.
template <bool kChannelsLast, class A>
DA_INLINE auto by_channel(const A* values, int64_t r) {
  return Along<!kChannelsLast, A>(values, r);
}
template <bool kChannelsLast, class A>
DA_INLINE auto by_pixel(const A* values, int64_t r) {
  return Along<kChannelsLast, A>(values, r);
}

// A NaN stays one.
template <class A>
DA_INLINE vec<A> relu(vec<A> v) {
  return v < 0 ? vec<A>{} : v;
}

template <bool kChannelsLast, class T, class A = accumulate_t<T>>
void rectify_rows(const T* u, const T* shortcut, T* out, int64_t rows, int64_t cols,
                  const Affine<A>& x, const A* mask, Stores stores) {
  map_rows(out, rows, cols, stores, Rows::singly, [=](int64_t r) DA_LAMBDA_INLINE {
    return
        [=, u = u + r * cols, shortcut = shortcut + r * cols,
         centre = by_channel<kChannelsLast>(x.centre, r),
         scale = by_channel<kChannelsLast>(x.scale, r), bias = by_channel<kChannelsLast>(x.bias, r),
         mask = by_pixel<kChannelsLast>(mask, r)](int64_t q, auto read) DA_LAMBDA_INLINE {
          const auto value = (read(u) - centre(q)) * scale(q) + bias(q);
          return relu<A>(value * mask(q) + read(shortcut));
        };
  });
}

template <class T, class A = accumulate_t<T>>
void rectify(const T* u, const T* shortcut, T* out, int64_t rows, int64_t cols, bool channels_last,
             const Affine<A>& x, const A* mask, Stores stores) {
  const auto all = channels_last ? rectify_rows<true, T> : rectify_rows<false, T>;
  all(u, shortcut, out, rows, cols, x, mask, stores);
}

// The first read of backward. A row has sums of its own, and adds to those of the columns: of d and
// of d (u - centre), weighted, there, where the channels are; of d x where the pixels are.
template <bool kChannelsLast, bool kPixelSums, int kBlock, class T, class A = accumulate_t<T>>
DA_INLINE void gradients_block(const Gradients<T>& g, int64_t r, const Tail<T>& tail, bool streamed,
                               vec<A> (&tail_sums)[2]) {
  constexpr int64_t lanes = Vector<A>::lanes;
  constexpr int kRowSums = kChannelsLast ? 1 : 2, kColSums = 3 - kRowSums;
  vec<A> total[kRowSums][kBlock] = {}, sum[kRowSums][kBlock] = {};
  // One vector of each row; its shares of the columns' sums are added to `col`.
  const auto columns = [&](int64_t q, auto read, auto write, auto keep,
                           vec<A>(&col)[2]) DA_LAMBDA_INLINE {
    for (int b = 0; b < kBlock; b++) {
      const int64_t row = r + b, at = row * g.cols;
      if (kBlock > 1 && g.cols <= kShort) {
        const int64_t next = (r + kBlock) * g.cols + kBlock * q + b * lanes;
        __builtin_prefetch(g.dout + next);
        __builtin_prefetch(g.out + next);
        __builtin_prefetch(g.u + next);
        if (!streamed) __builtin_prefetch(g.d + next, 1);
      }
      const vec<A> dout = read(g.dout + at), out = read(g.out + at);
      const vec<A> d = out <= 0 ? vec<A>{} : dout;  // a NaN lets the gradient pass
      write(g.d + at, d);
      const vec<A> v = read(g.u + at) - by_channel<kChannelsLast>(g.x.centre, row)(q);
      const vec<A> weighted = keep(d * by_pixel<kChannelsLast>(g.mask, row)(q));
      const vec<A> of_channel[2] = {weighted, weighted * v};
      vec<A> of_pixel = {};
      if constexpr (kPixelSums)
        of_pixel = keep(d * (v * by_channel<kChannelsLast>(g.x.scale, row)(q) +
                             by_channel<kChannelsLast>(g.x.bias, row)(q)));
      if constexpr (kChannelsLast) {
        col[0] += of_channel[0], col[1] += of_channel[1];
        sum[0][b] += of_pixel;
      } else {
        sum[0][b] += of_channel[0], sum[1][b] += of_channel[1];
        col[0] += of_pixel;
      }
    }
  };
  A* const cols[2] = {kChannelsLast ? g.sums : g.pixel_sums, g.products};
  A* const rows[2] = {kChannelsLast ? g.pixel_sums : g.sums, g.products};
  constexpr bool kCols = kChannelsLast || kPixelSums, kRows = !kChannelsLast || kPixelSums;
  for (int64_t q = 0; q < tail.full;) {
    const int64_t end = q + kChunk * lanes < tail.full ? q + kChunk * lanes : tail.full;
    for (; q < end; q += lanes) {
      vec<A> col[2] = {};
      for (int i = 0; kCols && i < kColSums; i++) col[i] = load(cols[i] + q);
      columns(
          q, [=](const T* in) DA_LAMBDA_INLINE { return load(in + q); },
          [=](T* to, vec<A> v)
              DA_LAMBDA_INLINE { streamed ? stream(to + q, v) : store(to + q, v); },
          [&](vec<A> v) DA_LAMBDA_INLINE { return v; }, col);
      for (int i = 0; kCols && i < kColSums; i++) store(cols[i] + q, col[i]);
    }
    for (int i = 0; kRows && i < kRowSums; i++)
      for (int b = 0; b < kBlock; b++) total[i][b] += sum[i][b], sum[i][b] = vec<A>{};
  }
  if (tail.n)
    columns(
        tail.begin, [&](const T* in) DA_LAMBDA_INLINE { return tail.read(in); },
        [&](T* to, vec<A> v) DA_LAMBDA_INLINE { tail.write(to, v); },
        [&](vec<A> v) DA_LAMBDA_INLINE { return tail.keep_fresh(v); }, tail_sums);
  for (int i = 0; kRows && i < kRowSums; i++) {
    for (int b = 0; b < kBlock; b++) total[i][b] += sum[i][b];
    sum_lanes<kBlock, A>(total[i], rows[i] + r);
  }
}

template <bool kChannelsLast, bool kPixelSums, class T, class A = accumulate_t<T>>
void gradients_slab(const Gradients<T>& g) {
  constexpr int kColSums = kChannelsLast ? 2 : 1;
  constexpr bool kCols = kChannelsLast || kPixelSums;
  A* const cols[2] = {kChannelsLast ? g.sums : g.pixel_sums, g.products};
  const Tail<T> tail(g.cols);
  vec<A> tail_sums[2] = {};
  for (int i = 0; kCols && i < kColSums; i++)
    __builtin_memset(cols[i], 0, padded(g.cols) * sizeof(A));
  const bool streamed = streams(g.d, tail, g.stores);
  // Side by side rows are many streams: short ones are fetched ahead, long ones are few.
  const bool together = g.cols <= kShort || g.how == Rows::together;
  int64_t r = 0;
  for (; together && r + 4 <= g.rows; r += 4)
    gradients_block<kChannelsLast, kPixelSums, 4>(g, r, tail, streamed, tail_sums);
  for (; r < g.rows; r++)
    gradients_block<kChannelsLast, kPixelSums, 1>(g, r, tail, streamed, tail_sums);
  if (streamed) finish_streams();
  for (int i = 0; kCols && tail.n && i < kColSums; i++)
    store(cols[i] + tail.begin, load(cols[i] + tail.begin) + tail_sums[i]);
}

template <class T>
void gradients(const Gradients<T>& g) {
  if (g.channels_last)
    g.pixel_sums ? gradients_slab<true, true>(g) : gradients_slab<true, false>(g);
  else
    g.pixel_sums ? gradients_slab<false, true>(g) : gradients_slab<false, false>(g);
}

template <bool kChannelsLast, class T, class A = accumulate_t<T>>
void combine_residual_rows(const T* d, const T* u, T* du, int64_t rows, int64_t cols,
                           const ResidualTerms<A>& t, Stores stores) {
  map_rows(du, rows, cols, stores, Rows::singly, [=](int64_t r) DA_LAMBDA_INLINE {
    const auto channel = [=](const A* p)
                             DA_LAMBDA_INLINE { return by_channel<kChannelsLast>(p, r); };
    const auto pixel = [=](const A* p) DA_LAMBDA_INLINE { return by_pixel<kChannelsLast>(p, r); };
    return [d = d + r * cols, u = u + r * cols, scale = channel(t.scale), bias = channel(t.bias),
            outer = channel(t.outer), centre = channel(t.centre), slope = channel(t.slope),
            offset = channel(t.offset), mask = pixel(t.mask), pixel_bias = pixel(t.pixel_bias),
            pixel_outer = pixel(t.pixel_outer)](int64_t q, auto read) DA_LAMBDA_INLINE {
      return read(d) * (scale(q) * mask(q)) +
             (bias(q) * pixel_outer(q) + outer(q) * pixel_bias(q)) +
             ((read(u) - centre(q)) * slope(q) + offset(q));
    };
  });
}

template <class T, class A = accumulate_t<T>>
void combine_residual(const T* d, const T* u, T* du, int64_t rows, int64_t cols, bool channels_last,
                      const ResidualTerms<A>& terms, Stores stores) {
  const auto all = channels_last ? combine_residual_rows<true, T> : combine_residual_rows<false, T>;
  all(d, u, du, rows, cols, terms, stores);
}
