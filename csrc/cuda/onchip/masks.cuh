// The masks, and what flows back through them, of an image that a group of blocks keeps.
//
// Along the rows a block has whole sums, and needs its neighbours' only where a mask looks beyond
// its slab. Along the columns it has a part of every sum, and makes the mask of a slice of them:
//
//            own part       barrier   slice and reach    own slice   barrier   all columns
//   rank 0   pppppppppp               www                mm                    mmmmmmmmm
//   rank 1   pppppppppp      ---->      wwwww    ---->     mmm       ---->     mmmmmmmmm
//   rank 2   pppppppppp                   wwwww  mask         mmmm   gather    mmmmmmmmm
//                                     sums by rank
#pragma once

#include "cuda/onchip/slab.cuh"

namespace da::cuda {

// Values along an axis, of which a block has those that it needs: of channel or pixel `from` on.
struct Window {
  const float* data;
  int64_t from;
  SIMT_FN float operator[](int64_t i) const { return data[i - from]; }
};

// An axis says what a sum along it stands for, value(); where that is kept, if anywhere,
// [image][i]; and what comes of the values, at(window, i, first): of the i-th from `first` on, the
// window's i-th, when the window has all others within reach.

// s
struct SpatialMask {
  const Args<float>& a;
  const float* stencil;
  float* keep;

  SIMT_FN float value(float sum, float) const { return sum * (1.f / a.channels); }
  SIMT_FN float at(const float* window, int i, int first) const {
    const Surroundings<float> m(a, first, window, {1, 0, 0});
    return sigmoid(m.stencil(i, stencil) + stencil[2 * kTaps]);
  }
  SIMT_FN void finish(const float*, int, int) const {}
};

// c
template <class T>
struct ChannelMask {
  const Args<float>& a;
  float* keep;

  SIMT_FN float value(float sum, float) const { return sum * (1.f / a.pixels); }
  SIMT_FN float at(const float* window, int i, int first) const {
    const Parameter<T> weight{a.parameters.gate, a.parameters.wide};
    const Parameter<T> bias{a.parameters.gate_bias, a.parameters.wide};
    return sigmoid(gate_logit<float>(a.gate, weight, bias, a.kernel_size, Window{window, first},
                                     a.channels, first + i));
  }
  SIMT_FN void finish(const float*, int, int) const {}
};

// From ds to dz to dm / C; dz also makes the spatial parameters' gradients.
struct SpatialGradient {
  const Args<float>& a;
  const float* stencil;  // transposed
  float* keep;
  const float* mean;  // the image's m
  float* parts;
  int warps;

  SIMT_FN float value(float sum, float mask) const { return sum * sigmoid_slope(mask); }
  SIMT_FN float at(const float* window, int i, int first) const {
    const Surroundings<float> dz(a, first, window, {1, 0, 0});
    return dz.stencil(i, stencil) * (1.f / a.channels);
  }
  SIMT_FN void finish(const float* window, int first, int count) const {
    const Surroundings<float> dz(a, first, window, {1, 0, 0});
    spatial_sums(dz, mean + first, count, warps, [&](int part, float sum) { parts[part] = sum; });
  }
};

// From dc to dt to dg / P.
template <class T>
struct ChannelGradient {
  const Args<float>& a;
  float* keep;

