// Who makes the small maps: every block of the pass that needs them, for its tile, or a launch
// before that pass, once. The launch is made where a multiprocessor has fewer instructions then,
// also with those that it could issue while the launch gets going.
#pragma once

#include "cuda/plan/tile.h"

namespace da::cuda {

// How the axes are cut up, with bands of so many pixels.
Bands bands(const Problem& problem, const Tiling& tiling, int pixels = kThreads);
// With bands of so many that one wave of blocks is enough, if the blocks' memory holds so many: the
// fewer bands, the fewer rows that lie around them.
Bands one_wave(const Problem& problem, const Tiling& tiling, const Device& device);

// The axes whose maps a launch makes, of those that a pass needs made, and by what count; and
// warps' instructions for those that the pass makes itself. `more`: the axes whose sums are in two
// parts.
struct Between {
  Axes axes;
  Count count;
  int64_t left;
};
Between between(const Problem& problem, const Device& device, const Plan& plan, Axes needed,
                Made made, Axes more, const Limits& limits);

size_t maps_bytes(const Problem& problem, const Bands& bands);

}  // namespace da::cuda
