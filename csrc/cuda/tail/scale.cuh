// The residual tail's last passes, from maps by channel and by pixel:
//   out = relu(((u - centre) factor + shift) mask + shortcut), or without shortcut, or with one
//         that goes through a norm, (shortcut - its centre) its factor + its shift
//   du  = (d factor + inner) mask + term outer + (u - centre) slope + offset
// with d the gradient at the ReLU's argument: without a shortcut, made of dout again. The norm's
// scale is in factor, inner and outer; `inner` or else `offset` has the channels' term, which the
// outer mask multiplies or not.
#pragma once

#include "cuda/common/scaling.cuh"
#include "cuda/plan/tail_memory.h"
#include "cuda/portable/masks.cuh"
#include "cuda/tail/norm.cuh"
#include "cuda/tail/relu.cuh"

namespace da::cuda {

// The maps over the tile, in shared memory, in the order in which tail_scale() takes them.
template <class T, TailScale Kind, class A>
SIMT_FN void load_factors(const TailArgs<A>& args, const Tile& tile, const TailMemory<A>& memory) {
  constexpr bool backward = is_backward(Kind);
  const Args<A>& call = args.call;
  const Norm<T> norm{args.norm};
  const int64_t pixel = tile.image * call.pixels + tile.pixel();
  if (call.masks.pixels)
    copy(memory.pixel[0], tile.pixels(), call.spatial_mask + pixel);
  else
    fill(memory.pixel[0], tile.pixels(), A(1));
  if (backward) {
    if (call.masks.pixels)
      copy(memory.pixel[1], tile.pixels(), call.d_channel_mean + pixel);
    else
      fill(memory.pixel[1], tile.pixels(), A(0));
  }
  SIMT_ROLLED
  for (int i = simt::thread(); i < tile.channels(); i += kThreads) {
    const int64_t c = tile.channel() + i, at = tile.image * call.channels + c;
    const A scale = norm.scale(c), k = call.masks.channels ? call.channel_mask[at] : A(1);
    memory.channel[0][i] = norm.centre(c);
    memory.channel[1][i] = scale * k;
    if (!backward) {
      memory.channel[2][i] = norm.shift(c) * k;
      if (Kind == TailScale::normed) {
        const Norm<T> of_shortcut{args.shortcut_norm};
        memory.channel[3][i] = of_shortcut.centre(c);
        memory.channel[4][i] = of_shortcut.scale(c);
        memory.channel[5][i] = of_shortcut.shift(c);
      }
    } else {
      const A term = call.masks.channels ? scale * call.d_pooled[at] : A(0);
      memory.channel[2][i] = call.outer.pixels ? term : A(0);
      memory.channel[3][i] = call.outer.channels ? scale * k : scale;
      memory.channel[4][i] = args.du_slope[c];
      memory.channel[5][i] = args.du_offset[c] + (call.outer.pixels ? A(0) : term);
      if (Kind == TailScale::rectified) memory.channel[6][i] = norm.shift(c) * k;
    }
  }
}

// out or du, over a tile.
template <class T, int E, TailScale Kind, ChannelsAre Are>
SIMT_KERNEL(kThreads, kFewPerSm)
tail_scale(SIMT_PARAM TailArgs<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  using V = Access<T, E>;
  constexpr bool in_rows = Are == ChannelsAre::rows;
  constexpr bool backward = is_backward(Kind), rectified = Kind == TailScale::rectified;
  constexpr int depth = backward ? 2 : 4;
  constexpr int channel_maps = TailMemory<A>::channel_maps(Kind);
  constexpr int pixel_maps = TailMemory<A>::pixel_maps(Kind);
  constexpr int row_maps = in_rows ? channel_maps : pixel_maps;
  constexpr int col_maps = in_rows ? pixel_maps : channel_maps;
  const Args<A>& call = args.call;
  const Tiling& t = call.tiling;
  const TailMemory<A> memory = TailMemory<A>::of_scale(simt::shared(), t, Kind);

  const Tile tile(t, call.first_tile + call.tile_step * simt::block());
  simt::let_next_launch_begin();
  const Lane lane = Lane::of_row<E>(t, tile.col(), tile.cols);
  const int at_once = t.at_once();
  const int64_t stride = at_once * t.cols;
  const int first_row = lane.active ? lane.super_row * t.period + lane.phase : 0;
  const int64_t start =
      (tile.image * t.rows + tile.row() + lane.super_row * t.period) * t.cols + lane.offset;
  // du has no part of u where the norm is frozen, but the sign that the ReLU was given.
  const bool reads_u = Kind != TailScale::backward || args.batch;
  const bool reads_other = backward || args.shortcut;
  const void* const given = rectified ? args.dout : backward ? args.d : args.shortcut;
  const T* u = static_cast<const T*>(call.x) + start;
  const T* other = static_cast<const T*>(reads_other ? given : call.x) + start;
  T* to = static_cast<T*>(args.result) + start;
  // A vector that is not there stays as it was. d is what a launch before has written: it is asked
  // for when that has ended, and past no cache.
  constexpr bool reads_d = Kind == TailScale::backward;
  typename V::Raw raw[depth], raw_other[depth];
  int left = lane.active ? tile.rows - first_row : 0;
  SIMT_UNROLL
  for (int i = 0; i < depth; i++) raw[i] = raw_other[i] = V::zero();
  const auto load_u = [&] {
    SIMT_UNROLL
    for (int i = 0; i < depth; i++) {
      if (reads_u && i * at_once < left) raw[i] = V::load_last(u);
      u += stride;
    }
  };
  const auto load_other = [&] {
    SIMT_UNROLL
    for (int i = 0; i < depth; i++) {
      if (reads_other && i * at_once < left)
        raw_other[i] = reads_d ? V::load(other) : V::load_last(other);
      other += stride;
    }
  };
  load_u();
  simt::wait_for_launch_before();
  load_other();
  load_factors<T, Kind>(args, tile, memory);
  simt::sync();

  const A* row_map[row_maps];
  A col[col_maps][E];
  SIMT_UNROLL
  for (int m = 0; m < row_maps; m++)
    row_map[m] = (in_rows ? memory.channel[m] : memory.pixel[m]) + first_row;
  SIMT_UNROLL
  for (int m = 0; m < col_maps; m++)
    load_columns<E>(in_rows ? memory.pixel[m] : memory.channel[m], lane, col[m]);

  SIMT_ROLLED
  for (int row0 = 0; row0 < tile.rows; row0 += depth * at_once) {
    SIMT_UNROLL
    for (int i = 0; i < depth; i++) {
      if (i * at_once < left) {
        A v[E], d[E], row[row_maps];
        V::unpack(raw[i], v);
        V::unpack(raw_other[i], d);
        SIMT_UNROLL
        for (int m = 0; m < row_maps; m++) row[m] = row_map[m][i * at_once];
        SIMT_UNROLL
        for (int j = 0; j < E; j++) {
          const auto channel = [&](int m) { return in_rows ? row[m] : col[m][j]; };
          const auto pixel = [&](int m) { return in_rows ? col[m][j] : row[m]; };
          const A deviation = v[j] - channel(0);
          if constexpr (backward) {
            if constexpr (rectified) d[j] = passed(d[j], scaled(deviation, channel(1), channel(6)));
            const A dx = (d[j] * channel(1) + channel(2)) * pixel(0) + pixel(1) * channel(3);
            v[j] = dx + channel(5);
            // A frozen norm's slopes are 0, which an infinite u would make no number of.
            if (!rectified || args.batch) v[j] = simt::fma(deviation, channel(4), v[j]);
          } else {
            if constexpr (Kind == TailScale::normed)
              d[j] = scaled(d[j] - channel(3), channel(4), channel(5));
            const A sum = scaled(deviation, channel(1), channel(2)) * pixel(0) + d[j];
            v[j] = sum < 0 ? A(0) : sum;  // a NaN stays one
          }
        }
        V::store(to, v, lane.begin, lane.end);
      }
      to += stride;
    }
    SIMT_UNROLL
    for (int m = 0; m < row_maps; m++) row_map[m] += depth * at_once;
    left -= depth * at_once;
    load_u();
    load_other();
  }
}

}  // namespace da::cuda