  SIMT_FN float value(float sum, float mask) const { return sum * sigmoid_slope(mask); }
  SIMT_FN float at(const float* window, int i, int first) const {
    const Parameter<T> weight{a.parameters.gate, a.parameters.wide};
    return gate_transposed<float>(a.gate, weight, a.kernel_size, Window{window, first}, a.channels,
                                  first + i) *
           (1.f / a.pixels);
  }
  SIMT_FN void finish(const float*, int, int) const {}
};

// out[i] = own(i - first) for the block's slice of the columns, the others from their blocks; `all`
// is where they meet, [column].
template <class T, class Own>
SIMT_FN void gather(const Member<T>& m, float* all, float* out, Own own) {
  const int cols = m.chip.cols, first = m.slice_begin(), last = m.slice_end();
  for (int i = first + simt::thread(); i < last; i += m.chip.threads) {
    const float value = own(i - first);
    if (m.chip.blocks == 1)
      out[i] = value;
    else
      simt::store_fresh(all + i, value);
  }
  m.sync();
  if (m.chip.blocks == 1) return;
  for (int i = simt::thread(); i < cols; i += m.chip.threads) out[i] = simt::load_fresh(all + i);
  simt::sync();
}

// The blocks' sums by column become what `axis` makes of them.
template <class T, class Axis>
SIMT_FN void through_columns(const Member<T>& m, const Axis& axis, float* all, float* sums) {
  const OnChip& chip = m.chip;
  const int cols = chip.cols, reach = chip.col_reach, margin = chip.margin(reach);
  const int first = m.slice_begin(), last = m.slice_end();
  float* const partials = m.args.partials + int64_t(m.group()) * chip.blocks * cols;
  simt::sync();
  if (chip.blocks > 1 && !m.in_cluster())
    for (int i = simt::thread(); i < cols; i += chip.threads)
      simt::store_fresh(partials + int64_t(m.rank()) * cols + i, sums[i]);
  m.sync();

  float* const window = m.scratch() + margin;
  const int end = min(cols, last + reach);
  for (int i = max(0, first - reach) + simt::thread(); i < end; i += chip.threads) {
    float sum = 0;
    if (chip.blocks == 1)
      sum = sums[i];
    else
      for (int rank = 0; rank < chip.blocks; rank++)
        sum += m.in_cluster() ? *simt::peer(sums + i, rank)
                              : simt::load_fresh(partials + int64_t(rank) * cols + i);
    const float value = axis.value(sum, m.col_mask()[i]);
    window[i - first] = value;
    if (axis.keep && first <= i && i < last) axis.keep[i] = value;
  }
  simt::sync();
  axis.finish(window, first, last - first);
  gather(m, all, sums, [&](int i) { return axis.at(window, i, first); });
}

// The block's sums by row become what `axis` makes of them. Its values are kept where neighbours
// find them.
template <class T, class Axis>
SIMT_FN void through_rows(const Member<T>& m, const Axis& axis, float* sums) {
  const OnChip& chip = m.chip;
  const int reach = chip.row_reach, margin = chip.margin(reach);
  const int row0 = m.row0(), rows = m.rows();
  simt::sync();
  for (int r = simt::thread(); r < rows; r += chip.threads) {
    const float value = axis.value(sums[r], m.row_mask()[r]);
    if (axis.keep) simt::store_fresh(axis.keep + row0 + r, value);
    sums[r] = value;
    if (reach == 0) sums[r] = axis.at(sums, r, row0);
  }
  if (reach > 0) {
    m.sync();
    float* const window = m.scratch() + margin;
    const int end = min(chip.rows, row0 + rows + margin);
    for (int i = max(0, row0 - margin) + simt::thread(); i < end; i += chip.threads) {
      const int r = i - row0;
      window[r] = 0 <= r && r < rows ? sums[r] : simt::load_fresh(axis.keep + i);
    }
    simt::sync();
    axis.finish(window, row0, rows);
    for (int r = simt::thread(); r < rows; r += chip.threads) sums[r] = axis.at(window, r, row0);
  }
  simt::sync();
}

// An image's share of a map, [image][entry].
template <class A>
SIMT_FN A* of_image(A* maps, int image, int64_t entries) {
  return maps ? maps + simt::opaque(image) * entries : nullptr;
}

// Forward's sums become masks.
template <class T>
SIMT_FN void make_masks(const Member<T>& m, int image, bool rows, bool cols) {
  const Args<float>& a = m.args.call;
  const SpatialMask spatial{a, m.stencil(), of_image(a.channel_mean, image, a.pixels)};
  const ChannelMask<T> channel{a, of_image(a.pooled, image, a.channels)};
  float* const all = of_image(m.args.col_masks, image, m.chip.cols);
  if (rows && m.chip.channels_last) through_rows(m, spatial, m.row_mask());
  if (rows && !m.chip.channels_last) through_rows(m, channel, m.row_mask());
  if (cols && m.chip.channels_last) through_columns(m, channel, all, m.col_mask());
  if (cols && !m.chip.channels_last) through_columns(m, spatial, all, m.col_mask());
}

// Backward's sums become terms of dx.
template <class T>
SIMT_FN void make_terms(const Member<T>& m, int image, bool rows, bool cols) {
  const Args<float>& a = m.args.call;
  const SpatialGradient spatial{
      a,
      m.stencil() + kStencil,
      of_image(m.args.row_gradients, image, m.chip.rows),
      of_image(a.channel_mean, image, a.pixels),
      of_image(a.spatial_parts, image * m.chip.blocks + m.rank(), kSpatialSums),
      m.chip.warps};
  const ChannelGradient<T> channel{a, of_image(a.d_logit, image, a.channels)};
  float* const all = of_image(m.args.col_terms, image, m.chip.cols);
  if (rows && m.chip.channels_last) through_rows(m, spatial, m.row_term());
  if (rows && !m.chip.channels_last) through_rows(m, channel, m.row_term());
  if (cols && m.chip.channels_last) through_columns(m, channel, all, m.col_term());
  if (cols && !m.chip.channels_last) through_columns(m, spatial, all, m.col_term());
}

// Both masks, from the maps that forward saved.
template <class T>
SIMT_FN void recall_masks(const Member<T>& m, int image) {
  const OnChip& chip = m.chip;
  const Args<float>& a = m.args.call;
  const SpatialMask spatial{a, m.stencil(), nullptr};
  const ChannelMask<T> channel{a, nullptr};
  const float* const mean = of_image(a.channel_mean, image, a.pixels);
  const float* const pooled = of_image(a.pooled, image, a.channels);
  const int row0 = m.row0(), rows = m.rows();
  if (chip.row_mask)
    for (int r = simt::thread(); r < rows; r += chip.threads)
      m.row_mask()[r] = chip.channels_last ? spatial.at(mean + row0, r, row0)
                                           : channel.at(pooled + row0, r, row0);
  if (chip.col_mask && chip.channels_last) {
    for (int i = simt::thread(); i < chip.cols; i += chip.threads)
      m.col_mask()[i] = channel.at(pooled, i, 0);
  } else if (chip.col_mask) {
    const int first = m.slice_begin();
    gather(m, of_image(m.args.col_masks, image, chip.cols), m.col_mask(),
           [&](int i) { return spatial.at(mean + first, i, first); });
  }
  simt::sync();
}

}  // namespace da::cuda
