/// \file
/// Block as a kernel sees it (cuda/block.cuh), on a CPU: each thread a fiber (block_runner.h),
/// shared memory under watch (shared_memory.h), warps that wait for every lane of the mask, tensor
/// cores by the PTX ISA's layouts, asynchronous copies that land when they are waited for and not
/// before. What it cannot show is speed, the order of memory between blocks, and races in device
/// memory (but a launch whose bits depend on the schedule has one: see device.h).
///
/// Needs a POSIX system. A block of 256 threads with four barriers takes 0.08 ms, a
/// reduction 0.3 ms (one core of an EPYC).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <eigenformer/cuda/tile/fragment.cuh>

#include "block_runner.h"

namespace eigenformer_test::emulated {

using ef::cuda::kAllLanes;

/// An array of shared memory, as one thread has it.
template <typename T>
class Shared {
 public:
  Shared(BlockRunner& runner, SharedArray& array, int thread)
      : runner_(&runner), array_(&array), thread_(thread) {}

  T load(Index i, Where where = Where::current()) const {
    array_->read(i, 1, runner_->access(thread_, where));
    return copy_of<T>(i);
  }
  void store(Index i, const T& value, Where where = Where::current()) const {
    array_->write(i, 1, runner_->access(thread_, where));
    std::memcpy(array_->at(i), &value, sizeof(T));
  }
  T add(Index i, T value, Where where = Where::current()) const {
    static_assert(std::is_integral_v<T>, "sums of floats have a fixed order");
    const Access access = runner_->access(thread_, where, true);
    array_->read(i, 1, access);
    array_->write(i, 1, access);
    const T before = copy_of<T>(i), after = static_cast<T>(before + value);
    std::memcpy(array_->at(i), &after, sizeof(T));
    return before;
  }
  template <typename V>
  V pack(Index i, Where where = Where::current()) const {
    check_pack<V>(i, where);
    array_->read(i, sizeof(V) / sizeof(T), runner_->access(thread_, where));
    return copy_of<V>(i);
  }
  template <typename V>
  void store_pack(Index i, const V& value, Where where = Where::current()) const {
    check_pack<V>(i, where);
    array_->write(i, sizeof(V) / sizeof(T), runner_->access(thread_, where));
    std::memcpy(array_->at(i), &value, sizeof(V));
  }

 private:
  friend class Block;
  template <typename V>
  V copy_of(Index i) const {
    V value;
    std::memcpy(static_cast<void*>(&value), array_->at(i), sizeof(V));
    return value;
  }
  template <typename V>
  void check_pack(Index i, const Where& where) const {
    static_assert(sizeof(V) % sizeof(T) == 0 && sizeof(V) <= 16);
    if (static_cast<std::size_t>(i) * sizeof(T) % sizeof(V) != 0)
      throw Fault("misaligned: thread " + std::to_string(thread_) + " takes " +
                  std::to_string(sizeof(V)) + " bytes at shared element " + std::to_string(i) +
                  " at " + text_of(where));
  }

  BlockRunner* runner_;
  SharedArray* array_;
  int thread_;
};

class Block {
 public:
  Block(BlockRunner& runner, int thread, Index index, Index count)
      : runner_(runner), thread_(thread), index_(index), count_(count) {}
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  int thread() const { return thread_; }
  int size() const { return runner_.size(); }
  Index index() const { return index_; }
  Index count() const { return count_; }
  int lane() const { return thread_ % kWarp; }
  int warp() const { return thread_ / kWarp; }

  void barrier(Where where = Where::current()) const { runner_.barrier(thread_, where); }

  template <typename T>
  Shared<T> shared(Index count, Where where = Where::current()) {
    return {runner_, runner_.array(thread_, sizeof(T), count, where), thread_};
  }

  void warp_barrier(Where where = Where::current()) const {
    runner_.exchange(thread_, "warp_barrier", kAllLanes, 0, where,
                     [](const Exchange&) { return 0; });
  }
  template <typename T>
  T shuffle(const T& value, int lane, unsigned mask = kAllLanes,
            Where where = Where::current()) const {
    return from_lane("shuffle", value, lane & (kWarp - 1), mask, where);
  }
  template <typename T>
  T shuffle_xor(const T& value, int bits, unsigned mask = kAllLanes,
                Where where = Where::current()) const {
    const int from = lane() ^ bits;
    return from_lane("shuffle_xor", value, from < kWarp ? from : lane(), mask, where);
  }
  template <typename T>
  T shuffle_up(const T& value, int by, unsigned mask = kAllLanes,
               Where where = Where::current()) const {
    return from_lane("shuffle_up", value, by <= lane() ? lane() - by : lane(), mask, where);
  }
  unsigned ballot(bool value, unsigned mask = kAllLanes, Where where = Where::current()) const {
    return runner_.exchange(thread_, "ballot", mask, value, where, [](const Exchange& all) {
      unsigned bits = 0;
      for (int lane = 0; lane < kWarp; ++lane)
        if ((all.mask >> lane & 1) != 0 && all.of<bool>(lane)) bits |= 1u << lane;
      return bits;
    });
  }
  bool any(bool value, unsigned mask = kAllLanes, Where where = Where::current()) const {
    return ballot(value, mask, where) != 0;
  }
  bool all(bool value, unsigned mask = kAllLanes, Where where = Where::current()) const {
    return ballot(value, mask, where) == mask;
  }

