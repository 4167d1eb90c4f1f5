#include "cuda/plan/maps.h"

#include "cuda/plan/memory.h"

namespace da::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kMost = 64 * kThreads;  // bytes of a band's values

// Instructions, as nvcc 13.0 makes them: of each warp of a block that does nothing else; to find a
// pixel of the window; to add a partial sum; of the stencil and the sigmoid at a pixel, or of the
// stencil and the spatial sums; of a warp that hands its spatial sums on; of a channel, and of each
// weight of an eca gate.
constexpr int64_t kBlock = 60, kPlace = 24, kPartial = 3, kMask = 90, kTermOfDx = 140,
                  kHandOn = 150, kChannel = 40, kWeight = 12;

int64_t warps(int64_t threads) { return ceil_div(threads, kWarp); }

// Instructions of the warps of a block that makes a map for so many pixels, of so many partial sums
// each.
int64_t of_pixels(const Problem& p, int64_t pixels, int64_t sums, bool of_dx, int64_t parts) {
  const Halo window = halo(pixels, p.w);
  const int64_t mask = of_dx ? kTermOfDx : kMask;
  return warps(window.pieces * window.length) * (kPlace + kPartial * sums) + warps(pixels) * mask +
         (of_dx ? ceil_div(kWarps, parts) * kHandOn : 0);
}

// The same by channel; `again`: an eca gate adds up its neighbours' sums as well.
int64_t of_channels(const Problem& p, int64_t channels, int64_t sums, bool again) {
  const int64_t weights = p.gate == Gate::eca ? p.kernel_size : 1;
  return warps(channels) * (kChannel + weights * kWeight + (again ? weights : 1) * kPartial * sums);
}

}  // namespace

Bands bands(const Problem& p, const Tiling& t, int pixels) {
  constexpr int64_t kMany = 16;  // tiles, whose sums several threads add up
  Bands b{};
  b.channels = t.pixel_tiles() >= kMany ? kThreads / kWarps : kThreads;
  const int64_t around = p.gate == Gate::eca ? p.kernel_size - 1 : 0;
  b.channel_window =
      static_cast<int>(std::max<int64_t>(std::min(p.c, b.channels + around), kWarps));
  b.pixels = pixels;
  if (p.spatial()) b.halo = halo(b.pixels, p.w);
  return b;
}

Bands one_wave(const Problem& p, const Tiling& t, const Device& device) {
  const int64_t slots = int64_t(device.multiprocessors) * kMapsPerSm;
  const int64_t of_image = std::max<int64_t>(slots / std::max<int64_t>(p.n, 1), 1);
  const int64_t pixels = round_up(ceil_div(p.pixels(), of_image), kWarp);
  const int64_t most = kMost / (p.dtype == Dtype::float64 ? 8 : 4);
  Bands b = bands(p, t, static_cast<int>(std::clamp<int64_t>(pixels, kThreads, most)));
  // The window on pixels of an image of one row, or of one column, is several times as large.
  const auto room = static_cast<size_t>(shared_limit(device.sm, kMapsPerSm));
  while (b.pixels > kThreads && maps_bytes(p, b) > room) b = bands(p, t, b.pixels - kWarp);
  return b;
}

Between between(const Problem& p, const Device& device, const Plan& plan, Axes needed, Made made,
                Axes more, const Limits& limits) {
  const bool terms = made == Made::terms;
  const Tiling& t = plan.tiling;
  const Bands& b = plan.bands;
  const int64_t tiles = p.n * t.tiles();
  Between result{kNone, {0, 0}, 0};
  bool must = false;
  int64_t all_jobs = 0, all_again = 0;
  const auto weigh = [&](bool Axes::* axis, int64_t partial_sums, int64_t once_jobs, auto once,
                         auto again) {
    if (!(needed.*axis)) return;
    const int64_t sums = made == Made::masks_again ? 1 : partial_sums;
    const int64_t values = sums * (more.*axis ? 2 : 1) + (terms ? 1 : 0);  // and the mask
    const bool many = sums > limits.partials;
    const int64_t jobs = p.n * once_jobs;
    const Count count{jobs * (kWarps * kBlock + once(values)), tiles * again(values)};
    all_again += count.again;
    if (!many && count.again <= count.once) return;
    must |= many, all_jobs += jobs;
    result.axes.*axis = true;
    result.count.once += count.once, result.count.again += count.again;
  };
  weigh(
      &Axes::pixels, t.channel_tiles(), b.of_pixels(p.pixels()),
      [&](int64_t n) { return of_pixels(p, b.pixels, n, terms, 1); },
      [&](int64_t n) { return of_pixels(p, t.tile_pixels(), n, terms, t.channel_tiles()); });
  weigh(
      &Axes::channels, t.pixel_tiles(), b.of_channels(p.c),
      [&](int64_t n) { return of_channels(p, b.channels, n, false); },
      [&](int64_t n) { return of_channels(p, t.tile_channels(), n, true); });
  // Counts are a multiprocessor's, while the blocks of either launch are spread over all.
  const auto each = [&](int64_t instructions, int64_t blocks) {
    return instructions / std::clamp<int64_t>(blocks, 1, device.multiprocessors);
  };
  // On an H200 (half precision, 64 images) launches that saved 2,000 instructions a multiprocessor
  // and less cost 1 us each, such that saved 2,300 to 3,500 nothing, and from 4,500 on they paid.
  // The price of a launch that does not begin early is a guess.
  const int64_t price = limits.launch * (device.early_launches ? 1 : 2);
  const bool pays = each(result.count.again, tiles) > each(result.count.once, all_jobs) + price;
  if (!must && !pays) return {kNone, {0, 0}, all_again};
  result.left = all_again - result.count.again;
  return result;
}

size_t maps_bytes(const Problem& p, const Bands& bands) {
  return p.dtype == Dtype::float64 ? MapsMemory<double>(nullptr, bands).bytes
                                   : MapsMemory<float>(nullptr, bands).bytes;
}

}  // namespace da::cuda
