// The small maps that a block needs for its tile: masks, and what flows back through them. Each is
// made by every block that needs it, and kept in memory by the first tile of the other axis only.
#pragma once

#include "cuda/common/masks.cuh"
#include "cuda/plan/memory.h"

namespace da::cuda {

// Whether the first tile of the other axis also keeps, for later launches, what a map is made of.
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
        terms(sums.data ? sums.terms : 0),
        scale(scale) {}

  SIMT_FN A operator[](int64_t entry) const {
    A sum = 0;
    const A* term = data + entry;
    for (int t = 0; t < terms; t++, term += entries) sum += *term;
    return sum * scale;
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

// Puts a map's values in the tile and its halo into shared memory: all pixels within the stencil's
// reach, or where rows are long the five pieces of rows that it touches. The caller syncs.
template <class A, class Map>
SIMT_FN void load_halo(const Args<A>& args, const Tile& tile, const Memory<A>& memory, Map map) {
  const Halo halo = args.halo;
  SIMT_ROLLED
  for (int i = simt::thread(); i < halo.pieces * halo.length; i += kThreads) {
    const int piece = i / halo.length;
    const int64_t pixel =
        tile.pixel() + halo.row_of(piece) * args.width - halo.margin + i % halo.length;
    memory.halo[i] = pixel >= 0 && pixel < args.pixels ? map[pixel] : A(0);
  }
}

// memory.pixel_factor = s, from the channel mean.
template <class T, class A, class Map>
SIMT_FN void make_spatial_mask(const Args<A>& args, const Tile& tile, const Memory<A>& memory,
                               Map mean, Keep keep_mean) {
  load_stencil<T>(args, memory.stencil, Taps::as_given);
  load_halo(args, tile, memory, mean);
  simt::sync();
  const bool keep = tile.channel_tile() == 0;
  const Surroundings<A> m(args, tile.pixel(), memory.halo, args.halo);
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.pixels(); i += kThreads) {
    const A s = sigmoid(m.stencil(i, memory.stencil) + memory.stencil[2 * kTaps]);
    memory.pixel_factor[i] = s;
    const int64_t at = tile.image * args.pixels + tile.pixel() + i;
    if (keep) args.spatial_mask[at] = s;
    if (keep && keep_mean == Keep::yes) args.channel_mean[at] = m.centre(i);
  }
}

// memory.channel_factor = c, from the pooled channels.
template <class T, class A, class Map>
SIMT_FN void make_channel_mask(const Args<A>& args, const Tile& tile, const Memory<A>& memory,
                               Map pooled, Keep keep_pooled) {
  const Parameter<T> weight{args.parameters.gate, args.wide};
  const Parameter<T> bias{args.parameters.gate_bias, args.wide};
  const bool keep = tile.pixel_tile() == 0;
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.channels(); i += kThreads) {
    const int64_t c = tile.channel() + i, at = tile.image * args.channels + c;
    const A mask =
        sigmoid(gate_logit<A>(args.gate, weight, bias, args.kernel_size, pooled, args.channels, c));
    memory.channel_factor[i] = mask;
    if (keep) args.channel_mask[at] = mask;
    if (keep && keep_pooled == Keep::yes) args.pooled[at] = pooled[c];
  }
}

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

// out = dm / C over the tile's pixels. The first tile along the channels also makes its share of
// the spatial sums, and the block adds it to that of earlier launches.
template <class T, bool More, class A>
SIMT_FN void through_spatial_mask(const Args<A>& args, const Tile& tile, const Memory<A>& memory,
                                  A* out, Keep keep) {
  const int64_t image = tile.image * args.pixels;
  const bool first = tile.channel_tile() == 0;
  const LogitGradient<A, More> dz(args.pixel_sums, args.more_pixel_sums, tile.image,
                                  args.spatial_mask);
  load_stencil<T>(args, memory.stencil, Taps::turned);
  load_halo(args, tile, memory, dz);
  simt::sync();
  const Surroundings<A> around(args, tile.pixel(), memory.halo, args.halo);
  const A scale = A(1) / args.channels;
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.pixels(); i += kThreads) {
    const A dm = scale * around.stencil(i, memory.stencil);
    out[i] = dm;
    if (keep == Keep::yes && first) args.d_channel_mean[image + tile.pixel() + i] = dm;
  }

  const A* mean = args.channel_mean + image + tile.pixel();
  A* total = args.spatial_parts + simt::block() * kSpatialSums;
  spatial_sums(around, mean, first ? tile.pixels() : 0, kWarps, [&](int part, A sum) {
    total[part] = (args.first_job == 0 ? A(0) : total[part]) + sum;
  });
}

