/// \file
/// What every communicator is made of: the error, the checks of a call's arguments, the comparison
/// that finds ranks calling different collectives, and the one order of summation. The rule that
/// divides work among ranks is communicator/shards.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <ranges>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../core/check.h"
#include "../core/tensor.h"
#include "../problem/communicator.h"
#include "shards.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A collective that cannot complete: a rank has failed or ended, ranks call different collectives,
/// the transport reports an error.
class CommunicatorError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

/// What collectives move: a std::span, std::vector, std::array or any other contiguous range of
/// trivially copyable elements.
template <typename R>
concept ElementRange = std::ranges::contiguous_range<R> && std::ranges::sized_range<R> &&
                       std::is_trivially_copyable_v<std::ranges::range_value_t<R>>;

/// What all_reduce_sum adds.
template <typename T>
concept Summable =
    FloatingScalar<T> || std::same_as<T, std::int32_t> || std::same_as<T, std::int64_t>;

enum class Collective : std::int64_t { all_gather, all_reduce_sum, broadcast, barrier };

/// What a rank calls, in a form that ranks can compare; no padding, so that its bytes can be sent.
struct CollectiveCall {
  Collective kind;
  std::int64_t element;      // see element_name
  std::int64_t count;        // elements that every rank holds afterwards
  std::int64_t root;         // of a broadcast
  std::uint64_t parts_hash;  // of the sizes of all parts of an all_gather
  friend bool operator==(const CollectiveCall&, const CollectiveCall&) = default;
};

/// Scalars that look alike are told apart; any other type counts by its size.
template <typename T>
constexpr std::int64_t element_code() {
  if constexpr (std::is_same_v<T, bfloat16>) return -1;
  if constexpr (std::is_same_v<T, half>) return -2;
  if constexpr (std::is_same_v<T, float>) return -3;
  if constexpr (std::is_same_v<T, double>) return -4;
  if constexpr (std::is_integral_v<T>) return -10 - static_cast<std::int64_t>(sizeof(T));
  return static_cast<std::int64_t>(sizeof(T));
}

inline std::string element_name(std::int64_t code) {
  if (code == -1) return "bfloat16";
  if (code == -2) return "half";
  if (code == -3) return "float";
  if (code == -4) return "double";
  if (code < -10) return "int" + std::to_string(8 * (-10 - code));
  return std::to_string(code) + "-byte";
}

inline std::string describe(const CollectiveCall& call) {
  const std::string amount =
      " of " + std::to_string(call.count) + " " + element_name(call.element) + " elements";
  switch (call.kind) {
    case Collective::all_gather:
      return "all_gather" + amount;
    case Collective::all_reduce_sum:
      return "all_reduce_sum" + amount;
    case Collective::broadcast:
      return "broadcast" + amount + " from rank " + std::to_string(call.root);
    case Collective::barrier:
      return "barrier";
  }
  return "?";
}

/// Throws CommunicatorError unless all ranks make the same call. Every rank sees the same calls, so
/// all throw or none does.
template <typename CallOfRank>
void require_same_call(int ranks, CallOfRank&& call_of) {
  for (int r = 1; r < ranks; ++r) {
    const CollectiveCall &first = call_of(0), &other = call_of(r);
    if (first == other) continue;
    std::string text = "communicator: rank 0 calls " + describe(first) + ", rank " +
                       std::to_string(r) + " calls " + describe(other);
    if (describe(first) == describe(other)) text += " in parts of other sizes";
    detail::fail<CommunicatorError>(text);
  }
}

/// Sizes of the parts of an all_gather: as given, or all equal where no counts were given.
struct PartSizes {
  std::span<const Index> counts;
  Index equal;
  Index operator[](int rank) const {
    return counts.empty() ? equal : counts[static_cast<std::size_t>(rank)];
  }
};

/// Checks an all_gather against this rank's view of it and returns what to compare with the other
/// ranks.
template <typename T>
CollectiveCall all_gather_call(const PartSizes& parts, Index part, Index whole, int rank,
                               int ranks) {
  constexpr auto name = "all_gather";
  require_that(parts.counts.empty() || static_cast<Index>(parts.counts.size()) == ranks, name,
               "counts has ", parts.counts.size(), " elements, expected ", ranks, " (one a rank)");
  Index total = 0;
  std::uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a over the sizes
  for (int r = 0; r < ranks; ++r) {
    require_that(parts[r] >= 0, name, "counts[", r, "] is ", parts[r], ", expected 0 or more");
    require_that(detail::add_fits(total, parts[r], total), name, "the parts together overflow");
    hash = (hash ^ static_cast<std::uint64_t>(parts[r])) * 0x100000001b3u;
  }
  require_that(parts[rank] == part, name, "part has ", part, " elements, counts[", rank, "] is ",
               parts[rank]);
  require_that(total == whole, name, "whole has ", whole, " elements, the parts together have ",
               total);
  return {Collective::all_gather, element_code<T>(), whole, 0, hash};
}

template <typename T>
CollectiveCall broadcast_call(Index count, int root, int ranks) {
  require_that(root >= 0 && root < ranks, "broadcast", "root is ", root, ", expected 0 to ",
               ranks - 1);
  return {Collective::broadcast, element_code<T>(), count, root, 0};
}

template <typename T>
CollectiveCall all_reduce_call(Index count) {
  return {Collective::all_reduce_sum, element_code<T>(), count, 0, 0};
}

inline constexpr CollectiveCall kBarrierCall{Collective::barrier, 0, 0, 0, 0};

/// sum[i] = ((source(0)[i] + source(1)[i]) + source(2)[i]) + ..., rounded to T once; calls
/// sink(offset, sums, n) block by block. The summation of all communicators (on a GPU it is that of
/// cuda/communicator.cuh), hence the same bits on every rank, in every run, over every transport.
template <typename T, typename Source, typename Sink>
void ordered_sum(int ranks, Index count, Source&& source, Sink&& sink) {
  using Sum = typename problem::rank_sum_type<T>::type;
  constexpr Index kBlock = 512;  // sums of a block stay in L1
  Sum sums[kBlock];
  T rounded[kBlock];
  for (Index offset = 0; offset < count; offset += kBlock) {
    const Index n = (std::min)(kBlock, count - offset);
    for (Index i = 0; i < n; ++i) sums[i] = static_cast<Sum>(source(0)[offset + i]);
    for (int r = 1; r < ranks; ++r) {
      const T* values = source(r) + offset;
      for (Index i = 0; i < n; ++i) sums[i] += static_cast<Sum>(values[i]);
    }
    for (Index i = 0; i < n; ++i) rounded[i] = static_cast<T>(sums[i]);
    sink(offset, rounded, n);
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
