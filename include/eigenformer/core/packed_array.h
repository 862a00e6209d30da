/// \file
/// Memory of packed weights: 64-byte aligned; 2 MiB aligned, in huge pages where the system grants
/// them, from 4 MiB on.
#pragma once

#include <cstring>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "error.h"
#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// An array of uninitialised numbers that grows but does not shrink.
template <typename T>
class PackedArray {
 public:
  PackedArray() = default;
  PackedArray(const PackedArray& other) { *this = other; }
  PackedArray(PackedArray&& other) noexcept { swap(other); }
  PackedArray& operator=(const PackedArray& other) {
    if (this == &other) return *this;
    resize(other.size_);
    if (size_ > 0)
      std::memcpy(static_cast<void*>(data_), other.data_,
                  static_cast<std::size_t>(size_) * sizeof(T));
    return *this;
  }
  PackedArray& operator=(PackedArray&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PackedArray() { release(); }

  /// Contents are lost where it grows. Throws std::bad_alloc, and then keeps what it had.
  void resize(Index size) {
    if (size > capacity_) {
      if (static_cast<std::size_t>(size) > (~std::size_t{0} >> 1) / sizeof(T))
        detail::fail<std::bad_array_new_length>();
      const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
      const std::size_t alignment = bytes >= kHugeFrom ? kHugePage : 64;
      T* fresh = static_cast<T*>(::operator new(bytes, std::align_val_t{alignment}));
#if defined(__linux__)
      if (bytes >= kHugeFrom)
        madvise(fresh, bytes, MADV_HUGEPAGE);  // a hint: without it the bits are the same
#endif
      release();
      data_ = fresh;
      capacity_ = size;
      alignment_ = alignment;
    }
    size_ = size;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }
  Index capacity() const { return capacity_; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20, kHugeFrom = std::size_t{4} << 20;
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{alignment_});
    data_ = nullptr;
    size_ = capacity_ = 0;
  }
  void swap(PackedArray& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    std::swap(alignment_, other.alignment_);
  }
  T* data_ = nullptr;
  Index size_ = 0, capacity_ = 0;
  std::size_t alignment_ = 64;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
