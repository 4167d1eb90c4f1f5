// A GPU as planners see it. Free of torch and of CUDA.
#pragma once

#include <cstdint>
#include <iterator>

namespace da::cuda {

struct Device {
  int sm;  // compute capability, 90 for 9.0
  int multiprocessors;
  int64_t l2_bytes;
};

// A well-known GPU of this compute capability, for showing plans without one; the nearest older
// architecture's where it is none of ours.
inline Device typical_device(int sm) {
  constexpr int64_t MiB = 1 << 20;
  constexpr Device known[] = {
      {120, 170, 96 * MiB},   // RTX 5090
      {100, 148, 126 * MiB},  // B200
      {90, 132, 50 * MiB},    // H100, H200
      {89, 128, 72 * MiB},    // RTX 4090
      {86, 82, 6 * MiB},      // RTX 3090
      {80, 108, 40 * MiB},    // A100
      {75, 40, 4 * MiB},      // T4
  };
  for (Device device : known)
    if (device.sm <= sm) return device;
  return known[std::size(known) - 1];
}

// Copies into shared memory that go on behind the threads' backs begin with Ampere.
inline bool loads_behind(int sm) { return sm >= 80; }

// Clusters begin with Hopper.
inline bool has_clusters(int sm) { return sm >= 90; }

// Whether a launch may begin while the one before it ends (programmatic dependent launch).
inline bool overlaps_launches(int sm) { return sm >= 90; }

// Bytes of shared memory that a block may have where so many blocks share a multiprocessor.
inline int64_t shared_limit(int sm, int blocks_per_sm) {
  constexpr int64_t KiB = 1 << 10;
  const int64_t reserved = sm >= 80 ? KiB : 0;  // of each block, for the system
  const int64_t all = sm >= 120              ? 100 * KiB
                      : sm >= 90             ? 228 * KiB
                      : sm == 80 || sm == 87 ? 164 * KiB
                      : sm >= 80             ? 100 * KiB
                                             : 64 * KiB;
  return (all / blocks_per_sm - reserved) / 16 * 16;
}

}  // namespace da::cuda
