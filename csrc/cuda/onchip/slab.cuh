// A block's slab of an image: how it is added up, and leaves as y or dx.
//
// Threads lie over rows as in the portable passes, a vector each, and keep the sums of their
// columns in registers. A row's sum goes over its lanes by shuffles, four rows at a time, which
// takes six steps instead of twenty: two lanes exchange two sums of the four that they hold, then
// two others one of the two that are left, and what is then a lane's own goes over the remaining
// lanes:
//
//   rows      0 1 2 3     lanes 16 apart     0 1          8 apart     0        8/2 = 4, 2, 1 apart
//   lane i    x x x x   ----------------->   x x    --------------->  x ------------------------>
#pragma once

#include "cuda/common/masks.cuh"
#include "cuda/common/scaling.cuh"
#include "cuda/onchip/chunks.cuh"

namespace da::cuda {

// Adds up each of the values over the lanes of a row. Each lane ends up with one of the sums: the
// first lanes with that of value[0], and so on.
SIMT_FN float sum_over_lanes(const float (&value)[kChipRows], int lanes) {
  static_assert(kChipRows == 4, "");
  const auto exchange = [](float low, float high, int apart) {
    const bool upper = simt::thread() & apart;
    return (upper ? high : low) + simt::shuffle_xor(upper ? low : high, apart);
  };
  const float even = exchange(value[0], value[2], lanes / 2);
  const float odd = exchange(value[1], value[3], lanes / 2);
  float sum = exchange(even, odd, lanes / 4);
  SIMT_ROLLED
  for (int step = lanes / 8; step > 0; step /= 2) sum += simt::shuffle_xor(sum, step);
  return sum;
}

// A sweep over the slab adds up rows with the columns' weights and columns with the rows'. The sums
// end up where masks or terms are made of them in place:
//
//   forward    x, weighted with the other mask if there is one yet   -> masks
//   backward   dy x, weighted with the masks                         -> terms
//   through    x, weighted with the terms                            -> terms, added to those there
//
// Here is a thread's share of one over columns that the block spans at once.
template <class T, Sums Kind>
struct Tally {
  static constexpr int E = simt::kPerVector<T>;
  using V = Access<T, E>;
  static constexpr bool product = Kind == Sums::backward;
  const Member<T>& m;
  const bool weighted;      // or else all weights are 1
  typename V::Raw mask;     // the vector's bits that are the thread's, none if it has no vector
  float weight[E], sum[E];  // of the thread's columns
  unsigned place;           // bytes from the first row that the block adds up at once to the vector
  int row;                  // the thread's row among these,
  int summed;               // and the one among those of a round whose sum it ends up with
  static constexpr unsigned kNowhere = ~0u;

  static SIMT_FN float* row_weights(const Member<T>& m) {
    return Kind == Sums::through ? m.row_term() : m.row_mask();
  }
  static SIMT_FN float* row_sums(const Member<T>& m) {
    return Kind == Sums::forward ? m.row_mask() : m.row_term();
  }
  static SIMT_FN float* col_weights(const Member<T>& m, int tile) {
    return (Kind == Sums::through ? m.col_term() : m.col_mask()) + tile * m.chip.width;
  }
  SIMT_FN Tally(const Member<T>& m, int step, int tile)
      : m(m), weighted(Kind != Sums::forward || step > 0) {
    const Lane lane = m.lane_of_row(tile);
    const int begin = lane.active ? lane.begin : 0, end = lane.active ? lane.end : 0;
    mask = V::mask(begin, end);
    SIMT_UNROLL
    for (int j = 0; j < E; j++) {
      weight[j] = begin <= j && j < end ? 1.f : 0.f;
      sum[j] = 0;
    }
    if (weighted) load_columns<E>(col_weights(m, tile), lane, weight);
    const int from = lane.super_row * m.chip.period * m.chip.cols + static_cast<int>(lane.offset);
    place = lane.active ? from * sizeof(T) : kNowhere;
    row = lane.super_row * m.chip.period + lane.phase;
    const int lanes = min(m.chip.lanes, simt::kWarp);
    summed = simt::thread() / (lanes / kChipRows) % kChipRows * m.chip.at_once + row;
  }

