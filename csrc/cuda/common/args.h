// The arguments of a launch: plain data, the same for every kernel.
#pragma once

#include "cuda/plan/plan.h"
#include "formula.h"

namespace da::cuda {

// The sums of a kernel: forward, of x; backward, first of dy x, then of x again, weighted by a
// term.
enum class Sums { forward, backward, through };

// The sums that a kernel is compiled for: of rows, of columns, or whichever a launch has room for.
enum class Adds { rows, cols, any };

// Whether there are kernels of their own for what is summed and for rows of whole vectors, E of a
// row's elements being a vector. float64, and tensors that are read by elements, do without: every
// kernel is compiled for all architectures.
template <class T, int E>
constexpr bool kSpecialised = E > 1 && sizeof(T) < 8;

// Partial sums, one for each tile of the other axis: [image][tile][entry].
template <class A>
struct Partial {
  A* data;
  int64_t tiles, entries;
};

template <class A>
struct Args {
  int64_t first_job;              // of the launch's first block: a tile, or another piece of work
  int64_t first_tile, tile_step;  // the first block's tile, and from it to the next one's
  int64_t images, channels, pixels;
  int64_t height, width;  // of an image, in pixels
  Axes masks;             // those that the order has
  Axes weights;           // the axes whose maps weigh this launch's sums
  Axes pending;           // the axes whose maps this launch makes
  Axes outer;             // the axis whose mask multiplies the other's term in dx
  Gate gate;
  int64_t kernel_size;  // of the eca gate

  Tiling tiling;
  Halo halo;  // of what a block makes maps for: a tile, or a band
  Bands bands;
  Padded padded;
  const void *x, *dy;
  void* out;  // y or dx

  Parameters<const void*> parameters;
  bool wide;                    // the parameters are float32, beside a half x
  Parameters<void*> gradients;  // in the parameters' type; null where not wanted
  Partial<A> pixel_sums, more_pixel_sums, channel_sums, more_channel_sums;
  A *new_pixel_sums, *new_channel_sums;  // what this launch sums; null: not wanted
  // Small maps; d_channel_mean and d_pooled are the terms of dx, dm/C and dg/P.
  A *channel_mean, *spatial_mask, *d_channel_mean;  // [image][pixel]
  A *pooled, *channel_mask, *d_logit, *d_pooled;    // [image][channel]
  A* spatial_parts;                                 // [spatial_blocks][kSpatialPitch]
  int64_t spatial_blocks;
  // A scalar or eca gate's gradients come in parts, one for each number, of several shares each.
  A* gate_parts;  // [part][shares]
  int shares;
  // They count the blocks that have made their spatial sums, and each part's shares that are done.
  // The layer's first pass of backward clears them, or else the host before the launch that counts.
  unsigned* counters;
  int counter_count;
  Axes finishes;       // whose parameters' gradients the launch's last blocks make:
  unsigned extra;      // so many, which have no tiles
  bool last_finishes;  // and the last block to have made spatial sums makes those of the pixels
};

// The arguments of the kernels that keep an image on the chip. Blocks of a team exchange small maps
// in arrays by image: nothing is written twice, so nobody waits until it has been read. The partial
// sums are written anew for each image, after the barrier at which the last ones had been read.
struct ChipArgs {
  Args<float> call;
  OnChip chip;
  float* partials;               // [team][block][column]: sums, where the barrier is a counter
  float *col_masks, *col_terms;  // [image][column]
  float* row_gradients;          // [image][row]: dz
  unsigned* counters;            // of the teams' barriers, kCounterStride apart
};

}  // namespace da::cuda
