// What a kernel may ask of the machine, in one vocabulary for two: under nvcc these names are CUDA,
// and no file outside cuda/simt writes an intrinsic or PTX; under a C++ compiler
// tests/simt/simt_host.h turns each thread into a fiber, so that the same kernels run on a CPU,
// under sanitizers. The names are written with their simt::, since several are also those of
// functions of C. Here threads, memory and numbers; team.cuh has what blocks do together,
// launch.cuh the launches.
//
// What keeps a kernel true to both:
// - all shared memory is dynamic and carved by a Carver;
// - values are reinterpreted by memcpy once they are loaded, and memory is accessed 16 bytes at a
//   time by load16 and store16;
// - blocks are whole warps, and no thread returns before a barrier;
// - all 32 lanes reach each shuffle, in no known order: a shuffle does not order memory;
// - a loop that waits for memory to change calls relax().
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/simt/carver.h"

namespace simt {

constexpr int kWarp = 32;

// The compute capability that a kernel is compiled for, 90 for 9.0; 0 on a CPU.
#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__ / 10;
#else
constexpr int kArch = 0;
#endif
// Whether a launch may begin before the one before it has ended. Where none may, a kernel has
// nothing to do in that time.
constexpr bool kEarlyLaunches = kArch >= 90;
// Thread block clusters exist from sm_90 on; for what is older, nothing of them is compiled.
constexpr bool kClusters = kArch == 0 || kArch >= 90;
// Instructions that round to bfloat16 exist from sm_80 on; to do without takes registers.
constexpr bool kRoundsBfloat16 = kArch == 0 || kArch >= 80;

// A launch is one-dimensional. `team` consecutive blocks, of which the grid is a multiple, may wait
// for each other: as a thread block cluster, or else all blocks of a cooperative launch at once.
struct Launch {
  unsigned grid, block;  // blocks, threads of a block
  size_t shared_bytes = 0;
  void* stream = nullptr;
  unsigned team = 1;
  bool cluster = false;
  // It may begin before the kernel before it in the stream has ended, and calls
  // wait_for_launch_before(). Only where early_launches() says so, and for blocks on their own.
  bool early = false;
  // The host reads these: the first block works on the last image, and the last `extra` on none.
  bool backwards = false;
  unsigned extra = 0;
};

// The bytes that one 16-byte access moves.
struct alignas(16) Vector {
  uint32_t word[4];
};

}  // namespace simt

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SIMT_KERNEL(threads, blocks_per_sm) \
  __global__ void __launch_bounds__(threads, blocks_per_sm)
#define SIMT_PARAM const __grid_constant__
#define SIMT_FN __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_ROLLED _Pragma("unroll 1")

namespace simt {

using float16 = __half;
using bfloat16 = __nv_bfloat16;

namespace detail {

// The unsigned integer of a type's size, as which cache operators take any type.
template <size_t bytes>
struct Unsigned;
template <>
struct Unsigned<2> {
  using type = unsigned short;
};
template <>
struct Unsigned<4> {
  using type = unsigned;
};
template <>
struct Unsigned<8> {
  using type = unsigned long long;
};
template <>
struct Unsigned<16> {
  using type = uint4;
};
template <class T>
using Bits = typename Unsigned<sizeof(T)>::type;

// By value: through a reference to memory, memcpy would load bytes of unknown alignment one by one.
template <class To, class From>
SIMT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

SIMT_FN size_t global_address(const void* pointer) { return __cvta_generic_to_global(pointer); }
SIMT_FN unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Constant during the launch, so not volatile: the compiler may move and merge these.
SIMT_FN void read_once(const void* from, unsigned short& to) {
  asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(to) : "l"(global_address(from)));
}
SIMT_FN void read_once(const void* from, unsigned& to) {
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to) : "l"(global_address(from)));
}
SIMT_FN void read_once(const void* from, unsigned long long& to) {
  asm("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(to) : "l"(global_address(from)));
}
SIMT_FN void read_once(const void* from, uint4& to) {
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
      : "l"(global_address(from)));
}

