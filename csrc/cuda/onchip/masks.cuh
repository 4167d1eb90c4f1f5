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

// A map as the stencil sees it: its values at the pixels from `pixel` on, and in their halo.
template <class A>
struct Surroundings {
  const A* values;
  uint32_t height, width;  // of the image
  uint32_t row0, col0;     // of the pixel

  SIMT_FN Surroundings(const Args<A>& args, int64_t pixel, const A* values)
      : values(values), height(args.height), width(args.width) {
    row0 = pixel / args.width;
    col0 = pixel % args.width;
  }

  SIMT_FN A centre(int i) const { return values[i]; }

  // visit(value) if the i-th pixel has a neighbour at this tap of the near (step 1) or far (step 3)
  // kernel. A coordinate below zero is a large one.
  template <class Visit>
  SIMT_FN void neighbour(int i, int step, int tap, Visit visit) const {
    const int down = step * (tap / 3 - 1), right = step * (tap % 3 - 1);
    const uint32_t row = row0 + (col0 + i) / width, col = (col0 + i) % width;
    if (row + down < height && col + right < width) visit(values[down * int(width) + i + right]);
  }

  // The sum over all taps of coefficient times value, without the bias.
  SIMT_FN A stencil(int i, const A* coefficients) const {
    A sum = 0;
    for (int kernel = 0; kernel < 2; kernel++) {
      SIMT_UNROLL
      for (int tap = 0; tap < kTaps; tap++)
        neighbour(i, kernel == 0 ? 1 : kReach, tap,
                  [&](A value) { sum += coefficients[kernel * kTaps + tap] * value; });
    }
    return sum;
  }
};

// Calls keep(i, sum) for each of the 19 sums behind the spatial parameters' gradients, over these
// pixels' share: sum_p dz[p] m[p + t] is sum_q m[q] dz[q - t], whose dz is at hand. A warp takes a
// sum at a time.
template <class A, class Keep>
SIMT_FN void spatial_sums(const Surroundings<A>& dz, const A* mean, int pixels, int warps,
                          Keep keep) {
  const int lane = simt::thread() % simt::kWarp;
  for (int part = simt::thread() / simt::kWarp; part < kSpatialSums; part += warps) {
    const int step = part < kTaps ? 1 : kReach, tap = kTaps - 1 - part % kTaps;
    A sum = 0;
    SIMT_ROLLED
    for (int i = lane; i < pixels; i += simt::kWarp) {
      if (part == 2 * kTaps)
        sum += dz.centre(i);
      else
        dz.neighbour(i, step, tap, [&](A value) { sum += mean[i] * value; });
    }
    sum = warp_sum(sum);
    if (lane == 0) keep(part, sum);
  }
}

// The part of a map that a block needs, from channel or pixel `from` on.
struct Window {
  const float* data;
  int64_t from;
  SIMT_FN float operator[](int64_t i) const { return data[i - from]; }
};

// What the stencil sees of a window, which is one piece: window[0] is pixel `first`.
SIMT_FN Surroundings<float> around(const Args<float>& call, int first, const float* window) {
  return {call, first, window};
}

// An axis makes a map of sums. value() is what a sum stands for; `keep`, [image][i], is where
// values are kept, or null. at(window, i, first) is the map's entry `first` + i, made of the values
// around it: window[0] is the value of `first`, and window has all within reach. finish() is called
// once over a block's entries, with the same window.

// The spatial mask s.
struct SpatialMask {
  const Args<float>& call;
  const float* stencil;
  float* keep;

  SIMT_FN float value(float sum, float) const { return sum * (1.f / call.channels); }
  SIMT_FN float at(const float* window, int i, int first) const {
    const Surroundings<float> m = around(call, first, window);
    return sigmoid(m.stencil(i, stencil) + stencil[2 * kTaps]);
  }
  SIMT_FN void finish(const float*, int, int) const {}
};

// The channel mask c.
template <class T>
struct ChannelMask {
  const Args<float>& call;
  float* keep;

  SIMT_FN float value(float sum, float) const { return sum * (1.f / call.pixels); }
  SIMT_FN float at(const float* window, int i, int first) const {
    const Parameter<T> weight{call.parameters.gate, call.wide};
    const Parameter<T> bias{call.parameters.gate_bias, call.wide};
    return sigmoid(gate_logit<float>(call.gate, weight, bias, call.kernel_size,
                                     Window{window, first}, call.channels, first + i));
  }
  SIMT_FN void finish(const float*, int, int) const {}
};

// From ds to dz to the term dm / C; dz also makes the spatial parameters' gradients.
struct SpatialGradient {
  const Args<float>& call;
  const float* stencil;  // the adjoint's
  float* keep;
  const float* mean;  // the image's m
  float* parts;       // the block's share of the 19 spatial sums
  int warps;

