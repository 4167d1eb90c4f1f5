// How the CUDA backend runs the residual tail, out = relu(DA(norm(u)) + shortcut): which launches,
// over which tiles, with how much memory. A pure function of the problem and the device, like
// plan.h. Masks and what flows back through them are made once, by launches between passes; the
// norm's scale and shift wherever they are read. The shortcut may go through a norm of its own: its
// scale and shift, too, are made where it is read, and backward goes through it at the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/plan/plan.h"
#include "cuda/plan/tile.h"

namespace da::cuda {

// Full-size tensors, as bits of a set. d is the gradient at the ReLU's argument, and the shortcut's
// where that has no norm.
enum TailTensors : unsigned {
  kU = 1,
  kShortcut = 2,
  kOut = 4,
  kDout = 8,
  kD = 16,
  kDu = 32,
  kDShortcut = 64
};

enum class TailKernel { sums, norm, maps, scale, gradients };

// What a pass adds up: by channel the deviations from a number near the mean, and their squares;
// deviations from the mean, weighted; or the gradient at the ReLU's argument, which it also writes,
// or (rectified) without a shortcut makes of dout and u, as the last pass does again. The latter
// adds up what comes to the shortcut's norm, too, where no ReLU is on the way.
enum class TailSums { moments, deviations, gradients, rectified };

// What the last pass of a direction makes: out, or du; or out with a shortcut that goes through a
// norm (normed). What makes du makes the gradient of such a shortcut as well.
enum class TailScale { forward, backward, rectified, normed };
constexpr bool is_backward(TailScale scale) {
  return scale == TailScale::backward || scale == TailScale::rectified;
}

// Blocks of a pass that a multiprocessor's registers hold: fewer of those that keep more of each
// channel, and read more tensors at once.
constexpr int kFewPerSm = 2, kManyPerSm = 3;
constexpr bool is_lean(TailSums sums) {
  return sums == TailSums::moments || sums == TailSums::deviations;
}
constexpr int tail_per_sm(TailSums sums, int64_t element_size) {
  return is_lean(sums) && element_size < 8 ? kManyPerSm : kFewPerSm;
}

// One launch.
struct TailStep {
  TailKernel kernel;
  const char* name;
  unsigned reads, writes;  // sets of TailTensors
  TailSums sums;           // of a pass that adds up
  TailScale scale;         // of a last pass
  Maps maps;               // whose weights its sums have: masks', or the terms'
  Axes weights;            // the axes whose masks weigh the sums that it makes, or makes maps of
  Axes axes;               // by which it adds up, or whose maps it makes
  Made made;               // of Kernel::maps
  bool of_shortcut;  // it serves the shortcut's norm: it reads the shortcut as u, and d as dout
  bool backwards;    // the blocks take the tiles from the last on
  int64_t jobs;      // one for each block
  unsigned grid;     // blocks that are launched at a time
  size_t shared_bytes;
};

// As offsets, like Workspace, which has the rest.
struct TailWorkspace : Workspace {
  int64_t du_terms;                 // what u and one are multiplied with in du, [2][channels]
  int64_t products, term_products;  // [n][pixel_tiles][channels]
  int64_t pooled_x;                 // [n][channels]
  int64_t mask_sums, term_sums;     // [n][bands of pixels]
};

struct TailDirection {
  std::vector<TailStep> steps;
  TailWorkspace workspace;
};

struct TailPlan {
  Tiling tiling;
  Bands bands;
  int norm_channels;  // of a block that works on the norm's: a power of 2, at most a warp
  bool early;         // as Plan's
  TailDirection forward, backward;

  const TailDirection& operator[](Way way) const {
    return way == Way::forward ? forward : backward;
  }
  // Whether no two threads of a pass share a vector, so that one may write where it reads.
  bool in_place() const { return tiling.period == 1; }
};

// The kind of a tail, which the problem does not say.
struct TailKind {
  bool batch;           // the norm's statistics are the batch's
  bool shortcut;        // there is one
  bool shortcut_norm;   // it goes through a norm
  bool shortcut_batch;  // whose statistics are the batch's, which matters backward
  bool statistics;      // forward makes the batch's statistics and nothing else
};

// `aligned`: every full-size tensor begins at a multiple of 16 bytes.
TailPlan tail_plan(const Problem& problem, TailKind kind, const Device& device, bool aligned,
                   const Limits& limits);

// As of the layer's passes: the waves of a launch, and the bytes of what it reads that the launches
// before it should have left in L2.
Waves waves(const Problem& problem, const Device& device, const TailPlan& plan,
            const TailStep& step);
int64_t expected_in_l2(const Problem& problem, const Device& device, const TailDirection& direction,
                       const TailStep& step);

// Vectors of each tensor that a thread of a pass has in flight: fewer where it reads two or three.
constexpr int tail_depth(TailSums sums) { return is_lean(sums) ? 4 : 2; }

}  // namespace da::cuda
