// The small maps: masks, and what flows back through them. A launch between passes makes them once
// (maps.cuh); or every block of a pass makes them for its tile, and the first tile of the other
// axis also keeps them in memory. Functions that make a map call then() once they have read what it
// is made of: a block's first vectors, asked for then, are on their way while the map is made, and
// nothing that it is made of has to wait behind them.
#pragma once

#include "cuda/plan/memory.h"
#include "cuda/portable/values.cuh"

namespace da::cuda {

// Pixels or channels for which a block makes a map. Blocks of `parts` tiles along the other axis
// make the same: one of them keeps it, and each adds up its part of the spatial sums.
struct Span {
  int64_t image, first;
  int count, part, parts;

  SIMT_FN bool keeps() const { return part == 0; }
};

SIMT_FN Span pixels_of(const Tile& tile) {
  const int tiles = static_cast<int>(tile.tiling.channel_tiles());
  return {tile.image, tile.pixel(), tile.pixels(), tile.channel_tile(), tiles};
}
SIMT_FN Span channels_of(const Tile& tile) {
  const int tiles = static_cast<int>(tile.tiling.pixel_tiles());
  return {tile.image, tile.channel(), tile.channels(), tile.pixel_tile(), tiles};
}

// Whether what a mask is made of, or a term of dx, is kept as well, for later launches.
enum class Keep { no, yes };

// A then() that does nothing.
struct Nothing {
  SIMT_FN void operator()() const {}
};

// A value as an array in which it is everywhere.
template <class A>
struct Everywhere {
  A value;
  SIMT_FN A operator[](int64_t) const { return value; }
};

// Makes a map by channel: make(i, own, weight, bias) of the i-th of the span's channels, its own
// value, and the gate's parameters for it where each channel has its own value only. Several
// threads add up the terms of a channel of a tile.
template <class T, class A, class Map, class Then, class Make>
SIMT_FN void each_channel(const Args<A>& args, const Span& span, const Map& map, Then then,
                          Make make) {
  const bool alone = args.gate == Gate::affine || args.gate == Gate::scalar;
  const int folding = kIsFolded<Map> ? args.tiling.folding : 0, at_once = kThreads >> folding;
  const int sharing = 1 << folding, share = simt::thread() & (sharing - 1);
  int i = simt::thread() >> folding;
  A own = 0, weight = 0, bias = 0;
  const auto read = [&] {
    if (i >= span.count) return;
    const int64_t c = span.first + i, parameter = args.gate == Gate::affine ? c : 0;
    if (alone) {
      weight = Parameter<T>{args.parameters.gate, args.wide}[parameter];
      bias = Parameter<T>{args.parameters.gate_bias, args.wide}[parameter];
    }
    if constexpr (kIsFolded<Map>)
      own = map.part(c, share, sharing);
    else
      own = map[c];
  };
  read();
  then();
  SIMT_ROLLED
  for (int left = span.count; left > 0; left -= at_once) {
    if (kIsFolded<Map>) {
      SIMT_ROLLED
      for (int step = sharing / 2; step > 0; step /= 2) own += simt::shuffle_xor(own, step);
    }
    if (i < span.count && share == 0) make(i, own, Everywhere<A>{weight}, Everywhere<A>{bias});
    i += at_once;
    if (left > at_once) read();
  }
}

template <class A>
SIMT_FN void fill(A* out, int count, A value) {
  for (int i = simt::thread(); i < count; i += kThreads) out[i] = value;
}

template <class A>
SIMT_FN void copy(A* out, int count, const A* from) {
  for (int i = simt::thread(); i < count; i += kThreads) out[i] = from[i];
}

// A copy, or none from null, of which the first values are on their way before others are made.
template <class A>
struct Copy {
  A* out;
  int count;
  A first[2];

  SIMT_FN Copy(A* out, int all, const A* from) : out(out), count(from ? all : 0), first{0, 0} {
    if (!from) return;
    SIMT_UNROLL
    for (int n = 0; n < 2; n++)
      if (place(n) < all) first[n] = from[place(n)];
    SIMT_ROLLED
    for (int i = place(2); i < all; i += kThreads) out[i] = from[i];
  }
  SIMT_FN void end() const {
    SIMT_UNROLL
    for (int n = 0; n < 2; n++)
      if (place(n) < count) out[place(n)] = first[n];
  }

