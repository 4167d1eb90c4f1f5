#include "residual.h"

#include <optional>

#include "batch.h"
#include "operator.h"

namespace da::cpu {

template <class T>
void statistics(const Problem& p, const Plan& plan, const Pool& pool, const T* u, double* mean,
                double* variance) {
  // The batch is one matrix of pixels, or one of channels for each image. A part is a slab of one,
  // and has moments of all channels, or of its own.
  const bool by_pixel = p.by_pixel();
  const int64_t matrices = by_pixel ? 1 : p.n, rows = by_pixel ? p.n * p.pixels() : p.c;
  const int64_t block = by_pixel ? 8 : 1, aimed_at = 32, most = 256;
  const int64_t least = std::max<int64_t>(aimed_at / std::max<int64_t>(matrices, 1), 1) * block;
  const int64_t part_rows = std::min((rows + least - 1) / least * block, most);
  const int64_t parts = (rows + part_rows - 1) / part_rows;  // of a matrix
  const int64_t sets = by_pixel ? parts : p.n;               // of moments of all channels
  std::vector<double> means(sets * p.c), squares(means.size());
  const auto rows_of = [&](int64_t part) { return std::min(part_rows, rows - part * part_rows); };

  const auto sum = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t part = i % parts, r = i / parts * rows + part * part_rows;
      const int64_t at = by_pixel ? part * p.c : r;
      kernels<T>().residual.moments(u + r * p.cols(), rows_of(part), p.cols(), by_pixel,
                                    means.data() + at, squares.data() + at);
    }
  };
  // The sets' moments, combined in order (Chan et al., 1979).
  const auto combine = [&](int64_t begin, int64_t end) {
    std::fill(mean + begin, mean + end, 0.);
    std::fill(variance + begin, variance + end, 0.);
    double before = 0;
    for (int64_t i = 0; i < sets; i++) {
      const double count = by_pixel ? rows_of(i) : p.pixels();
      const double share = count / (before + count);
      const double *more = means.data() + i * p.c, *more_squares = squares.data() + i * p.c;
      for (int64_t c = begin; c < end; c++) {
        const double delta = more[c] - mean[c];
        mean[c] += delta * share;
        variance[c] += more_squares[c] + delta * delta * (before * share);
      }
      before += count;
    }
    for (int64_t c = begin; c < end; c++) variance[c] /= before;
  };
  if (plan.threads == 1) return sum(0, matrices * parts), combine(0, p.c);
  pool.each(matrices * parts, sum);
  pool.each(p.c, combine);
}

namespace {

template <class A>
Affine<A> affine(const Norm<A>& norm) {
  return {norm.mean.data(), norm.scale.data(), norm.bias.data()};
}

// Bytes of an image beside which another one stays in the second-level cache of most machines.
constexpr int64_t kNear = 512 * 1024;

}  // namespace