  // Adds the slab's rows [begin, end), which lie at x and dy in shared memory. A thread without a
  // vector of a row reads zeros, so that all threads do the same. What moves from row to row stays
  // in registers; other addresses would be computed anew for every vector.
  template <Adds What>
  SIMT_FN void add(int begin, int end, unsigned x, unsigned dy, bool more) {
    constexpr bool adds_rows = What != Adds::cols, adds_cols = What != Adds::rows;
    const OnChip& chip = m.chip;
    const unsigned row_bytes = chip.cols * sizeof(T), zeros = chip.memory.zeros, to_dy = dy - x;
    const unsigned stride = place == kNowhere ? 0 : chip.at_once * row_bytes;
    const unsigned past = x + ((end - begin) * row_bytes + 15) / 16 * 16;
    unsigned at = place == kNowhere ? kNowhere : x + place;
    const float* row_weight = row_weights(m) + begin + row;
    const bool writes = simt::thread() % (min(chip.lanes, simt::kWarp) / kChipRows) == 0;
    const int part = simt::thread() % chip.lanes / simt::kWarp;
    float* to =
        (chip.row_parts > 1 ? m.scratch() + part : row_sums(m)) + (begin + summed) * chip.row_parts;
    int left = writes ? end - begin - summed : 0;  // rows to the chunk's end from the one summed
    SIMT_ROLLED
    for (int row0 = begin; row0 < end; row0 += chip.round_rows()) {
      float dot[kChipRows];
      SIMT_UNROLL
      for (int d = 0; d < kChipRows; d++) {
        const bool live = at < past;
        float value[E];
        V::unpack(V::keep(V::load(m.template at<T>(live ? at : zeros)), mask), value);
        if (product) {
          float gradient[E];
          V::unpack(V::keep(V::load(m.template at<T>(live ? at + to_dy : zeros)), mask), gradient);
          SIMT_UNROLL
          for (int j = 0; j < E; j++) value[j] *= gradient[j];
        }
        at += stride;
        if (adds_cols) {
          const float weight_of_row = weighted ? *row_weight : 1.f;
          row_weight += chip.at_once;
          SIMT_UNROLL
          for (int j = 0; j < E; j++) sum[j] += weight_of_row * value[j];
        }
        dot[d] = 0;
        if (adds_rows) {
          SIMT_UNROLL
          for (int j = 0; j < E; j++) dot[d] += weight[j] * value[j];
        }
      }
      if (adds_rows) {
        const float total = sum_over_lanes(dot, min(chip.lanes, simt::kWarp));
        if (left > 0) *to = more ? *to + total : total;
        to += chip.round_rows() * chip.row_parts, left -= chip.round_rows();
      }
    }
  }
};

// Makes the rows' sums of the parts that warps made.
template <class T>
SIMT_FN void fold_rows(const Member<T>& m, float* out, bool more) {
  const int parts = m.chip.row_parts, rows = m.rows();
  simt::sync();
  for (int r = simt::thread(); r < rows; r += m.chip.threads) {
    float total = more ? out[r] : 0.f;
    for (int i = 0; i < parts; i++) total += m.scratch()[r * parts + i];
    out[r] = total;
  }
  simt::sync();
}

// Makes a tile's sums by column of the threads' sums, in the order of the rows that the block adds
// up at once. Several lanes of a warp share a column.
template <class T>
SIMT_FN void fold_columns(const Member<T>& m, const float* sum, int tile, float* out, bool more) {
  constexpr int E = simt::kPerVector<T>;
  const OnChip& chip = m.chip;
  const Lane lane = m.lane_of_row(tile);
  const int cols = m.tile_cols(tile);
  const int segments = chip.at_once, pitch = chip.pitch();
  if (segments == 1) {
    float total[E];
    load_columns<E>(out, lane, total);
    SIMT_UNROLL
    for (int j = 0; j < E; j++) total[j] = more ? total[j] + sum[j] : sum[j];
    store_columns<E>(out, lane, total);
    return;
  }
  store_columns<E>(m.scratch() + lane.segment * pitch, lane, sum);
  simt::sync();
  const int apart = simt::kWarp / chip.fold_lanes;  // columns of a warp
  const int part = simt::thread() % simt::kWarp / apart;
  const int first = simt::thread() / simt::kWarp * apart + simt::thread() % apart;
  SIMT_ROLLED
  for (int i0 = 0; i0 < cols; i0 += chip.warps * apart) {
    const int i = i0 + first;
    float total = 0;
    if (i < cols)
      for (int s = part; s < segments; s += chip.fold_lanes) total += m.scratch()[s * pitch + i];
    SIMT_ROLLED
    for (int step = apart; step < simt::kWarp; step *= 2) total += simt::shuffle_xor(total, step);
    if (part == 0 && i < cols) out[i] = more ? out[i] + total : total;
  }
}

// Adds up these lines of the slab, in the direction's step so and so. The caller syncs before it
// uses the sums.
template <Sums Kind, class T>
SIMT_FN void add_up(const Member<T>& m, int turn, int step, const Lines& lines) {
  using Own = Tally<T, Kind>;
  const OnChip& chip = m.chip;
  const Chunks<Input::x, T> x(m);
  const Chunks<Input::dy, T> dy(m);
  SIMT_ROLLED
  for (int tile = 0; tile < chip.col_tiles; tile++) {
    const int visit = step * chip.col_tiles + tile;
    const bool more_cols = Kind == Sums::through, more_rows = more_cols || tile > 0;
    const bool more_parts = more_rows && chip.row_parts == 1;
    Own own(m, step, tile);
    SIMT_ROLLED
    for (int chunk = 0; chunk < m.chunks(); chunk++) {
      const int begin = m.chunk_begin(chunk), end = m.chunk_end(chunk);
      const unsigned at = x.wait(turn, visit, chunk);
      const unsigned at_dy = Own::product ? dy.wait(turn, visit, chunk) : 0;
      if (!lines.cols)
        own.template add<Adds::rows>(begin, end, at, at_dy, more_parts);
      else if (!lines.rows)
        own.template add<Adds::cols>(begin, end, at, at_dy, more_parts);
      else if constexpr (Kind != Sums::through)  // which is for one mask at a time
        own.template add<Adds::any>(begin, end, at, at_dy, more_parts);
      x.release(turn, visit, chunk);
      if (Own::product) dy.release(turn, visit, chunk);
    }
    if (lines.rows && chip.row_parts > 1) fold_rows(m, Own::row_sums(m), more_rows);
    if (lines.cols) fold_columns(m, own.sum, tile, m.col_sums() + tile * chip.width, more_cols);
    if (tile + 1 < chip.col_tiles) simt::sync();
  }
}

// Makes y of x, or dx of dy, an element at a time, where tensors are not aligned or rows are
// shorter than a vector.
template <bool Backward, class T>
SIMT_FN void scale_elements(const Member<T>& m, int begin, int end, const T* in, T* out) {
  const unsigned cols = m.chip.cols;
  for (unsigned i = simt::thread(); i < (end - begin) * cols; i += m.chip.threads) {
    const unsigned row = begin + i / cols, col = i % cols;
    const float row_mask = m.row_mask()[row], col_mask = m.col_mask()[col];
    float value = simt::to<float>(in[i]) * (col_mask * row_mask);
    if (Backward)
      value += m.col_term()[col] * (m.chip.outer == Outer::rows ? row_mask : 1.f) +
               m.row_term()[row] * (m.chip.outer == Outer::cols ? col_mask : 1.f);
    simt::store_once(out + i, simt::to<T>(value));
  }
}

// Makes y of x, or dx of dy, over the slab.
template <bool Backward, class T>
SIMT_FN void scale_slab(const Member<T>& m, int turn) {
  constexpr int E = simt::kPerVector<T>;
  using V = Access<T, E>;
  const OnChip& chip = m.chip;
  const Chunks<Backward ? Input::dy : Input::x, T> chunks(m);
  SIMT_ROLLED
  for (int tile = 0; tile < chip.col_tiles; tile++) {
    const int col = tile * chip.width, visit = chunks.visits() - chip.col_tiles + tile;
    const Lane lane = chip.by_super_row
                          ? Lane::of_super_row<E>(chip.cols, chip.period, chip.scaled_super_rows)
                          : m.lane_of_row(tile);
    const int mine = lane.super_row * chip.period + lane.phase;
    const int place = lane.super_row * chip.period * chip.cols + static_cast<int>(lane.offset);
    const int at_once = chip.scaled_super_rows * chip.period, stride = at_once * chip.cols;
    const Scaling<T, E, Backward> scaling(chip.outer, lane, m.col_mask() + col, m.col_term() + col,
                                          m.row_mask(), m.row_term());
    SIMT_ROLLED
    for (int chunk = 0; chunk < m.chunks(); chunk++) {
      const int begin = m.chunk_begin(chunk), end = m.chunk_end(chunk);
      const T* const in = m.template at<T>(chunks.wait(turn, visit, chunk));
      T* const out = m.out(turn) + begin * chip.cols;
      const auto load = [](const T* p) { return V::load(p); };
      const int last = lane.active ? end : 0;
      if (!chip.aligned) {
        if (tile == 0) scale_elements<Backward>(m, begin, end, in, out);
      } else if (chip.period == 1) {
        scaling.template rows<Backward ? 2 : 4, Fit::whole>(lane, begin + mine, last, at_once,
                                                            stride, in + place, out + place, load);
      } else if (chip.by_super_row) {
        scaling.template rows<Backward ? 3 : 2, Fit::across>(lane, begin + mine, last, at_once,
                                                             stride, in + place, out + place, load);
      } else {
        scaling.template rows<Backward ? 1 : 2, Fit::edges>(lane, begin + mine, last, at_once,
                                                            stride, in + place, out + place, load);
      }
      chunks.release(turn, visit, chunk);
    }
  }
}

}  // namespace da::cuda
