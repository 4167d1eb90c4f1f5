#include "cuda/plan/plan.h"

#include "cuda/plan/memory.h"
#include "cuda/plan/tile.h"

namespace da::cuda {
namespace {

// Hands out places in the workspace.
struct Allocator {
  int64_t used = 0;
  int64_t operator()(int64_t elements) {
    const int64_t at = used;
    used += (elements + 3) / 4 * 4;  // each begins at 16 bytes
    return at;
  }
};

int64_t finish_jobs(const Problem& p) {
  const int64_t gate = p.gate == Gate::affine ? ceil_div(p.c, 32) : gate_parts(p);
  return (p.spatial() ? 1 : 0) + (p.channel() ? gate : 0);
}

// Collects the launches of one direction.
class Planner {
 public:
  Planner(const Problem& problem, const Plan& plan, const Limits& limits, Way way)
      : p_(problem),
        plan_(plan),
        t_(plan.tiling),
        limits_(limits),
        backward_(way == Way::backward),
        schedule_(schedule(problem.order, backward_)) {}

  void passes() {
    for (const Pass& pass : schedule_) {
      const Kernel kernel = pass.sums.any() ? Kernel::sums : Kernel::scale;
      add(kernel, pass, tiles(), shared_bytes(p_, t_, plan_.halo, kernel), backwards(pass));
      if (pass.sums.pixels && t_.channel_tiles() > limits_.terms) fold(pass, kPixels, p_.pixels());
      if (pass.sums.channels && t_.pixel_tiles() > limits_.terms) fold(pass, kChannels, p_.c);
      pending_ = pass.complete;
    }
  }

  void finish() {
    const int64_t parts = p_.n * gate_parts(p_);
    if (parts > 0) small("gate sums", Kernel::gate_sums, parts);
    if (finish_jobs(p_) > 0) small("parameter gradients", Kernel::finish, finish_jobs(p_));
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
      Axes more = kNone;
      for (const Step& step : steps_)
        if (step.pass.weights == Maps::terms) more = step.pass.sums;
      w.more_pixel_sums = place(more.pixels ? by_pixel * t_.channel_tiles() : 0);
      w.more_channel_sums = place(more.channels ? by_channel * t_.pixel_tiles() : 0);
      w.d_channel_mean = place(more.channels ? by_pixel : 0);
      w.d_logit = place(by_channel);
      w.spatial_blocks = p_.spatial() && tiles() > 0 ? grid(tiles()) : 0;
      w.spatial_parts = place(w.spatial_blocks * kSpatialSums);
      w.gate_parts = place(p_.n * gate_parts(p_));
    }
    w.elements = place.used;
    return {steps_, w, {}};
  }

 private:
  void add(Kernel kernel, const Pass& pass, int64_t jobs, size_t shared_bytes,
           bool backwards = false) {
    steps_.push_back({kernel, pass, pending_, backwards, jobs, grid(jobs), shared_bytes});
  }
  // Every other pass, the last among them: whoever reads y or dx next begins with the first image,
  // which is then the last to have been written. Of three passes the first goes backwards too, and
  // finds what the launch that wrote x or dy wrote last; x itself is long gone when backward
  // begins.
  bool backwards(const Pass& pass) const { return (schedule_.end() - &pass) % 2 == 1; }
  // Adds up one axis' partial sums of a pass.
  void fold(const Pass& pass, Axes axis, int64_t entries) {
    const int64_t jobs = p_.n * (entries < 32 ? entries : ceil_div(entries, 32));
    add(Kernel::fold, {"fold", kNothing, kNothing, pass.weights, axis, kNone}, jobs, small_bytes());
  }
  void small(const char* name, Kernel kernel, int64_t jobs) {
    add(kernel, {name, kNothing, kNothing, Maps::masks, kNone, kNone}, jobs, small_bytes());
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
  Axes pending_ = kNone;
  std::vector<Step> steps_;
};

}  // namespace

Plan plan(const Problem& problem, const Device& device, bool aligned, const Limits& limits) {
  Plan plan{};
  plan.tiling = tile(problem, device, aligned, limits);
  if (problem.spatial()) plan.halo = halo(problem, plan.tiling);
  plan.early = device.early_launches;
  Planner forward(problem, plan, limits, Way::forward);
  Planner backward(problem, plan, limits, Way::backward);
  forward.passes();
  backward.passes();
  backward.finish();
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
    w.row_gradients = place(chip.channels_last && p.spatial() ? rows : 0);
    w.d_logit = place(p.channel() ? p.n * p.c : 0);
    w.spatial_blocks = p.spatial() ? p.n * chip.blocks : 0;
    w.spatial_parts = place(w.spatial_blocks * kSpatialSums);
    w.gate_parts = place(p.n * gate_parts(p));
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
