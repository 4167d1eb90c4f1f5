#include "cuda/plan/cache.h"

namespace da::cuda {
namespace {

unsigned touched(const Step& step) { return step.pass.reads | step.pass.writes; }

// The share of all q in [0, 1] for which at_zero + more * q is no more than the limit.
double share_within(double limit, double at_zero, double more) {
  if (more == 0) return at_zero <= limit ? 1 : 0;
  const double edge = std::clamp((limit - at_zero) / more, 0.0, 1.0);
  return more > 0 ? edge : 1 - edge;
}

// The share of a tensor that `now` finds where `before` was the last to touch it and others were
// touched in `between`. A line is there if what was touched since its last use, the most recent
// first, has had room beside it. At the part q of its way `now` finds what `before` met at 1 - q of
// its own, if they go in opposite directions, or at q.
double share_found(const Step& before, unsigned between, const Step& now, double room) {
  const unsigned first = touched(before) & ~between, second = touched(now) & ~between;
  const int both = count(first & second), all = count(first | second);
  if (before.backwards != now.backwards) return share_within(room, count(between), all);
  const int only_first = count(first & ~second), only_second = count(second & ~first);
  return share_within(room, count(between) + both + only_first, only_second - only_first);
}

}  // namespace

int64_t expected_in_l2(const Problem& p, const Device& device, const Direction& direction,
                       const Step& step) {
  const Step* const first = direction.steps.data();
  const double room = usable_l2(device) / double(std::max<int64_t>(p.bytes(), 1));  // in tensors
  double found = 0;
  for (unsigned tensor = 1; tensor <= step.pass.reads; tensor <<= 1) {
    if (!(step.pass.reads & tensor)) continue;
    unsigned between = kNothing;
    for (const Step* before = &step; before > first;) {
      if (touched(*--before) & tensor) {
        found += share_found(*before, between, step, room);
        break;
      }
      between |= touched(*before);
    }
  }
  return static_cast<int64_t>(found * double(p.bytes()));
}

}  // namespace da::cuda
