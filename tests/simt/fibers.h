// Runs the threads of a launch as fibers of one OS thread: a lane runs until it has to wait, then
// the next one does. The results are the same in every run, a switch costs nanoseconds, and a
// barrier that not all threads reach is seen as one. Here a fiber and what it waits for; blocks.h
// makes a launch of them.
//
// The sanitizers are told of every switch. ThreadSanitizer takes each fiber for a thread, and it is
// only told of orderings that the device would give: what is written here without instrumentation
// is the machine, not the program, and orders nothing.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

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
  bool waited = false;  // for the launch before

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
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
  void* tsan_nobody = nullptr;
};

inline Scheduler scheduler;

// Whether what came before a switch happens before what follows, in the eyes of ThreadSanitizer.
enum class Fence { none, full };

SIMT_MACHINE inline void resume(Lane* lane, [[maybe_unused]] Fence fence) {
  current = lane;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, lane->stack.begin(), Stack::kUsable);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(lane->tsan_fiber,
                         fence == Fence::full ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
  scheduler.context.switch_to(lane->context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

// Only the last switch of a lane is a fence.
SIMT_MACHINE inline void suspend([[maybe_unused]] Fence fence = Fence::none) {
  Lane* lane = current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fence == Fence::full ? nullptr : &lane->fake_stack,
                                 scheduler.stack, scheduler.stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(scheduler.tsan_fiber,
                         fence == Fence::full ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
  lane->context.switch_to(scheduler.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(lane->fake_stack, nullptr, nullptr);
#endif
}

// Runs work(on) as nobody's deed: it follows what its caller did so far, but precedes only what
// acquires `tag` afterwards, so that it must not look at the caller's stack.
template <class On>
SIMT_MACHINE void run_behind(void* tag, void (*work)(On*), On* on) {
#ifdef __SANITIZE_THREAD__
  if (scheduler.tsan_nobody == nullptr) scheduler.tsan_nobody = __tsan_create_fiber(0);
  void* const lane = current->tsan_fiber;
  __tsan_switch_to_fiber(scheduler.tsan_nobody, 0);
#endif
  work(on);
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
  suspend();
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

}  // namespace simt::host
