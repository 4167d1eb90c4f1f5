// The residual tail's primitives, of kernels.h: u is centred where it is read, so that no sum of it
// loses what a large mean would drown. Included once per instruction set, by kernels.inl.

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
  constexpr int kParts = kBlock > 1 ? 1 : 2;  // of a row's sum: several are added at a time
  LaneSums<kBlock, A> total, square_total;
  const auto add = [&](vec<A> v, vec<A>& sum, vec<A>& square) DA_LAMBDA_INLINE {
    sum += v;
    if constexpr (kSquares) square += v * v;
  };
  for (int64_t q = 0; q < tail.full;) {
    const int64_t end = q + kChunk * lanes < tail.full ? q + kChunk * lanes : tail.full;
    vec<A> sum[kBlock][kParts] = {}, square[kBlock][kParts] = {};
    const auto part = [&](int i) DA_LAMBDA_INLINE {
      for (int b = 0; b < kBlock; b++)
        add(load(row + b * cols + q + i * lanes) - centre[b], sum[b][i], square[b][i]);
    };
    for (; q + (kParts - 1) * lanes < end; q += kParts * lanes)
      for (int i = 0; i < kParts; i++) part(i);
    if (q < end) part(0), q += lanes;
    for (int b = 0; b < kBlock; b++) {
      for (int i = 1; i < kParts; i++) sum[b][0] += sum[b][i], square[b][0] += square[b][i];
      total.add(b, sum[b][0], q), square_total.add(b, square[b][0], q);
    }
  }
  for (int b = 0; tail.n && b < kBlock; b++)
    add(tail.keep_fresh(tail.read(row + b * cols) - centre[b]), total.lanes[b],
        square_total.lanes[b]);
  total.write(tail.full, sums);
  if constexpr (kSquares) square_total.write(tail.full, squares);
}

// Each row is read once for a centre near its mean, and from cache again for the deviations from
// it.
template <class T, class A = accumulate_t<T>>
void row_moments(const T* u, int64_t rows, int64_t cols, double* mean, double* squares) {
  const Tail<T> tail(cols);
  const double share = 1. / cols;
  int64_t r = 0;
  const auto block = [&](auto size) DA_LAMBDA_INLINE {
    constexpr int kSize = decltype(size)::value;
    for (; r + kSize <= rows; r += kSize) {
      const T* row = u + r * cols;
      A centre[kSize], sums[kSize] = {}, square_sums[kSize];
      deviations<false, kSize>(row, cols, tail, sums, centre, square_sums);
      for (int b = 0; b < kSize; b++) centre[b] *= A(share);
      deviations<true, kSize>(row, cols, tail, centre, sums, square_sums);
      for (int b = 0; b < kSize; b++) {
        const double off = sums[b] * share;
        mean[r + b] = centre[b] + off;
        squares[r + b] = square_sums[b] - off * sums[b];
      }
    }
  };
  if (cols <= kTiny) block(std::integral_constant<int, 4>());
  block(std::integral_constant<int, 1>());
}

template <class T>
void moments(const T* u, int64_t rows, int64_t cols, bool channels_last, double* mean,
             double* squares) {
  const auto of = channels_last ? column_moments<T> : row_moments<T>;
  of(u, rows, cols, mean, squares);
}

template <class T, class A = accumulate_t<T>>
void reduce_deviations(const T* u, const T* ahead, const A* centre, int64_t rows, int64_t cols,
                       bool channels_last, const A* row_weight, const A* col_weight, A* row_sums,
                       A* col_sums, Rows how) {
  if (channels_last)
    reduce_of<T>(Deviations<false, T>{u, {ahead}, centre, cols}, rows, cols, row_weight, col_weight,
                 row_sums, col_sums, how);
  else
    reduce_of<T>(Deviations<true, T>{u, {ahead}, centre, cols}, rows, cols, row_weight, col_weight,
                 row_sums, col_sums, how);
}

// An array by channel and one by pixel, at row r: along the rows, or the columns.
template <bool kChannelsLast, class A>
DA_INLINE auto by_channel(const A* values, int64_t r) {
  return Along<!kChannelsLast, A>(values, r);
}
template <bool kChannelsLast, class A>
DA_INLINE auto by_pixel(const A* values, int64_t r) {
  return Along<kChannelsLast, A>(values, r);
}

