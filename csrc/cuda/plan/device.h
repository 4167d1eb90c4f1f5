// A GPU as planners see it. Free of torch and of CUDA.
#pragma once

#include <cstdint>
#include <iterator>

namespace da::cuda {

struct Device {
  int sm;  // compute capability, 90 for 9.0
  int multiprocessors;
  int64_t l2_bytes;
  bool early_launches;  // a launch may begin before the one before it has ended: from sm_90 on
};

// A well-known GPU of this compute capability, for showing plans without one; the nearest older
// architecture's where it is none of ours.
inline Device typical_device(int sm) {
  constexpr int64_t MiB = 1 << 20;
  constexpr Device known[] = {
      {120, 170, 96 * MiB, true},   // RTX 5090
      {100, 148, 126 * MiB, true},  // B200
      {90, 132, 50 * MiB, true},    // H100, H200
      {89, 128, 72 * MiB, false},   // RTX 4090
      {86, 82, 6 * MiB, false},     // RTX 3090
      {80, 108, 40 * MiB, false},   // A100
      {75, 40, 4 * MiB, false},     // T4
  };
  for (Device device : known)
    if (device.sm <= sm) return device;
  return known[std::size(known) - 1];
}

// Bytes that a multiprocessor moves from and to memory in a microsecond, while all do. The H200's
// is what the passes reached there (benchmarks/results/nvidia-h200.json, cold, in graphs: 3.6 TB/s
// in all); the others' is as much less or more as their makers say that their memory is.
inline double memory_rate(int sm) {
  return sm >= 120   ? 8000   // RTX 5090, 1.8 TB/s
         : sm >= 100 ? 40000  // B200, 8 TB/s
         : sm >= 90  ? 27000  // H200; an H100's memory has 0.7 of its
         : sm >= 89  ? 5900   // RTX 4090, 1.0 TB/s
         : sm >= 86  ? 8500   // RTX 3090, 0.94 TB/s
         : sm >= 80  ? 10700  // A100, 1.56 TB/s
                     : 6000;  // T4, 0.32 TB/s
}

// Microseconds of a wave of a pass's blocks before they stream and after: measured there as well,
// as what each wave takes more than its bytes.
constexpr double kWaveTime = 2;

// The part of L2 to count on: others use it too, and it is not replaced in strict order.
inline double usable_l2(const Device& device) { return 0.7 * double(device.l2_bytes); }

// Copies into shared memory that go on behind the threads' backs begin with Ampere.
inline bool loads_behind(int sm) { return sm >= 80; }

// Clusters begin with Hopper.
inline bool has_clusters(int sm) { return sm >= 90; }

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
