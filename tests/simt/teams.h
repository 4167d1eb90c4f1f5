// Kernels of the harness whose blocks speak to each other: through a cluster's shared memory, by
// mail, through global memory; or of which the last to be done takes up what the others left.
#pragma once

#include "planted.h"

namespace {

// Each block hands its number to the next one of its cluster.
template <Bug bug>
SIMT_KERNEL(kThreads, 1)
cluster(float* y) {
  float* number = simt::Carver(simt::shared()).take<float>(kThreads);
  const int thread = simt::thread();
  const unsigned block = simt::block();
  number[thread] = static_cast<float>(block * kThreads + thread);
  if (bug == Bug::no_cluster_barrier)
    simt::sync();
  else
    simt::cluster_sync();
  y[block * kThreads + thread] = simt::peer(number, (block + 1) % kTeam)[thread];
  if (bug != Bug::peer_has_returned) simt::cluster_sync();
}

// The same by mail, in several rounds.
struct MailArrays {
  SIMT_HD explicit MailArrays(simt::Carver carve)
      : mail(carve.take<simt::Mail>(1)),
        number(carve.take<float>(kThreads)),
        bytes(carve.bytes()) {}
  simt::Mail* mail;
  float* number;
  size_t bytes;
};

template <Bug bug>
SIMT_KERNEL(kThreads, 1)
mail(float* y) {
  const MailArrays arrays(simt::Carver(simt::shared()));
  const int thread = simt::thread();
  const unsigned block = simt::block();
  float value = static_cast<float>(block * kThreads + thread);
  arrays.mail->init();
  simt::cluster_sync();
  for (unsigned round = 0; round < 3; round++) {
    arrays.mail->post(arrays.number + thread, (block + 1) % kTeam, value);
    if (bug == Bug::no_wait_for_mail)
      simt::sync();
    else
      arrays.mail->wait(kThreads * sizeof(float), round);
    value = arrays.number[thread];
    if (bug != Bug::mail_too_early && round < 2) simt::cluster_sync();
  }
  y[block * kThreads + thread] = value;
}

// The same through global memory, in several rounds. The counter serves all launches.
template <Bug bug>
SIMT_KERNEL(kThreads, 1)
team(float* global, unsigned* counters, float* y) {
  const int thread = simt::thread();
  const unsigned block = simt::block(), first = block / kTeam * kTeam, rank = block - first;
  float value = static_cast<float>(block * kThreads + thread);
  for (unsigned round = 0; round < 3; round++) {
    float* numbers = global + round % 2 * kBlocks * kThreads;
    simt::store_fresh(numbers + block * kThreads + thread, value);
    if (bug == Bug::no_team_barrier)
      simt::sync();
    else
      simt::team_sync(counters + first, rank, kTeam);
    value = simt::load_fresh(numbers + (first + (rank + 1) % kTeam) * kThreads + thread);
  }
  y[block * kThreads + thread] = value;
}

// The last block to have written its numbers adds up those of all, in their order.
template <Bug bug>
SIMT_KERNEL(kThreads, 1)
last(float* numbers, unsigned* counter, float* y) {
  float* const flag = simt::Carver(simt::shared()).take<float>(1);
  const int thread = simt::thread();
  const unsigned block = simt::block();
  simt::store_fresh(numbers + block * kThreads + thread, static_cast<float>(block + thread));
  if (bug != Bug::counted_too_early) simt::sync();
  if (thread == 0) {
    const unsigned before = bug == Bug::counted_without_fence
                                ? __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED)
                                : simt::fetch_add(counter, 1u);
    *flag = before + 1 == simt::blocks();
  }
  if (bug != Bug::flag_too_early) simt::sync();
  if (*flag == 0) return;
  const int other = kThreads - 1 - thread;
  float sum = 0;
  for (unsigned b = 0; b < kBlocks; b++) sum += simt::load_fresh(numbers + b * kThreads + other);
  y[thread] = sum;
}

bool shifted(const Buffer<float>& y, unsigned by) {
  for (unsigned i = 0; i < y.size(); i++) {
    const unsigned block = i / kThreads, first = block / kTeam * kTeam;
    const unsigned from = first + (block - first + by) % kTeam;
    if (y[i] != static_cast<float>(from * kThreads + i % kThreads)) return false;
  }
  return true;
}

template <Bug bug>
bool cluster_case() {
  Buffer<float> y(kBlocks * kThreads);
  simt::Carver carve;
  carve.take<float>(kThreads);
  simt::Launch launch{kBlocks, kThreads};
  launch.shared_bytes = carve.bytes();
  launch.team = kTeam;
  launch.cluster = true;
  return ran(launch, cluster<bug>, y.data()) && shifted(y, 1);
}

template <Bug bug>
bool mail_case() {
  Buffer<float> y(kBlocks * kThreads);
  simt::Launch launch{kBlocks, kThreads};
  launch.shared_bytes = MailArrays(simt::Carver()).bytes;
  launch.team = kTeam;
  launch.cluster = true;
  return ran(launch, mail<bug>, y.data()) && shifted(y, 1);
}

template <Bug bug>
bool last_case() {
  Buffer<float> numbers(kBlocks * kThreads), y(kThreads);
  Buffer<unsigned> counter(1);
  counter[0] = 0;
  simt::Launch launch{kBlocks, kThreads};
  launch.shared_bytes = sizeof(float);
  if (!ran(launch, last<bug>, numbers.data(), counter.data(), y.data())) return false;
  for (int t = 0; t < kThreads; t++)
    if (!(y[t] == kBlocks * (kThreads - 1 - t) + kBlocks * (kBlocks - 1) / 2)) return false;
  return true;
}

template <Bug bug>
bool team_case() {
  Buffer<float> global(2 * kBlocks * kThreads);
  Buffer<unsigned> counters(kBlocks);
  std::fill(counters.begin(), counters.end(), 0u);
  simt::Launch launch{kBlocks, kThreads};
  launch.team = kTeam;
  for (int again = 0; again < 3; again++) {  // the counters go on where they are
    Buffer<float> y(kBlocks * kThreads);
    if (!ran(launch, team<bug>, global.data(), counters.data(), y.data()) || !shifted(y, 3))
      return false;
  }
  return true;
}

}  // namespace