// The same, but the first to make room in both caches.
SIMT_FN void read_last(const void* from, unsigned short& to) {
  asm("ld.global.cs.nc.u16 %0, [%1];" : "=h"(to) : "l"(global_address(from)));
}
SIMT_FN void read_last(const void* from, unsigned& to) {
  asm("ld.global.cs.nc.u32 %0, [%1];" : "=r"(to) : "l"(global_address(from)));
}
SIMT_FN void read_last(const void* from, unsigned long long& to) {
  asm("ld.global.cs.nc.u64 %0, [%1];" : "=l"(to) : "l"(global_address(from)));
}
SIMT_FN void read_last(const void* from, uint4& to) {
  asm("ld.global.cs.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
      : "l"(global_address(from)));
}

// As assignments these would be moved among the loads of small maps, which takes registers.
SIMT_FN void write_once(void* to, unsigned short from) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(global_address(to)), "h"(from) : "memory");
}
SIMT_FN void write_once(void* to, unsigned from) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(global_address(to)), "r"(from) : "memory");
}
SIMT_FN void write_once(void* to, unsigned long long from) {
  asm volatile("st.global.u64 [%0], %1;" ::"l"(global_address(to)), "l"(from) : "memory");
}
SIMT_FN void write_once(void* to, uint4 from) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global_address(to)), "r"(from.x),
               "r"(from.y), "r"(from.z), "r"(from.w)
               : "memory");
}

// Past L1, which is not coherent. Not __ldcg: that one is free to cross a barrier.
SIMT_FN void read_fresh(const void* from, unsigned& to) {
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(to) : "l"(global_address(from)) : "memory");
}
SIMT_FN void read_fresh(const void* from, unsigned long long& to) {
  asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(to) : "l"(global_address(from)) : "memory");
}
SIMT_FN void read_fresh(const void* from, uint4& to) {
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
               : "l"(global_address(from))
               : "memory");
}

SIMT_HD float widen(float16 value) { return __half2float(value); }
SIMT_HD float widen(bfloat16 value) { return __bfloat162float(value); }
SIMT_HD void narrow(float value, float16& to) { to = __float2half_rn(value); }
SIMT_HD void narrow(float value, bfloat16& to) { to = __float2bfloat16_rn(value); }

// Two values to a word: one instruction where the hardware has it.
template <class T>
SIMT_FN void widen_pair(uint32_t word, float* to) {
  float2 pair;
  if constexpr (std::is_same_v<T, float16>)
    pair = __half22float2(bit_cast<__half2>(word));
  else
    pair = __bfloat1622float2(bit_cast<__nv_bfloat162>(word));
  to[0] = pair.x;
  to[1] = pair.y;
}
template <class T>
SIMT_FN uint32_t narrow_pair(const float* from) {
  if constexpr (std::is_same_v<T, float16>)
    return bit_cast<uint32_t>(__floats2half2_rn(from[0], from[1]));
  else
    return bit_cast<uint32_t>(__floats2bfloat162_rn(from[0], from[1]));
}

}  // namespace detail

SIMT_FN int thread() { return static_cast<int>(threadIdx.x); }
SIMT_FN int threads() { return static_cast<int>(blockDim.x); }
SIMT_FN unsigned block() { return blockIdx.x; }
SIMT_FN unsigned blocks() { return gridDim.x; }

// An early launch waits until all launches before it in the stream have ended, and what they wrote
// is there. Every thread calls it before it writes anything, and before it reads what they wrote:
// when a launch has ended, so have those before it.
SIMT_FN void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next launch, if early, may begin once all blocks of this one have called this or returned. It
// takes no slot from them, for by then they all have theirs.
SIMT_FN void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The block's dynamic shared memory.
SIMT_FN unsigned char* shared() {
  extern __shared__ __align__(128) unsigned char simt_shared_memory[];
  return simt_shared_memory;
}

SIMT_FN void sync() { __syncthreads(); }

// The same value, but the compiler does not know that: what is computed from it is computed here,
// not earlier, to be kept in registers until then.
SIMT_FN int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The value of the lane whose index differs by the bits of `lane_mask`. No fence.
template <class T>
SIMT_FN T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(~0u, value, lane_mask);
}

SIMT_FN Vector load16(const void* address) {
  return detail::bit_cast<Vector>(*static_cast<const uint4*>(address));
}
SIMT_FN void store16(void* address, Vector value) {
  *static_cast<uint4*>(address) = detail::bit_cast<uint4>(value);
}

