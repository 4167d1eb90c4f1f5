// From a plan's steps to launches of the residual tail.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/launch.cuh"
#include "cuda/tail/launch.h"
#include "cuda/tail/maps.cuh"
#include "cuda/tail/scale.cuh"
#include "cuda/tail/sums.cuh"

namespace da::cuda {
namespace detail {

template <class T, class A = accumulate_t<T>>
TailArgs<A> tail_arguments(const Problem& p, const TailPlan& plan, Way way,
                           const TailPointers& at) {
  const TailWorkspace& w = plan[way].workspace;
  A* const work = static_cast<A*>(at.workspace);
  TailArgs<A> args{};
  Args<A>& call = args.call;
  call = common_arguments<A>(p, plan.tiling, plan.bands, w, way, at);
  call.halo = plan.bands.halo, call.x = at.u, call.finishes = call.masks;
  args.products = args.term_products = call.channel_sums;
  args.products.data = work + w.products;
  args.term_products.data = work + w.term_products;
  if (call.more_channel_sums.data) call.more_channel_sums = args.term_products;

  args.shortcut = at.shortcut, args.out = at.out, args.dout = at.dout;
  args.d = at.d, args.result = at.result;
  args.norm_channels = plan.norm_channels;
  args.batch = at.batch, args.norm = at.norm, args.shortcut_norm = at.shortcut_norm;
  args.new_mean = static_cast<A*>(at.new_mean), args.new_var = static_cast<A*>(at.new_var);
  if (at.new_mean) {
    args.norm.mean = {at.new_mean, !std::is_same_v<A, T>};
    args.norm.var = {at.new_var, !std::is_same_v<A, T>};
  }
  args.running_mean = at.running_mean, args.running_var = at.running_var;
  args.momentum = at.momentum, args.batches = at.batches;
  args.d_weight = at.d_weight, args.d_bias = at.d_bias;
  args.du_slope = work + w.du_terms, args.du_offset = args.du_slope + p.c;
  args.mask_sums = work + w.mask_sums, args.term_sums = work + w.term_sums;
  args.pooled_x = work + w.pooled_x;
  args.pooled_u = call.pooled;
  return args;
}

template <class T, int E, ChannelsAre Are>
auto tail_pass(const TailStep& step) {
  if (step.kernel == TailKernel::scale) {
    switch (step.scale) {
      case TailScale::forward:
        return tail_scale<T, E, TailScale::forward, Are>;
      case TailScale::backward:
        return tail_scale<T, E, TailScale::backward, Are>;
      case TailScale::normed:
        return tail_scale<T, E, TailScale::normed, Are>;
      default:
        return tail_scale<T, E, TailScale::rectified, Are>;
    }
  }
  switch (step.sums) {
    case TailSums::moments:
      return tail_sums<T, E, TailSums::moments, Are>;
    case TailSums::deviations:
      return tail_sums<T, E, TailSums::deviations, Are>;
    case TailSums::gradients:
      return tail_sums<T, E, TailSums::gradients, Are>;
    default:
      return tail_sums<T, E, TailSums::rectified, Are>;
  }
}

template <class T, int E>
auto tail_pass(const TailStep& step, const Tiling& t) {
  return t.by_pixel ? tail_pass<T, E, ChannelsAre::cols>(step)
                    : tail_pass<T, E, ChannelsAre::rows>(step);
}

template <class T>
auto tail_kernel(const TailStep& step, const Tiling& t) {
  switch (step.kernel) {
    case TailKernel::norm:
      return tail_norm<T>;
    case TailKernel::gradients:
      return tail_gradients<T>;
    case TailKernel::maps:
      return step.made == Made::masks_of_sums ? tail_maps<T, Made::masks_of_sums>
             : step.made == Made::masks_again ? tail_maps<T, Made::masks_again>
                                              : tail_maps<T, Made::terms>;
    default:
      return t.vector == 1 ? tail_pass<T, 1>(step, t) : tail_pass<T, 16 / sizeof(T)>(step, t);
  }
}

// The terms of a step's sums, and the places that these go to.
template <class A>
void set_sums(const TailStep& step, TailArgs<A>& args) {
  Args<A>& call = args.call;
  const bool terms = step.maps == Maps::terms;
  args.maps = step.maps, call.weights = step.weights, call.pending = step.axes;
  call.new_pixel_sums = (terms ? call.more_pixel_sums : call.pixel_sums).data;
  call.new_channel_sums = (terms ? args.term_products : call.channel_sums).data;
  args.new_products = args.products.data;
  if (!step.axes.pixels) call.new_pixel_sums = nullptr;
  if (!step.axes.channels) call.new_channel_sums = nullptr;
}

// The arguments of a step of the shortcut's norm, from those of the others: the shortcut is its u,
// and d what comes back.
template <class A>
TailArgs<A> of_shortcut(const TailStep& step, TailArgs<A> args, const TailPointers& at) {
  args.call.x = at.shortcut, args.call.masks = args.call.outer = kNone, args.call.shares = 1;
  args.dout = at.d, args.result = at.d_shortcut;
  args.batch = at.shortcut_batch, args.norm = at.shortcut_norm;
  args.d_weight = at.d_shortcut_weight, args.d_bias = at.d_shortcut_bias;
  // No ReLU is on the way: it lets all of d pass where its argument is no number.
  if (step.kernel == TailKernel::sums) args.norm.eps = std::numeric_limits<double>::quiet_NaN();
  return args;
}

// Runs the steps in turn; as run_steps has it, a launch may begin when the blocks of the one before
// have all begun. No memory but u, the shortcut, out, dout and the parameters is read before that
// one has ended. But d is, by the sums of the shortcut's norm, which are not early.
template <class T>
int run_tail_steps(const Problem& p, const TailPlan& plan, Way way, const TailPointers& at) {
  using A = accumulate_t<T>;
  const TailArgs<A> of_u = tail_arguments<T>(p, plan, way, at);
  bool first = true;
  for (const TailStep& step : plan[way].steps) {
    TailArgs<A> args = step.of_shortcut ? of_shortcut(step, of_u, at) : of_u;
    Args<A>& call = args.call;
    set_sums(step, args);
    const bool early = plan.early && !(step.of_shortcut && step.kernel == TailKernel::sums);
    call.tile_step = step.backwards ? -1 : 1;
    for (call.first_job = 0; call.first_job < step.jobs; call.first_job += step.grid) {
      call.first_tile = step.backwards ? step.jobs - 1 - call.first_job : call.first_job;
      simt::Launch launch{};
      launch.grid = std::min<int64_t>(step.grid, step.jobs - call.first_job);
      launch.block = kThreads;
      launch.shared_bytes = step.shared_bytes;
      launch.stream = at.stream;
      launch.early = early && !first;
      launch.backwards = step.backwards;
      first = false;
      // The gate's gradients are made of what it was given.
      const bool gradients = step.kernel == TailKernel::gradients;
      call.pooled = gradients ? args.pooled_x : static_cast<A*>(at.pooled);
      if (gradients)
        if (const int error = clear_counters(launch, call)) return error;
      if (const int error = simt::launch(launch, tail_kernel<T>(step, plan.tiling), args))
        return error;
    }
  }
  return 0;
}

}  // namespace detail

template <Dtype D>
int run_tail_as(const Problem& problem, const TailPlan& plan, Way way, const TailPointers& at) {
  return detail::run_tail_steps<storage_t<D>>(problem, plan, way, at);
}

}  // namespace da::cuda