 private:
  static SIMT_FN int place(int n) { return simt::thread() + n * kThreads; }
};

// Fills the window on a span of pixels. A thread reads two of its values at once; or one, and more
// terms of it, where there are no more values than threads, and where registers are few.
template <class A, class Map>
SIMT_FN void fill_window(const Args<A>& args, const Places& places, const Span& span, A* window,
                         const Map& map) {
  constexpr bool few = kIsFolded<Map> && !std::is_same_v<Map, Folded<A>>;
  const auto some = [&](auto& i, auto&, auto& values) { some_of(map, span.first, i, values); };
  if (few || (kIsFolded<Map> && wanted_places(args.halo, places, span.count) <= kThreads))
    load_window<1>(args.halo, places, span.count, kThreads, window, some);
  else if constexpr (!few)
    load_window<2>(args.halo, places, span.count, kThreads, window, some);
}

// s from the channel mean, into `out` unless it is null.
template <class T, class A, class Map, class Then = Nothing>
SIMT_FN void make_spatial_mask(const Args<A>& args, const Span& span,
                               const StencilMemory<A>& memory, Map mean, Keep keep_mean, A* out,
                               Then then = {}) {
  const Places places(args, span.first);
  const Coefficient<T> coefficient(args, Taps::as_given);
  fill_window(args, places, span, memory.window, mean);
  coefficient.put(memory.stencil);
  then();
  simt::sync();
  const A* const centre = memory.window + args.halo.centre;
  const int64_t kept = span.image * args.pixels + span.first;
  SIMT_ROLLED
  for (int i = simt::thread(); i < span.count; i += kThreads) {
    const A* const here = centre + places.of(i);
    const A s = sigmoid(stencil(here, args.halo, memory.stencil));
    if (out) out[i] = s;
    if (span.keeps()) {
      args.spatial_mask[kept + i] = s;
      if (keep_mean == Keep::yes) args.channel_mean[kept + i] = *here;
    }
  }
}

// c from the pooled channels, into `out` unless it is null.
template <class T, class A, class Map, class Then = Nothing>
SIMT_FN void make_channel_mask(const Args<A>& args, const Span& span, Map pooled, Keep keep_pooled,
                               A* out, Then then = {}) {
  each_channel<T>(args, span, pooled, then, [&](int i, A own, auto weight, auto bias) {
    const Parameter<T> weights{args.parameters.gate, args.wide};
    const int64_t c = span.first + i, kept = span.image * args.channels + c;
    const int64_t size = args.kernel_size, channels = args.channels;
    const A mask = sigmoid(
        args.gate == Gate::eca
            ? gate_logit<A>(Gate::eca, weights, weights, size, pooled, channels, c)
            : gate_logit<A>(args.gate, weight, bias, size, Everywhere<A>{own}, channels, c));
    if (out) out[i] = mask;
    if (span.keeps()) {
      args.channel_mask[kept] = mask;
      if (keep_pooled == Keep::yes) args.pooled[kept] = own;
    }
  });
}

// dm / C from dz, into `out` unless it is null; and the block's part of the spatial sums, which it
// adds to those of earlier launches: so many groups of a warp's pixels. Warps without any skip it.
template <class T, class A, class Map, class Then = Nothing>
SIMT_FN void through_stencil(const Args<A>& args, const Span& span, const StencilMemory<A>& memory,
                             Map dz, Keep keep_term, A* out, Then then = {}) {
  const Places places(args, span.first);
  const Coefficient<T> coefficient(args, Taps::turned);
  fill_window(args, places, span, memory.window, dz);
  coefficient.put(memory.stencil);
  then();
  simt::sync();
  const A* const centre = memory.window + args.halo.centre;
  const int64_t kept = span.image * args.pixels + span.first;
  const int groups = (span.count + simt::kWarp - 1) / simt::kWarp;
  const int first = groups * span.part / span.parts;
  const int last = groups * (span.part + 1) / span.parts;
  const A scale = A(1) / args.channels;
  SpatialSums<A> sums;
  SIMT_ROLLED
  for (int i = simt::thread(); i < span.count; i += kThreads) {
    const bool counts = first * simt::kWarp <= i && i < last * simt::kWarp;
    const A mean = counts ? args.channel_mean[kept + i] : A(0);
    const A dm = scale * sums.stencil(centre + places.of(i), args.halo, memory.stencil, mean,
                                      A(counts ? 1 : 0));
    if (out) out[i] = dm;
    if (span.keeps() && keep_term == Keep::yes) args.d_channel_mean[kept + i] = dm;
  }
  const int warp = simt::thread() / simt::kWarp;
  const bool any = first + ((warp - first) & (kWarps - 1)) < last;
  memory.spatial[simt::thread()] = any ? sums.by_lane() : A(0);
  simt::sync();
  A* const total = args.spatial_parts + simt::block() * kSpatialPitch;
  add_spatial_sums(memory.spatial, kWarps,
                   [&](int t, A sum) { total[t] = (args.first_job == 0 ? A(0) : total[t]) + sum; });
}

// dg / P from dt, into `out` unless it is null; both may be kept.
template <class T, class A, class Map, class Then = Nothing>
SIMT_FN void through_gate(const Args<A>& args, const Span& span, Map dt, Keep keep, A* out,
                          Then then = {}) {
  const A scale = A(1) / args.pixels;
  each_channel<T>(args, span, dt, then, [&](int i, A own, auto weight, auto) {
    const Parameter<T> weights{args.parameters.gate, args.wide};
    const int64_t c = span.first + i, kept = span.image * args.channels + c;
    const int64_t size = args.kernel_size, channels = args.channels;
    const A dg = scale * (args.gate == Gate::eca
                              ? gate_transposed<A>(Gate::eca, weights, size, dt, channels, c)
                              : gate_transposed<A>(args.gate, weight, size, Everywhere<A>{own},
                                                   channels, c));
    if (out) out[i] = dg;
    if (span.keeps() && keep == Keep::yes) args.d_logit[kept] = own, args.d_pooled[kept] = dg;
  });
}

// The axis' map by which a launch's sums are weighted, over the tile; null for ones. It is made in
// shared memory where it is pending, or else it is ready in global memory.
template <class T, Sums Kind, class A, class Then>
SIMT_FN const A* pixel_weights(const Args<A>& args, const Tile& tile, const Memory<A>& memory,
                               Then then) {
  const int64_t image = tile.image * args.pixels;
  if (!args.pending.pixels) {
    const A* const ready = Kind == Sums::through ? args.d_channel_mean : args.spatial_mask;
    return args.weights.pixels ? ready + image + tile.pixel() : nullptr;
  }
  const Span span = pixels_of(tile);
  A* const out = memory.pixel_factor;
  if constexpr (Kind == Sums::backward) {
    make_spatial_mask<T>(args, span, memory.around, args.channel_mean + image, Keep::no, out, then);
  } else if constexpr (Kind == Sums::forward) {
    const Folded<A> mean(args.pixel_sums, tile.image, A(1) / args.channels);
    make_spatial_mask<T>(args, span, memory.around, mean, Keep::yes, out, then);
  } else {
    const LogitGradient<A, false> dz(args.pixel_sums, args.more_pixel_sums, tile.image,
                                     args.spatial_mask);
    through_stencil<T>(args, span, memory.around, dz, Keep::yes, out, then);
  }
  return out;
}

template <class T, Sums Kind, class A, class Then>
SIMT_FN const A* channel_weights(const Args<A>& args, const Tile& tile, const Memory<A>& memory,
                                 Then then) {
  const int64_t image = tile.image * args.channels;
  if (!args.pending.channels) {
    const A* const ready = Kind == Sums::through ? args.d_pooled : args.channel_mask;
    return args.weights.channels ? ready + image + tile.channel() : nullptr;
  }
  const Span span = channels_of(tile);
  A* const out = memory.channel_factor;
  if constexpr (Kind == Sums::backward) {
    make_channel_mask<T>(args, span, args.pooled + image, Keep::no, out, then);
  } else if constexpr (Kind == Sums::forward) {
    const Folded<A> pooled(args.channel_sums, tile.image, A(1) / args.pixels);
    make_channel_mask<T>(args, span, pooled, Keep::yes, out, then);
  } else {
    const LogitGradient<A, false> dt(args.channel_sums, args.more_channel_sums, tile.image,
                                     args.channel_mask);
    through_gate<T>(args, span, dt, Keep::yes, out, then);
  }
  return out;
}

// The factors of y or dx over the tile, and (Backward) the terms of dx, in shared memory: first
// those that are ready, from global memory.
template <bool Backward, class A>
struct ReadyFactors {
  Copy<A> pixel_factor, pixel_term, channel_factor, channel_term;

