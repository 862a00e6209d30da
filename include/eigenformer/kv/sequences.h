/// \file
/// The live sequences of a PagedKvCache: their names, page tables and lengths.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/check.h"
#include "../problem/visibility.h"
#include "paged_config.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Parallel arrays in order of creation, because a KvSource points to tables and lengths.
struct KvSequences {
  std::vector<SequenceId> ids;                   // they rise
  std::vector<std::vector<std::int32_t>> pages;  // [sequence][page of the sequence] -> page id
  std::vector<const std::int32_t*> tables;       // [sequence] -> its pages
  std::vector<std::vector<Index>> lengths;       // [layer][sequence]
  std::vector<problem::KeyRange> gone;           // [sequence] positions that it has given up
  // [sequence] number of the append that met it last: finds ids that come twice
  std::vector<std::int64_t> last_append;
  SequenceId next_id = 0;

  KvSequences() noexcept = default;
  explicit KvSequences(Index layers) : lengths(static_cast<std::size_t>(layers)) {}

  Index count() const { return static_cast<Index>(ids.size()); }

  /// Where a sequence is. Throws std::out_of_range.
  std::size_t find(SequenceId id, std::string_view operation) const {
    const auto found = std::lower_bound(ids.begin(), ids.end(), id);
    require_known(found != ids.end() && *found == id, operation, "no sequence ", id);
    return static_cast<std::size_t>(found - ids.begin());
  }
  /// Positions of the layer that is ahead, and of the one that is behind.
  Index longest(std::size_t at) const {
    Index result = 0;
    for (const auto& layer : lengths) result = (std::max)(result, layer[at]);
    return result;
  }
  Index shortest(std::size_t at) const {
    Index result = lengths.empty() ? 0 : (std::numeric_limits<Index>::max)();
    for (const auto& layer : lengths) result = (std::min)(result, layer[at]);
    return result;
  }

  /// After this, one push cannot throw.
  void make_room_for_one() {
    const auto grow = [](auto& v) {
      if (v.size() == v.capacity()) v.reserve(v.size() * 2 + 8);
    };
    grow(ids);
    grow(pages);
    grow(tables);
    grow(gone);
    grow(last_append);
    for (auto& layer : lengths) grow(layer);
  }
  SequenceId push(std::vector<std::int32_t> own_pages) {
    for (auto& layer : lengths) layer.push_back(0);
    return push_entry(std::move(own_pages), {0, 0});
  }
  /// One with the first `kept` positions of each layer of its parent.
  SequenceId push_fork(std::vector<std::int32_t> shared_pages, std::size_t parent, Index kept) {
    for (auto& layer : lengths) layer.push_back((std::min)(layer[parent], kept));
    return push_entry(std::move(shared_pages), gone[parent]);
  }
  void erase(std::size_t at) {
    const auto without = [offset = static_cast<std::ptrdiff_t>(at)](auto& v) {
      v.erase(v.begin() + offset);
    };
    without(ids);
    without(pages);
    without(tables);
    without(gone);
    without(last_append);
    for (auto& layer : lengths) without(layer);
  }

 private:
  SequenceId push_entry(std::vector<std::int32_t> own_pages, problem::KeyRange own_gone) {
    ids.push_back(next_id);
    pages.push_back(std::move(own_pages));
    tables.push_back(pages.back().data());
    gone.push_back(own_gone);
    last_append.push_back(0);
    return next_id++;
  }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