// map_matrix over arrays by channel and by pixel.
template <bool kChannelsLast, class T, size_t kByChannel, size_t kByPixel, class F,
          class A = accumulate_t<T>>
DA_INLINE void map_by(T* out, int64_t rows, int64_t cols, Stores stores,
                      const A* const (&by_channel)[kByChannel],
                      const A* const (&by_pixel)[kByPixel], F f) {
  if constexpr (kChannelsLast)
    map_matrix<T>(out, rows, cols, stores, Rows::singly, by_pixel, by_channel,
                  channels_at_once<A>(cols, kByChannel),
                  [=](int64_t i, auto read, const auto& row, const auto& col)
                      DA_LAMBDA_INLINE { return f(i, read, col, row); });
  else
    map_matrix<T>(out, rows, cols, stores, Rows::singly, by_channel, by_pixel, cols, f);
}

// A NaN stays one.
template <class A>
DA_INLINE vec<A> relu(vec<A> v) {
  return v < 0 ? vec<A>{} : v;
}

template <bool kChannelsLast, bool kShortcut, class T, class A = accumulate_t<T>>
void rectify_rows(const T* u, const T* shortcut, const T* ahead, T* out, int64_t rows, int64_t cols,
                  const Affine<A>& x, const A* mask, Stores stores) {
  map_by<kChannelsLast, T, 3, 1>(
      out, rows, cols, stores, {x.centre, x.scale, x.bias}, {mask},
      [=](int64_t i, auto read, const auto& channel, const auto& pixel) DA_LAMBDA_INLINE {
        fetch(ahead + i);
        const auto& [centre, scale, bias] = channel;
        const vec<A> value = ((read(u) - centre) * scale + bias) * pixel[0];
        if constexpr (kShortcut) return relu<A>(value + read(shortcut));
        return relu<A>(value);
      });
}

// The same with a shortcut that goes through a norm, r.
template <bool kChannelsLast, class T, class A = accumulate_t<T>>
void rectify_both(const T* u, const T* shortcut, const T* ahead, T* out, int64_t rows, int64_t cols,
                  const Affine<A>& x, const A* mask, const Affine<A>& r, Stores stores) {
  map_by<kChannelsLast, T, 6, 1>(
      out, rows, cols, stores, {x.centre, x.scale, x.bias, r.centre, r.scale, r.bias}, {mask},
      [=](int64_t i, auto read, const auto& channel, const auto& pixel) DA_LAMBDA_INLINE {
        fetch(ahead + i);
        const auto& [centre, scale, bias, r_centre, r_scale, r_bias] = channel;
        return relu<A>(((read(u) - centre) * scale + bias) * pixel[0] +
                       ((read(shortcut) - r_centre) * r_scale + r_bias));
      });
}

template <class T, class A = accumulate_t<T>>
void rectify(const T* u, const T* shortcut, const T* ahead, T* out, int64_t rows, int64_t cols,
             bool channels_last, const Affine<A>& x, const A* mask, const Affine<A>* of_shortcut,
             Stores stores) {
  with_constants(
      [&](auto last, auto with_shortcut, auto with_norm) {
        constexpr bool kLast = decltype(last)::value, kShortcut = decltype(with_shortcut)::value;
        if constexpr (decltype(with_norm)::value)
          rectify_both<kLast, T>(u, shortcut, ahead, out, rows, cols, x, mask, *of_shortcut,
                                 stores);
        else
          rectify_rows<kLast, kShortcut, T>(u, shortcut, ahead, out, rows, cols, x, mask, stores);
      },
      channels_last, shortcut != nullptr, of_shortcut != nullptr);
}

// The part of dout that a ReLU lets pass, which gave `out` or was given that. A NaN lets it pass.
template <class A>
DA_INLINE vec<A> passed(vec<A> dout, vec<A> out) {
  return out <= 0 ? vec<A>{} : dout;
}

// The first read of backward, of row r. It adds up the row, and adds the row to sums by column. Of
// channels the sums are those of d and of d (u - centre), weighted; of pixels that of d x. Four
// tensors side by side are streams enough: rows are taken one by one. The `row_sums` of the columns
// before, which only channels have, are added to.
template <bool kChannelsLast, bool kPixelSums, bool kShortcut, bool kStream, class T,
          class A = accumulate_t<T>>
