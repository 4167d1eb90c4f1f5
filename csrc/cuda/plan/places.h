// Places in the workspace, and the jobs of the launch that makes the parameters' gradients: the
// same for the layer's passes and for the residual tail's.
#pragma once

#include <algorithm>

#include "cuda/plan/plan.h"

namespace da::cuda {

// Hands out places in the workspace.
struct Allocator {
  int64_t used = 0;
  int64_t operator()(int64_t elements) {
    const int64_t at = used;
    used += (elements + 3) / 4 * 4;  // each begins at 16 bytes
    return at;
  }
};

// Blocks that add up a part of a scalar or eca gate's gradients, each some of the images: one where
// there is none.
inline int shares(const Problem& p, const Limits& limits) {
  constexpr int64_t kMost = 64;
  if (gate_parts(p) == 0) return 1;
  return std::clamp<int64_t>(p.n * p.c / limits.share, 1, std::clamp<int64_t>(p.n, 1, kMost));
}

// Blocks that make the parameters' gradients of these axes.
inline int64_t finish_jobs(const Problem& p, Axes axes, const Limits& limits) {
  const int64_t gate = p.gate == Gate::affine ? ceil_div(p.c, kThreads / affine_sharing(p.n))
                                              : gate_parts(p) * shares(p, limits);
  return (axes.pixels ? 1 : 0) + (axes.channels ? gate : 0);
}

// Places for what the parameters' gradients are made of.
inline void place_parts(const Problem& p, const Limits& limits, Allocator& place, Workspace& w) {
  w.spatial_parts = place(w.spatial_blocks * kSpatialPitch);
  w.shares = shares(p, limits);
  const int64_t parts = w.shares > 1 ? gate_parts(p) : 0;  // one share needs no place
  w.gate_parts = place(parts * w.shares);
  w.done_counters = static_cast<int>(1 + parts);
  w.done = place(w.done_counters);
}

}  // namespace da::cuda
