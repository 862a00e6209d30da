/// \file
/// Shared memory of an emulated block, with a shadow that knows who read and wrote each element
/// where. Two accesses of one element by two threads are a race where one of them writes, not both
/// are atomic, and nothing orders them: no barrier of the block lies between, and none of the warp
/// where both are of one warp. It is found whatever the schedule, as long as both accesses happen
/// in the launch. A read of what nobody wrote, an index outside the array, more bytes than the
/// launch has and the touch of an element under an asynchronous copy are faults too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include <eigenformer/cuda/backend.cuh>

#include "fault.h"

namespace eigenformer_test::emulated {

namespace ef = eigenformer;
using ef::Index;

/// Who touches an element, when, and where. Epochs count barriers: they never repeat.
struct Access {
  int thread = -1;
  std::uint64_t block_epoch = 0, warp_epoch = 0;
  Where where;
  bool atomic = false;
};

inline bool unordered(const Access& a, const Access& b) {
  return a.thread >= 0 && a.thread != b.thread && a.block_epoch == b.block_epoch &&
         (a.thread / ef::cuda::kWarp != b.thread / ef::cuda::kWarp ||
          a.warp_epoch == b.warp_epoch) &&
         !(a.atomic && b.atomic);
}

/// One array: its bytes and its shadow. Kept from block to block.
class SharedArray {
 public:
  /// For a new block, whose first epoch this is: nothing is written.
  void reset(std::size_t element, Index count, std::uint64_t first_epoch) {
    element_ = element;
    count_ = count;
    first_epoch_ = first_epoch;
    const std::size_t bytes = element * static_cast<std::size_t>(count);
    if (units_ * sizeof(Unit) < bytes) {
      units_ = (bytes + sizeof(Unit) - 1) / sizeof(Unit);
      data_ = std::make_unique<Unit[]>(units_);
    }
    std::memset(data_.get(), 0xff, bytes);  // NaN, to whoever ignores the faults
    if (shadow_.size() < static_cast<std::size_t>(count))
      shadow_.resize(static_cast<std::size_t>(count));
  }

  std::size_t element() const { return element_; }
  Index count() const { return count_; }
  std::byte* at(Index i) { return data_[0].bytes + static_cast<std::size_t>(i) * element_; }

  /// Notes an access of `count` elements, or says what is wrong with it.
  void read(Index i, Index count, const Access& access) {
    check_bounds(i, count, access, "reads");
    for (Index k = i; k < i + count; ++k) {
      Shadow& shadow = shadow_[static_cast<std::size_t>(k)];
      check_copy(shadow, k, access, "reads");
      if (shadow.write.block_epoch < first_epoch_)
        fault(access, "reads", k, "which nobody has written");
      if (unordered(shadow.write, access)) race(access, "reads", k, shadow.write, "wrote");
      shadow.add_reader(access);
    }
  }
  void write(Index i, Index count, const Access& access) {
    check_bounds(i, count, access, "writes");
    for (Index k = i; k < i + count; ++k) {
      Shadow& shadow = shadow_[static_cast<std::size_t>(k)];
      check_copy(shadow, k, access, "writes");
      if (unordered(shadow.write, access)) race(access, "writes", k, shadow.write, "wrote");
      for (const Access& reader : shadow.readers)
        if (unordered(reader, access)) race(access, "writes", k, reader, "read");
      shadow.write = access;
      shadow.copying = false;
    }
  }
  /// An asynchronous copy into these elements begins: a write that has not happened yet.
  void begin_copy(Index i, Index count, const Access& access) {
    write(i, count, access);
    for (Index k = i; k < i + count; ++k) shadow_[static_cast<std::size_t>(k)].copying = true;
  }
  /// It lands, as a write by the thread that waited for it.
  void end_copy(Index i, Index count, const Access& access) {
    for (Index k = i; k < i + count; ++k) shadow_[static_cast<std::size_t>(k)].copying = false;
    write(i, count, access);
  }

 private:
  struct alignas(16) Unit {
    std::byte bytes[16];
  };

  struct Shadow {
    Access write;
    // The last reader, one more of its warp, and one of another warp: whoever writes next, one of
    // them is another thread where any reader was.
    Access readers[3];
    bool copying = false;

    void add_reader(const Access& access) {
      if (access.thread == readers[0].thread) {
        readers[0] = access;
      } else if (access.thread / ef::cuda::kWarp == readers[0].thread / ef::cuda::kWarp) {
        readers[1] = readers[0];
        readers[0] = access;
      } else {
        readers[2] = readers[0];
        readers[1] = {};
        readers[0] = access;
      }
    }
  };

  void check_bounds(Index i, Index count, const Access& access, const char* verb) const {
    if (i < 0 || i > count_ - count)
      throw Fault("out of bounds: thread " + std::to_string(access.thread) + " " + verb +
                  " element " + std::to_string(i + (i < 0 ? 0 : count - 1)) +
                  " of a shared array of " + std::to_string(count_) + " at " +
                  text_of(access.where));
  }
  void check_copy(const Shadow& shadow, Index i, const Access& access, const char* verb) const {
    if (shadow.copying && shadow.write.block_epoch >= first_epoch_)
      fault(access, verb, i,
            "which the asynchronous copy of thread " + std::to_string(shadow.write.thread) +
                " at " + text_of(shadow.write.where) + " is on its way to: nobody has waited");
  }
  [[noreturn]] static void fault(const Access& access, const char* verb, Index i,
                                 const std::string& why) {
    throw Fault("thread " + std::to_string(access.thread) + " " + verb + " shared element " +
                std::to_string(i) + " at " + text_of(access.where) + ", " + why);
  }
  [[noreturn]] static void race(const Access& access, const char* verb, Index i,
                                const Access& other, const char* did) {
    throw Fault("race: thread " + std::to_string(access.thread) + " " + verb + " shared element " +
                std::to_string(i) + " at " + text_of(access.where) + ", which thread " +
                std::to_string(other.thread) + " " + did + " at " + text_of(other.where) +
                " with no barrier between");
  }

  std::size_t element_ = 0, units_ = 0;
  Index count_ = 0;
  std::uint64_t first_epoch_ = 0;
  std::unique_ptr<Unit[]> data_;
  std::vector<Shadow> shadow_;
};

}  // namespace eigenformer_test::emulated
