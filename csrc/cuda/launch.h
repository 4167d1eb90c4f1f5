// The launchers: torch-free, asynchronous on the stream, with the device's pointers.
#pragma once

#include "cuda/common/args.h"

namespace da::cuda {

// A call's addresses on the device. `channel_mean` [n, pixels], `pooled` [n, c] and the workspace,
// of the direction's workspace.elements, are in the accumulation type.
struct Pointers {
  const void *x, *dy;           // dy: of backward
  void* out;                    // y or dx
  void *channel_mean, *pooled;  // forward writes them, backward reads them
  Parameters<const void*> parameters;
  bool wide;                    // the parameters are float32, beside a half x
  Parameters<void*> gradients;  // of backward, in the parameters' type; null where not wanted
  void* workspace;
  void* stream;
};

// One type's; defined in launch.cuh, instantiated in a source file for each type.
template <Dtype D>
int run_as(const Problem& problem, const Plan& plan, Way way, const Pointers& at);

template <Dtype D>
int resident_teams_as(const OnChip& chip, int& teams);

template <Dtype D>
int early_launches_as(bool& possible);

// `how` is `template` to instantiate a type's launchers, `extern template` where others do.
#define DA_LAUNCHERS(how, D)                                            \
  how int run_as<D>(const Problem&, const Plan&, Way, const Pointers&); \
  how int resident_teams_as<D>(const OnChip&, int&);                    \
  how int early_launches_as<D>(bool&);
DA_LAUNCHERS(extern template, Dtype::float16)
DA_LAUNCHERS(extern template, Dtype::bfloat16)
DA_LAUNCHERS(extern template, Dtype::float32)
DA_LAUNCHERS(extern template, Dtype::float64)

// Runs one direction. Returns 0, or CUDA's error code.
inline int run(const Problem& problem, const Plan& plan, Way way, const Pointers& at) {
  constexpr decltype(&run_as<Dtype::float16>) by_dtype[] = {
      run_as<Dtype::float16>, run_as<Dtype::bfloat16>, run_as<Dtype::float32>,
      run_as<Dtype::float64>};
  return by_dtype[static_cast<int>(problem.dtype)](problem, plan, way, at);
}

// Sets how many teams of such a launch the current device holds at once, 0 where it cannot run it.
// Returns 0, or CUDA's error code.
inline int resident_teams(Dtype dtype, const OnChip& chip, int& teams) {
  constexpr decltype(&resident_teams_as<Dtype::float16>) by_dtype[] = {
      resident_teams_as<Dtype::float16>, resident_teams_as<Dtype::bfloat16>,
      resident_teams_as<Dtype::float32>, resident_teams_as<Dtype::float64>};
  return by_dtype[static_cast<int>(dtype)](chip, teams);
}

// Sets whether the current device knows early launches, see simt::Launch. Returns 0, or CUDA's
// error code.
inline int early_launches(bool& possible) {
  return early_launches_as<Dtype::float32>(possible);  // all types are compiled alike
}

}  // namespace da::cuda
