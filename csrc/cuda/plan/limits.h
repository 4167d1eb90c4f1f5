// What the planner decides by size, each at most but for min_reads. The numbers suit every GPU;
// tests set others, so that a small tensor meets what otherwise only a large one does.
#pragma once

#include <cstdint>

namespace da::cuda {

struct Limits {
  int64_t grid = 1 << 20;      // blocks of a launch; what is left goes to further ones
  int64_t terms = 32;          // sums that a block adds by itself; more are folded before
  int64_t lanes = 64;          // vectors that cover a tile's row
  int64_t scalar_lanes = 128;  // or elements, where there are no vectors
  int64_t height = 4096;       // bytes of a map's values at a tile's rows
  int64_t min_reads = 4;       // vectors that a thread reads in a tile: enough to pay for its
  int64_t max_reads = 32;      // masks, few enough to fill the GPU
  // Of the launch that keeps an image on the chip.
  int64_t chip_lanes = 1 << 10;  // vectors that cover a tile's row
  int64_t chunks = 8;            // of a slab
  int64_t kept = 1 << 20;        // chunks of x, then of dy, in shared memory, if there is room
  int64_t fold_bytes = 8 << 10;  // for sums of a block's rows, that are added by rounds
};

}  // namespace da::cuda
