// A block's slab of an image: how it comes into shared memory, is added up and leaves as y or dx.
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
#include "cuda/simt/team.cuh"

namespace da::cuda {

static_assert(sizeof(simt::Bulk) == kBulkBytes, "");

// A block as a member of the team that owns an image. It computes what it is asked for when it is
// asked, for between the sweeps registers are scarcer than time.
template <class T>
struct Member {
  static constexpr int E = simt::kPerVector<T>;  // elements of a vector
  const ChipArgs& args;
  const OnChip& chip;

  SIMT_FN explicit Member(const ChipArgs& args) : args(args), chip(args.chip) {}

  SIMT_FN int team() const { return block() / static_cast<unsigned>(chip.blocks); }
  SIMT_FN int rank() const { return block() % static_cast<unsigned>(chip.blocks); }
  SIMT_FN int row0() const { return rank() * chip.slab_rows; }
  SIMT_FN int rows() const { return min(chip.slab_rows, chip.rows - row0()); }
  // The parity of a chunk's loads, as Bulk::wait() asks for it: it flips with each image.
  SIMT_FN unsigned parity(int image) const {
    return static_cast<unsigned>(simt::opaque(image)) / chip.images_at_once & 1;
  }

  // Where the slab of an image begins in a full-size tensor.
  SIMT_FN int64_t slab(int image) const {
    return (int64_t(simt::opaque(image)) * chip.rows + row0()) * chip.cols;
  }
  SIMT_FN const T* x(int image) const { return static_cast<const T*>(args.call.x) + slab(image); }
  SIMT_FN const T* dy(int image) const { return static_cast<const T*>(args.call.dy) + slab(image); }
  SIMT_FN T* out(int image) const { return static_cast<T*>(args.call.out) + slab(image); }
  SIMT_FN int chunk_begin(int chunk) const { return simt::opaque(chunk) * chip.chunk_rows; }
  SIMT_FN int chunk_end(int chunk) const {
    return min(chunk_begin(chunk) + chip.chunk_rows, rows());
  }
  SIMT_FN int tile_cols(int tile) const {
    return min(chip.width, chip.cols - simt::opaque(tile) * chip.width);
  }
  SIMT_FN Lane lane_of_row(int tile) const {
    return Lane::of_row<E>(chip, simt::opaque(tile) * chip.width, tile_cols(tile));
  }
  SIMT_FN int slice_begin() const { return min(rank() * chip.slice, chip.cols); }
  SIMT_FN int slice_end() const { return min(slice_begin() + chip.slice, chip.cols); }

  template <class V>
  SIMT_FN V* at(unsigned offset) const {
    return reinterpret_cast<V*>(simt::shared() + offset);
  }
  SIMT_FN T* kept_x() const { return at<T>(chip.memory.x); }
  SIMT_FN T* kept_dy() const { return at<T>(chip.memory.dy); }
  SIMT_FN float* row_mask() const { return at<float>(chip.memory.row_mask); }
  SIMT_FN float* col_mask() const { return at<float>(chip.memory.col_mask); }
  SIMT_FN float* row_term() const { return at<float>(chip.memory.row_term); }
  SIMT_FN float* col_term() const { return at<float>(chip.memory.col_term); }
  SIMT_FN float* stencil() const { return at<float>(chip.memory.stencil); }
  SIMT_FN float* scratch() const { return at<float>(chip.memory.scratch); }
  SIMT_FN simt::Bulk* load_of(int chunk) const { return at<simt::Bulk>(chip.memory.loads) + chunk; }

  SIMT_FN bool in_cluster() const { return simt::kClusters && chip.barrier == Barrier::cluster; }
  // The team's barrier: what its blocks wrote before, all of them see after it.
  SIMT_FN void sync() const {
    if (chip.blocks == 1)
      simt::sync();
    else if (in_cluster())
      simt::cluster_sync();
    else
      simt::team_sync(args.counters + team() * kCounterStride, rank(), chip.blocks);
  }

