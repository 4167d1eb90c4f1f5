#include "cuda/plan/choose.h"

#include <algorithm>
#include <cstdlib>

#include "cuda/plan/cache.h"
#include "cuda/plan/tile.h"
#include "sizes.h"

namespace da::cuda {
namespace {

bool proven(int sm) {
  return std::any_of(proofs().begin(), proofs().end(), [=](const Proof& p) { return p.sm == sm; });
}

// Estimates, in microseconds. What is said to be measured was fitted to the times on an H200 in
// benchmarks/results/nvidia-h200.json, cold and in graphs, of which tests/test_plan_cost.py says
// how near they come; with memory_rate() and kWaveTime.
//
// A launch of blocks that stream, in a graph: measured. Where the next one begins early, a small
// one between two of these takes no longer than its instructions: measured, too.
constexpr double kLaunch = 1;
// The time of backward's last pass beyond its counted work, measured. It was 2 to 4 less without
// the parameters' gradients.
constexpr double kLastPass = 5;
// The last launch after the one that keeps an image on the chip: as a pass.
constexpr double kFinish = kLaunch + kWaveTime;
// One step of an image, apart from its sweep: masks or terms are made; in a team blocks wait for
// each other, forward or backward, and exchange their sums by column, so many KB of a block. These
// and the next ones were fitted to the times of all teams that these stages may have (half
// precision, 64 images).
constexpr double kStepAlone = 3.5, kStep[] = {5, 12.5}, kExchange = 0.15;
// Warp instructions of a multiprocessor in a microsecond: of passes while maps are made, and of the
// one launch, where it takes so many warps to issue that many.
constexpr double kIssued = 3000, kIssuedOnChip = 5000, kIssuing = 10;
// A turn of the ring through which chunks pass that are not kept.
constexpr double kTurn = 0.3;
// Warp instructions for a vector: a sweep over x, over dy x; y, dx, of whole rows and of split
// ones; and for each 32 pixels of a spatial mask. build_tools/cuda_limits.py has the most that they
// may be.
constexpr double kSum = 40, kProduct = 65, kScale[][2] = {{40, 70}, {50, 90}}, kOfMask = 150;
// The cost of what passes read from L2, as a share of reading from memory: measured. The one
// launch, which waits for what it reads again, gains nothing by that.
constexpr double kFromL2 = 0.5;

// Warp instructions of a block for an image.
double instructions(const Problem& p, const OnChip& chip) {
  const double rows = ceil_div(chip.slab_rows, chip.round_rows()) * kChipRows;
  const double vectors = rows * chip.col_tiles * chip.warps;
  const double sums = chip.backward ? kProduct + (chip.steps - 1) * kSum : chip.steps * kSum;
  const auto masks = [&](int pixels) { return p.spatial() ? kOfMask * ceil_div(pixels, 32) : 0; };
  const int slab = chip.slab_rows;
  const double made = masks(chip.by_pixel ? slab : chip.slice);
  const double recalled = chip.backward ? masks(chip.by_pixel ? slab : chip.recalled) : 0;
  return vectors * (sums + kScale[chip.backward][chip.period > 1]) + made + recalled;
}

// The numbers of blocks that are tried; others differ too little from these.
constexpr int kBlocks[] = {2, 4, 8, 16, 32, 64};

}  // namespace

double cost(const Problem& p, const Device& device, const OnChip& chip) {
  const double waves = ceil_div(p.n, chip.images_at_once);
  const double sharing =  // blocks of a multiprocessor
      ceil_div(int64_t(chip.blocks) * chip.images_at_once, device.multiprocessors);
  const double image = double(p.rows() * p.cols()) * p.element_size();
  const double slab = image / chip.blocks / memory_rate(device.sm);
  // Chunks that pass through the rings in all, and those of them that are read again.
  const double x = chip.chunks - chip.kept;
  const double dy = chip.backward ? chip.chunks - chip.kept_dy : 0;
  const double again = (chip.visits - 1) * x + (chip.visits_dy - 1) * dy;
  const double turns = x > 0 ? chip.visits * x / chip.ring : 0;
  const double turns_dy = dy > 0 ? chip.visits_dy * dy / chip.ring_dy : 0;
  // While a block loads others of its multiprocessor compute, and so does it itself after its first
  // chunk. Alone it has few warps.
  const double issued = instructions(p, chip) / kIssuedOnChip;
  const double alone = issued * std::max(1., kIssuing / chip.warps);
  const double moved = slab * (chip.backward ? 3 : 2);
  const double sweeps = std::max({sharing * moved, sharing * issued, alone}) +
                        sharing * (1 + again) * slab / chip.chunks + kTurn * (turns + turns_dy);
  const double sums = chip.masks.cols ? chip.cols * sizeof(float) / 1e3 : 0;
  const double step = chip.barrier == Barrier::block
                          ? kStepAlone
                          : kStep[chip.backward] + sharing * sums * kExchange;
  const int launches = chip.barrier == Barrier::counter ? 2 : 1;  // the first clears the counters
  return launches * kLaunch + waves * (sweeps + chip.steps * step) + (chip.backward ? kFinish : 0);
}

double cost(const Problem& p, const Device& device, const Plan& plan, Way way) {
  double sum = 0;
  for (const Step& step : plan[way].steps) {
    const int tensors = count(step.pass.reads) + count(step.pass.writes);
    const double blocks = std::clamp<int64_t>(step.jobs, 1, device.multiprocessors);
    if (tensors == 0) {
      sum += (plan.early ? 0 : kLaunch) + double(step.count.once) / blocks / kIssued;
      continue;
    }
    const double found = expected_in_l2(p, device, plan[way], step);
    const double bytes = double(tensors) * p.bytes() - (1 - kFromL2) * found;
    const Waves w = waves(p, device, plan, plan[way], step);
    sum += ceil_div(step.jobs, step.grid) * kLaunch + w.waves * kWaveTime;
    if (bytes > 0)
      sum += bytes * parts(p, device, w) / (memory_rate(device.sm) * w.slots * w.efficiency);
    sum += double(step.making) / blocks / kIssued;
    if (step.last_finishes || step.extra > 0) sum += kLastPass;
  }
  return sum;
}

bool parse(const std::string& all, Wish& wish) {
  using Kind = Wish::Kind;
  const size_t comma = std::min(all.find(','), all.size());
  const std::string text = all.substr(0, comma);
  wish = {};
  if (comma + 1 == all.size()) return false;
  Limits& l = wish.limits;
  if (comma < all.size() && !da::parse(all.substr(comma + 1), {{"grid", &l.grid, 1},
                                                               {"partials", &l.partials, 1},
                                                               {"launch", &l.launch, 0},
                                                               {"share", &l.share, 1},
                                                               {"lanes", &l.lanes, 2},
                                                               {"scalar_lanes", &l.scalar_lanes, 1},
                                                               {"height", &l.height, 1},
                                                               {"min_reads", &l.min_reads, 1},
                                                               {"max_reads", &l.max_reads, 1},
                                                               {"chip_lanes", &l.chip_lanes, 4},
                                                               {"chip_rows", &l.chip_rows, 8},
                                                               {"chunks", &l.chunks, 1},
                                                               {"kept", &l.kept, 0}}))
    return false;
  const auto is = [&](const char* name, Kind kind) {
    if (text == name) wish.kind = kind;
    return text == name;
  };
  if (is("", Kind::automatic) || is("portable", Kind::portable) || is("onchip", Kind::on_chip))
    return true;
  const size_t colon = text.find(':');
  const std::string digits = colon == std::string::npos ? "" : text.substr(colon + 1);
  const bool number = !digits.empty() && digits.size() <= 3 && digits[0] != '0' &&
                      digits.find_first_not_of("0123456789") == std::string::npos;
  if (colon != std::string::npos && !number) return false;
  for (int i = 0; i < 3; i++)
    if (text.substr(0, colon) == kBarriers[i]) {
      wish.kind = Kind::exact, wish.barrier = static_cast<Barrier>(i);
      wish.blocks = number ? std::atoi(digits.c_str()) : 0;
      return true;
    }
  return false;
}

Residents typical_residents(const Device& device) {
  return [device](const OnChip& chip) -> int {
    const auto bytes = static_cast<int64_t>(chip.memory.bytes);
    int fitting = kChipBlocks;
    while (fitting > 0 && bytes > shared_limit(device.sm, fitting)) fitting--;
    if (chip.barrier != Barrier::cluster) return fitting * device.multiprocessors / chip.blocks;
    constexpr int kProcessors = 16;  // of a part of the GPU, in which a cluster lies
    return device.multiprocessors / kProcessors * (fitting * kProcessors / chip.blocks);
  };
}

OnChip choose(const Problem& problem, Way way, const Device& device, bool aligned, const Wish& wish,
              const Residents& residents) {
  OnChip best{};
  constexpr const char* kNoTeam = "the device holds no such team of blocks";
  best.refused = kNoTeam;
  if (wish.kind == Wish::Kind::portable)
    best.refused = "DA_OPS_PLAN=portable";
  else if (wish.kind == Wish::Kind::automatic && !proven(device.sm))
    best.refused = "no results show it faster on this architecture (DA_OPS_PLAN=onchip tries it)";
  if (best.refused != kNoTeam) return best;
  Limits limits = wish.limits;
  if (!loads_behind(device.sm)) limits.chunks = 1;
  double least = 0;
  const auto consider = [&](Barrier barrier, int blocks, int blocks_per_sm) {
    OnChip chip = on_chip(problem, way, aligned, barrier, blocks,
                          shared_limit(device.sm, blocks_per_sm), limits);
    if (chip.refused) {
      if (best.refused == kNoTeam) best.refused = chip.refused;
      return;
    }
    const int teams = residents(chip);
    if (teams < 1) return;
    chip.images_at_once = std::clamp<int64_t>(problem.n, 1, teams);
    const double takes = cost(problem, device, chip);
    if (best.refused || takes < least) best = chip, least = takes;
  };
  for (Barrier barrier : {Barrier::block, Barrier::cluster, Barrier::counter}) {
    if (wish.kind == Wish::Kind::exact && wish.barrier != barrier) continue;
    if (barrier == Barrier::cluster && !has_clusters(device.sm)) {
      if (best.refused == kNoTeam) best.refused = "clusters need compute capability 9.0";
      continue;
    }
    for (int per_sm = kChipBlocks; per_sm >= 1; per_sm--)
      if (wish.blocks > 0 || barrier == Barrier::block)
        consider(barrier, std::max(wish.blocks, 1), per_sm);
      else
        for (int blocks : kBlocks) consider(barrier, blocks, per_sm);
  }
  if (wish.kind == Wish::Kind::automatic && !best.refused) {
    const Plan passes = plan(problem, device, aligned, wish.limits);
    if (cost(problem, device, passes, way) < least) best.refused = "the passes should be faster";
  }
  return best;
}

const std::vector<Proof>& proofs() {
  static const std::vector<Proof> found = {};
  return found;
}

}  // namespace da::cuda
