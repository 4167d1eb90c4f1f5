#include "cuda/plan/tail.h"

#include "cuda/plan/cache.h"
#include "cuda/plan/maps.h"
#include "cuda/plan/places.h"
#include "cuda/plan/tail_memory.h"

namespace da::cuda {
namespace {

template <class A>
size_t pass_bytes(const Tiling& t, const TailStep& step) {
  return (step.kernel == TailKernel::sums ? TailMemory<A>::of_sums(nullptr, t, step.sums)
                                          : TailMemory<A>::of_scale(nullptr, t, step.scale))
      .bytes;
}

// Collects the launches of one direction.
class TailPlanner {
 public:
  TailPlanner(const Problem& problem, TailKind kind, const TailPlan& plan, const Limits& limits,
              Way way)
      : p_(problem),
        kind_(kind),
        plan_(plan),
        limits_(limits),
        backward_(way == Way::backward),
        masks_(masks(problem.order)),
        schedule_(schedule(problem.order, backward_)) {
    backward_ ? backward() : forward();
    // Every other pass, the last among them, as the layer's.
    bool backwards = true;
    for (auto step = steps_.rbegin(); step != steps_.rend(); step++)
      if (step->reads) step->backwards = backwards, backwards = !backwards;
  }

  TailDirection direction() const {
    const Tiling& t = plan_.tiling;
    const int64_t by_pixel = masks_.pixels ? p_.n * p_.pixels() : 0;
    const int64_t by_channel = masks_.channels ? p_.n * p_.c : 0;
    const int64_t channel_sums = p_.n * p_.c * t.pixel_tiles();
    const int64_t bands = masks_.pixels ? p_.n * plan_.bands.of_pixels(p_.pixels()) : 0;
    Allocator place;
    TailWorkspace w{};
    w.channel_sums = place(channel_sums);
    w.products = place(channel_sums);
    w.pixel_sums = place(by_pixel * t.channel_tiles());
    w.spatial_mask = place(by_pixel);
    w.channel_mask = place(by_channel);
    w.mask_sums = place(bands);
    if (backward_) {
      w.du_terms = place(2 * p_.c);
      const bool more = masks_.pixels && second_sums(p_.order).pixels;
      w.more_pixel_sums = place(more ? by_pixel * t.channel_tiles() : 0);
      w.term_products = place(masks_.pixels ? channel_sums : 0);
      w.d_channel_mean = place(by_pixel);
      w.term_sums = place(bands);
      w.d_logit = place(by_channel);
      w.d_pooled = place(by_channel);
      w.pooled_x = place(by_channel);
      w.spatial_blocks = spatial_blocks();
      place_parts(p_, limits_, place, w);
    }
    w.elements = place.used;
    return {steps_, w};
  }

 private:
  void forward() {
    if (kind_.batch) {
      sums("statistics", TailSums::moments, kU, kChannels);
      small(TailKernel::norm, "norm", ceil_div(p_.c, plan_.norm_channels));
    }
    if (kind_.statistics) return;
    for (const Pass& pass : schedule_) {
      if (!pass.sums.any()) {
        const char* const name = kind_.shortcut ? "scale, add, rectify" : "scale, rectify";
        scale(name, kind_.shortcut_norm ? TailScale::normed : TailScale::forward,
              kind_.shortcut ? kU | kShortcut : kU, kOut);
        continue;
      }
      sums(pass.name, TailSums::deviations, kU, pass.sums);
      maps("masks", Made::masks_of_sums, pass.complete);
      weights_ = either(weights_, pass.complete);
    }
  }

  void backward() {
    // The channel mask is made of what was summed with the outer one, whose sum must be there.
    if (outer(p_.order).pixels) {
      maps("spatial mask", Made::masks_again, kPixels);
      maps("channel mask", Made::masks_again, Axes{false, masks_.channels});
    } else {
      maps("masks", Made::masks_again, masks_);
    }
    weights_ = masks_;
    const Axes all = either(masks_, kChannels);
    const char* const first = "ReLU and mask gradients";
    if (kind_.shortcut)
      sums(first, TailSums::gradients, kDout | kOut | kU, all, kD);
    else
      sums(first, TailSums::rectified, kDout | kU, all);
    for (const Pass& pass : schedule_) {
      if (!pass.sums.any()) continue;
      if (pass.weights == Maps::terms) through_sums(pass.name, pass.sums);
      maps("terms of dx", Made::terms, pass.complete);
    }
    if (masks_.pixels && !second_sums(p_.order).channels)
      through_sums("through the norm", kChannels);
    small(TailKernel::gradients, "parameter gradients",
          ceil_div(p_.c, plan_.norm_channels) + finish_jobs(p_, masks_, limits_));
    if (kind_.shortcut)
      scale("combine", TailScale::backward, kind_.batch ? kD | kU : kD, kDu);
    else
      scale("combine", TailScale::rectified, kDout | kU, kDu);
    if (kind_.shortcut_norm) through_shortcut_norm();
  }

