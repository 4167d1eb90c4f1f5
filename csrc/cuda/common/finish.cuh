// The parameters' gradients, in the launch that makes them. A block takes the spatial ones, or of
// the gate's some channels (affine) or a share of one weight's images.
#pragma once

#include "cuda/common/masks.cuh"
#include "cuda/plan/memory.h"
#include "cuda/simt/team.cuh"

namespace da::cuda {

// The sum over the block, in every thread. The caller syncs before it uses `warps` again.
template <class A>
SIMT_FN A block_sum(A value, A* warps) {
  value = warp_sum(value);
  if (simt::thread() % simt::kWarp == 0) warps[simt::thread() / simt::kWarp] = value;
  simt::sync();
  A sum = 0;
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

// The gradients of the spatial parameters, from the blocks' 19 sums. A thread adds up a vector of
// them, of every kRows-th block; then a warp adds up a sum of the threads'.
template <class T>
SIMT_FN void finish_spatial(const Args<accumulate_t<T>>& args, double* sums) {
  using A = accumulate_t<T>;
  constexpr int E = simt::kPerVector<A>, kVectors = kSpatialPitch / E, kRows = kThreads / kVectors;
  constexpr int kInFlight = 4;
  const Parameters<const void*>& p = args.parameters;
  const int thread = simt::thread(), row = thread / kVectors, kernel = thread / kTaps;
  const bool is_tap = thread < 2 * kTaps;
  A weight = 0, merge = 0;
  if (is_tap) {
    weight = Parameter<T>{kernel ? p.dilated : p.conv, args.wide}[thread % kTaps];
    merge = Parameter<T>{p.merge, args.wide}[kernel];
  }
  simt::sync();  // whoever reads what the block had here before has done so
  double sum[E] = {};
  const A* const parts = args.spatial_parts + thread % kVectors * E;
  SIMT_ROLLED
  for (int64_t block = row; block < args.spatial_blocks; block += kInFlight * kRows) {
    simt::Vector some[kInFlight] = {};
    SIMT_UNROLL
    for (int d = 0; d < kInFlight; d++)
      if (row < kRows && block + d * kRows < args.spatial_blocks)
        some[d] = simt::load_fresh(
            reinterpret_cast<const simt::Vector*>(parts + (block + d * kRows) * kSpatialPitch));
    SIMT_UNROLL
    for (int d = 0; d < kInFlight; d++) {
      A value[E];
      simt::unpack<A>(some[d], value);
      SIMT_UNROLL
      for (int j = 0; j < E; j++) sum[j] += value[j];
    }
  }
  SIMT_UNROLL
  for (int j = 0; j < E; j++)
    if (row < kRows) sums[thread * E + j] = sum[j];
  simt::sync();
  double* const totals = sums + 4 * kThreads;
  const int lane = thread % simt::kWarp;
  SIMT_ROLLED
  for (int t = thread / simt::kWarp; t < kSpatialSums; t += kWarps) {
    double total = 0;
    for (int r = lane; r < kRows; r += simt::kWarp) total += sums[r * kSpatialPitch + t];
    total = warp_sum(total);
    if (lane == 0) totals[t] = total;
  }
  simt::sync();
  if (is_tap) {
    put<T>(kernel ? args.gradients.dilated : args.gradients.conv, thread % kTaps,
           totals[thread] * merge, args.wide);
    sums[thread] = totals[thread] * weight;
  } else if (thread == 2 * kTaps) {
    put<T>(args.gradients.spatial_bias, 0, totals[thread], args.wide);
  }
  simt::sync();
  if (thread >= 2) return;
  double of_merge = 0;
  for (int t = 0; t < kTaps; t++) of_merge += sums[thread * kTaps + t];
  put<T>(args.gradients.merge, thread, of_merge, args.wide);
}

// An affine gate's gradients, of as many channels as the block's threads, or fewer where there are
// images to share out among them. Gradients at the logits are dt(image)[channel].
template <class T, class Logits>
SIMT_FN void finish_affine(const Args<accumulate_t<T>>& args, int64_t job, const Logits& dt,
                           double* sums) {
  const int sharing = affine_sharing(args.images), at_once = kThreads / sharing;
  const int share = simt::thread() / at_once, place = simt::thread() % at_once;
  const int64_t c = job * at_once + place;
  double weight = 0, bias = 0;
  if (c < args.channels)
    for (int64_t n = share; n < args.images; n += sharing) {
      const double gradient = dt(n)[c];
      weight += gradient * args.pooled[n * args.channels + c];
      bias += gradient;
    }
  sums[simt::thread()] = weight;
  sums[kThreads + simt::thread()] = bias;
  simt::sync();
  if (share > 0 || c >= args.channels) return;
  for (int s = 1; s < sharing; s++) {
    weight += sums[s * at_once + place];
    bias += sums[kThreads + s * at_once + place];
  }
  put<T>(args.gradients.gate, c, weight, args.wide);
  put<T>(args.gradients.gate_bias, c, bias, args.wide);
}

// A share of the images' part in the gradient of one weight of a scalar or eca gate, or a scalar
// gate's bias. The last block of a part to be done adds up the shares, in their order.
template <class T, class Logits>
SIMT_FN void finish_part(const Args<accumulate_t<T>>& args, int job, const Logits& logits,
                         double* sums) {
  using A = accumulate_t<T>;
  const int shares = args.shares, part = job / shares, share = job % shares;
  const bool bias = args.gate == Gate::scalar && part == 1;
  const int64_t shift = args.gate == Gate::eca ? part - args.kernel_size / 2 : 0;
  const int64_t first = max<int64_t>(0, -shift), last = min(args.channels, args.channels - shift);
  double sum = 0;
  for (int64_t n = share; n < args.images; n += shares) {
    const auto dt = logits(n);
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
      flag = simt::fetch_add(args.counters + 1 + part, 1u) + 1 == static_cast<unsigned>(shares);
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

// Whether the job is the spatial parameters': the first one, where args.finishes has it. The gate's
// follow.
template <class A>
SIMT_FN bool is_spatial(const Args<A>& args, int64_t job) {
  return args.finishes.pixels && job == 0;
}
template <class T, class Logits>
SIMT_FN void finish_gate(const Args<accumulate_t<T>>& args, int64_t job, const Logits& dt,
                         double* sums) {
  if (args.finishes.pixels) job--;
  if (args.gate == Gate::affine)
    finish_affine<T>(args, job, dt, sums);
  else
    finish_part<T>(args, static_cast<int>(job), dt, sums);
}

// A job of either, where the gradients at the gate's logits have been kept.
template <class T>
SIMT_FN void finish_job(const Args<accumulate_t<T>>& args, int64_t job, double* sums) {
  const auto logits = [&](int64_t n) { return args.d_logit + n * args.channels; };
  if (is_spatial(args, job))
    finish_spatial<T>(args, sums);
  else
    finish_gate<T>(args, job, logits, sums);
}

// The same in a launch of its own.
template <class T>
SIMT_KERNEL(kThreads, 1)
finish(SIMT_PARAM Args<accumulate_t<T>> args) {
  simt::let_next_launch_begin();
  simt::wait_for_launch_before();
  finish_job<T>(args, args.first_job + simt::block(), SmallMemory(simt::shared()).sums);
}

}  // namespace da::cuda
