#include "cuda/plan/plan.h"

#include <algorithm>
#include <numeric>

#include "cuda/plan/memory.h"

namespace da::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

Tiling tile(const Problem& p, const Device& device, bool aligned, const Limits& limits) {
  Tiling t{};
  // One pixel a channel: the channels are dense in either layout.
  t.channels_last = p.channels_last || p.pixels() == 1;
  t.rows = t.channels_last ? p.pixels() : p.c;
  t.cols = t.channels_last ? p.c : p.pixels();

  // A vector may reach into the next row, not into the one after, and not into the next image.
  const int64_t elements = 16 / p.element_size();
  const bool vectors = aligned && t.cols >= elements && t.rows * t.cols % elements == 0;
  t.vector = vectors ? elements : 1;
  const int64_t step = std::gcd(t.cols, int64_t(t.vector));  // rows start at its multiples
  t.period = t.vector / step;

  const int64_t max_lanes =
      std::min<int64_t>(vectors ? limits.lanes : limits.scalar_lanes, kThreads / t.period);
  const int64_t max_width = max_lanes * t.vector - (t.vector - step);
  t.col_tiles = ceil_div(t.cols, max_width);
  t.width = std::min(round_up(ceil_div(t.cols, t.col_tiles), t.vector), t.cols);
  if (t.width > max_width) t.width = max_width / t.vector * t.vector;
  t.col_tiles = ceil_div(t.cols, t.width);
  t.lanes = ceil_div(t.vector - step + t.width, t.vector);
  t.groups = kThreads / (t.lanes * t.period);

  // One wave of blocks where the tiles get neither too small nor too large.
  const int64_t at_once = int64_t(t.groups) * t.period;
  const int64_t blocks = device.multiprocessors * blocks_per_sm(p.element_size());
  const int64_t reads = ceil_div(ceil_div(t.rows, at_once) * t.col_tiles * p.n, blocks);
  int64_t height = std::min(std::max(reads, limits.min_reads), limits.max_reads) * at_once;
  height = std::max(height, round_up(ceil_div(t.rows, limits.terms), t.period));
  const int64_t max_height = limits.height / (p.dtype == Dtype::float64 ? 8 : 4);
  height = std::min(height, std::max<int64_t>(max_height / t.period, 1) * t.period);
  t.row_tiles = ceil_div(t.rows, height);
  t.height = round_up(ceil_div(t.rows, t.row_tiles), t.period);
  t.row_tiles = ceil_div(t.rows, t.height);
  return t;
}

