// A launch as warps, blocks and teams of fibers, and the order in which they take turns.
// In the environment, read at every launch:
// - SIMT_ORDER: ascending (default), descending or random, the order in which lanes take turns
// - SIMT_SEED: of the random order, 1 by default
// - SIMT_LIVE: how many teams of blocks take turns at once; 1, one after another, by default
// - SIMT_KERNELS: a file to which the names of launched kernels are added
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "fibers.h"

namespace simt::host {

struct Warp {
  Barrier barrier;
  uint64_t slot[2][kWarp];  // in turn: a lane may be one shuffle ahead of another
};

struct Team {
  Barrier barrier;
  std::vector<Block*> blocks;
};

// A bulk copy.
struct Copy {
  unsigned step = 0;
  uint32_t bytes = 0;
  void* to = nullptr;
  const void* from = nullptr;
  char tag = 0;
};

// Shared memory is exactly as large as asked for, begins as NaN and ends with its block:
// AddressSanitizer reports a peer that reads it after that.
struct Block {
  unsigned index = 0, size = 0, grid = 0, running = 0;
  Team* team = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
  std::deque<Copy> copies;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;

  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { ::operator delete(shared, std::align_val_t(128)); }

  void prepare(const Launch& launch, Team& in) {
    size = launch.block;
    grid = launch.grid;
    team = &in;
    team->blocks.push_back(this);
    warps = std::vector<Warp>(size / kWarp);
    shared_bytes = launch.shared_bytes;
    shared = static_cast<unsigned char*>(::operator new(shared_bytes, std::align_val_t(128)));
  }

  void begin(unsigned at) {
    index = at;
    running = size;
    copies.clear();
    barrier.expect(size);
    team->barrier.expect(size * static_cast<unsigned>(team->blocks.size()));
    for (Warp& warp : warps) warp.barrier.expect(kWarp);
    unpoison(shared, shared_bytes);
    std::memset(shared, 0xFF, shared_bytes);
  }

  void lane_returned() {
    if (--running == 0) poison(shared, shared_bytes);
  }
};

inline void Lane::begin(Block& in, unsigned at) {
  block = &in;
  index = at;
  returned = false;
  awaited = nullptr;
  place = "the start";
  context.prepare(stack.begin(), run_lane);
}

// ---- A launch.

SIMT_MACHINE inline void run_lane() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  // The first switch to a lane and the last one from it order the launch among others. They are
  // kept apart from its body, or they would order the bodies of lanes that run one after the other.
  if (kThreadSanitizer) suspend();
  scheduler.body(scheduler.kernel);
  current->returned = true;
  if (kThreadSanitizer) suspend();
  suspend(Fence::full);
  __builtin_unreachable();
}

// Null where the variable is not set, or set to nothing.
inline const char* variable(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? nullptr : text;
}

inline unsigned setting(const char* name, unsigned otherwise) {
  const char* text = variable(name);
  return text == nullptr ? otherwise : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
}

class Turns {
 public:
  Turns() {
    const char* order = variable("SIMT_ORDER");
    if (order != nullptr) order_ = order;
    if (order_ != "ascending" && order_ != "descending" && order_ != "random")
      fail("SIMT_ORDER is ascending, descending or random");
    generator_.seed(setting("SIMT_SEED", 1));
  }

  // Until all lanes have returned.
  void run(const std::vector<Lane*>& lanes) {
    std::vector<Lane*> turns = lanes;
    if (order_ == "descending") std::reverse(turns.begin(), turns.end());
    for (size_t returned = 0; returned < turns.size();) {
      if (order_ == "random") std::shuffle(turns.begin(), turns.end(), generator_);
      bool stuck = true;
      for (Lane* lane : turns) {
        if (!runnable(lane)) continue;
        stuck = false;
        resume(lane, Fence::none);
        if (!lane->returned) continue;
        returned++;
        lane->block->lane_returned();
      }
      if (stuck) report_deadlock(lanes);
    }
  }

