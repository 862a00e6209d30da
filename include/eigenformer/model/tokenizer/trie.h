/// \file
/// A set of texts, asked which of them another text begins with.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "../../core/isa.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// One node per distinct beginning; edges of a node lie side by side in the order of their bytes.
class Trie {
 public:
  using Entry = std::pair<std::string_view, std::int32_t>;

  Trie() = default;
  /// Of equal texts the last entry stays. Empty ones are left out.
  explicit Trie(std::vector<Entry> entries) {
    std::stable_sort(entries.begin(), entries.end(),
                     [](const Entry& a, const Entry& b) { return a.first < b.first; });
    struct Range {
      std::size_t begin, end, depth;  // entries that share `depth` bytes
    };
    std::vector<Range> open{{0, entries.size(), 0}};  // the ranges of nodes_, in their order
    nodes_.emplace_back();
    for (std::size_t n = 0; n < open.size(); ++n) {
      auto [at, end, depth] = open[n];
      for (; at < end && entries[at].first.size() == depth; ++at)
        if (depth > 0) nodes_[n].value = entries[at].second;
      nodes_[n].first_edge = static_cast<std::uint32_t>(edges_.size());
      while (at < end) {
        const char byte = entries[at].first[depth];
        const std::size_t begin = at;
        while (at < end && entries[at].first[depth] == byte) ++at;
        edges_.push_back(static_cast<unsigned char>(byte));
        open.push_back({begin, at, depth + 1});
        nodes_.emplace_back();
      }
      nodes_[n].edges = static_cast<std::uint32_t>(edges_.size()) - nodes_[n].first_edge;
    }
  }

  /// found(value, bytes) for every entry that `text` begins with, shortest first.
  template <typename Found>
  void prefixes(std::string_view text, Found&& found) const {
    std::size_t node = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const Node& from = nodes_[node];
      const auto first = edges_.begin() + from.first_edge, last = first + from.edges;
      const auto byte = static_cast<unsigned char>(text[i]);
      const auto edge = std::lower_bound(first, last, byte);
      if (edge == last || *edge != byte) return;
      // Edge e leads to node e + 1: both were made in one order.
      node = static_cast<std::size_t>(edge - edges_.begin()) + 1;
      if (nodes_[node].value >= 0) found(nodes_[node].value, i + 1);
    }
  }

  /// The longest entry that `text` begins with: its value and bytes; (-1, 0): none.
  std::pair<std::int32_t, std::size_t> longest(std::string_view text) const {
    std::pair<std::int32_t, std::size_t> best{-1, 0};
    prefixes(text, [&](std::int32_t value, std::size_t bytes) { best = {value, bytes}; });
    return best;
  }

 private:
  struct Node {
    std::uint32_t first_edge = 0, edges = 0;
    std::int32_t value = -1;
  };
  std::vector<Node> nodes_{1};
  std::vector<unsigned char> edges_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
