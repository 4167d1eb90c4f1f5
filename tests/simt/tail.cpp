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

// A norm, after the call, and the shortcut's after it.
struct NormHeader {
  int64_t batch;   // its statistics are the batch's; else they follow
  int64_t affine;  // it has a weight and a bias
  int64_t wide;    // all that it has is float32
  double eps;
};
struct TailHeader {
  NormHeader norm;
  int64_t shortcut;       // the tail has one
  int64_t shortcut_norm;  // which goes through a norm
  NormHeader of_shortcut;
};

// A norm's numbers, and room for those that come of it.
template <class T>
struct GivenNorm {
  using A = accumulate_t<T>;
  NormHeader of;
  size_t given, taken;  // bytes of parameters, of statistics
  Buffer<unsigned char> weight, bias, d_weight, d_bias, mean, var, running_mean, running_var;
  Buffer<A> new_mean, new_var;
  Buffer<int64_t> batches;

  GivenNorm(const NormHeader& of, int64_t channels)
      : of(of),
        given(channels * (of.wide ? sizeof(float) : sizeof(T))),
        taken(of.batch ? given : 0),
        weight(of.affine ? given : 0),
        bias(weight.size()),
        d_weight(weight.size()),
        d_bias(weight.size()),
        mean(given - taken),
        var(mean.size()),
        running_mean(taken),
        running_var(taken),
        new_mean(of.batch * channels),
        new_var(new_mean.size()),
        batches(of.batch) {
    for (auto* values : {&weight, &bias, &mean, &var})
      if (!get(values->data(), values->bytes())) std::exit(2);
    std::memset(running_mean.data(), 0, running_mean.bytes());
    std::memset(running_var.data(), 0, running_var.bytes());
  }
  // With the batch's statistics once they are made.
  NormArgs args(bool made) {
    const bool wide = of.wide, affine = of.affine;
    NormArgs norm{{affine ? weight.data() : nullptr, wide},
                  {affine ? bias.data() : nullptr, wide},
                  {mean.data(), wide},
                  {var.data(), wide},
                  of.eps};
    if (!of.batch) return norm;
    constexpr bool is_wide = !std::is_same_v<A, T>;
    norm.mean = {made ? new_mean.data() : nullptr, is_wide};
    norm.var = {made ? new_var.data() : nullptr, is_wide};
    return norm;
  }
  void make_statistics(TailPointers& at) {
    if (!of.batch) return;
    at.new_mean = new_mean.data(), at.new_var = new_var.data();
    at.running_mean = {running_mean.data(), bool(of.wide)};
    at.running_var = {running_var.data(), bool(of.wide)};
    at.momentum = 0.25;
    batches[0] = 41, at.batches = batches.data();
  }
  void write() {
    for (auto* values : {&d_weight, &d_bias}) put_out(values->data(), values->bytes());
    for (auto* values : {&new_mean, &new_var}) put_out(values->data(), values->bytes());
    for (auto* values : {&running_mean, &running_var}) put_out(values->data(), values->bytes());
    put_out(batches.data(), batches.bytes());
  }
};

template <class T>
void call(const Header& header, const Wish& wish, const Problem& p) {
  using A = accumulate_t<T>;
  TailHeader of;
  if (!get(&of, sizeof of)) std::exit(2);
  const bool with_shortcut = of.shortcut, normed = of.shortcut_norm;
  const TailKind kind{of.norm.batch != 0, with_shortcut, normed, of.of_shortcut.batch != 0, false};
  const TailPlan plan = tail_plan(p, kind, device_of(header), header.aligned, wish.limits);
  const Given given(header, p, sizeof(T));
  GivenNorm<T> norm(of.norm, p.c), of_shortcut(of.of_shortcut, normed ? p.c : 0);

  const int64_t image = p.c * p.pixels();
  Tensor<T> u(header, image), shortcut(header, image), dout(header, image), out(header, image),
      du(header, image), d(header, image), d_shortcut(header, image);
  u.read();
  if (with_shortcut) shortcut.read();
  dout.read();
  const bool far = header.far > 0;
  Array<A> channel_mean(p.spatial() ? p.n * p.pixels() : 0, far);
  Array<A> pooled(p.channel() ? p.n * p.c : 0, far);
  const auto run = [&](const Problem& p, const TailPlan& plan, Way way, TailPointers at) {
    Array<A> workspace(plan[way].workspace.elements, far);
    at.workspace = workspace.data();
    require(da::cuda::detail::run_tail_steps<T>(p, plan, way, at));
    simt::host::synchronize();
  };
  if (normed && of.of_shortcut.batch) {
    TailPointers at{};
    at.u = shortcut.data(), at.batch = true;
    of_shortcut.make_statistics(at);
    Problem alone = p;
    alone.order = Order::none;
    run(alone,
        tail_plan(alone, {true, false, false, false, true}, device_of(header), header.aligned,
                  wish.limits),
        Way::forward, at);
  }

  TailPointers at{};
  at.parameters = given.parameters, at.gradients = given.gradients, at.wide = header.wide;
  at.u = u.data(), at.batch = of.norm.batch;
  at.channel_mean = channel_mean.data(), at.pooled = pooled.data();
  if (normed) at.shortcut_norm = of_shortcut.args(true);
  TailPointers forward = at;
  forward.shortcut = with_shortcut ? shortcut.data() : nullptr, forward.result = out.data();
  forward.norm = norm.args(false);
  norm.make_statistics(forward);
  run(p, plan, Way::forward, forward);

  at.norm = norm.args(true);
  at.dout = dout.data(), at.result = du.data();
  // Without a shortcut these are null, and whoever touches them comes to grief.
  if (with_shortcut) at.out = out.data(), at.d = d.data();
  Tensor<T>& last = normed && !plan.in_place() ? d_shortcut : d;
  if (normed) {
    at.shortcut = shortcut.data(), at.d_shortcut = last.data();
    at.shortcut_batch = of.of_shortcut.batch;
  }
  const auto wanted = [](const NormHeader& of, auto& gradient) {
    return of.affine ? gradient.data() : nullptr;
  };
  at.d_weight = wanted(of.norm, norm.d_weight), at.d_bias = wanted(of.norm, norm.d_bias);
  at.d_shortcut_weight = wanted(of.of_shortcut, of_shortcut.d_weight);
  at.d_shortcut_bias = wanted(of.of_shortcut, of_shortcut.d_bias);
  run(p, plan, Way::backward, at);

  out.write(), du.write();
  if (with_shortcut) last.write();
  norm.write(), of_shortcut.write();
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