// _once: global memory that is read once in a launch, and that nobody writes meanwhile: it leaves
// L1 to others; or that is written and not read again in the launch: it stays in L2 as far as there
// is room. _last: read once, for the last time: it leaves L2 to others as well.
template <class T>
SIMT_FN T load_once(const T* address) {
  detail::Bits<T> bits;
  detail::read_once(address, bits);
  return detail::bit_cast<T>(bits);
}
template <class T>
SIMT_FN T load_last(const T* address) {
  detail::Bits<T> bits;
  detail::read_last(address, bits);
  return detail::bit_cast<T>(bits);
}
template <class T>
SIMT_FN void store_once(T* address, T value) {
  detail::write_once(address, detail::bit_cast<detail::Bits<T>>(value));
}
SIMT_FN Vector load16_once(const void* address) {
  return load_once(static_cast<const Vector*>(address));
}
SIMT_FN Vector load16_last(const void* address) {
  return load_last(static_cast<const Vector*>(address));
}
SIMT_FN void store16_once(void* address, Vector value) {
  store_once(static_cast<Vector*>(address), value);
}

// _fresh: global memory by which blocks of one launch speak to each other. Of 4, 8 or 16 bytes.
template <class T>
SIMT_FN T load_fresh(const T* address) {
  detail::Bits<T> bits;
  detail::read_fresh(address, bits);
  return detail::bit_cast<T>(bits);
}
template <class T>
SIMT_FN void store_fresh(T* address, T value) {
  __stcg(reinterpret_cast<detail::Bits<T>*>(address), detail::bit_cast<detail::Bits<T>>(value));
}

// value * factor + term, of the first factor and term or else of the second: two instructions, of
// which each lane carries out one; with selections it would be three.
SIMT_FN float fma_either(bool first, float value, float factor0, float term0, float factor1,
                         float term1) {
  asm("{\n"
      ".reg .pred first;\n"
      "setp.ne.s32 first, %1, 0;\n"
      "@first fma.rn.f32 %0, %0, %2, %3;\n"
      "@!first fma.rn.f32 %0, %0, %4, %5;\n"
      "}"
      : "+f"(value)
      : "r"(static_cast<int>(first)), "f"(factor0), "f"(term0), "f"(factor1), "f"(term1));
  return value;
}

// value * factor + term, rounded once.
SIMT_FN float fma(float value, float factor, float term) { return ::fmaf(value, factor, term); }
SIMT_FN double fma(double value, double factor, double term) { return ::fma(value, factor, term); }

SIMT_FN float exp(float x) { return ::expf(x); }
SIMT_FN double exp(double x) { return ::exp(x); }
// One over the square root. CUDA's own in float is off by two bits, this one by one.
SIMT_FN float inverse_sqrt(float x) { return 1 / ::sqrtf(x); }
SIMT_FN double inverse_sqrt(double x) { return ::rsqrt(x); }

}  // namespace simt

#else
#include "simt_host.h"
#endif

// The same for both.
namespace simt {

SIMT_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
SIMT_FN float of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The type in which values of type T are added up; how many of these values make a Vector.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
constexpr int kPerVector = static_cast<int>(sizeof(Vector) / sizeof(T));
template <class T>
constexpr bool kIsHalf = std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>;

// Between any two of float16, bfloat16 and the arithmetic types, to nearest; into a half type from
// float only, for a double would be rounded twice.
template <class To, class From>
SIMT_HD To to(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (kIsHalf<To>) {
    static_assert(std::is_same_v<From, float>);
    To half;
    detail::narrow(value, half);
    return half;
  } else if constexpr (kIsHalf<From>) {
    return static_cast<To>(detail::widen(value));
  } else {
    return static_cast<To>(value);
  }
}

template <class T>
SIMT_FN void unpack(Vector from, Accumulator<T>* to) {
  if constexpr (kIsHalf<T>) {
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) detail::widen_pair<T>(from.word[i], to + 2 * i);
  } else {
    memcpy(to, &from, sizeof from);
  }
}

template <class T>
SIMT_FN Vector pack(const Accumulator<T>* from) {
  Vector to;
  if constexpr (kIsHalf<T>) {
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) to.word[i] = detail::narrow_pair<T>(from + 2 * i);
  } else {
    memcpy(&to, from, sizeof to);
  }
  return to;
}

}  // namespace simt