 private:
  SIMT_MACHINE static bool runnable(const Lane* lane) {
    return !lane->returned && (lane->awaited == nullptr || *lane->awaited != lane->seen);
  }

  [[noreturn]] static void report_deadlock(const std::vector<Lane*>& lanes) {
    std::string report;
    for (size_t i = 0, next; i < lanes.size(); i = next) {
      const Lane& lane = *lanes[i];
      const auto alike = [&](const Lane& other) {
        return other.block == lane.block && other.returned == lane.returned &&
               (lane.returned || std::strcmp(other.place, lane.place) == 0);
      };
      for (next = i + 1; next < lanes.size() && alike(*lanes[next]);) next++;
      report += "\n  block " + std::to_string(lane.block->index) + " threads " +
                std::to_string(lane.index) + ".." + std::to_string(lanes[next - 1]->index) +
                (lane.returned ? " returned" : std::string(" wait at ") + lane.place);
    }
    fail("deadlock: a barrier that not all of its threads reach%s", report.c_str());
  }

  std::string order_ = "ascending";
  std::minstd_rand generator_;
};

inline std::deque<Lane> lanes;  // of this launch or a larger one before: stacks and fibers are dear

// Adds a kernel's name to the file SIMT_KERNELS, for which of several was launched may show in
// nothing else.
inline void note(const void* kernel) {
  const char* const path = variable("SIMT_KERNELS");
  if (path == nullptr) return;
  Dl_info found;
  if (dladdr(kernel, &found) == 0 || found.dli_sname == nullptr) fail("a kernel without a name");
  char* const name = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
  std::FILE* const file = std::fopen(path, "a");
  if (file == nullptr || name == nullptr) fail("%s: no file for %s", path, found.dli_sname);
  std::fprintf(file, "%s\n", name);
  std::fclose(file);
  std::free(name);
}

// Of a launch whose blocks these images share evenly, the blocks of the first few are left out:
// what lies far into a tensor is reached without all that comes before it.
struct LeftOut {
  unsigned first, images;
};
inline LeftOut left_out = {0, 0};

// Calls body(kernel) once for every thread of the launch.
inline void run(const Launch& launch, void (*body)(const void*), const void* kernel) {
  const unsigned size = launch.block, team = launch.team;
  if (launch.grid == 0 || size == 0 || size > 1024 || size % kWarp != 0)
    fail("a launch of %u blocks of %u threads", launch.grid, size);
  if (team == 0 || launch.grid % team != 0)
    fail("%u blocks are not teams of %u", launch.grid, team);

  Turns turns;
  const unsigned live = std::min(launch.grid, team * std::max(1u, setting("SIMT_LIVE", 1)));
  if (kThreadSanitizer && live * size > 2048)
    fail("%u live threads: ThreadSanitizer has memory for 2048", live * size);
  while (lanes.size() < live * size) lanes.emplace_back(lanes.size());

  std::vector<Team> teams(live / team);
  std::vector<Block> blocks(live);
  for (unsigned b = 0; b < live; b++) blocks[b].prepare(launch, teams[b / team]);

  scheduler.body = body;
  scheduler.kernel = kernel;
#ifdef __SANITIZE_THREAD__
  scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  const bool by_image = left_out.images > 0 && launch.grid % left_out.images == 0;
  const unsigned begin = by_image ? launch.grid / left_out.images * left_out.first : 0;
  for (unsigned first = begin; first < launch.grid; first += live) {
    const unsigned now = std::min(live, launch.grid - first);
    std::vector<Lane*> running;
    for (unsigned b = 0; b < now; b++) {
      blocks[b].begin(first + b);
      for (unsigned t = 0; t < size; t++) {
        running.push_back(&lanes[b * size + t]);
        running.back()->begin(blocks[b], t);
      }
    }
    if (kThreadSanitizer)
      for (Lane* lane : running) resume(lane, Fence::full);
    turns.run(running);
    if (kThreadSanitizer)
      for (Lane* lane : running) resume(lane, Fence::none);
  }
}

}  // namespace simt::host
