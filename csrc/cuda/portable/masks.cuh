// The small maps that a block needs for its tile: masks, and what flows back through them. Each is
// made by every block that needs it and kept in memory by the first tile of the other axis only.
#pragma once

#include "cuda/common/masks.cuh"
#include "cuda/plan/memory.h"

namespace da::cuda {

// An image's sums, added up where they are read, in the tiles' order.
template <class A>
struct Folded {
  const A* data;
  int64_t entries;
  int terms;
  A scale;

  SIMT_FN Folded(const Partial<A>& p, int64_t image, A scale)
      : data(p.data + image * p.tiles * p.entries),
        entries(p.entries),
        terms(p.data ? p.terms : 0),
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

// A map's values around the tile's pixels, in shared memory: all pixels within the stencil's reach,
// or where rows are long the five pieces of rows that it touches. The caller syncs.
template <class A, class Map>
SIMT_FN void stage(const Args<A>& a, const Tile& tile, const Memory<A>& memory, Map map) {
  const Staging s = a.staging;
  SIMT_ROLLED
  for (int i = simt::thread(); i < s.pieces * s.length; i += kThreads) {
    const int piece = i / s.length;
    const int64_t p = tile.pixel() + s.row_of(piece) * a.width - s.margin + i % s.length;
    memory.staged[i] = p >= 0 && p < a.pixels ? map[p] : A(0);
  }
}

// memory.pixel = s, from the channel mean.
template <class T, class A, class Map>
SIMT_FN void make_spatial_mask(const Args<A>& a, const Tile& tile, const Memory<A>& memory,
                               Map mean, bool keep_mean) {
  load_stencil<T>(a, memory.stencil, false);
  stage(a, tile, memory, mean);
  simt::sync();
  const bool keep = tile.channel_tile() == 0;
  const Surroundings<A> m(a, tile.pixel(), memory.staged, a.staging);
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.pixels(); i += kThreads) {
    const A s = sigmoid(m.stencil(i, memory.stencil) + memory.stencil[2 * kTaps]);
    memory.pixel[i] = s;
    const int64_t at = tile.image * a.pixels + tile.pixel() + i;
    if (keep) a.spatial_mask[at] = s;
    if (keep && keep_mean) a.channel_mean[at] = m.centre(i);
  }
}

// memory.channel = c, from the pooled channels.
template <class T, class A, class Map>
SIMT_FN void make_channel_mask(const Args<A>& a, const Tile& tile, const Memory<A>& memory,
                               Map pooled, bool keep_pooled) {
  const Parameter<T> weight{a.parameters.gate, a.parameters.wide};
  const Parameter<T> bias{a.parameters.gate_bias, a.parameters.wide};
  const bool keep = tile.pixel_tile() == 0;
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.channels(); i += kThreads) {
    const int64_t c = tile.channel() + i, at = tile.image * a.channels + c;
    const A mask =
        sigmoid(gate_logit<A>(a.gate, weight, bias, a.kernel_size, pooled, a.channels, c));
    memory.channel[i] = mask;
    if (keep) a.channel_mask[at] = mask;
    if (keep && keep_pooled) a.pooled[at] = pooled[c];
  }
}

// Gradients at the masks' logits, from the sums over dy x and, with More, over x what came through
// the other mask.
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
// the spatial sums; the block adds it to that of earlier launches.
template <class T, bool More, class A>
SIMT_FN void through_spatial_mask(const Args<A>& a, const Tile& tile, const Memory<A>& memory,
                                  A* out, bool keep) {
  const int64_t image = tile.image * a.pixels;
  const bool first = tile.channel_tile() == 0;
  const LogitGradient<A, More> dz(a.pixel_sums, a.more_pixel_sums, tile.image, a.spatial_mask);
  load_stencil<T>(a, memory.stencil, true);
  stage(a, tile, memory, dz);
  simt::sync();
  const Surroundings<A> d(a, tile.pixel(), memory.staged, a.staging);
  const A scale = A(1) / a.channels;
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.pixels(); i += kThreads) {
    const A dm = scale * d.stencil(i, memory.stencil);
    out[i] = dm;
    if (keep && first) a.d_channel_mean[image + tile.pixel() + i] = dm;
  }

  const A* mean = a.channel_mean + image + tile.pixel();
  A* total = a.spatial_parts + simt::block() * kSpatialSums;
  spatial_sums(d, mean, first ? tile.pixels() : 0, kWarps, [&](int part, A sum) {
    total[part] = (a.first_job == 0 ? A(0) : total[part]) + sum;
  });
}

