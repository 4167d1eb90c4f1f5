// The portable kernels: one that sums and one that scales, which a schedule's passes call in turn.
// Sums are written by tile and added by tile: no atomics, the same bits in every run.
#pragma once

#include "cuda/common/finish.cuh"
#include "cuda/common/scaling.cuh"
#include "cuda/portable/masks.cuh"

namespace da::cuda {

// Sums over a tile, by pixel, by channel or both, of x or dy x, weighted by channel and by pixel.
//
// A thread keeps its columns' sums in registers over all rows. Its sum over a row's elements goes
// to shared memory, kDepth rows at a time; then four threads add up the lanes of each row.
template <class T, int E, Sums Kind, Adds What, Fit How>
SIMT_KERNEL(kThreads, blocks_per_sm(sizeof(T)))
sums(SIMT_PARAM Args<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  using V = Access<T, E>;
  constexpr bool product = Kind == Sums::backward, whole = How == Fit::whole;
  constexpr int depth = product ? kDepth / 2 : kDepth;
  const Tiling& t = args.tiling;
  const Memory<A> memory(simt::shared(), t, args.halo, Kernel::sums);

  const Tile tile(t, args.first_tile + args.tile_step * simt::block());
  simt::let_next_launch_begin();
  A* const new_row_sums = t.by_pixel ? args.new_pixel_sums : args.new_channel_sums;
  A* const new_col_sums = t.by_pixel ? args.new_channel_sums : args.new_pixel_sums;
  const bool adds_rows = What == Adds::rows || (What == Adds::any && new_row_sums);
  const bool adds_cols = What == Adds::cols || (What == Adds::any && new_col_sums);
  Lane lane = Lane::of_row<E, How>(t, tile.col(), tile.cols);
  // Kept in registers where these suffice, and not computed anew.
  const auto kept = [](int value) { return Kind == Sums::forward ? simt::opaque(value) : value; };
  lane.segment = kept(lane.segment);
  lane.index = kept(lane.index);

  // Arguments take no registers. Where registers suffice, at_once and the stride are there.
  constexpr bool few = !whole && Kind != Sums::through;
  const int at_once = few ? t.at_once() : simt::opaque(t.at_once());
  const int64_t stride = few || product ? t.stride : at_once * t.cols;
  const int first_row = lane.active ? lane.super_row * t.period + lane.phase : 0;
  const int64_t start =
      (tile.image * t.rows + tile.row() + lane.super_row * t.period) * t.cols + lane.offset;
  const T* x = static_cast<const T*>(args.x) + start;
  const T* dy = static_cast<const T*>(args.dy) + start;
  // A thread's vectors of the rows that the block reads before it syncs, and of its rows how many
  // are left: the next round's are on their way while the sums of this one are added up, the first
  // one's while the weights are made. A vector that is not there stays as it was.
  typename V::Raw raw[depth], raw_dy[depth];
  int left = lane.active ? tile.rows - first_row : 0;
  SIMT_UNROLL
  for (int d = 0; d < depth; d++) raw[d] = raw_dy[d] = V::zero();
  const auto load = [&] {
    SIMT_UNROLL
    for (int d = 0; d < depth; d++) {
      if (d * at_once < left) {
        raw[d] = V::load(x);
        if (product) raw_dy[d] = V::load(dy);
      }
      x += stride;
      dy += stride;
    }
  };
  bool asked = false;
  const auto ask = [&] {
    if (!asked) load();
    asked = true;
  };
  // Before the launch before has ended, or else when maps have been read. For some kernels
  // registers suffice for one of the two only.
  constexpr bool always = product && (sizeof(T) == 4 || (sizeof(T) == 2 && !whole));
  constexpr bool never = Kind == Sums::through && What == Adds::rows;
  if (always || (simt::kEarlyLaunches && !never)) ask();
  simt::wait_for_launch_before();
  if (product && args.first_job == 0 && simt::block() == 0)  // for the launches to come
    for (int i = simt::thread(); i < args.counter_count; i += kThreads) args.counters[i] = 0;

  // Sums of both kinds, forward, are those of an order's first pass.
  constexpr bool weighted = Kind != Sums::forward || What != Adds::any || !kSpecialised<T, E>;
  const A* const pixels = weighted ? pixel_weights<T, Kind>(args, tile, memory, ask) : nullptr;
  const A* const channels = weighted ? channel_weights<T, Kind>(args, tile, memory, ask) : nullptr;
  ask();
  const A* const row_map = t.by_pixel ? pixels : channels;
  const A* const col_map = t.by_pixel ? channels : pixels;
  A* const row_weights = t.by_pixel ? memory.pixel_factor : memory.channel_factor;
  if (adds_cols) {
    if (!row_map)
      fill(row_weights, tile.rows, A(1));
    else if (row_map != row_weights)
      copy(row_weights, tile.rows, row_map);
  }
  simt::sync();

  const typename V::Raw mask = V::mask(lane.begin, lane.end);
  const A* row_weight = row_weights + first_row;
  A weight[E], sum[E];
  SIMT_UNROLL
  for (int j = 0; j < E; j++) weight[j] = sum[j] = 0;
  if (adds_rows) load_columns<E>(col_map, lane, weight);

  const int pitch = t.lanes | 1;
  // The first of the rows that this thread helps to add up, and where a later one lies.
  const int part = simt::thread() % 4, helped = simt::thread() / 4;
  const int first_turn = t.by_at_once.quotient(helped);
  const int first_segment = helped - first_turn * at_once;
  A* const out = new_row_sums + (tile.image * t.col_tiles + tile.col_tile) * t.rows + tile.row();
  // Both move from round to round between the halves of the scratch memory. Pointers that move stay
  // in registers; addresses that do not are computed anew for every vector.
  A* mine = memory.scratch + lane.segment * pitch + lane.index;
  const A* others = memory.scratch + part;
  int to_other_half = kDepth * kPitch;

  // Adds up a round, the rows from row0 on; `full`: all of them are there.
  const auto round = [&](int row0, auto full) {
    SIMT_UNROLL
    for (int d = 0; d < depth; d++) {
      A value[E];
      V::unpack(whole ? raw[d] : V::keep(raw[d], mask), value);
      if (product) {
        A gradient[E];
        V::unpack(whole ? raw_dy[d] : V::keep(raw_dy[d], mask), gradient);
        SIMT_UNROLL
        for (int j = 0; j < E; j++) value[j] *= gradient[j];
      }
      if (adds_cols) {
        if (full || d * at_once < left) {
          const A weight_of_row = row_weight[d * at_once];
          SIMT_UNROLL
          for (int j = 0; j < E; j++) sum[j] += weight_of_row * value[j];
        }
      }
      if (adds_rows) {
        A dot = 0;
        SIMT_UNROLL
        for (int j = 0; j < E; j++) dot += weight[j] * value[j];
        if (lane.segment < at_once) mine[d * kPitch] = dot;
      }
    }
    row_weight += depth * at_once;
    left -= depth * at_once;
    load();
    if (adds_rows) {
      simt::sync();  // the only one of a round, for the next round writes the other half
      const int rows = min(depth * at_once, tile.rows - row0);
      int row = helped, turn = first_turn, segment = first_segment;
      SIMT_ROLLED
      do {
        const A* of_row = others + turn * kPitch + segment * pitch;
        A total = 0;
        every_fourth(row < rows ? t.lanes - part : 0, [&](int i) { total += of_row[i]; });
        total += simt::shuffle_xor(total, 1);
        total += simt::shuffle_xor(total, 2);
        if (part == 0 && row < rows) out[row0 + row] = total;
        row += kThreads / 4, turn += t.turns, segment += t.segments;
        if (segment >= at_once) turn++, segment -= at_once;
      } while (row - helped < rows);
      mine += to_other_half, others += to_other_half;
      to_other_half = -to_other_half;
    }
  };
  int row0 = 0;
  if (What == Adds::cols) {
    SIMT_ROLLED
    for (; row0 + depth * at_once <= tile.rows; row0 += depth * at_once)
      round(row0, std::true_type());
    if (row0 < tile.rows) round(row0, std::false_type());
  } else {
    SIMT_ROLLED
    for (; row0 < tile.rows; row0 += depth * at_once) round(row0, std::false_type());
  }

  if (adds_cols) {
    simt::sync();
    if (lane.active) {
      SIMT_UNROLL
      for (int j = 0; j < E; j++)
        if (whole || (lane.begin <= j && j < lane.end))
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

// Blocks of a multiprocessor: one less where a GPU has no bfloat16, and registers round instead.
template <class T, bool Backward, Fit How>
constexpr int scale_blocks() {
  const bool rounds = std::is_same_v<T, simt::bfloat16> && !simt::kRoundsBfloat16;
  return blocks_per_sm(sizeof(T)) - (rounds && Backward && How == Fit::split);
}

// The gradients at the gate's logits: kept by an earlier launch, or made by this one's blocks, each
// for its tile, and here once more.
template <class A>
struct GateGradients {
  const Args<A>& args;

  struct OfImage {
    bool kept;
    const A* values;
    LogitGradient<A, true> made;
    SIMT_FN A operator[](int64_t c) const { return kept ? values[c] : made[c]; }
  };
  SIMT_FN OfImage operator()(int64_t n) const {
    return {
        !args.pending.channels, args.d_logit + n * args.channels,
        LogitGradient<A, true>(args.channel_sums, args.more_channel_sums, n, args.channel_mask)};
  }
};

// y or dx over a tile. Whether it is this block that is to make the spatial parameters' gradients.
template <class T, int E, bool Backward, Fit How>
SIMT_FN bool scale_tile(const Args<accumulate_t<T>>& args) {
  using A = accumulate_t<T>;
  const Tiling& t = args.tiling;
  const Memory<A> memory(simt::shared(), t, args.halo, Kernel::scale);

  const Tile tile(t, args.first_tile + args.tile_step * simt::block());
  simt::let_next_launch_begin();
  const bool by_super_row = How == Fit::split && t.width == t.cols && t.period > 1;
  const Lane lane = by_super_row ? Lane::of_super_row<E>(t.cols, t.period, t.super_rows)
                                 : Lane::of_row<E, How>(t, tile.col(), tile.cols);
  const int at_once = How == Fit::whole ? simt::opaque(t.at_once()) : t.at_once();
  const int64_t stride = t.stride;
  const int64_t start =
      (tile.image * t.rows + tile.row() + lane.super_row * t.period) * t.cols + lane.offset;
  const int first_row = lane.super_row * t.period + lane.phase, rows = lane.active ? tile.rows : 0;
  const auto load = [](const T* p) { return Access<T, E>::load_last(p); };
  const T* const in = static_cast<const T*>(Backward ? args.dy : args.x);
  // The first vectors are on their way while the factors are made, if registers suffice for both.
  constexpr bool ahead = !Backward || (How == Fit::whole && simt::kIsHalf<T> && simt::kArch != 75);
  Vectors<T, E, kDepth> vectors(in + start);
  if (ahead) vectors.ask(stride, load, [&](int d) { return first_row + d * at_once < rows; });
  simt::wait_for_launch_before();

  const ReadyFactors<Backward, A> ready(args, tile, memory);
  constexpr bool held = !Backward;  // in registers, which do not suffice for these as well
  if (!held) ready.end();
  pixel_factors<T, Backward>(args, tile, memory);
  channel_factors<T, Backward>(args, tile, memory);
  if (held) ready.end();
  simt::sync();
  // The last to count knows all others' spatial sums to be there.
  const bool counts = Backward && args.last_finishes;
  A& last = *memory.last;
  if (counts && simt::thread() == 0)
    last = simt::fetch_add(args.counters, 1u) + 1 == simt::blocks() - args.extra;
  const bool rows_are_pixels = t.by_pixel;
  // Found anew where registers do not suffice to keep its addresses while the factors are made.
  const Memory<A> made(simt::shared() + (Backward ? simt::opaque(0) : 0), t, args.halo,
                       Kernel::scale);
  const Scaling<T, E, Backward> scaling(cuda::outer(args.outer, rows_are_pixels), lane,
                                        rows_are_pixels ? made.channel_factor : made.pixel_factor,
                                        rows_are_pixels ? made.channel_term : made.pixel_term,
                                        rows_are_pixels ? made.pixel_factor : made.channel_factor,
                                        rows_are_pixels ? made.pixel_term : made.channel_term);
  T* const out = static_cast<T*>(args.out);
  if constexpr (ahead) {
    // These values are computed anew later, which keeps registers free while the factors are made.
    const int64_t first = vectors.next - in - kDepth * stride;
    scaling.template rows_from<kDepth, How>(vectors, lane, first_row, rows, at_once, stride,
                                            out + first, load);
  } else {
    scaling.template rows<kDepth, How>(lane, first_row, rows, at_once, stride, in + start,
                                       out + start, load);
  }
  if (!counts) return false;
  simt::sync();
  return last != 0;
}

// y or dx over a tile; and backward the parameters' gradients, by blocks that have no tile.
template <class T, int E, bool Backward, Fit How>
SIMT_KERNEL(kThreads, (scale_blocks<T, Backward, How>()))
scale(SIMT_PARAM Args<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  const int64_t job = args.first_job + simt::block() - args.images * args.tiling.tiles();
  bool finishes;
  if (!Backward || job < 0) {
    finishes = scale_tile<T, E, Backward, How>(args);
  } else {
    simt::let_next_launch_begin();
    simt::wait_for_launch_before();
    finishes = is_spatial(args, job);
    double* const sums = SmallMemory(simt::shared()).sums;
    if (!finishes) finish_gate<T>(args, job, GateGradients<A>{args}, sums);
  }
  if constexpr (Backward)
    if (finishes) finish_spatial<T>(args, SmallMemory(simt::shared()).sums);
}

}  // namespace da::cuda
