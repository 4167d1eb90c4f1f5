// The faults that kernels of the harness can have, and what their cases share.
#pragma once

#include "cuda/simt/launch.cuh"
#include "cuda/simt/team.cuh"

namespace {

using simt::host::Buffer;

enum class Bug {
  none,
  past_array,
  past_shared,
  no_barrier,
  warp_synchronous,
  shuffle_as_fence,
  early_return,
  divergent_shuffle,
  misaligned_load16,
  misaligned_cast,
  no_wait,
  no_wait_between,
  no_barrier_before_load,
  no_cluster_barrier,
  peer_has_returned,
  no_team_barrier,
  counted_too_early,
  counted_without_fence,
  flag_too_early,
  no_wait_for_launch,
  some_wait_for_launch,
  late_wait_for_launch,
  no_wait_for_mail,
  mail_too_early,
};

constexpr int kThreads = 64;
constexpr int kBlocks = 8;
constexpr unsigned kTeam = 4;

// Runs a launch to its end.
template <class... A>
bool ran(const simt::Launch& launch, const A&... kernel_and_arguments) {
  const int error = simt::launch(launch, kernel_and_arguments...);
  simt::host::synchronize();
  return error == 0;
}

}  // namespace
