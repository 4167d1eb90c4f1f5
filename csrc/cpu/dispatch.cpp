#include "kernels.h"
#include "plan.h"

namespace da::cpu {

template <class T>
const Kernels<T>& kernels() {
  switch (instruction_set()) {
    case Isa::avx512:
      return *avx512_kernels<T>();
    case Isa::avx2:
      return *avx2_kernels<T>();
    default:
      return *generic_kernels<T>();
  }
}

#define DA_INSTANTIATE(T) template const Kernels<T>& kernels<T>();
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
