#include "cuda/plan/tile.h"

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/plan/memory.h"

namespace da::cuda {
namespace {

// The measures by which one tiling is better than another.
struct Quality {
  double efficiency;  // of the first kind's pass whose waves are the least full; or
                      // multiprocessors, if small
  double time;        // of all passes, in microseconds
};

// How full waves are meant to be, and how many times the least time they may take: that is but an
// estimate, idle slots are certain. Where none are, how near to that time the fullest ones are to
// be.
constexpr double kFull = 0.9, kWorth = 2, kNear = 1.1;
// Partial sums that a thread adds up first in the time of a read.
constexpr double kSumsARead = 16;
constexpr int64_t kRead = kThreads * 16;  // bytes that a block's threads read at once

// Whether there is less than a round of reads for each slot: then no tiles fill a wave.
bool small(const Problem& p, int64_t slots) { return p.bytes() < slots * kDepth * kRead; }

Quality quality(const Problem& p, const Device& device, const Tiling& t,
                std::initializer_list<int> per_sm) {
  const Halo around = p.spatial() ? halo(p, t) : Halo{};
  // Half of the time goes by bytes, half by rounds of kDepth reads, also where a round's last ones
  // have no rows left, or some threads no columns.
  const int64_t reads = round_up(ceil_div(t.height, t.at_once()), kDepth);
  const double values = double(around.pieces) * around.length * t.channel_tiles() +
                        (p.channel() ? double(t.tile_channels()) * t.pixel_tiles() : 0);
  const double adding = values / kThreads / kSumsARead * kRead;
  Quality q{1, 0};
  const auto add = [&](const Pass& pass, int blocks) {
    const int64_t n = slots(p, device, shared_bytes(p, t, around, pass_kernel(pass)), blocks);
    const Waves w = waves(t, p.n, n);
    const double shared = parts(p, device, w), most = double(n) / device.multiprocessors;
    const double bytes = double(t.height) * t.width * p.element_size() * shared;
    const double streaming = (bytes + reads * kRead * most) / 2;
    const double all = streaming * (count(pass.reads) + count(pass.writes)) + adding * most;
    q.time += w.waves * (kWaveTime + all / memory_rate(device.sm));
    if (blocks == *per_sm.begin())
      q.efficiency = std::min(q.efficiency, w.efficiency * most / shared);
  };
  for (int blocks : per_sm)
    for (bool backward : {false, true})
      for (const Pass& pass : schedule(p.order, backward)) add(pass, blocks);
  return q;
}

}  // namespace

int64_t slots(const Problem& p, const Device& device, size_t shared_bytes, int per_sm) {
  int fitting = per_sm ? per_sm : blocks_per_sm(p.element_size());
  while (fitting > 1 && int64_t(shared_bytes) > shared_limit(device.sm, fitting)) fitting--;
  return int64_t(device.multiprocessors) * fitting;
}

double parts(const Problem& p, const Device& device, const Waves& w) {
  constexpr double kAlone = 1.25;  // a block has 8 warps, and 10 make a multiprocessor busy
  const double most = double(w.slots) / device.multiprocessors;
  if (!small(p, w.slots)) return most;
  const double blocks = ceil_div(w.blocks, device.multiprocessors);
  return std::min(std::max(blocks, kAlone), most);
}

Waves waves(int64_t jobs, int64_t slots) {
  const int64_t waves = ceil_div(jobs, slots);
  return {jobs, slots, waves, jobs ? double(jobs) / (waves * slots) : 0};
}

Waves waves(const Tiling& t, int64_t images, int64_t slots) {
  const int64_t blocks = images * t.tiles(), waves = ceil_div(blocks, slots);
  const double work = double(images) * t.rows * t.cols;
  return {blocks, slots, waves, blocks ? work / (double(waves) * slots * t.height * t.width) : 0};
}

Waves waves(const Problem& p, const Device& device, const Plan& plan, const Direction& direction,
            const Step& step) {
  switch (step.kernel) {
    case Kernel::sums:
    case Kernel::scale:
      return waves(plan.tiling, p.n, slots(p, device, step.shared_bytes));
    case Kernel::on_chip: {  // all its blocks run at once, and take image after image
      const Waves images = waves(p.n, std::max(direction.chip.images_at_once, 1));
      return {step.jobs, step.jobs, images.waves, images.efficiency};
    }
    case Kernel::maps:
      return waves(step.jobs, int64_t(device.multiprocessors) * kMapsPerSm);
    default:  // small launches, of which a multiprocessor holds one block at least
      return waves(step.jobs, device.multiprocessors);
  }
}

// The height and width, within the limits, that should take least time with full waves, if that is
// not much more than without; or else the fullest waves among those that take about the least.
// The larger tiles are, the fewer waves there are, each of which takes its time before it streams;
// the smaller, the better they fill waves. Where there is less to do than in one whole wave, no
// tiles fill it, and multiprocessors get equally many, for each is in use that has any.
Tiling tile(const Problem& p, const Device& device, bool aligned, const Limits& limits,
            std::initializer_list<int> per_sm) {
  Tiling t{};
  set_matrix(t, p);
  const int elements = 16 / p.element_size();
  const bool vectors = aligned && holds_vectors(t, elements);
  const int64_t max_height = limits.height / (p.dtype == Dtype::float64 ? 8 : 4);
  // Memory is read by sectors, of which lines of the cache have four: narrower tiles than need be
  // are whole sectors wide, where rows are, and a line at least.
  constexpr int64_t kLine = 128, kSector = 32;
  const int64_t row = t.cols * p.element_size();
  const int64_t most_tiles = std::min(row / kLine, limits.partials);
  const int64_t unit = row % kSector == 0 ? kSector / p.element_size() : 1;
  std::vector<std::pair<Tiling, Quality>> all;
  int width = 0;
  for (int64_t across = 1; across == 1 || across <= most_tiles; across++) {
    cut_rows(
        t, vectors ? elements : 1, kThreads, vectors ? limits.lanes : limits.scalar_lanes,
        [](int lanes) { return lanes; }, across, across > 1 ? unit : 1);
    if (t.width == width) continue;
    width = t.width;
    const int64_t highest = std::max<int64_t>(max_height / t.period, 1) * t.period;
    const auto tiles_of = [&](int64_t reads) {
      return std::min(ceil_div(t.rows, reads * t.at_once()), limits.partials);
    };
    const int64_t fewest = std::max(ceil_div(t.rows, highest), tiles_of(limits.max_reads));
    const int64_t most = std::max(fewest, tiles_of(limits.min_reads));
    t.height = 0;
    for (int64_t along = fewest; along <= most; along++) {
      const int64_t height = round_up(ceil_div(t.rows, along), t.period);
      if (height == t.height) continue;
      t.height = height;
      t.row_tiles = ceil_div(t.rows, height);
      all.emplace_back(t, quality(p, device, t, per_sm));
    }
  }
  const auto by_time = [](const auto& one, const auto& other) {
    return one.second.time < other.second.time;
  };
  const double least = std::min_element(all.begin(), all.end(), by_time)->second.time;
  const auto rank = [=](const Quality& q) {
    const bool full = q.efficiency >= kFull && q.time <= kWorth * least;
    const bool near = q.time <= kNear * least;
    return std::tuple(full, full || near, full ? -q.time : q.efficiency, -q.time);
  };
  const auto by_rank = [=](const auto& one, const auto& other) {
    return rank(one.second) < rank(other.second);
  };
  return std::max_element(all.begin(), all.end(), by_rank)->first;
}

Halo halo(const Problem& p, const Tiling& t) { return halo(t.tile_pixels(), p.w); }

size_t shared_bytes(const Problem& p, const Tiling& t, const Halo& halo, Kernel kernel) {
  return p.dtype == Dtype::float64 ? Memory<double>(nullptr, t, halo, kernel).bytes
                                   : Memory<float>(nullptr, t, halo, kernel).bytes;
}

}  // namespace da::cuda
