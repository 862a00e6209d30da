/// \file
/// What allocations.h counts, for the other files of a program.
#pragma once

#include <atomic>

namespace eigenformer_test {

inline std::atomic<long> allocation_count{0};

/// Calls of operator new while f runs, on all threads.
template <typename F>
long count_allocations(F&& f) {
  const long before = allocation_count.load();
  f();
  return allocation_count.load() - before;
}

}  // namespace eigenformer_test