// out = dg / P over the tile's channels, from dt: the gradient at the gate's logits.
template <class T, class A, class Map>
SIMT_FN void through_gate(const Args<A>& a, const Tile& tile, Map dt, A* out, bool keep) {
  const Parameter<T> weight{a.parameters.gate, a.parameters.wide};
  const A scale = A(1) / a.pixels;
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.channels(); i += kThreads) {
    const int64_t c = tile.channel() + i;
    out[i] = scale * gate_transposed<A>(a.gate, weight, a.kernel_size, dt, a.channels, c);
    if (keep && tile.pixel_tile() == 0) a.d_logit[tile.image * a.channels + c] = dt[c];
  }
}

template <class T, bool More, class A>
SIMT_FN void through_channel_mask(const Args<A>& a, const Tile& tile, A* out) {
  const LogitGradient<A, More> dt(a.channel_sums, a.more_channel_sums, tile.image, a.channel_mask);
  through_gate<T>(a, tile, dt, out, true);
}

template <class T, class A>
SIMT_FN void spatial_mask_from_sums(const Args<A>& a, const Tile& tile, const Memory<A>& memory) {
  make_spatial_mask<T>(a, tile, memory, Folded<A>(a.pixel_sums, tile.image, A(1) / a.channels),
                       true);
}

template <class T, class A>
SIMT_FN void channel_mask_from_sums(const Args<A>& a, const Tile& tile, const Memory<A>& memory) {
  make_channel_mask<T>(a, tile, memory, Folded<A>(a.channel_sums, tile.image, A(1) / a.pixels),
                       true);
}

// What it weighs its elements with: memory.pixel and memory.channel.
template <class T, Sums Kind, class A>
SIMT_FN void weights_of_sums(const Args<A>& a, const Tile& tile, const Memory<A>& memory) {
  fill(memory.pixel, tile.pixels(), A(1));
  fill(memory.channel, tile.channels(), A(1));
  simt::sync();
  if (Kind == Sums::backward) {
    if (a.masks.pixels)
      make_spatial_mask<T>(a, tile, memory, a.channel_mean + tile.image * a.pixels, false);
    if (a.masks.channels)
      make_channel_mask<T>(a, tile, memory, a.pooled + tile.image * a.channels, false);
  } else if (Kind == Sums::through) {
    if (a.pending.channels)
      through_channel_mask<T, false>(a, tile, memory.channel);
    else
      through_spatial_mask<T, false>(a, tile, memory, memory.pixel, true);
  } else {
    if (a.pending.pixels)
      spatial_mask_from_sums<T>(a, tile, memory);
    else if (a.pending.channels)
      channel_mask_from_sums<T>(a, tile, memory);
  }
  simt::sync();
}

// What forward's last launch scales by.
template <class T, class A>
SIMT_FN void weights_of_y(const Args<A>& a, const Tile& tile, const Memory<A>& memory) {
  if (!a.masks.pixels)
    fill(memory.pixel, tile.pixels(), A(1));
  else if (a.pending.pixels)
    spatial_mask_from_sums<T>(a, tile, memory);
  else
    copy(memory.pixel, tile.pixels(), a.spatial_mask + tile.image * a.pixels + tile.pixel());

  if (!a.masks.channels)
    fill(memory.channel, tile.channels(), A(1));
  else if (a.pending.channels)
    channel_mask_from_sums<T>(a, tile, memory);
  else
    copy(memory.channel, tile.channels(),
         a.channel_mask + tile.image * a.channels + tile.channel());
  simt::sync();
}

// What backward's last launch scales by and adds.
template <class T, class A>
SIMT_FN void weights_of_dx(const Args<A>& a, const Tile& tile, const Memory<A>& memory) {
  const int64_t pixel = tile.image * a.pixels + tile.pixel();
  const int64_t channel = tile.image * a.channels + tile.channel();
  if (!a.masks.pixels) {
    fill(memory.pixel, tile.pixels(), A(1));
    fill(memory.pixel_add, tile.pixels(), A(0));
  } else {
    copy(memory.pixel, tile.pixels(), a.spatial_mask + pixel);
    if (a.pending.pixels)
      through_spatial_mask<T, true>(a, tile, memory, memory.pixel_add, false);
    else
      copy(memory.pixel_add, tile.pixels(), a.d_channel_mean + pixel);
  }
  if (!a.masks.channels) {
    fill(memory.channel, tile.channels(), A(1));
    fill(memory.channel_add, tile.channels(), A(0));
  } else {
    copy(memory.channel, tile.channels(), a.channel_mask + channel);
    if (a.pending.channels)
      through_channel_mask<T, true>(a, tile, memory.channel_add);
    else
      through_gate<T>(a, tile, a.d_logit + tile.image * a.channels, memory.channel_add, false);
  }
  simt::sync();
}

}  // namespace da::cuda
