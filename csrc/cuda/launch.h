// The launchers: torch-free, and asynchronous on the stream. All pointers are to the device.
#pragma once

#include "cuda/args.h"

namespace da::cuda {

// `workspace` has plan.forward.workspace.elements numbers of the accumulation type, as have
// channel_mean [n, pixels] and pooled [n, c]. 0, or CUDA's error code.
template <class T, class A>
int forward(const Problem& problem, const Plan& plan, const Parameters& parameters, const void* x,
            void* y, A* channel_mean, A* pooled, A* workspace, void* stream);

// Null gradients are not wanted; the others are in their parameters' type.
template <class T, class A>
int backward(const Problem& problem, const Plan& plan, const Parameters& parameters, const void* dy,
             const void* x, const A* channel_mean, const A* pooled, void* dx,
             const Gradients& gradients, A* workspace, void* stream);

}  // namespace da::cuda
