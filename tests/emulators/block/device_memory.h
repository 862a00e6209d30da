/// \file
/// Memory of the emulated device: pages that host code can neither read nor write. They open while
/// a kernel runs or a copy is made, and close after it; who touches them otherwise stops at that
/// line with SIGSEGV. After each block, up to 15 bytes of alignment, comes a page that nobody may
/// touch: a kernel that does is a fault of its launch. New memory is NaN.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>

namespace eigenformer_test::emulated {

class DeviceMemory {
 public:
  static DeviceMemory& instance() {
    static DeviceMemory memory;
    return memory;
  }

  void* allocate(std::size_t bytes) {
    const std::size_t used = (bytes + page_ - 1) / page_ * page_, size = used + page_;
    void* const pages = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    auto* const begin = static_cast<std::byte*>(pages);
    std::memset(begin, 0xff, used);
    std::byte* const result = begin + used - (bytes + 15) / 16 * 16;
    const std::lock_guard lock(mutex_);
    mprotect(begin + used, page_, PROT_NONE);
    if (open_ == 0) mprotect(begin, used, PROT_NONE);
    blocks_.emplace(result, Pages{begin, used, bytes});
    ++allocations_;
    return result;
  }
  /// How often there was one: a test that took none has tested another device.
  std::uint64_t allocations() {
    const std::lock_guard lock(mutex_);
    return allocations_;
  }
  void deallocate(void* block) noexcept {
    if (block == nullptr) return;
    const std::lock_guard lock(mutex_);
    const auto found = blocks_.find(static_cast<std::byte*>(block));
    if (found == blocks_.end()) return;
    munmap(found->second.begin, found->second.used + page_);
    blocks_.erase(found);
  }

  /// Whether all of these bytes are of one block.
  bool holds(const void* first, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto* at = static_cast<const std::byte*>(first);
    auto found = blocks_.upper_bound(const_cast<std::byte*>(at));
    if (found == blocks_.begin()) return bytes == 0;
    --found;
    return at + bytes <= found->first + found->second.bytes;
  }

  /// "12 bytes past the end of 400 bytes of device memory", of an address that nobody may touch.
  std::string describe(const void* address) {
    const std::lock_guard lock(mutex_);
    const auto* at = static_cast<const std::byte*>(address);
    for (const auto& [block, pages] : blocks_)
      if (at >= pages.begin && at < pages.begin + pages.used + page_)
        return std::to_string(at - block - static_cast<std::ptrdiff_t>(pages.bytes)) +
               " bytes past the end of " + std::to_string(pages.bytes) + " bytes of device memory";
    return "an address that is nobody's memory";
  }

  /// Opens all blocks while it lives; on whatever threads, together.
  class Opened {
   public:
    Opened() { instance().change(+1); }
    ~Opened() { instance().change(-1); }
    Opened(const Opened&) = delete;
    Opened& operator=(const Opened&) = delete;
  };

 private:
  struct Pages {
    std::byte* begin;
    std::size_t used, bytes;
  };

  void change(int by) {
    const std::lock_guard lock(mutex_);
    const bool before = open_ > 0;
    open_ += by;
    if (before == (open_ > 0)) return;
    for (const auto& [block, pages] : blocks_)
      mprotect(pages.begin, pages.used, open_ > 0 ? PROT_READ | PROT_WRITE : PROT_NONE);
  }

  std::mutex mutex_;
  std::map<std::byte*, Pages> blocks_;
  std::uint64_t allocations_ = 0;
  int open_ = 0;
  const std::size_t page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
};

inline void* malloc(std::size_t bytes) { return DeviceMemory::instance().allocate(bytes); }
inline void free(void* block) { DeviceMemory::instance().deallocate(block); }

}  // namespace eigenformer_test::emulated
