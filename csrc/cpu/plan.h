// How the CPU backend splits a problem: a pure function of the problem and the machine, so that any
// machine can show any plan. The split into slabs does not depend on the number of threads, nor
// does any sum's order: results are bitwise the same for every thread count.
#pragma once

#include <string>

#include "kernels.h"
#include "problem.h"

namespace da::cpu {

enum class Isa { generic, avx2, avx512 };

// The widest instruction set that this machine has and DA_OPS_CPU_ISA (a name) allows; throws where
// it names none.
Isa instruction_set();
const char* name(Isa isa);

// What is decided by size. None of it shows in a result but for the slabs, and whether rows are
// added up together: these say in which order numbers are added.
struct Limits {
  int64_t cache_bytes = 0;      // last-level cache; 0 when unknown
  int64_t shared_work = 32768;  // elements below which a second thread costs more than it brings
  int64_t slabs = 16;           // aimed at per image, for threads to share
  int64_t slab_rows = 64;       // at most
  int64_t long_row = 1000;      // elements above which rows are added up together
  int64_t near_bytes = 8192;    // of what is kept by column, above which rows are scaled together
  int64_t joint_bytes = 65536;  // of an image, from which on passes may share a slab
  int64_t hot_bytes = 524288;   // of x, above which lines that are written may have to be fetched
};

// This machine's, but for those that a text such as "cache=1,slabs=4" names; false where it is
// none.
bool parse(const std::string& text, Limits& limits);
constexpr const char* kLimits =
    "DA_OPS_CPU_PLAN: expected a number for some of cache, shared, slabs, slab_rows, long_row, "
    "near, joint and hot, as in cache=65536,slabs=4; got ";

struct Machine {
  int64_t threads = 1;
  Limits limits;
};

struct Plan {
  int64_t threads;       // that have work
  int64_t whole_images;  // the first so many images go to one thread each, the rest to all together
  int64_t slab_rows;     // rows of an image's matrix that are reduced together
  int64_t slabs;         // per image
  int64_t shared_work;   // elements from which on threads share a step
  Rows sums;             // how rows are added up where columns are, too
  Rows combines;         // how rows of dx are made
  Stores stores;         // of what the call writes
  Stores du_stores;      // of the residual tail's du, which a convolution reads next, twice
  bool joint;  // whether a pass goes over a slab as soon as a channel's mask is made there
};

// Whether channels are rows and their masks are made one by one: passes may then share a slab.
inline bool may_join(const Problem& p) {
  return !p.by_pixel() && p.channel() && p.gate != Gate::eca;
}

// The same call as one image, if it is of small ones that lie by pixel and of order none: then what
// is made for an image would take longer than its pixels, and none of it differs between images.
Problem joined(const Problem& problem);

// `tensors` of the size of x are what forward reads or writes: the layer's, if not said otherwise.
// Backward has the same, for in training each is given memory that the other wrote: what has gone
// past the cache comes from afar if it is then written through it.
Plan plan(const Problem& problem, const Machine& machine, int tensors = 2);

// Tensors of the size of x of which the cache holds the images that are worked on at a time.
int64_t cached_tensors(const Problem& problem, const Machine& machine);

}  // namespace da::cpu
