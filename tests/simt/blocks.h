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
#include <functional>
#include <memory>
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

// State that the lanes of a launch share.
struct LaunchState {
  std::function<void()> kernel;
  bool early = false;
  unsigned alone = 1;  // 0 until the launch before has ended
  char tag = 0;        // of what that one wrote
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
  LaunchState* launch = nullptr;
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

  void prepare(const Launch& launch, unsigned blocks, LaunchState& of, Team& in) {
    size = launch.block;
    grid = blocks;
    this->launch = &of;
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
  returned = waited = false;
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
  current->block->launch->kernel();
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

  // Until all lanes have returned, or no other can go on before the launch before has ended.
  void run(const std::vector<Lane*>& lanes) {
    std::vector<Lane*> turns = lanes;
    if (order_ == "descending") std::reverse(turns.begin(), turns.end());
    const auto returned = [](const Lane* lane) { return lane->returned; };
    while (!std::all_of(turns.begin(), turns.end(), returned)) {
      if (order_ == "random") std::shuffle(turns.begin(), turns.end(), generator_);
      bool stuck = true;
      for (Lane* lane : turns) {
        if (!runnable(lane)) continue;
        stuck = false;
        resume(lane, Fence::none);
        if (!lane->returned) continue;
        if (lane->block->launch->early && !lane->waited)
          fail("an early launch that did not wait for the one before it (block %u, thread %u)",
               lane->block->index, lane->index);
        lane->block->lane_returned();
      }
      if (stuck && lanes[0]->block->launch->alone == 0) return;
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

// The first images' blocks that a launch leaves out, so that what lies far into a tensor is reached
// without all that comes before. Images share the blocks evenly, but for `more` of them.
struct LeftOut {
  unsigned first, images;
};
inline LeftOut left_out = {0, 0};

// Lanes of this launch or a larger one before: stacks and fibers are dear. There may be two at
// once.
inline std::deque<Lane> lanes[2];
inline unsigned launches = 0;

// A launch: every thread of it calls the kernel once.
class Running {
 public:
  Running(const Launch& launch, std::function<void()> kernel)
      : launch_(launch), lanes_(lanes[launches++ % 2]) {
    const unsigned size = launch.block, team = launch.team;
    if (launch.grid == 0 || size == 0 || size > 1024 || size % kWarp != 0)
      fail("a launch of %u blocks of %u threads", launch.grid, size);
    if (team == 0 || launch.grid % team != 0)
      fail("%u blocks are not teams of %u", launch.grid, team);
    live_ = std::min(launch.grid, team * std::max(1u, setting("SIMT_LIVE", 1)));
    if (kThreadSanitizer && live_ * size > 2048)
      fail("%u live threads: ThreadSanitizer has memory for 2048", live_ * size);
    while (lanes_.size() < live_ * size) lanes_.emplace_back(lanes_.size());

    state_.kernel = std::move(kernel);
    state_.early = launch.early;
    teams_ = std::vector<Team>(live_ / team);
    blocks_ = std::vector<Block>(live_);
    const unsigned shared = launch.grid - launch.extra;
    if (left_out.images > 0 && shared % left_out.images == 0) {
      gap_ = shared / left_out.images * left_out.first;
      if (launch.backwards) before_gap_ = shared - gap_;
    }
    end_ = launch.grid - gap_;
    for (unsigned b = 0; b < live_; b++) blocks_[b].prepare(launch, end_, state_, teams_[b / team]);
  }

  // As far as it gets while the launch before has not ended.
  void begin_early() {
    state_.alone = 0;
    begin_blocks();
    turns_.run(running_);
  }

  // To its end.
  void finish() {
    release(&state_.tag);
    state_.alone = 1;
    if (!running_.empty()) turn_out();
    while (next_ < end_) {
      begin_blocks();
      turn_out();
    }
  }

 private:
  void begin_blocks() {
#ifdef __SANITIZE_THREAD__
    scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
    const unsigned now = std::min(live_, end_ - next_), size = launch_.block;
    for (unsigned b = 0; b < now; b++) {
      blocks_[b].begin(next_ + b + (next_ + b < before_gap_ ? 0 : gap_));
      for (unsigned t = 0; t < size; t++) {
        running_.push_back(&lanes_[b * size + t]);
        running_.back()->begin(blocks_[b], t);
      }
    }
    next_ += now;
    if (kThreadSanitizer)
      for (Lane* lane : running_) resume(lane, Fence::full);
  }
  void turn_out() {
    turns_.run(running_);
    if (kThreadSanitizer)
      for (Lane* lane : running_) resume(lane, Fence::none);
    running_.clear();
  }

  const Launch launch_;
  std::deque<Lane>& lanes_;
  LaunchState state_;
  Turns turns_;
  unsigned live_ = 0, next_ = 0, end_ = 0;
  unsigned before_gap_ = 0, gap_ = 0;  // blocks that are left out, and those before them
  std::vector<Team> teams_;
  std::vector<Block> blocks_;
  std::vector<Lane*> running_;
};

// The last launch of the stream: it is run when the next one has begun, if that one may begin
// early, for whoever then reads too soon what this one writes reads what was there before.
inline std::unique_ptr<Running> last;

// Until all launches have ended, as whoever looks at results must.
inline void synchronize() {
  if (last) last->finish();
  last.reset();
}

inline void run(const Launch& launch, std::function<void()> kernel) {
  auto next = std::make_unique<Running>(launch, std::move(kernel));
  if (launch.early && last) next->begin_early();
  synchronize();
  last = std::move(next);
}

}  // namespace simt::host
