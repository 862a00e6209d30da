/// \file
/// Counts heap allocations of the whole test program. Include in one source file of a test: it replaces the global operators new.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

namespace eigenformer_test {

inline std::atomic<long> allocation_count{0};

/// Allocations while f runs.
template <typename F>
long allocations_in(F&& f) {
  const long before = allocation_count.load();
  f();
  return allocation_count.load() - before;
}

inline void* counted_allocation(std::size_t bytes, std::size_t alignment) {
  allocation_count.fetch_add(1);
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment + (bytes == 0 ? alignment : 0));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace eigenformer_test

void* operator new(std::size_t bytes) { return eigenformer_test::counted_allocation(bytes, alignof(std::max_align_t)); }
void* operator new[](std::size_t bytes) { return eigenformer_test::counted_allocation(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return eigenformer_test::counted_allocation(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return eigenformer_test::counted_allocation(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
