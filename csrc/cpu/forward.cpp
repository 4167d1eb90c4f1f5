#include "operator.h"

namespace da::cpu {

template <class T>
void forward(const Problem& problem, const Plan& plan, const Pool& pool,
             const Weights<accumulate_t<T>>& weights, const T* x, T* y,
             accumulate_t<T>* channel_mean, accumulate_t<T>* pooled) {
  using A = accumulate_t<T>;
  const int64_t c = problem.c, pixels = problem.pixels(), size = c * pixels;
  for_images<T>(problem, plan, pool, weights, [&](Image<T>& image, int64_t n) {
    const T* xn = x + n * size;
    A *spatial_mask = image.map(0), *sums_by_pixel = image.map(1);
    A *channel_mask = image.vector(0), *sums_by_channel = image.vector(1);
    const A *by_pixel = image.ones(), *by_channel = image.ones();

    const T* ahead = nullptr;  // the first pass reads x from memory, the others fetch the next x
    for (const Pass& pass : schedule(problem.order, false)) {
      if (pass.sums.any())
        image.reduce(xn, nullptr, by_channel, by_pixel, pass.sums.pixels ? sums_by_pixel : nullptr,
                     pass.sums.channels ? sums_by_channel : nullptr, ahead);
      else
        image.scale(xn, y + n * size, by_channel, by_pixel);
      if (pass.complete.pixels) {
        A* m = channel_mean + n * pixels;
        for (int64_t i = 0; i < pixels; i++) m[i] = sums_by_pixel[i] / c;
        image.spatial_mask(m, spatial_mask);
        by_pixel = spatial_mask;
      }
      if (pass.complete.channels) {
        A* g = pooled + n * c;
        for (int64_t i = 0; i < c; i++) g[i] = sums_by_channel[i] / pixels;
        image.channel_mask(g, channel_mask);
        by_channel = channel_mask;
      }
      if (n + 1 < problem.n) ahead = xn + size;
    }
  });
}

#define DA_INSTANTIATE(T)                                                                   \
  template void forward<T>(const Problem&, const Plan&, const Pool&,                        \
                           const Weights<accumulate_t<T>>&, const T*, T*, accumulate_t<T>*, \
                           accumulate_t<T>*);
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
