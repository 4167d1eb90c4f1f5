// The layout of shared memory, known to kernels and to those who plan them. Under AddressSanitizer
// red zones lie between the arrays.
#pragma once

#include <cstddef>

#ifdef __CUDACC__
#define SIMT_HD __host__ __device__ __forceinline__
#else
#define SIMT_HD inline
#endif

#if defined(__SANITIZE_ADDRESS__) && !defined(__CUDACC__)
#include <sanitizer/asan_interface.h>
#define SIMT_RED_ZONE 32
#define SIMT_POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define SIMT_UNPOISON(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define SIMT_RED_ZONE 0
#define SIMT_POISON(address, bytes) static_cast<void>(0)
#define SIMT_UNPOISON(address, bytes) static_cast<void>(0)
#endif

namespace simt {

// Hands out the arrays of a kernel's shared memory, each aligned to 16 bytes. Without a base it
// only counts, so that the host sizes a launch with the same code by which its kernel finds its
// arrays:
//
//   struct Arrays {
//     SIMT_HD Arrays(Carver carve, int pixels)
//         : mask(carve.take<float>(pixels)), bytes(carve.bytes()) {}
//     float* mask;
//     size_t bytes;
//   };
//   launch.shared_bytes = Arrays(Carver(), pixels).bytes;  // here
//   const Arrays arrays(Carver(shared()), pixels);         // and there
class Carver {
 public:
  SIMT_HD explicit Carver(unsigned char* base = nullptr) : base_(base) {}

  template <class T>
  SIMT_HD T* take(size_t count) {
    static_assert(alignof(T) <= kAlign);
    const size_t begin = bytes_, end = begin + count * sizeof(T);
    bytes_ = (end + SIMT_RED_ZONE + kAlign - 1) / kAlign * kAlign;
#ifndef __CUDA_ARCH__
    if (base_ == nullptr) return nullptr;
#endif
    SIMT_UNPOISON(base_ + begin, end - begin);  // of a kernel that is done with other arrays
    SIMT_POISON(base_ + end, bytes_ - end);
    return reinterpret_cast<T*>(base_ + begin);
  }

  SIMT_HD size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlign = 16;
  unsigned char* base_;
  size_t bytes_ = 0;
};

}  // namespace simt
