/// \file
/// The communicator of a program that has one rank: every collective is a copy or nothing. The
/// concept's manual is communicator.h.
#pragma once

#include "../core/device.h"
#include "collective.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

class SelfCommunicator {
 public:
  /// Layers of one rank move nothing, in whatever memory.
  template <Device D>
  static constexpr bool kReaches = true;

  int rank() const { return 0; }
  int size() const { return 1; }

  template <detail::ElementRange Part, detail::ElementRange Whole>
  void all_gather(const Part& part, Whole&& whole, std::span<const Index> counts = {}) {
    using T = std::ranges::range_value_t<Whole>;
    static_assert(std::is_same_v<T, std::ranges::range_value_t<Part>>,
                  "eigenformer: part and whole hold different types");
    const std::span<const T> from(part);
    const std::span<T> to(whole);
    const Index count = static_cast<Index>(from.size());
    detail::all_gather_call<T>({counts, count}, count, static_cast<Index>(to.size()), 0, 1);
    detail::copy_elements(from.data(), to.data(), count);
  }

  template <detail::ElementRange Values>
  void all_reduce_sum(Values&&) {
    static_assert(detail::Summable<std::ranges::range_value_t<Values>>);
  }

  template <detail::ElementRange Values>
  void broadcast(Values&& values, int root) {
    detail::broadcast_call<std::ranges::range_value_t<Values>>(
        static_cast<Index>(std::ranges::size(values)), root, 1);
  }

  void barrier() {}
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
