// What a block keeps in shared memory. The same code sizes it for the plan and carves it in the
// kernel.
#pragma once

#include "cuda/plan/plan.h"
#include "cuda/simt/carver.h"

namespace da::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kDepth = 4;                 // reads that a thread has in flight
constexpr int kPitch = kThreads * 3 / 2;  // threads' sums, each row's padded to an odd number

template <class A>
struct Memory {
  A *pixel, *channel;          // the tile's weights: masks, or what is added by pixel, by channel
  A *pixel_add, *channel_add;  // of the scaling kernels
  A* stencil;                  // coefficients and bias
  A* staged;                   // a map's pixels in and around the tile
  A* scratch;                  // of the summing kernels
  size_t bytes;

  DA_HD Memory(unsigned char* base, const Tiling& t, const Staging& staging, bool sums) {
    simt::Carver carve(base);
    pixel = carve.take<A>(t.tile_pixels());
    channel = carve.take<A>(t.tile_channels());
    pixel_add = carve.take<A>(sums ? 0 : t.tile_pixels());
    channel_add = carve.take<A>(sums ? 0 : t.tile_channels());
    stencil = carve.take<A>(2 * kTaps + 1);
    staged = carve.take<A>(staging.pieces * staging.length);
    scratch = carve.take<A>(sums ? 2 * kDepth * kPitch : 0);
    bytes = carve.bytes();
  }
};

// Of the small launches.
struct SmallMemory {
  double* sums;
  size_t bytes;

  DA_HD explicit SmallMemory(unsigned char* base) {
    simt::Carver carve(base);
    sums = carve.take<double>(2 * kThreads);
    bytes = carve.bytes();
  }
};

}  // namespace da::cuda
