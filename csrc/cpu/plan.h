// How the CPU backend splits a problem: a pure function of the problem and the machine, so that any
// machine can show any plan. The split into slabs does not depend on the number of threads, nor
// does any sum's order: results are bitwise the same for every thread count.
#pragma once

#include <vector>

#include "problem.h"

namespace da::cpu {

enum class Isa { generic, avx2, avx512 };

// The widest instruction set that this machine has and DA_OPS_CPU_ISA (a name) allows.
Isa instruction_set();
const char* name(Isa isa);

struct Machine {
  int64_t threads = 1;
  int64_t cache_bytes = 0;  // last-level cache; 0 when unknown
};

Machine this_machine(int64_t threads);

// Elements below which a second thread costs more than it brings.
constexpr int64_t kSharedWork = 32768;

struct Plan {
  int64_t threads;       // that have work
  int64_t whole_images;  // the first so many images go to one thread each, the rest to all together
  int64_t slab_rows;     // rows of an image's matrix that are reduced together
  int64_t slabs;         // per image
  bool stream;           // outputs bypass the caches
};

Plan plan(const Problem& problem, const Machine& machine);

// A sweep over full-size tensors, in units of x's size.
struct Pass {
  const char* name;
  int reads, writes;
};

std::vector<Pass> forward_passes(Order order);
std::vector<Pass> backward_passes(Order order);

// Whether what an image's passes read again is still in cache, so that memory sees each tensor
// once.
bool cached(const Problem& problem, const Machine& machine, bool backward);

}  // namespace da::cpu
