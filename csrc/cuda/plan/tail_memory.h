// What a block of the residual tail's passes keeps in shared memory. The same code sizes it for the
// plan and carves it in the kernel.
#pragma once

#include "cuda/plan/memory.h"
#include "cuda/plan/tail.h"

namespace da::cuda {

// Maps over a tile, which rows or columns of the matrix read.
template <class A>
struct TailMemory {
  static constexpr int kChannelMaps = 7, kPixelMaps = 2;
  A* channel[kChannelMaps];
  A* pixel[kPixelMaps];
  A* scratch;    // sums on their way to other threads
  size_t bytes;  // in all

  // Takes the numbers of maps, and `rounds` of sums of rows, one a thread.
  DA_HD TailMemory(unsigned char* base, const Tiling& t, int channel_maps, int pixel_maps,
                   int rounds)
      : TailMemory(simt::Carver(base), t, channel_maps, pixel_maps, rounds) {}

  static constexpr int channel_maps(TailScale scale) {
    return scale == TailScale::forward ? 3 : scale == TailScale::rectified ? 7 : 6;
  }
  static constexpr int pixel_maps(TailScale scale) { return is_backward(scale) ? 2 : 1; }

  DA_HD static TailMemory of_sums(unsigned char* base, const Tiling& t, TailSums sums) {
    const bool deviations = sums == TailSums::deviations;
    const int row_sums = tail_depth(sums) * (deviations ? 1 : 2);  // of a thread's round
    return TailMemory(base, t, deviations ? 2 : 3, sums == TailSums::moments ? 0 : 1, 2 * row_sums);
  }
  DA_HD static TailMemory of_scale(unsigned char* base, const Tiling& t, TailScale scale) {
    return TailMemory(base, t, channel_maps(scale), pixel_maps(scale), 0);
  }

 private:
  DA_HD TailMemory(simt::Carver carve, const Tiling& t, int channel_maps, int pixel_maps,
                   int rounds) {
    for (int i = 0; i < kChannelMaps; i++)
      channel[i] = carve.take<A>(i < channel_maps ? t.tile_channels() : 0);
    for (int i = 0; i < kPixelMaps; i++)
      pixel[i] = carve.take<A>(i < pixel_maps ? t.tile_pixels() : 0);
    scratch = carve.take<A>(rounds * kPitch);
    bytes = carve.bytes();
  }
};

}  // namespace da::cuda