template <class T>
void residual_forward(const Problem& problem, const Plan& plan, const Pool& pool,
                      const Norm<accumulate_t<T>>& norm, const Weights<accumulate_t<T>>& weights,
                      const T* u, const Shortcut<T>& shortcut, T* out,
                      accumulate_t<T>* channel_mean, accumulate_t<T>* pooled) {
  using A = accumulate_t<T>;
  const int64_t c = problem.c, pixels = problem.pixels(), size = c * pixels;
  const A* centre = norm.mean.data();
  const Affine<A> normed = shortcut.norm ? affine(*shortcut.norm) : Affine<A>{};
  // Whether the pooling is of what the spatial mask has multiplied.
  const bool pools_masked = problem.channel() && outer(problem.order).pixels;
  const auto one_image = [&](Image<T>& image, int64_t n, int64_t following) {
    const T* un = u + n * size;
    A *m = channel_mean + n * pixels, *raw = pooled + n * c;
    A *spatial_mask = image.map(0), *sums_by_pixel = image.map(1);
    A *channel_mask = image.vector(0), *sums_by_channel = image.vector(1);
    A *scale = image.vector(2), *bias = image.vector(3);  // the channel mask's x
    A* const columns[] = {problem.by_pixel() ? sums_by_channel : sums_by_pixel};
    std::copy_n(norm.scale.data(), c, scale);
    std::copy_n(norm.bias.data(), c, bias);
    A pooled_weight = 1;  // the mean of what the pooling multiplies pixels by

    // The first pass reads u from memory. The sums after it fetch the shortcut where that does not
    // drive u out of the second cache, and the last pass the next u: to write takes it longer than
    // to read.
    const Schedule& passes = schedule(problem.order, false);
    const T* to_add = shortcut.data ? shortcut.data + n * size : nullptr;
    const bool near = plan.joint || size * int64_t(sizeof(T)) <= kNear;
    const T* soon = near ? to_add : image.next_rows(un);
    const bool sums = problem.order != Order::none;
    const T* next = sums && following >= 0 ? u + following * size : image.next_rows(un);

    const auto over = [&](const Pass& pass, const auto& slab, Axes done) {
      const A* by_pixel = done.pixels ? spatial_mask : image.ones();
      if (pass.sums.any())
        image.reduce_deviations(slab, slab.columns[0], un, centre, scale, by_pixel,
                                pass.sums.pixels ? sums_by_pixel : nullptr,
                                pass.sums.channels ? sums_by_channel : nullptr,
                                &pass == passes.begin() ? image.next_rows(un) : soon);
      else
        image.rectify(slab, un, to_add, next, out + n * size, {centre, scale, bias}, by_pixel,
                      shortcut.norm ? &normed : nullptr);
    };
    const auto channels = [&](const Pass&, int64_t begin, int64_t end) {
      A* g = sums_by_channel;
      for (int64_t i = begin; i < end; i++) {
        raw[i] = sums_by_channel[i] / pixels;
        g[i] = norm.scale[i] * raw[i] + norm.bias[i] * pooled_weight;
      }
      image.channel_mask(g, channel_mask, begin, end);
      for (int64_t i = begin; i < end; i++) scale[i] *= channel_mask[i], bias[i] *= channel_mask[i];
    };
    const auto spatial = [&](const Pass& pass) {
      const A constant = sum_of(pass.sums.channels ? norm.bias.data() : bias, c);
      for (int64_t i = 0; i < pixels; i++) m[i] = (sums_by_pixel[i] + constant) / c;
      image.spatial_mask(m, spatial_mask);
      if (pools_masked) pooled_weight = sum_of(spatial_mask, pixels) / pixels;
    };
    image.walk(passes, columns, over, channels, spatial);
  };
  for_images<T>(problem, plan, pool, weights, Walk::backwards, one_image);
}

namespace {

// The maps that backward's second read needs: masks, and the terms that flow back through them;
// each image's, padded, or for all images ones and zeros where there are none.
template <class A>
struct Kept {
  int64_t pixels, channels;  // from one image to the next
  std::vector<A> spatial_mask, pixel_term, channel_mask, channel_term;

  explicit Kept(const Problem& p)
      : pixels(p.spatial() ? padded(p.pixels()) : 0),
        channels(p.channel() ? padded(p.c) : 0),
        spatial_mask(p.spatial() ? p.n * pixels : padded(p.pixels()), A(1)),
        pixel_term(spatial_mask.size()),
        channel_mask(p.channel() ? p.n * channels : padded(p.c), A(1)),
        channel_term(channel_mask.size()) {}
};

// What a norm adds to its input's gradient where its statistics are the batch's, by channel, and
// the gradients of its weight and bias, from each image's sums of dx and of dx (u - mean).
template <class A>
struct OfBatch {
  std::vector<A> slope, offset;
  std::vector<double> sums, products;  // of each image

  explicit OfBatch(const Problem& p)
      : slope(padded(p.c)),
        offset(padded(p.c)),
        sums(std::max<int64_t>(p.n, 1) * p.c),
        products(sums) {}

  // du = scale (dx - mean(dx) - xhat mean(dx xhat))
  void finish(const Problem& p, const Norm<A>& norm, bool batch, const NormGradients& gradients) {
    const int64_t c = p.c;
    const double count = double(p.n) * p.pixels();
    for (int64_t i = c; i < p.n * c; i += c)
      for (int64_t k = 0; k < c; k++) sums[k] += sums[i + k], products[k] += products[i + k];
    for (int64_t i = 0; i < c; i++) {
      gradients.bias[i] = sums[i];
      gradients.weight[i] = products[i] * norm.inverse[i];
      if (!batch) continue;
      slope[i] = -norm.scale[i] * norm.inverse[i] * (gradients.weight[i] / count);
      offset[i] = -norm.scale[i] * (sums[i] / count);
    }
  }
};

}  // namespace

