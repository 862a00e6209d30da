/// \file
/// Where data lies. The memory of a backend is a constant table of functions; whoever owns data
/// (packed weights, the pages of caches, the state of optimizers, scratch) takes it from such a
/// table and gives it back there. The host's is here, a GPU's in cuda/memory.cuh; memory_of(device)
/// (core/dispatch.h) is the one that the kernels of a device work on.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// The memory of a backend. A program may have tables of its own (memory that counts, that is
/// shared or pinned): under the name of a backend whose kernels can work on it, it stands wherever
/// that backend's does. A table outlives what was allocated from it.
struct Memory {
  std::string_view backend;  ///< whose kernels work on it: "cpu", "cuda"
  /// `bytes`, more than 0, at a multiple of `alignment`: 64, or 2 MiB, which asks for huge pages
  /// and is a hint. Throws where there is no more memory.
  void* (*allocate)(std::size_t bytes, std::size_t alignment);
  /// With the bytes and the alignment that it was allocated with.
  void (*release)(void* data, std::size_t bytes, std::size_t alignment) noexcept;
  /// Within this memory, into it from the host's, and out of it into the host's. Whoever calls may
  /// use either side as soon as they return. 0 bytes are nothing, wherever they lie.
  void (*copy)(void* to, const void* from, std::size_t bytes);
  void (*copy_in)(void* to, const void* from, std::size_t bytes);
  void (*copy_out)(void* to, const void* from, std::size_t bytes);
  void (*clear)(void* data, std::size_t bytes);  ///< zeros
};

namespace detail {

inline constexpr std::size_t kAlignment = 64, kHugePage = std::size_t{2} << 20,
                             kHugeFrom = kHugePage;

inline void* allocate_on_host(std::size_t bytes, std::size_t alignment) {
  void* const data = ::operator new(bytes, std::align_val_t{alignment});
#if defined(__linux__)
  if (alignment >= kHugePage)
    madvise(data, bytes, MADV_HUGEPAGE);  // a hint: without it the bits are the same
#endif
  return data;
}
inline void release_on_host(void* data, std::size_t, std::size_t alignment) noexcept {
  ::operator delete(data, std::align_val_t{alignment});
}
/// Pages of the heap between blocks that stay, which glibc keeps for later blocks, go back to the
/// system: a hint, where work that took more memory than stays is done.
inline void give_back_free_pages() noexcept {
#if defined(__GLIBC__)
  ::malloc_trim(0);
#endif
}
inline void copy_on_host(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void clear_on_host(void* data, std::size_t bytes) {
  if (bytes > 0) std::memset(data, 0, bytes);
}

}  // namespace detail

inline constexpr Memory host_memory{"cpu",
                                    detail::allocate_on_host,
                                    detail::release_on_host,
                                    detail::copy_on_host,
                                    detail::copy_on_host,
                                    detail::copy_on_host,
                                    detail::clear_on_host};

namespace detail {

/// From one memory to another, one of which is the host's, or within one.
inline void copy_bytes(const Memory& to_memory, void* to, const Memory& from_memory,
                       const void* from, std::size_t bytes) {
  if (from_memory.backend == host_memory.backend)
    to_memory.copy_in(to, from, bytes);
  else if (to_memory.backend == host_memory.backend)
    from_memory.copy_out(to, from, bytes);
  else
    to_memory.copy(to, from, bytes);
}

/// Where large data lies that kernels stream: in pages of 4 KiB, or from 2 MiB on in huge ones.
enum class Pages { usual, huge };

/// Uninitialised bytes of a memory, aligned to 64 bytes, huge pages to 2 MiB. What was moved from
/// has none.
class MemoryBlock {
 public:
  MemoryBlock() = default;
  /// Throws what the memory does, std::bad_alloc on the host.
  explicit MemoryBlock(std::size_t bytes, const Memory& memory = host_memory,
                       Pages pages = Pages::usual)
      : memory_(&memory),
        size_(bytes),
        alignment_(pages == Pages::huge && bytes >= kHugeFrom ? kHugePage : kAlignment) {
    if (bytes > 0) data_ = static_cast<std::byte*>(memory.allocate(bytes, alignment_));
  }
  MemoryBlock(MemoryBlock&& other) noexcept { swap(other); }
  MemoryBlock& operator=(MemoryBlock&& other) noexcept {
    MemoryBlock(std::move(other)).swap(*this);
    return *this;
  }
  ~MemoryBlock() {
    if (data_ != nullptr) memory_->release(data_, size_, alignment_);
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  const Memory& memory() const { return *memory_; }

  void swap(MemoryBlock& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(alignment_, other.alignment_);
  }

 private:
  const Memory* memory_ = &host_memory;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0, alignment_ = kAlignment;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
