/// \file
/// Where a decoder's time goes: seconds and calls by operator.
#pragma once

#include <array>
#include <chrono>
#include <string_view>

#include "../core/isa.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Adds up wall time by operator name. One object belongs to one thread; a decoder given none
/// measures nothing.
class OperatorProfile {
 public:
  struct Entry {
    std::string_view name;
    double seconds = 0;
    long calls = 0;
  };

  void add(std::string_view name, double seconds) {
    for (Entry& entry : entries_)
      if (entry.name == name || entry.calls == 0) {
        entry.name = name;
        entry.seconds += seconds;
        ++entry.calls;
        return;
      }
  }

  /// Entries in the order of first use; those with no calls come last.
  const std::array<Entry, 32>& entries() const { return entries_; }

  double total_seconds() const {
    double total = 0;
    for (const Entry& entry : entries_) total += entry.seconds;
    return total;
  }

  /// Runs `call` and charges its time to `name`; names must outlive the profile (string literals
  /// do).
  template <typename Call>
  static decltype(auto) timed(OperatorProfile* profile, std::string_view name, Call&& call) {
    struct Timer {
      OperatorProfile* profile;
      std::string_view name;
      std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
      ~Timer() {
        if (profile != nullptr)
          profile->add(
              name,
              std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      }
    } timer{profile, name};
    return call();
  }

 private:
  std::array<Entry, 32> entries_{};
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
