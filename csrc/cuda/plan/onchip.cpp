#include "cuda/plan/onchip.h"

namespace da::cuda {
namespace {

// Why no launch keeps an image of this problem in such a team, or null.
const char* obstacle(const Problem& p, Barrier barrier, int blocks) {
  if (p.dtype == Dtype::float64) return "float64 is for the portable passes";
  if (p.c * p.pixels() > INT32_MAX / 4) return "the image is too large";
  if (p.n > INT32_MAX / 4) return "there are too many images";
  if (blocks < 1 || (barrier == Barrier::block && blocks > 1))
    return "a block's barrier is for one block";
  if (barrier == Barrier::cluster && blocks > kMaxCluster) return "no cluster is so large";
  return nullptr;
}

// Lanes over which shuffles add up a row's sum: a power of two, or whole warps.
int shuffled_lanes(int vectors) {
  if (vectors > 32) return round_up(vectors, 32);
  int lanes = 4;
  while (lanes < vectors) lanes *= 2;
  return lanes;
}

// How the image is cut up and how threads lie over it.
void set_geometry(OnChip& chip, const Problem& p, bool aligned, const Limits& limits) {
  set_matrix(chip, p);
  const int vector = 16 / p.element_size();
  chip.aligned = aligned && holds_vectors(chip, vector);
  cut_rows(chip, vector, kChipThreads, limits.chip_lanes, shuffled_lanes);
  const int64_t most = limits.chip_rows / 8 * 8;  // a multiple, so that threads are whole warps
  chip.super_rows = std::min<int64_t>(chip.super_rows, ceil_div(most, chip.period));
  chip.at_once = chip.super_rows * chip.period;
  chip.threads = chip.lanes * chip.at_once;
  chip.warps = chip.threads / 32;
  chip.by_super_row = chip.aligned && chip.col_tiles == 1 && chip.period > 1;
  chip.scaled_super_rows =
      chip.by_super_row ? chip.threads * vector / (chip.period * chip.cols) : chip.super_rows;
  chip.row_parts = std::max(chip.lanes / 32, 1);
  // As many threads to a column as there are, in powers of two.
  const auto spare = [&](int lanes) {
    return lanes <= std::min(32, chip.at_once) && lanes * chip.width <= chip.threads;
  };
  for (chip.fold_lanes = 1; spare(2 * chip.fold_lanes);) chip.fold_lanes *= 2;

  chip.slab_rows = round_up(ceil_div(chip.rows, chip.blocks), chip.period);
  chip.slice = ceil_div(chip.cols, chip.blocks);
  // To make an entry a thread takes no longer than to make a slice, and needs no exchange.
  chip.recalled = chip.cols <= chip.threads ? chip.cols : chip.slice;
}

// Which masks there are, how far they look, and which of them each step makes.
void set_steps(OnChip& chip, const Problem& p) {
  const Schedule& passes = schedule(p.order, chip.backward);
  chip.steps = sum_passes(passes);
  for (int step = 0; step < chip.steps; step++)
    chip.complete[step] = lines(passes.passes[step].complete, chip.by_pixel);
  chip.masks = lines(da::masks(p.order), chip.by_pixel);
  const int sweeps = chip.backward ? chip.steps : chip.steps + 1;  // that x is for
  chip.visits = sweeps * chip.col_tiles;
  chip.visits_dy = chip.backward ? 2 * chip.col_tiles : 0;
  chip.outer = outer(da::outer(p.order), chip.by_pixel);
  chip.pixel_mask = p.spatial();
  const int of_cols = chip.backward ? std::max(chip.recalled, chip.slice) : chip.slice;
  chip.halo = halo(chip.by_pixel ? chip.slab_rows : of_cols, p.w);
  chip.gate_reach = p.gate == Gate::eca ? std::min(p.kernel_size / 2, p.c) : 0;
}

// Cuts the slab into chunks of so many rows, and more to make up whole rounds.
void cut_slab(OnChip& chip, int64_t rows) {
  chip.chunk_rows = round_up(rows, chip.round_rows());
  chip.chunks = ceil_div(chip.slab_rows, chip.chunk_rows);
}

// Keeps all of x and dy, or else as many chunks of x, then of dy, as fit. Null, or why the launch
// is impossible.
const char* keep(OnChip& chip, int64_t shared_limit, const Limits& limits) {
  const auto keeps = [&](int x, int dy, int places) {
    const auto ring = [&](int kept) { return std::min(places, chip.chunks - kept); };
    chip.kept = x, chip.kept_dy = chip.backward ? dy : 0;
    chip.ring = ring(x), chip.ring_dy = chip.backward ? ring(dy) : 0;
    chip.memory = carve(chip, nullptr);
    return x + chip.kept_dy <= limits.kept && chip.memory.bytes <= size_t(shared_limit);
  };
  cut_slab(chip, ceil_div(chip.slab_rows, limits.chunks));
  chip.mail = chip.barrier == Barrier::cluster && chip.blocks > 1 && chip.masks.cols;
  if (keeps(chip.chunks, chip.chunks, 0)) return nullptr;
  chip.mail = false;  // it takes room
  if (keeps(chip.chunks, chip.chunks, 0)) return nullptr;
  if (!chip.aligned)
    return "what is not aligned must fit in shared memory, for it cannot be read again";
  cut_slab(chip, 1);
  for (int places : {2, 1}) {  // of a ring: one is filled while the other is used
    for (int dy = chip.chunks; chip.backward && dy >= 0; dy--)
      if (keeps(chip.chunks, dy, places)) return nullptr;
    for (int x = chip.chunks; x >= 0; x--)
      if (keeps(x, 0, places)) return nullptr;
  }
  return "not even the masks fit in shared memory";
}

}  // namespace

OnChip on_chip(const Problem& problem, Way way, bool aligned, Barrier barrier, int blocks,
               int64_t shared_limit, const Limits& limits) {
  OnChip chip{};
  chip.backward = way == Way::backward;
  chip.barrier = barrier, chip.blocks = blocks, chip.images_at_once = 1;
  chip.refused = obstacle(problem, barrier, blocks);
  if (chip.refused) return chip;
  set_geometry(chip, problem, aligned, limits);
  set_steps(chip, problem);
  if (int64_t(chip.slab_rows) * (blocks - 1) >= chip.rows)
    chip.refused = "more blocks than rows";
  else
    chip.refused = keep(chip, shared_limit, limits);
  return chip;
}

}  // namespace da::cuda
