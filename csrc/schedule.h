// What the operator does, in which order: for each order of the masks and each direction a short
// list of passes over full-size tensors, which every backend walks. Free of torch and of CUDA.
//
// The spatial mask has a value for each pixel of an image, the channel mask one for each channel.
// A pass reads x, or dy and x, once. Every pass but the last adds up, with t = x or dy x,
//
//     by pixel      sum_c w[c] t[c, p]        weighted by channel
//     by channel    sum_p w[p] t[c, p]        weighted by pixel
//
// and of the sums that are then complete a small map is made: forward a mask, backward a term of
// dx, which is what flows back through a mask. The last pass writes y, or dx, from the maps.
#pragma once

namespace da {

// The axes of an image that have something: a mask, sums.
struct Axes {
  bool pixels, channels;

  constexpr bool any() const { return pixels || channels; }
};
constexpr Axes either(Axes one, Axes other) {
  return {one.pixels || other.pixels, one.channels || other.channels};
}
constexpr Axes kNone{false, false}, kPixels{true, false}, kChannels{false, true}, kBoth{true, true};

// The small maps: the masks, ones for an axis that has none yet; and the terms of dx.
enum class Maps { masks, terms };

// Full-size tensors, as bits of a set.
enum Tensors : unsigned { kNothing = 0, kX = 1, kDy = 2, kY = 4, kDx = 8 };

constexpr int count(unsigned tensors) {
  return tensors ? int(tensors & 1) + count(tensors >> 1) : 0;
}

struct Pass {
  const char* name;
  unsigned reads, writes;  // sets of Tensors
  Maps weights;            // of its sums
  Axes sums;               // which it makes; backward's second come on top of its first
  Axes complete;           // whose map is made of its sums before the next pass
};

// The passes of one direction.
struct Schedule {
  int size;
  Pass passes[3];

  constexpr const Pass* begin() const { return passes; }
  constexpr const Pass* end() const { return passes + size; }
};

struct Schedules {
  const char* order;
  Schedule forward, backward;
};

namespace detail {

constexpr Pass sum(const char* name, Axes sums) {
  return {name, kX, kNothing, Maps::masks, sums, sums};
}
constexpr Pass gradients(Axes sums, Axes complete) {
  return {"mask gradients", kDy | kX, kNothing, Maps::masks, sums, complete};
}
constexpr Pass through(const char* name, Axes sums) {
  return {name, kX, kNothing, Maps::terms, sums, sums};
}

constexpr Pass kMean = sum("channel mean", kPixels);
constexpr Pass kPooling = sum("pooling", kChannels);
constexpr Pass kMeanAndPooling = sum("channel mean and pooling", kBoth);
constexpr Pass kScale{"scale", kX, kY, Maps::masks, kNone, kNone};
constexpr Pass kThroughMean = through("through the channel mean", kChannels);
constexpr Pass kThroughPooling = through("through the pooling", kPixels);
constexpr Pass kCombine{"combine", kDy, kDx, Maps::masks, kNone, kNone};

}  // namespace detail

// An order is an index into the table; `none` is that of the residual tail without attention.
enum class Order { spatial_channel, channel_spatial, parallel, spatial, channel, none };

constexpr Schedules kOrders[] = {
    {"spatial_channel",
     {3, {detail::kMean, detail::kPooling, detail::kScale}},
     {3, {detail::gradients(kBoth, kChannels), detail::kThroughPooling, detail::kCombine}}},
    {"channel_spatial",
     {3, {detail::kPooling, detail::kMean, detail::kScale}},
     {3, {detail::gradients(kBoth, kPixels), detail::kThroughMean, detail::kCombine}}},
    {"parallel",
     {2, {detail::kMeanAndPooling, detail::kScale}},
     {2, {detail::gradients(kBoth, kBoth), detail::kCombine}}},
    {"spatial",
     {2, {detail::kMean, detail::kScale}},
     {2, {detail::gradients(kPixels, kPixels), detail::kCombine}}},
    {"channel",
     {2, {detail::kPooling, detail::kScale}},
     {2, {detail::gradients(kChannels, kChannels), detail::kCombine}}},
};

constexpr Schedules kUnmasked{"none", {1, {detail::kScale}}, {1, {detail::kCombine}}};

constexpr const Schedule& schedule(Order order, bool backward) {
  const Schedules& both = order == Order::none ? kUnmasked : kOrders[static_cast<int>(order)];
  return backward ? both.backward : both.forward;
}

// Which masks an order has.
constexpr Axes masks(Order order) { return schedule(order, true).passes[0].sums; }

// Passes that add up.
constexpr int sum_passes(const Schedule& schedule) { return schedule.size - 1; }

// The axis whose mask also multiplies the other axis' term in dx, for it was the first to be
// multiplied with: the last one that backward completes. Neither where both are completed at once.
constexpr Axes outer(Order order) {
  const Schedule& backward = schedule(order, true);
  if (sum_passes(backward) == 0) return kNone;
  const Axes last = backward.passes[sum_passes(backward) - 1].complete;
  return last.pixels && last.channels ? kNone : last;
}

// The axes by which backward makes second sums, of x and weighted by a term of dx, which come on
// top of its first.
constexpr Axes second_sums(Order order) {
  for (const Pass& pass : schedule(order, true))
    if (pass.weights == Maps::terms) return pass.sums;
  return kNone;
}

}  // namespace da
