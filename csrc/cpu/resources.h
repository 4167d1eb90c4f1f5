// The CPU kernels' threads and memory.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "kernels.h"

namespace da::cpu {

// Runs body(context, begin, end) over [0, count) on the caller's threads.
struct Pool {
  void (*run)(int64_t count, void* context, void (*body)(void*, int64_t, int64_t));

  template <class F>
  void each(int64_t count, F f) const {
    run(count, &f,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); });
  }
};

// Arrays in one allocation, each aligned and padded: first those that are zeroed.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t zeroed, int64_t others = 0) {
    const size_t bytes = (zeroed + others) * sizeof(A);
    data_.reset(static_cast<A*>(std::aligned_alloc(kAlignment, bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, zeroed * sizeof(A));
    next_ = data_.get();
  }
  A* take(int64_t n) { return std::exchange(next_, next_ + padded(n)); }

 private:
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  std::unique_ptr<A, Free> data_;
  A* next_;
};

}  // namespace da::cpu
