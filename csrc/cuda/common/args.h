// What a launch is given: plain data, the same for every kernel.
#pragma once

#include <type_traits>

#include "cuda/plan/plan.h"
#include "formula.h"

namespace da::cuda {

// What is summed: forward, x; backward, first dy x, then x again, weighted with a term.
enum class Sums { forward, backward, through };

// Sums over the tiles of the other axis, not yet added up: [image][tile][entry].
template <class A>
struct Partial {
  A* data;
  int64_t tiles, entries;
  int terms;  // tiles that are still to be added
};

// In x's type, or (`wide`) in float32.
struct Parameters {
  const void *conv, *dilated, *merge, *spatial_bias, *gate, *gate_bias;
  bool wide;
};

struct Gradients {
  void *conv, *dilated, *merge, *spatial_bias, *gate, *gate_bias;
};

template <class A>
struct Args {
  int64_t first_job;  // the first block's: a tile, or other piece of work
  int64_t images, channels, pixels;
  int64_t height, width;
  Axes masks;    // that there are
  Axes pending;  // whose maps this launch makes of the sums before it
  Axes outer;    // whose mask multiplies the other's term in dx
  Gate gate;
  int64_t kernel_size;

  Tiling tiling;
  Staging staging;
  const void *x, *dy;
  void* out;  // y or dx

  Parameters parameters;
  Gradients gradients;
  Partial<A> pixel_sums, more_pixel_sums, channel_sums, more_channel_sums;
  A *new_pixel_sums, *new_channel_sums;             // what this launch sums; null: not wanted
  A *channel_mean, *spatial_mask, *d_channel_mean;  // [image][pixel]
  A *pooled, *channel_mask, *d_logit;               // [image][channel]
  A* spatial_parts;                                 // [block][kSpatialSums]
  int64_t spatial_blocks;
  A* gate_parts;  // [image][part]
  int64_t parts;
  Partial<A> to_fold;
};

// Of the kernels that keep an image on the chip. What the blocks of a group tell each other goes by
// image where it is small, so that none of it is written twice, and there is no need to wait until
// it has been read.
struct ChipArgs {
  Args<float> call;
  OnChip chip;
  float* partials;               // [group][block][column]: sums, where there is no cluster
  float *col_masks, *col_terms;  // [image][column]
  float* row_gradients;          // [image][row]: dz
  unsigned* counters;            // of the groups' barriers
};

}  // namespace da::cuda
