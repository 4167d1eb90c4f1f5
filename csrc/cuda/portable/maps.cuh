// The launch between passes: it makes maps once that every block of the next pass would make again.
// A block takes a band of an image's pixels, or of its channels.
#pragma once

#include "cuda/portable/masks.cuh"

namespace da::cuda {

// An image's sums of one channel, its tiles from `first` on, every `step`-th.
template <class A>
SIMT_FN A some_tiles(const Partial<A>& sums, int64_t image, int64_t channel, int first, int step) {
  return Folded<A>(sums, image, 1).part(channel, first, step);
}

// Puts a band's values by channel, and those that an eca gate needs around it, into shared memory:
// value(c, sum), made of all partial sums. Several threads add up a channel's, each some tiles:
// some(c, first, step).
template <class A, class Some, class Value>
SIMT_FN FromChannel<A> channel_window(const Args<A>& args, const Span& span,
                                      const MapsMemory<A>& memory, Some some, Value value) {
  const int at_once = args.bands.channels, sharing = kThreads / at_once;
  const int share = simt::thread() / at_once, place = simt::thread() % at_once;
  const int64_t reach = args.gate == Gate::eca ? args.kernel_size / 2 : 0;
  const int64_t begin = max<int64_t>(0, span.first - reach);
  const int64_t end = min(args.channels, span.first + span.count + reach);
  SIMT_ROLLED
  for (int64_t c0 = begin; c0 < end; c0 += at_once) {
    const int64_t c = c0 + place;
    A sum = 0;
    if (c < end) sum = some(c, share, sharing);
    memory.sums[simt::thread()] = sum;
    simt::sync();
    if (share == 0 && c < end) {
      for (int s = 1; s < sharing; s++) sum += memory.sums[s * at_once + place];
      memory.channels[c - begin] = value(c, sum);
    }
    simt::sync();
  }
  return {memory.channels, begin};
}

// Makes the maps of args.pending and keeps them in global memory: the masks, forward of sums and
// backward of what forward kept, or the terms of dx.
template <class T, Made What>
SIMT_KERNEL(kThreads, kMapsPerSm)
maps(SIMT_PARAM Args<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  simt::let_next_launch_begin();
  simt::wait_for_launch_before();
  const Bands& bands = args.bands;
  A* const nowhere = nullptr;  // but in global memory
  const MapsMemory<A> memory(simt::shared(), bands);
  const int64_t pixel_bands = args.pending.pixels ? bands.of_pixels(args.pixels) : 0;
  const int64_t channel_bands = args.pending.channels ? bands.of_channels(args.channels) : 0;
  const int64_t job = args.first_job + simt::block(), others = job - args.images * pixel_bands;
  if (others < 0) {
    const int64_t image = job / pixel_bands, first = job % pixel_bands * bands.pixels;
    const Span span{image, first, static_cast<int>(min<int64_t>(bands.pixels, args.pixels - first)),
                    0, 1};
    if constexpr (What == Made::masks_of_sums) {
      const Folded<A> mean(args.pixel_sums, image, A(1) / args.channels);
      make_spatial_mask<T>(args, span, memory.around, mean, Keep::yes, nowhere);
    } else if constexpr (What == Made::masks_again) {
      make_spatial_mask<T>(args, span, memory.around, args.channel_mean + image * args.pixels,
                           Keep::no, nowhere);
    } else {
      const LogitGradient<A, true> dz(args.pixel_sums, args.more_pixel_sums, image,
                                      args.spatial_mask);
      through_stencil<T>(args, span, memory.around, dz, Keep::yes, nowhere);
    }
  } else {
    const int64_t image = others / channel_bands, first = others % channel_bands * bands.channels;
    const Span span{image, first,
                    static_cast<int>(min<int64_t>(bands.channels, args.channels - first)), 0, 1};
    const auto some = [&](int64_t c, int tile, int step) {
      return some_tiles(args.channel_sums, image, c, tile, step) +
             some_tiles(args.more_channel_sums, image, c, tile, step);
    };
    if constexpr (What == Made::masks_of_sums) {
      const A scale = A(1) / args.pixels;
      const auto pooled =
          channel_window(args, span, memory, some, [&](int64_t, A sum) { return sum * scale; });
      make_channel_mask<T>(args, span, pooled, Keep::yes, nowhere);
    } else if constexpr (What == Made::masks_again) {
      make_channel_mask<T>(args, span, args.pooled + image * args.channels, Keep::no, nowhere);
    } else {
      const A* const mask = args.channel_mask + image * args.channels;
      const auto dt = channel_window(
          args, span, memory, some, [&](int64_t c, A sum) { return sum * sigmoid_slope(mask[c]); });
      through_gate<T>(args, span, dt, Keep::yes, nowhere);
    }
  }
}

}  // namespace da::cuda
