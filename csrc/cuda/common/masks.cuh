// Parts of the masks and of their gradients, for kernels of either kind.
#pragma once

#include "cuda/common/args.h"
#include "cuda/common/tile.cuh"

namespace da::cuda {

// A parameter's values, in x's type T or (`wide`) in float32.
template <class T>
struct Parameter {
  using A = accumulate_t<T>;
  const void* data;
  bool wide;

  SIMT_FN A operator[](int64_t i) const {
    return wide ? A(static_cast<const float*>(data)[i])
                : simt::to<A>(static_cast<const T*>(data)[i]);
  }
};

// Values of an image's channels that are at hand from channel `first` on.
template <class A>
struct FromChannel {
  const A* values;
  int64_t first;
  SIMT_FN A operator[](int64_t c) const { return values[c - first]; }
};

template <class A>
SIMT_FN A sigmoid(A z) {
  return A(1) / (A(1) + simt::exp(-z));
}

// The sum over a warp, in every lane.
template <class A>
SIMT_FN A warp_sum(A value) {
  SIMT_UNROLL
  for (int step = simt::kWarp / 2; step > 0; step /= 2) value += simt::shuffle_xor(value, step);
  return value;
}

enum class Taps { as_given, turned };  // turned by 180 degrees they are the adjoint's

// A thread's coefficient of the stencil, or its bias, on its way to shared memory: it is asked for
// before other things, and put there after them. Of the adjoint, the bias is 0.
template <class T>
struct Coefficient {
  using A = accumulate_t<T>;
  A merge, tap;

  SIMT_FN Coefficient(const Args<A>& args, Taps taps) : merge(1), tap(0) {
    const Parameters<const void*>& p = args.parameters;
    const bool turned = taps == Taps::turned;
    const int t = simt::thread();
    if (t < 2 * kTaps) {
      const int i = t < kTaps ? t : t - kTaps;
      merge = Parameter<T>{p.merge, args.wide}[t < kTaps ? 0 : 1];
      tap = Parameter<T>{t < kTaps ? p.conv : p.dilated, args.wide}[turned ? kTaps - 1 - i : i];
    } else if (t == 2 * kTaps && p.spatial_bias && !turned) {
      tap = Parameter<T>{p.spatial_bias, args.wide}[0];
    }
  }

  // The caller syncs.
  SIMT_FN void put(A* stencil) const {
    if (simt::thread() <= 2 * kTaps) stencil[simt::thread()] = merge * tap;
  }
};

// Where a window on a padded map has its pixels, from one pixel of the image on.
struct Places {
  Padded padded;
  uint32_t height;  // of the image
  int row0, col0;   // of the pixel

  template <class A>
  SIMT_FN Places(const Args<A>& args, int64_t pixel) : padded(args.padded), height(args.height) {
    row0 = static_cast<int>(quotient(pixel, padded.width));
    col0 = static_cast<int>(static_cast<uint32_t>(pixel) - row0 * padded.width.by);
  }

  // The place of the i-th pixel, from that of the pixel itself.
  SIMT_FN int of(int i) const {
    return i + kReach * static_cast<int>(padded.width.quotient(col0 + i));
  }