Staging staging(const Problem& p, const Tiling& t) {
  const int64_t around = kReach * (p.w + 1);
  const int row = t.tile_pixels() + 2 * kReach;
  if (t.tile_pixels() + 2 * around <= 5 * row)
    return {1, static_cast<int>(t.tile_pixels() + 2 * around), static_cast<int>(around)};
  return {5, row, kReach};
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

size_t shared_bytes(const Problem& p, const Tiling& t, const Staging& s, bool sums) {
  return p.dtype == Dtype::float64 ? Memory<double>(nullptr, t, s, sums).bytes
                                   : Memory<float>(nullptr, t, s, sums).bytes;
}

int64_t finish_jobs(const Problem& p) {
  const int64_t gate = p.gate == Gate::affine ? ceil_div(p.c, 32) : gate_parts(p);
  return (p.spatial() ? 1 : 0) + (p.channel() ? gate : 0);
}

class Planner {
 public:
  Planner(const Problem& problem, const Plan& plan, const Limits& limits, bool backward)
      : p_(problem), t_(plan.tiling), s_(plan.staging), limits_(limits), backward_(backward) {}

  void passes() {
    for (const Pass& pass : schedule(p_.order, backward_)) {
      const bool sums = pass.sums.any();
      add(sums ? Kernel::sums : Kernel::scale, pass, tiles(), shared_bytes(p_, t_, s_, sums));
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
    for (const Pass& pass : schedule(p_.order, backward_))
      all.reads |= pass.reads, all.writes |= pass.writes;
    add(Kernel::on_chip, all, blocks, chip.memory.bytes);
  }

  const std::vector<Step>& steps() const { return steps_; }

  Direction direction() const {
    const int64_t maps = p_.spatial() ? p_.n * p_.pixels() : 0;
    const int64_t vectors = p_.channel() ? p_.n * p_.c : 0;
    Allocator place;
    Workspace w{};
    w.pixel_sums = place(maps * t_.channel_tiles());
    w.channel_sums = place(vectors * t_.pixel_tiles());
    w.spatial_mask = place(maps);
    w.channel_mask = place(vectors);
    if (backward_) {
      Axes more = kNone;
      for (const Step& step : steps_)
        if (step.pass.weights == Maps::terms) more = step.pass.sums;
      w.more_pixel_sums = place(more.pixels ? maps * t_.channel_tiles() : 0);
      w.more_channel_sums = place(more.channels ? vectors * t_.pixel_tiles() : 0);
      w.d_channel_mean = place(more.channels ? maps : 0);
      w.d_logit = place(vectors);
      w.spatial_blocks = p_.spatial() && tiles() > 0 ? grid(tiles()) : 0;
      w.spatial_parts = place(w.spatial_blocks * kSpatialSums);
      w.gate_parts = place(p_.n * gate_parts(p_));
    }
    w.elements = place.used;
    return {steps_, w, {}};
  }

 private:
  void add(Kernel kernel, const Pass& pass, int64_t jobs, size_t shared_bytes) {
    steps_.push_back({kernel, pass, pending_, jobs, grid(jobs), shared_bytes});
  }
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
  const Tiling& t_;
  const Staging& s_;
  const Limits& limits_;
  bool backward_;
  Axes pending_ = kNone;
  std::vector<Step> steps_;
};

}  // namespace

Plan plan(const Problem& problem, const Device& device, bool aligned, const Limits& limits) {
  Plan plan{};
  plan.tiling = tile(problem, device, aligned, limits);
  if (problem.spatial()) plan.staging = staging(problem, plan.tiling);
  Planner forward(problem, plan, limits, false), backward(problem, plan, limits, true);
  forward.passes();
  backward.passes();
  backward.finish();
  plan.forward = forward.direction();
  plan.backward = backward.direction();
  return plan;
}

Direction on_chip_direction(const Problem& p, const OnChip& chip, const Limits& limits) {
  Plan none{};
  Planner planner(p, none, limits, chip.backward);
  planner.on_chip(chip);
  if (chip.backward) planner.finish();

  const bool shared = chip.blocks > 1;  // among blocks, whose way is global memory
  const int64_t rows = shared ? p.n * chip.rows : 0, cols = shared ? p.n * chip.cols : 0;
  const bool group = shared && chip.barrier == Barrier::group;
  Allocator place;
  Workspace w{};
  w.partials = place(group ? int64_t(chip.images_at_once) * chip.blocks * chip.cols : 0);
  w.col_masks = place(cols);
  if (chip.backward) {
    w.col_terms = place(cols);
    w.row_gradients = place(chip.channels_last && p.spatial() ? rows : 0);
    w.d_logit = place(p.channel() ? p.n * p.c : 0);
    w.spatial_blocks = p.spatial() ? p.n * chip.blocks : 0;
    w.spatial_parts = place(w.spatial_blocks * kSpatialSums);
    w.gate_parts = place(p.n * gate_parts(p));
  }
  const int64_t counters = group ? int64_t(chip.images_at_once) * kCounterStride : 0;
  w.counters = place(counters);
  w.counter_bytes = counters * sizeof(unsigned);
  w.elements = place.used;
  return {planner.steps(), w, chip};
}

int64_t gate_parts(const Problem& problem) {
  if (!problem.channel()) return 0;
  return problem.gate == Gate::scalar ? 2 : problem.gate == Gate::eca ? problem.kernel_size : 0;
}

Device typical_device(int sm) {
  constexpr int64_t MiB = 1 << 20;
  constexpr Device known[] = {
      {120, 170, 96 * MiB},   // RTX 5090
      {100, 148, 126 * MiB},  // B200
      {90, 132, 50 * MiB},    // H100, H200
      {89, 128, 72 * MiB},    // RTX 4090
      {86, 82, 6 * MiB},      // RTX 3090
      {80, 108, 40 * MiB},    // A100
      {75, 40, 4 * MiB},      // T4
  };
  for (Device device : known)
    if (device.sm <= sm) return device;
  return known[std::size(known) - 1];
}

}  // namespace da::cuda
