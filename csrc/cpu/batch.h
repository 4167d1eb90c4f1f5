// A walk over the images of a batch, by the plan.
#pragma once

#include "image.h"

namespace da::cpu {

// f(image, n, next) for every image, where `next` is the one that the same thread takes after it,
// or -1: each of the plan's whole images on one thread, the others one after another on all
// threads. A walk that follows another one, or a convolution, goes backwards: the images that were
// used last are still in the caches.
template <class T, class F>
void for_images(const Problem& problem, const Plan& plan, const Pool& pool,
                const Weights<accumulate_t<T>>& weights, Walk walk, F f, int columns = 1) {
  const auto take = [&](Image<T>& image, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < end - begin; i++) {
      const bool last = begin + i + 1 == end;
      if (walk == Walk::forwards)
        f(image, begin + i, last ? -1 : begin + i + 1);
      else
        f(image, end - 1 - i, last ? -1 : end - 2 - i);
    }
  };
  const auto serial = [&](int64_t begin, int64_t end) {
    Image<T> image(problem, plan, weights, nullptr, columns);
    take(image, begin, end);
  };
  if (plan.threads == 1) return serial(0, problem.n);
  const auto together = [&] {
    if (plan.whole_images == problem.n) return;
    Image<T> image(problem, plan, weights, &pool, columns);
    take(image, plan.whole_images, problem.n);
  };
  if (walk == Walk::backwards) together();
  pool.each(plan.whole_images, serial);
  if (walk == Walk::forwards) together();
}

}  // namespace da::cpu
