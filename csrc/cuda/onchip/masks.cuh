// The masks, and the terms that flow back through them, of an image that a team of blocks keeps.
//
// A block has whole sums of its rows, and needs its neighbours' only where a mask looks beyond its
// slab. Of each column it has a part of the sum, and it makes the mask of a slice of the columns:
//
//            own part       barrier   slice and reach    own slice   barrier   all columns
//   rank 0   pppppppppp               www                mm                    mmmmmmmmm
//   rank 1   pppppppppp      ---->      wwwww    ---->     mmm       ---->     mmmmmmmmm
//   rank 2   pppppppppp                   wwwww  mask         mmmm   gather    mmmmmmmmm
//                                     sums by rank
#pragma once

#include "cuda/onchip/slab.cuh"

namespace da::cuda {

// An axis makes a map of sums. value() is what a sum stands for; `keep`, [image][i], is where
// values are kept, or null. An entry of the map depends on the values around it, so a block makes
// `count` entries from `first` on of a window in its scratch memory: fill() puts the values there,
// value(i) counted from the first, all within reach, which may be other blocks' (looks_beyond());
// make() then calls put(i, entry, value).

// An axis of pixels: the stencil's.
struct Pixels {
  const Args<float>& call;
  const OnChip& chip;
  const float* stencil;
  float* keep;

  SIMT_FN bool looks_beyond() const { return chip.blocks > 1; }

  template <class Value>
  SIMT_FN void fill(float* window, int first, int count, Value value) const {
    if (count == 0) return;
    load_window<1>(chip.halo, Places(call, first), count, chip.threads, window,
                   [&](const int (&i)[1], const bool (&there)[1], float (&values)[1]) {
                     if (there[0]) values[0] = value(i[0]);
                   });
  }
};

// The spatial mask s.
struct SpatialMask : Pixels {
  SIMT_FN float value(float sum, float) const { return sum * (1.f / call.channels); }
  template <class Put>
  SIMT_FN void make(const float* window, int first, int count, Put put) const {
    const Places places(call, first);
    SIMT_ROLLED
    for (int i = simt::thread(); i < count; i += chip.threads) {
      const float* const here = window + chip.halo.centre + places.of(i);
      put(i, sigmoid(cuda::stencil(here, chip.halo, stencil)), *here);
    }
  }
};

// From ds to dz to the term dm / C; dz also makes the spatial parameters' gradients.
struct SpatialGradient : Pixels {
  const float* mean;  // the image's m
  float* parts;       // the block's share of the 19 spatial sums

  SIMT_FN float value(float sum, float mask) const { return sum * sigmoid_slope(mask); }
  template <class Put>
  SIMT_FN void make(float* window, int first, int count, Put put) const {
    const Places places(call, first);
    SpatialSums<float> sums;
    SIMT_ROLLED
    for (int i = simt::thread(); i < count; i += chip.threads) {
      const float* const here = window + chip.halo.centre + places.of(i);
      const float dm = sums.stencil(here, chip.halo, stencil, mean[first + i], 1.f);
      put(i, dm * (1.f / call.channels), *here);
    }
    float* const warps = window + chip.halo.pieces * chip.halo.length;
    warps[simt::thread()] = sums.by_lane();
    simt::sync();
    add_spatial_sums(warps, chip.warps, [&](int part, float sum) { parts[part] = sum; });
  }
};

// An axis of channels: the gate's.
template <class T>
struct Channels {
  const Args<float>& call;
  const OnChip& chip;
  float* keep;

  SIMT_FN int margin() const { return chip.margin(); }
  SIMT_FN bool looks_beyond() const { return margin() > 0; }
  SIMT_FN Parameter<T> weight() const { return {call.parameters.gate, call.wide}; }

