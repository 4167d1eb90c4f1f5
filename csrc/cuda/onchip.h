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

#include "cuda/carver.h"
#include "formula.h"

namespace da::cuda {

// What a group waits at: __syncthreads() of its only block, the barrier of a cluster (compute
// capability 9.0 and later), or a counter in global memory (a cooperative launch, anywhere).
enum class Barrier { block, cluster, group };

// The kernels' launch bounds, so that 64 registers are a thread's.
constexpr int kChipThreads = 512, kChipBlocks = 2;
constexpr int kMaxChunks = 8;        // of a slab
constexpr int kMaxCluster = 16;      // blocks; more than 8 only where the GPU agrees
constexpr int kFoldBytes = 8 << 10;  // for sums of a block's rows, that are added by rounds
constexpr size_t kBulkBytes = 8;     // of a simt::Bulk
constexpr int kCounterStride = 32;   // words from one group's counter to the next one's
constexpr int kRowsAtOnce = 4;       // that a thread adds up

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

  int slab_rows, chunk_rows, chunks;
  int kept,
      kept_dy;   // chunks of x, and backward of dy, in shared memory; the others are read again
  bool aligned;  // whole vectors travel; or else elements
  int slice;     // columns
  int pixel_reach, channel_reach;  // how far a mask looks along its axis
  bool pixel_mask, channel_mask;
  int fold;  // rows' sums that are added in a round
  size_t shared_bytes;

  DA_HD int row_reach() const { return channels_last ? pixel_reach : channel_reach; }
  DA_HD int col_reach() const { return channels_last ? channel_reach : pixel_reach; }
  DA_HD bool row_mask() const { return channels_last ? pixel_mask : channel_mask; }
  DA_HD bool col_mask() const { return channels_last ? channel_mask : pixel_mask; }
  // A row's sum comes in so many parts.
  DA_HD int row_parts() const { return col_tiles * (lanes > 32 ? lanes / 32 : 1); }
  DA_HD int kept_rows(int kept_chunks) const {
    return kept_chunks == chunks ? slab_rows : kept_chunks * chunk_rows;
  }
  // Of a window before and after what is the block's own.
  DA_HD int margin(int reach) const { return blocks == 1 ? 0 : reach; }
};

// What a block keeps in shared memory.
struct ChipMemory {
  unsigned char *x, *dy;
  float *row_mask, *col_mask;  // forward, of the columns first the sums
  float *row_term, *col_term;  // backward: what dx gets besides; of the columns first the sums
  float* stencil;              // coefficients and bias
  float*
      scratch;  // by turns: rows' sums in parts, sums to be folded, a window on sums or gradients
  unsigned char* loads;  // a simt::Bulk for every kept chunk
  size_t bytes;

  DA_HD ChipMemory(unsigned char* base, const OnChip& p) {
    const size_t row_bytes = size_t(p.cols) * 16 / p.vector;
    const auto vectors = [](size_t n) { return (n + 15) / 16 * 16; };
    const auto larger = [](int a, int b) { return a < b ? b : a; };
    int most = 0;
    if (p.row_mask()) {
      most = larger(most, p.slab_rows * p.row_parts());
      if (p.row_reach() > 0) most = larger(most, p.slab_rows + 2 * p.margin(p.row_reach()));
    }
    if (p.col_mask()) {
      most = larger(most, p.fold * p.width);
      most = larger(most, p.slice + 2 * p.margin(p.col_reach()));
    }
    simt::Carver carve(base);
    x = carve.take<unsigned char>(vectors(p.kept_rows(p.kept) * row_bytes));
    dy = carve.take<unsigned char>(vectors(p.kept_rows(p.kept_dy) * row_bytes));
    row_mask = carve.take<float>(p.slab_rows);
    col_mask = carve.take<float>(p.cols);
    row_term = carve.take<float>(p.backward ? p.slab_rows : 0);
    col_term = carve.take<float>(p.backward ? p.cols : 0);
    stencil = carve.take<float>(p.pixel_mask ? 2 * kTaps + 1 : 0);
    scratch = carve.take<float>(most);
    loads = carve.take<unsigned char>((p.kept + p.kept_dy) * kBulkBytes);
    bytes = carve.bytes();
  }
};

