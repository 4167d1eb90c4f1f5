// The host's half of simt.cuh and its continuations, which say what each name means. Here each call
// also checks what the device would not forgive, and where a thread has to wait another gets its
// turn.
#pragma once

#include <cmath>

#include "blocks.h"

#define SIMT_KERNEL(threads, blocks_per_sm) void
#define SIMT_PARAM const
#define SIMT_FN inline
#define SIMT_UNROLL
#define SIMT_ROLLED
#define SIMT_ASSERT(condition)        \
  ((condition) ? static_cast<void>(0) \
               : ::simt::host::assertion_failed(#condition, __FILE__, __LINE__))

namespace simt {

namespace host {

[[noreturn]] inline void assertion_failed(const char* what, const char* file, int line) {
  if (current == nullptr) fail("%s:%d: not so: %s", file, line, what);
  fail("%s:%d: not so: %s (block %u, thread %u)", file, line, what, current->block->index,
       current->index);
}

inline void check_aligned(const void* address, size_t to, const char* call) {
  if (reinterpret_cast<uintptr_t>(address) % to == 0) return;
  fail("%s: %p is not a multiple of %zu (block %u, thread %u)", call, address, to,
       current->block->index, current->index);
}

}  // namespace host

// ---- Half precision: the bits, rounded to nearest, ties to even, as the device does.

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

namespace detail {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint16_t kNan = 0x7fff;  // of both half types

inline float widen(float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return bit_cast<float>(sign | kInfinity | magnitude);
  // The product moves the exponent's bias from 15 to 127, and makes subnormals normal.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));
}

inline float widen(bfloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

inline void narrow(float value, float16& to) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000,
                 magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > kInfinity) {
    to.bits = kNan;
    return;
  }
  if (magnitude >= bit_cast<uint32_t>(65520.0f)) {
    half = 0x7c00;
  } else if (magnitude < bit_cast<uint32_t>(0x1p-14f)) {
    // Next to 0.5 floats are as far apart as subnormal halves: let the sum do the rounding.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}

inline void narrow(float value, bfloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  to.bits = (bits & 0x7fffffff) > kInfinity
                ? kNan
                : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
void widen_pair(uint32_t word, float* to) {
  to[0] = widen(T{static_cast<uint16_t>(word)});
  to[1] = widen(T{static_cast<uint16_t>(word >> 16)});
}
template <class T>
uint32_t narrow_pair(const float* from) {
  T low, high;
  narrow(from[0], low);
  narrow(from[1], high);
  return low.bits | uint32_t{high.bits} << 16;
}

}  // namespace detail

inline int thread() { return static_cast<int>(host::current->index); }
inline int threads() { return static_cast<int>(host::current->block->size); }
inline unsigned block() { return host::current->block->index; }
inline unsigned blocks() { return host::current->block->grid; }
SIMT_MACHINE inline void wait_for_launch_before() {
  host::LaunchState& launch = *host::current->block->launch;
  host::wait_while(&launch.alone, 0, "wait_for_launch_before()");
  host::acquire(&launch.tag);
  host::current->waited = true;
}
inline void let_next_launch_begin() {}
inline unsigned char* shared() { return host::current->block->shared; }

inline int opaque(int value) { return value; }

inline void sync() { host::current->block->barrier.wait("sync()"); }

// The slots are the machine's: lanes meet here, but their memory does not.
template <class T>
SIMT_MACHINE T shuffle_xor(T value, int lane_mask) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  if (lane_mask < 0 || lane_mask >= kWarp) host::fail("shuffle_xor() over %d lanes", lane_mask);
  host::Lane* self = host::current;
  host::Warp& warp = self->block->warps[self->index / kWarp];
  uint64_t* slot = warp.slot[self->shuffles++ & 1];
  const unsigned lane = self->index % kWarp;
  __builtin_memcpy(&slot[lane], &value, sizeof value);
  warp.barrier.wait<false>("shuffle_xor()");
  __builtin_memcpy(&value, &slot[lane ^ static_cast<unsigned>(lane_mask)], sizeof value);
  return value;
}

// ---- Memory.

inline Vector load16(const void* address) {
  host::check_aligned(address, sizeof(Vector), "load16()");
  Vector value;
  std::memcpy(&value, address, sizeof value);
  return value;
}
inline void store16(void* address, Vector value) {
  host::check_aligned(address, sizeof(Vector), "store16()");
  std::memcpy(address, &value, sizeof value);
}
inline Vector load16_once(const void* address) { return load16(address); }
inline Vector load16_last(const void* address) { return load16(address); }
inline void store16_once(void* address, Vector value) { store16(address, value); }

template <class T>
T load_once(const T* address) {
  host::check_aligned(address, sizeof(T), "load_once()");
  return *address;
}
template <class T>
T load_last(const T* address) {
  return load_once(address);
}
template <class T>
void store_once(T* address, T value) {
  host::check_aligned(address, sizeof(T), "store_once()");
  *address = value;
}
template <class T>
T load_fresh(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  host::check_aligned(address, sizeof(T), "load_fresh()");
  return *address;
}
template <class T>
void store_fresh(T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  host::check_aligned(address, sizeof(T), "store_fresh()");
  *address = value;
}

inline unsigned fetch_add(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline unsigned load_acquire(const unsigned* address) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
inline void relax(const unsigned* address, unsigned seen) {
  host::wait_while(address, seen, "relax(), as in team_sync()");
}

inline float fma_either(bool first, float value, float factor0, float term0, float factor1,
                        float term1) {
  return first ? value * factor0 + term0 : value * factor1 + term1;
}

inline float fma(float value, float factor, float term) { return std::fma(value, factor, term); }
inline double fma(double value, double factor, double term) {
  return std::fma(value, factor, term);
}

inline float exp(float x) { return std::exp(x); }
inline double exp(double x) { return std::exp(x); }
inline float inverse_sqrt(float x) { return 1 / std::sqrt(x); }
inline double inverse_sqrt(double x) { return 1 / std::sqrt(x); }

// ---- Clusters and bulk copies.

inline void cluster_sync() { host::current->block->team->barrier.wait("cluster_sync()"); }

template <class T>
T* peer(T* pointer, unsigned rank) {
  const host::Block& self = *host::current->block;
  const size_t offset =
      reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(self.shared);
  SIMT_ASSERT(offset < self.shared_bytes);
  SIMT_ASSERT(rank < self.team->blocks.size());
  return reinterpret_cast<T*>(self.team->blocks[rank]->shared + offset);
}

// Counts the bytes that have come; a message that comes too early is one too many.
class Mail {
 public:
  void init() {
    if (thread() == 0) __atomic_store_n(&come_, 0u, __ATOMIC_RELEASE);
  }

  template <class T>
  void post(T* place, unsigned rank, T value) {
    *peer(place, rank) = value;
    __atomic_fetch_add(&peer(this, rank)->come_, unsigned{sizeof(T)}, __ATOMIC_RELEASE);
  }

  void wait(uint32_t bytes, unsigned before) {
    const unsigned all = bytes * (before + 1);
    unsigned come = __atomic_load_n(&come_, __ATOMIC_ACQUIRE);
    for (; come != all; come = __atomic_load_n(&come_, __ATOMIC_ACQUIRE)) {
      if (static_cast<int>(come - all) > 0)
        host::fail("Mail::wait(): mail came before the last was waited for");
      host::wait_while(&come_, come, "Mail::wait()");
    }
  }

 private:
  unsigned come_;
};

// The copy lands when it is first waited for, and no earlier: until then the target is NaN. It is
// known to all lanes, as to the device's threads, without a barrier. As large as the device's.
class Bulk {
 public:
  void init() {
    if (thread() == 0) copy_ = &host::current->block->copies.emplace_back();
  }

  static void sync_before_load() { sync(); }

  void load(void* to, const void* from, uint32_t bytes) {
    if (thread() != 0) return;
    host::check_aligned(to, 16, "Bulk::load()");
    host::check_aligned(from, 16, "Bulk::load()");
    if (bytes == 0 || bytes % 16 != 0) host::fail("Bulk::load() of %u bytes", bytes);
    if (read_step() % kSteps != kIdle) host::fail("Bulk::load() before the last was waited for");
    copy_->to = to;
    copy_->from = from;
    copy_->bytes = bytes;
    host::run_behind(
        &copy_->tag, +[](host::Copy* c) { std::memset(c->to, 0xFF, c->bytes); }, copy_);
    next_step();
  }

  void wait(unsigned parity) {
    for (unsigned step = read_step(); (step / kSteps & 1) == parity; step = read_step()) {
      if (step % kSteps == kIdle) {
        host::wait_while(&copy_->step, step, "Bulk::wait()");
      } else {
        host::run_behind(
            &copy_->tag, +[](host::Copy* c) { std::memcpy(c->to, c->from, c->bytes); }, copy_);
        next_step();
      }
    }
    host::acquire(&copy_->tag);
  }

 private:
  static constexpr unsigned kIdle = 0, kSteps = 2;  // two steps to a copy
  unsigned read_step() const { return __atomic_load_n(&copy_->step, __ATOMIC_ACQUIRE); }
  void next_step() { __atomic_fetch_add(&copy_->step, 1, __ATOMIC_RELEASE); }

  host::Copy* copy_;
};

// ---- Launches.

inline const char* error_string(int) { return "no error"; }

template <class... P, class... A>
int launch(const Launch& launch, void (*kernel)(P...), const A&... arguments) {
  host::note(reinterpret_cast<const void*>(kernel));
  host::run(launch, [=] { kernel(arguments...); });
  return 0;
}

inline int clear(void* memory, size_t bytes, void*) {
  host::synchronize();
  std::memset(memory, 0, bytes);
  return 0;
}

template <class... P>
int early_launches(void (*)(P...), bool& possible) {
  possible = true;
  return 0;
}

template <class... P>
int resident_teams(const Launch&, void (*)(P...), int& teams) {
  teams = 1;
  return 0;
}

namespace host {

// What a test gives to a kernel: `count` values and not a byte more, on a 16-byte boundary and no
// better one, NaN until they are written.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    memory_ = static_cast<unsigned char*>(::operator new(kAhead + bytes(), kAlign));
    std::memset(memory_, 0xFF, kAhead + bytes());
    poison(memory_, kAhead);
  }
  ~Buffer() {
    unpoison(memory_, kAhead);
    ::operator delete(memory_, kAlign);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return reinterpret_cast<T*>(memory_ + kAhead); }
  const T* data() const { return reinterpret_cast<const T*>(memory_ + kAhead); }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + count_; }

 private:
  static constexpr size_t kAhead = 16;
  static constexpr std::align_val_t kAlign{32};
  unsigned char* memory_;
  size_t count_;
};

}  // namespace host

}  // namespace simt