  // Sets i to the pixel at a place, counted from -kReach on, of the row so many below the pixel's;
  // false where there is none, for the place is a margin's.
  SIMT_FN bool pixel(int place, int down, int& i) const {
    const uint32_t pitch = padded.pitch.by, width = padded.width.by;
    const uint32_t from_row_before = place + col0 + pitch;
    const uint32_t rows = padded.pitch.quotient(from_row_before);
    const uint32_t col = from_row_before - rows * pitch;
    const int row = down - 1 + static_cast<int>(rows);
    i = row * static_cast<int>(width) + static_cast<int>(col) - col0;
    return col < width && static_cast<uint32_t>(row0 + row) < height;
  }
};

// Places of a piece of a window on `count` pixels.
SIMT_FN int wanted_places(const Halo& halo, const Places& places, int count) {
  return places.of(count - 1) + 1 + 2 * kReach + (halo.pieces == 1 ? 2 * halo.far : 0);
}

// Puts a map's values, or zeros, into a window on `count` pixels: map(i, there, values) sets N at
// once, so that what it reads for them is on its way together. Pixels i are counted from the first
// one, which stands for those that are not there. `threads` threads do so; the caller syncs.
template <int N, class A, class Map>
SIMT_FN void load_window(const Halo& halo, const Places& places, int count, int threads, A* window,
                         Map map) {
  const int wanted = wanted_places(halo, places, count);
  SIMT_ROLLED
  for (int piece = 0; piece < halo.pieces; piece++, window += halo.length) {
    const int down = halo.row_of(piece);
    SIMT_ROLLED
    for (int first = simt::thread(); first < wanted; first += N * threads) {
      int i[N];
      bool there[N];
      A values[N];
      SIMT_UNROLL
      for (int n = 0; n < N; n++) {
        there[n] = places.pixel(first + n * threads - kReach, down, i[n]);
        if (!there[n]) i[n] = 0;
      }
      map(i, there, values);
      SIMT_UNROLL
      for (int n = 0; n < N; n++)
        if (first + n * threads < wanted) window[first + n * threads] = there[n] ? values[n] : A(0);
    }
  }
}

// Visits a pixel's neighbours at the taps of both kernels, the near one first: visit(tap, value).
// `here` is its place in a window.
template <class A, class Visit>
SIMT_FN void neighbours(const A* here, const Halo& halo, Visit visit) {
  SIMT_UNROLL
  for (int kernel = 0; kernel < 2; kernel++) {
    SIMT_UNROLL
    for (int tap = 0; tap < kTaps; tap++) {
      const int down = tap / 3 - 1, right = tap % 3 - 1;
      visit(kernel * kTaps + tap,
            here[down * (kernel == 0 ? halo.near : halo.far) + right * (kernel == 0 ? 1 : kReach)]);
    }
  }
}

// The stencil's coefficients, read 16 bytes at a time.
template <class A>
struct Coefficients {
  A tap[kStencil];  // 18 taps and the bias

  SIMT_FN explicit Coefficients(const A* stencil) {
    SIMT_UNROLL
    for (int t = 0; t < kStencil; t += simt::kPerVector<A>)
      simt::unpack<A>(simt::load16(stencil + t), tap + t);
  }
};

// z, without the sigmoid.
template <class A>
SIMT_FN A stencil(const A* here, const Halo& halo, const A* coefficients) {
  const Coefficients<A> of(coefficients);
  A sum = of.tap[2 * kTaps];
  neighbours(here, halo, [&](int tap, A value) { sum += of.tap[tap] * value; });
  return sum;
}

// Values of all lanes, added up: lane t gets the sum of their values[t].
template <int N, class A>
SIMT_FN A sums_by_lane(const A (&values)[N]) {
  if constexpr (N == 1) {
    return values[0];
  } else {
    const bool upper = simt::thread() & (N / 2);
    A half[N / 2];
    SIMT_UNROLL
    for (int i = 0; i < N / 2; i++) {
      const A mine = upper ? values[N / 2 + i] : values[i];
      const A others = upper ? values[i] : values[N / 2 + i];
      half[i] = mine + simt::shuffle_xor(others, N / 2);
    }
    return sums_by_lane(half);
  }
}

// The 19 sums behind the spatial parameters' gradients, over a thread's pixels: those of near and
// far taps, and of dz. sum_p dz[p] m[p + t] is sum_q m[q] dz[q - t], whose dz the adjoint's stencil
// reads as well.
template <class A>
struct SpatialSums {
  A sums[simt::kWarp];

  SIMT_FN SpatialSums() {
    SIMT_UNROLL
    for (A& sum : sums) sum = 0;
  }

  // The adjoint's stencil at a pixel. Adds the pixel's share of the sums, where its mean is `mean`
  // and `here` counts once (1) or not at all (0).
  SIMT_FN A stencil(const A* here, const Halo& halo, const A* coefficients, A mean, A counts) {
    const Coefficients<A> of(coefficients);
    A sum = 0;
    neighbours(here, halo, [&](int tap, A value) {
      const int kernel = tap / kTaps;
      sum += of.tap[tap] * value;
      sums[kernel * kTaps + kTaps - 1 - tap % kTaps] += mean * value;
    });
    sums[2 * kTaps] += counts * *here;
    return sum;
  }

  // The warp's sums, lane t's the t-th; all lanes call it.
  SIMT_FN A by_lane() const { return sums_by_lane(sums); }
};

// keep(t, sum) for each of the 19 sums over `count` warps, which put theirs into warps[thread].
template <class A, class Keep>
SIMT_FN void add_spatial_sums(const A* warps, int count, Keep keep) {
  const int t = simt::thread();
  if (t >= kSpatialSums) return;
  A sum = 0;
  for (int warp = 0; warp < count; warp++) sum += warps[warp * simt::kWarp + t];
  keep(t, sum);
}

}  // namespace da::cuda