  // From d to the gradients of the shortcut and of its norm, as of u without attention.
  void through_shortcut_norm() {
    const size_t before = steps_.size();
    weights_ = kNone;
    sums("sums for the shortcut's norm", TailSums::rectified, kD | kShortcut, kChannels);
    small(TailKernel::gradients, "its parameter gradients", ceil_div(p_.c, plan_.norm_channels));
    scale("combine for the shortcut", TailScale::backward,
          kind_.shortcut_batch ? kD | kShortcut : kD, plan_.in_place() ? kD : kDShortcut);
    for (size_t i = before; i < steps_.size(); i++) steps_[i].of_shortcut = true;
  }

  void sums(const char* name, TailSums sums, unsigned reads, Axes axes, unsigned writes = 0) {
    TailStep step{};
    step.kernel = TailKernel::sums, step.name = name, step.sums = sums;
    step.reads = reads, step.writes = writes, step.axes = axes;
    pass(step);
  }
  void through_sums(const char* name, Axes axes) {
    sums(name, TailSums::deviations, kU, axes);
    steps_.back().maps = Maps::terms;
  }
  void scale(const char* name, TailScale scale, unsigned reads, unsigned writes) {
    TailStep step{};
    step.kernel = TailKernel::scale, step.name = name, step.scale = scale;
    step.reads = reads, step.writes = writes;
    pass(step);
  }
  void pass(TailStep step) {
    const Tiling& t = plan_.tiling;
    step.shared_bytes =
        p_.dtype == Dtype::float64 ? pass_bytes<double>(t, step) : pass_bytes<float>(t, step);
    add(step, p_.n * t.tiles());
  }
  void small(TailKernel kernel, const char* name, int64_t jobs) {
    TailStep step{};
    step.kernel = kernel, step.name = name, step.shared_bytes = SmallMemory(nullptr).bytes;
    add(step, jobs);
  }
  void maps(const char* name, Made made, Axes axes) {
    if (!axes.any()) return;
    const Bands& b = plan_.bands;
    TailStep step{};
    step.kernel = TailKernel::maps, step.name = name, step.made = made, step.axes = axes;
    step.shared_bytes = maps_bytes(p_, b);
    add(step, p_.n * ((axes.pixels ? b.of_pixels(p_.pixels()) : 0) +
                      (axes.channels ? b.of_channels(p_.c) : 0)));
  }
  void add(TailStep step, int64_t jobs) {
    step.weights = weights_, step.jobs = jobs;
    step.grid = std::clamp<int64_t>(jobs, 1, limits_.grid);
    steps_.push_back(step);
  }
  // Blocks that make spatial sums: those of the step that makes the spatial term of dx.
  int64_t spatial_blocks() const {
    for (const TailStep& step : steps_)
      if (step.kernel == TailKernel::maps && step.made == Made::terms && step.axes.pixels)
        return std::min<int64_t>(step.grid, p_.n * plan_.bands.of_pixels(p_.pixels()));
    return 0;
  }

  const Problem& p_;
  const TailKind kind_;
  const TailPlan& plan_;
  const Limits& limits_;
  const bool backward_;
  const Axes masks_;
  const Schedule& schedule_;
  Axes weights_ = kNone;
  std::vector<TailStep> steps_;
};

}  // namespace

TailPlan tail_plan(const Problem& problem, TailKind kind, const Device& device, bool aligned,
                   const Limits& limits) {
  require_places(problem);
  // Blocks of a pass make no maps, and so the tiles that suit it are those of a pass without masks.
  Problem unmasked = problem;
  unmasked.order = Order::none;
  TailPlan plan{};
  plan.tiling = tile(unmasked, device, aligned, limits, {kFewPerSm, kManyPerSm});
  plan.tiling.complete();
  plan.bands = one_wave(problem, plan.tiling, device);
  // Where there would be fewer blocks than multiprocessors, more threads share a channel's sums.
  constexpr int kMany = 8, kFew = 4;
  plan.norm_channels = ceil_div(problem.c, kMany) < device.multiprocessors ? kFew : kMany;
  plan.early = device.early_launches;
  plan.forward = TailPlanner(problem, kind, plan, limits, Way::forward).direction();
  plan.backward = TailPlanner(problem, kind, plan, limits, Way::backward).direction();
  return plan;
}

Waves waves(const Problem& p, const Device& device, const TailPlan& plan, const TailStep& step) {
  if (step.reads) {
    const int per_sm =
        step.kernel == TailKernel::sums ? tail_per_sm(step.sums, p.element_size()) : kFewPerSm;
    return waves(plan.tiling, p.n, slots(p, device, step.shared_bytes, per_sm));
  }
  const int per_sm = step.kernel == TailKernel::maps ? kMapsPerSm : 1;
  return waves(step.jobs, int64_t(device.multiprocessors) * per_sm);
}

int64_t expected_in_l2(const Problem& p, const Device& device, const TailDirection& direction,
                       const TailStep& step) {
  Direction passes{};
  for (const TailStep& each : direction.steps) {
    Step pass{};
    pass.pass.reads = each.reads, pass.pass.writes = each.writes, pass.backwards = each.backwards;
    passes.steps.push_back(pass);
  }
  return expected_in_l2(p, device, passes, passes.steps[&step - direction.steps.data()]);
}

}  // namespace da::cuda
