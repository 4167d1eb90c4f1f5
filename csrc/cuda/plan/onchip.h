// The launch that reads an image once: a team of blocks keeps it in shared memory from the first
// sum to the last product. Here is how such a launch cuts an image up and what it keeps of it, as
// plain data; choose.h chooses among such launches, onchip/kernels.cuh has the kernels.
//
// Each block of a team has a slab of the image's rows, which is contiguous, and all columns:
//
//            cols              one axis' mask is by row: a block has all of a row, and its sums
//        +------------+        the other's is by column: the blocks' sums are added up, each block
//     0  |   slab     |        taking a slice of the columns, whose mask it hands to the others
//        +------------+
//     1  |   slab     |  = chunks of rows, which are loaded one by one
//        +------------+
//
// Where a block has no room for its slab, some chunks stay in shared memory, and the others pass
// through a ring of one or two places there, each time that the image is gone through:
//
//     x   |chunk 0|chunk 1|chunk 2| ring  | ring  |    chunks 3, 5, 7, ...  and 4, 6, 8, ...
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/plan/limits.h"
#include "cuda/plan/matrix.h"
#include "cuda/plan/padded.h"
#include "cuda/simt/carver.h"
#include "formula.h"

namespace da::cuda {

enum class Way { forward, backward };

// What a team waits at: __syncthreads() of its only block, the barrier of a cluster (compute
// capability 9.0 and later), or a counter in global memory (a cooperative launch, anywhere).
enum class Barrier { block, cluster, counter };
constexpr const char* kBarriers[] = {"block", "cluster", "counter"};

// The kernels' launch bounds, which leave a thread 80 registers: backward's first sweep holds a
// vector's weights and sums beside what it reads. Three blocks hide each other's waiting better
// than two larger ones do.
constexpr int kChipThreads = 256, kChipBlocks = 3;
constexpr int kChipRows = 4;             // rows that a thread adds up in a round
constexpr int kMaxCluster = 16;          // blocks; more than 8 only where the GPU agrees
constexpr size_t kBulkBytes = 8;         // of a simt::Bulk, and of a simt::Mail
constexpr size_t kPlaceBytes = 16;       // of a Place
constexpr int kCounterStride = 32;       // words from one team's counter to the next one's
constexpr int kStencil = 2 * kTaps + 2;  // the stencil's coefficients and bias, whole vectors

// Axes by how they lie in the matrix.
struct Lines {
  bool rows, cols;
};
DA_HD Lines lines(Axes axes, bool by_pixel) {
  return by_pixel ? Lines{axes.pixels, axes.channels} : Lines{axes.channels, axes.pixels};
}

// The lines whose mask multiplies the other lines' term in dx, see scaling.cuh.
enum class Outer { none, rows, cols };

DA_HD Outer outer(Axes axis, bool by_pixel) {
  if (!axis.any()) return Outer::none;
  return axis.pixels == by_pixel ? Outer::rows : Outer::cols;
}

// Where each array of a block lies in its shared memory: bytes from the beginning.
struct ChipMemory {
  unsigned x, dy;               // the chunks that are kept, then the ring
  unsigned row_mask, col_mask;  // of the slab's rows and of all columns; forward first their sums
  unsigned row_term, col_term;  // backward, likewise
  unsigned col_sums;            // of all columns: there, or apart where masks come by mail
  unsigned stencil;             // coefficients and bias; backward those of the adjoint after them
  unsigned scratch;             // in turn: parts of rows' sums; sums by column, to be folded; a map
                                // around the block's rows or its slice
  unsigned zeros;               // a vector of them, for threads that have no vector of a row
  unsigned place;               // the block's Place
  unsigned mail;                // a simt::Mail
  unsigned loads;               // a simt::Bulk for every place of a chunk
  size_t bytes;                 // in all
};

struct OnChip {
  const char* refused;  // why these kernels cannot run the problem this way, or null
  bool backward;
  Barrier barrier;
  int blocks;          // of a team
  int images_at_once;  // teams of the launch, which has blocks * images_at_once blocks
  int threads;         // of a block

  // The image's matrix, and how threads lie over it; see matrix.h.
  bool by_pixel;
  int rows, cols;
  int vector, period;
  int width, col_tiles, lanes, super_rows;
  Divisor by_lanes, by_period;
  int at_once;            // rows that a block reads at once
  bool by_super_row;      // y and dx are written by the vectors of whole super-rows
  int scaled_super_rows;  // super-rows that a block writes at once
  int warps;              // of a block
  int row_parts;          // numbers that a row's sum over a tile comes in, one from each warp
  int fold_lanes;         // of a warp, that add up the block's sums of a column

