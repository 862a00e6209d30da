/// \file
/// The paged cache without pages: every sequence and layer is a list of rows, and a fork copies
/// them. And its pages without rows: which page each sequence holds, everything else recounted from
/// that. What the tests and a doubting user compare with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

template <typename T>
struct PagedKvCache {
  using Row = std::vector<T>;  // (kv_heads * head_dim)
  struct Layer {
    std::vector<Row> keys, values;
  };
  std::map<std::int64_t, std::vector<Layer>> sequences;  // id -> layers
  std::int64_t next_id = 0;

  std::int64_t add_sequence(Index layers) {
    sequences[next_id].resize(static_cast<std::size_t>(layers));
    return next_id++;
  }

  std::int64_t fork(std::int64_t parent, Index length) {
    sequences[next_id] = sequences.at(parent);
    truncate(next_id, length);
    return next_id++;
  }

  void free(std::int64_t id) { sequences.erase(id); }

  void truncate(std::int64_t id, Index length) {
    for (Layer& layer : sequences.at(id)) {
      layer.keys.resize((std::min)(layer.keys.size(), static_cast<std::size_t>(length)));
      layer.values.resize(layer.keys.size());
    }
  }

  /// keys and values (n, kv_heads, head_dim)
  void append(std::int64_t id, Index layer, const Tensor<T, 3>& keys, const Tensor<T, 3>& values) {
    const Index width = keys.dimension(1) * keys.dimension(2);
    Layer& rows = sequences.at(id)[static_cast<std::size_t>(layer)];
    for (Index i = 0; i < keys.dimension(0); ++i) {
      rows.keys.emplace_back(keys.data() + i * width, keys.data() + (i + 1) * width);
      rows.values.emplace_back(values.data() + i * width, values.data() + (i + 1) * width);
    }
  }

  Index length(std::int64_t id, Index layer) const {
    return static_cast<Index>(sequences.at(id)[static_cast<std::size_t>(layer)].keys.size());
  }

  Index longest(std::int64_t id) const {
    Index result = 0;
    for (const Layer& layer : sequences.at(id))
      result = (std::max)(result, static_cast<Index>(layer.keys.size()));
    return result;
  }
};

/// The pages of a PagedKvCache. A page is a number that is never used twice; whoever holds it has
/// it in his list.
struct PagedKvPages {
  struct Sequence {
    std::vector<Index> lengths;       // [layer]
    std::vector<std::int64_t> pages;  // in order of position
    Index longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
  };
  Index layers, page_size, page_count;
  std::map<std::int64_t, Sequence> sequences;
  std::int64_t next_id = 0, next_page = 0, copies = 0;
  Index peak = 0;

  Index pages_of(Index length) const { return (length + page_size - 1) / page_size; }
  /// Page -> sequences that hold it.
  std::map<std::int64_t, Index> holders() const {
    std::map<std::int64_t, Index> result;
    for (const auto& [id, sequence] : sequences)
      for (std::int64_t page : sequence.pages) ++result[page];
    return result;
  }
  Index used() const { return static_cast<Index>(holders().size()); }
  Index shared() const {
    Index result = 0;
    for (const auto& [page, count] : holders()) result += count > 1 ? 1 : 0;
    return result;
  }
  /// Positions of all sequences, a shared one counted by each.
  Index tokens() const {
    Index result = 0;
    for (const auto& [id, sequence] : sequences) result += sequence.longest();
    return result;
  }
  /// Positions of pages in use that hold something for somebody, a shared one counted once.
  Index slots_used() const {
    std::map<std::pair<std::int64_t, Index>, bool> used;  // (page, place in it)
    for (const auto& [id, sequence] : sequences)
      for (Index j = 0; j < sequence.longest(); ++j)
        used[{sequence.pages[static_cast<std::size_t>(j / page_size)], j % page_size}] = true;
    return static_cast<Index>(used.size());
  }

  std::int64_t add_sequence() {
    sequences[next_id].lengths.resize(static_cast<std::size_t>(layers));
    return next_id++;
  }
  std::int64_t fork(std::int64_t parent, Index length) {
    sequences[next_id] = sequences.at(parent);
    truncate(next_id, length);
    return next_id++;
  }
  void free(std::int64_t id) { sequences.erase(id); }
  void truncate(std::int64_t id, Index length) {
    Sequence& sequence = sequences.at(id);
    for (Index& own : sequence.lengths) own = (std::min)(own, length);
    while (static_cast<Index>(sequence.pages.size()) > pages_of(length)) sequence.pages.pop_back();
  }

  /// False where pages run out; nothing has changed then.
  bool reserve(std::int64_t id, Index length) {
    PagedKvPages after = *this;
    after.take(after.sequences.at(id), length);
    return become(after);
  }
  /// Sequence ids[i] gets counts[i] more positions of a layer. False where pages run out; nothing
  /// has changed then.
  bool append(const std::vector<std::int64_t>& ids, const std::vector<Index>& counts, Index layer) {
    PagedKvPages after = *this;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      Sequence& sequence = after.sequences.at(ids[i]);
      Index& length = sequence.lengths[static_cast<std::size_t>(layer)];
      for (Index j = length; j < length + counts[i]; ++j) {
        const auto at = static_cast<std::size_t>(j / page_size);
        if (at < sequence.pages.size() && after.holders()[sequence.pages[at]] > 1) {
          sequence.pages[at] = after.next_page++;  // a copy of its own, to write to
          ++after.copies;
          after.peak = (std::max)(after.peak, after.used());
        }
        after.take(sequence, j + 1);
      }
      length += counts[i];
    }
    return become(after);
  }

 private:
  void take(Sequence& sequence, Index length) {
    while (static_cast<Index>(sequence.pages.size()) < pages_of(length)) {
      sequence.pages.push_back(next_page++);
      peak = (std::max)(peak, used());
    }
  }
  bool become(const PagedKvPages& after) {
    if (after.used() > page_count) return false;
    *this = after;
    return true;
  }
};

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