template <class T>
void residual_backward(const Problem& problem, const Plan& plan, const Pool& pool,
                       const Norm<accumulate_t<T>>& norm, const Weights<accumulate_t<T>>& weights,
                       const ResidualCall<T>& call, const ResidualGradients<T>& gradients) {
  using A = accumulate_t<T>;
  const int64_t c = problem.c, pixels = problem.pixels(), size = c * pixels;
  const Axes outermost = outer(problem.order);
  const A* centre = norm.mean.data();
  const bool with_shortcut = gradients.d_shortcut != nullptr;
  Kept<A> kept(problem);
  std::vector<A> all_dt(problem.n * c), all_pooled(problem.n * c);
  std::vector<double> all_taps(problem.n * kSpatialSums);
  OfBatch<A> of_batch(problem);
  const Shortcut<T>& shortcut = call.shortcut;
  std::optional<OfBatch<A>> of_shortcut;
  if (shortcut.norm) of_shortcut.emplace(problem);
  const std::vector<A> zeros(shortcut.norm ? padded(c) : 0);

  const auto first_read = [&](Image<T>& image, int64_t n, int64_t) {
    const T* un = call.u + n * size;
    A *s = &kept.spatial_mask[n * kept.pixels], *dm = &kept.pixel_term[n * kept.pixels];
    A *k = &kept.channel_mask[n * kept.channels], *dg = &kept.channel_term[n * kept.channels];
    const A *m = call.channel_mean + n * pixels, *raw = call.pooled + n * c;
    A *ds = image.map(0), *more_ds = image.map(1), *scale = image.vector(2),
      *bias = image.vector(3);
    A *sums = image.vector(0), *products = image.vector(1);

    if (problem.spatial()) image.spatial_mask(m, s);
    const A* pooled_with = outermost.pixels ? s : image.ones();
    const double weight = sum_of(pooled_with, pixels);
    A* g = &all_pooled[n * c];
    if (problem.channel()) {
      for (int64_t i = 0; i < c; i++)
        g[i] = norm.scale[i] * raw[i] + norm.bias[i] * A(weight / pixels);
      image.channel_mask(g, k);
    }
    for (int64_t i = 0; i < c; i++) scale[i] = norm.scale[i] * k[i], bias[i] = norm.bias[i] * k[i];

    Gradients<T> first{};
    first.dout = call.dout + n * size, first.u = un;
    first.out = with_shortcut ? call.out + n * size : nullptr;
    first.d = with_shortcut ? gradients.d_shortcut + n * size : nullptr;
    first.x = {centre, scale, bias}, first.mask = s;
    first.sums = sums, first.products = products;
    first.pixel_sums = problem.spatial() ? ds : nullptr;
    if (!shortcut.norm) {
      image.gradients(first, nullptr);
    } else {
      // The sums for the shortcut's norm, to which no mask belongs. A kernel that writes no d makes
      // one by the sign of x, which is one here, so that all of d passes.
      Gradients<T> second{};
      second.dout = first.d, second.u = shortcut.data + n * size;
      second.x = {shortcut.norm->mean.data(), zeros.data(), image.ones()};
      second.mask = image.ones();
      second.sums = image.vector(4), second.products = image.vector(5);
      image.gradients(first, &second);
      std::copy_n(second.sums, c, &of_shortcut->sums[n * c]);
      std::copy_n(second.products, c, &of_shortcut->products[n * c]);
    }

    // dc becomes the sums of d x by channel: first from those of d and d (u - mean), then the
    // terms'.
    double dm_sum = 0;
    A *dc = scale, *dm_products = bias;  // both are free
    std::fill_n(dm_products, c, A(0));
    for (int64_t i = 0; i < c; i++) dc[i] = norm.scale[i] * products[i] + norm.bias[i] * sums[i];
    for (const Pass& pass : schedule(problem.order, true)) {
      if (pass.weights == Maps::terms && pass.sums.channels) {
        for (int64_t i = 0; i < c; i++)
          dc[i] += norm.scale[i] * dm_products[i] + norm.bias[i] * A(dm_sum);
      }
      if (pass.weights == Maps::terms && pass.sums.pixels) {
        A* by_channel = image.vector(2);
        double constant = 0;
        for (int64_t i = 0; i < c; i++) {
          by_channel[i] = norm.scale[i] * dg[i];
          constant += double(norm.bias[i]) * dg[i];
        }
        image.reduce_deviations(Walk::backwards, un, centre, by_channel, nullptr, more_ds, nullptr);
        for (int64_t i = 0; i < pixels; i++) ds[i] += more_ds[i] + A(constant);
      }
      if (pass.complete.channels) image.through_channel_mask(dc, k, &all_dt[n * c], dg);
      if (pass.complete.pixels) {
        image.through_spatial_mask(ds, s, m, &all_taps[n * kSpatialSums], dm);
        dm_sum = sum_of(dm, pixels);
        image.reduce_deviations(Walk::forwards, un, centre, nullptr, dm, nullptr, dm_products);
      }
    }

    // dx = d k s + o_p dg + o_c dm, o the outer mask or one; raw is (sum_p o_p (u - mean)) / P.
    for (int64_t i = 0; i < c; i++) {
      const double outer = outermost.channels ? k[i] : A(1);
      const int64_t at = n * c + i;
      of_batch.sums[at] = double(k[i]) * sums[i] + dg[i] * weight + outer * dm_sum;
      const double pooled = problem.channel() ? raw[i] * double(pixels) : 0;
      of_batch.products[at] = double(k[i]) * products[i] + dg[i] * pooled + outer * dm_products[i];
    }
  };
  for_images<T>(problem, plan, pool, weights, Walk::forwards, first_read,
                Image<T>::kGradientColumns);
  of_batch.finish(problem, norm, call.batch, gradients.norm);
  if (shortcut.norm)
    of_shortcut->finish(problem, *shortcut.norm, call.shortcut_batch, gradients.shortcut_norm);

  const auto second_read = [&](Image<T>& image, int64_t n, int64_t) {
    const A *s = &kept.spatial_mask[n * kept.pixels], *dm = &kept.pixel_term[n * kept.pixels];
    const A *k = &kept.channel_mask[n * kept.channels], *dg = &kept.channel_term[n * kept.channels];
    A *scale = image.vector(0), *bias = image.vector(1), *outer = image.vector(2);
    A* shift = image.vector(3);  // the first read's x, to the last bit
    for (int64_t i = 0; i < c; i++) {
      scale[i] = norm.scale[i] * k[i];
      shift[i] = norm.bias[i] * k[i];
      bias[i] = norm.scale[i] * dg[i];
      outer[i] = outermost.channels ? scale[i] : norm.scale[i];
    }
    const Affine<A> x{centre, scale, shift};
    const typename Image<T>::Back back{
        (with_shortcut ? gradients.d_shortcut : call.dout) + n * size,
        call.u + n * size,
        gradients.du + n * size,
        {scale, bias, outer, of_batch.slope.data(), of_batch.offset.data(), x, s, dm,
         outermost.pixels ? s : image.ones(), !with_shortcut, problem.order != Order::none,
         call.batch}};
    if (!shortcut.norm) return image.combine_residual(back, nullptr);
    const Affine<A> r = affine(*shortcut.norm);
    const A *slope = of_shortcut->slope.data(), *offset = of_shortcut->offset.data();
    const A* none = image.ones();  // of the masks and terms, which are not looked at
    T* const d = gradients.d_shortcut + n * size;
    const typename Image<T>::Back through_shortcut{d,
                                                   shortcut.data + n * size,
                                                   d,
                                                   {r.scale, none, none, slope, offset, r, none,
                                                    none, none, false, false, call.shortcut_batch}};
    image.combine_residual(back, &through_shortcut);
  };
  for_images<T>(problem, plan, pool, weights, Walk::backwards, second_read);

  parameter_gradients(problem, weights, all_dt.data(), all_pooled.data(), all_taps.data(),
                      gradients.parameters);
}

#define DA_INSTANTIATE(T)                                                                          \
  template void statistics<T>(const Problem&, const Plan&, const Pool&, const T*, double*,         \
                              double*);                                                            \
  template void residual_forward<T>(const Problem&, const Plan&, const Pool&,                      \
                                    const Norm<accumulate_t<T>>&, const Weights<accumulate_t<T>>&, \
                                    const T*, const Shortcut<T>&, T*, accumulate_t<T>*,            \
                                    accumulate_t<T>*);                                             \
  template void residual_backward<T>(                                                              \
      const Problem&, const Plan&, const Pool&, const Norm<accumulate_t<T>>&,                      \
      const Weights<accumulate_t<T>>&, const ResidualCall<T>&, const ResidualGradients<T>&);
DA_EACH_STORAGE(DA_INSTANTIATE)

}  // namespace da::cpu