  int slab_rows;           // rows of a block, or fewer in the last block
  int chunk_rows, chunks;  // rows of a chunk, whole rounds; chunks of a slab
  int kept, kept_dy;       // chunks of x and of dy that stay in shared memory
  int ring, ring_dy;       // places there for the others, by turns
  int visits, visits_dy;   // times that an image's x, and dy, are gone through
  bool aligned;            // x, dy, y and dx are read and written by vectors, or else by elements
  int slice;               // columns whose mask a block makes
  int recalled;            // backward: those whose spatial mask it makes anew, its slice or all

  bool mail;        // a cluster's blocks send each other the masks, or terms, by column
  Lines masks;      // those that the order has
  bool pixel_mask;  // the spatial mask is one of them
  int gate_reach;   // channels that a channel mask's value depends on to either side
  int steps;        // turns of sums and the masks, or terms, that are made of them
  Halo halo;        // the window of the pixels whose mask a block makes
  Outer outer;
  Lines complete[2];  // the masks or terms of each step
  ChipMemory memory;

  // Elements of a row of partial sums: each row begins at 16 bytes, and where lanes of a warp read
  // several of them these lie in different banks.
  DA_HD int pitch() const { return (width + 3) / 4 * 4 + (fold_lanes > 1 ? 8 : 0); }
  DA_HD int round_rows() const { return kChipRows * at_once; }  // that a block adds up in a round
  // Entries of the arrays by row: of whole rounds, and of the row after them where a vector at the
  // end of the last row is taken for one that may reach across.
  DA_HD int padded_rows() const {
    return (slab_rows + round_rows() - 1) / round_rows() * round_rows() + by_super_row;
  }
  // Rows that the places of chunks hold. A slab's last chunk may have fewer than the others; but of
  // two places of a ring either may hold any chunk, for a team's last block may have fewer chunks.
  DA_HD int rows_of(int kept, int ring) const {
    return ring < 2 && kept + ring >= chunks ? slab_rows : (kept + ring) * chunk_rows;
  }
  // Channels that a block needs before and after its own; a team's only block has all.
  DA_HD int margin() const { return blocks == 1 ? 0 : gate_reach; }
};

// Sizes and carves a block's shared memory. Kernels read offsets with the rest of the plan; as
// pointers they would take registers.
DA_HD ChipMemory carve(const OnChip& chip, unsigned char* base) {
  const size_t row_bytes = size_t(chip.cols) * 16 / chip.vector;
  const auto vectors = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
  const auto larger = [](int one, int other) { return one < other ? other : one; };
  int scratch = 0;
  if (chip.masks.rows) {
    if (chip.row_parts > 1) scratch = larger(scratch, chip.padded_rows() * chip.row_parts);
    if (!chip.by_pixel) scratch = larger(scratch, chip.slab_rows + 2 * chip.margin());
  }
  if (chip.masks.cols) {
    if (chip.at_once > 1) scratch = larger(scratch, chip.at_once * chip.pitch());
    if (chip.by_pixel) scratch = larger(scratch, chip.slice + 2 * chip.margin());
  }
  if (chip.pixel_mask)
    scratch =
        larger(scratch, chip.halo.pieces * chip.halo.length + (chip.backward ? chip.threads : 0));
  simt::Carver carver(base);
  const auto bytes = [&](size_t count) {
    const size_t at = carver.bytes();
    carver.take<unsigned char>(count);
    return static_cast<unsigned>(at);
  };
  const auto floats = [&](int count) { return bytes(count * sizeof(float)); };
  ChipMemory memory;
  memory.x = bytes(vectors(chip.rows_of(chip.kept, chip.ring) * row_bytes));
  memory.dy = bytes(vectors(chip.rows_of(chip.kept_dy, chip.ring_dy) * row_bytes));
  memory.row_mask = floats(chip.padded_rows());
  memory.col_mask = floats(chip.cols);
  memory.row_term = floats(chip.backward ? chip.padded_rows() : 0);
  memory.col_term = floats(chip.backward ? chip.cols : 0);
  memory.col_sums = chip.mail       ? floats(chip.cols)
                    : chip.backward ? memory.col_term
                                    : memory.col_mask;
  memory.stencil = floats(chip.pixel_mask ? (chip.backward ? 2 : 1) * kStencil : 0);
  memory.scratch = floats(scratch);
  memory.zeros = bytes(16);
  memory.place = bytes(kPlaceBytes);
  memory.mail = bytes(kBulkBytes);
  memory.loads = bytes((chip.kept + chip.ring + chip.kept_dy + chip.ring_dy) * kBulkBytes);
  memory.bytes = carver.bytes();
  return memory;
}

// The launch in which `blocks` blocks are a team, with as much of x, then of dy, in shared memory
// as `shared_limit` bytes a block hold. `aligned`: every full-size tensor begins at a multiple of
// 16 bytes. The caller sets images_at_once, 1 here, to no more teams than the device holds at once.
OnChip on_chip(const Problem& problem, Way way, bool aligned, Barrier barrier, int blocks,
               int64_t shared_limit, const Limits& limits);

}  // namespace da::cuda
