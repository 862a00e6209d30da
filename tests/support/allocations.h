/// \file
/// Counts calls of operator new, to prove that a call allocates nothing. Replaces the global
/// operators: include it in one file of a program, and allocation_count.h in the others.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "allocation_count.h"

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
