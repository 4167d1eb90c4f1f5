// How the CUDA backend runs a problem: which launches, over which tiles, with how much memory. A
// pure function of the problem and the device, free of torch and of CUDA, so that any machine can
// show any GPU's plan; the launcher follows it step by step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/plan/device.h"
#include "cuda/plan/onchip.h"
#include "cuda/plan/padded.h"

namespace da::cuda {

constexpr int kThreads = 256;  // of a block of the portable passes
// Blocks of a pass that a multiprocessor's registers hold, by the size of an element.
constexpr int blocks_per_sm(int64_t element_size) { return element_size == 8 ? 2 : 3; }
constexpr int kMapsPerSm = 2;  // blocks of the launch that makes maps

// How the portable passes cut an image up: a block works on a tile of its matrix.
struct Tiling {
  bool by_pixel;  // up to super_rows as in matrix.h
  int64_t rows, cols;
  int vector, period;
  int width, lanes, super_rows;
  Divisor by_lanes, by_period;
  int height;                    // rows of a tile, a multiple of the period
  int64_t row_tiles, col_tiles;  // tiles that the rows, and the columns, are cut into
  int64_t stride;                // elements from a row that a thread reads to its next
  Divisor by_tiles, by_col_tiles, by_at_once;
  int turns, segments;  // from a row that a thread helps to add up to its next one
  int folding;          // 2 to its power threads add up the pixel tiles' sums of a channel

  // Sets what follows from the other fields.
  void complete() {
    const auto divisor = [](int64_t by) { return Divisor(std::max<int64_t>(by, 1)); };
    stride = at_once() * cols;
    by_tiles = divisor(tiles()), by_col_tiles = divisor(col_tiles), by_at_once = divisor(at_once());
    const int helpers = kThreads / 4, rows = std::max(at_once(), 1);
    turns = helpers / rows, segments = helpers % rows;
    constexpr int64_t kMost = 8;
    folding = 0;
    while (2 << folding <= std::min(pixel_tiles(), kMost) &&
           tile_channels() << (folding + 1) <= kThreads)
      folding++;
  }

  DA_HD int at_once() const { return super_rows * period; }      // rows that a block reads at once
  DA_HD int64_t tiles() const { return row_tiles * col_tiles; }  // of an image
  DA_HD int64_t channel_tiles() const { return by_pixel ? col_tiles : row_tiles; }
  DA_HD int64_t pixel_tiles() const { return by_pixel ? row_tiles : col_tiles; }
  DA_HD int tile_channels() const { return by_pixel ? width : height; }
  DA_HD int tile_pixels() const { return by_pixel ? height : width; }
};

// How the launch that makes maps cuts an image's axes up.
struct Bands {
  int pixels, channels;  // of a block
  int channel_window;    // channels of a block and those around it that an eca gate needs; at
                         // least as many entries as a block has warps, each of which may use one
  Halo halo;             // of a band of pixels

  DA_HD int64_t of_pixels(int64_t all) const { return (all + pixels - 1) / pixels; }
  DA_HD int64_t of_channels(int64_t all) const { return (all + channels - 1) / channels; }
};

enum class Kernel { maps, sums, scale, finish, on_chip };
inline Kernel pass_kernel(const Pass& pass) {
  return pass.sums.any() ? Kernel::sums : Kernel::scale;
}

// What a launch between passes makes: masks of forward's sums, or once more of what forward kept;
// or the terms of dx.
enum class Made { masks_of_sums, masks_again, terms };

// Why a launch makes maps: warps' instructions that this takes, and that it would take the blocks
// of the next pass.
struct Count {
  int64_t once, again;
};

// One launch: a pass of the schedule, or what comes between passes and after them.
struct Step {
  Kernel kernel;
  Pass pass;       // `reads` and `writes` say what comes from and goes to global memory
  Axes weights;    // the axes whose maps weigh its sums
  Axes pending;    // the axes whose maps it makes: of sums, or backward the masks once more
  bool backwards;  // the blocks take the tiles from the last on
  int64_t jobs;    // one for each block
  unsigned grid;   // blocks that are launched at a time, with the extra ones
  size_t shared_bytes;
  Made made{};  // of Kernel::maps, with the count for it
  Count count{};
  int64_t making = 0;  // warps' instructions of a pass for the maps that it makes
  // The axes whose parameters' gradients extra blocks make, and the number of these blocks; whether
  // those of the pixels are made by the last block to have made spatial sums.
  Axes finishes{};
  int64_t extra = 0;
  bool last_finishes = false;
};

// Partial sums and small maps between launches, as offsets into one array of the accumulation
// type. A direction uses what it needs; the rest is empty.
struct Workspace {
  int64_t pixel_sums, more_pixel_sums;      // [n][channel_tiles][pixels]
  int64_t channel_sums, more_channel_sums;  // [n][pixel_tiles][channels]
  int64_t spatial_mask, d_channel_mean;     // [n][pixels]
  int64_t channel_mask, d_logit, d_pooled;  // [n][channels]
  int64_t spatial_parts, spatial_blocks;    // [spatial_blocks][kSpatialPitch]
  int64_t gate_parts, done;                 // [gate_parts()][shares], [done_counters]
  int shares, done_counters;
  // The arrays of a launch on the chip, see ChipArgs.
  int64_t partials, col_masks, col_terms, row_gradients;
  int64_t counters, counter_bytes;
  int64_t elements;  // of the array
};

struct Direction {
  std::vector<Step> steps;
  Workspace workspace;
  OnChip chip;  // of the step Kernel::on_chip
};

struct Plan {
  Tiling tiling;
  Halo halo;  // of a tile
  Bands bands;
  bool early;  // launches after a call's first may begin before the one before has ended
  Direction forward, backward;

  const Direction& operator[](Way way) const { return way == Way::forward ? forward : backward; }
};

// `aligned`: every full-size tensor begins at a multiple of 16 bytes.
Plan plan(const Problem& problem, const Device& device, bool aligned, const Limits& limits);

// The direction of a launch that is not refused: this launch, and backward what finishes the
// parameters' gradients.
Direction on_chip_direction(const Problem& problem, const OnChip& chip, const Limits& limits);

// From one block's spatial sums to the next one's: whole vectors.
constexpr int kSpatialPitch = (kSpatialSums + 3) / 4 * 4;
// Threads that share the images of an affine gate's channel.
DA_HD int affine_sharing(int64_t images) {
  return images < 2 ? 1 : images < 4 ? 2 : images < 8 ? 4 : 8;
}
// Numbers in the gradients of a scalar or eca gate.
int64_t gate_parts(const Problem& problem);

}  // namespace da::cuda
