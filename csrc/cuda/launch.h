// The launchers: torch-free, asynchronous on the stream, with the device's pointers.
#pragma once

#include "cuda/common/args.h"

namespace da::cuda {

// One type's; defined in launch.cuh, instantiated in a source file a type.
template <Dtype D>
int forward_as(const Problem& problem, const Plan& plan, const Parameters& parameters,
               const void* x, void* y, void* channel_mean, void* pooled, void* workspace,
               void* stream);
template <Dtype D>
int backward_as(const Problem& problem, const Plan& plan, const Parameters& parameters,
                const void* dy, const void* x, const void* channel_mean, const void* pooled,
                void* dx, const Gradients& gradients, void* workspace, void* stream);

template <Dtype D>
int resident_teams_as(const OnChip& chip, int& teams);

// `how` is `template` to instantiate a type's launchers, `extern template` where others do.
#define DA_LAUNCHERS(how, D)                                                                       \
  how int forward_as<D>(const Problem&, const Plan&, const Parameters&, const void*, void*, void*, \
                        void*, void*, void*);                                                      \
  how int backward_as<D>(const Problem&, const Plan&, const Parameters&, const void*, const void*, \
                         const void*, const void*, void*, const Gradients&, void*, void*);         \
  how int resident_teams_as<D>(const OnChip&, int&);
DA_LAUNCHERS(extern template, Dtype::float16)
DA_LAUNCHERS(extern template, Dtype::bfloat16)
DA_LAUNCHERS(extern template, Dtype::float32)
DA_LAUNCHERS(extern template, Dtype::float64)

// f(std::integral_constant<Dtype, dtype>())
template <class F>
int with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float16:
      return f(std::integral_constant<Dtype, Dtype::float16>());
    case Dtype::bfloat16:
      return f(std::integral_constant<Dtype, Dtype::bfloat16>());
    case Dtype::float32:
      return f(std::integral_constant<Dtype, Dtype::float32>());
    default:
      return f(std::integral_constant<Dtype, Dtype::float64>());
  }
}

// 0, or CUDA's error code. `channel_mean` [n, pixels], `pooled` [n, c] and the workspace, of
// plan.forward.workspace.elements, are in the accumulation type.
inline int forward(const Problem& problem, const Plan& plan, const Parameters& parameters,
                   const void* x, void* y, void* channel_mean, void* pooled, void* workspace,
                   void* stream) {
  return with_dtype(problem.dtype, [&](auto dtype) {
    return forward_as<decltype(dtype)::value>(problem, plan, parameters, x, y, channel_mean, pooled,
                                              workspace, stream);
  });
}

// Null gradients are not wanted; the others are in their parameters' type.
inline int backward(const Problem& problem, const Plan& plan, const Parameters& parameters,
                    const void* dy, const void* x, const void* channel_mean, const void* pooled,
                    void* dx, const Gradients& gradients, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto dtype) {
    return backward_as<decltype(dtype)::value>(problem, plan, parameters, dy, x, channel_mean,
                                               pooled, dx, gradients, workspace, stream);
  });
}

// How many images of such a launch the current device holds at once; 0: it cannot run it.
inline int resident_teams(Dtype dtype, const OnChip& chip, int& teams) {
  return with_dtype(
      dtype, [&](auto dtype) { return resident_teams_as<decltype(dtype)::value>(chip, teams); });
}

}  // namespace da::cuda