 private:
  static SIMT_FN unsigned block() { return simt::opaque(simt::block()); }
};

enum class Input { x, dy };

// Begins to bring a chunk of the input into its place in shared memory.
template <Input Of, class T>
SIMT_FN void fetch(const Member<T>& m, int image, int chunk) {
  constexpr bool dy = Of == Input::dy;
  const int begin = m.chunk_begin(chunk) * m.chip.cols, end = m.chunk_end(chunk) * m.chip.cols;
  if (begin >= end) return;
  T* const to = (dy ? m.kept_dy() : m.kept_x()) + begin;
  const T* const from = (dy ? m.dy(image) : m.x(image)) + begin;
  if (m.chip.aligned) {
    m.load_of(dy ? m.chip.kept + chunk : chunk)->load(to, from, (end - begin) * sizeof(T));
  } else {
    for (int i = simt::thread(); i < end - begin; i += m.chip.threads)
      to[i] = simt::load_once(from + i);
  }
}

// Waits until a load is done. Loads are counted by chunk, those of dy after those of x.
template <class T>
SIMT_FN void wait_for(const Member<T>& m, int image, int load) {
  if (m.chip.aligned)
    m.load_of(load)->wait(m.parity(image));
  else
    simt::sync();
}

// Adds up N values over the lanes of a row. Each lane ends up with one of the N sums, the
// `which`-th.
template <int N, class A>
SIMT_FN A sum_over_lanes(const A* value, int lanes, int& which) {
  static_assert(N == 2 || N == 4, "");
  const auto exchange = [](A low, A high, int apart) {
    const bool upper = simt::thread() & apart;
    return (upper ? high : low) + simt::shuffle_xor(upper ? low : high, apart);
  };
  A sum = exchange(value[0], value[N / 2], lanes / 2);
  if (N == 4) sum = exchange(sum, exchange(value[1], value[N - 1], lanes / 2), lanes / 4);
  SIMT_ROLLED
  for (int step = lanes / (2 * N); step > 0; step /= 2) sum += simt::shuffle_xor(sum, step);
  which = simt::thread() / (lanes / N) % N;
  return sum;
}

// A sweep over the slab adds up rows with the columns' weights and columns with the rows'. The sums
// end up where masks or terms are made of them in place:
//
//   forward    x, weighted with the other mask if there is one yet   -> masks
//   backward   dy x, weighted with the masks                         -> terms
//   through    x, weighted with the terms                            -> terms, added to those there
enum class Visit : bool { again, first };  // the first one waits for what arrives of the image
struct Sweep {
  Lines sums;
  Visit visit;
};

// A thread's share of a sweep over columns that the block spans at once.
template <class T, Sums Kind>
struct Tally {
  static constexpr int E = simt::kPerVector<T>;
  using V = Access<T, E>;
  static constexpr bool product = Kind == Sums::backward;
  static constexpr int kRows = Kind == Sums::forward ? 4 : 2;  // in flight, as registers allow
  const Member<T>& m;
  const Sweep& sweep;
  const bool weighted;  // or else all weights are 1
  unsigned mine;        // a bit for each element of the thread's vectors, 0 if it is another row's
  int first;            // the thread's row among those that the block adds up at once
  int place;            // elements from the first of these rows to the thread's vector
  float weight[E], sum[E];  // of the thread's columns

  static SIMT_FN float* row_weights(const Member<T>& m) {
    return Kind == Sums::through ? m.row_term() : m.row_mask();
  }
  static SIMT_FN float* col_weights(const Member<T>& m) {
    return Kind == Sums::through ? m.col_term() : m.col_mask();
  }

  SIMT_FN Tally(const Member<T>& m, const Sweep& sweep, int tile)
      : m(m),
        sweep(sweep),
        weighted(Kind != Sums::forward || sweep.visit == Visit::again),
        mine(0) {
    const Lane lane = m.lane_of_row(tile);
    first = lane.super_row * m.chip.period + lane.phase;
    place = lane.super_row * m.chip.period * m.chip.cols + static_cast<int>(lane.offset);
    SIMT_UNROLL
    for (int j = 0; j < E; j++) {
      const bool own = lane.active && lane.begin <= j && j < lane.end;
      mine |= own << j;
      weight[j] = own ? 1.f : 0.f;
      sum[j] = 0;
    }
    if (weighted) load_columns<E>(col_weights(m) + tile * m.chip.width, lane, weight);
  }

  // Adds a row's vector to the columns' sums, and returns its part in the row's sum.
  SIMT_FN float add_row(const typename V::Raw& raw, const typename V::Raw& raw_dy, int row,
                        int end) {
    float value[E];
    V::unpack(raw, value);
    if (product) {
      float gradient[E];
      V::unpack(raw_dy, gradient);
      SIMT_UNROLL
      for (int j = 0; j < E; j++) value[j] *= gradient[j];
    }
    if (mine != (1u << E) - 1) {
      SIMT_UNROLL
      for (int j = 0; j < E; j++)
        if (!(mine >> j & 1)) value[j] = 0;
    }
    if (sweep.sums.cols) {
      const float row_weight = !weighted ? 1.f : row < end ? row_weights(m)[row] : 0.f;
      SIMT_UNROLL
      for (int j = 0; j < E; j++) sum[j] += row_weight * value[j];
    }
    float dot = 0;
    if (sweep.sums.rows) {
      SIMT_UNROLL
      for (int j = 0; j < E; j++) dot += weight[j] * value[j];
    }
    return dot;
  }

