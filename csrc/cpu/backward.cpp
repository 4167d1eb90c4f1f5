#include <vector>

#include "operator.h"

namespace da::cpu {
namespace {

// Sums the images' shares of the gate's gradients, in double and in index order.
template <class A>
void gate_gradients(const Problem& p, const A* dt, const A* pooled, A* d_weight, A* d_bias) {
  if (p.gate_weights() == 0) return;
  std::vector<double> weight(p.gate_weights()), bias(p.gate_weights());
  const int64_t step = p.gate == Gate::affine ? 1 : 0;  // one weight a channel, or one for all
  for (int64_t n = 0; n < p.n; n++, dt += p.c, pooled += p.c) {
    if (p.gate == Gate::eca) {
      for (int64_t k = 0; k < p.kernel_size; k++) {
        const int64_t shift = k - p.kernel_size / 2;
        const int64_t end = std::min(p.c, p.c - shift);
        for (int64_t c = std::max<int64_t>(0, -shift); c < end; c++)
          weight[k] += double(dt[c]) * pooled[c + shift];
      }
    } else {
      for (int64_t c = 0; c < p.c; c++) {
        weight[c * step] += double(dt[c]) * pooled[c];
        bias[c * step] += dt[c];
      }
    }
  }
  std::copy(weight.begin(), weight.end(), d_weight);
  if (p.gate != Gate::eca) std::copy(bias.begin(), bias.end(), d_bias);
}

}  // namespace

template <class T>
void backward(const Problem& problem, const Plan& plan, const Pool& pool,
              const Weights<accumulate_t<T>>& weights, const T* dy, const T* x,
              const accumulate_t<T>* channel_mean, const accumulate_t<T>* pooled, T* dx,
              const Gradients<accumulate_t<T>>& gradients) {
  using A = accumulate_t<T>;
  const Order order = problem.order;
  const int64_t c = problem.c, pixels = problem.pixels(), size = c * pixels;
  std::vector<A> all_dt(problem.channel() ? problem.n * c : 0);
  std::vector<double> all_sums(problem.n * kSpatialSums);

  for_images<T>(problem, plan, pool, weights, [&](Image<T>& image, int64_t n) {
    const T *xn = x + n * size, *dyn = dy + n * size;
    const A *m = channel_mean + n * pixels, *g = pooled + n * c;
    A *spatial = image.map(0), *ds = image.map(1), *dm = image.map(2), *more_p = image.map(3);
    A *channel = image.vector(0), *dc = image.vector(1), *dg = image.vector(2);
    A* more_c = image.vector(3);
    const A *s = image.ones(), *k = image.ones();
    if (problem.spatial()) image.spatial_mask(m, spatial), s = spatial;
    if (problem.channel()) image.channel_mask(g, channel), k = channel;

    // From one read of (dy, x): the gradients of both masks, before what flows from one to the
    // other.
    image.reduce(xn, dyn, k, s, problem.spatial() ? ds : nullptr, problem.channel() ? dc : nullptr);

    // dg and dm are wanted divided by the pixels, by the channels.
    const auto through_channel_mask = [&] {
      A* dt = all_dt.data() + n * c;
      for (int64_t i = 0; i < c; i++) dt[i] = dc[i] * sigmoid_slope(k[i]);
      for (int64_t i = 0; i < c; i++)
        dg[i] =
            gate_transposed<A>(problem.gate, weights.gate, problem.kernel_size, dt, c, i) / pixels;
    };
    const auto through_spatial_mask = [&] {
      A* dz = ds;
      for (int64_t i = 0; i < pixels; i++) dz[i] *= sigmoid_slope(s[i]);
      image.tap_sums(dz, m, all_sums.data() + n * kSpatialSums);
      image.stencil(dz, weights.spatial.transposed_stencil(), false, dm);
      for (int64_t i = 0; i < pixels; i++) dm[i] /= c;
    };

    if (order == Order::channel_spatial) {
      through_spatial_mask();
      image.reduce(xn, nullptr, nullptr, dm, nullptr, more_c);
      for (int64_t i = 0; i < c; i++) dc[i] += more_c[i];
      through_channel_mask();
    } else {
      if (problem.channel()) through_channel_mask();
      if (order == Order::spatial_channel) {
        image.reduce(xn, nullptr, dg, nullptr, more_p, nullptr);
        for (int64_t i = 0; i < pixels; i++) ds[i] += more_p[i];
      }
      if (problem.spatial()) through_spatial_mask();
    }
    image.combine(dyn, dx + n * size, k, s, dg, order == Order::spatial_channel ? s : image.ones(),
                  dm, order == Order::channel_spatial ? k : image.ones());
  });

  if (problem.channel())
    gate_gradients<A>(problem, all_dt.data(), pooled, gradients.gate, gradients.gate_bias);
  if (problem.spatial()) {
    double sums[kSpatialSums] = {};
    for (int64_t n = 0; n < problem.n; n++)
      for (int t = 0; t < kSpatialSums; t++) sums[t] += all_sums[n * kSpatialSums + t];
    *gradients.spatial = spatial_gradients(weights.spatial, sums);
  }
}

#define DA_INSTANTIATE(T)                                                        \
  template void backward<T>(const Problem&, const Plan&, const Pool&,            \
                            const Weights<accumulate_t<T>>&, const T*, const T*, \
                            const accumulate_t<T>*, const accumulate_t<T>*, T*,  \
                            const Gradients<accumulate_t<T>>&);
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
