// The kernels that read an image once. The launch's teams take the images in turn, and the blocks
// of a team each a slab of the image (plan/onchip.h); the next image's slab is on its way while
// this one's result is stored.
#pragma once

#include "cuda/onchip/masks.cuh"

namespace da::cuda {

// Blocks that share a multiprocessor, as far as registers go.
template <class T>
constexpr int kBlocksAtOnce =
    kChipBlocks - (std::is_same_v<T, simt::bfloat16> && !simt::kRoundsBfloat16);

// Zeros for threads that have no vector of a row, and after a slab that is no whole number of them.
template <class T>
SIMT_FN void fill_gaps(const Member<T>& m) {
  const OnChip& chip = m.chip;
  const int t = simt::thread(), in_vector = simt::kPerVector<T>;
  if (t >= in_vector) return;
  m.template at<T>(chip.memory.zeros)[t] = simt::to<T>(0.f);
  const int elements = m.rows() * chip.cols, rest = elements % in_vector;
  if (chip.aligned || rest == 0 || rest + t >= in_vector) return;
  m.template at<T>(chip.memory.x)[elements + t] = simt::to<T>(0.f);
  if (chip.backward) m.template at<T>(chip.memory.dy)[elements + t] = simt::to<T>(0.f);
}

// The preparations for the first load. A mask that the order lacks is a factor of one, and its term
// is zero.
template <class T>
SIMT_FN void prepare(const Member<T>& m) {
  const OnChip& chip = m.chip;
  if (simt::thread() == 0) {
    if (simt::kArch == 0) carve(chip, simt::shared());  // on a CPU, for red zones
    const unsigned blocks = chip.blocks, rank = simt::block() % blocks;
    const int rows = min<int>(chip.slab_rows, chip.rows - rank * chip.slab_rows);
    *m.template at<Place>(chip.memory.place) = {static_cast<int>(simt::block() / blocks),
                                                static_cast<int>(rank), rows,
                                                (rows + chip.chunk_rows - 1) / chip.chunk_rows};
  }
  simt::sync();
  for (int i = simt::thread(); i < chip.padded_rows(); i += chip.threads) {
    m.row_mask()[i] = 1;
    if (chip.backward) m.row_term()[i] = 0;
  }
  for (int i = simt::thread(); i < chip.cols; i += chip.threads) {
    m.col_mask()[i] = 1;
    if (chip.backward) m.col_term()[i] = 0;
  }
  if (chip.pixel_mask) {
    Coefficient<T>(m.args.call, Taps::as_given).put(m.stencil());
    if (chip.backward) Coefficient<T>(m.args.call, Taps::turned).put(m.stencil() + kStencil);
  }
  const int places = chip.kept + chip.ring + chip.kept_dy + chip.ring_dy;
  if (chip.aligned)
    for (int i = 0; i < places; i++) m.load_of(i)->init();
  if (simt::kClusters && chip.mail) m.mail()->init();
  fill_gaps(m);
  simt::Bulk::sync_before_load();
}

// m = mean_c ..., g = mean_p ..., y = x s c:
//
//   load    |chunk 0|chunk 1|...
//   sums            |   0   |   1   |...                 in registers, as chunks arrive
//   mask                            | s or c or both |
//   sums                                             |   weighted, if one mask follows the other
//   mask                                                 | c or s |
//   y                                                             |chunk 0|chunk 1|...
//   load                                            next image            |chunk 0|...
template <class T>
SIMT_KERNEL(kChipThreads, kBlocksAtOnce<T>)
chip_forward(SIMT_PARAM ChipArgs args) {
  const OnChip& chip = args.chip;
  const Member<T> m(args);
  prepare(m);
  Chunks<Input::x, T>(m).begin();

  SIMT_ROLLED
  for (int turn = 0; m.has(turn); turn++) {
    SIMT_ROLLED
    for (int step = 0; step < chip.steps; step++) {
      add_up<Sums::forward>(m, turn, step, chip.complete[step]);
      make_masks(m, turn, chip.complete[step]);
    }
    scale_slab<false>(m, turn);
    simt::sync();  // the masks are free
  }
}

// dx, with the terms that flow back through the masks (as reference.py has them), from dy and x:
//
//   load    |x 0    |x 1    |...                         and dy, as much as there is room for
//   masks   | s, c  |
//   sums            |dy x   |dy x   |...                 by row and by column
//   terms                           | dg/P or dm/C or both |
//   sums                                                   |   of x, weighted with the term
//   terms                                                      | dm/C or dg/P |
//   dx                                                                        |dy 0|dy 1|...
//   load                                               next image                |x 0 |x 1 |...
//
// A chunk of dy that was not kept is read again for dx, most likely from L2.
template <class T>
SIMT_KERNEL(kChipThreads, kBlocksAtOnce<T>)
chip_backward(SIMT_PARAM ChipArgs args) {
  const OnChip& chip = args.chip;
  const Member<T> m(args);
  prepare(m);
  Chunks<Input::x, T>(m).begin();
  Chunks<Input::dy, T>(m).begin();

  SIMT_ROLLED
  for (int turn = 0; m.has(turn); turn++) {
    recall_masks(m, m.image(turn));
    add_up<Sums::backward>(m, turn, 0, chip.masks);
    SIMT_ROLLED
    for (int step = 0; step < chip.steps; step++) {
      if (step > 0) add_up<Sums::through>(m, turn, step, chip.complete[step]);
      make_terms(m, turn, chip.complete[step]);
    }
    scale_slab<true>(m, turn);
    simt::sync();  // the masks and terms are free
  }
}

}  // namespace da::cuda