  // Adds rows [begin, end) of the slab that begins at x, and at dy.
  template <bool Kept, bool KeptDy>
  SIMT_FN void add(int begin, int end, const T* x, const T* dy) {
    // What comes from global memory is asked for before it is needed.
    constexpr int kAhead = Kept && (KeptDy || !product) ? 1 : 2;
    const int at_once = m.chip.at_once;
    SIMT_ROLLED
    for (int row0 = begin; row0 < end; row0 += kRows * at_once) {
      const auto live = [&](int d) { return mine && row0 + d * at_once + first < end; };
      float dot[kRows];
      SIMT_UNROLL
      for (int ahead = 0; ahead < kRows; ahead += kAhead) {
        typename V::Raw raw[kAhead], raw_dy[kAhead];
        SIMT_UNROLL
        for (int i = 0; i < kAhead; i++) {
          const int from = (row0 + (ahead + i) * at_once) * m.chip.cols + place;
          if (!Kept) raw[i] = live(ahead + i) ? V::load_once(x + from) : V::zero();
          if (product && !KeptDy) raw_dy[i] = live(ahead + i) ? V::load_once(dy + from) : V::zero();
        }
        SIMT_UNROLL
        for (int i = 0; i < kAhead; i++) {
          const int d = ahead + i, from = (row0 + d * at_once) * m.chip.cols + place;
          if (Kept) raw[i] = live(d) ? V::load(x + from) : V::zero();
          if (product && KeptDy) raw_dy[i] = live(d) ? V::load(dy + from) : V::zero();
          const bool any = row0 + d * at_once < end;  // of the block's rows
          dot[d] = any ? add_row(raw[i], raw_dy[i], row0 + d * at_once + first, end) : 0.f;
        }
      }
      if (sweep.sums.rows) {
        const int lanes = min(m.chip.lanes, simt::kWarp);
        int d;
        const float total = sum_over_lanes<kRows>(dot, lanes, d);
        const int row = row0 + d * at_once + first;
        const int part = simt::thread() % m.chip.lanes / simt::kWarp;
        if (simt::thread() % (lanes / kRows) == 0 && row < end)
          m.scratch()[row * m.chip.row_parts + part] = total;
      }
    }
  }
};

enum class Onto { nothing, sums };  // what new sums are added to

// Makes the rows' sums of their parts.
template <class T>
SIMT_FN void fold_rows(const Member<T>& m, float* out, Onto onto) {
  const bool more = onto == Onto::sums;
  const int parts = m.chip.row_parts, rows = m.rows();
  for (int r = simt::thread(); r < rows; r += m.chip.threads) {
    float total = more ? out[r] : 0.f;
    for (int i = 0; i < parts; i++) total += m.scratch()[r * parts + i];
    out[r] = total;
  }
}

// Makes a tile's sums by column of the threads' sums, in the order of the rows that the block adds
// up at once.
template <class T>
SIMT_FN void fold_columns(const Member<T>& m, const float* sum, int tile, float* out, Onto onto) {
  const bool more = onto == Onto::sums;
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
  SIMT_ROLLED
  for (int first = 0; first < segments; first += chip.fold) {
    simt::sync();
    if (first <= lane.segment && lane.segment < first + chip.fold)
      store_columns<E>(m.scratch() + (lane.segment - first) * pitch, lane, sum);
    simt::sync();
    const int count = min(chip.fold, segments - first);
    for (int i = simt::thread(); i < cols; i += chip.threads) {
      float total = more || first > 0 ? out[i] : 0.f;
      for (int s = 0; s < count; s++) total += m.scratch()[s * pitch + i];
      out[i] = total;
    }
  }
}

// Runs a sweep. The caller syncs before it uses the sums.
template <Sums Kind, class T>
SIMT_FN void add_up(const Member<T>& m, const Sweep& sweep, int image) {
  using Own = Tally<T, Kind>;
  const OnChip& chip = m.chip;
  SIMT_ROLLED
  for (int tile = 0; tile < chip.col_tiles; tile++) {
    Own own(m, sweep, tile);
    SIMT_ROLLED
    for (int chunk = 0; chunk < chip.chunks; chunk++) {
      const int begin = m.chunk_begin(chunk), end = m.chunk_end(chunk);
      if (begin >= end) break;
      if (sweep.visit == Visit::first && tile == 0) {
        if (chunk < chip.kept) wait_for(m, image, chunk);
        if (Own::product && chunk < chip.kept_dy) wait_for(m, image, chip.kept + chunk);
      }
      if (Own::product && chunk < chip.kept_dy)
        own.template add<true, true>(begin, end, m.kept_x(), m.kept_dy());
      else if (chunk < chip.kept)
        own.template add<true, false>(begin, end, m.kept_x(), m.dy(image));
      else
        own.template add<false, false>(begin, end, m.x(image), m.dy(image));
    }
    constexpr Onto onto = Kind == Sums::through ? Onto::sums : Onto::nothing;
    if (sweep.sums.rows) {
      simt::sync();
      fold_rows(m, Kind == Sums::forward ? m.row_mask() : m.row_term(),
                tile > 0 ? Onto::sums : onto);
    }
    if (sweep.sums.cols)
      fold_columns(m, own.sum, tile,
                   (Kind == Sums::forward ? m.col_mask() : m.col_term()) + tile * chip.width, onto);
    if (tile + 1 < chip.col_tiles) simt::sync();
  }
}

// Makes y of x, or dx of dy, an element at a time, where tensors are not aligned or rows are
// shorter than a vector.
template <bool Backward, class T>
SIMT_FN void scale_elements(const Member<T>& m, int begin, int end, const T* in, T* out) {
  const unsigned cols = m.chip.cols;
  for (unsigned i = begin * cols + simt::thread(); i < end * cols; i += m.chip.threads) {
    const unsigned row = i / cols, col = i % cols;
    const float row_mask = m.row_mask()[row], col_mask = m.col_mask()[col];
    float value = simt::to<float>(in[i]) * (col_mask * row_mask);
    if (Backward)
      value += m.col_term()[col] * (m.chip.outer == Outer::rows ? row_mask : 1.f) +
               m.row_term()[row] * (m.chip.outer == Outer::cols ? col_mask : 1.f);
    simt::store_once(out + i, simt::to<T>(value));
  }
}

// Makes y of x, or dx of dy, over the slab; done(chunk) is called when a chunk has been used,
// before any barrier.
template <bool Backward, class T, class Done>
SIMT_FN void scale_slab(const Member<T>& m, int image, Done done) {
  constexpr int E = simt::kPerVector<T>, depth = Backward ? 1 : 4;
  using V = Access<T, E>;
  const OnChip& chip = m.chip;
  const T* const kept = Backward ? m.kept_dy() : m.kept_x();
  SIMT_ROLLED
  for (int tile = 0; tile < chip.col_tiles; tile++) {
    const int col = tile * chip.width;
    const Lane lane = chip.by_super_row
                          ? Lane::of_super_row<E>(chip.cols, chip.period, chip.scaled_super_rows)
                          : m.lane_of_row(tile);
    const int mine = lane.super_row * chip.period + lane.phase;
    const int place = lane.super_row * chip.period * chip.cols + static_cast<int>(lane.offset);
    const Scaling<T, E, Backward> scaling(chip.outer, lane, m.col_mask() + col, m.col_term() + col,
                                          m.row_mask(), m.row_term());
    SIMT_ROLLED
    for (int chunk = 0; chunk < chip.chunks; chunk++) {
      const int begin = m.chunk_begin(chunk), end = m.chunk_end(chunk);
      if (begin >= end) break;
      const int at_once = chip.scaled_super_rows * chip.period, stride = at_once * chip.cols;
      const int start = begin * chip.cols + place;
      const int last = lane.active ? end : 0;
      if (!chip.aligned) {
        if (tile == 0) scale_elements<Backward>(m, begin, end, kept, m.out(image));
      } else if (chunk < (Backward ? chip.kept_dy : chip.kept)) {
        scaling.template rows<depth>(lane, begin + mine, last, at_once, stride, kept + start,
                                     m.out(image) + start, [](const T* p) { return V::load(p); });
      } else {
        scaling.template rows<depth>(lane, begin + mine, last, at_once, stride,
                                     (Backward ? m.dy(image) : m.x(image)) + start,
                                     m.out(image) + start,
                                     [](const T* p) { return V::load_once(p); });
      }
      if (tile + 1 == chip.col_tiles) done(chunk);
    }
  }
}

}  // namespace da::cuda