// The launch in which `blocks` blocks own an image, with as much of x, then of dy, in shared memory
// as `shared_limit` bytes a block hold. `aligned`: every full-size tensor begins at a multiple of
// 16 bytes. The caller sets images_at_once, 1 here, to no more than the device holds at once.
inline OnChip on_chip(const Problem& problem, bool backward, bool aligned, Barrier barrier,
                      int blocks, int64_t shared_limit) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto round_up = [=](int64_t a, int64_t b) { return ceil_div(a, b) * b; };
  OnChip p{};
  const auto refuse = [&](const char* why) { return p.refused = why, p; };
  p.backward = backward, p.barrier = barrier, p.blocks = blocks, p.images_at_once = 1;
  if (problem.dtype == Dtype::float64) return refuse("float64 is for the portable passes");
  if (problem.c * problem.pixels() > INT32_MAX / 4) return refuse("the image is too large");
  if (blocks < 1 || (barrier == Barrier::block && blocks > 1))
    return refuse("a block's barrier is for one block");
  if (barrier == Barrier::cluster && blocks > kMaxCluster) return refuse("no cluster is so large");

  // One pixel a channel: the channels are dense in either layout.
  p.channels_last = problem.channels_last || problem.pixels() == 1;
  p.rows = p.channels_last ? problem.pixels() : problem.c;
  p.cols = p.channels_last ? problem.c : problem.pixels();
  p.pixel_mask = problem.spatial(), p.channel_mask = problem.channel();
  p.pixel_reach = p.pixel_mask ? std::min(kReach * (problem.w + 1), problem.pixels()) : 0;
  p.channel_reach = p.channel_mask && problem.gate == Gate::eca
                        ? std::min(problem.kernel_size / 2, problem.c)
                        : 0;
  p.vector = 16 / problem.element_size();
  p.aligned = aligned && p.cols >= p.vector && int64_t(p.rows) * p.cols % p.vector == 0;

  // A row's lanes are a power of two or whole warps, so that shuffles add up its sum.
  const int step = std::gcd(p.cols, p.vector);
  p.period = p.vector / step;
  const int max_lanes = kChipThreads / p.period, max_width = max_lanes * p.vector - p.vector + step;
  p.col_tiles = ceil_div(p.cols, max_width);
  p.width = std::min<int>(round_up(ceil_div(p.cols, p.col_tiles), p.vector), p.cols);
  if (p.width > max_width) p.width = max_width / p.vector * p.vector;
  p.col_tiles = ceil_div(p.cols, p.width);
  const int vectors = ceil_div(p.vector - step + p.width, p.vector);
  p.lanes = vectors > 32 ? round_up(vectors, 32) : 4;
  while (p.lanes < vectors) p.lanes *= 2;
  p.groups = kChipThreads / (p.lanes * p.period);
  p.threads = p.lanes * p.period * p.groups;

  p.slab_rows = round_up(ceil_div(p.rows, blocks), p.period);
  if (int64_t(p.slab_rows) * (blocks - 1) >= p.rows) return refuse("more blocks than rows");
  p.chunk_rows = round_up(ceil_div(p.slab_rows, kMaxChunks), p.groups * p.period);
  p.chunks = ceil_div(p.slab_rows, p.chunk_rows);
  p.slice = ceil_div(p.cols, blocks);
  const int segments = p.groups * p.period;
  p.fold = segments == 1 ? 0 : std::clamp<int>(kFoldBytes / (4 * p.width), 1, segments);

  const auto fits = [&] { return ChipMemory(nullptr, p).bytes <= size_t(shared_limit); };
  p.kept = p.chunks;
  while (p.kept > 0 && !fits()) p.kept--;
  if (!fits()) return refuse("not even the masks fit in shared memory");
  if (p.kept < p.chunks && !p.aligned)
    return refuse("what is not aligned must fit in shared memory, for it cannot be read again");
  if (backward && p.kept == p.chunks) {
    p.kept_dy = p.chunks;
    while (p.kept_dy > 0 && !fits()) p.kept_dy--;
  }
  if (p.kept_dy < p.chunks && backward && !p.aligned)
    return refuse("what is not aligned must fit in shared memory, for it cannot be read again");
  p.shared_bytes = ChipMemory(nullptr, p).bytes;
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
