#include "cuda/plan/plan.h"

#include "cuda/plan/memory.h"

namespace da::cuda {
namespace {

Tiling tile(const Problem& p, const Device& device, bool aligned, const Limits& limits) {
  Tiling t{};
  set_matrix(t, p);
  const int elements = 16 / p.element_size();
  const bool vectors = aligned && holds_vectors(t, elements);
  cut_rows(t, vectors ? elements : 1, kThreads, vectors ? limits.lanes : limits.scalar_lanes,
           [](int lanes) { return lanes; });

  // One wave of blocks where the tiles get neither too small nor too large.
  const int64_t blocks = device.multiprocessors * blocks_per_sm(p.element_size());
  const int64_t reads = ceil_div(ceil_div(t.rows, t.at_once()) * t.col_tiles * p.n, blocks);
  int64_t height = std::min(std::max(reads, limits.min_reads), limits.max_reads) * t.at_once();
  height = std::max(height, round_up(ceil_div(t.rows, limits.terms), t.period));
  const int64_t max_height = limits.height / (p.dtype == Dtype::float64 ? 8 : 4);
  height = std::min(height, std::max<int64_t>(max_height / t.period, 1) * t.period);
  t.row_tiles = ceil_div(t.rows, height);
  t.height = round_up(ceil_div(t.rows, t.row_tiles), t.period);
  t.row_tiles = ceil_div(t.rows, t.height);
  return t;
}

// Hands out places in the workspace.
struct Allocator {
  int64_t used = 0;
  int64_t operator()(int64_t elements) {
    const int64_t at = used;
    used += (elements + 3) / 4 * 4;  // each begins at 16 bytes
    return at;
  }
};

size_t shared_bytes(const Problem& p, const Plan& plan, Kernel kernel) {
  return p.dtype == Dtype::float64 ? Memory<double>(nullptr, plan.tiling, plan.halo, kernel).bytes
                                   : Memory<float>(nullptr, plan.tiling, plan.halo, kernel).bytes;
}

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
        schedule_(schedule(problem.order, backward_)) {
    if (backward_) weights_ = pending_ = masks(problem.order);
  }

  void passes() {
    for (const Pass& pass : schedule_) {
      const Kernel kernel = pass.sums.any() ? Kernel::sums : Kernel::scale;
      add(kernel, pass, tiles(), shared_bytes(p_, plan_, kernel));
      pending_ = pass.complete;
      weights_ = backward_ ? pass.complete : either(weights_, pass.complete);
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
      const Axes more = more_sums();
      w.more_pixel_sums = place(more.pixels ? by_pixel * t_.channel_tiles() : 0);
      w.more_channel_sums = place(more.channels ? by_channel * t_.pixel_tiles() : 0);
      w.d_channel_mean = place(by_pixel);
      w.d_logit = place(by_channel);
      w.d_pooled = place(by_channel);
      w.spatial_blocks = p_.spatial() && tiles() > 0 ? grid(tiles()) : 0;
      w.spatial_parts = place(w.spatial_blocks * kSpatialSums);
      w.gate_parts = place(p_.n * gate_parts(p_));
    }
    w.elements = place.used;
    return {steps_, w, {}};
  }

 private:
  void add(Kernel kernel, const Pass& pass, int64_t jobs, size_t shared_bytes) {
    steps_.push_back({kernel, pass, weights_, pending_, jobs, grid(jobs), shared_bytes});
  }
  void small(const char* name, Kernel kernel, int64_t jobs) {
    add(kernel, {name, kNothing, kNothing, Maps::masks, kNone, kNone}, jobs, small_bytes());
  }
  // Backward's second sums, which come on top of its first.
  Axes more_sums() const {
    for (const Pass& pass : schedule_)
      if (pass.weights == Maps::terms) return pass.sums;
    return kNone;
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
  Plan plan{};
  plan.tiling = tile(problem, device, aligned, limits);
  if (problem.spatial()) plan.halo = halo(plan.tiling.tile_pixels(), problem.w);
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
