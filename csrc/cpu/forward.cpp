#include "batch.h"
#include "operator.h"

namespace da::cpu {

template <class T>
void forward(const Problem& problem, const Plan& plan, const Pool& pool,
             const Weights<accumulate_t<T>>& weights, const T* x, T* y,
             accumulate_t<T>* channel_mean, accumulate_t<T>* pooled) {
  using A = accumulate_t<T>;
  const int64_t c = problem.c, pixels = problem.pixels(), size = c * pixels;
  const auto one_image = [&](Image<T>& image, int64_t n, int64_t following) {
    const T* xn = x + n * size;
    A *m = channel_mean + n * pixels, *g = pooled + n * c;
    A *spatial_mask = image.map(0), *sums_by_pixel = image.map(1);
    A *channel_mask = image.vector(0), *sums_by_channel = image.vector(1);
    A* const columns[] = {problem.by_pixel() ? sums_by_channel : sums_by_pixel};
    // The first pass reads x from memory. The last one fetches the next x: to write takes it longer
    // than to read.
    const Schedule& passes = schedule(problem.order, false);
    const T* next = following < 0 ? nullptr : x + following * size;

    const auto over = [&](const Pass& pass, const auto& slab, Axes done) {
      const A* by_pixel = done.pixels ? spatial_mask : image.ones();
      const A* by_channel = done.channels ? channel_mask : image.ones();
      if (pass.sums.any())
        image.reduce(slab, slab.columns[0], xn, nullptr, by_channel, by_pixel,
                     pass.sums.pixels ? sums_by_pixel : nullptr,
                     pass.sums.channels ? sums_by_channel : nullptr,
                     &pass == passes.begin() ? image.next_rows(xn) : nullptr);
      else
        image.scale(slab, xn, next, y + n * size, by_channel, by_pixel);
    };
    const auto channels = [&](const Pass&, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) g[i] = sums_by_channel[i] / pixels;
      image.channel_mask(g, channel_mask, begin, end);
    };
    const auto spatial = [&](const Pass&) {
      for (int64_t i = 0; i < pixels; i++) m[i] = sums_by_pixel[i] / c;
      image.spatial_mask(m, spatial_mask);
    };
    image.walk(passes, columns, over, channels, spatial);
  };
  for_images<T>(problem, plan, pool, weights, Walk::backwards, one_image);
}

#define DA_INSTANTIATE(T)                                                                   \
  template void forward<T>(const Problem&, const Plan&, const Pool&,                        \
                           const Weights<accumulate_t<T>>&, const T*, T*, accumulate_t<T>*, \
                           accumulate_t<T>*);
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
