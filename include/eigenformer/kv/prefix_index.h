/// \file
/// Which pages hold the keys and values of which tokens, so that a sequence that begins like an
/// earlier one takes over its pages: a tree whose nodes are pages, each with the tokens of its
/// positions, below the page that comes before it. A hash finds a child, and what it finds counts
/// only where the tokens are equal. Knows pages by number; PagePool says who holds them.
///
/// Pages that nobody holds rest here, the least recently given back first in line to be taken for
/// something else. Whoever gives back a sequence's pages last one first keeps that order right: a
/// page is then never taken before those below it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "paged_config.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// The hash where the config brings none: a multiplication and a shift for each token.
inline std::uint64_t mix_tokens(std::uint64_t before, std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) {
    before = (before ^ static_cast<std::uint32_t>(token)) * 0x9e3779b97f4a7c15u;
    before ^= before >> 32;
  }
  return before;
}

class PrefixIndex {
 public:
  static constexpr std::int32_t kNone = -1;

  PrefixIndex() noexcept = default;
  PrefixIndex(Index pages, Index page_size, PrefixHash hash)
      : pages_(static_cast<std::int32_t>(pages)),
        page_size_(static_cast<std::size_t>(page_size)),
        hash_(hash == nullptr ? mix_tokens : hash) {}

