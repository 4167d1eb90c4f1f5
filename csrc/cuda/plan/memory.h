// What a block of the portable passes keeps in shared memory. The same code sizes it for the plan
// and carves it in the kernel.
#pragma once

#include "cuda/plan/plan.h"

namespace da::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kDepth = 4;                 // reads that a thread has in flight
constexpr int kPitch = kThreads * 3 / 2;  // threads' sums, each row's padded to an odd number

// The arrays of a kernel that sums, or of one that scales.
template <class A>
struct Memory {
  A *pixel_factor, *channel_factor;  // of the tile: masks, or terms that weigh backward's sums
  A *pixel_term, *channel_term;      // of the tile, where dx is made
  A* stencil;                        // coefficients and bias
  A* halo;                           // a map's values in the tile and around it
  A* scratch;                        // sums on their way to other threads
  size_t bytes;                      // in all

  DA_HD Memory(unsigned char* base, const Tiling& t, const Halo& around, Kernel kernel) {
    const bool scales = kernel == Kernel::scale;
    simt::Carver carve(base);
    pixel_factor = carve.take<A>(t.tile_pixels());
    channel_factor = carve.take<A>(t.tile_channels());
    pixel_term = carve.take<A>(scales ? t.tile_pixels() : 0);
    channel_term = carve.take<A>(scales ? t.tile_channels() : 0);
    stencil = carve.take<A>(kStencil);
    halo = carve.take<A>(around.pieces * around.length);
    scratch = carve.take<A>(scales ? 0 : 2 * kDepth * kPitch);
    bytes = carve.bytes();
  }
};

// The array of the small launches.
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
