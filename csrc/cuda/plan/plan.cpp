#include "cuda/plan/plan.h"

#include "cuda/plan/maps.h"
#include "cuda/plan/memory.h"
#include "cuda/plan/places.h"
#include "cuda/plan/tile.h"

namespace da::cuda {
namespace {

// Collects the launches of one direction.
class Planner {
 public:
  Planner(const Problem& problem, const Plan& plan, const Limits& limits, Way way)
      : p_(problem),
        plan_(plan),
        t_(plan.tiling),
        limits_(limits),
        backward_(way == Way::backward),
        schedule_(schedule(problem.order, backward_)) {
    if (backward_) weights_ = pending_ = masks(problem.order);
  }

  void passes(const Device& device) {
    for (const Pass& pass : schedule_) {
      const int64_t making = make_maps(device);
      const Kernel kernel = pass_kernel(pass);
      add(kernel, pass, tiles(), shared_bytes(p_, t_, plan_.halo, kernel), backwards(pass));
      steps_.back().making = making;
      if (pass.writes & kDx) finish(steps_.back());
      pending_ = pass.complete;
      weights_ = backward_ ? pass.complete : either(weights_, pass.complete);
    }
  }

  // The parameters' gradients in a launch of their own.
  void finish() {
    const Axes all = masks(p_.order);
    const int64_t jobs = finish_jobs(p_, all, limits_);
    if (jobs == 0) return;
    small("parameter gradients", Kernel::finish, jobs, small_bytes());
    steps_.back().finishes = all;
  }

  void on_chip(const OnChip& chip) {
    const int64_t blocks = p_.n > 0 ? int64_t(chip.blocks) * chip.images_at_once : 0;
    Pass all{"on chip", kNothing, kNothing, Maps::masks, masks(p_.order), masks(p_.order)};
    for (const Pass& pass : schedule_) all.reads |= pass.reads, all.writes |= pass.writes;
    add(Kernel::on_chip, all, blocks, chip.memory.bytes);
  }

  const std::vector<Step>& steps() const { return steps_; }

  Direction direction() const {
    const int64_t by_pixel = p_.spatial() ? p_.n * p_.pixels() : 0;
    const int64_t by_channel = p_.channel() ? p_.n * p_.c : 0;
    Allocator place;
    Workspace w{};
    w.pixel_sums = place(by_pixel * t_.channel_tiles());
    w.channel_sums = place(by_channel * t_.pixel_tiles());
    w.spatial_mask = place(by_pixel);
    w.channel_mask = place(by_channel);
    if (backward_) {
      const Axes more = second_sums(p_.order);
      w.more_pixel_sums = place(more.pixels ? by_pixel * t_.channel_tiles() : 0);
      w.more_channel_sums = place(more.channels ? by_channel * t_.pixel_tiles() : 0);
      w.d_channel_mean = place(by_pixel);
      w.d_logit = place(by_channel);
      w.d_pooled = place(by_channel);
      w.spatial_blocks = spatial_blocks();
      place_parts(p_, limits_, place, w);
    }
    w.elements = place.used;
    return {steps_, w, {}};
  }

