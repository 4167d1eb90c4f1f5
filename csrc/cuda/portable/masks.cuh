// The small maps: masks, and what flows back through them. A launch between passes makes them once
// (maps.cuh); or every block of a pass makes them for its tile, and the first tile of the other
// axis also keeps them in memory.
#pragma once

#include "cuda/common/masks.cuh"
#include "cuda/plan/memory.h"

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

// An image's sums, added up where they are read, in the tiles' order.
template <class A>
struct Folded {
  const A* data;
  int64_t entries;
  int terms;
  A scale;

  SIMT_FN Folded(const Partial<A>& sums, int64_t image, A scale)
      : data(sums.data + image * sums.tiles * sums.entries),
        entries(sums.entries),
        terms(sums.data ? static_cast<int>(sums.tiles) : 0),
        scale(scale) {}

  SIMT_FN A operator[](int64_t entry) const {
    A sum = 0;
    const A* term = data + entry;
    for (int t = 0; t < terms; t++, term += entries) sum += *term;
    return sum * scale;
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

  SIMT_FN A operator[](int64_t i) const {
    A sum = sums[i];
    if (More) sum += more[i];
    return sum * sigmoid_slope(mask[i]);
  }
};

template <class A>
SIMT_FN void fill(A* out, int count, A value) {
  for (int i = simt::thread(); i < count; i += kThreads) out[i] = value;
}

template <class A>
SIMT_FN void copy(A* out, int count, const A* from) {
  for (int i = simt::thread(); i < count; i += kThreads) out[i] = from[i];
}

// s from the channel mean, into `out` unless it is null.
template <class T, class A, class Map>
SIMT_FN void make_spatial_mask(const Args<A>& args, const Span& span,
                               const StencilMemory<A>& memory, Map mean, Keep keep_mean, A* out) {
  const Places places(args, span.first);
  load_stencil<T>(args, memory.stencil, Taps::as_given);
  load_window(args.halo, places, span.count, kThreads, memory.window,
              [&](int i) { return mean[span.first + i]; });
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
template <class T, class A, class Map>
SIMT_FN void make_channel_mask(const Args<A>& args, const Span& span, Map pooled, Keep keep_pooled,
                               A* out) {
  const Parameter<T> weight{args.parameters.gate, args.wide};
  const Parameter<T> bias{args.parameters.gate_bias, args.wide};
  SIMT_ROLLED
  for (int i = simt::thread(); i < span.count; i += kThreads) {
    const int64_t c = span.first + i, kept = span.image * args.channels + c;
    const A mask =
        sigmoid(gate_logit<A>(args.gate, weight, bias, args.kernel_size, pooled, args.channels, c));
    if (out) out[i] = mask;
    if (span.keeps()) {
      args.channel_mask[kept] = mask;
      if (keep_pooled == Keep::yes) args.pooled[kept] = pooled[c];
    }
  }
}

// dm / C from dz, into `out` unless it is null; and the block's part of the spatial sums, which it
// adds to those of earlier launches: so many groups of a warp's pixels. Warps without any skip it.
template <class T, class A, class Map>
SIMT_FN void through_stencil(const Args<A>& args, const Span& span, const StencilMemory<A>& memory,
                             Map dz, Keep keep_term, A* out) {
  const Places places(args, span.first);
  load_stencil<T>(args, memory.stencil, Taps::turned);
  load_window(args.halo, places, span.count, kThreads, memory.window,
              [&](int i) { return dz[span.first + i]; });
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
template <class T, class A, class Map>
SIMT_FN void through_gate(const Args<A>& args, const Span& span, Map dt, Keep keep, A* out) {
  const Parameter<T> weight{args.parameters.gate, args.wide};
  const A scale = A(1) / args.pixels;
  SIMT_ROLLED
  for (int i = simt::thread(); i < span.count; i += kThreads) {
    const int64_t c = span.first + i, kept = span.image * args.channels + c;
    const A dg =
        scale * gate_transposed<A>(args.gate, weight, args.kernel_size, dt, args.channels, c);
    if (out) out[i] = dg;
    if (span.keeps() && keep == Keep::yes) args.d_logit[kept] = dt[c], args.d_pooled[kept] = dg;
  }
}

// The axis' map by which a launch's sums are weighted, over the tile; null for ones. It is made in
// shared memory where it is pending, or else it is ready in global memory.
template <class T, Sums Kind, class A>
SIMT_FN const A* pixel_weights(const Args<A>& args, const Tile& tile, const Memory<A>& memory) {
  const int64_t image = tile.image * args.pixels;
  if (!args.pending.pixels) {
    const A* const ready = Kind == Sums::through ? args.d_channel_mean : args.spatial_mask;
    return args.weights.pixels ? ready + image + tile.pixel() : nullptr;
  }
  const Span span = pixels_of(tile);
  A* const out = memory.pixel_factor;
  if constexpr (Kind == Sums::backward) {
    make_spatial_mask<T>(args, span, memory.around, args.channel_mean + image, Keep::no, out);
  } else if constexpr (Kind == Sums::forward) {
    const Folded<A> mean(args.pixel_sums, tile.image, A(1) / args.channels);
    make_spatial_mask<T>(args, span, memory.around, mean, Keep::yes, out);
  } else {
    const LogitGradient<A, false> dz(args.pixel_sums, args.more_pixel_sums, tile.image,
                                     args.spatial_mask);
    through_stencil<T>(args, span, memory.around, dz, Keep::yes, out);
  }
  return out;
}

template <class T, Sums Kind, class A>
SIMT_FN const A* channel_weights(const Args<A>& args, const Tile& tile, const Memory<A>& memory) {
  const int64_t image = tile.image * args.channels;
  if (!args.pending.channels) {
    const A* const ready = Kind == Sums::through ? args.d_pooled : args.channel_mask;
    return args.weights.channels ? ready + image + tile.channel() : nullptr;
  }
  const Span span = channels_of(tile);
  A* const out = memory.channel_factor;
  if constexpr (Kind == Sums::backward) {
    make_channel_mask<T>(args, span, args.pooled + image, Keep::no, out);
  } else if constexpr (Kind == Sums::forward) {
    const Folded<A> pooled(args.channel_sums, tile.image, A(1) / args.pixels);
    make_channel_mask<T>(args, span, pooled, Keep::yes, out);
  } else {
    const LogitGradient<A, false> dt(args.channel_sums, args.more_channel_sums, tile.image,
                                     args.channel_mask);
    through_gate<T>(args, span, dt, Keep::yes, out);
  }
  return out;
}

// The factors of y or dx over the tile, and (Backward) the terms of dx, in shared memory.
template <class T, bool Backward, class A>
SIMT_FN void pixel_factors(const Args<A>& args, const Tile& tile, const Memory<A>& memory) {
  const Span span = pixels_of(tile);
  const int64_t at = tile.image * args.pixels + span.first;
  if (!args.masks.pixels) {
    fill(memory.pixel_factor, span.count, A(1));
    if (Backward) fill(memory.pixel_term, span.count, A(0));
    return;
  }
  if (Backward || !args.pending.pixels)
    copy(memory.pixel_factor, span.count, args.spatial_mask + at);
  if (Backward && !args.pending.pixels)
    copy(memory.pixel_term, span.count, args.d_channel_mean + at);
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
  const int64_t at = tile.image * args.channels + span.first;
  if (!args.masks.channels) {
    fill(memory.channel_factor, span.count, A(1));
    if (Backward) fill(memory.channel_term, span.count, A(0));
    return;
  }
  if (Backward || !args.pending.channels)
    copy(memory.channel_factor, span.count, args.channel_mask + at);
  if (Backward && !args.pending.channels) copy(memory.channel_term, span.count, args.d_pooled + at);
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
