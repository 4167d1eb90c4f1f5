// How the portable passes cut images into tiles, a block each, and how these blocks fill a GPU.
#pragma once

#include <initializer_list>

#include "cuda/plan/device.h"
#include "cuda/plan/plan.h"

namespace da::cuda {

// The blocks of a launch that run at once are a wave. They work alike, so that the launch takes as
// long as all its waves with the largest of tiles. Blocks of the last wave that are not there, and
// parts of tiles beyond an image's edge, are time in which a slot is idle.
struct Waves {
  int64_t blocks;
  int64_t slots;      // blocks that the GPU holds at once: at least, where registers are to spare
  int64_t waves;      // the last one may fill the slots in part, and so may the only one
  double efficiency;  // of what the slots could do in all waves, the share that is work
};

// Blocks of a pass that the device holds at once, where registers hold `per_sm` a multiprocessor;
// 0: as many as of the layer's.
int64_t slots(const Problem& problem, const Device& device, size_t shared_bytes, int per_sm = 0);

// Blocks that share a multiprocessor share what it moves in a wave: each gets one of so many parts.
// A block that is alone does not get all, for it has too few warps.
double parts(const Problem& problem, const Device& device, const Waves& waves);

// The waves of a launch whose blocks have a job each, all alike.
Waves waves(int64_t jobs, int64_t slots);

// The waves of a pass over images that are cut like this.
Waves waves(const Tiling& tiling, int64_t images, int64_t slots);

// The waves of any step of a direction.
Waves waves(const Problem& problem, const Device& device, const Plan& plan,
            const Direction& direction, const Step& step);

// The tiles whose blocks should be done first. `per_sm`: how many blocks a multiprocessor's
// registers hold, of each kind of pass, 0: as many as of the layer's. Waves are to be full of the
// first kind.
Tiling tile(const Problem& problem, const Device& device, bool aligned, const Limits& limits,
            std::initializer_list<int> per_sm = {0});

Halo halo(const Problem& problem, const Tiling& tiling);

// Shared memory of a block of the kernels that sum, or that scale.
size_t shared_bytes(const Problem& problem, const Tiling& tiling, const Halo& halo, Kernel kernel);

}  // namespace da::cuda
