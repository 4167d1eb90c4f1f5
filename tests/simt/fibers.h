// Runs the threads of a launch as fibers of one OS thread: a lane runs until it has to wait, then
// the next one does. The results are the same in every run, a switch costs nanoseconds, and a
// barrier that not all threads reach is seen as one. In the environment, read at every launch:
// - SIMT_ORDER: ascending (default), descending or random, the order in which lanes take turns
// - SIMT_SEED: of the random order, 1 by default
// - SIMT_LIVE: how many groups of blocks take turns at once; 1, one after another, by default
//
// The sanitizers are told of every switch. ThreadSanitizer takes each fiber for a thread, and it is
// only told of orderings that the device would give: what is written here without instrumentation
// is the machine, not the program, and orders nothing.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT  // the portable switch, a system call each
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// Plain accesses, for the machine's own state, which no two fibers touch at the same time.
#define SIMT_MACHINE __attribute__((no_sanitize("address", "thread", "undefined")))

namespace simt::host {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
inline void poison(const void* begin, size_t bytes) { ASAN_POISON_MEMORY_REGION(begin, bytes); }
inline void unpoison(const void* begin, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(begin, bytes); }
#else
constexpr bool kAddressSanitizer = false;
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
#endif

#ifdef __SANITIZE_THREAD__
constexpr bool kThreadSanitizer = true;
inline void release(void* tag) { __tsan_release(tag); }
inline void acquire(void* tag) { __tsan_acquire(tag); }
#else
constexpr bool kThreadSanitizer = false;
inline void release(void*) {}
inline void acquire(void*) {}
#endif

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("simt: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::abort();
}

// ---- One fiber: a stack and a place on it.

// Stacks start at different offsets into a page, or all of them would compete for a few cache sets.
class Stack {
 public:
  explicit Stack(size_t index) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = kUsable + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for another thread's stack");
    memory_ = static_cast<unsigned char*>(memory);
    begin_ = memory_ + page;  // what overflows hits the first page
    if (mprotect(begin_, kUsable + page, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    begin_ += index % 32 * 128;
  }
  ~Stack() { munmap(memory_, mapped_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  unsigned char* begin() const { return begin_; }
  static constexpr size_t kUsable = kAddressSanitizer || kThreadSanitizer ? 128 << 10 : 64 << 10;

 private:
  unsigned char *memory_, *begin_;
  size_t mapped_;
};

#ifndef SIMT_UCONTEXT
// Saves the callee's registers on the stack, the stack's pointer in *from, and goes on at `to`.
extern "C" void simt_host_switch(void** from, void* to);
asm(".pushsection .text.simt_host_switch, \"axG\", @progbits, simt_host_switch, comdat\n"
    ".weak simt_host_switch\n"
    ".type simt_host_switch, @function\n"
    "simt_host_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n"
    ".size simt_host_switch, . - simt_host_switch\n"
    ".popsection\n");

struct Context {
  void* top = nullptr;

  SIMT_MACHINE void prepare(unsigned char* stack, void (*entry)()) {
    void** place = reinterpret_cast<void**>(stack + Stack::kUsable);
    *--place = nullptr;  // where the entry would return to; it also keeps the stack aligned
    *--place = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--place = nullptr;
    top = place;
  }
  SIMT_MACHINE void switch_to(const Context& to) { simt_host_switch(&top, to.top); }
};
#else
struct Context {
  ucontext_t state;

  SIMT_MACHINE void prepare(unsigned char* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = Stack::kUsable;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  SIMT_MACHINE void switch_to(const Context& to) { swapcontext(&state, &to.state); }
};
#endif

// ---- Lanes, and what they wait for.

struct Block;
void run_lane();

struct Lane {
  explicit Lane(size_t number) : stack(number) {
#ifdef __SANITIZE_THREAD__
    tsan_fiber = __tsan_create_fiber(0);
#endif
  }
  void begin(Block& in, unsigned at);

  unsigned index = 0;  // in its block
  Block* block = nullptr;
  unsigned shuffles = 0;

  // Runnable unless it has returned or *awaited is still `seen`.
  bool returned = false;
  const unsigned* awaited = nullptr;
  unsigned seen = 0;
  const char* place = "the start";

  Stack stack;
  Context context;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;
};

inline Lane* current = nullptr;  // the running one

// The other side of every switch.
struct Scheduler {
  Context context;
  void (*body)(const void*) = nullptr;
  const void* kernel = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
  void* tsan_nobody = nullptr;
};

inline Scheduler scheduler;

// `ordered` makes what came before happen before what follows, in the eyes of ThreadSanitizer.
SIMT_MACHINE inline void resume(Lane* lane, [[maybe_unused]] bool ordered) {
  current = lane;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, lane->stack.begin(), Stack::kUsable);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(lane->tsan_fiber, ordered ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
  scheduler.context.switch_to(lane->context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

SIMT_MACHINE inline void suspend([[maybe_unused]] bool ordered, [[maybe_unused]] bool last) {
  Lane* lane = current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &lane->fake_stack, scheduler.stack,
                                 scheduler.stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(scheduler.tsan_fiber, ordered ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
  lane->context.switch_to(scheduler.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(lane->fake_stack, nullptr, nullptr);
#endif
}

// Runs `work` as nobody's deed: it follows what its caller did so far, but precedes only what
// acquires `tag` afterwards.
template <class Work>
SIMT_MACHINE void run_behind(void* tag, const Work& work) {
#ifdef __SANITIZE_THREAD__
  if (scheduler.tsan_nobody == nullptr) scheduler.tsan_nobody = __tsan_create_fiber(0);
  void* const lane = current->tsan_fiber;
  __tsan_switch_to_fiber(scheduler.tsan_nobody, 0);
#endif
  work();
  release(tag);
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(lane, __tsan_switch_to_fiber_no_sync);
#endif
}

// Until *word is no longer `seen`. Orders nothing.
SIMT_MACHINE inline void wait_while(const unsigned* word, unsigned seen, const char* place) {
  if (*static_cast<const volatile unsigned*>(word) != seen) return;
  current->awaited = word;
  current->seen = seen;
  current->place = place;
  suspend(false, false);
}

class Barrier {
 public:
  void expect(unsigned lanes) { expected_ = lanes, arrived_ = 0; }

  // Two tags in turn: a lane already at the next barrier does not order one still at this.
  template <bool fence = true>
  SIMT_MACHINE void wait(const char* place) {
    const unsigned generation = generation_;
    if constexpr (fence) release(&tag_[generation & 1]);
    if (++arrived_ == expected_) {
      arrived_ = 0;
      generation_ = generation + 1;
    } else {
      wait_while(&generation_, generation, place);
    }
    if constexpr (fence) acquire(&tag_[generation & 1]);
  }

 private:
  unsigned expected_ = 0, arrived_ = 0, generation_ = 0;
  char tag_[2] = {};
};

struct Warp {
  Barrier barrier;
  uint64_t slot[2][kWarp];  // in turn: a lane may be one shuffle ahead of another
};

struct Group {
  Barrier barrier;
  std::vector<Block*> blocks;
};

// Shared memory is exactly as large as asked for, begins as NaN and ends with its block:
// AddressSanitizer reports a peer that reads it after that.
struct Block {
  unsigned index = 0, size = 0, grid = 0, running = 0;
  Group* group = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;

  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { ::operator delete(shared, std::align_val_t(128)); }

  void prepare(const Launch& launch, Group& in) {
    size = launch.block;
    grid = launch.grid;
    group = &in;
    group->blocks.push_back(this);
    warps = std::vector<Warp>(size / kWarp);
    shared_bytes = launch.shared_bytes;
    shared = static_cast<unsigned char*>(::operator new(shared_bytes, std::align_val_t(128)));
  }

  void begin(unsigned at) {
    index = at;
    running = size;
    barrier.expect(size);
    group->barrier.expect(size * static_cast<unsigned>(group->blocks.size()));
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
  if (kThreadSanitizer) suspend(false, false);
  scheduler.body(scheduler.kernel);
  current->returned = true;
  if (kThreadSanitizer) suspend(false, false);
  suspend(true, true);
  __builtin_unreachable();
}

inline unsigned setting(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
}

class Turns {
 public:
  Turns() {
    const char* order = std::getenv("SIMT_ORDER");
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
        resume(lane, false);
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

// Calls body(kernel) once for every thread of the launch.
inline void run(const Launch& launch, void (*body)(const void*), const void* kernel) {
  const unsigned size = launch.block, group = launch.group;
  if (launch.grid == 0 || size == 0 || size > 1024 || size % kWarp != 0)
    fail("a launch of %u blocks of %u threads", launch.grid, size);
  if (group == 0 || launch.grid % group != 0)
    fail("%u blocks are not groups of %u", launch.grid, group);

  Turns turns;
  const unsigned live = std::min(launch.grid, group * std::max(1u, setting("SIMT_LIVE", 1)));
  if (kThreadSanitizer && live * size > 2048)
    fail("%u live threads: ThreadSanitizer has memory for 2048", live * size);
  while (lanes.size() < live * size) lanes.emplace_back(lanes.size());

  std::vector<Group> groups(live / group);
  std::vector<Block> blocks(live);
  for (unsigned b = 0; b < live; b++) blocks[b].prepare(launch, groups[b / group]);

  scheduler.body = body;
  scheduler.kernel = kernel;
#ifdef __SANITIZE_THREAD__
  scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  for (unsigned first = 0; first < launch.grid; first += live) {
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
      for (Lane* lane : running) resume(lane, true);
    turns.run(running);
    if (kThreadSanitizer)
      for (Lane* lane : running) resume(lane, false);
  }
}

}  // namespace simt::host