  template <class Value>
  SIMT_FN void fill(float* window, int first, int count, Value value) const {
    if (count <= 0) return;
    const int end = min<int>(call.channels, first + count + margin());
    SIMT_ROLLED
    for (int c = max(0, first - margin()) + simt::thread(); c < end; c += chip.threads)
      window[c - first + margin()] = value(c - first);
  }
};

// The channel mask c.
template <class T>
struct ChannelMask : Channels<T> {
  SIMT_FN float value(float sum, float) const { return sum * (1.f / this->call.pixels); }
  SIMT_FN float at(FromChannel<float> pooled, int channel) const {
    const Args<float>& call = this->call;
    const Parameter<T> bias{call.parameters.gate_bias, call.wide};
    return sigmoid(gate_logit<float>(call.gate, this->weight(), bias, call.kernel_size, pooled,
                                     call.channels, channel));
  }
  template <class Put>
  SIMT_FN void make(const float* window, int first, int count, Put put) const {
    window += this->margin();
    SIMT_ROLLED
    for (int i = simt::thread(); i < count; i += this->chip.threads)
      put(i, at({window, first}, first + i), window[i]);
  }
};

// From dc to dt to the term dg / P.
template <class T>
struct ChannelGradient : Channels<T> {
  SIMT_FN float value(float sum, float mask) const { return sum * sigmoid_slope(mask); }
  template <class Put>
  SIMT_FN void make(const float* window, int first, int count, Put put) const {
    const Args<float>& call = this->call;
    window += this->margin();
    SIMT_ROLLED
    for (int i = simt::thread(); i < count; i += this->chip.threads) {
      const float dg =
          gate_transposed<float>(call.gate, this->weight(), call.kernel_size,
                                 FromChannel<float>{window, first}, call.channels, first + i);
      put(i, dg * (1.f / call.pixels), window[i]);
    }
  }
};

// out[i] for all columns: make(put) calls put(i, entry, value) for those of the block's slice, and
// its team's blocks make the others. They meet in `all`, [column]; or in a cluster come by mail, if
// its blocks met since they used `out`, and with the barrier between all was read that they read.
template <bool ByMail, class T, class Make>
SIMT_FN void gather(const Member<T>& m, int turn, float* all, float* out, float* keep, Make make) {
  const OnChip& chip = m.chip;
  const int first = m.slice_begin(), rank = m.rank(), cols = chip.cols;
  const bool mail = ByMail && simt::kClusters && chip.mail;
  make([&](int i, float entry, float value) {
    i += first;
    if (keep) keep[i] = value;
    if (chip.blocks > 1 && !mail) {
      simt::store_fresh(all + i, entry);
      return;
    }
    out[i] = entry;
    SIMT_ROLLED
    for (int to = 0; mail && to < chip.blocks; to++)
      if (to != rank) m.mail()->post(out + i, to, entry);
  });
  if (mail) {
    const int others = cols - (m.slice_end() - first);
    m.mail()->wait(others * sizeof(float), turn);
    simt::sync();
    return;
  }
  m.sync();
  if (chip.blocks == 1) return;
  for (int i = simt::thread(); i < cols; i += chip.threads) out[i] = simt::load_fresh(all + i);
  simt::sync();
}

// Turns the blocks' sums by column into what `axis` makes of them.
template <class T, class Axis>
SIMT_FN void through_columns(const Member<T>& m, int turn, const Axis& axis, float* all,
                             float* out) {
  const OnChip& chip = m.chip;
  const int cols = chip.cols, first = m.slice_begin(), count = m.slice_end() - first;
  float* const sums = m.col_sums();
  float* const partials = m.args.partials + int64_t(m.team()) * chip.blocks * cols;
  simt::sync();
  if (chip.blocks > 1 && !m.in_cluster())
    for (int i = simt::thread(); i < cols; i += chip.threads)
      simt::store_fresh(partials + int64_t(m.rank()) * cols + i, sums[i]);
  if (chip.blocks > 1) m.sync();

  axis.fill(m.scratch(), first, count, [&](int i) {
    i += first;
    float sum = 0;
    if (chip.blocks == 1)
      sum = sums[i];
    else
      for (int rank = 0; rank < chip.blocks; rank++)
        sum += m.in_cluster() ? *simt::peer(sums + i, rank)
                              : simt::load_fresh(partials + int64_t(rank) * cols + i);
    return axis.value(sum, m.col_mask()[i]);
  });
  simt::sync();
  gather<true>(m, turn, all, out, axis.keep,
               [&](auto put) { axis.make(m.scratch(), first, count, put); });
}

// Turns the block's sums by row into what `axis` makes of them. Neighbours find its values where
// they are kept.
template <class T, class Axis>
SIMT_FN void through_rows(const Member<T>& m, const Axis& axis, float* sums) {
  const OnChip& chip = m.chip;
  const int row0 = m.row0(), rows = m.rows();
  const auto put = [&](int r, float entry, float) { sums[r] = entry; };
  simt::sync();
  for (int r = simt::thread(); r < rows; r += chip.threads) {
    const float value = axis.value(sums[r], m.row_mask()[r]);
    if (axis.keep) simt::store_fresh(axis.keep + row0 + r, value);
    sums[r] = value;
  }
  if (axis.looks_beyond())
    m.sync();
  else
    simt::sync();
  axis.fill(m.scratch(), row0, rows, [&](int r) {
    return 0 <= r && r < rows ? sums[r] : simt::load_fresh(axis.keep + row0 + r);
  });
  simt::sync();
  axis.make(m.scratch(), row0, rows, put);
  simt::sync();
}

// An image's share of a map, [image][entry]; null where there is no map.
template <class A>
SIMT_FN A* of_image(A* maps, int image, int64_t entries) {
  return maps ? maps + simt::opaque(image) * entries : nullptr;
}

// Turns forward's sums into masks, in place.
template <class T>
SIMT_FN void make_masks(const Member<T>& m, int turn, const Lines& which) {
  const int image = m.image(turn);
  const Args<float>& call = m.args.call;
  const SpatialMask spatial{
      {call, m.chip, m.stencil(), of_image(call.channel_mean, image, call.pixels)}};
  const ChannelMask<T> channel{{call, m.chip, of_image(call.pooled, image, call.channels)}};
  const bool rows = which.rows, cols = which.cols;
  if (rows && m.chip.by_pixel) through_rows(m, spatial, m.row_mask());
  if (rows && !m.chip.by_pixel) through_rows(m, channel, m.row_mask());
  float* const all = of_image(m.args.col_masks, image, m.chip.cols);
  if (cols && m.chip.by_pixel) through_columns(m, turn, channel, all, m.col_mask());
  if (cols && !m.chip.by_pixel) through_columns(m, turn, spatial, all, m.col_mask());
}

// Turns backward's sums into terms of dx, in place.
template <class T>
SIMT_FN void make_terms(const Member<T>& m, int turn, const Lines& which) {
  const int image = m.image(turn);
  const Args<float>& call = m.args.call;
  const SpatialGradient spatial{
      {call, m.chip, m.stencil() + kStencil, of_image(m.args.row_gradients, image, m.chip.rows)},
      of_image(call.channel_mean, image, call.pixels),
      of_image(call.spatial_parts, image * m.chip.blocks + m.rank(), kSpatialPitch)};
  const ChannelGradient<T> channel{{call, m.chip, of_image(call.d_logit, image, call.channels)}};
  const bool rows = which.rows, cols = which.cols;
  if (rows && m.chip.by_pixel) through_rows(m, spatial, m.row_term());
  if (rows && !m.chip.by_pixel) through_rows(m, channel, m.row_term());
  float* const all = of_image(m.args.col_terms, image, m.chip.cols);
  if (cols && m.chip.by_pixel) through_columns(m, turn, channel, all, m.col_term());
  if (cols && !m.chip.by_pixel) through_columns(m, turn, spatial, all, m.col_term());
}

// Makes both masks anew, from the maps that forward saved: the team's blocks meet only where the
// spatial mask is by column, and too long for each to make all of it.
template <class T>
SIMT_FN void recall_masks(const Member<T>& m, int image) {
  const OnChip& chip = m.chip;
  const Args<float>& call = m.args.call;
  const SpatialMask spatial{{call, m.chip, m.stencil(), nullptr}};
  const ChannelMask<T> channel{{call, m.chip, nullptr}};
  const float* const mean = of_image(call.channel_mean, image, call.pixels);
  const FromChannel<float> pooled{of_image(call.pooled, image, call.channels), 0};
  const bool last = chip.by_pixel, alone = last || chip.recalled == chip.cols;
  const int first = last ? m.row0() : alone ? 0 : m.slice_begin();
  const int end = last ? first + m.rows() : alone ? chip.cols : m.slice_end();
  const int count = end - first;  // of pixels
  if (call.masks.pixels) {
    spatial.fill(m.scratch(), first, count, [&](int i) { return mean[first + i]; });
    simt::sync();
    const auto make = [&](auto put) { spatial.make(m.scratch(), first, count, put); };
    float* const out = last ? m.row_mask() : m.col_mask();
    if (alone)
      make([&](int i, float mask, float) { out[i] = mask; });
    else
      gather<false>(m, 0, of_image(m.args.col_masks, image, chip.cols), out, nullptr, make);
  }
  if (call.masks.channels) {
    float* const out = last ? m.col_mask() : m.row_mask();
    const int channel0 = last ? 0 : m.row0(), channels = last ? chip.cols : m.rows();
    for (int i = simt::thread(); i < channels; i += chip.threads)
      out[i] = channel.at(pooled, channel0 + i);
  }
  simt::sync();
}

}  // namespace da::cuda
