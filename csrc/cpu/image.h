// One image on its way through the operator: the passes of the schedule and what lies between them,
// run by one thread, or shared out over all threads with the same sums in the same order.
#pragma once

#include <algorithm>
#include <vector>

#include "masks.h"

namespace da::cpu {

enum class Walk { forwards, backwards };

template <class T>
class Image : public Masks<T> {
 public:
  using A = accumulate_t<T>;

  // Where `pool` is null, the calling thread does all the work. `columns` is how many arrays of
  // sums by column are made from one read, at most: of pixels, where they are the columns, there
  // are sums for a spatial mask alone.
  Image(const Problem& problem, const Plan& plan, const Weights<A>& weights, const Pool* pool,
        int columns)
      : Masks<T>(problem, plan, weights, pool),
        p_(problem),
        plan_(plan),
        pool_(pool),
        stride_(padded(problem.cols())),
        map_elements_(problem.order == Order::none ? 0 : problem.pixels()),
        sum_elements_(problem.by_pixel() || problem.spatial() ? columns * stride_ : 0),
        partial_elements_((pool ? plan.slabs : 1) * sum_elements_),
        scratch_(padded(std::max(problem.c, problem.pixels())) + kMaps * padded(map_elements_) +
                     kVectors * padded(problem.c),
                 partial_elements_),
        ones_(scratch_.take(std::max(problem.c, problem.pixels()))),
        column_sums_(plan.slabs > kGroup ? sum_elements_ : 0) {
    for (A*& map : maps_) map = scratch_.take(map_elements_);
    for (A*& vector : vectors_) vector = scratch_.take(problem.c);
    partial_ = scratch_.take(partial_elements_);
    std::fill_n(ones_, std::max(p_.c, p_.pixels()), A(1));
  }

  // Arrays for the caller: by pixel where there is attention, by channel, and of ones by either.
  A* map(int i) const { return maps_[i]; }
  A* vector(int i) const { return vectors_[i]; }
  const A* ones() const { return ones_; }

  // The n rows from r on of the image's matrix, and where their sums by column go.
  struct Slab {
    int64_t r, n;
    A* const* columns;
  };

  // The elements to fetch while x is read from memory: a few rows on, and not too few elements.
  const T* next_rows(const T* x) const { return x + std::max(8 * p_.cols(), kFar); }

  // All passes: over(pass, slab, done) for each slab, with the axes that earlier passes completed;
  // channels(pass, begin, end) and pixels(pass) once the sums are there that pass completes. The
  // sums by column that a pass makes come together in columns[column(pass)]. Where a channel's mask
  // follows from a row's own sums, the next pass goes over a slab as soon as these are there, while
  // the slab is near. Elsewhere sums are made forwards and backwards in turn: what was read last is
  // still in the caches where a whole image is not.
  template <size_t kColumns, class Over, class Channels, class Pixels>
  void walk(const Schedule& passes, A* const (&columns)[kColumns], Over over, Channels channels,
            Pixels pixels) {
    const bool last = p_.by_pixel();
    Axes done = kNone;
    Walk way = Walk::backwards;
    for (const Pass* pass = passes.begin(); pass != passes.end(); pass++) {
      const bool joined = plan_.joint && pass->complete.channels && !pass->complete.pixels;
      const Pass* const then = joined ? pass + 1 : nullptr;
      if (!pass->sums.any()) {
        each_slab([&](int64_t r, int64_t n) { over(*pass, Slab{r, n, nullptr}, done); });
        continue;
      }
      A* made[kColumns] = {};
      for (const Pass* one : {pass, then})
        if (one && (last ? one->sums.channels : one->sums.pixels))
          made[column(*one)] = columns[column(*one)];
      way = may_join(p_) || way == Walk::backwards ? Walk::forwards : Walk::backwards;
      each_summed_slab(way, made, [&](int64_t r, int64_t n, A* const* partial) {
        const Slab slab{r, n, partial};
        over(*pass, slab, done);
        if (!joined) return;
        channels(*pass, r, r + n);
        over(*then, slab, either(done, kChannels));
      });
      if (pass->complete.channels && !joined) channels(*pass, 0, p_.c);
      done = either(done, pass->complete);
      if (joined) pass = then;
      if (pass->complete.pixels) pixels(*pass);
      done = either(done, pass->complete);
    }
  }
  // Backward's second sums are made of x alone, and may be made beside its first.
  static constexpr int column(const Pass& pass) { return pass.weights == Maps::terms; }

