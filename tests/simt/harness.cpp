// Small kernels that show what running CUDA sources as fibers finds: each is right as it stands,
// and wrong in one way for each Bug. The arguments name cases; without any, all that are right run.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "planted.h"
#include "teams.h"

namespace {

// Each block adds up its numbers: lanes by shuffles, warps through shared memory.
struct SumArrays {
  SIMT_HD explicit SumArrays(simt::Carver carve)
      : warps(carve.take<float>(kThreads / simt::kWarp)),
        total(carve.take<float>(1)),
        bytes(carve.bytes()) {}
  float *warps, *total;
  size_t bytes;
};

struct SumArguments {
  const float* x;
  float* y;
};

template <Bug bug>
SIMT_KERNEL(kThreads, 1)
sum(SIMT_PARAM SumArguments arguments) {
  const SumArrays arrays(simt::Carver(simt::shared()));
  const int thread = simt::thread(), lane = thread % simt::kWarp, warp = thread / simt::kWarp;
  float value = arguments.x[simt::block() * kThreads + thread];
  if (bug == Bug::early_return && thread == 45) return;
  if (bug != Bug::divergent_shuffle || lane < 16) {
    SIMT_UNROLL
    for (int mask = simt::kWarp / 2; mask > 0; mask /= 2) value += simt::shuffle_xor(value, mask);
  }
  if (lane == 0) arrays.warps[warp + (bug == Bug::past_array ? 1 : 0)] = value;
  if (bug == Bug::past_shared && thread == 0) simt::shared()[arrays.bytes] = 1;
  if (bug != Bug::no_barrier) simt::sync();
  if (thread == 0) {
    *arrays.total = 0;
    for (int w = 0; w < kThreads / simt::kWarp; w++) *arrays.total += arrays.warps[w];
  }
  simt::sync();
  arguments.y[simt::block() * kThreads + thread] = *arrays.total;
}

template <Bug bug>
bool sum_case() {
  Buffer<float> x(kBlocks * kThreads), y(x.size());
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i % 7);
  simt::Launch launch{kBlocks, kThreads};
  launch.shared_bytes = SumArrays(simt::Carver()).bytes;
  if (!ran(launch, sum<bug>, SumArguments{x.data(), y.data()})) return false;
  for (size_t i = 0; i < x.size(); i++) {
    float want = 0;
    for (size_t t = 0; t < kThreads; t++) want += x[i / kThreads * kThreads + t];
    if (y[i] != want) return false;
  }
  return true;
}

// Neighbours within a warp exchange numbers through shared memory.
template <Bug bug>
SIMT_KERNEL(kThreads, 1)
exchange(float* y) {
  float* numbers = simt::Carver(simt::shared()).take<float>(kThreads);
  const int thread = simt::thread();
  numbers[thread] = static_cast<float>(thread);
  if (bug == Bug::shuffle_as_fence) simt::shuffle_xor(0, 1);
  if (bug == Bug::none) simt::sync();
  y[thread] = numbers[thread ^ 1];
}

template <Bug bug>
bool exchange_case() {
  Buffer<float> y(kThreads);
  simt::Carver carve;
  carve.take<float>(kThreads);
  simt::Launch launch{1, kThreads};
  launch.shared_bytes = carve.bytes();
  if (!ran(launch, exchange<bug>, y.data())) return false;
  for (int i = 0; i < kThreads; i++)
    if (y[i] != static_cast<float>(i ^ 1)) return false;
  return true;
}

// y = 2 x, a vector at a time.
template <class T, Bug bug>
SIMT_KERNEL(simt::kWarp, 1)
scale(const T* x, T* y) {
  constexpr int n = simt::kPerVector<T>;
  using A = simt::Accumulator<T>;
  x += simt::thread() * n;
  y += simt::thread() * n;
  simt::Vector vector = simt::load16_once(x);
  if (bug == Bug::misaligned_load16) vector = simt::load16(x + 1);
  if (bug == Bug::misaligned_cast) vector = *reinterpret_cast<const simt::Vector*>(x + 1);
  A values[n];
  simt::unpack<T>(vector, values);
  SIMT_UNROLL
  for (int i = 0; i < n; i++) values[i] *= 2;
  simt::store16(y, simt::pack<T>(values));
  simt::store_once(y,
                   simt::to<T>(simt::to<A>(simt::load_last(x)) + simt::to<A>(simt::load_once(x))));
}

