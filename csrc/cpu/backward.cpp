#include <vector>

#include "batch.h"
#include "operator.h"

namespace da::cpu {
namespace {

// Sums the images' shares of the gate's gradients in double and in a fixed order.
template <class A>
void gate_gradients(const Problem& p, const A* dt, const A* pooled, double* d_weight,
                    double* d_bias) {
  if (p.gate_weights() == 0) return;
  std::vector<double> weight(p.gate_weights()), bias(p.gate_weights());
  for (int64_t n = 0; n < p.n; n++, dt += p.c, pooled += p.c) {
    if (p.gate == Gate::eca) {
      for (int64_t k = 0; k < p.kernel_size; k++) {
        const int64_t shift = k - p.kernel_size / 2;
        const int64_t end = std::min(p.c, p.c - shift);
        const int64_t begin = std::max<int64_t>(0, -shift);
        weight[k] += sum_of(end - begin, [&](int64_t i) {
          return double(dt[begin + i]) * pooled[begin + i + shift];
        });
      }
    } else if (p.gate == Gate::scalar) {
      weight[0] += sum_of(p.c, [&](int64_t c) { return double(dt[c]) * pooled[c]; });
      bias[0] += sum_of(dt, p.c);
    } else {
      for (int64_t c = 0; c < p.c; c++) {
        weight[c] += double(dt[c]) * pooled[c];
        bias[c] += dt[c];
      }
    }
  }
  std::copy(weight.begin(), weight.end(), d_weight);
  if (p.gate != Gate::eca) std::copy(bias.begin(), bias.end(), d_bias);
}

}  // namespace

template <class A>
void parameter_gradients(const Problem& problem, const Weights<A>& weights, const A* dt,
                         const A* pooled, const double* tap_sums,
                         const Parameters<double*>& gradients) {
  if (problem.channel())
    gate_gradients<A>(problem, dt, pooled, gradients.gate, gradients.gate_bias);
  if (problem.spatial()) {
    double sums[kSpatialSums] = {};
    for (int64_t n = 0; n < problem.n; n++)
      for (int t = 0; t < kSpatialSums; t++) sums[t] += tap_sums[n * kSpatialSums + t];
    const SpatialWeights<double> d = spatial_gradients(weights.spatial, sums);
    std::copy_n(d.conv, kTaps, gradients.conv);
    std::copy_n(d.dilated, kTaps, gradients.dilated);
    std::copy_n(d.merge, 2, gradients.merge);
    *gradients.spatial_bias = d.bias;
  }
}
template void parameter_gradients<float>(const Problem&, const Weights<float>&, const float*,
                                         const float*, const double*, const Parameters<double*>&);
template void parameter_gradients<double>(const Problem&, const Weights<double>&, const double*,
                                          const double*, const double*, const Parameters<double*>&);

template <class T>
void backward(const Problem& problem, const Plan& plan, const Pool& pool,
              const Weights<accumulate_t<T>>& weights, const T* dy, const T* x,
              const accumulate_t<T>* channel_mean, const accumulate_t<T>* pooled, T* dx,
              const Parameters<double*>& gradients) {
  using A = accumulate_t<T>;
  const int64_t c = problem.c, pixels = problem.pixels(), size = c * pixels;
  std::vector<A> all_dt(problem.channel() ? problem.n * c : 0);
  std::vector<double> all_sums(problem.n * kSpatialSums);

  const auto one_image = [&](Image<T>& image, int64_t n, int64_t following) {
    const T *xn = x + n * size, *dyn = dy + n * size;
    const A *m = channel_mean + n * pixels, *g = pooled + n * c;
    A *spatial_mask = image.map(0), *ds = image.map(1), *dm = image.map(2);
    A *channel_mask = image.vector(0), *dc = image.vector(1), *dg = image.vector(2);
    const A *by_pixel = image.ones(), *by_channel = image.ones();
    if (problem.spatial()) image.spatial_mask(m, spatial_mask), by_pixel = spatial_mask;
    if (problem.channel()) image.channel_mask(g, channel_mask), by_channel = channel_mask;
    A *more_ds = image.map(3), *more_dc = image.vector(3);
    A* const columns[] = {problem.by_pixel() ? dc : ds, problem.by_pixel() ? more_dc : more_ds};
    const T* next = following < 0 ? nullptr : dy + following * size;

    const auto over = [&](const Pass& pass, const auto& slab, Axes) {
      A* const by_column = slab.columns ? slab.columns[image.column(pass)] : nullptr;
      if (!pass.sums.any())
        image.combine(slab, dyn, next, dx + n * size, by_channel, by_pixel, dg, dm,
                      outer(problem.order));
      else if (pass.weights == Maps::masks)
        image.reduce(slab, by_column, xn, dyn, by_channel, by_pixel,
                     pass.sums.pixels ? ds : nullptr, pass.sums.channels ? dc : nullptr,
                     image.next_rows(xn));
      else  // x is in the caches
        image.reduce(slab, by_column, xn, nullptr, dg, dm, pass.sums.pixels ? more_ds : nullptr,
                     pass.sums.channels ? more_dc : nullptr);
    };
    const auto channels = [&](const Pass& pass, int64_t begin, int64_t end) {
      if (pass.weights == Maps::terms)
        for (int64_t i = begin; i < end; i++) dc[i] += more_dc[i];
      image.through_channel_mask(dc, channel_mask, all_dt.data() + n * c, dg, begin, end);
    };
    const auto spatial = [&](const Pass& pass) {
      if (pass.weights == Maps::terms)
        for (int64_t i = 0; i < pixels; i++) ds[i] += more_ds[i];
      image.through_spatial_mask(ds, spatial_mask, m, &all_sums[n * kSpatialSums], dm);
    };
    image.walk(schedule(problem.order, true), columns, over, channels, spatial);
  };
  for_images<T>(problem, plan, pool, weights, Walk::backwards, one_image, 2);

  parameter_gradients(problem, weights, all_dt.data(), pooled, all_sums.data(), gradients);
}

#define DA_INSTANTIATE(T)                                                                  \
  template void backward<T>(                                                               \
      const Problem&, const Plan&, const Pool&, const Weights<accumulate_t<T>>&, const T*, \
      const T*, const accumulate_t<T>*, const accumulate_t<T>*, T*, const Parameters<double*>&);
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
