// Which launches a problem gets: the portable passes, or one launch that keeps the image on the
// chip, and with which team of blocks. Free of torch and of CUDA; the one thing that only a device
// knows, how many teams it holds at once, is asked through a function.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cuda/plan/plan.h"

namespace da::cuda {

// What the user wants, from the text of DA_OPS_PLAN:
//   ""           what the results for this architecture show to be best
//   "portable"   the portable passes
//   "onchip"     one launch wherever it is possible
//   "block", "cluster", "counter", also with a number of blocks as in "cluster:8"
//                one launch with this barrier; an error where it is impossible
// and after any of them limits, as in "portable,grid=64,terms=4": for tests.
struct Wish {
  enum class Kind { automatic, portable, on_chip, exact } kind = Kind::automatic;
  Barrier barrier = Barrier::block;  // of an exact wish
  int blocks = 0;                    // of a team; 0: any
  Limits limits;
};

bool parse(const std::string& text, Wish& wish);
constexpr const char* kWishes =
    "DA_OPS_PLAN: expected portable, onchip, block, cluster[:BLOCKS] or counter[:BLOCKS], got ";

// How many teams of this launch a device holds at once; 0: it cannot run it.
using Residents = std::function<int(const OnChip&)>;

// The teams that a typical GPU of the architecture should hold, for showing plans without one.
Residents typical_residents(const Device& device);

// An estimate of the time that a launch on the chip, or a direction of the passes, takes in all,
// cold, in microseconds. It counts launches, waves of blocks, bytes, what of them L2 has,
// instructions against issue slots, chunks, how long the blocks of a team wait for each other, and
// what they exchange.
double cost(const Problem& problem, const Device& device, const OnChip& chip);
double cost(const Problem& problem, const Device& device, const Plan& passes, Way way);

// The launch that should take least time, with images_at_once set; or `refused` says why the
// portable passes are to run, or why there is no launch as wished.
OnChip choose(const Problem& problem, Way way, const Device& device, bool aligned, const Wish& wish,
              const Residents& residents);

// Results, by the name of their file in benchmarks/results, that show the one launch right and
// faster than the portable passes on an architecture: it is the default there.
struct Proof {
  int sm;
  const char* results;
};
const std::vector<Proof>& proofs();

}  // namespace da::cuda
