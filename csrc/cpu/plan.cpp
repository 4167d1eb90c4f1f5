#include "plan.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "sizes.h"

namespace da::cpu {
namespace {

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::generic;
}

// A virtual machine may be told of its host's whole cache, of which it has a part: no processor has
// more than this for each of its threads.
constexpr int64_t kCacheOfThread = int64_t(16) << 20;

// Sysfs tells what one core sees, sysconf perhaps the whole machine's.
int64_t told_cache_bytes() {
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    long kib = 0;
    const bool read = std::fscanf(file, "%ldK", &kib) == 1;
    std::fclose(file);
    if (read) return kib * 1024;
  }
#if defined(_SC_LEVEL3_CACHE_SIZE)
  return std::max({sysconf(_SC_LEVEL3_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE), 0L});
#else
  return 0;
#endif
}

int64_t last_level_cache_bytes() {
  return std::min(told_cache_bytes(), std::max(sysconf(_SC_NPROCESSORS_ONLN), 1L) * kCacheOfThread);
}

// Rows that one thread takes together. Those of channels whose columns nobody adds up are shared
// out one by one where they are long.
int64_t block_rows(const Problem& problem, const Limits& limits) {
  int64_t rows = 8;  // what the kernels sum in registers
  if (problem.by_pixel() || problem.spatial()) return rows;
  while (rows > 1 && rows / 2 * problem.cols() >= limits.shared_work) rows /= 2;
  return rows;
}

}  // namespace

Problem joined(const Problem& problem) {
  constexpr int64_t small = 64;  // pixels
  if (problem.order != Order::none || !problem.by_pixel() || problem.pixels() >= small)
    return problem;
  Problem p = problem;
  p.h = p.n * p.pixels(), p.w = p.n = 1;
  p.channels_last = true;
  return p;
}

const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "generic";
}

Isa instruction_set() {
  static const Isa chosen = [] {
    const char* set = std::getenv("DA_OPS_CPU_ISA");
    const std::string wish = set ? set : "";
    for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512})
      if (wish == name(isa)) return std::min(isa, widest());
    if (!wish.empty())
      throw std::runtime_error("DA_OPS_CPU_ISA: expected generic, avx2 or avx512; got " + wish);
    return widest();
  }();
  return chosen;
}

bool parse(const std::string& text, Limits& limits) {
  static const int64_t cache_bytes = last_level_cache_bytes();
  limits = {};
  limits.cache_bytes = cache_bytes;
  return da::parse(text, {{"cache", &limits.cache_bytes, 0},
                          {"shared", &limits.shared_work, 0},
                          {"slabs", &limits.slabs, 1},
                          {"slab_rows", &limits.slab_rows, 1},
                          {"long_row", &limits.long_row, 0},
                          {"near", &limits.near_bytes, 0},
                          {"joint", &limits.joint_bytes, 0},
                          {"hot", &limits.hot_bytes, 0}});
}

Plan plan(const Problem& problem, const Machine& machine, int tensors) {
  instruction_set();  // refused here, if it is, before threads need it
  const Limits& limits = machine.limits;
  Plan p{};
  p.shared_work = limits.shared_work;
  p.threads = problem.elements() < limits.shared_work ? 1 : std::max<int64_t>(machine.threads, 1);

  // One image a thread keeps each image in that thread's cache. A last round that would leave most
  // threads idle is shared out instead.
  const int64_t last = problem.n % p.threads;
  p.whole_images = 2 * last >= p.threads ? problem.n : problem.n - last;
  if (problem.n < p.threads) p.whole_images = 0;

  const int64_t block = block_rows(problem, limits), least = limits.slabs * block;
  const int64_t blocks = (problem.rows() + least - 1) / least;
  constexpr int64_t most = 1024;  // whose sums by column lose little in float32
  p.slab_rows = std::min({blocks * block, limits.slab_rows, most});
  p.slabs = (problem.rows() + p.slab_rows - 1) / p.slab_rows;

  // Rows of middling length are read faster one after the other than side by side; the kernels take
  // short ones together in any case. Two arrays over the columns crowd out the first-level cache
  // where rows are long.
  const int64_t sum_bytes = problem.dtype == Dtype::float64 ? 8 : 4;
  const auto rows = [](bool together) { return together ? Rows::together : Rows::singly; };
  p.sums = rows(problem.cols() > limits.long_row);
  p.combines = rows(2 * problem.cols() * sum_bytes > limits.near_bytes);
  // What the cache cannot hold together with all else is not fetched to be overwritten.
  const auto if_cached = [&](int64_t most) {
    if (limits.cache_bytes > 0 && problem.bytes() > most) return Stores::streamed;
    return problem.bytes() > limits.hot_bytes ? Stores::cached : Stores::hot;
  };
  p.stores = if_cached(limits.cache_bytes / (2 * tensors));
  p.du_stores = if_cached(limits.cache_bytes);
  // A small image stays near anyway.
  p.joint =
      may_join(problem) && problem.bytes() / std::max<int64_t>(problem.n, 1) >= limits.joint_bytes;
  return p;
}

int64_t cached_tensors(const Problem& problem, const Machine& machine) {
  const Plan p = plan(problem, machine);
  const int64_t image = problem.bytes() / std::max<int64_t>(problem.n, 1);
  const int64_t in_flight = p.whole_images ? p.threads : 1;
  return machine.limits.cache_bytes / std::max<int64_t>(in_flight * image, 1);
}

}  // namespace da::cpu
