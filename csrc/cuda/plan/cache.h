// What the passes should find in L2. They walk the batch in turn forwards and backwards, for what
// was touched last is still there, and is read first so.
#pragma once

#include "cuda/plan/device.h"
#include "cuda/plan/plan.h"

namespace da::cuda {

// Bytes of what a step reads that the steps before it should have left in L2. What was there before
// the first of them is not counted.
int64_t expected_in_l2(const Problem& problem, const Device& device, const Direction& direction,
                       const Step& step);

}  // namespace da::cuda
