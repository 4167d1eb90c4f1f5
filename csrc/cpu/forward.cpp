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
    A *spatial = image.map(0), *sums_p = image.map(1);
    A *channel = image.vector(0), *sums_c = image.vector(1);
    const A *s = image.ones(), *k = image.ones();

    const auto spatial_mask = [&] {
      A* m = channel_mean + n * pixels;
      for (int64_t i = 0; i < pixels; i++) m[i] = sums_p[i] / c;
      image.spatial_mask(m, spatial);
      s = spatial;
    };
    const auto channel_mask = [&] {
      A* g = pooled + n * c;
      for (int64_t i = 0; i < c; i++) g[i] = sums_c[i] / pixels;
      image.channel_mask(g, channel);
      k = channel;
    };

    switch (problem.order) {
      case Order::spatial_channel:
        image.reduce(xn, nullptr, k, nullptr, sums_p, nullptr);
        spatial_mask();
        image.reduce(xn, nullptr, nullptr, s, nullptr, sums_c);
        channel_mask();
        break;
      case Order::channel_spatial:
        image.reduce(xn, nullptr, nullptr, s, nullptr, sums_c);
        channel_mask();
        image.reduce(xn, nullptr, k, nullptr, sums_p, nullptr);
        spatial_mask();
        break;
      case Order::parallel:
        image.reduce(xn, nullptr, k, s, sums_p, sums_c);
        spatial_mask();
        channel_mask();
        break;
      case Order::spatial:
        image.reduce(xn, nullptr, k, nullptr, sums_p, nullptr);
        spatial_mask();
        break;
      case Order::channel:
        image.reduce(xn, nullptr, nullptr, s, nullptr, sums_c);
        channel_mask();
        break;
    }
    image.scale(xn, y + n * size, k, s);
  });
}

#define DA_INSTANTIATE(T)                                                                   \
  template void forward<T>(const Problem&, const Plan&, const Pool&,                        \
                           const Weights<accumulate_t<T>>&, const T*, T*, accumulate_t<T>*, \
                           accumulate_t<T>*);
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
