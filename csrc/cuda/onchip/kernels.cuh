// The kernels that read an image once. The launch's teams take the images in turn, and the blocks
// of a team each a slab of the image (plan/onchip.h); the next image's slab is on its way while
// this one's result is stored.
#pragma once

#include "cuda/onchip/masks.cuh"

namespace da::cuda {

// The preparations for the first load. A mask that the order lacks is a factor of one, and its term
// is zero.
template <class T>
SIMT_FN void prepare(const Member<T>& m) {
  const OnChip& chip = m.chip;
  for (int i = simt::thread(); i < chip.slab_rows; i += chip.threads) {
    m.row_mask()[i] = 1;
    if (chip.backward) m.row_term()[i] = 0;
  }
  for (int i = simt::thread(); i < chip.cols; i += chip.threads) {
    m.col_mask()[i] = 1;
    if (chip.backward) m.col_term()[i] = 0;
  }
  if (chip.pixel_mask) {
    load_stencil<T>(m.args.call, m.stencil(), Taps::as_given);
    if (chip.backward) load_stencil<T>(m.args.call, m.stencil() + kStencil, Taps::turned);
  }
  if (chip.aligned)
    for (int i = 0; i < chip.kept + chip.kept_dy; i++) m.load_of(i)->init();
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
SIMT_KERNEL(kChipThreads, kChipBlocks)
chip_forward(SIMT_PARAM ChipArgs args) {
  const OnChip& chip = args.chip;
  const int images = args.call.images;
  const Member<T> m(args);
  prepare(m);
  if (m.team() < images)
    for (int chunk = 0; chunk < chip.kept; chunk++) fetch<Input::x>(m, m.team(), chunk);

  SIMT_ROLLED
  for (int image = m.team(); image < images; image += chip.images_at_once) {
    SIMT_ROLLED
    for (int step = 0; step < chip.steps; step++) {
      const Visit visit = step == 0 ? Visit::first : Visit::again;
      add_up<Sums::forward>(m, {chip.complete[step], visit}, image);
      make_masks(m, image, chip.complete[step]);
    }
    const int next = image + chip.images_at_once;
    scale_slab<false>(m, image, [&](int chunk) {
      if (next >= images || chunk >= chip.kept) return;
      simt::Bulk::sync_before_load();
      fetch<Input::x>(m, next, chunk);
    });
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
SIMT_KERNEL(kChipThreads, kChipBlocks)
chip_backward(SIMT_PARAM ChipArgs args) {
  const OnChip& chip = args.chip;
  const int images = args.call.images;
  const Member<T> m(args);
  prepare(m);
  if (m.team() < images) {
    for (int chunk = 0; chunk < chip.kept; chunk++) fetch<Input::x>(m, m.team(), chunk);
    for (int chunk = 0; chunk < chip.kept_dy; chunk++) fetch<Input::dy>(m, m.team(), chunk);
  }

  SIMT_ROLLED
  for (int image = m.team(); image < images; image += chip.images_at_once) {
    recall_masks(m, image);
    add_up<Sums::backward>(m, {chip.masks, Visit::first}, image);
    SIMT_ROLLED
    for (int step = 0; step < chip.steps; step++) {
      if (step > 0) add_up<Sums::through>(m, {chip.complete[step], Visit::again}, image);
      make_terms(m, image, chip.complete[step]);
    }

    const int next = image + chip.images_at_once;
    if (next < images) {
      simt::Bulk::sync_before_load();
      for (int chunk = 0; chunk < chip.kept; chunk++) fetch<Input::x>(m, next, chunk);
    }
    scale_slab<true>(m, image, [&](int chunk) {
      if (next >= images || chunk >= chip.kept_dy) return;
      simt::Bulk::sync_before_load();
      fetch<Input::dy>(m, next, chunk);
    });
    simt::sync();  // the masks and terms are free
  }
}

}  // namespace da::cuda
