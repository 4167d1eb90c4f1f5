// The residual tail's launches between passes: the batch's statistics, the masks, what flows back
// through them, the norm's gradients.
#pragma once

#include "cuda/common/finish.cuh"
#include "cuda/portable/maps.cuh"
#include "cuda/tail/sums.cuh"

namespace da::cuda {

// A thread of a block that works on the norm's channels: it has one of them, and takes a share of
// what that channel's sums are made of.
struct NormLane {
  int channels, sharing, share;
  int64_t c;

  template <class A>
  SIMT_FN NormLane(const TailArgs<A>& args, int64_t job)
      : channels(args.norm_channels),
        sharing(kThreads / channels),
        share(simt::thread() / channels),
        c(job * channels + simt::thread() % channels) {}

  // The sums over all shares, in the threads of share 0.
  SIMT_FN void add(double* sums, double& one, double& other) const {
    SIMT_ROLLED
    for (int step = simt::kWarp / 2; step >= channels; step /= 2) {
      one += simt::shuffle_xor(one, step);
      other += simt::shuffle_xor(other, step);
    }
    const int warp = simt::thread() / simt::kWarp, lane = simt::thread() % simt::kWarp;
    double* const others = sums + kWarps * channels;
    if (lane < channels) sums[warp * channels + lane] = one, others[warp * channels + lane] = other;
    simt::sync();
    if (share != 0) return;
    one = other = 0;
    for (int w = 0; w < kWarps; w++)
      one += sums[w * channels + lane], other += others[w * channels + lane];
  }
};

// Lets a batch's number have its share in a running one.
template <class T>
SIMT_FN void keep_running(const KeptOfNorm& running, int64_t c, double of_batch, double momentum) {
  if (!running.data) return;
  const double before = of_norm<T>({running.data, running.wide}, c);
  put<T>(running.data, c, (1 - momentum) * before + momentum * of_batch, running.wide);
}

// The batch's mean and variance, from its moments, which come by tile.
template <class T>
SIMT_KERNEL(kThreads, 1)
tail_norm(SIMT_PARAM TailArgs<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  simt::let_next_launch_begin();
  simt::wait_for_launch_before();
  double* sums = SmallMemory(simt::shared()).sums;
  const Args<A>& call = args.call;
  const NormLane lane(args, call.first_job + simt::block());
  const int64_t c = lane.c;
  const bool there = c < call.channels;
  // Means are counted from the channel's datum. Deviations from the first of them are added up by
  // blocks of tiles in A, and blocks in double. A block's numbers are all on their way at once.
  const int64_t tiles = call.channel_sums.tiles, all = call.images * tiles;
  const int64_t pixels = call.tiling.tile_pixels(), last = call.pixels - (tiles - 1) * pixels;
  const bool any = there && call.images > 0;
  const A near = any ? call.channel_sums.data[c] : A(0);
  double sum = 0, squares = 0;
  constexpr int kBlock = 8;
  int64_t left = tiles - 1 - lane.share % tiles;  // tiles of the image after this one
  const int64_t on = lane.sharing % tiles;
  for (int64_t block = lane.share; there && block < all; block += kBlock * lane.sharing) {
    A off[kBlock], of_tile[kBlock], some = 0, some_squares = 0;
    SIMT_UNROLL
    for (int i = 0; i < kBlock; i++) {
      const int64_t t = block + i * lane.sharing, at = t * call.channels + c;
      off[i] = t < all ? call.channel_sums.data[at] : near;
      of_tile[i] = t < all ? args.products.data[at] : A(0);
    }
    SIMT_UNROLL
    for (int i = 0; i < kBlock; i++) {
      const A deviation = off[i] - near, count = A(left == 0 ? last : pixels);
      some += count * deviation, some_squares += of_tile[i] + count * deviation * deviation;
      left -= on;
      if (left < 0) left += tiles;
    }
    sum += some, squares += some_squares;
  }
  lane.add(sums, sum, squares);
  if (lane.share != 0 || !there) return;
  const double count = double(call.images) * call.pixels;
  const double mean = (any ? double(datum<T>(call, c)) : 0) + near + sum / count;
  double variance = (squares - sum * (sum / count)) / count;
  if (variance < 0) variance = 0;
  args.new_mean[c] = static_cast<A>(mean), args.new_var[c] = static_cast<A>(variance);
  keep_running<T>(args.running_mean, c, mean, args.momentum);
  keep_running<T>(args.running_var, c, variance * unbiased(count), args.momentum);
  if (c == 0 && args.batches) ++*args.batches;
}

// An image's sum, of its bands'.
template <class A>
SIMT_FN A of_bands(const A* sums, int64_t image, int64_t bands) {
  A sum = 0;
  for (int64_t b = 0; b < bands; b++) sum += sums[image * bands + b];
  return sum;
}

// A map's values, made of others where they are read.
template <class A, class F>
struct MadeOf {
  F f;
  SIMT_FN A operator[](int64_t i) const { return f(i); }
};
template <class A, class F>
SIMT_FN MadeOf<A, F> made_of(F f) {
  return {f};
}

// Masks, forward of sums and backward of what forward kept, or the terms of dx, of the axes in
// pending; and of each band of pixels the sum of what was made.
template <class T, Made What>
SIMT_KERNEL(kThreads, kMapsPerSm)
tail_maps(SIMT_PARAM TailArgs<accumulate_t<T>> args) {
  using A = accumulate_t<T>;
  simt::let_next_launch_begin();
  simt::wait_for_launch_before();
  const Args<A>& call = args.call;
  const Norm<T> norm{args.norm};
  const Bands& bands = call.bands;
  A* const nowhere = nullptr;  // but in global memory
  const MapsMemory<A> memory(simt::shared(), bands);
  const int64_t all_pixel_bands = bands.of_pixels(call.pixels);
  const int64_t pixel_bands = call.pending.pixels ? all_pixel_bands : 0;
  const int64_t channel_bands = call.pending.channels ? bands.of_channels(call.channels) : 0;
  const int64_t job = call.first_job + simt::block(), others = job - call.images * pixel_bands;
  if (others < 0) {
    const int64_t image = job / pixel_bands, band = job % pixel_bands;
    const int64_t first = band * bands.pixels;
    const Span span{image, first, static_cast<int>(min<int64_t>(bands.pixels, call.pixels - first)),
                    0, 1};
    A* const made = memory.sums;
    // The sum of all channels' shifts, weighted or not, which is the same at each pixel.
    const auto constant = [&](bool weighted, const A* weights) {
      A sum = 0;
      for (int64_t c = simt::thread(); c < call.channels; c += kThreads)
        sum += norm.shift(c) * (weighted ? weights[image * call.channels + c] : A(1));
      return block_sum(sum, memory.sums);
    };
    if constexpr (What == Made::masks_of_sums) {
      const A shift = constant(call.weights.channels, call.channel_mask);
      const Folded<A> sums(call.pixel_sums, image, 1);
      const auto mean = made_of<A>([&](int64_t i) { return (sums[i] + shift) / call.channels; });
      make_spatial_mask<T>(call, span, memory.around, mean, Keep::yes, made);
    } else if constexpr (What == Made::masks_again) {
      make_spatial_mask<T>(call, span, memory.around, call.channel_mean + image * call.pixels,
                           Keep::no, made);
    } else {
      const bool more = call.more_pixel_sums.data;
      const A shift = more ? constant(true, call.d_pooled) : A(0);
      const Folded<A> sums(call.pixel_sums, image, 1), second(call.more_pixel_sums, image, 1);
      const A* const mask = call.spatial_mask + image * call.pixels;
      const auto dz = made_of<A>(
          [&](int64_t i) { return (sums[i] + (second[i] + shift)) * sigmoid_slope(mask[i]); });
      through_stencil<T>(call, span, memory.around, dz, Keep::yes, made);
    }
    A mine = 0;
    for (int i = simt::thread(); i < span.count; i += kThreads) mine += made[i];
    const A sum = block_sum(mine, memory.channels);
    A* const sums = What == Made::terms ? args.term_sums : args.mask_sums;
    if (simt::thread() == 0) sums[image * pixel_bands + band] = sum;
  } else {
    const int64_t image = others / channel_bands, first = others % channel_bands * bands.channels;
    const Span span{image, first,
                    static_cast<int>(min<int64_t>(bands.channels, call.channels - first)), 0, 1};
    const int64_t kept = image * call.channels;
    if constexpr (What == Made::terms) {
      const bool more = call.more_channel_sums.data;
      const A dm = more ? of_bands(args.term_sums, image, all_pixel_bands) : A(0);
      const A* const mask = call.channel_mask + kept;
      const auto dt = channel_window(
          call, span, memory,
          [&](int64_t c, int tile, int step) {
            return norm.scale(c) * (some_tiles(args.products, image, c, tile, step) +
                                    some_tiles(call.more_channel_sums, image, c, tile, step)) +
                   norm.shift(c) * some_tiles(call.channel_sums, image, c, tile, step);
          },
          [&](int64_t c, A sum) { return (sum + norm.shift(c) * dm) * sigmoid_slope(mask[c]); });
      through_gate<T>(call, span, dt, Keep::yes, nowhere);
    } else {
      // The mean weight of a pixel in the pooling: of the spatial mask, if there is one by then.
      const bool masked = What == Made::masks_again ? call.outer.pixels : call.weights.pixels;
      const A weight =
          masked ? of_bands(args.mask_sums, image, all_pixel_bands) / call.pixels : A(1);
      const auto of_x = [&](int64_t c, A raw) {
        return norm.scale(c) * raw + norm.shift(c) * weight;
      };
      if constexpr (What == Made::masks_of_sums) {
        const auto pooled = channel_window(
            call, span, memory,
            [&](int64_t c, int tile, int step) {
              return some_tiles(call.channel_sums, image, c, tile, step);
            },
            [&](int64_t c, A sum) {
              const A raw = sum / call.pixels;
              if (first <= c && c < first + span.count) call.pooled[kept + c] = raw;
              return of_x(c, raw);
            });
        make_channel_mask<T>(call, span, pooled, Keep::no, nowhere);
      } else {
        const auto pooled = made_of<A>([&](int64_t c) { return of_x(c, call.pooled[kept + c]); });
        make_channel_mask<T>(call, span, pooled, Keep::no, nowhere);
        for (int i = simt::thread(); i < span.count; i += kThreads)
          args.pooled_x[kept + first + i] = pooled[first + i];
      }
    }
  }
}

// The gradients of the norm's weight and bias, and what they make of du where the statistics are
// the batch's. Of each image, with dx = d k s + o_p dg + o_c dm, o the outer mask or one: the sums
// of dx and of dx (u - centre).
template <class T>
SIMT_FN void norm_gradients(const TailArgs<accumulate_t<T>>& args, int64_t job, double* sums) {
  using A = accumulate_t<T>;
  const Args<A>& call = args.call;
  const NormLane lane(args, job);
  const int64_t c = lane.c;
  const int64_t bands = call.bands.of_pixels(call.pixels);
  // The partial sums of an image, as many of each on their way at once.
  constexpr int kInFlight = 4;
  const int64_t tiles = call.channel_sums.tiles;
  double sum = 0, product = 0;
  for (int64_t n = lane.share; c < call.channels && n < call.images; n += lane.sharing) {
    const int64_t at = n * call.channels + c;
    const A k = call.masks.channels ? call.channel_mask[at] : A(1);
    const A o = call.outer.channels ? k : A(1);
    A d = 0, d_u = 0, dm_u = 0;
    SIMT_ROLLED
    for (int64_t t = 0; t < tiles; t += kInFlight) {
      A some[3][kInFlight];
      SIMT_UNROLL
      for (int i = 0; i < kInFlight; i++) {
        const bool there = t + i < tiles;
        const int64_t of_tile = (n * tiles + t + i) * call.channels + c;
        some[0][i] = there ? call.channel_sums.data[of_tile] : A(0);
        some[1][i] = there ? args.products.data[of_tile] : A(0);
        some[2][i] = there && call.masks.pixels ? args.term_products.data[of_tile] : A(0);
      }
      SIMT_UNROLL
      for (int i = 0; i < kInFlight; i++) d += some[0][i], d_u += some[1][i], dm_u += some[2][i];
    }
    sum += double(k) * d, product += double(k) * d_u;
    if (call.masks.pixels) {
      sum += double(o) * of_bands(args.term_sums, n, bands);
      product += double(o) * dm_u;
    }
    if (call.masks.channels) {
      const double dg = call.d_pooled[at];
      sum += dg * (call.outer.pixels ? of_bands(args.mask_sums, n, bands) : A(call.pixels));
      product += dg * args.pooled_u[at] * call.pixels;
    }
  }
  lane.add(sums, sum, product);
  if (lane.share != 0 || c >= call.channels) return;
  const Norm<T> norm{args.norm};
  const double inverse = norm.inverse(c), weight = product * inverse;
  put<T>(args.d_weight, c, weight, args.norm.weight.wide);
  put<T>(args.d_bias, c, sum, args.norm.bias.wide);
  // A frozen norm's du has no such part, not even where the sums are no numbers.
  const double each = -norm.scale(c) / (double(call.images) * call.pixels);
  args.du_slope[c] = args.batch ? static_cast<A>(each * weight * inverse) : A(0);
  args.du_offset[c] = args.batch ? static_cast<A>(each * sum) : A(0);
}

// The parameters' gradients: blocks take channels of the norm, or what the attention's are made of.
template <class T>
SIMT_KERNEL(kThreads, 1)
tail_gradients(SIMT_PARAM TailArgs<accumulate_t<T>> args) {
  simt::let_next_launch_begin();
  simt::wait_for_launch_before();
  double* const sums = SmallMemory(simt::shared()).sums;
  const int64_t job = args.call.first_job + simt::block();
  const int64_t others = job - (args.call.channels + args.norm_channels - 1) / args.norm_channels;
  if (others < 0)
    norm_gradients<T>(args, job, sums);
  else
    finish_job<T>(args.call, others, sums);
}

}  // namespace da::cuda
