// Plans that were measured: by call, in place of what a planner would choose. Each library has a
// table of its own, which Python fills through an operator; da_ops/backends/tuned.py says from
// what.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <tuple>
#include <utility>

#include "problem.h"

namespace da {

// `Plan` is what a backend's planner makes of the text of a plan. A plan serves the calls of one
// place: a device or a number of threads, as the backend's text says it.
template <class Plan>
class TunedPlans {
 public:
  // Whether there is any plan: all that a call pays for where nothing was tuned.
  bool any() const { return any_.load(std::memory_order_relaxed); }

  std::optional<Plan> find(const Problem& p, bool backward, const std::string& place) const {
    const std::shared_lock lock(mutex_);
    const auto found = plans_.find(key(p, backward, place));
    return found == plans_.end() ? std::nullopt : std::optional<Plan>(found->second);
  }

  // No plan: from here on the planner chooses.
  void set(const Problem& p, bool backward, const std::string& place, std::optional<Plan> plan) {
    const std::unique_lock lock(mutex_);
    if (plan)
      plans_.insert_or_assign(key(p, backward, place), *std::move(plan));
    else
      plans_.erase(key(p, backward, place));
    any_.store(!plans_.empty(), std::memory_order_relaxed);
  }

 private:
  // Not the size of an eca gate, which shows in no pass over x.
  using Key =
      std::tuple<int64_t, int64_t, int64_t, int64_t, bool, Dtype, Order, Gate, bool, std::string>;

  static Key key(const Problem& p, bool backward, const std::string& place) {
    return {p.n, p.c, p.h, p.w, p.channels_last, p.dtype, p.order, p.gate, backward, place};
  }

  std::atomic<bool> any_{false};
  mutable std::shared_mutex mutex_;
  std::map<Key, Plan> plans_;
};

}  // namespace da
