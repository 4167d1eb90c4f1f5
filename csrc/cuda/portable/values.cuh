// The values that small maps are made of, by pixel or by channel of an image: at hand, or added up
// from the tiles' sums where they are read.
#pragma once

#include "cuda/common/masks.cuh"

namespace da::cuda {

// An image's sums, added up where they are read, in the tiles' order.
template <class A>
struct Folded {
  const A* data;
  int64_t entries;
  int tiles;
  A scale;

  SIMT_FN Folded(const Partial<A>& sums, int64_t image, A scale)
      : data(sums.data + image * sums.tiles * sums.entries),
        entries(sums.entries),
        tiles(sums.data ? static_cast<int>(sums.tiles) : 0),
        scale(scale) {}

  SIMT_FN A operator[](int64_t entry) const { return part(entry, 0, 1); }

  // The part of an entry's value that every step-th tile from `first` on makes up. Four sums are on
  // their way at once; a loop that nvcc unrolls comes with another, which waits for each of its
  // sums.
  SIMT_FN A part(int64_t entry, int first, int step) const {
    constexpr int kInFlight = 4;
    A sum = 0;
    const A* from = data + first * entries + entry;
    SIMT_ROLLED
    for (int t = first; t < tiles; t += kInFlight * step) {
      A some[kInFlight];
      SIMT_UNROLL
      for (int u = 0; u < kInFlight; u++, from += step * entries)
        some[u] = t + u * step < tiles ? *from : A(0);
      SIMT_UNROLL
      for (int u = 0; u < kInFlight; u++) sum += some[u];
    }
    return sum * scale;
  }

  // The same in nvcc's loop, which takes fewer registers.
  SIMT_FN A lean_part(int64_t entry, int first, int step) const {
    A sum = 0;
    const A* from = data + first * entries + entry;
    for (int t = first; t < tiles; t += step, from += step * entries) sum += *from;
    return sum * scale;
  }

  // Values of N entries, the i-th from `base` on, of which so many sums are on their way at once.
  template <int kInFlight, int N>
  SIMT_FN void some(int64_t base, const int (&i)[N], A (&values)[N]) const {
    constexpr int kTiles = kInFlight / N;
    const A* from = data + base;
    SIMT_UNROLL
    for (A& value : values) value = 0;
    SIMT_ROLLED
    for (int t = 0; t < tiles; t += kTiles) {
      A sum[kTiles][N];
      SIMT_UNROLL
      for (int u = 0; u < kTiles; u++, from += entries) {
        const bool there = t + u < tiles;
        SIMT_UNROLL
        for (int n = 0; n < N; n++) sum[u][n] = there ? from[i[n]] : A(0);
      }
      SIMT_UNROLL
      for (int u = 0; u < kTiles; u++) {
        SIMT_UNROLL
        for (int n = 0; n < N; n++) values[n] += sum[u][n];
      }
    }
    SIMT_UNROLL
    for (A& value : values) value *= scale;
  }
};

// The gradients at a mask's logits, from the sums over dy x and, with More, from those over x that
// came through the other mask.
template <class A, bool More>
struct LogitGradient {
  Folded<A> sums, more;
  const A* mask;

  SIMT_FN LogitGradient(const Partial<A>& sums, const Partial<A>& more, int64_t image,
                        const A* masks)
      : sums(sums, image, 1), more(more, image, 1), mask(masks + image * sums.entries) {}

  SIMT_FN A operator[](int64_t i) const { return part(i, 0, 1); }
  SIMT_FN A part(int64_t i, int first, int step) const {
    const A own = mask[i];
    A sum = sums.lean_part(i, first, step);
    if (More) sum += more.lean_part(i, first, step);
    return sum * sigmoid_slope(own);
  }
  template <int kInFlight, int N>
  SIMT_FN void some(int64_t base, const int (&i)[N], A (&values)[N]) const {
    constexpr int kOfEach = kInFlight / 2;  // registers are few where these are read
    A masks[N], others[N];
    SIMT_UNROLL
    for (int n = 0; n < N; n++) masks[n] = mask[base + i[n]];
    sums.template some<kOfEach>(base, i, values);
    if (More) more.template some<kOfEach>(base, i, others);
    SIMT_UNROLL
    for (int n = 0; n < N; n++)
      values[n] = (More ? values[n] + others[n] : values[n]) * sigmoid_slope(masks[n]);
  }
};

// Whether a map's values are added up where they are read, in parts if need be.
template <class Map>
constexpr bool kIsFolded = false;
template <class A>
constexpr bool kIsFolded<Folded<A>> = true;
template <class A, bool More>
constexpr bool kIsFolded<LogitGradient<A, More>> = true;

// N values of any map, the i-th from `base` on.
template <class A, class Map, int N>
SIMT_FN void some_of(const Map& map, int64_t base, const int (&i)[N], A (&values)[N]) {
  if constexpr (kIsFolded<Map>) {
    map.template some<8>(base, i, values);
  } else {
    SIMT_UNROLL
    for (int n = 0; n < N; n++) values[n] = map[base + i[n]];
  }
}

}  // namespace da::cuda
