// Division in kernels, where it takes many instructions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "formula.h"

namespace da::cuda {

// Divides by what the host knows, with a multiplication and a correction.
struct Divisor {
  uint32_t by, factor;

  Divisor() = default;
  explicit Divisor(int64_t by)
      : by(static_cast<uint32_t>(by)),
        factor(static_cast<uint32_t>(std::min((int64_t(1) << 32) / by, int64_t(UINT32_MAX)))) {}

  DA_HD uint32_t quotient(uint32_t n) const {
    const uint32_t estimate = static_cast<uint32_t>(uint64_t(n) * factor >> 32);
    return estimate + (n - estimate * by >= by ? 1 : 0);  // it is at most one too small
  }
};

}  // namespace da::cuda
