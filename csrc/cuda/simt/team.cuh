// What the blocks of a team do together: barriers of a cluster or through a counter, a peer's
// shared memory; and copies that go on behind the threads' backs. simt.cuh's vocabulary, continued.
#pragma once

#include "cuda/simt/simt.cuh"

#ifdef __CUDACC__

namespace simt {

// Atomic, and in both directions a fence for the whole device.
SIMT_FN unsigned fetch_add(unsigned* address, unsigned value) {
  unsigned before;
  asm volatile("atom.global.add.acq_rel.gpu.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(detail::global_address(address)), "r"(value)
               : "memory");
  return before;
}
SIMT_FN unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.global.acquire.gpu.u32 %0, [%1];"
               : "=r"(value)
               : "l"(detail::global_address(address))
               : "memory");
  return value;
}

// In a loop that waits for *address to be other than `seen`.
SIMT_FN void relax(const unsigned* address, unsigned seen) {
  static_cast<void>(address), static_cast<void>(seen);
}

// A barrier of the whole cluster; also due before a block returns whose shared memory others read.
SIMT_FN void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// The same place in the shared memory of the cluster's block `rank`.
template <class T>
SIMT_FN T* peer(T* pointer, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(pointer, rank));
#else
  static_cast<void>(rank);
  __trap();
  return pointer;
#endif
}

#if __CUDA_ARCH__ >= 900
namespace detail {

// A barrier in shared memory that ends a turn with one arrival and the bytes that it expects.
SIMT_FN void init_barrier(unsigned barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// The arrival.
SIMT_FN void expect_bytes(unsigned barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

}  // namespace detail
#endif

// Numbers that blocks of a cluster put into each other's shared memory, without a fence or a
// barrier of all; lives in shared memory, at the same place in each block. Between a block's wait()
// and its peers' next post() to it lies a barrier of the cluster, as between init() and the first
// one.
class Mail {
 public:
  // All threads of the block call it.
  SIMT_FN void init() {
#if __CUDA_ARCH__ >= 900
    if (thread() == 0) detail::init_barrier(barrier());
#endif
  }

  // Any thread: puts the value into the same place in the shared memory of the block `rank`.
  template <class T>
  SIMT_FN void post(T* place, unsigned rank, T value) {
    static_assert(sizeof(T) == 4);
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .b32 place, mail;\n"
        "mapa.shared::cluster.u32 place, %0, %2;\n"
        "mapa.shared::cluster.u32 mail, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], %3, [mail];\n"
        "}" ::"r"(detail::shared_address(place)),
        "r"(barrier()), "r"(rank), "r"(detail::bit_cast<unsigned>(value))
        : "memory");
#else
    static_cast<void>(place), static_cast<void>(rank), static_cast<void>(value);
    __trap();
#endif
  }

  // All threads of the block, after so many waits before: until so many bytes have come since the
  // last one.
  SIMT_FN void wait(uint32_t bytes, unsigned before) {
#if __CUDA_ARCH__ >= 900
    if (thread() == 0) detail::expect_bytes(barrier(), bytes);
    unsigned done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(done)
          : "r"(barrier()), "r"(before & 1)
          : "memory");
    } while (!done);
#else
    static_cast<void>(bytes), static_cast<void>(before);
    __trap();
#endif
  }

 private:
  SIMT_FN unsigned barrier() const { return detail::shared_address(&barrier_); }
  uint64_t barrier_;
};

// One copy at a time from global to shared memory, behind the threads' back; lives in shared
// memory. All threads of the block make each call. The source, the target and the size are
// multiples of 16 bytes. The parity is that of the number of copies waited for before, so 0 for the
// first.
class Bulk {
 public:
  // Each Bulk is initialised before the sync_before_load() of its first load.
  SIMT_FN void init() {
#if __CUDA_ARCH__ >= 900
    if (thread() == 0) detail::init_barrier(barrier());
#elif __CUDA_ARCH__ >= 800
    if (thread() != 0) return;
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier()), "r"(threads()) : "memory");
#endif
  }

  // The sync() between the last use of shared memory and a load into it.
  SIMT_FN static void sync_before_load() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    sync();
  }

  SIMT_FN void load(void* to, const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    if (thread() != 0) return;
    detail::expect_bytes(barrier(), bytes);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(detail::shared_address(to)),
        "l"(detail::global_address(from)), "r"(bytes), "r"(barrier())
        : "memory");
#elif __CUDA_ARCH__ >= 800
    const unsigned target = detail::shared_address(to);
    const size_t source = detail::global_address(from);
    for (uint32_t at = thread() * 16; at < bytes; at += threads() * 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + at), "l"(source + at)
                   : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier()) : "memory");
#else
    constexpr int kInFlight = 4;
    const uint32_t step = threads() * 16;
    SIMT_ROLLED
    for (uint32_t at = thread() * 16; at < bytes; at += kInFlight * step) {
      Vector some[kInFlight];
      SIMT_UNROLL
      for (int i = 0; i < kInFlight; i++)
        if (at + i * step < bytes)
          some[i] = load16_once(static_cast<const char*>(from) + at + i * step);
      SIMT_UNROLL
      for (int i = 0; i < kInFlight; i++)
        if (at + i * step < bytes) store16(static_cast<char*>(to) + at + i * step, some[i]);
    }
#endif
  }

  SIMT_FN void wait(unsigned parity) {
#if __CUDA_ARCH__ >= 800
    unsigned done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
#if __CUDA_ARCH__ >= 900
          "mbarrier.try_wait.parity.shared.b64 done, [%1], %2;\n"
#else
          "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
#endif
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(done)
          : "r"(barrier()), "r"(parity)
          : "memory");
    } while (!done);
#else
    static_cast<void>(parity);
    sync();
#endif
  }

 private:
  SIMT_FN unsigned barrier() const { return detail::shared_address(&barrier_); }
  uint64_t barrier_;
};

}  // namespace simt

#endif

// The same for both.
namespace simt {

// A barrier of `size` blocks that run at once, block `rank` among them. The counter lies in global
// memory and starts at zero; only its top bit changes from one barrier to the next, so it can be
// used again, also by the next launch.
SIMT_FN void team_sync(unsigned* counter, unsigned rank, unsigned size) {
  constexpr unsigned turn = 0x80000000u;
  sync();
  if (thread() == 0) {
    const unsigned before = fetch_add(counter, rank == 0 ? turn - (size - 1) : 1u);
    unsigned now = load_acquire(counter);
    while (((before ^ now) & turn) == 0) {
      relax(counter, now);
      now = load_acquire(counter);
    }
  }
  sync();
}

}  // namespace simt
