/// \file
/// Memory of packed weights: an array in the memory of a backend, in huge pages where it is large.
#pragma once

#include <memory>
#include <utility>

#include "error.h"
#include "memory.h"
#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// An array of uninitialised numbers that grows but does not shrink, or a view of such numbers in
/// memory of the host that is only read (a mapped file). A copy lies in the memory that the
/// original lies in, and is its own.
template <typename T>
class PackedArray {
 public:
  PackedArray() = default;
  PackedArray(const PackedArray& other) { *this = other; }
  PackedArray(PackedArray&& other) noexcept { swap(other); }
  PackedArray& operator=(const PackedArray& other) {
    if (this == &other) return *this;
    resize(other.size_, other.memory());
    memory().copy(data(), other.data(), static_cast<std::size_t>(size_) * sizeof(T));
    return *this;
  }
  PackedArray& operator=(PackedArray&& other) noexcept {
    swap(other);
    return *this;
  }

  /// A view of numbers that `owner` keeps where they are.
  static PackedArray view(const T* numbers, Index size, std::shared_ptr<const void> owner) {
    PackedArray result;
    result.viewed_ = numbers;
    result.size_ = size;
    result.owner_ = std::move(owner);
    return result;
  }

  /// Contents are lost where it grows, or goes into another memory. Throws std::bad_alloc, and then
  /// keeps what it had.
  void resize(Index size, const Memory& memory = host_memory) {
    if (!has_room(size, memory)) {
      if (static_cast<std::size_t>(size) > (~std::size_t{0} >> 1) / sizeof(T))
        detail::fail<std::bad_array_new_length>();
      block_ = MemoryBlock(static_cast<std::size_t>(size) * sizeof(T), memory, Pages::huge);
      viewed_ = nullptr;
      owner_.reset();
    }
    size_ = size;
  }
  /// Whether resize allocates nothing.
  bool has_room(Index size, const Memory& memory) const {
    return viewed_ == nullptr && &block_.memory() == &memory &&
           static_cast<std::size_t>(size) <= block_.size() / sizeof(T);
  }
  /// Of a view, nothing may be written to it.
  T* data() { return const_cast<T*>(std::as_const(*this).data()); }
  const T* data() const {
    return viewed_ != nullptr ? viewed_ : reinterpret_cast<const T*>(block_.data());
  }
  Index size() const { return size_; }
  const Memory& memory() const { return block_.memory(); }

 private:
  void swap(PackedArray& other) noexcept {
    block_.swap(other.block_);
    std::swap(size_, other.size_);
    std::swap(viewed_, other.viewed_);
    owner_.swap(other.owner_);
  }
  MemoryBlock block_;
  const T* viewed_ = nullptr;
  std::shared_ptr<const void> owner_;  // of what is viewed
  Index size_ = 0;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