DA_INLINE void gradients_row(const Gradients<T>& g, int64_t r, const Tail<T>& tail, bool first,
                             vec<A> (&tail_sums)[2]) {
  constexpr int64_t lanes = Vector<A>::lanes;
  constexpr bool kCols = kChannelsLast || kPixelSums, kRows = !kChannelsLast || kPixelSums;
  constexpr int kRowSums = kChannelsLast ? 1 : 2, kColSums = 3 - kRowSums;
  const T *dout = g.dout + r * g.cols, *u = g.u + r * g.cols;
  const T* const out = kShortcut ? g.out + r * g.cols : nullptr;
  T* const to = kShortcut ? g.d + r * g.cols : nullptr;
  const auto centre = by_channel<kChannelsLast>(g.x.centre, r);
  const auto scale = by_channel<kChannelsLast>(g.x.scale, r);
  const auto bias = by_channel<kChannelsLast>(g.x.bias, r);
  const auto mask = by_pixel<kChannelsLast>(g.mask, r);
  // Adds one vector to the row's sums and to the columns'.
  const auto columns = [&](int64_t q, auto read, auto write, auto keep, vec<A>(&row)[2],
                           vec<A>(&col)[2]) DA_LAMBDA_INLINE {
    const vec<A> v = read(u) - centre(q);
    vec<A> x;
    if constexpr (kPixelSums || !kShortcut) x = v * scale(q) + bias(q);
    vec<A> d;
    if constexpr (kShortcut) {
      d = passed<A>(read(dout), read(out));
      write(to, d);
    } else {
      d = passed<A>(read(dout), x);
    }
    const vec<A> weighted = keep(d * mask(q));
    auto& of_channel = kChannelsLast ? col : row;
    of_channel[0] += weighted, of_channel[1] += weighted * v;
    if constexpr (kPixelSums) (kChannelsLast ? row : col)[0] += keep(d * x);
  };
  A* const cols[2] = {kChannelsLast ? g.sums : g.pixel_sums, g.products};
  A* const rows[2] = {kChannelsLast ? g.pixel_sums : g.sums, g.products};
  LaneSums<1, A> total[2];
  for (int64_t q = 0; q < tail.full;) {
    const int64_t end = q + kChunk * lanes < tail.full ? q + kChunk * lanes : tail.full;
    vec<A> sum[2] = {};
    for (; q < end; q += lanes) {
      fetch(dout + kFar + q), fetch(u + kFar + q);
      if (kShortcut) fetch(out + kFar + q);
      vec<A> col[2] = {};
      for (int i = 0; kCols && i < kColSums; i++) col[i] = load(cols[i] + q);
      columns(
          q, [=](const T* in) DA_LAMBDA_INLINE { return load(in + q); },
          [=](T* p, vec<A> v) DA_LAMBDA_INLINE { kStream ? stream(p + q, v) : store(p + q, v); },
          [&](vec<A> v) DA_LAMBDA_INLINE { return v; }, sum, col);
      for (int i = 0; kCols && i < kColSums; i++) store(cols[i] + q, col[i]);
    }
    for (int i = 0; kRows && i < kRowSums; i++) total[i].add(0, sum[i], q);
  }
  vec<A> last[2] = {};
  if (tail.n)
    columns(
        tail.begin, [&](const T* in) DA_LAMBDA_INLINE { return tail.read(in); },
        [&](T* p, vec<A> v) DA_LAMBDA_INLINE { tail.write(p, v); },
        [&](vec<A> v) DA_LAMBDA_INLINE { return tail.keep_fresh(v); }, last, tail_sums);
  for (int i = 0; kRows && i < kRowSums; i++) {
    const A before = kChannelsLast && !first ? rows[i][r] : A(0);
    total[i].lanes[0] += last[i];
    total[i].write(tail.full, rows[i] + r);
    if constexpr (kChannelsLast) rows[i][r] += before;
  }
}

