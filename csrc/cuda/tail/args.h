// The arguments of the residual tail's launches: plain data, the same for every kernel.
#pragma once

#include "cuda/common/args.h"
#include "cuda/plan/tail.h"

namespace da::cuda {

// A tensor by channel of the norm's, in u's type or (`wide`) in float32; null where it has none.
struct OfNorm {
  const void* data;
  bool wide;
};

// The same, written by a kernel.
struct KeptOfNorm {
  void* data;
  bool wide;
};

// A norm's tensors; mean and var may be the batch's.
struct NormArgs {
  OfNorm weight, bias, mean, var;
  double eps;
};

// Which lines of the matrix the channels are, see Tiling.
enum class ChannelsAre { rows, cols };

template <class A>
struct TailArgs {
  // `x` is u; its maps are those of x = (u - centre) scale + bias, but for `pooled`, which is of
  // u - centre. Its new sums: where a launch puts what it adds up, null if not wanted.
  Args<A> call;
  const void *shortcut, *out, *dout;  // the shortcut, and backward's out, are null without one
  void* d;            // the gradient at the ReLU's argument; null without a shortcut
  void* result;       // out, or du
  int norm_channels;  // of a block that works on the norm's
  bool batch;         // backward: the norm's statistics are the batch's
  Maps maps;          // whose weights a launch's sums have

  NormArgs norm;                         // see Norm
  A *new_mean, *new_var;                 // the batch's, null where they are given
  KeptOfNorm running_mean, running_var;  // null where not kept
  double momentum;                       // the batch's share in them
  int64_t* batches;                      // counts those that had one; null where not kept
  void *d_weight, *d_bias;               // in the type of the norm's; null where not wanted
  A *du_slope, *du_offset;               // du has (u - centre) du_slope + du_offset besides a dx

  // By channel: of d, or means; of d (u - centre), or squared deviations; of dm (u - centre).
  Partial<A> products, term_products;
  A* new_products;           // with new_channel_sums
  A *mask_sums, *term_sums;  // of a mask's and a term's pixels, [image][band]
  A* pooled_x;               // [image][channel]
  const A* pooled_u;         // what forward kept, of u - centre
  NormArgs shortcut_norm;    // of forward, where the shortcut goes through it
};

}  // namespace da::cuda