template <class T, Bug bug>
bool scale_case() {
  constexpr int n = simt::kWarp * simt::kPerVector<T>;
  using A = simt::Accumulator<T>;
  Buffer<T> x(n + 1), y(n);
  for (int i = 0; i <= n; i++) x[i] = simt::to<T>(static_cast<A>(i) / 4);
  if (!ran(simt::Launch{1, simt::kWarp}, scale<T, bug>, x.data(), y.data())) return false;
  for (int i = 0; i < n; i++)
    if (simt::to<A>(y[i]) != static_cast<A>(i) / 2) return false;
  return true;
}

// Adds up slabs that arrive by bulk copies, by turns in two places.
struct CopyArrays {
  SIMT_HD explicit CopyArrays(simt::Carver carve)
      : bulk(carve.take<simt::Bulk>(2)),
        slab{carve.take<float>(kThreads), carve.take<float>(kThreads)},
        bytes(carve.bytes()) {}
  simt::Bulk* bulk;
  float* slab[2];
  size_t bytes;
};

template <Bug bug>
SIMT_KERNEL(kThreads, 1)
copy(const float* x, float* y) {
  constexpr unsigned places = bug == Bug::no_barrier_before_load ? 1 : 2;
  const CopyArrays arrays(simt::Carver(simt::shared()));
  const int thread = simt::thread();
  float total = 0;
  for (unsigned i = 0; i < places; i++) arrays.bulk[i].init();
  for (unsigned step = 0; step < kBlocks; step++) {
    const unsigned i = step % places, parity = step / places % 2;
    if (bug != Bug::no_barrier_before_load || step == 0) simt::Bulk::sync_before_load();
    arrays.bulk[i].load(arrays.slab[i], x + step * kThreads, kThreads * sizeof(float));
    const bool waits = bug == Bug::no_wait ? step + 1 < kBlocks : bug != Bug::no_wait_between;
    if (waits) arrays.bulk[i].wait(parity);
    if (bug != Bug::none) simt::sync();  // which is no wait, nor due before the next load
    total += arrays.slab[i][kThreads - 1 - thread];
  }
  y[thread] = total;
}

template <Bug bug>
bool copy_case() {
  Buffer<float> x(kBlocks * kThreads), y(kThreads);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i);
  simt::Launch launch{1, kThreads};
  launch.shared_bytes = CopyArrays(simt::Carver()).bytes;
  if (!ran(launch, copy<bug>, x.data(), y.data())) return false;
  for (int t = 0; t < kThreads; t++) {
    float want = 0;
    for (int b = 0; b < kBlocks; b++) want += x[b * kThreads + kThreads - 1 - t];
    if (!(y[t] == want)) return false;
  }
  return true;
}

// Each launch adds 1 to what the one before wrote, and may begin before that one has ended.
template <Bug bug>
SIMT_KERNEL(kThreads, 1)
next(const float* x, float* y) {
  simt::let_next_launch_begin();
  const int i = simt::block() * kThreads + simt::thread();
  float value = bug == Bug::late_wait_for_launch ? x[i] : 0;
  if (bug != Bug::no_wait_for_launch && (bug != Bug::some_wait_for_launch || i % 2 == 0))
    simt::wait_for_launch_before();
  if (bug != Bug::late_wait_for_launch) value = x[i];
  y[i] = value + 1;
}

template <Bug bug>
bool early_case() {
  constexpr int kLaunches = 4, kNumbers = kBlocks * kThreads;
  Buffer<float> y((kLaunches + 1) * kNumbers);
  std::fill(y.begin(), y.begin() + kNumbers, 0.0f);
  for (int n = 0; n < kLaunches; n++) {
    simt::Launch launch{kBlocks, kThreads};
    launch.early = n > 0;
    float* const x = y.data() + n * kNumbers;
    if (simt::launch(launch, n == 2 ? next<bug> : next<Bug::none>, x, x + kNumbers) != 0)
      return false;
  }
  simt::host::synchronize();
  return std::all_of(y.end() - kNumbers, y.end(), [](float value) { return value == kLaunches; });
}

