// Any machine: 16-byte vectors, as the compiler maps them (SSE2, NEON).
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define DA_VECTOR_BYTES 16
namespace da::cpu::generic {
#include "kernels.inl"
}  // namespace da::cpu::generic

namespace da::cpu {

template <class T>
const Kernels<T>* generic_kernels() {
  return generic::table<T>();
}
#define DA_INSTANTIATE(T) template const Kernels<T>* generic_kernels<T>();
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
