/// \file
/// Scratch memory for kernels: an arena that grows on the first call at a size and allocates
/// nothing afterwards.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "error.h"
#include "memory.h"
#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// An arena of 64-byte aligned memory. A kernel opens a Frame, takes what it needs, and gives
/// everything back when the frame ends; frames nest. Not for concurrent use: the thread that calls
/// an operator takes the scratch of all its workers.
///
///   Workspace::Frame frame(workspace);
///   float* scores = frame.take<float>(rows * columns);   // uninitialised
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(std::size_t bytes) { reserve(bytes); }
  /// Of another memory than the host's.
  explicit Workspace(const Memory& memory) : memory_(&memory) {}
  Workspace(Workspace&&) noexcept = default;
  Workspace& operator=(Workspace&&) noexcept = default;

  /// Makes later frames of up to `bytes` in all allocation-free. Throws std::bad_alloc.
  void reserve(std::size_t bytes) {
    if (depth_ == 0 && bytes > capacity()) {
      blocks_.clear();
      add_block(bytes);
    }
  }

  /// Bytes held.
  std::size_t capacity() const {
    std::size_t total = 0;
    for (const detail::MemoryBlock& block : blocks_) total += block.size();
    return total;
  }

  class Frame {
   public:
    explicit Frame(Workspace& workspace)
        : workspace_(workspace), block_(workspace.current_), used_(workspace.used_) {
      ++workspace_.depth_;
    }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;
    ~Frame() {
      workspace_.current_ = block_;
      workspace_.used_ = used_;
      if (--workspace_.depth_ > 0) return;
      if (workspace_.retired_)
        workspace_.release();
      else
        workspace_.coalesce();
    }

    /// Uninitialised memory for `count` elements, aligned to 64 bytes; valid until the frame ends.
    /// Throws std::bad_alloc.
    template <typename T>
    T* take(Index count) {
      static_assert(std::is_trivially_destructible_v<T>);
      if (count < 0 || static_cast<std::size_t>(count) > (~std::size_t{0} >> 1) / sizeof(T))
        detail::fail<std::bad_alloc>();
      return static_cast<T*>(workspace_.take(static_cast<std::size_t>(count) * sizeof(T)));
    }

   private:
    Workspace& workspace_;
    std::size_t block_;
    std::size_t used_;
  };

  /// Gives all memory back, now (outside of frames) and at the end of each later frame: such a
  /// workspace needs no destructor any more.
  void retire() noexcept {
    retired_ = true;
    if (depth_ == 0) release();
  }

 private:
  static std::size_t round_up(std::size_t bytes) {
    return (bytes + detail::kAlignment - 1) / detail::kAlignment * detail::kAlignment;
  }

  void add_block(std::size_t bytes) {
    blocks_.emplace_back((std::max)(round_up(bytes), detail::kAlignment), *memory_);
  }

  void* take(std::size_t bytes) {
    bytes = round_up(bytes);
    while (current_ < blocks_.size() && blocks_[current_].size() - used_ < bytes) {
      ++current_;
      used_ = 0;
    }
    if (current_ == blocks_.size()) add_block(bytes);
    void* result = blocks_[current_].data() + used_;
    used_ += bytes;
    return result;
  }

  void release() noexcept {
    std::vector<detail::MemoryBlock>().swap(blocks_);
    current_ = 0;
    used_ = 0;
  }

  // Several blocks mean that this was the first call at its size: the next one finds a single block
  // that is large enough.
  void coalesce() noexcept {
    current_ = 0;
    used_ = 0;
    if (blocks_.size() < 2) return;
    const std::size_t total = capacity();
    blocks_.clear();
    // Where it throws nothing is lost: the next frame allocates and reports.
    detail::attempt([&] { add_block(total); }, [](const char*) {});
  }

  std::vector<detail::MemoryBlock> blocks_;
  const Memory* memory_ = &host_memory;
  std::size_t current_ = 0;
  std::size_t used_ = 0;
  int depth_ = 0;
  bool retired_ = false;
};

/// The scratch of operators that are not given a workspace: one for each thread, grown on first
/// use, freed when the thread ends. Destructors of global and of thread-local objects may run after
/// that and call operators still: the workspace is never destroyed, it then frees its memory after
/// each call.
inline Workspace& thread_workspace() {
  struct RetireAtThreadEnd {
    Workspace* workspace = nullptr;
    ~RetireAtThreadEnd() { workspace->retire(); }
  };
  alignas(Workspace) thread_local std::byte memory[sizeof(Workspace)];
  thread_local Workspace* workspace = nullptr;  // neither has a destructor: both outlive the next
  if (workspace == nullptr) [[unlikely]] {
    workspace = ::new (static_cast<void*>(memory)) Workspace;
    thread_local RetireAtThreadEnd retire;
    retire.workspace = workspace;
  }
  return *workspace;
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
