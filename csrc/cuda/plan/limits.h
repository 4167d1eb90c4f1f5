// What the planner decides by size. The numbers suit every GPU; tests set others, so that a small
// tensor meets what otherwise only a large one does.
#pragma once

#include <cstdint>

namespace da::cuda {

// Each is at most so many, but for min_reads, share and launch.
struct Limits {
  int64_t grid = 1 << 20;  // blocks of a launch; further launches take the rest
  int64_t partials = 32;   // sums that a block adds by itself; for more there is a launch
  // Instructions of a multiprocessor in the time that a small launch between two passes takes,
  // where it begins early; else twice as many (see between()).
  int64_t launch = 3500;
  int64_t lanes = 64;          // vectors that cover a tile's row
  int64_t scalar_lanes = 128;  // elements that do where there are no vectors
  int64_t height = 4096;       // bytes of a map's values at a tile's rows
  int64_t min_reads = 2;   // vectors that a thread reads in a tile: enough to pay for the masks,
  int64_t max_reads = 72;  // and few enough for many images' waves to end together
  int64_t share =
      8 << 10;  // of a gate's numbers, by image and channel, that a block adds up at least
  // The launch that keeps an image on the chip:
  int64_t chip_lanes = 1 << 10;  // vectors that cover a tile's row
  int64_t chip_rows = 1 << 10;   // rows that a block reads at once
  int64_t chunks = 2;            // chunks of a slab that is kept: one is added up, one on its way
  int64_t kept = 1 << 20;        // chunks of x, then of dy, in shared memory, if there is room
};

}  // namespace da::cuda
