// From a plan's steps to launches.
#pragma once

#include <algorithm>

#include "cuda/common/finish.cuh"
#include "cuda/launch.h"
#include "cuda/onchip/kernels.cuh"
#include "cuda/portable/maps.cuh"
#include "cuda/portable/passes.cuh"
#include "cuda/simt/launch.cuh"

namespace da::cuda {
namespace detail {

// What the layer's launches and the residual tail's have alike: `At` is Pointers or TailPointers.
template <class A, class At>
Args<A> common_arguments(const Problem& p, const Tiling& t, const Bands& bands, const Workspace& w,
                         Way way, const At& at) {
  A* const work = static_cast<A*>(at.workspace);
  Args<A> args{};
  args.images = p.n, args.channels = p.c, args.pixels = p.pixels();
  args.height = p.h, args.width = p.w;
  args.masks = masks(p.order), args.outer = outer(p.order);
  args.gate = p.gate, args.kernel_size = p.kernel_size;
  args.tiling = t, args.bands = bands, args.padded = Padded(p.w);
  args.parameters = at.parameters, args.wide = at.wide, args.gradients = at.gradients;
  args.pixel_sums = {work + w.pixel_sums, t.channel_tiles(), args.pixels};
  args.channel_sums = {work + w.channel_sums, t.pixel_tiles(), args.channels};
  const Axes second = way == Way::backward ? second_sums(p.order) : kNone;
  if (second.pixels) {
    args.more_pixel_sums = args.pixel_sums;
    args.more_pixel_sums.data = work + w.more_pixel_sums;
  }
  if (second.channels) {
    args.more_channel_sums = args.channel_sums;
    args.more_channel_sums.data = work + w.more_channel_sums;
  }
  args.channel_mean = static_cast<A*>(at.channel_mean);
  args.pooled = static_cast<A*>(at.pooled);
  args.spatial_mask = work + w.spatial_mask, args.channel_mask = work + w.channel_mask;
  args.d_channel_mean = work + w.d_channel_mean;
  args.d_logit = work + w.d_logit, args.d_pooled = work + w.d_pooled;
  args.spatial_parts = work + w.spatial_parts, args.spatial_blocks = w.spatial_blocks;
  args.gate_parts = work + w.gate_parts, args.shares = w.shares;
  args.counters = reinterpret_cast<unsigned*>(work + w.done);
  args.counter_count = w.done_counters;
  return args;
}

template <class A>
Args<A> arguments(const Problem& p, const Plan& plan, Way way, const Pointers& at) {
  Args<A> args = common_arguments<A>(p, plan.tiling, plan.bands, plan[way].workspace, way, at);
  args.halo = plan.halo;
  args.x = at.x, args.dy = at.dy, args.out = at.out;
  return args;
}

template <class T, int E, Sums Kind, Fit How>
auto sums_kernel(Lines wanted) {
  if constexpr (!kSpecialised<T, E> || Kind == Sums::backward) {
    return sums<T, E, Kind, Adds::any, How>;
  } else {
    const auto one =
        wanted.rows ? sums<T, E, Kind, Adds::rows, How> : sums<T, E, Kind, Adds::cols, How>;
    if constexpr (Kind == Sums::forward)
      return wanted.rows && wanted.cols ? sums<T, E, Kind, Adds::any, Fit::split> : one;
    else
      return one;  // backward goes through one mask at a time
  }
}

template <class T, int E, Fit How>
int launch_pass(const Pass& pass, const simt::Launch& launch, const Args<accumulate_t<T>>& args) {
  if (pass.writes & kY) return simt::launch(launch, scale<T, E, false, How>, args);
  if (pass.writes & kDx) return simt::launch(launch, scale<T, E, true, How>, args);
  const Lines wanted = lines(pass.sums, args.tiling.by_pixel);
  if (pass.reads & kDy)
    return simt::launch(launch, sums_kernel<T, E, Sums::backward, How>(wanted), args);
  return pass.weights == Maps::terms
             ? simt::launch(launch, sums_kernel<T, E, Sums::through, How>(wanted), args)
             : simt::launch(launch, sums_kernel<T, E, Sums::forward, How>(wanted), args);
}

template <class T>
int launch_pass(const Pass& pass, const simt::Launch& launch, const Args<accumulate_t<T>>& args) {
  constexpr int E = 16 / sizeof(T);
  if (args.tiling.vector == 1) return launch_pass<T, 1, Fit::whole>(pass, launch, args);
  if constexpr (kSpecialised<T, E>)
    if (args.tiling.period == 1) return launch_pass<T, E, Fit::whole>(pass, launch, args);
  return launch_pass<T, E, Fit::split>(pass, launch, args);
}

template <class T>
int launch_maps(const Step& step, const simt::Launch& launch, Args<accumulate_t<T>> args) {
  args.halo = args.bands.halo;
  switch (step.made) {
    case Made::masks_of_sums:
      return simt::launch(launch, maps<T, Made::masks_of_sums>, args);
    case Made::masks_again:
      return simt::launch(launch, maps<T, Made::masks_again>, args);
    default:
      return simt::launch(launch, maps<T, Made::terms>, args);
  }
}

// Clears the counters of a launch that finishes the parameters' gradients, which then waits for it.
template <class A>
int clear_counters(simt::Launch& launch, const Args<A>& args) {
  if (args.shares <= 1 || args.first_job > 0) return 0;
  launch.early = false;
  return simt::clear(args.counters, args.counter_count * sizeof(unsigned), launch.stream);
}

template <class T>
int launch_finish(simt::Launch launch, const Args<accumulate_t<T>>& args) {
  const int error = clear_counters(launch, args);
  return error ? error : simt::launch(launch, finish<T>, args);
}

template <class T>
int launch_step(const Step& step, const simt::Launch& launch, const Args<accumulate_t<T>>& args) {
  switch (step.kernel) {
    case Kernel::maps:
      return launch_maps<T>(step, launch, args);
    case Kernel::finish:
      return launch_finish<T>(launch, args);
    default:
      return launch_pass<T>(step.pass, launch, args);
  }
}

inline simt::Launch chip_launch(const OnChip& chip, void* stream) {
  const unsigned blocks = chip.blocks;
  return {blocks * chip.images_at_once,
          static_cast<unsigned>(chip.threads),
          chip.memory.bytes,
          stream,
          blocks,
          chip.barrier == Barrier::cluster};
}

template <class T>
auto chip_kernel(const OnChip& chip) {
  return chip.backward ? chip_backward<T> : chip_forward<T>;
}

template <class T>
int launch_on_chip(const Direction& direction, const Args<float>& call, float* workspace,
                   void* stream) {
  const Workspace& w = direction.workspace;
  const OnChip& chip = direction.chip;
  const bool gradients = chip.backward && chip.by_pixel && chip.blocks > 1;
  unsigned* const counters = reinterpret_cast<unsigned*>(workspace + w.counters);
  const ChipArgs args{call,
                      chip,
                      workspace + w.partials,
                      workspace + w.col_masks,
                      workspace + w.col_terms,
                      gradients ? workspace + w.row_gradients : nullptr,
                      counters};
  const int error = w.counter_bytes ? simt::clear(counters, w.counter_bytes, stream) : 0;
  return error ? error : simt::launch(chip_launch(chip, stream), chip_kernel<T>(chip), args);
}

// Runs the steps in turn.
//
// With `early`, a launch may begin when the blocks of the one before have all begun: it then waits,
// in every thread, until that one has ended, before it reads or writes any memory but x, dy and the
// parameters, which no launch of the call writes. As no launch ends before it has waited for the
// one before it, all earlier ones have ended as well by then. The first launch of a call is not
// early: whatever the stream had to do before, whose memory the call reads or was given to write,
// is done when it begins, and so before any launch of the call does. And whatever the stream does
// next begins when the last launch has ended, and so after all of the call: the workspace can be
// another's then. After clear() launches are not early either: that they wait for it is not
// promised.
template <class T>
int run_steps(const Direction& direction, Args<accumulate_t<T>> args, accumulate_t<T>* workspace,
              bool early, void* stream) {
  bool first = true;
  for (const Step& step : direction.steps) {
    if constexpr (!std::is_same_v<T, double>) {
      if (step.kernel == Kernel::on_chip) {
        const int error = step.jobs > 0 ? launch_on_chip<T>(direction, args, workspace, stream) : 0;
        if (error != 0) return error;
        first = step.jobs == 0;
        continue;
      }
    }
    // Backward's second sums come on top of its first.
    const bool more = step.pass.weights == Maps::terms;
    const Axes sums = step.pass.sums;
    args.weights = step.weights, args.pending = step.pending;
    args.new_pixel_sums = (more ? args.more_pixel_sums : args.pixel_sums).data;
    args.new_channel_sums = (more ? args.more_channel_sums : args.channel_sums).data;
    if (!sums.pixels) args.new_pixel_sums = nullptr;
    if (!sums.channels) args.new_channel_sums = nullptr;

    args.finishes = step.finishes;
    args.tile_step = step.backwards ? -1 : 1;
    const int64_t all = step.jobs + step.extra;
    for (args.first_job = 0; args.first_job < all; args.first_job += step.grid) {
      args.first_tile = step.backwards ? step.jobs - 1 - args.first_job : args.first_job;
      const int64_t left = std::max<int64_t>(step.jobs - args.first_job, 0);
      simt::Launch launch{};
      launch.grid = std::min<int64_t>(step.grid, all - args.first_job);
      args.extra = launch.extra = launch.grid - std::min<int64_t>(launch.grid, left);
      args.last_finishes = step.last_finishes && 0 < left && left <= launch.grid;
      launch.block = kThreads;
      launch.shared_bytes = step.shared_bytes;
      launch.stream = stream;
      launch.early = early && !first;
      launch.backwards = step.backwards;
      first = false;
      const int error = launch_step<T>(step, launch, args);
      if (error != 0) return error;
    }
  }
  return 0;
}

}  // namespace detail

template <Dtype D>
using storage_t =
    std::conditional_t<D == Dtype::float16, simt::float16,
                       std::conditional_t<D == Dtype::bfloat16, simt::bfloat16,
                                          std::conditional_t<D == Dtype::float32, float, double>>>;

template <Dtype D>
int run_as(const Problem& problem, const Plan& plan, Way way, const Pointers& at) {
  using A = accumulate_t<storage_t<D>>;
  return detail::run_steps<storage_t<D>>(plan[way], detail::arguments<A>(problem, plan, way, at),
                                         static_cast<A*>(at.workspace), plan.early, at.stream);
}

template <Dtype D>
int early_launches_as(bool& possible) {
  return simt::early_launches(finish<storage_t<D>>, possible);
}

template <Dtype D>
int resident_teams_as(const OnChip& chip, int& teams) {
  teams = 0;
  if constexpr (D == Dtype::float64)
    return 0;
  else
    return simt::resident_teams(detail::chip_launch(chip, nullptr),
                                detail::chip_kernel<storage_t<D>>(chip), teams);
}

}  // namespace da::cuda
