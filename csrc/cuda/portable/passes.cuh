// The portable kernels: one that sums and one that scales, which a schedule's passes call in turn.
// Sums are written by tile and added by tile: no atomics, the same bits in every run.
#pragma once

#include "cuda/common/scaling.cuh"
#include "cuda/portable/masks.cuh"

namespace da::cuda {

// Sums over a tile, by pixel, by channel or both, of x or dy x, weighted by channel and by pixel.
//
// A thread keeps its columns' sums in registers over all rows. Its sum over a row's elements goes
// to shared memory, kDepth rows at a time; then four threads add up the lanes of each row.
template <class T, int E, Sums Kind>
SIMT_KERNEL(kThreads, blocks_per_sm(sizeof(T)) - (Kind == Sums::through && sizeof(T) == 4))
sums(SIMT_PARAM Args<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  using V = Access<T, E>;
  constexpr bool product = Kind == Sums::backward;
  constexpr int depth = product ? kDepth / 2 : kDepth;
  const Tiling& t = args.tiling;
  const Memory<A> memory(simt::shared(), t, args.halo, Kernel::sums);

  const Tile tile(t, args.first_job + simt::block());
  weights_of_sums<T, Kind>(args, tile, memory);
  const A* row_weight = t.channels_last ? memory.pixel_factor : memory.channel_factor;
  const A* col_weight = t.channels_last ? memory.channel_factor : memory.pixel_factor;
  A* const new_row_sums = t.channels_last ? args.new_pixel_sums : args.new_channel_sums;
  A* const new_col_sums = t.channels_last ? args.new_channel_sums : args.new_pixel_sums;

  const Lane lane = Lane::of_row<E>(t, tile.col(), tile.cols);
  const typename V::Raw mask = V::mask(lane.begin, lane.end);
  A weight[E], sum[E];
  SIMT_UNROLL
  for (int j = 0; j < E; j++) {
    weight[j] = lane.active && lane.begin <= j && j < lane.end ? col_weight[lane.col + j] : A(0);
    sum[j] = 0;
  }

  const int at_once = t.at_once();
  const int64_t stride = at_once * t.cols;
  const int first_row = lane.super_row * t.period + lane.phase;
  const int rows = lane.active ? tile.rows : 0;
  const int64_t start =
      (tile.image * t.rows + tile.row() + lane.super_row * t.period) * t.cols + lane.offset;
  const T* x = static_cast<const T*>(args.x) + start;
  const T* dy = static_cast<const T*>(args.dy) + start;
  const int pitch = t.lanes | 1;
  int half = 0;
  SIMT_ROLLED
  for (int row0 = 0; row0 < tile.rows; row0 += depth * at_once) {
    typename V::Raw raw[depth], raw_dy[depth];
    SIMT_UNROLL
    for (int d = 0; d < depth; d++) {
      const bool live = row0 + first_row + d * at_once < rows;
      raw[d] = live ? V::load(x) : V::zero();
      if (product) raw_dy[d] = live ? V::load(dy) : V::zero();
      x += stride;
      dy += stride;
    }
    SIMT_UNROLL
    for (int d = 0; d < depth; d++) {
      const int row = row0 + first_row + d * at_once;
      A value[E];
      V::unpack(V::keep(raw[d], mask), value);
      if (product) {
        A gradient[E];
        V::unpack(V::keep(raw_dy[d], mask), gradient);
        SIMT_UNROLL
        for (int j = 0; j < E; j++) value[j] *= gradient[j];
      }
      if (new_col_sums) {
        const A weight_of_row = row < rows ? row_weight[row] : A(0);
        SIMT_UNROLL
        for (int j = 0; j < E; j++) sum[j] += weight_of_row * value[j];
      }
      if (new_row_sums && lane.segment < at_once) {
        A dot = 0;
        SIMT_UNROLL
        for (int j = 0; j < E; j++) dot += weight[j] * value[j];
        memory.scratch[half + d * kPitch + lane.segment * pitch + lane.index] = dot;
      }
    }
    if (new_row_sums) {
      simt::sync();  // the only one of a round, for the next round writes the other half
      const int jobs = min(depth * at_once, tile.rows - row0), part = simt::thread() % 4;
      SIMT_ROLLED
      for (int job0 = 0; job0 < jobs; job0 += kThreads / 4) {
        const int job = job0 + simt::thread() / 4;  // a row, counted from row0
        const A* of_row = memory.scratch + half + job / at_once * kPitch + job % at_once * pitch;
        A total = 0;
        if (job < jobs)
          for (int i = part; i < t.lanes; i += 4) total += of_row[i];
        total += simt::shuffle_xor(total, 1);
        total += simt::shuffle_xor(total, 2);
        if (part == 0 && job < jobs)
          new_row_sums[(tile.image * t.col_tiles + tile.col_tile) * t.rows + tile.row() + row0 +
                       job] = total;
      }
      half = kDepth * kPitch - half;
    }
  }

  if (new_col_sums) {
    simt::sync();
    if (lane.active) {
      SIMT_UNROLL
      for (int j = 0; j < E; j++)
        if (lane.begin <= j && j < lane.end)
          memory.scratch[lane.segment * t.width + lane.col + j] = sum[j];
    }
    simt::sync();
    SIMT_ROLLED
    for (int i = simt::thread(); i < tile.cols; i += kThreads) {
      A total = 0;
      for (int s = 0; s < at_once; s++) total += memory.scratch[s * t.width + i];
      new_col_sums[(tile.image * t.row_tiles + tile.row_tile) * t.cols + tile.col() + i] = total;
    }
  }
}

// y or dx over a tile.
template <class T, int E, bool Backward>
SIMT_KERNEL(kThreads, blocks_per_sm(sizeof(T)))
scale(SIMT_PARAM Args<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  const Tiling& t = args.tiling;
  const Memory<A> memory(simt::shared(), t, args.halo, Kernel::scale);

  const Tile tile(t, args.first_job + simt::block());
  if (Backward)
    factors_of_dx<T>(args, tile, memory);
  else
    factors_of_y<T>(args, tile, memory);

  const bool by_super_row = t.width == t.cols && t.period > 1;
  const Lane lane = by_super_row ? Lane::of_super_row<E>(t.cols, t.period, t.super_rows)
                                 : Lane::of_row<E>(t, tile.col(), tile.cols);
  const bool rows_are_pixels = t.channels_last;
  const Scaling<T, E, Backward> scaling(
      cuda::outer(args.outer, rows_are_pixels), lane,
      rows_are_pixels ? memory.channel_factor : memory.pixel_factor,
      rows_are_pixels ? memory.channel_term : memory.pixel_term,
      rows_are_pixels ? memory.pixel_factor : memory.channel_factor,
      rows_are_pixels ? memory.pixel_term : memory.channel_term);

  const int at_once = t.at_once();
  const int64_t start =
      (tile.image * t.rows + tile.row() + lane.super_row * t.period) * t.cols + lane.offset;
  scaling.template rows<kDepth>(
      lane, lane.super_row * t.period + lane.phase, lane.active ? tile.rows : 0, at_once,
      at_once * t.cols, static_cast<const T*>(Backward ? args.dy : args.x) + start,
      static_cast<T*>(args.out) + start, [](const T* p) { return Access<T, E>::load_once(p); });
}

}  // namespace da::cuda