  /// After this, nothing but a key that is not empty allocates.
  void prepare() {
    if (!nodes_.empty()) return;
    std::size_t buckets = 1;
    while (buckets < static_cast<std::size_t>(pages_)) buckets *= 2;
    std::vector<Node> nodes(static_cast<std::size_t>(pages_) + 1);
    nodes.back().older = nodes.back().newer = pages_;
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(pages_) * page_size_);
    buckets_.assign(buckets, kNone);
    tokens_ = std::move(tokens);
    nodes_ = std::move(nodes);
  }

  bool has(std::int32_t page) const { return !nodes_.empty() && node(page).parent != kNone; }
  Index resting() const { return resting_; }
  std::int64_t evictions() const { return evictions_; }

  // ---- the tree -------------------------------------------------------------------------------

  /// Where a walk along the tokens of a sequence is: at the root of a key, or at a page.
  struct Place {
    std::int32_t page;
    std::uint64_t hash;
    std::string_view key;
  };
  Place root(std::string_view key) const {
    std::uint64_t hash = 0;
    for (const char c : key) hash = hash_(hash, std::array<std::int32_t, 1>{c});
    return {pages_, hash, key};
  }
  /// The page below `place` that holds these tokens, one page of them; its number is kNone where
  /// there is none.
  Place find(const Place& place, std::span<const std::int32_t> tokens) const {
    const std::uint64_t hash = hash_(place.hash, tokens);
    std::int32_t page = nodes_.empty() ? kNone : buckets_[bucket(hash)];
    const auto is_it = [&](std::int32_t other) {
      const Node& n = node(other);
      return n.hash == hash && n.parent == place.page &&
             std::equal(tokens.begin(), tokens.end(), tokens_of(other)) &&
             (n.parent != pages_ || key_of(other) == place.key);
    };
    while (page != kNone && !is_it(page)) page = node(page).next_in_bucket;
    return {page, hash, place.key};
  }
  /// Puts `page`, which has no place yet and somebody holds, where find() found none.
  void add(const Place& parent, std::uint64_t hash, std::int32_t page,
           std::span<const std::int32_t> tokens) {
    if (parent.page == pages_ && !parent.key.empty()) keys_.emplace(page, parent.key);
    std::copy(tokens.begin(), tokens.end(), tokens_of(page));
    Node& n = node(page);
    n.hash = hash;
    n.next_in_bucket = std::exchange(buckets_[bucket(hash)], page);
    n.parent = parent.page;
    n.next_sibling = std::exchange(node(parent.page).child, page);
    if (n.next_sibling != kNone) node(n.next_sibling).previous_sibling = page;
  }
  /// Takes a page and all below it out of the tree, lowest first; those that rested go to `free`,
  /// whose capacity suffices for all pages.
  void forget(std::int32_t page, std::vector<std::int32_t>& free) {
    for (std::int32_t leaf = kNone; leaf != page;) {
      leaf = leaf_below(page);
      if (remove(leaf)) free.push_back(leaf);
    }
  }
  void forget_all(std::vector<std::int32_t>& free) {
    if (nodes_.empty()) return;
    while (node(pages_).child != kNone) forget(node(pages_).child, free);
  }

  // ---- pages that nobody holds ----------------------------------------------------------------

  /// The last holder of an indexed page is gone.
  void rest(std::int32_t page) {
    Node& n = node(page);
    n.newer = pages_;
    n.older = std::exchange(node(pages_).older, page);
    node(n.older).newer = page;
    ++resting_;
  }
  /// An indexed page that nobody held is held again.
  void wake(std::int32_t page) {
    Node& n = node(page);
    node(n.older).newer = n.newer;
    node(n.newer).older = n.older;
    n.older = n.newer = kNone;
    --resting_;
  }
  /// The resting page that gives way to something else: the one that has rested longest or, before
  /// it, one below it; one of those that is held leaves the tree, for without what comes before it
  /// nobody finds it. There must be one that rests.
  std::int32_t evict() {
    for (;;) {
      const std::int32_t leaf = leaf_below(node(pages_).newer);
      if (!remove(leaf)) continue;
      ++evictions_;
      return leaf;
    }
  }

 private:
  /// The last one, number pages_, is the root of the tree, and both ends of the line of pages that
  /// rest: its `newer` is the oldest of them.
  struct Node {
    std::int32_t parent = kNone;  // kNone: the page has no place in the tree
    std::int32_t child = kNone, next_sibling = kNone, previous_sibling = kNone;
    std::int32_t next_in_bucket = kNone;
    std::int32_t older = kNone, newer = kNone;  // where it rests
    std::uint64_t hash = 0;
  };

  Node& node(std::int32_t page) { return nodes_[static_cast<std::size_t>(page)]; }
  const Node& node(std::int32_t page) const { return nodes_[static_cast<std::size_t>(page)]; }
  std::size_t bucket(std::uint64_t hash) const { return hash & (buckets_.size() - 1); }
  const std::int32_t* tokens_of(std::int32_t page) const {
    return tokens_.data() + static_cast<std::size_t>(page) * page_size_;
  }
  std::int32_t* tokens_of(std::int32_t page) {
    return tokens_.data() + static_cast<std::size_t>(page) * page_size_;
  }
  std::string_view key_of(std::int32_t page) const {
    const auto found = keys_.find(page);
    return found == keys_.end() ? std::string_view() : std::string_view(found->second);
  }
  std::int32_t leaf_below(std::int32_t page) const {
    while (node(page).child != kNone) page = node(page).child;
    return page;
  }
  /// Takes a leaf out; whether it rested.
  bool remove(std::int32_t page) {
    Node& n = node(page);
    std::int32_t* at = &buckets_[bucket(n.hash)];
    while (*at != page) at = &node(*at).next_in_bucket;
    *at = n.next_in_bucket;
    if (n.parent == pages_) keys_.erase(page);
    if (n.next_sibling != kNone) node(n.next_sibling).previous_sibling = n.previous_sibling;
    (n.previous_sibling != kNone ? node(n.previous_sibling).next_sibling : node(n.parent).child) =
        n.next_sibling;
    const bool rested = n.newer != kNone;
    if (rested) wake(page);
    n = {};
    return rested;
  }

  std::int32_t pages_ = 0;
  std::size_t page_size_ = 0;
  PrefixHash hash_ = mix_tokens;
  std::vector<Node> nodes_;            // [page id], and the root; empty before prepare()
  std::vector<std::int32_t> tokens_;   // [page id](page_size)
  std::vector<std::int32_t> buckets_;  // [hash] first page of a list
  std::map<std::int32_t, std::string>
      keys_;  // of pages right below the root whose key is not empty
  Index resting_ = 0;
  std::int64_t evictions_ = 0;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
