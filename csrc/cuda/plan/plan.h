// How the CUDA backend runs a problem: which launches, over which tiles, with how much memory. A
// pure function of the problem and the device, free of torch and of CUDA, so that any machine can
// show any GPU's plan; the launcher follows it step by step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/plan/onchip.h"
#include "formula.h"

namespace da::cuda {

struct Device {
  int sm;  // compute capability, 90 for 9.0
  int multiprocessors;
  int64_t l2_bytes;
};

// A well-known GPU of this compute capability, for showing plans without one; the nearest older
// architecture's where it is none of ours.
Device typical_device(int sm);

constexpr int kThreads = 256;  // of a block
// Blocks that a multiprocessor's registers hold, by the size of an element.
constexpr int blocks_per_sm(int64_t element_size) { return element_size == 8 ? 2 : 3; }

// An image is a matrix: channels x pixels in NCHW, pixels x channels in NHWC. Blocks work on tiles
// of it, threads on vectors of `vector` elements. Where a row is no whole number of vectors, rows
// start at different places within a vector; after `period` rows, a super-row, they repeat.
struct Tiling {
  bool channels_last;  // which of rows and columns are the pixels
  int64_t rows, cols;  // of the image's matrix
  int vector;          // elements: 16 bytes, or 1
  int period;          // rows of a super-row
  int width;           // columns of a tile
  int lanes;           // vectors that cover a tile's row
  int groups;          // super-rows that a block reads at once
  int height;          // rows of a tile, a multiple of the period
  int64_t row_tiles, col_tiles;

  DA_HD int64_t tiles() const { return row_tiles * col_tiles; }  // of an image
  DA_HD int64_t channel_tiles() const { return channels_last ? col_tiles : row_tiles; }
  DA_HD int64_t pixel_tiles() const { return channels_last ? row_tiles : col_tiles; }
  DA_HD int tile_channels() const { return channels_last ? width : height; }
  DA_HD int tile_pixels() const { return channels_last ? height : width; }
};

// The piece of an image's maps that a block keeps for the stencil: `pieces` pieces of `length`
// pixels, each from `margin` before a pixel that lies a number of rows off the tile's first.
struct Staging {
  int pieces, length, margin;

  // One piece has it all; five are of the rows -3, -1, 0, 1, 3.
  DA_HD int row_of(int piece) const {
    const int row = piece - 2;
    return pieces == 1 ? 0 : row == -2 ? -kReach : row == 2 ? kReach : row;
  }
  // Where the pixel so many rows off the tile's first is.
  DA_HD int at(int row, int64_t width) const {
    const int piece = (row < -1 ? -2 : row > 1 ? 2 : row) + 2;
    return margin + (pieces == 1 ? static_cast<int>(row * width) : piece * length);
  }
};

enum class Kernel { sums, fold, scale, gate_sums, finish, on_chip };

// One launch: a pass of the schedule, or what comes between passes and after them.
struct Step {
  Kernel kernel;
  Pass pass;      // `reads` and `writes` say what comes from and goes to global memory
  Axes pending;   // whose sums the pass before completed: this launch makes the maps of them
  int64_t jobs;   // one a block
  unsigned grid;  // blocks that are launched at a time
  size_t shared_bytes;
};

// Partial sums and small maps between launches, as offsets into one array of the accumulation
// type. A direction uses what it needs; the rest is empty.
struct Workspace {
  int64_t pixel_sums, more_pixel_sums;      // [n][channel_tiles][pixels]
  int64_t channel_sums, more_channel_sums;  // [n][pixel_tiles][channels]
  int64_t spatial_mask, d_channel_mean;     // [n][pixels]
  int64_t channel_mask, d_logit;            // [n][channels]
  int64_t spatial_parts, spatial_blocks;    // [blocks][kSpatialSums]
  int64_t gate_parts;                       // [n][gate_parts()]
  // Of a launch on the chip, see ChipArgs.
  int64_t partials, col_masks, col_terms, row_gradients;
  int64_t counters, counter_bytes;
  int64_t elements;
};

struct Direction {
  std::vector<Step> steps;
  Workspace workspace;
  OnChip chip;  // of the step Kernel::on_chip
};

struct Plan {
  Tiling tiling;
  Staging staging;
  Direction forward, backward;
};

// `aligned`: every full-size tensor begins at a multiple of 16 bytes.
Plan plan(const Problem& problem, const Device& device, bool aligned, const Limits& limits);

// A direction that chip.refused does not: one launch, and backward what finishes the parameters'
// gradients.
Direction on_chip_direction(const Problem& problem, const OnChip& chip, const Limits& limits);

// Sums over a batch that the gradients of a scalar or eca gate are made of.
int64_t gate_parts(const Problem& problem);

}  // namespace da::cuda
