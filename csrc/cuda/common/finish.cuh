// The small launches that make the parameters' gradients.
#pragma once

#include "cuda/common/masks.cuh"
#include "cuda/plan/memory.h"

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

// One image's share of the gradients of a scalar gate (weight, bias) or an eca gate (its taps).
template <class A>
SIMT_KERNEL(kThreads, 1)
gate_sums(SIMT_PARAM Args<A> args) {
  A* warps = reinterpret_cast<A*>(SmallMemory(simt::shared()).sums);
  const int64_t job = args.first_job + simt::block();
  const int64_t image = job / args.parts, part = job % args.parts;
  const A* dt = args.d_logit + image * args.channels;
  const A* pooled = args.pooled + image * args.channels;
  const bool bias = args.gate == Gate::scalar && part == 1;
  const int64_t shift = args.gate == Gate::eca ? part - args.kernel_size / 2 : 0;
  const int64_t first = max<int64_t>(0, -shift), last = min(args.channels, args.channels - shift);
  A sum = 0;
  for (int64_t c = first + simt::thread(); c < last; c += kThreads)
    sum += bias ? dt[c] : dt[c] * pooled[c + shift];
  sum = block_sum(sum, warps);
  if (simt::thread() == 0) args.gate_parts[job] = sum;
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

// The spatial parameters' gradients from the blocks' 19 sums: a warp takes a sum at a time.
template <class T>
SIMT_FN void finish_spatial(const Args<accumulate_t<T>>& args, double* sums) {
  using A = accumulate_t<T>;
  const int lane = simt::thread() % simt::kWarp;
  for (int t = simt::thread() / simt::kWarp; t < kSpatialSums; t += kWarps) {
    double sum = 0;
    for (int64_t block = lane; block < args.spatial_blocks; block += simt::kWarp)
      sum += args.spatial_parts[block * kSpatialSums + t];
    sum = warp_sum(sum);
    if (lane == 0) sums[t] = sum;
  }
  simt::sync();
  if (simt::thread() > 0) return;

  const Parameters<const void*>& p = args.parameters;
  SpatialWeights<A> weights;
  for (int t = 0; t < kTaps; t++) {
    weights.conv[t] = Parameter<T>{p.conv, args.wide}[t];
    weights.dilated[t] = Parameter<T>{p.dilated, args.wide}[t];
  }
  for (int i = 0; i < 2; i++) weights.merge[i] = Parameter<T>{p.merge, args.wide}[i];
  const SpatialWeights<double> d = spatial_gradients(weights, sums);
  for (int t = 0; t < kTaps; t++) {
    put<T>(args.gradients.conv, t, d.conv[t], args.wide);
    put<T>(args.gradients.dilated, t, d.dilated[t], args.wide);
  }
  for (int i = 0; i < 2; i++) put<T>(args.gradients.merge, i, d.merge[i], args.wide);
  put<T>(args.gradients.spatial_bias, 0, d.bias, args.wide);
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

// A scalar or eca gate's gradients, from gate_sums.
template <class T>
SIMT_FN void finish_parts(const Args<accumulate_t<T>>& args, int64_t part, double* sums) {
  double sum = 0;
  for (int64_t n = simt::thread(); n < args.images; n += kThreads)
    sum += args.gate_parts[n * args.parts + part];
  sum = block_sum(sum, sums);
  if (simt::thread() > 0) return;
  const bool bias = args.gate == Gate::scalar && part == 1;
  put<T>(bias ? args.gradients.gate_bias : args.gradients.gate, bias ? 0 : part, sum, args.wide);
}

// All parameters' gradients, in the parameters' type.
template <class T>
SIMT_KERNEL(kThreads, 1)
finish(SIMT_PARAM Args<accumulate_t<T>> args) {
  double* sums = SmallMemory(simt::shared()).sums;
  const int64_t spatial = args.masks.pixels ? 1 : 0;
  const int64_t job = args.first_job + simt::block();
  if (job < spatial)
    finish_spatial<T>(args, sums);
  else if (args.gate == Gate::affine)
    finish_affine<T>(args, (job - spatial) * simt::kWarp, sums);
  else
    finish_parts<T>(args, job - spatial, sums);
}

}  // namespace da::cuda