  SIMT_FN float value(float sum, float mask) const { return sum * sigmoid_slope(mask); }
  SIMT_FN float at(const float* window, int i, int first) const {
    const Surroundings<float> dz = around(call, first, window);
    return dz.stencil(i, stencil) * (1.f / call.channels);
  }
  SIMT_FN void finish(const float* window, int first, int count) const {
    const Surroundings<float> dz = around(call, first, window);
    spatial_sums(dz, mean + first, count, warps, [&](int part, float sum) { parts[part] = sum; });
  }
};

// From dc to dt to the term dg / P.
template <class T>
struct ChannelGradient {
  const Args<float>& call;
  float* keep;

  SIMT_FN float value(float sum, float mask) const { return sum * sigmoid_slope(mask); }
  SIMT_FN float at(const float* window, int i, int first) const {
    const Parameter<T> weight{call.parameters.gate, call.wide};
    return gate_transposed<float>(call.gate, weight, call.kernel_size, Window{window, first},
                                  call.channels, first + i) *
           (1.f / call.pixels);
  }
  SIMT_FN void finish(const float*, int, int) const {}
};

// out[i] for all columns: own(i - first) for the block's slice, and for the others what their
// blocks make. They meet in `all`, [column].
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

// Turns the blocks' sums by column into what `axis` makes of them.
template <class T, class Axis>
SIMT_FN void through_columns(const Member<T>& m, const Axis& axis, float* all, float* sums) {
  const OnChip& chip = m.chip;
  const int cols = chip.cols, reach = chip.col_reach, margin = chip.margin(reach);
  const int first = m.slice_begin(), last = m.slice_end();
  float* const partials = m.args.partials + int64_t(m.team()) * chip.blocks * cols;
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

// Turns the block's sums by row into what `axis` makes of them. Neighbours find its values where
// they are kept.
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

// An image's share of a map, [image][entry]; null where there is no map.
template <class A>
SIMT_FN A* of_image(A* maps, int image, int64_t entries) {
  return maps ? maps + simt::opaque(image) * entries : nullptr;
}

// Turns forward's sums into masks, in place.
template <class T>
SIMT_FN void make_masks(const Member<T>& m, int image, const Lines& which) {
  const Args<float>& call = m.args.call;
  const SpatialMask spatial{call, m.stencil(), of_image(call.channel_mean, image, call.pixels)};
  const ChannelMask<T> channel{call, of_image(call.pooled, image, call.channels)};
  float* const all = of_image(m.args.col_masks, image, m.chip.cols);
  const bool rows = which.rows, cols = which.cols;
  if (rows && m.chip.channels_last) through_rows(m, spatial, m.row_mask());
  if (rows && !m.chip.channels_last) through_rows(m, channel, m.row_mask());
  if (cols && m.chip.channels_last) through_columns(m, channel, all, m.col_mask());
  if (cols && !m.chip.channels_last) through_columns(m, spatial, all, m.col_mask());
}

// Turns backward's sums into terms of dx, in place.
template <class T>
SIMT_FN void make_terms(const Member<T>& m, int image, const Lines& which) {
  const Args<float>& call = m.args.call;
  const SpatialGradient spatial{
      call,
      m.stencil() + kStencil,
      of_image(m.args.row_gradients, image, m.chip.rows),
      of_image(call.channel_mean, image, call.pixels),
      of_image(call.spatial_parts, image * m.chip.blocks + m.rank(), kSpatialSums),
      m.chip.warps};
  const ChannelGradient<T> channel{call, of_image(call.d_logit, image, call.channels)};
  float* const all = of_image(m.args.col_terms, image, m.chip.cols);
  const bool rows = which.rows, cols = which.cols;
  if (rows && m.chip.channels_last) through_rows(m, spatial, m.row_term());
  if (rows && !m.chip.channels_last) through_rows(m, channel, m.row_term());
  if (cols && m.chip.channels_last) through_columns(m, channel, all, m.col_term());
  if (cols && !m.chip.channels_last) through_columns(m, spatial, all, m.col_term());
}

// Makes both masks anew, from the maps that forward saved.
template <class T>
SIMT_FN void recall_masks(const Member<T>& m, int image) {
  const OnChip& chip = m.chip;
  const Args<float>& call = m.args.call;
  const SpatialMask spatial{call, m.stencil(), nullptr};
  const ChannelMask<T> channel{call, nullptr};
  const float* const mean = of_image(call.channel_mean, image, call.pixels);
  const float* const pooled = of_image(call.pooled, image, call.channels);
  const int row0 = m.row0(), rows = m.rows();
  if (chip.masks.rows)
    for (int r = simt::thread(); r < rows; r += chip.threads)
      m.row_mask()[r] = chip.channels_last ? spatial.at(mean + row0, r, row0)
                                           : channel.at(pooled + row0, r, row0);
  if (chip.masks.cols && chip.channels_last) {
    for (int i = simt::thread(); i < chip.cols; i += chip.threads)
      m.col_mask()[i] = channel.at(pooled, i, 0);
  } else if (chip.masks.cols) {
    const int first = m.slice_begin();
    gather(m, of_image(m.args.col_masks, image, chip.cols), m.col_mask(),
           [&](int i) { return spatial.at(mean + first, i, first); });
  }
  simt::sync();
}

}  // namespace da::cuda
