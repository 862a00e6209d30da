/// \file
/// Counts calls of operator new, makes the n-th or the large ones fail, and holds a thread up in
/// its next one. Include it in one file of a program: it replaces the global operators.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <utility>

namespace eigenformer_test {

struct Allocations {
  static inline std::atomic<long> count{0};
  static inline std::atomic<long> fail_at{(std::numeric_limits<long>::max)()};
  static inline std::atomic<std::size_t> largest{(std::numeric_limits<std::size_t>::max)()};
  /// Called once, by the next allocation of this thread.
  static inline thread_local std::function<void()>* before_next = nullptr;

  static void* allocate(std::size_t bytes) {
    if (before_next != nullptr) (*std::exchange(before_next, nullptr))();
    if (++count >= fail_at || bytes > largest) throw std::bad_alloc();
    void* memory = std::malloc(bytes > 0 ? bytes : 1);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }

  /// What malloc gave stands in front of what the caller gets: not every platform has
  /// aligned_alloc.
  static void* allocate(std::size_t bytes, std::size_t alignment) {
    const std::size_t extra = alignment + sizeof(void*);
    if (bytes > (std::numeric_limits<std::size_t>::max)() - extra) throw std::bad_alloc();
    void* memory = allocate(bytes + extra);
    const auto begin = reinterpret_cast<std::uintptr_t>(memory) + sizeof(void*);
    void* aligned = reinterpret_cast<void*>((begin + alignment - 1) / alignment * alignment);
    static_cast<void**>(aligned)[-1] = memory;
    return aligned;
  }
  static void free_aligned(void* memory) {
    if (memory != nullptr) std::free(static_cast<void**>(memory)[-1]);
  }
};

/// Calls of operator new while f runs.
template <typename F>
long count_allocations(F&& f) {
  const long before = Allocations::count;
  f();
  return Allocations::count - before;
}

/// While it lives, memory suffices for no allocation above so many bytes.
class ScarceMemory {
 public:
  explicit ScarceMemory(std::size_t largest) { Allocations::largest = largest; }
  ~ScarceMemory() { Allocations::largest = (std::numeric_limits<std::size_t>::max)(); }
  ScarceMemory(const ScarceMemory&) = delete;
  ScarceMemory& operator=(const ScarceMemory&) = delete;
};

/// Runs f once with each of its allocations failing in turn, until it gets through; after every
/// failure calls check(). Returns how many failures there were. Any other exception of f passes
/// through.
template <typename F, typename Check>
int with_failing_allocations(F&& f, Check&& check) {
  struct Fail {  // one allocation, also where f throws something else
    explicit Fail(int nth) { Allocations::fail_at = Allocations::count + nth; }
    ~Fail() { Allocations::fail_at = (std::numeric_limits<long>::max)(); }
    Fail(const Fail&) = delete;
    Fail& operator=(const Fail&) = delete;
  };
  for (int failures = 0;; ++failures) {
    try {
      const Fail one(failures + 1);
      f();
      return failures;
    } catch (const std::bad_alloc&) {
    }
    check();
  }
}

}  // namespace eigenformer_test

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // these are the operators themselves
#endif
void* operator new(std::size_t bytes) { return eigenformer_test::Allocations::allocate(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return eigenformer_test::Allocations::allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept {
  eigenformer_test::Allocations::free_aligned(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  eigenformer_test::Allocations::free_aligned(memory);
}
