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

// A launch is one-dimensional. `team` consecutive blocks, of which the grid is a multiple, may wait
// for each other: as a thread block cluster, or else all blocks of a cooperative launch at once.
struct Launch {
  unsigned grid, block;  // blocks, threads of a block
  size_t shared_bytes = 0;
  void* stream = nullptr;
  unsigned team = 1;
  bool cluster = false;
};

// What one 16-byte access moves.
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
#define SIMT_ASSERT(condition) static_cast<void>(0)

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

// _once: global memory that is read once and that nobody writes during the launch; or that is
// written and not read again. Both leave the caches to others.
template <class T>
SIMT_FN T load_once(const T* address) {
  detail::Bits<T> bits;
  detail::read_once(address, bits);
  return detail::bit_cast<T>(bits);
}
template <class T>
SIMT_FN void store_once(T* address, T value) {
  __stcs(reinterpret_cast<detail::Bits<T>*>(address), detail::bit_cast<detail::Bits<T>>(value));
}
SIMT_FN Vector load16_once(const void* address) {
  return load_once(static_cast<const Vector*>(address));
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

SIMT_FN float exp(float x) { return ::expf(x); }
SIMT_FN double exp(double x) { return ::exp(x); }

}  // namespace simt

#else
#include "simt_host.h"
#endif

// The same for both.
namespace simt {

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