 private:
  // And in the last pass, whose blocks may be about to make the sums for those of the pixels.
  void finish(Step& last) {
    last.last_finishes = p_.spatial() && pending_.pixels && tiles() > 0;
    last.finishes = {p_.spatial() && !last.last_finishes, p_.channel()};
    last.extra = finish_jobs(p_, last.finishes, limits_);
    last.grid = grid(last.jobs + last.extra);
    last.shared_bytes = std::max(last.shared_bytes, small_bytes());
  }
  void add(Kernel kernel, const Pass& pass, int64_t jobs, size_t shared_bytes,
           bool backwards = false) {
    steps_.push_back({kernel, pass, weights_, pending_, backwards, jobs, grid(jobs), shared_bytes});
  }
  // Every other pass, the last among them: whoever reads y or dx next begins with the first image,
  // which is then the last to have been written. Of three passes the first goes backwards too, and
  // finds what the launch that wrote x or dy wrote last; x itself is long gone when backward
  // begins.
  bool backwards(const Pass& pass) const { return (schedule_.end() - &pass) % 2 == 1; }
  // Makes those maps in a launch of their own of which the next pass would make too much. Warps'
  // instructions of that pass for the others.
  int64_t make_maps(const Device& device) {
    const bool first = steps_.empty();
    const Made kind = !backward_ ? Made::masks_of_sums : first ? Made::masks_again : Made::terms;
    const bool more = !first && steps_.back().pass.weights == Maps::terms;
    const Between made =
        between(p_, device, plan_, pending_, kind, more ? second_sums(p_.order) : kNone, limits_);
    if (!made.axes.any()) return made.left;
    const Axes rest{pending_.pixels && !made.axes.pixels, pending_.channels && !made.axes.channels};
    const Bands& b = plan_.bands;
    const int64_t jobs = p_.n * ((made.axes.pixels ? b.of_pixels(p_.pixels()) : 0) +
                                 (made.axes.channels ? b.of_channels(p_.c) : 0));
    pending_ = made.axes;
    small(kind == Made::terms ? "terms of dx" : "masks", Kernel::maps, jobs, maps_bytes(p_, b));
    steps_.back().made = kind;
    steps_.back().count = made.count;
    pending_ = rest;
    return made.left;
  }
  // Blocks that make spatial sums: those of the step that makes the spatial term of dx.
  int64_t spatial_blocks() const {
    const Step* maker = nullptr;
    bool masks_made = false;  // a first time, by the first pass or before it
    for (const Step& step : steps_) {
      if (!step.pending.pixels) continue;
      if (masks_made) maker = &step;
      masks_made = true;
    }
    if (!maker || maker->jobs == 0) return 0;
    const int64_t bands = p_.n * plan_.bands.of_pixels(p_.pixels());
    return std::min<int64_t>(maker->grid, maker->kernel == Kernel::maps ? bands : maker->jobs);
  }
  void small(const char* name, Kernel kernel, int64_t jobs, size_t shared_bytes) {
    add(kernel, {name, kNothing, kNothing, Maps::masks, kNone, kNone}, jobs, shared_bytes);
  }
  int64_t tiles() const { return p_.n * t_.tiles(); }
  unsigned grid(int64_t jobs) const { return std::clamp<int64_t>(jobs, 1, limits_.grid); }
  static size_t small_bytes() { return SmallMemory(nullptr).bytes; }

  const Problem& p_;
  const Plan& plan_;
  const Tiling& t_;
  const Limits& limits_;
  const bool backward_;
  const Schedule& schedule_;
  Axes weights_ = kNone, pending_ = kNone;
  std::vector<Step> steps_;
};

}  // namespace

Plan plan(const Problem& problem, const Device& device, bool aligned, const Limits& limits) {
  require_places(problem);
  Plan plan{};
  plan.tiling = tile(problem, device, aligned, limits);
  plan.tiling.complete();
  if (problem.spatial()) plan.halo = halo(problem, plan.tiling);
  plan.bands = bands(problem, plan.tiling);
  plan.early = device.early_launches;
  Planner forward(problem, plan, limits, Way::forward);
  Planner backward(problem, plan, limits, Way::backward);
  forward.passes(device);
  backward.passes(device);
  plan.forward = forward.direction();
  plan.backward = backward.direction();
  return plan;
}

Direction on_chip_direction(const Problem& p, const OnChip& chip, const Limits& limits) {
  const Plan none{};
  Planner planner(p, none, limits, chip.backward ? Way::backward : Way::forward);
  planner.on_chip(chip);
  if (chip.backward) planner.finish();

  // The blocks of a team exchange maps through global memory.
  const bool several = chip.blocks > 1;
  const int64_t rows = several ? p.n * chip.rows : 0, cols = several ? p.n * chip.cols : 0;
  const int64_t counting_teams =
      several && chip.barrier == Barrier::counter ? chip.images_at_once : 0;
  Allocator place;
  Workspace w{};
  w.partials = place(counting_teams * chip.blocks * chip.cols);
  w.col_masks = place(cols);
  if (chip.backward) {
    w.col_terms = place(cols);
    w.row_gradients = place(chip.by_pixel && p.spatial() ? rows : 0);
    w.d_logit = place(p.channel() ? p.n * p.c : 0);
    w.spatial_blocks = p.spatial() ? p.n * chip.blocks : 0;
    place_parts(p, limits, place, w);
  }
  w.counters = place(counting_teams * kCounterStride);
  w.counter_bytes = counting_teams * kCounterStride * sizeof(unsigned);
  w.elements = place.used;
  return {planner.steps(), w, chip};
}

int64_t gate_parts(const Problem& problem) {
  if (!problem.channel()) return 0;
  return problem.gate == Gate::scalar ? 2 : problem.gate == Gate::eca ? problem.kernel_size : 0;
}

}  // namespace da::cuda
