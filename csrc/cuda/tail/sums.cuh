// The residual tail's passes that add up, see TailSums. u is centred where it is read, so that no
// sum of it loses what a large mean would drown. Sums are written by tile and added by tile: no
// atomics, the same bits in every run.
#pragma once

#include "cuda/common/tile.cuh"
#include "cuda/plan/tail_memory.h"
#include "cuda/portable/masks.cuh"
#include "cuda/tail/norm.cuh"
#include "cuda/tail/relu.cuh"

namespace da::cuda {

// A number near a channel's mean over the tile: the mean of a few of its pixels, without the
// smallest and the largest, for one that is far from all others would cost the sums precision.
template <class T>
SIMT_FN accumulate_t<T> local_centre(const T* first, int64_t stride, int pixels) {
  using A = accumulate_t<T>;
  constexpr int kSamples = 8;
  A least = simt::to<A>(*first), most = least, sum = least;
  SIMT_UNROLL
  for (int i = 1; i < kSamples; i++) {
    const A sample = simt::to<A>(first[i * pixels / kSamples * stride]);
    least = min(least, sample), most = max(most, sample), sum += sample;
  }
  return (sum - least - most) / (kSamples - 2);
}

// One of a channel's numbers, from which all tiles' means are counted: where these are large, their
// differences would be lost to rounding.
template <class T, class A>
SIMT_FN A datum(const Args<A>& call, int64_t c) {
  return simt::to<A>(static_cast<const T*>(call.x)[call.tiling.by_pixel ? c : c * call.pixels]);
}

// Mean and sum of squared deviations of so many numbers, from the sums of their deviations from
// `centre` and of these deviations' squares.
template <class A>
struct Moment {
  A mean, squares;
  SIMT_FN Moment(A centre, A sum, A sum_of_squares, int count)
      : mean(centre + sum / count), squares(sum_of_squares - sum / count * sum) {}
};

// The maps by channel and by pixel that a pass needs, over its tile in shared memory.
template <class T, TailSums Kind, class A>
SIMT_FN void load_maps(const TailArgs<A>& args, const Tile& tile, const TailMemory<A>& memory) {
  const Args<A>& call = args.call;
  const bool terms = args.maps == Maps::terms;
  if constexpr (Kind == TailSums::moments) {
    const T* const first = static_cast<const T*>(call.x) +
                           tile.image * call.channels * call.pixels +
                           tile.row() * tile.tiling.cols + tile.col();
    const int64_t along = tile.tiling.cols;
    for (int i = simt::thread(); i < tile.channels(); i += kThreads) {
      const A centre = tile.tiling.by_pixel ? local_centre(first + i, along, tile.pixels())
                                            : local_centre(first + i * along, 1, tile.pixels());
      memory.channel[0][i] = centre;
      memory.channel[1][i] = centre - datum<T>(call, tile.channel() + i);
    }
  } else {
    const Norm<T> norm{args.norm};
    const A* const by_channel = terms ? call.d_pooled : call.channel_mask;
    const bool factor = terms || call.weights.channels;
    for (int i = simt::thread(); i < tile.channels(); i += kThreads) {
      const int64_t c = tile.channel() + i;
      memory.channel[0][i] = norm.centre(c);
      if (Kind != TailSums::rectified && !call.new_pixel_sums) continue;
      const A k = factor ? by_channel[tile.image * call.channels + c] : A(1);
      memory.channel[1][i] = norm.scale(c) * k;
      if (Kind != TailSums::deviations) memory.channel[2][i] = norm.shift(c) * k;
    }
    if (!call.new_channel_sums) return;
    const A* const by_pixel = terms ? call.d_channel_mean : call.spatial_mask;
    if (terms || call.weights.pixels)
      copy(memory.pixel[0], tile.pixels(), by_pixel + tile.image * call.pixels + tile.pixel());
    else
      fill(memory.pixel[0], tile.pixels(), A(1));
  }
}

// Blocks of a multiprocessor: one less where a GPU has no bfloat16, and registers round d instead.
template <class T, TailSums Kind>
constexpr int tail_sums_blocks() {
  const bool rounds = std::is_same_v<T, simt::bfloat16> && !simt::kRoundsBfloat16;
  return tail_per_sm(Kind, sizeof(T)) - (rounds && Kind == TailSums::gradients);
}

// Sums over a tile:
//   moments     by channel, of u - a number near its mean, and squared; written as Moment
//   deviations  by channel, of mask (u - centre); by pixel, of channel weight (u - centre)
//   gradients   by channel, of mask d and of mask d (u - centre); by pixel, of d x channel mask;
//               and d itself, dout where out is not 0
//   rectified   the same sums, of dout where x is not below 0
//
// A thread keeps its columns' sums in registers over all rows. Its sums over a row's elements go to
// shared memory, a round of rows at a time; then four threads add up the lanes of each row.
template <class T, int E, TailSums Kind, ChannelsAre Are>
SIMT_KERNEL(kThreads, (tail_sums_blocks<T, Kind>()))
tail_sums(SIMT_PARAM TailArgs<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  using V = Access<T, E>;
  constexpr bool moments = Kind == TailSums::moments, rectified = Kind == TailSums::rectified;
  constexpr bool writes_d = Kind == TailSums::gradients, gradients = writes_d || rectified;
  constexpr bool in_rows = Are == ChannelsAre::rows;
  constexpr int depth = tail_depth(Kind);
  constexpr int by_channel = Kind == TailSums::deviations ? 1 : 2;
  constexpr int by_row = in_rows ? by_channel : 1;
  const Args<A>& call = args.call;
  const Tiling& t = call.tiling;
  const TailMemory<A> memory = TailMemory<A>::of_sums(simt::shared(), t, Kind);

  const Tile tile(t, call.first_tile + call.tile_step * simt::block());
  simt::let_next_launch_begin();
  const bool adds_channels = Kind != TailSums::deviations || call.new_channel_sums;
  const bool adds_pixels = !moments && call.new_pixel_sums;
  const bool adds_rows = in_rows ? adds_channels : adds_pixels;
  const bool adds_cols = in_rows ? adds_pixels : adds_channels;
  const Lane lane = Lane::of_row<E>(t, tile.col(), tile.cols);

  const int at_once = t.at_once();
  const int64_t stride = at_once * t.cols;
  const int first_row = lane.active ? lane.super_row * t.period + lane.phase : 0;
  const int64_t start =
      (tile.image * t.rows + tile.row() + lane.super_row * t.period) * t.cols + lane.offset;
  const T* const u = static_cast<const T*>(call.x);
  const T* const out = static_cast<const T*>(args.out);
  const T* const dout = static_cast<const T*>(args.dout);
  // Where the next vectors are to be asked for and used: a pointer for each tensor would take more
  // registers than there are.
  int64_t asked = start, used = start;
  // A thread's vectors of the rows that the block reads before it syncs, and of its rows how many
  // are left: the next round's are on their way while the sums of this one are added up, the first
  // one's while the maps are loaded. A vector that is not there stays as it was.
  typename V::Raw raw[depth], raw_out[depth], raw_dout[depth];
  int left = lane.active ? tile.rows - first_row : 0;
  SIMT_UNROLL
  for (int d = 0; d < depth; d++) raw[d] = raw_out[d] = raw_dout[d] = V::zero();
  const auto load = [&] {
    SIMT_UNROLL
    for (int d = 0; d < depth; d++) {
      if (d * at_once < left) {
        raw[d] = V::load(u + asked);
        if (writes_d) raw_out[d] = V::load_once(out + asked);
        if (gradients) raw_dout[d] = V::load_once(dout + asked);
      }
      asked += stride;
    }
  };
  load();
  simt::wait_for_launch_before();
  load_maps<T, Kind>(args, tile, memory);
  simt::sync();

  const typename V::Raw mask = V::mask(lane.begin, lane.end);
  // At the thread's columns: weights of a row's elements, 0 where these are not the thread's; the
  // maps of channels; sums.
  A weight[E], centre[E], scale[E], shift[E], sum[2][E];
  SIMT_UNROLL
  for (int j = 0; j < E; j++)
    weight[j] = centre[j] = scale[j] = shift[j] = sum[0][j] = sum[1][j] = 0;
  if (in_rows) {
    if (adds_channels) load_columns<E>(moments ? nullptr : memory.pixel[0], lane, weight);
  } else {
    load_columns<E>(memory.channel[0], lane, centre);
    if (rectified || adds_pixels) {
      load_columns<E>(memory.channel[1], lane, scale);
      if (gradients) load_columns<E>(memory.channel[2], lane, shift);
    }
  }
  // The maps of rows. Pointers that move stay in registers.
  const A* row_centre = memory.channel[0] + first_row;
  const A* row_scale = memory.channel[1] + first_row;
  const A* row_shift = memory.channel[2] + first_row;
  const A* row_mask = memory.pixel[0] + first_row;

  const int pitch = t.lanes | 1;
  // The first of the rows that this thread helps to add up, and where a later one lies.
  const int part = simt::thread() % 4, helped = simt::thread() / 4;
  // To divide anew takes fewer instructions than to read the quotients from the plan.
  const int first_turn = helped / at_once, first_segment = helped % at_once;
  const int turns = kThreads / 4 / at_once, segments = kThreads / 4 % at_once;
  const int64_t of_rows = (tile.image * t.col_tiles + tile.col_tile) * t.rows + tile.row();
  A* const row_sums = (in_rows ? call.new_channel_sums : call.new_pixel_sums) + of_rows;
  A* const row_products = args.new_products + of_rows;
  // Both move from round to round between the halves of the scratch memory.
  A* mine = memory.scratch + lane.segment * pitch + lane.index;
  const A* others = memory.scratch + part;
  int to_other_half = by_row * depth * kPitch;

  // Adds up a round, the rows from row0 on; `full`: all of them are there.
  const auto round = [&](int row0, auto full) {
    SIMT_UNROLL
    for (int d = 0; d < depth; d++) {
      A dot[2] = {0, 0};
      if (full || d * at_once < left) {
        const int row = d * at_once;
        A v[E], g[E];
        V::unpack(V::keep(raw[d], mask), v);
        if (writes_d) {
          A of_relu[E];
          V::unpack(V::keep(raw_out[d], mask), of_relu);
          V::unpack(raw_dout[d], g);
          SIMT_UNROLL
          for (int j = 0; j < E; j++) g[j] = passed(g[j], of_relu[j]);
          V::store(static_cast<T*>(args.d) + used, g, lane.begin, lane.end);
        }
        const A of_row = in_rows ? row_centre[row] : A(0);
        SIMT_UNROLL
        for (int j = 0; j < E; j++) v[j] -= in_rows ? of_row : centre[j];
        const bool scales = rectified || adds_pixels;
        const A scale_of_row = in_rows && scales ? row_scale[row] : A(0);
        const A shift_of_row = in_rows && gradients && scales ? row_shift[row] : A(0);
        const auto x = [&](int j) {
          return scaled(v[j], in_rows ? scale_of_row : scale[j], in_rows ? shift_of_row : shift[j]);
        };
        if (rectified) {
          V::unpack(V::keep(raw_dout[d], mask), g);
          SIMT_UNROLL
          for (int j = 0; j < E; j++) g[j] = passed(g[j], x(j));
        }
        if (adds_channels) {
          const A mask_of_row = in_rows || moments ? A(1) : row_mask[row];
          SIMT_UNROLL
          for (int j = 0; j < E; j++) {
            const A w = in_rows ? weight[j] : mask_of_row;
            const A first = gradients ? w * g[j] : w * v[j];
            A& to = in_rows ? dot[0] : sum[0][j];
            A& product = in_rows ? dot[1] : sum[1][j];
            to += first;
            if (by_channel == 2) product += first * v[j];
          }
        }
        if (adds_pixels) {
          SIMT_UNROLL
          for (int j = 0; j < E; j++) {
            A& to = in_rows ? sum[0][j] : dot[0];
            to += gradients ? g[j] * x(j) : v[j] * (in_rows ? scale_of_row : scale[j]);
          }
        }
      }
      used += stride;
      if (adds_rows && lane.segment < at_once) {
        SIMT_UNROLL
        for (int i = 0; i < by_row; i++) mine[(i * depth + d) * kPitch] = dot[i];
      }
    }
    row_centre += depth * at_once, row_scale += depth * at_once;
    row_shift += depth * at_once, row_mask += depth * at_once;
    left -= depth * at_once;
    load();
    if (adds_rows) {
      simt::sync();  // the only one of a round, for the next round writes the other half
      const int rows = min(depth * at_once, tile.rows - row0);
      int row = helped, turn = first_turn, segment = first_segment;
      SIMT_ROLLED
      do {
        A total[2] = {0, 0};
        const A* const of_row = others + turn * kPitch + segment * pitch;
        every_fourth(row < rows ? t.lanes - part : 0, [&](int i) {
          total[0] += of_row[i];
          if (by_row == 2) total[1] += of_row[depth * kPitch + i];
        });
        SIMT_UNROLL
        for (int i = 0; i < by_row; i++) {
          total[i] += simt::shuffle_xor(total[i], 1);
          total[i] += simt::shuffle_xor(total[i], 2);
        }
        if (part == 0 && row < rows) {
          if constexpr (moments && in_rows) {
            const Moment<A> m(memory.channel[1][row0 + row], total[0], total[1], tile.cols);
            row_sums[row0 + row] = m.mean, row_products[row0 + row] = m.squares;
          } else {
            row_sums[row0 + row] = total[0];
            if constexpr (by_row == 2) row_products[row0 + row] = total[1];
          }
        }
        row += kThreads / 4, turn += turns, segment += segments;
        if (segment >= at_once) turn++, segment -= at_once;
      } while (row - helped < rows);
      mine += to_other_half, others += to_other_half;
      to_other_half = -to_other_half;
    }
  };
  SIMT_ROLLED
  for (int row0 = 0; row0 < tile.rows; row0 += depth * at_once) round(row0, std::false_type());

  if (!adds_cols) return;
  const int64_t of_cols = (tile.image * t.row_tiles + tile.row_tile) * t.cols + tile.col();
  A* const col_sums = (in_rows ? call.new_pixel_sums : call.new_channel_sums) + of_cols;
  A* const col_products = args.new_products + of_cols;
  SIMT_UNROLL
  for (int i = 0; i < (in_rows ? 1 : by_channel); i++) {
    simt::sync();
    if (lane.active) {
      SIMT_UNROLL
      for (int j = 0; j < E; j++)
        if (lane.begin <= j && j < lane.end)
          memory.scratch[lane.segment * t.width + lane.col + j] = sum[i][j];
    }
    simt::sync();
    SIMT_ROLLED
    for (int col = simt::thread(); col < tile.cols; col += kThreads) {
      A total = 0;
      for (int s = 0; s < at_once; s++) total += memory.scratch[s * t.width + col];
      if (!moments) {
        (i == 0 ? col_sums : col_products)[col] = total;
      } else if (i == 0) {
        memory.channel[2][col] = total;
      } else {
        const Moment<A> m(memory.channel[1][col], memory.channel[2][col], total, tile.rows);
        col_sums[col] = m.mean, col_products[col] = m.squares;
      }
    }
  }
}

}  // namespace da::cuda
