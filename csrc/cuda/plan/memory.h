// What a block of the portable passes keeps in shared memory. The same code sizes it for the plan
// and carves it in the kernel.
#pragma once

#include "cuda/plan/plan.h"

namespace da::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kDepth = 4;                 // reads that a thread has in flight
constexpr int kPitch = kThreads * 3 / 2;  // threads' sums, each row's padded to an odd number

// The arrays that a block needs to run the stencil over its pixels.
template <class A>
struct StencilMemory {
  A* stencil;  // coefficients and bias
  A* window;   // a map's values at the pixels and around them, see Halo
  A* spatial;  // each lane's spatial sum

  DA_HD StencilMemory(simt::Carver& carve, const Halo& halo) {
    const bool any = halo.pieces > 0;
    stencil = carve.take<A>(any ? kStencil : 0);
    window = carve.take<A>(halo.pieces * halo.length);
    spatial = carve.take<A>(any ? kThreads : 0);
  }
};

// The arrays of a kernel that sums, or of one that scales.
template <class A>
struct Memory {
  A* last;  // not 0: of the blocks that count themselves, where dx is made, this is the last
  A *pixel_factor, *channel_factor;  // of the tile: masks, or terms that weigh backward's sums
  A *pixel_term, *channel_term;      // of the tile, where dx is made
  A* scratch;                        // sums on their way to other threads
  StencilMemory<A> around;
  size_t bytes;  // in all

  DA_HD Memory(unsigned char* base, const Tiling& t, const Halo& halo, Kernel kernel)
      : Memory(simt::Carver(base), t, halo, kernel == Kernel::scale) {}

 private:
  DA_HD Memory(simt::Carver carve, const Tiling& t, const Halo& halo, bool scales)
      : last(carve.take<A>(scales ? 1 : 0)),
        pixel_factor(carve.take<A>(t.tile_pixels())),
        channel_factor(carve.take<A>(t.tile_channels())),
        pixel_term(carve.take<A>(scales ? t.tile_pixels() : 0)),
        channel_term(carve.take<A>(scales ? t.tile_channels() : 0)),
        scratch(carve.take<A>(scales ? 0 : 2 * kDepth * kPitch)),
        around(carve, halo),
        bytes(carve.bytes()) {}
};

// The arrays of the launch that makes maps.
template <class A>
struct MapsMemory {
  A* sums;      // a thread's share of a sum, or a band's values
  A* channels;  // values of a band of channels and those around it, or a number of each warp
  StencilMemory<A> around;
  size_t bytes;  // in all

  DA_HD MapsMemory(unsigned char* base, const Bands& bands)
      : MapsMemory(simt::Carver(base), bands) {}

 private:
  DA_HD MapsMemory(simt::Carver carve, const Bands& bands)
      : sums(carve.take<A>(bands.pixels < kThreads ? kThreads : bands.pixels)),
        channels(carve.take<A>(bands.channel_window)),
        around(carve, bands.halo),
        bytes(carve.bytes()) {}
};

// The array of the small launches.
struct SmallMemory {
  double* sums;
  size_t bytes;

  DA_HD explicit SmallMemory(unsigned char* base) {
    simt::Carver carve(base);
    sums = carve.take<double>(4 * kThreads + kSpatialPitch);
    bytes = carve.bytes();
  }
};

}  // namespace da::cuda
