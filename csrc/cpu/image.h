// One image on its way through the operator: the phases that the orders are put together from, run
// by one thread or shared out over all of them with the same sums in the same order.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "kernels.h"
#include "plan.h"

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

// Zeroed arrays out of one allocation, each aligned and padded.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t capacity) {
    const size_t bytes = capacity * sizeof(A);
    data_.reset(static_cast<A*>(std::aligned_alloc(kAlignment, bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes);
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

// Parameters in accumulation precision; the gate's as arrays of Problem::gate_weights() entries.
template <class A>
struct Weights {
  SpatialWeights<A> spatial;
  const A* gate;
  const A* gate_bias;
};

template <class T>
class Image {
 public:
  using A = accumulate_t<T>;

  // `pool` null: the calling thread does it all.
  Image(const Problem& problem, const Plan& plan, const Weights<A>& weights, const Pool* pool)
      : p_(problem),
        plan_(plan),
        weights_(weights),
        pool_(pool),
        stride_(padded(problem.cols())),
        bands_((problem.h + kBand - 1) / kBand),
        scratch_(capacity(problem, plan, pool)),
        partial_(scratch_.take((pool ? plan.slabs : 1) * stride_)),
        plane_(scratch_.take(plane_size(problem.h, problem.w))),
        second_plane_(scratch_.take(plane_size(problem.h, problem.w))),
        band_sums_(scratch_.take(bands_ * kSpatialSums)),
        ones_(scratch_.take(std::max(problem.c, problem.pixels()))) {
    for (A*& map : maps_) map = scratch_.take(problem.pixels());
    for (A*& vector : vectors_) vector = scratch_.take(problem.c);
    std::fill_n(ones_, std::max(p_.c, p_.pixels()), A(1));
  }

  // Arrays for the caller: over the pixels, over the channels, and of ones over either.
  A* map(int i) const { return maps_[i]; }
  A* vector(int i) const { return vectors_[i]; }
  const A* ones() const { return ones_; }

  // With t = x, or x*dy where dy is given:
  //   over_channels[p] = sum_c by_channel[c] t     and     over_pixels[c] = sum_p by_pixel[p] t
  // from one read; a null output is skipped, and so then is its weight.
  void reduce(const T* x, const T* dy, const A* by_channel, const A* by_pixel, A* over_channels,
              A* over_pixels) {
    const A* u = p_.channels_last ? by_pixel : by_channel;
    const A* v = p_.channels_last ? by_channel : by_pixel;
    A* row_sums = p_.channels_last ? over_channels : over_pixels;
    A* col_sums = p_.channels_last ? over_pixels : over_channels;
    const int64_t cols = p_.cols();
    const auto slab = [&](int64_t i, A* partial) {
      const int64_t r = i * plan_.slab_rows, n = std::min(plan_.slab_rows, p_.rows() - r);
      kernels_.reduce(x + r * cols, dy ? dy + r * cols : nullptr, n, cols,
                      col_sums ? u + r : nullptr, v, row_sums ? row_sums + r : nullptr,
                      col_sums ? partial : nullptr, plan_.sum_together);
    };
    const auto add = [&](int64_t i, const A* partial, int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; q++)
        col_sums[q] = i == 0 ? partial[q] : col_sums[q] + partial[q];
    };
    if (!pool_) {
      for (int64_t i = 0; i < plan_.slabs; i++) {
        slab(i, partial_);
        if (col_sums) add(i, partial_, 0, cols);
      }
      return;
    }
    each(plan_.slabs, p_.rows() * cols, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) slab(i, partial_ + i * stride_);
    });
    if (col_sums)
      each(cols, plan_.slabs * cols, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < plan_.slabs; i++) add(i, partial_ + i * stride_, begin, end);
      });
  }

  // y = x * channel_mask * spatial_mask
  void scale(const T* x, T* y, const A* channel_mask, const A* spatial_mask) {
    const A* u = p_.channels_last ? spatial_mask : channel_mask;
    const A* v = p_.channels_last ? channel_mask : spatial_mask;
    each_slab([&](int64_t r, int64_t n) {
      const int64_t at = r * p_.cols();
      kernels_.scale(x + at, y + at, n, p_.cols(), u + r, v, plan_.stream);
    });
  }

  // dx = dy * channel_mask * spatial_mask + by_channel * with_pixel + by_pixel * with_channel
  void combine(const T* dy, T* dx, const A* channel_mask, const A* spatial_mask,
               const A* by_channel, const A* with_pixel, const A* by_pixel, const A* with_channel) {
    const bool last = p_.channels_last;
    const A *u = last ? spatial_mask : channel_mask, *v = last ? channel_mask : spatial_mask;
    const A *a = last ? by_pixel : by_channel, *f = last ? with_channel : with_pixel;
    const A *b = last ? by_channel : by_pixel, *e = last ? with_pixel : with_channel;
    each_slab([&](int64_t r, int64_t n) {
      const int64_t at = r * p_.cols();
      kernels_.combine(dy + at, dx + at, n, p_.cols(), u + r, v, a + r, f, e + r, b, plan_.stream,
                       plan_.scale_together);
    });
  }

  // out = the stencil over a dense map [h, w], then its sigmoid if asked for.
  void stencil(const A* map, const Stencil<A>& taps, bool sigmoid, A* out) {
    border(map, plane_);
    each(p_.h, p_.pixels() * kSpatialSums, [&](int64_t begin, int64_t end) {
      kernels_.stencil(plane_, p_.w, begin, end, taps, out);
      if (sigmoid) kernels_.sigmoid(out + begin * p_.w, (end - begin) * p_.w);
    });
  }

  void spatial_mask(const A* channel_mean, A* mask) {
    stencil(channel_mean, weights_.spatial.stencil(), true, mask);
  }

  void channel_mask(const A* pooled, A* mask) {
    for (int64_t c = 0; c < p_.c; c++)
      mask[c] = gate_logit<A>(p_.gate, weights_.gate, weights_.gate_bias, p_.kernel_size, pooled,
                              p_.c, c);
    kernels_.sigmoid(mask, p_.c);
  }

  // sums as formula.h's spatial_gradients wants them, from dense maps dz and m.
  void tap_sums(const A* dz, const A* m, double* sums) {
    border(m, plane_);
    border(dz, second_plane_);
    each(bands_, p_.pixels() * kSpatialSums, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        kernels_.tap_sums(second_plane_, plane_, p_.w, i * kBand, std::min(p_.h, (i + 1) * kBand),
                          band_sums_ + i * kSpatialSums);
    });
    std::fill_n(sums, kSpatialSums, 0.);
    for (int64_t i = 0; i < bands_; i++)
      for (int t = 0; t < kSpatialSums; t++) sums[t] += band_sums_[i * kSpatialSums + t];
  }

 private:
  static constexpr int64_t kBand = 8;  // rows of a map whose tap sums are one partial sum
  static constexpr int kMaps = 4, kVectors = 4;

  static int64_t capacity(const Problem& p, const Plan& plan, const Pool* pool) {
    return padded((pool ? plan.slabs : 1) * padded(p.cols())) + 2 * padded(plane_size(p.h, p.w)) +
           padded((p.h + kBand - 1) / kBand * kSpatialSums) + padded(std::max(p.c, p.pixels())) +
           kMaps * padded(p.pixels()) + kVectors * padded(p.c);
  }

  // f(begin, end) over [0, count), shared out where that much `work` is worth waking threads for.
  template <class F>
  void each(int64_t count, int64_t work, F f) const {
    if (!pool_ || work < plan_.shared_work) return f(0, count);
    pool_->each(count, f);
  }
  template <class F>
  void each_slab(F f) const {
    each(plan_.slabs, p_.rows() * p_.cols(), [&](int64_t begin, int64_t end) {
      const int64_t r = begin * plan_.slab_rows;
      f(r, std::min(end * plan_.slab_rows, p_.rows()) - r);
    });
  }
  void border(const A* map, A* plane) const {
    A* inside = plane + kReach * plane_stride(p_.w) + kReach;
    for (int64_t i = 0; i < p_.h; i++)
      std::memcpy(inside + i * plane_stride(p_.w), map + i * p_.w, p_.w * sizeof(A));
  }

  const Problem& p_;
  const Plan& plan_;
  const Weights<A>& weights_;
  const Pool* pool_;
  const Kernels<T>& kernels_ = kernels<T>();
  int64_t stride_, bands_;
  Scratch<A> scratch_;
  A *partial_, *plane_, *second_plane_, *band_sums_, *ones_;
  A *maps_[kMaps], *vectors_[kVectors];
};

// f(image, n) for every image: the plan's whole images one to a thread, the rest one after another.
template <class T, class F>
void for_images(const Problem& problem, const Plan& plan, const Pool& pool,
                const Weights<accumulate_t<T>>& weights, F f) {
  const auto serial = [&](int64_t begin, int64_t end) {
    Image<T> image(problem, plan, weights, nullptr);
    for (int64_t n = begin; n < end; n++) f(image, n);
  };
  if (plan.threads == 1) return serial(0, problem.n);
  pool.each(plan.whole_images, serial);
  if (plan.whole_images == problem.n) return;
  Image<T> image(problem, plan, weights, &pool);
  for (int64_t n = plan.whole_images; n < problem.n; n++) f(image, n);
}

}  // namespace da::cpu