  // With t = x, or x*dy where dy is given, from one read:
  //   sums_by_pixel[p] = sum_c by_channel[c] t    and    sums_by_channel[c] = sum_p by_pixel[p] t
  // Null sums are not made, and their weights not looked at; those by column go to `columns` all
  // the same. `ahead` is x's next rows, or what a later pass reads from memory where x is in the
  // caches.
  void reduce(const Slab& slab, A* columns, const T* x, const T* dy, const A* by_channel,
              const A* by_pixel, A* sums_by_pixel, A* sums_by_channel, const T* ahead = nullptr) {
    const int64_t r = slab.r, at = r * p_.cols();
    const Sides<const A> weights = sides(by_channel, by_pixel);
    const Sides<A> sums = sides(sums_by_channel, sums_by_pixel);
    kernels_.reduce(x + at, from_row(dy, at), from_row(ahead, at), slab.n, p_.cols(),
                    sums.col ? weights.row + r : nullptr, weights.col,
                    sums.row ? sums.row + r : nullptr, sums.col ? columns : nullptr, plan_.sums);
  }

  // The same with t = u - centre[c].
  void reduce_deviations(const Slab& slab, A* columns, const T* u, const A* centre,
                         const A* by_channel, const A* by_pixel, A* sums_by_pixel,
                         A* sums_by_channel, const T* ahead = nullptr) {
    const int64_t r = slab.r, at = r * p_.cols();
    const Sides<const A> weights = sides(by_channel, by_pixel);
    const Sides<A> sums = sides(sums_by_channel, sums_by_pixel);
    kernels_.residual.reduce(u + at, from_row(ahead, at), of_channels(centre, r), slab.n, p_.cols(),
                             p_.by_pixel(), sums.col ? weights.row + r : nullptr, weights.col,
                             sums.row ? sums.row + r : nullptr, sums.col ? columns : nullptr,
                             plan_.sums);
  }
  // These sums of a whole image.
  void reduce_deviations(Walk way, const T* u, const A* centre, const A* by_channel,
                         const A* by_pixel, A* sums_by_pixel, A* sums_by_channel) {
    A* const columns[] = {sides(sums_by_channel, sums_by_pixel).col};
    each_summed_slab(way, columns, [&](int64_t r, int64_t n, A* const* partial) {
      reduce_deviations(Slab{r, n, partial}, partial[0], u, centre, by_channel, by_pixel,
                        sums_by_pixel, sums_by_channel, next_rows(u));
    });
  }

  // y = x * channel_mask * spatial_mask
  void scale(const Slab& slab, const T* x, const T* ahead, T* y, const A* channel_mask,
             const A* spatial_mask) {
    const Sides<const A> scales = sides(channel_mask, spatial_mask);
    const int64_t at = slab.r * p_.cols();
    kernels_.scale(x + at, from_row(ahead, at), y + at, slab.n, p_.cols(), scales.row + slab.r,
                   scales.col, plan_.stores);
  }

  // dx = dy * channel_mask * spatial_mask + channel_term + spatial_term, where the term of the axis
  // that is not `outer` is multiplied by the outer one's mask.
  void combine(const Slab& slab, const T* dy, const T* ahead, T* dx, const A* channel_mask,
               const A* spatial_mask, const A* channel_term, const A* spatial_term, Axes outer) {
    const Sides<const A> scales = sides(channel_mask, spatial_mask);
    const Sides<const A> biases = sides(channel_term, spatial_term);
    const bool rows = p_.by_pixel() ? outer.pixels : outer.channels;
    const Outer side = !outer.any() ? Outer::none : rows ? Outer::rows : Outer::cols;
    const int64_t r = slab.r, at = r * p_.cols();
    kernels_.combine(dy + at, from_row(ahead, at), dx + at, slab.n, p_.cols(), scales.row + r,
                     scales.col, {biases.row + r, biases.col, side}, plan_.stores, plan_.combines);
  }

