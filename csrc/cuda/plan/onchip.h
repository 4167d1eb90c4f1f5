// The kernels that read an image once: a group of blocks keeps it in shared memory from the first
// sum to the last product. Here is how such a launch cuts an image up and what it keeps of it, as
// plain data; which launch is best for a GPU is the planner's choice, the kernels are onchip.cuh's.
//
// An image is a matrix, channels x pixels in NCHW, pixels x channels in NHWC; a block has a slab of
// its rows, which is contiguous, and all its columns:
//
//            cols              one axis' mask is by row: a block has all of a row, and its sums
//        +------------+        the other's is by column: the blocks' sums are added up, each block
//     0  |   slab     |        taking a slice of the columns, whose mask it hands to the others
//        +------------+
//     1  |   slab     |  = chunks of rows, that are loaded one by one
//        +------------+
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "cuda/plan/limits.h"
#include "cuda/simt/carver.h"
#include "formula.h"

namespace da::cuda {

// What a group waits at: __syncthreads() of its only block, the barrier of a cluster (compute
// capability 9.0 and later), or a counter in global memory (a cooperative launch, anywhere).
enum class Barrier { block, cluster, group };

// The kernels' launch bounds, which leave a thread 72 registers. With 512 threads it would have 64,
// too few for backward's first sweep, which holds a vector's weights and sums beside what it reads.
constexpr int kChipThreads = 448, kChipBlocks = 2;
constexpr int kMaxCluster = 16;          // blocks; more than 8 only where the GPU agrees
constexpr size_t kBulkBytes = 8;         // of a simt::Bulk
constexpr int kCounterStride = 32;       // words from one group's counter to the next one's
constexpr int kStencil = 2 * kTaps + 1;  // coefficients and bias

// Whose factor multiplies the other axis' term in dx, see scale.cuh.
enum class Outer { none, rows, cols };

DA_HD Outer outer(Axes axis, bool channels_last) {
  if (!axis.any()) return Outer::none;
  return axis.pixels == channels_last ? Outer::rows : Outer::cols;
}

// What a block keeps in shared memory, and where: offsets in bytes.
struct ChipMemory {
  unsigned x, dy;               // chunks
  unsigned row_mask, col_mask;  // forward, of the columns first the sums
  unsigned row_term, col_term;  // backward: what dx gets besides; of the columns first the sums
  unsigned stencil;             // and backward its adjoint
  unsigned
      scratch;  // by turns: rows' sums in parts, sums to be folded, a window on sums or gradients
  unsigned loads;  // a simt::Bulk for every kept chunk
  size_t bytes;
};

struct OnChip {
  const char* refused;  // why these kernels cannot run the problem this way, or null
  bool backward;
  Barrier barrier;
  int blocks;          // of a group, so of an image
  int images_at_once;  // groups: the launch has blocks * images_at_once blocks
  int threads;

  // The image's matrix, and how threads lie over it; as in Tiling.
  bool channels_last;
  int rows, cols;
  int vector, period;  // elements of 16 bytes; rows after which vectors begin alike again
  int width, col_tiles, lanes, groups;
  int at_once;        // rows that the block adds up
  bool by_super_row;  // y and dx are stored by whole vectors of super-rows,
  int scaled_groups;  // so many of which at once
  int warps;          // of a block
  int row_parts;      // in which a row's sum over a tile's columns comes

  int slab_rows, chunk_rows, chunks;
  int kept,
      kept_dy;   // chunks of x, and backward of dy, in shared memory; the others are read again
  bool aligned;  // whole vectors travel; or else elements
  int slice;     // columns
  bool row_mask, col_mask, pixel_mask;  // which there are
  int row_reach, col_reach;             // how far they look along their axis
  // Which axes have their turn in which step: both in one, or if one mask comes before the other,
  // in two, backward in the reverse order.
  int steps;
  Outer outer;
  bool rows_in[2], cols_in[2];
  int fold;  // rows' sums that are added in a round
  ChipMemory memory;

