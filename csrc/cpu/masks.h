// An image's masks, and what flows back through them, made by one thread, or shared out over all
// threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "plan.h"
#include "resources.h"

namespace da::cpu {

// The parameters in accumulation precision; zeros for absent ones, the gate's as arrays of the
// sizes that formula.h says.
template <class A>
struct Weights {
  SpatialWeights<A> spatial;
  const A* gate;
  const A* gate_bias;
};

// f(begin, end) over [0, count), shared out where so much `work` is worth waking threads for.
template <class F>
void each(const Pool* pool, const Plan& plan, int64_t count, int64_t work, F f) {
  if (!pool || work < plan.shared_work) return f(0, count);
  pool->each(count, f);
}

template <class T>
class Masks {
 public:
  using A = accumulate_t<T>;

  Masks(const Problem& problem, const Plan& plan, const Weights<A>& weights, const Pool* pool)
      : p_(problem),
        plan_(plan),
        weights_(weights),
        pool_(pool),
        bands_(problem.spatial() ? (problem.h + kBand - 1) / kBand : 0),
        plane_elements_(problem.spatial() ? plane_size(problem.h, problem.w) : 0),
        scratch_(2 * padded(plane_elements_)),
        plane_(scratch_.take(plane_elements_)),
        second_plane_(scratch_.take(plane_elements_)),
        band_sums_(bands_ * kSpatialSums) {}

  void spatial_mask(const A* channel_mean, A* mask) {
    border(channel_mean, plane_);
    each(p_.h, p_.pixels() * kSpatialSums, [&](int64_t begin, int64_t end) {
      kernels_.stencil(plane_, p_.w, begin, end, weights_.spatial.stencil(), mask);
      kernels_.sigmoid(mask + begin * p_.w, (end - begin) * p_.w);
    });
  }

  void channel_mask(const A* pooled, A* mask) { channel_mask(pooled, mask, 0, p_.c); }
  // The same for the channels from begin to end alone.
  void channel_mask(const A* pooled, A* mask, int64_t begin, int64_t end) const {
    with_gate([&](auto gate) {
      for (int64_t c = begin; c < end; c++)
        mask[c] =
            gate_logit<A>(gate, weights_.gate, weights_.gate_bias, p_.kernel_size, pooled, p_.c, c);
    });
    kernels_.sigmoid(mask + begin, end - begin);
  }

  // From dc, the gradients at a channel mask: those of its logits, dt, and the term of dx, dg.
  void through_channel_mask(const A* dc, const A* mask, A* dt, A* dg) const {
    through_channel_mask(dc, mask, dt, dg, 0, p_.c);
  }
  void through_channel_mask(const A* dc, const A* mask, A* dt, A* dg, int64_t begin,
                            int64_t end) const {
    for (int64_t i = begin; i < end; i++) dt[i] = dc[i] * sigmoid_slope(mask[i]);
    with_gate([&](auto gate) {
      for (int64_t i = begin; i < end; i++)
        dg[i] = gate_transposed<A>(gate, weights_.gate, p_.kernel_size, dt, p_.c, i) / p_.pixels();
    });
  }

  // From ds, the gradients at the spatial mask of channel_mean m: those of its logits, which take
  // the place of ds, the parameters' sums, and the term of dx, dm.
  void through_spatial_mask(A* ds, const A* mask, const A* m, double* sums, A* dm) {
    for (int64_t i = 0; i < p_.pixels(); i++) ds[i] *= sigmoid_slope(mask[i]);
    tap_sums(ds, m, sums);
    stencil(ds, weights_.spatial.transposed_stencil(), dm);
    for (int64_t i = 0; i < p_.pixels(); i++) dm[i] /= p_.c;
  }

 private:
  static constexpr int64_t kBand = 8;  // rows of a map whose tap sums are one partial sum

  // f(gate) with the problem's gate as a constant: a loop over channels then has no branches.
  template <class F>
  void with_gate(F f) const {
    switch (p_.gate) {
      case Gate::affine:
        return f(std::integral_constant<Gate, Gate::affine>());
      case Gate::scalar:
        return f(std::integral_constant<Gate, Gate::scalar>());
      case Gate::eca:
        return f(std::integral_constant<Gate, Gate::eca>());
      case Gate::sigmoid:
        return f(std::integral_constant<Gate, Gate::sigmoid>());
    }
  }

  // The stencil over a dense map [h, w].
  void stencil(const A* map, const Stencil<A>& taps, A* out) {
    border(map, plane_);
    each(p_.h, p_.pixels() * kSpatialSums, [&](int64_t begin, int64_t end) {
      kernels_.stencil(plane_, p_.w, begin, end, taps, out);
    });
  }

  // The sums that formula.h's spatial_gradients takes, from dense maps dz and m.
  void tap_sums(const A* dz, const A* m, double* sums) {
    border(m, plane_);
    border(dz, second_plane_);
    each(bands_, p_.pixels() * kSpatialSums, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        kernels_.tap_sums(second_plane_, plane_, p_.w, i * kBand, std::min(p_.h, (i + 1) * kBand),
                          band_sums_.data() + i * kSpatialSums);
    });
    std::fill_n(sums, kSpatialSums, 0.);
    for (int64_t i = 0; i < bands_; i++)
      for (int t = 0; t < kSpatialSums; t++) sums[t] += band_sums_[i * kSpatialSums + t];
  }

  template <class F>
  void each(int64_t count, int64_t work, F f) const {
    cpu::each(pool_, plan_, count, work, f);
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
  int64_t bands_, plane_elements_;
  Scratch<A> scratch_;
  A *plane_, *second_plane_;
  std::vector<double> band_sums_;
};

}  // namespace da::cpu
