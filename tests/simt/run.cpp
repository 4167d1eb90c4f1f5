// Runs the CUDA backend on the CPU: calls from stdin, their results to stdout, in the order
// below; calls.py and tails.py write the one and read the other.
#include "cuda/launch.cuh"
#include "cuda/plan/cache.cpp"
#include "cuda/plan/choose.cpp"
#include "cuda/plan/maps.cpp"
#include "cuda/plan/onchip.cpp"
#include "cuda/plan/plan.cpp"
#include "cuda/plan/tile.cpp"
#include "requests.h"

namespace da::cuda {
DA_LAUNCHERS(template, Dtype::float16)
DA_LAUNCHERS(template, Dtype::bfloat16)
DA_LAUNCHERS(template, Dtype::float32)
DA_LAUNCHERS(template, Dtype::float64)
}  // namespace da::cuda

namespace {

Direction direction_on_chip(const Header& header, const Wish& wish, const Problem& p, Way way) {
  OnChip chip = on_chip(p, way, header.aligned, wish.barrier, std::max(wish.blocks, 1),
                        int64_t(1) << 30, wish.limits);
  if (chip.refused) {
    std::fprintf(stderr, "refused: %s\n", chip.refused);
    std::exit(5);
  }
  chip.images_at_once = header.images_at_once;
  return on_chip_direction(p, chip, wish.limits);
}

Plan plan_of(const Header& header, const Wish& wish, const Problem& p) {
  Plan plan = da::cuda::plan(p, device_of(header), header.aligned, wish.limits);
  if (wish.kind == Wish::Kind::exact) {
    plan.forward = direction_on_chip(header, wish, p, Way::forward);
    plan.backward = direction_on_chip(header, wish, p, Way::backward);
  }
  return plan;
}

template <class T>
void call(const Header& header, const Wish& wish, const Problem& p) {
  using A = accumulate_t<T>;
  const Plan plan = plan_of(header, wish, p);
  const Given given(header, p, sizeof(T));
  Pointers at{};
  at.parameters = given.parameters, at.gradients = given.gradients;
  at.wide = header.wide;

  const int64_t image = p.c * p.pixels();
  const bool far = header.far > 0;
  Tensor<T> x(header, image), dy(header, image), y(header, image), dx(header, image);
  x.read();
  dy.read();
  Array<A> channel_mean(p.spatial() ? p.n * p.pixels() : 0, far);
  Array<A> pooled(p.channel() ? p.n * p.c : 0, far);
  at.x = x.data(), at.dy = dy.data();
  at.channel_mean = channel_mean.data(), at.pooled = pooled.data();
  for (Way way : {Way::forward, Way::backward}) {
    Array<A> workspace(plan[way].workspace.elements, far);
    at.out = way == Way::forward ? y.data() : dx.data();
    at.workspace = workspace.data();
    require(run(p, plan, way, at));
    simt::host::synchronize();
  }
  y.write();
  dx.write();
  given.write();
}

}  // namespace

int main() {
  return answer_all([](const Header& header, const Wish& wish, const Problem& p, auto of) {
    call<decltype(of)>(header, wish, p);
  });
}