  // Of a row's sums that are to be folded: each begins at 16 bytes.
  DA_HD int pitch() const { return (width + 3) / 4 * 4; }
  DA_HD int kept_rows(int kept_chunks) const {
    return kept_chunks == chunks ? slab_rows : kept_chunks * chunk_rows;
  }
  // Of a window before and after what is the block's own.
  DA_HD int margin(int reach) const { return blocks == 1 ? 0 : reach; }
};

// Sizes and carves a block's shared memory. Places are offsets, which kernels read with the rest of
// the plan: as pointers they would take registers.
DA_HD ChipMemory carve(const OnChip& p, unsigned char* base) {
  const size_t row_bytes = size_t(p.cols) * 16 / p.vector;
  const auto vectors = [](size_t n) { return (n + 15) / 16 * 16; };
  const auto larger = [](int a, int b) { return a < b ? b : a; };
  int most = 0;
  if (p.row_mask) {
    most = larger(most, p.slab_rows * p.row_parts);
    if (p.row_reach > 0) most = larger(most, p.slab_rows + 2 * p.margin(p.row_reach));
  }
  if (p.col_mask) {
    most = larger(most, p.fold * p.pitch());
    most = larger(most, p.slice + 2 * p.margin(p.col_reach));
  }
  simt::Carver carver(base);
  const auto bytes = [&](size_t count) {
    const size_t at = carver.bytes();
    carver.take<unsigned char>(count);
    return static_cast<unsigned>(at);
  };
  const auto floats = [&](int count) { return bytes(count * sizeof(float)); };
  ChipMemory memory;
  memory.x = bytes(vectors(p.kept_rows(p.kept) * row_bytes));
  memory.dy = bytes(vectors(p.kept_rows(p.kept_dy) * row_bytes));
  memory.row_mask = floats(p.slab_rows);
  memory.col_mask = floats(p.cols);
  memory.row_term = floats(p.backward ? p.slab_rows : 0);
  memory.col_term = floats(p.backward ? p.cols : 0);
  memory.stencil = floats(p.pixel_mask ? (p.backward ? 2 : 1) * kStencil : 0);
  memory.scratch = floats(most);
  memory.loads = bytes((p.kept + p.kept_dy) * kBulkBytes);
  memory.bytes = carver.bytes();
  return memory;
}

// The launch in which `blocks` blocks own an image, with as much of x, then of dy, in shared memory
// as `shared_limit` bytes a block hold. `aligned`: every full-size tensor begins at a multiple of
// 16 bytes. The caller sets images_at_once, 1 here, to no more than the device holds at once.
inline OnChip on_chip(const Problem& problem, bool backward, bool aligned, Barrier barrier,
                      int blocks, int64_t shared_limit, const Limits& limits) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto round_up = [=](int64_t a, int64_t b) { return ceil_div(a, b) * b; };
  OnChip p{};
  const auto refuse = [&](const char* why) { return p.refused = why, p; };
  p.backward = backward, p.barrier = barrier, p.blocks = blocks, p.images_at_once = 1;
  if (problem.dtype == Dtype::float64) return refuse("float64 is for the portable passes");
  if (problem.c * problem.pixels() > INT32_MAX / 4) return refuse("the image is too large");
  if (problem.n > INT32_MAX / 4) return refuse("there are too many images");
  if (blocks < 1 || (barrier == Barrier::block && blocks > 1))
    return refuse("a block's barrier is for one block");
  if (barrier == Barrier::cluster && blocks > kMaxCluster) return refuse("no cluster is so large");

  // One pixel a channel: the channels are dense in either layout.
  p.channels_last = problem.channels_last || problem.pixels() == 1;
  p.rows = p.channels_last ? problem.pixels() : problem.c;
  p.cols = p.channels_last ? problem.c : problem.pixels();
  p.outer = cuda::outer(da::outer(problem.order), p.channels_last);
  p.pixel_mask = problem.spatial();
  p.row_mask = p.channels_last ? problem.spatial() : problem.channel();
  p.col_mask = p.channels_last ? problem.channel() : problem.spatial();
  const int pixel_reach = std::min(kReach * (problem.w + 1), problem.pixels());
  const int channel_reach =
      problem.gate == Gate::eca ? std::min(problem.kernel_size / 2, problem.c) : 0;
  p.row_reach = p.channels_last ? pixel_reach : channel_reach;
  p.col_reach = p.channels_last ? channel_reach : pixel_reach;
  p.steps = sum_passes(schedule(problem.order, backward));
  for (int step = 0; step < p.steps; step++) {
    const Axes complete = schedule(problem.order, backward).passes[step].complete;
    p.rows_in[step] = p.channels_last ? complete.pixels : complete.channels;
    p.cols_in[step] = p.channels_last ? complete.channels : complete.pixels;
  }
  p.vector = 16 / problem.element_size();
  p.aligned = aligned && p.cols >= p.vector && int64_t(p.rows) * p.cols % p.vector == 0;

