/// \file
/// Counts calls of operator new, and makes the n-th of them fail. Include it in one file of a program: it replaces the global
/// operators.
#pragma once

#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>

namespace eigenformer_test {

struct Allocations {
  static inline std::atomic<long> count{0};
  static inline std::atomic<long> fail_at{std::numeric_limits<long>::max()};

  static void* allocate(std::size_t bytes, std::size_t alignment) {
    if (++count >= fail_at) throw std::bad_alloc();
    void* memory = std::aligned_alloc(
        alignment, (bytes + alignment - 1) / alignment * alignment + (bytes == 0 ? alignment : 0));
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }
};

/// Calls of operator new while f runs.
template <typename F>
long count_allocations(F&& f) {
  const long before = Allocations::count;
  f();
  return Allocations::count - before;
}

/// Runs f once with each of its allocations failing in turn, until it gets through; after every failure calls check(). Returns how
/// many failures there were.
template <typename F, typename Check>
int with_failing_allocations(F&& f, Check&& check) {
  for (int failures = 0;; ++failures) {
    Allocations::fail_at = Allocations::count + failures + 1;
    try {
      f();
      Allocations::fail_at = std::numeric_limits<long>::max();
      return failures;
    } catch (const std::bad_alloc&) {
      Allocations::fail_at = std::numeric_limits<long>::max();
    }
    check();
  }
}

}  // namespace eigenformer_test

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // these are the operators themselves
#endif
void* operator new(std::size_t bytes) {
  return eigenformer_test::Allocations::allocate(bytes, alignof(std::max_align_t));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return eigenformer_test::Allocations::allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