  /// Threads take turns, so that a plain addition is atomic.
  template <typename T>
  T atomic_add(T* at, T value) const {
    static_assert(std::is_integral_v<T>, "sums of floats have a fixed order");
    const T before = *at;
    *at = static_cast<T>(before + value);
    return before;
  }

  /// Products and sums in double, rounded once: the hardware's own order is not documented.
  template <typename T>
  void mma(ef::cuda::FragmentD<T>& d, const ef::cuda::FragmentA<T>& a,
           const ef::cuda::FragmentB<T>& b, Where where = Where::current()) const {
    struct Factors {
      ef::cuda::FragmentA<T> a;
      ef::cuda::FragmentB<T> b;
    };
    constexpr int each = 4 / static_cast<int>(sizeof(T)), depth = 8 * each;
    using Wide = std::conditional_t<sizeof(T) == 1, std::int64_t, double>;
    d = runner_.exchange(thread_, "mma", kAllLanes, Factors{a, b}, where, [&](const Exchange& all) {
      auto sums = d;
      for (int i = 0; i < 4; ++i) {
        const int group = lane() / 4, column = lane() % 4 * 2 + i % 2;  // row: group + 8 * (i / 2)
        Wide sum = static_cast<Wide>(d.values[i]);
        for (int k = 0; k < depth; ++k) {
          // k is half `k / (4 e)`, thread `k / e % 4` of its group, element k % e.
          const int half = k / (4 * each), member = k / each % 4, element = k % each;
          const T x = all.of<Factors>(group * 4 + member)
                          .a.values[half * 2 * each + i / 2 * each + element];
          const T y = all.of<Factors>(column * 4 + member).b.values[half * each + element];
          sum += static_cast<Wide>(x) * static_cast<Wide>(y);
        }
        sums.values[i] = static_cast<std::remove_reference_t<decltype(sums.values[0])>>(sum);
      }
      return sums;
    });
  }

  template <typename T>
  void load_rows(const Shared<T>& array, Index i, ef::cuda::FragmentB<T> (&b)[2],
                 Where where = Where::current()) const {
    struct alignas(16) Row {
      T columns[8];
    };
    const Row own = array.template pack<Row>(i, where);
    runner_.exchange(thread_, "load_rows", kAllLanes, own, where, [&](const Exchange& all) {
      for (int n = 0; n < 2; ++n)
        for (int e = 0; e < 4; ++e)  // row: those of a register are neighbours, 8 to the next one
          b[n].values[e] =
              all.of<Row>(n * 16 + lane() % 4 * 2 + e % 2 + e / 2 * 8).columns[lane() / 4];
      return 0;
    });
  }
  template <typename T>
  void round_pair(T* to, float a, float b) const {
    to[0] = static_cast<T>(a);
    to[1] = static_cast<T>(b);
  }
  float exp2(float x) const { return x < -126 ? 0.0f : std::exp2(x); }

  template <typename T>
  void copy_async(const Shared<T>& to, Index i, const T* from, Where where = Where::current()) {
    const Index count = 16 / static_cast<Index>(sizeof(T));
    if (i % count != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
      throw Fault("misaligned: thread " + std::to_string(thread_) + " copies 16 bytes at " +
                  text_of(where));
    to.array_->begin_copy(i, count, runner_.access(thread_, where));
    copies_.push_back({to.array_, i, count, from, groups_});
  }
  void commit_async() { ++groups_; }
  template <int Groups>
  void wait_async(Where where = Where::current()) {
    for (; landed_ < copies_.size() && copies_[landed_].group + Groups < groups_; ++landed_) {
      const Copy& copy = copies_[landed_];
      copy.to->end_copy(copy.i, copy.count, runner_.access(thread_, where));
      std::memcpy(copy.to->at(copy.i), copy.from, 16);
    }
  }

 private:
  struct Copy {
    SharedArray* to;
    Index i, count;
    const void* from;
    int group;
  };

  template <typename T>
  T from_lane(const char* operation, const T& value, int from, unsigned mask,
              const Where& where) const {
    return runner_.exchange(thread_, operation, mask, value, where, [&](const Exchange& all) {
      if ((mask >> from & 1) == 0)
        throw Fault(std::string(operation) + " at " + text_of(where) + ": thread " +
                    std::to_string(thread_) + " reads lane " + std::to_string(from) +
                    ", which is not in the mask");
      return all.template of<T>(from);
    });
  }

  BlockRunner& runner_;
  int thread_;
  Index index_, count_;
  std::vector<Copy> copies_;
  std::size_t landed_ = 0;
  int groups_ = 0;
};

}  // namespace eigenformer_test::emulated