  // out = relu(x spatial_mask + shortcut), x with the channel mask in it. The shortcut may be null,
  // and out be u; `of_shortcut` is the norm that the shortcut goes through, or null.
  void rectify(const Slab& slab, const T* u, const T* shortcut, const T* ahead, T* out,
               const Affine<A>& x, const A* spatial_mask, const Affine<A>* of_shortcut) {
    const int64_t r = slab.r, at = r * p_.cols();
    const Affine<A> r_affine = of_shortcut ? from(*of_shortcut, r) : Affine<A>{};
    kernels_.residual.rectify(u + at, from_row(shortcut, at), from_row(ahead, at), out + at, slab.n,
                              p_.cols(), p_.by_pixel(), from(x, r), of_pixels(spatial_mask, r),
                              of_shortcut ? &r_affine : nullptr, plan_.stores);
  }

  // Arrays of sums by column that gradients() makes, at most.
  static constexpr int kGradientColumns = 4;
  // The sums of a whole image; what depends on its size is set here. A second read of other
  // tensors, which may be of d, goes over each slab while that is near; it may be null.
  void gradients(const Gradients<T>& first, const Gradients<T>* second) {
    const bool last = p_.by_pixel();
    A* cols[kGradientColumns] = {last ? first.sums : first.pixel_sums,
                                 last ? first.products : nullptr, nullptr, nullptr};
    if (last && second) cols[2] = second->sums, cols[3] = second->products;
    each_summed_slab(Walk::forwards, cols, [&](int64_t r, int64_t n, A* const* partial) {
      const auto read = [&](Gradients<T> g, A* const* columns) {
        const int64_t at = r * p_.cols();
        g.dout += at, g.u += at;
        if (g.d) g.out += at, g.d += at;
        g.rows = n, g.cols = p_.cols(), g.channels_last = last;
        g.stores = second ? Stores::cached : plan_.stores;
        g.x = from(g.x, r), g.mask = of_pixels(g.mask, r);
        if (last) {
          g.sums = columns[0], g.products = columns[1];
          if (g.pixel_sums) g.pixel_sums += r;
        } else {
          g.sums += r, g.products += r;
          g.pixel_sums = g.pixel_sums ? columns[0] : nullptr;
        }
        kernels_.residual.gradients(g);
      };
      read(first, partial);
      if (second) read(*second, partial + 2);
    });
  }

  // The way back through a norm: du of d and u. It may take d's place.
  struct Back {
    const T *d, *u;
    T* du;
    ResidualTerms<A> terms;
  };
  // Both, or one where the second is null, over each slab in turn.
  void combine_residual(const Back& first, const Back* second) {
    const auto make = [&](const Back& back, int64_t r, int64_t n, Stores stores) {
      const int64_t at = r * p_.cols();
      const ResidualTerms<A>& t = back.terms;
      const auto c = [&](const A* values) { return of_channels(values, r); };
      const auto p = [&](const A* values) { return of_pixels(values, r); };
      kernels_.residual.combine(
          back.d + at, back.u + at, back.du + at, n, p_.cols(), p_.by_pixel(),
          {c(t.scale), c(t.bias), c(t.outer), c(t.slope), c(t.offset), from(t.x, r), p(t.mask),
           p(t.pixel_bias), p(t.pixel_outer), t.rectify, t.masked, t.batch},
          stores);
    };
    each_slab([&](int64_t begin, int64_t count) {
      if (!second) return make(first, begin, count, plan_.du_stores);
      for (int64_t r = begin; r < begin + count; r += plan_.slab_rows) {
        const int64_t n = std::min(plan_.slab_rows, begin + count - r);
        make(first, r, n, plan_.du_stores);
        make(*second, r, n, Stores::cached);
      }
    });
  }

 private:
  static constexpr int64_t kGroup = 16;  // slabs whose sums are added up in A, and then in double
  static constexpr int kMaps = 4, kVectors = 6;

  // What belongs to the matrix's rows and to its columns.
  template <class V>
  struct Sides {
    V *row, *col;
  };
  template <class V>
  Sides<V> sides(V* of_channels, V* of_pixels) const {
    return p_.by_pixel() ? Sides<V>{of_pixels, of_channels} : Sides<V>{of_channels, of_pixels};
  }

