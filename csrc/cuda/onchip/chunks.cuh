// A block of a team: where its arrays lie in shared memory, and how the chunks of its slab of an
// image come there.
#pragma once

#include "cuda/common/args.h"
#include "cuda/common/tile.cuh"
#include "cuda/simt/team.cuh"

namespace da::cuda {

static_assert(sizeof(simt::Bulk) == kBulkBytes && sizeof(simt::Mail) <= kBulkBytes, "");

// The place of this block: its team, its rank there, its rows of an image, and their chunks. It is
// kept in shared memory, since registers are scarce, and divisions take many instructions.
struct Place {
  int team, rank, rows, chunks;
};
static_assert(sizeof(Place) == kPlaceBytes, "");

// A block as a member of the team that owns an image.
template <class T>
struct Member {
  static constexpr int E = simt::kPerVector<T>;  // elements of a vector
  const ChipArgs& args;
  const OnChip& chip;

  SIMT_FN explicit Member(const ChipArgs& args) : args(args), chip(args.chip) {}

  // The team's image of this turn: the teams take the images by turns.
  SIMT_FN int image(int turn) const { return team() + simt::opaque(turn) * chip.images_at_once; }
  SIMT_FN bool has(int turn) const { return image(turn) < args.call.images; }
  SIMT_FN int team() const { return place().team; }
  SIMT_FN int rank() const { return place().rank; }
  SIMT_FN int row0() const { return rank() * chip.slab_rows; }
  SIMT_FN int rows() const { return place().rows; }
  SIMT_FN int chunks() const { return place().chunks; }

  // The place in a full-size tensor at which the slab of this turn's image begins.
  SIMT_FN int64_t slab(int turn) const {
    return (int64_t(image(turn)) * chip.rows + row0()) * chip.cols;
  }
  SIMT_FN const T* x(int turn) const { return static_cast<const T*>(args.call.x) + slab(turn); }
  SIMT_FN const T* dy(int turn) const { return static_cast<const T*>(args.call.dy) + slab(turn); }
  SIMT_FN T* out(int turn) const { return static_cast<T*>(args.call.out) + slab(turn); }
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
  SIMT_FN float* row_mask() const { return at<float>(chip.memory.row_mask); }
  SIMT_FN float* col_mask() const { return at<float>(chip.memory.col_mask); }
  SIMT_FN float* row_term() const { return at<float>(chip.memory.row_term); }
  SIMT_FN float* col_term() const { return at<float>(chip.memory.col_term); }
  SIMT_FN float* col_sums() const { return at<float>(chip.memory.col_sums); }
  SIMT_FN simt::Mail* mail() const { return at<simt::Mail>(chip.memory.mail); }
  SIMT_FN float* stencil() const { return at<float>(chip.memory.stencil); }
  SIMT_FN float* scratch() const { return at<float>(chip.memory.scratch); }
  SIMT_FN simt::Bulk* load_of(int place) const { return at<simt::Bulk>(chip.memory.loads) + place; }

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
  SIMT_FN const Place& place() const { return *at<Place>(chip.memory.place); }
};

enum class Input { x, dy };

// The chunks of an input on their way through shared memory. An image is gone through `visits`
// times. A chunk that is kept comes for the first visit and stays until the last; each of the
// others comes for each visit, to a place of the ring whose chunk was used before it.
template <Input Of, class T>
struct Chunks {
  static constexpr bool dy = Of == Input::dy;
  const Member<T>& m;

  SIMT_FN explicit Chunks(const Member<T>& m) : m(m) {}

  SIMT_FN int kept() const { return dy ? m.chip.kept_dy : m.chip.kept; }
  SIMT_FN int ring() const { return dy ? m.chip.ring_dy : m.chip.ring; }
  SIMT_FN int visits() const { return dy ? m.chip.visits_dy : m.chip.visits; }

  // Begins to bring the team's first image.
  SIMT_FN void begin() const {
    if (!m.has(0)) return;
    const int first = min(kept(), m.chunks());
    const int count = m.chunks() > first ? first + ring() : first;
    SIMT_ROLLED
    for (int i = 0; i < count; i++) {
      int turn = 0, visit = 0, chunk = min(i, first);
      go_on(turn, visit, chunk, i - chunk);
      if (m.has(turn)) fetch(turn, visit, chunk);
    }
  }

  // Waits until the chunk is there: bytes from the beginning of shared memory to it.
  SIMT_FN unsigned wait(int turn, int visit, int chunk) const {
    const unsigned use = uses_before(turn, visit, chunk);
    const int place = place_of(use, chunk);
    if (visit == 0 || chunk >= kept()) {
      if (m.chip.aligned)
        load_of(place)->wait((chunk < kept() ? turn : use >> (ring() - 1)) & 1);
      else
        simt::sync();
    }
    return offset(place);
  }

  // The block needs the chunk no more in this visit: begins to bring what comes to its place next.
  SIMT_FN void release(int turn, int visit, int chunk) const {
    if (chunk >= kept()) {
      go_on(turn, visit, chunk, ring());
    } else {
      if (visit + 1 < visits()) return;
      turn++, visit = 0;
    }
    if (!m.has(turn)) return;
    simt::Bulk::sync_before_load();
    fetch(turn, visit, chunk);
  }

 private:
  SIMT_FN simt::Bulk* load_of(int place) const {
    return m.load_of(dy ? m.chip.kept + m.chip.ring + place : place);
  }
  SIMT_FN unsigned offset(int place) const {
    const unsigned chunk_bytes = m.chip.chunk_rows * m.chip.cols * sizeof(T);
    return (dy ? m.chip.memory.dy : m.chip.memory.x) + place * chunk_bytes;
  }
  // How many chunks passed through the ring before; modulo 2^32, of which its places are a divisor.
  SIMT_FN unsigned uses_before(int turn, int visit, int chunk) const {
    const unsigned visits_before = simt::opaque(turn) * visits() + visit;
    return visits_before * (m.chunks() - kept()) + chunk - kept();
  }
  SIMT_FN int place_of(unsigned use, int chunk) const {
    return chunk < kept() ? chunk : kept() + (use & (ring() - 1));
  }
  // Goes on to the chunk so many uses of the ring later.
  SIMT_FN void go_on(int& turn, int& visit, int& chunk, int uses) const {
    chunk += uses;
    SIMT_ROLLED
    for (; chunk >= m.chunks(); visit++) chunk -= m.chunks() - kept();
    SIMT_ROLLED
    for (; visit >= visits(); turn++) visit -= visits();
  }
  SIMT_FN void fetch(int turn, int visit, int chunk) const {
    const int place = place_of(uses_before(turn, visit, chunk), chunk);
    const int begin = m.chunk_begin(chunk) * m.chip.cols, end = m.chunk_end(chunk) * m.chip.cols;
    T* const to = m.template at<T>(offset(place));
    const T* const from = (dy ? m.dy(turn) : m.x(turn)) + begin;
    if (m.chip.aligned) {
      load_of(place)->load(to, from, (end - begin) * sizeof(T));
    } else {
      SIMT_ROLLED
      for (int i = simt::thread(); i < end - begin; i += m.chip.threads)
        to[i] = simt::load_once(from + i);
    }
  }
};

}  // namespace da::cuda
