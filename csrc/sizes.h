// Sizes at which a planner turns from one way to another, as a text sets them: "name=number,...".
// They suit the machine by themselves; tests set them, so that a small tensor meets every way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace da {

struct Limit {
  const char* name;
  int64_t* value;
  int64_t least;
};

// False where the text names none of these limits, or no number that the limit may have. An empty
// text changes nothing.
inline bool parse(const std::string& text, std::initializer_list<Limit> limits) {
  constexpr size_t kDigits = 15;  // at most, so that sums and products fit 64 bits
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    const size_t equals = item.find('=');
    if (equals == std::string::npos || end + 1 == text.size()) return false;
    const std::string digits = item.substr(equals + 1);
    if (digits.empty() || digits.size() > kDigits ||
        digits.find_first_not_of("0123456789") != std::string::npos)
      return false;
    const int64_t number = std::stoll(digits);
    bool known = false;
    for (const Limit& limit : limits)
      if (item.compare(0, equals, limit.name) == 0 && number >= limit.least)
        known = true, *limit.value = number;
    if (!known) return false;
    begin = end + 1;
  }
  return true;
}

}  // namespace da
