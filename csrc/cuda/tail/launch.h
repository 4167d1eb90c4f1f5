// The residual tail's launchers, like those of cuda/launch.h.
#pragma once

#include "cuda/plan/tail.h"
#include "cuda/tail/args.h"

namespace da::cuda {

// A call's addresses on the device. Small maps, statistics and the workspace, of the direction's
// workspace.elements, are in the accumulation type.
struct TailPointers {
  const void *u, *shortcut;              // shortcut: of forward, null where there is none
  const void *dout, *out;                // of backward; out: null without a shortcut
  void* result;                          // out, or du
  void* d;                               // of backward, as big; null without a shortcut
  void* d_shortcut;                      // null without a norm of its own: it is d then; it may be
                                         // d, too, where the plan is in_place()
  void *channel_mean, *pooled;           // forward writes them, backward reads them
  NormArgs norm;                         // mean and var are null where forward takes the batch's
  void *new_mean, *new_var;              // of forward that does
  KeptOfNorm running_mean, running_var;  // of forward that does; null where not kept
  double momentum;                       // the batch's share in them
  int64_t* batches;                      // counts those that had one; null where not kept
  bool batch;                            // of backward: the statistics are the batch's
  void *d_weight, *d_bias;  // of backward, in the type of the norm's; null where not wanted
  NormArgs shortcut_norm;   // of a shortcut that goes through one, which is given backward, too
  bool shortcut_batch;
  void *d_shortcut_weight, *d_shortcut_bias;
  Parameters<const void*> parameters;
  bool wide;                    // the parameters are float32, beside a half u
  Parameters<void*> gradients;  // of backward, in the parameters' type; null where not wanted
  void* workspace;
  void* stream;
};

// One type's; defined in launch.cuh, instantiated in a source file for each type.
template <Dtype D>
int run_tail_as(const Problem& problem, const TailPlan& plan, Way way, const TailPointers& at);

#define DA_TAIL_LAUNCHER(how, D) \
  how int run_tail_as<D>(const Problem&, const TailPlan&, Way, const TailPointers&);
DA_TAIL_LAUNCHER(extern template, Dtype::float16)
DA_TAIL_LAUNCHER(extern template, Dtype::bfloat16)
DA_TAIL_LAUNCHER(extern template, Dtype::float32)
DA_TAIL_LAUNCHER(extern template, Dtype::float64)

// Runs one direction. Returns 0, or CUDA's error code.
inline int run_tail(const Problem& problem, const TailPlan& plan, Way way, const TailPointers& at) {
  constexpr decltype(&run_tail_as<Dtype::float16>) by_dtype[] = {
      run_tail_as<Dtype::float16>, run_tail_as<Dtype::bfloat16>, run_tail_as<Dtype::float32>,
      run_tail_as<Dtype::float64>};
  return by_dtype[static_cast<int>(problem.dtype)](problem, plan, way, at);
}

}  // namespace da::cuda
