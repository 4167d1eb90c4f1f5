// The last launch of backward: the parameters' gradients. A block takes one of the spatial ones, or
// of the gate's 32 channels (affine) or a share of one weight's images.
#pragma once

#include "cuda/common/masks.cuh"
#include "cuda/plan/memory.h"
#include "cuda/simt/team.cuh"

namespace da::cuda {

// The sum over the block, in its first thread.
template <class A>
SIMT_FN A block_sum(A value, A* warps) {
  value = warp_sum(value);
  if (simt::thread() % simt::kWarp == 0) warps[simt::thread() / simt::kWarp] = value;
  simt::sync();
  A sum = 0;
  if (simt::thread() == 0)
    for (int w = 0; w < kWarps; w++) sum += warps[w];
  return sum;
}

template <class T>
SIMT_FN void put(void* gradient, int64_t i, double value, bool wide) {
  using A = accumulate_t<T>;
  if (!gradient) return;
  if (wide)
    static_cast<float*>(gradient)[i] = static_cast<float>(value);
  else
    static_cast<T*>(gradient)[i] = simt::to<T>(static_cast<A>(value));
}

// One of the gradients of the spatial parameters, from the blocks' 19 sums: of a tap, the bias or,
// which takes all sums of a kernel, a merge weight.
template <class T>
SIMT_FN void finish_spatial(const Args<accumulate_t<T>>& args, int which, double* warps) {
  const Parameters<const void*>& p = args.parameters;
  const Parameter<T> merge{p.merge, args.wide};
  const bool merges = which >= kSpatialSums;
  const int kernel = merges ? which - kSpatialSums : which / kTaps;
  const int first = merges ? kernel * kTaps : which, sums = merges ? kTaps : 1;
  double sum = 0;
  SIMT_ROLLED
  for (int t = first; t < first + sums; t++) {
    double of_tap = 0;
    for (int64_t block = simt::thread(); block < args.spatial_blocks; block += kThreads)
      of_tap += args.spatial_parts[block * kSpatialSums + t];
    sum +=
        merges ? of_tap * Parameter<T>{kernel ? p.dilated : p.conv, args.wide}[t - first] : of_tap;
  }
  sum = block_sum(sum, warps);
  if (simt::thread() > 0) return;
  if (merges)
    put<T>(args.gradients.merge, kernel, sum, args.wide);
  else if (which == 2 * kTaps)
    put<T>(args.gradients.spatial_bias, 0, sum, args.wide);
  else
    put<T>(kernel ? args.gradients.dilated : args.gradients.conv, which % kTaps,
           sum * merge[kernel], args.wide);
}

// An affine gate's gradients: 32 channels a block, the images shared out among its warps.
template <class T>
SIMT_FN void finish_affine(const Args<accumulate_t<T>>& args, int64_t channel0, double* sums) {
  const int lane = simt::thread() % simt::kWarp, warp = simt::thread() / simt::kWarp;
  const int64_t c = channel0 + lane;
  double weight = 0, bias = 0;
  if (c < args.channels)
    for (int64_t n = warp; n < args.images; n += kWarps) {
      const double dt = args.d_logit[n * args.channels + c];
      weight += dt * args.pooled[n * args.channels + c];
      bias += dt;
    }
  sums[simt::thread()] = weight;
  sums[kThreads + simt::thread()] = bias;
  simt::sync();
  if (warp == 0 && c < args.channels) {
    for (int w = 1; w < kWarps; w++) {
      weight += sums[w * simt::kWarp + lane];
      bias += sums[kThreads + w * simt::kWarp + lane];
    }
    put<T>(args.gradients.gate, c, weight, args.wide);
    put<T>(args.gradients.gate_bias, c, bias, args.wide);
  }
}

// A share of the images' part in the gradient of one weight of a scalar or eca gate, or a scalar
// gate's bias. The last block of a part to be done adds up the shares, in their order.
template <class T>
SIMT_FN void finish_part(const Args<accumulate_t<T>>& args, int64_t job, double* sums) {
  using A = accumulate_t<T>;
  const int shares = args.shares;
  const int64_t part = job / shares, share = job % shares;
  const bool bias = args.gate == Gate::scalar && part == 1;
  const int64_t shift = args.gate == Gate::eca ? part - args.kernel_size / 2 : 0;
  const int64_t first = max<int64_t>(0, -shift), last = min(args.channels, args.channels - shift);
  double sum = 0;
  for (int64_t n = share; n < args.images; n += shares) {
    const A* const dt = args.d_logit + n * args.channels;
    const A* const pooled = args.pooled + n * args.channels + shift;
    for (int64_t c = first + simt::thread(); c < last; c += kThreads)
      sum += bias ? dt[c] : dt[c] * pooled[c];
  }
  sum = block_sum(sum, sums);

  bool done = true;
  if (shares > 1) {
    A* const all = args.gate_parts + part * shares;
    double& flag = sums[kWarps];
    if (simt::thread() == 0) {
      simt::store_fresh(all + share, static_cast<A>(sum));
      flag = simt::fetch_add(args.parts_done + part, 1u) + 1 == static_cast<unsigned>(shares);
    }
    simt::sync();
    done = flag != 0;
    sum = 0;
    if (done && simt::thread() < simt::kWarp) {
      for (int s = simt::thread(); s < shares; s += simt::kWarp) sum += simt::load_fresh(all + s);
      sum = warp_sum(sum);
    }
  }
  if (done && simt::thread() == 0)
    put<T>(bias ? args.gradients.gate_bias : args.gradients.gate, bias ? 0 : part, sum, args.wide);
}

// All parameters' gradients, in the parameters' type.
template <class T>
SIMT_KERNEL(kThreads, 1)
finish(SIMT_PARAM Args<accumulate_t<T>> args) {
  simt::let_next_launch_begin();
  simt::wait_for_launch_before();
  double* sums = SmallMemory(simt::shared()).sums;
  const int64_t spatial = args.masks.pixels ? kSpatialGradients : 0;
  const int64_t job = args.first_job + simt::block();
  if (job < spatial)
    finish_spatial<T>(args, static_cast<int>(job), sums);
  else if (args.gate == Gate::affine)
    finish_affine<T>(args, (job - spatial) * simt::kWarp, sums);
  else
    finish_part<T>(args, job - spatial, sums);
}

}  // namespace da::cuda