  // A row's lanes are a power of two or whole warps, so that shuffles add up its sum.
  const int step = std::gcd(p.cols, p.vector);
  p.period = p.vector / step;
  const int max_lanes = std::min<int64_t>(kChipThreads / p.period / 32 * 32, limits.chip_lanes);
  const int max_width = max_lanes * p.vector - p.vector + step;
  p.col_tiles = ceil_div(p.cols, max_width);
  p.width = std::min<int>(round_up(ceil_div(p.cols, p.col_tiles), p.vector), p.cols);
  if (p.width > max_width) p.width = max_width / p.vector * p.vector;
  p.col_tiles = ceil_div(p.cols, p.width);
  const int vectors = ceil_div(p.vector - step + p.width, p.vector);
  p.lanes = vectors > 32 ? round_up(vectors, 32) : 4;
  while (p.lanes < vectors) p.lanes *= 2;
  p.groups = kChipThreads / (p.lanes * p.period);
  p.threads = p.lanes * p.period * p.groups;
  p.at_once = p.groups * p.period;
  p.warps = p.threads / 32;
  p.by_super_row = p.aligned && p.col_tiles == 1 && p.period > 1;
  p.scaled_groups = p.by_super_row ? p.threads * p.vector / (p.period * p.cols) : p.groups;
  p.row_parts = std::max(p.lanes / 32, 1);

  p.slab_rows = round_up(ceil_div(p.rows, blocks), p.period);
  if (int64_t(p.slab_rows) * (blocks - 1) >= p.rows) return refuse("more blocks than rows");
  p.chunk_rows = round_up(ceil_div(p.slab_rows, limits.chunks), p.at_once);
  p.chunks = ceil_div(p.slab_rows, p.chunk_rows);
  p.slice = ceil_div(p.cols, blocks);
  p.fold = p.at_once == 1 ? 0 : std::clamp<int>(limits.fold_bytes / (4 * p.pitch()), 1, p.at_once);

  const auto fits = [&] { return carve(p, nullptr).bytes <= size_t(shared_limit); };
  p.kept = std::min<int64_t>(p.chunks, limits.kept);
  while (p.kept > 0 && !fits()) p.kept--;
  if (!fits()) return refuse("not even the masks fit in shared memory");
  if (p.kept < p.chunks && !p.aligned)
    return refuse("what is not aligned must fit in shared memory, for it cannot be read again");
  if (backward && p.kept == p.chunks) {
    p.kept_dy = std::min<int64_t>(p.chunks, limits.kept - p.kept);
    while (p.kept_dy > 0 && !fits()) p.kept_dy--;
  }
  if (p.kept_dy < p.chunks && backward && !p.aligned)
    return refuse("what is not aligned must fit in shared memory, for it cannot be read again");
  p.memory = carve(p, nullptr);
  return p;
}

// The shared memory that a block may have where so many share a multiprocessor; 0: an unknown one.
inline int64_t shared_limit(int sm, int blocks_per_sm) {
  constexpr int64_t KiB = 1 << 10;
  const int64_t reserved = sm >= 80 ? KiB : 0;  // a block's, for the system
  const int64_t all = sm >= 120              ? 100 * KiB
                      : sm >= 90             ? 228 * KiB
                      : sm == 80 || sm == 87 ? 164 * KiB
                      : sm >= 80             ? 100 * KiB
                                             : 64 * KiB;
  return (all / blocks_per_sm - reserved) / 16 * 16;
}

}  // namespace da::cuda