// The call from column c on.
template <bool kChannelsLast, class T>
DA_INLINE Gradients<T> from_column(Gradients<T> g, int64_t c) {
  g.dout += c, g.u += c;
  if (g.d) g.out += c, g.d += c;
  if (kChannelsLast)
    g.x.centre += c, g.x.scale += c, g.x.bias += c, g.sums += c, g.products += c;
  else
    g.mask += c, g.pixel_sums += g.pixel_sums ? c : 0;
  return g;
}

template <bool kChannelsLast, bool kPixelSums, bool kShortcut, bool kStream, class T,
          class A = accumulate_t<T>>
void gradients_slab(const Gradients<T>& all) {
  constexpr int kColSums = !kChannelsLast && !kPixelSums ? 0 : kChannelsLast ? 2 : 1;
  constexpr int kByChannel = 5;  // centre, scale, bias and two sums
  const int64_t width = kChannelsLast ? channels_at_once<A>(all.cols, kByChannel) : all.cols;
  for (int64_t c = 0; c < all.cols; c += width) {
    const int64_t cols = c + width < all.cols ? width : all.cols - c;
    const Gradients<T> g = from_column<kChannelsLast>(all, c);
    A* const sums[2] = {kChannelsLast ? g.sums : g.pixel_sums, g.products};
    const Tail<T> tail(cols);
    vec<A> tail_sums[2] = {};
    for (int i = 0; i < kColSums; i++) clear(sums[i], cols);
    for (int64_t r = 0; r < g.rows; r++)
      gradients_row<kChannelsLast, kPixelSums, kShortcut, kStream>(g, r, tail, c == 0, tail_sums);
    for (int i = 0; tail.n && i < kColSums; i++)
      store(sums[i] + tail.begin, load(sums[i] + tail.begin) + tail_sums[i]);
  }
  if (kStream) finish_streams();
}

template <class T>
void gradients(const Gradients<T>& g) {
  const bool streamed = g.d && streams(g.d, g.cols, g.stores);
  with_constants(
      [&](auto last, auto pixel_sums, auto shortcut, auto stream) {
        constexpr bool kShortcut = decltype(shortcut)::value, kStream = decltype(stream)::value;
        if constexpr (kShortcut || !kStream)
          gradients_slab<decltype(last)::value, decltype(pixel_sums)::value, kShortcut, kStream>(g);
      },
      g.channels_last, g.pixel_sums != nullptr, g.d != nullptr, streamed);
}

template <bool kChannelsLast, bool kRectify, bool kMasked, bool kBatch, class T,
          class A = accumulate_t<T>>
void combine_residual_rows(const T* d, const T* u, T* du, int64_t rows, int64_t cols,
                           const ResidualTerms<A>& t, Stores stores) {
  map_by<kChannelsLast, T, 8, 3>(
      du, rows, cols, stores,
      {t.scale, t.bias, t.outer, t.slope, t.offset, t.x.centre, t.x.scale, t.x.bias},
      {t.mask, t.pixel_bias, t.pixel_outer},
      [=](int64_t i, auto read, const auto& channel, const auto& pixel) DA_LAMBDA_INLINE {
        fetch(d + kFar + i);
        if (kBatch || kRectify) fetch(u + kFar + i);
        const auto& [scale, bias, outer, slope, offset, centre, x_scale, x_bias] = channel;
        const auto& [mask, pixel_bias, pixel_outer] = pixel;
        vec<A> v, at_d = read(d);
        if constexpr (kBatch || kRectify) v = read(u) - centre;
        if constexpr (kRectify) at_d = passed<A>(at_d, v * x_scale + x_bias);
        vec<A> du = at_d * (kMasked ? scale * mask : scale);
        if constexpr (kMasked) du += bias * pixel_outer + outer * pixel_bias;
        if constexpr (kBatch) du += v * slope + offset;
        return du;
      });
}

template <class T, class A = accumulate_t<T>>
void combine_residual(const T* d, const T* u, T* du, int64_t rows, int64_t cols, bool channels_last,
                      const ResidualTerms<A>& terms, Stores stores) {
  const auto of = [&](auto last, auto rectify, auto masked, auto batch) {
    combine_residual_rows<decltype(last)::value, decltype(rectify)::value, decltype(masked)::value,
                          decltype(batch)::value, T>(d, u, du, rows, cols, terms, stores);
  };
  with_constants(of, channels_last, terms.rectify, terms.masked, terms.batch);
}