// The switch itself: thousands of blocks that do little but wait.
SIMT_KERNEL(256, 1)
wait_often(int times) {
  for (int i = 0; i < times; i++) simt::sync();
}
bool wait_often_case() { return ran(simt::Launch{4096, 256}, wait_often, 8); }

// All values of a half type, or floats from the standard input rounded to it, to the output.
template <class T>
bool widen_case() {
  std::vector<float> values;
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const auto half = static_cast<uint16_t>(bits);
    T value;
    std::memcpy(&value, &half, sizeof value);
    values.push_back(simt::to<float>(value));
  }
  return std::fwrite(values.data(), sizeof(float), values.size(), stdout) == values.size();
}
template <class T>
bool narrow_case() {
  for (float value; std::fread(&value, sizeof value, 1, stdin) == 1;) {
    const T half = simt::to<T>(value);
    if (std::fwrite(&half, sizeof half, 1, stdout) != 1) return false;
  }
  return true;
}

struct Case {
  const char* name;
  bool (*run)();
};

constexpr Case kRight[] = {
    {"sum", sum_case<Bug::none>},
    {"exchange", exchange_case<Bug::none>},
    {"scale_float16", scale_case<simt::float16, Bug::none>},
    {"scale_bfloat16", scale_case<simt::bfloat16, Bug::none>},
    {"scale_float", scale_case<float, Bug::none>},
    {"scale_double", scale_case<double, Bug::none>},
    {"copy", copy_case<Bug::none>},
    {"cluster", cluster_case<Bug::none>},
    {"mail", mail_case<Bug::none>},
    {"team", team_case<Bug::none>},
    {"last", last_case<Bug::none>},
    {"early", early_case<Bug::none>},
};

constexpr Case kOther[] = {
    {"past_array", sum_case<Bug::past_array>},
    {"past_shared", sum_case<Bug::past_shared>},
    {"no_barrier", sum_case<Bug::no_barrier>},
    {"early_return", sum_case<Bug::early_return>},
    {"divergent_shuffle", sum_case<Bug::divergent_shuffle>},
    {"warp_synchronous", exchange_case<Bug::warp_synchronous>},
    {"shuffle_as_fence", exchange_case<Bug::shuffle_as_fence>},
    {"misaligned_load16", scale_case<float, Bug::misaligned_load16>},
    {"misaligned_cast", scale_case<float, Bug::misaligned_cast>},
    {"no_wait", copy_case<Bug::no_wait>},
    {"no_wait_between", copy_case<Bug::no_wait_between>},
    {"no_barrier_before_load", copy_case<Bug::no_barrier_before_load>},
    {"no_cluster_barrier", cluster_case<Bug::no_cluster_barrier>},
    {"peer_has_returned", cluster_case<Bug::peer_has_returned>},
    {"no_team_barrier", team_case<Bug::no_team_barrier>},
    {"counted_too_early", last_case<Bug::counted_too_early>},
    {"counted_without_fence", last_case<Bug::counted_without_fence>},
    {"flag_too_early", last_case<Bug::flag_too_early>},
    {"no_wait_for_launch", early_case<Bug::no_wait_for_launch>},
    {"some_wait_for_launch", early_case<Bug::some_wait_for_launch>},
    {"late_wait_for_launch", early_case<Bug::late_wait_for_launch>},
    {"no_wait_for_mail", mail_case<Bug::no_wait_for_mail>},
    {"mail_too_early", mail_case<Bug::mail_too_early>},
    {"wait_often", wait_often_case},
    {"widen_float16", widen_case<simt::float16>},
    {"widen_bfloat16", widen_case<simt::bfloat16>},
    {"narrow_float16", narrow_case<simt::float16>},
    {"narrow_bfloat16", narrow_case<simt::bfloat16>},
};

bool run(const Case& test) {
  if (test.run()) return true;
  std::fprintf(stderr, "%s: wrong result\n", test.name);
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  bool right = true;
  if (count == 1)
    for (const Case& test : kRight) right = run(test) && right;
  for (int i = 1; i < count; i++) {
    bool known = false;
    for (const Case& test : kOther)
      if (std::strcmp(test.name, arguments[i]) == 0) known = true, right = run(test) && right;
    if (!known) std::fprintf(stderr, "%s: no such case\n", arguments[i]), right = false;
  }
  return right ? 0 : 1;
}