  // An image from an element on, or null.
  static const T* from_row(const T* image, int64_t at) { return image ? image + at : nullptr; }

  // An array by channel, or by pixel, from a slab's first row on.
  const A* of_channels(const A* values, int64_t r) const {
    return p_.by_pixel() ? values : values + r;
  }
  const A* of_pixels(const A* values, int64_t r) const {
    return p_.by_pixel() ? values + r : values;
  }
  Affine<A> from(const Affine<A>& x, int64_t r) const {
    return {of_channels(x.centre, r), of_channels(x.scale, r), of_channels(x.bias, r)};
  }

  // slab(r, n, partial) for each slab, of n rows from row r on. Its sums by column go to
  // partial[i], and are added up, in the order of the walk, into cols[i], where that is not null.
  template <size_t kArrays, class F>
  void each_summed_slab(Walk way, A* const (&cols)[kArrays], F slab) {
    const auto run = [&](int64_t i, A* at) {
      A* partial[kArrays];
      for (size_t k = 0; k < kArrays; k++) partial[k] = at + k * stride_;
      const int64_t r = i * plan_.slab_rows;
      slab(r, std::min(plan_.slab_rows, p_.rows() - r), partial);
    };
    // Adds the `done`-th slab's sums, of the columns from begin to end.
    const auto add = [&](int64_t done, const A* at, int64_t begin, int64_t end) {
      const bool first = done % kGroup == 0, complete = done + 1 == plan_.slabs;
      for (size_t k = 0; k < kArrays; k++, at += stride_) {
        if (!cols[k]) continue;
        kernels_.add(cols[k] + begin, at + begin, end - begin, first);
        if (plan_.slabs <= kGroup || !(complete || (done + 1) % kGroup == 0)) continue;
        double* const sums = column_sums_.data() + k * stride_;
        for (int64_t i = begin; i < end; i++) {
          sums[i] = (done < kGroup ? 0 : sums[i]) + cols[k][i];
          if (complete) cols[k][i] = sums[i];
        }
      }
    };
    // f(i, done) for each i from begin to end, where so many are done before.
    const auto walk = [&](int64_t begin, int64_t end, auto f) {
      for (int64_t k = 0; k < end - begin; k++)
        f(way == Walk::forwards ? begin + k : end - 1 - k, k);
    };
    if (!pool_)
      return walk(0, plan_.slabs, [&](int64_t i, int64_t done) {
        run(i, partial_);
        add(done, partial_, 0, p_.cols());
      });
    const auto partial = [&](int64_t i) { return partial_ + i * kArrays * stride_; };
    each(plan_.slabs, p_.rows() * p_.cols(), [&](int64_t begin, int64_t end) {
      walk(begin, end, [&](int64_t i, int64_t) { run(i, partial(i)); });
    });
    if (std::any_of(cols, cols + kArrays, [](A* to) { return to != nullptr; }))
      each(p_.cols(), plan_.slabs * p_.cols(), [&](int64_t begin, int64_t end) {
        walk(0, plan_.slabs, [&](int64_t i, int64_t done) { add(done, partial(i), begin, end); });
      });
  }

  template <class F>
  void each(int64_t count, int64_t work, F f) const {
    cpu::each(pool_, plan_, count, work, f);
  }
  template <class F>
  void each_slab(F f) const {
    each(plan_.slabs, p_.rows() * p_.cols(), [&](int64_t begin, int64_t end) {
      const int64_t r = begin * plan_.slab_rows;
      f(r, std::min(end * plan_.slab_rows, p_.rows()) - r);
    });
  }

  const Problem& p_;
  const Plan& plan_;
  const Pool* pool_;
  const Kernels<T>& kernels_ = kernels<T>();
  int64_t stride_, map_elements_;
  int64_t sum_elements_, partial_elements_;  // of a slab's sums by column; of all that are kept
  Scratch<A> scratch_;
  A *ones_, *maps_[kMaps], *vectors_[kVectors], *partial_;
  std::vector<double> column_sums_;
};

}  // namespace da::cpu
