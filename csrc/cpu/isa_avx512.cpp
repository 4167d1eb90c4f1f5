// x86-64 with AVX-512 F, BW, DQ and VL.
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
// GCC 12 takes this header's undefined vectors for uninitialised ones.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

// All that follows is compiled for these instructions, whatever the command line says.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define DA_VECTOR_BYTES 64
namespace da::cpu::avx512 {
#include "kernels.inl"
}  // namespace da::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__

namespace da::cpu {

template <class T>
const Kernels<T>* avx512_kernels() {
#if defined(__x86_64__)
  return avx512::table<T>();
#else
  return nullptr;
#endif
}
#define DA_INSTANTIATE(T) template const Kernels<T>* avx512_kernels<T>();
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