// out = dg / P over the tile's channels, from dt, the gradient at the gate's logits.
template <class T, class A, class Map>
SIMT_FN void through_gate(const Args<A>& args, const Tile& tile, Map dt, A* out, Keep keep) {
  const Parameter<T> weight{args.parameters.gate, args.wide};
  const A scale = A(1) / args.pixels;
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.channels(); i += kThreads) {
    const int64_t c = tile.channel() + i;
    out[i] = scale * gate_transposed<A>(args.gate, weight, args.kernel_size, dt, args.channels, c);
    if (keep == Keep::yes && tile.pixel_tile() == 0)
      args.d_logit[tile.image * args.channels + c] = dt[c];
  }
}

template <class T, bool More, class A>
SIMT_FN void through_channel_mask(const Args<A>& args, const Tile& tile, A* out) {
  const LogitGradient<A, More> dt(args.channel_sums, args.more_channel_sums, tile.image,
                                  args.channel_mask);
  through_gate<T>(args, tile, dt, out, Keep::yes);
}

template <class T, class A>
SIMT_FN void spatial_mask_from_sums(const Args<A>& args, const Tile& tile,
                                    const Memory<A>& memory) {
  const Folded<A> mean(args.pixel_sums, tile.image, A(1) / args.channels);
  make_spatial_mask<T>(args, tile, memory, mean, Keep::yes);
}

template <class T, class A>
SIMT_FN void channel_mask_from_sums(const Args<A>& args, const Tile& tile,
                                    const Memory<A>& memory) {
  const Folded<A> pooled(args.channel_sums, tile.image, A(1) / args.pixels);
  make_channel_mask<T>(args, tile, memory, pooled, Keep::yes);
}

// The weights of a launch's sums, as memory.pixel_factor and memory.channel_factor.
template <class T, Sums Kind, class A>
SIMT_FN void weights_of_sums(const Args<A>& args, const Tile& tile, const Memory<A>& memory) {
  fill(memory.pixel_factor, tile.pixels(), A(1));
  fill(memory.channel_factor, tile.channels(), A(1));
  simt::sync();
  if (Kind == Sums::backward) {
    if (args.masks.pixels)
      make_spatial_mask<T>(args, tile, memory, args.channel_mean + tile.image * args.pixels,
                           Keep::no);
    if (args.masks.channels)
      make_channel_mask<T>(args, tile, memory, args.pooled + tile.image * args.channels, Keep::no);
  } else if (Kind == Sums::through) {
    if (args.pending.channels)
      through_channel_mask<T, false>(args, tile, memory.channel_factor);
    else
      through_spatial_mask<T, false>(args, tile, memory, memory.pixel_factor, Keep::yes);
  } else {
    if (args.pending.pixels)
      spatial_mask_from_sums<T>(args, tile, memory);
    else if (args.pending.channels)
      channel_mask_from_sums<T>(args, tile, memory);
  }
  simt::sync();
}

// The factors of y, for forward's last launch.
template <class T, class A>
SIMT_FN void factors_of_y(const Args<A>& args, const Tile& tile, const Memory<A>& memory) {
  const int64_t pixel = tile.image * args.pixels + tile.pixel();
  const int64_t channel = tile.image * args.channels + tile.channel();
  if (!args.masks.pixels)
    fill(memory.pixel_factor, tile.pixels(), A(1));
  else if (args.pending.pixels)
    spatial_mask_from_sums<T>(args, tile, memory);
  else
    copy(memory.pixel_factor, tile.pixels(), args.spatial_mask + pixel);

  if (!args.masks.channels)
    fill(memory.channel_factor, tile.channels(), A(1));
  else if (args.pending.channels)
    channel_mask_from_sums<T>(args, tile, memory);
  else
    copy(memory.channel_factor, tile.channels(), args.channel_mask + channel);
  simt::sync();
}

// The factors and terms of dx, for backward's last launch.
template <class T, class A>
SIMT_FN void factors_of_dx(const Args<A>& args, const Tile& tile, const Memory<A>& memory) {
  const int64_t pixel = tile.image * args.pixels + tile.pixel();
  const int64_t channel = tile.image * args.channels + tile.channel();
  if (!args.masks.pixels) {
    fill(memory.pixel_factor, tile.pixels(), A(1));
    fill(memory.pixel_term, tile.pixels(), A(0));
  } else {
    copy(memory.pixel_factor, tile.pixels(), args.spatial_mask + pixel);
    if (args.pending.pixels)
      through_spatial_mask<T, true>(args, tile, memory, memory.pixel_term, Keep::no);
    else
      copy(memory.pixel_term, tile.pixels(), args.d_channel_mean + pixel);
  }
  if (!args.masks.channels) {
    fill(memory.channel_factor, tile.channels(), A(1));
    fill(memory.channel_term, tile.channels(), A(0));
  } else {
    copy(memory.channel_factor, tile.channels(), args.channel_mask + channel);
    if (args.pending.channels)
      through_channel_mask<T, true>(args, tile, memory.channel_term);
    else
      through_gate<T>(args, tile, args.d_logit + tile.image * args.channels, memory.channel_term,
                      Keep::no);
  }
  simt::sync();
}

}  // namespace da::cuda