  SIMT_FN ReadyFactors(const Args<A>& args, const Tile& tile, const Memory<A>& memory)
      : ReadyFactors(args, tile, memory, tile.image * args.pixels + tile.pixel(),
                     tile.image * args.channels + tile.channel(),
                     {args.masks.pixels && !args.pending.pixels,
                      args.masks.channels && !args.pending.channels}) {}
  SIMT_FN void end() const {
    pixel_factor.end(), channel_factor.end();
    if (Backward) pixel_term.end(), channel_term.end();
  }

 private:
  SIMT_FN ReadyFactors(const Args<A>& args, const Tile& tile, const Memory<A>& m, int64_t pixel,
                       int64_t channel, Axes ready)
      : pixel_factor(
            m.pixel_factor, tile.pixels(),
            ready.pixels || (Backward && args.masks.pixels) ? args.spatial_mask + pixel : nullptr),
        pixel_term(m.pixel_term, tile.pixels(),
                   Backward && ready.pixels ? args.d_channel_mean + pixel : nullptr),
        channel_factor(m.channel_factor, tile.channels(),
                       ready.channels || (Backward && args.masks.channels)
                           ? args.channel_mask + channel
                           : nullptr),
        channel_term(m.channel_term, tile.channels(),
                     Backward && ready.channels ? args.d_pooled + channel : nullptr) {}
};

// And those that are not, or that there are none of.
template <class T, bool Backward, class A>
SIMT_FN void pixel_factors(const Args<A>& args, const Tile& tile, const Memory<A>& memory) {
  const Span span = pixels_of(tile);
  if (!args.masks.pixels) {
    fill(memory.pixel_factor, span.count, A(1));
    if (Backward) fill(memory.pixel_term, span.count, A(0));
  }
  if (!args.pending.pixels) return;
  if constexpr (Backward) {
    const LogitGradient<A, true> dz(args.pixel_sums, args.more_pixel_sums, tile.image,
                                    args.spatial_mask);
    through_stencil<T>(args, span, memory.around, dz, Keep::no, memory.pixel_term);
  } else {
    const Folded<A> mean(args.pixel_sums, tile.image, A(1) / args.channels);
    make_spatial_mask<T>(args, span, memory.around, mean, Keep::yes, memory.pixel_factor);
  }
}

template <class T, bool Backward, class A>
SIMT_FN void channel_factors(const Args<A>& args, const Tile& tile, const Memory<A>& memory) {
  const Span span = channels_of(tile);
  if (!args.masks.channels) {
    fill(memory.channel_factor, span.count, A(1));
    if (Backward) fill(memory.channel_term, span.count, A(0));
  }
  if (!args.pending.channels) return;
  if constexpr (Backward) {
    const LogitGradient<A, true> dt(args.channel_sums, args.more_channel_sums, tile.image,
                                    args.channel_mask);
    through_gate<T>(args, span, dt, Keep::no, memory.channel_term);
  } else {
    const Folded<A> pooled(args.channel_sums, tile.image, A(1) / args.pixels);
    make_channel_mask<T>(args, span, pooled, Keep::yes, memory.channel_factor);
  }
}

}  // namespace da::cuda
