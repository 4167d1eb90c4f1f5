#include "cuda/plan/choose.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "sizes.h"

namespace da::cuda {
namespace {

bool proven(int sm) {
  return std::any_of(proofs().begin(), proofs().end(), [=](const Proof& p) { return p.sm == sm; });
}

// Estimates: bytes that a multiprocessor moves while a team waits for itself once, by its barrier;
// the cost of reading from L2, as a share of reading from memory; and the share of L2 to count on.
constexpr int64_t kWaiting[] = {8 << 10, 32 << 10, 64 << 10};
constexpr double kFromL2 = 0.35, kUsableL2 = 0.7;

// How often a block reads again what it does not keep of x.
int rereads(const Problem& p) { return sum_passes(schedule(p.order, false)); }

// Bytes that a multiprocessor moves until the launch is done; its waiting is counted as bytes.
double cost(const Problem& p, const Device& device, const OnChip& chip) {
  const int64_t waves = ceil_div(p.n, chip.images_at_once);
  const int64_t blocks = int64_t(chip.blocks) * chip.images_at_once;
  const int64_t sharing = ceil_div(blocks, device.multiprocessors);  // blocks of a multiprocessor
  const double image = double(p.rows() * p.cols()) * p.element_size();
  const double again = rereads(p) * (1 - double(chip.kept) / chip.chunks) +
                       (chip.backward ? 1 - double(chip.kept_dy) / chip.chunks : 0);
  const bool in_l2 = chip.images_at_once * image * again < kUsableL2 * device.l2_bytes;
  const double passes = (chip.backward ? 3 : 2) + again * (in_l2 ? kFromL2 : 1);
  // While a block waits, others of its multiprocessor work.
  const double waiting = double(kWaiting[int(chip.barrier)]) / sharing;
  return waves * (passes * sharing * image / chip.blocks + waiting);
}

// The numbers of blocks that are tried; others differ too little from these.
constexpr int kBlocks[] = {2, 4, 8, 16, 32, 64};

}  // namespace

bool parse(const std::string& all, Wish& wish) {
  using Kind = Wish::Kind;
  const size_t comma = std::min(all.find(','), all.size());
  const std::string text = all.substr(0, comma);
  wish = {};
  if (comma + 1 == all.size()) return false;
  Limits& l = wish.limits;
  if (comma < all.size() && !da::parse(all.substr(comma + 1), {{"grid", &l.grid, 1},
                                                               {"terms", &l.terms, 1},
                                                               {"launch", &l.launch, 0},
                                                               {"share", &l.share, 1},
                                                               {"lanes", &l.lanes, 2},
                                                               {"scalar_lanes", &l.scalar_lanes, 1},
                                                               {"height", &l.height, 1},
                                                               {"min_reads", &l.min_reads, 1},
                                                               {"max_reads", &l.max_reads, 1},
                                                               {"chip_lanes", &l.chip_lanes, 4},
                                                               {"chunks", &l.chunks, 1},
                                                               {"kept", &l.kept, 0},
                                                               {"fold_bytes", &l.fold_bytes, 1}}))
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
    const int fitting = bytes <= shared_limit(device.sm, 2)   ? 2
                        : bytes <= shared_limit(device.sm, 1) ? 1
                                                              : 0;
    if (chip.barrier != Barrier::cluster) return fitting * device.multiprocessors / chip.blocks;
    constexpr int kProcessors = 16;  // of a part of the GPU, in which a cluster lies
    return device.multiprocessors / kProcessors * (fitting * kProcessors / chip.blocks);
  };
}

OnChip choose(const Problem& problem, Way way, const Device& device, bool aligned, const Wish& wish,
              const Residents& residents) {
  OnChip best{};
  constexpr const char* kNone = "the device holds no such team of blocks";
  best.refused = kNone;
  if (wish.kind == Wish::Kind::portable)
    best.refused = "DA_OPS_PLAN=portable";
  else if (wish.kind == Wish::Kind::automatic && !proven(device.sm))
    best.refused = "no results show it faster on this architecture (DA_OPS_PLAN=onchip tries it)";
  if (best.refused != kNone) return best;
  double least = 0;
  const auto consider = [&](Barrier barrier, int blocks, int blocks_per_sm) {
    OnChip chip = on_chip(problem, way, aligned, barrier, blocks,
                          shared_limit(device.sm, blocks_per_sm), wish.limits);
    if (chip.refused) {
      if (best.refused == kNone) best.refused = chip.refused;
      return;
    }
    const int teams = residents(chip);
    if (teams < 1) return;
    chip.images_at_once = std::clamp<int64_t>(problem.n, 1, teams);
    const double bytes = cost(problem, device, chip);
    if (best.refused || bytes < least) best = chip, least = bytes;
  };
  for (Barrier barrier : {Barrier::block, Barrier::cluster, Barrier::counter}) {
    if (wish.kind == Wish::Kind::exact && wish.barrier != barrier) continue;
    if (barrier == Barrier::cluster && !has_clusters(device.sm)) {
      if (best.refused == kNone) best.refused = "clusters need compute capability 9.0";
      continue;
    }
    for (int per_sm = kChipBlocks; per_sm >= 1; per_sm--)
      if (wish.blocks > 0 || barrier == Barrier::block)
        consider(barrier, std::max(wish.blocks, 1), per_sm);
      else
        for (int blocks : kBlocks) consider(barrier, blocks, per_sm);
  }
  return best;
}

const std::vector<Proof>& proofs() {
  static const std::vector<Proof> found = {};
  return found;
}

}  // namespace da::cuda
