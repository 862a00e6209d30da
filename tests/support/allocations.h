/// \file
/// Counts calls of operator new, to prove that a call allocates nothing. Replaces the global
/// operators: include it in one file of a program.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

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

// Not inlined: g++ 12 would see malloc meet a delete, or a new meet free, and warn
// (-Wmismatched-new-delete).
#define EIGENFORMER_TEST_NOINLINE __attribute__((noinline))
EIGENFORMER_TEST_NOINLINE void* operator new(std::size_t bytes) {
  ++eigenformer_test::allocation_count;
  if (void* p = std::malloc(bytes > 0 ? bytes : 1)) return p;
  throw std::bad_alloc();
}
EIGENFORMER_TEST_NOINLINE void* operator new(std::size_t bytes, std::align_val_t alignment) {
  ++eigenformer_test::allocation_count;
  const std::size_t align = static_cast<std::size_t>(alignment);
  if (void* p = std::aligned_alloc(align, (bytes + align - 1) / align * align)) return p;
  throw std::bad_alloc();
}
// std::stable_sort asks for its buffer in this way.
EIGENFORMER_TEST_NOINLINE void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++eigenformer_test::allocation_count;
  return std::malloc(bytes > 0 ? bytes : 1);
}
EIGENFORMER_TEST_NOINLINE void operator delete(void* p) noexcept { std::free(p); }
EIGENFORMER_TEST_NOINLINE void operator delete(void* p, std::size_t) noexcept { std::free(p); }
EIGENFORMER_TEST_NOINLINE void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
EIGENFORMER_TEST_NOINLINE void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  std::free(p);
}
