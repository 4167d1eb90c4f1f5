// Runs the residual tail's CUDA kernels on the CPU: calls from stdin, their results to stdout, in
// the order below; test_cuda_tail.py writes the one and reads the other.
#include "cuda/plan/tail.cpp"
#include "cuda/plan/cache.cpp"
#include "cuda/plan/choose.cpp"
#include "cuda/plan/maps.cpp"
#include "cuda/plan/onchip.cpp"
#include "cuda/plan/plan.cpp"
#include "cuda/plan/tile.cpp"
#include "cuda/tail/launch.cuh"
#include "requests.h"

namespace {

// Sanitizers make compiling so slow that two storage types have to do.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
template <class T>
constexpr bool kThere = std::is_same_v<T, simt::float16> || std::is_same_v<T, float>;
#else
template <class T>
constexpr bool kThere = true;
#endif

// The norm, after the call.
struct NormHeader {
  int64_t batch;     // its statistics are the batch's; else they follow
  int64_t affine;    // it has a weight and a bias
  int64_t wide;      // all that it has is float32
  int64_t shortcut;  // the tail has one
  double eps;
};

template <class T>
void call(const Header& header, const Wish& wish, const Problem& p) {
  using A = accumulate_t<T>;
  NormHeader of_norm;
  if (!get(&of_norm, sizeof of_norm)) std::exit(2);
  const bool batch = of_norm.batch, affine = of_norm.affine, wide = of_norm.wide;
  const bool with_shortcut = of_norm.shortcut;
  const TailPlan plan =
      tail_plan(p, {batch, with_shortcut}, device_of(header), header.aligned, wish.limits);
  const Given given(header, p, sizeof(T));
  const size_t norm_bytes = p.c * (wide ? sizeof(float) : sizeof(T));
  Buffer<unsigned char> weight(affine * norm_bytes), bias(weight.size()), d_weight(weight.size()),
      d_bias(weight.size()), mean(!batch * norm_bytes), var(mean.size());
  for (auto* values : {&weight, &bias, &mean, &var})
    if (!get(values->data(), values->bytes())) std::exit(2);
  Buffer<A> new_mean(batch * p.c), new_var(new_mean.size());
  Buffer<unsigned char> running_mean(batch * norm_bytes), running_var(running_mean.size());
  std::memset(running_mean.data(), 0, running_mean.bytes());
  std::memset(running_var.data(), 0, running_var.bytes());
  Buffer<int64_t> batches(batch);

  TailPointers at{};
  at.parameters = given.parameters, at.gradients = given.gradients, at.wide = header.wide;
  at.batch = batch, at.eps = of_norm.eps;
  at.weight = {affine ? weight.data() : nullptr, wide};
  at.bias = {affine ? bias.data() : nullptr, wide};
  if (!batch) at.mean = {mean.data(), wide}, at.var = {var.data(), wide};

  const int64_t image = p.c * p.pixels();
  Tensor<T> u(header, image), shortcut(header, image), dout(header, image), out(header, image),
      du(header, image), d_shortcut(header, image);
  u.read();
  if (with_shortcut) shortcut.read();
  dout.read();
  const bool far = header.far > 0;
  Array<A> channel_mean(p.spatial() ? p.n * p.pixels() : 0, far);
  Array<A> pooled(p.channel() ? p.n * p.c : 0, far);
  at.u = u.data();
  at.channel_mean = channel_mean.data(), at.pooled = pooled.data();
  const auto run = [&](Way way) {
    Array<A> workspace(plan[way].workspace.elements, far);
    at.workspace = workspace.data();
    require(da::cuda::detail::run_tail_steps<T>(p, plan, way, at));
    simt::host::synchronize();
  };
  at.shortcut = with_shortcut ? shortcut.data() : nullptr, at.result = out.data();
  if (batch) {
    at.new_mean = new_mean.data(), at.new_var = new_var.data();
    at.running_mean = {running_mean.data(), wide}, at.running_var = {running_var.data(), wide};
    at.momentum = 0.25;
    batches[0] = 41, at.batches = batches.data();
  }
  run(Way::forward);
  at.new_mean = at.new_var = nullptr;
  if (batch) {
    constexpr bool is_wide = !std::is_same_v<A, T>;
    at.mean = {new_mean.data(), is_wide}, at.var = {new_var.data(), is_wide};
  }
  at.dout = dout.data(), at.shortcut = nullptr, at.result = du.data();
  // Without a shortcut the two are null, and whoever touches them comes to grief.
  if (with_shortcut) at.out = out.data(), at.d_shortcut = d_shortcut.data();
  at.d_weight = affine ? d_weight.data() : nullptr, at.d_bias = affine ? d_bias.data() : nullptr;
  run(Way::backward);

  out.write(), du.write();
  if (with_shortcut) d_shortcut.write();
  for (auto* values : {&d_weight, &d_bias}) put_out(values->data(), values->bytes());
  for (auto* values : {&new_mean, &new_var}) put_out(values->data(), values->bytes());
  for (auto* values : {&running_mean, &running_var}) put_out(values->data(), values->bytes());
  put_out(batches.data(), batches.bytes());
  given.write();
}

}  // namespace

int main() {
  return answer_all([](const Header& header, const Wish& wish, const Problem& p, auto of) {
    if constexpr (kThere<decltype(of)>)
      call<decltype(of)>(header, wish, p);
    else
      std::exit(5);
  });
}
