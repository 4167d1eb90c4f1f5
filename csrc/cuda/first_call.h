// Tells Python of a call that is about to be planned for the first time on a thread: it may measure
// plans for it, and set one. da_ops/tuning/first_call.py says when.
#pragma once

#include <cstdint>

#include "arguments.h"

// The operator to call, by index of order and gate. Python implements it for tensors on a GPU.
#define DA_FIRST_CALL_SCHEMA "(Tensor x, int order, int gate, bool backward) -> ()"

namespace da::cuda {

// In its place where da_ops is not imported: nobody asks for anything.
inline void no_first_call(const Tensor&, int64_t, int64_t, bool) {}

inline void tell_of_first_call(const Problem& p, const Tensor& x, bool backward) {
  using torch::stable::detail::from;
  StableIValue arguments[] = {from(x), from(static_cast<int64_t>(p.order)),
                              from(static_cast<int64_t>(p.gate)), from(backward)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("da_ops::_cuda_first_call", "", arguments, TORCH_ABI_VERSION));
}

}  // namespace da::cuda
