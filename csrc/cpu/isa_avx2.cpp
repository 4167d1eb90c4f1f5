// x86-64 with AVX2, FMA and F16C.
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// All that follows is compiled for these instructions, whatever the command line says.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define DA_VECTOR_BYTES 32
namespace da::cpu::avx2 {
#include "kernels.inl"
}  // namespace da::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__

namespace da::cpu {

template <class T>
const Kernels<T>* avx2_kernels() {
#if defined(__x86_64__)
  return avx2::table<T>();
#else
  return nullptr;
#endif
}
#define DA_INSTANTIATE(T) template const Kernels<T>* avx2_kernels<T>();
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
