/// \file
/// What a kernel did wrong, as the emulated block found out: an exception that leaves the launch,
/// with the kernel, the block, the threads and the lines.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace eigenformer_test::emulated {

using Where = std::source_location;

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// "sampling.cuh:120"
inline std::string text_of(const Where& where) {
  const std::string_view file = where.file_name();
  const std::size_t slash = file.rfind('/');
  return std::string(slash == file.npos ? file : file.substr(slash + 1)) + ":" +
         std::to_string(where.line());
}

inline bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::string_view(a.file_name()) == b.file_name();
}

/// "threads 0-3, 7" of increasing numbers.
inline std::string list_of(const char* one, const std::vector<int>& numbers) {
  std::string text = std::string(one) + (numbers.size() == 1 ? " " : "s ");
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    if (i > 0) text += ", ";
    text += std::to_string(numbers[i]);
    if (last > i) text += "-" + std::to_string(numbers[last]);
    i = last + 1;
  }
  return text;
}

}  // namespace eigenformer_test::emulated
