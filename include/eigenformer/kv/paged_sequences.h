/// \file
/// What PagedKvCache (whose manual is paged_kv_cache.h) does without looking into a page: sequences
/// that claim, share, copy, give up and give back pages of a pool, all or nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "page_pool.h"
#include "paged_config.h"
#include "sequences.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class PagedSequences {
 public:
  static constexpr const char* kName = "PagedKvCache";

  PagedSequences() noexcept = default;
  PagedSequences(const PagedKvConfig& c, std::size_t page_bytes, const Memory& memory)
      : page_size_(c.page_size),
        pool_(c.page_count, page_bytes, PrefixIndex(c.page_count, c.page_size, c.prefix_hash),
              memory, kName),
        list_(c.layers) {}

  const PagePool& pool() const { return pool_; }
  const KvSequences& list() const { return list_; }
  std::size_t find(SequenceId id) const { return list_.find(id, kName); }
  Index total_slots() const { return pool_.count() * page_size_; }

  // ---- whole sequences ------------------------------------------------------------------------

  SequenceId add() {
    list_.make_room_for_one();
    return list_.push({});
  }

  /// One of these lengths, with pages that hold anything, where it has not given up positions.
  SequenceId add(const std::vector<Index>& lengths, problem::KeyRange gone) {
    const Index count = pages_for(*std::max_element(lengths.begin(), lengths.end()), page_size_),
                first_gone = pages_for(gone.begin, page_size_),
                end_gone = (std::max)(first_gone, gone.end / page_size_);
    pool_.require_free(count - (end_gone - first_gone), kName);
    list_.make_room_for_one();
    std::vector<std::int32_t> pages(static_cast<std::size_t>(count), pool_.gone_page());
    for (Index p = 0; p < count; ++p) {
      auto& page = pages[static_cast<std::size_t>(p)];
      if (p >= first_gone && p < end_gone)
        pool_.retain(page);
      else
        page = pool_.take();
    }
    const SequenceId id = list_.push(std::move(pages));
    for (std::size_t l = 0; l < lengths.size(); ++l) list_.lengths[l].back() = lengths[l];
    if (gone.begin < gone.end) list_.gone.back() = gone;
    return id;
  }

  SequenceId fork(SequenceId sequence, Index length) {
    const std::size_t parent = find(sequence);
    const Index longest = list_.longest(parent);
    require_that(length >= -1 && length <= longest, kName, "fork at length ", length, ", sequence ",
                 sequence, " has ", longest, " positions");
    const Index kept = length == -1 ? longest : length;
    require_held(parent, kept);
    list_.make_room_for_one();
    const auto& held = list_.pages[parent];
    std::vector<std::int32_t> pages(held.begin(), held.begin() + pages_for(kept, page_size_));
    for (std::int32_t page : pages) pool_.retain(page);
    const SequenceId id = list_.push_fork(std::move(pages), parent, kept);
    shorten_gone(list_.gone.back(), kept);
    return id;
  }

  void free(SequenceId sequence) {
    const std::size_t at = find(sequence);
    give_back(at, 0);
    list_.erase(at);
  }
  void clear() {
    while (list_.count() > 0) free(list_.ids.back());
  }

  void truncate(SequenceId sequence, Index length) {
    const std::size_t at = find(sequence);
    require_that(length >= 0, kName, "truncate to length ", length, ", expected 0 or more");
    require_held(at, length);
    for (auto& lengths : list_.lengths) lengths[at] = (std::min)(lengths[at], length);
    give_back(at, pages_for((std::min)(length, total_slots()), page_size_));
    shorten_gone(list_.gone[at], length);
  }

  void reserve(SequenceId sequence, Index length) {
    const std::size_t at = find(sequence);
    require_that(length >= 0, kName, "reserve a length of ", length, ", expected 0 or more");
    const Index wanted = pages_for(length, page_size_),
                held = static_cast<Index>(list_.pages[at].size());
    if (wanted <= held) return;
    pool_.require_free(wanted - held, kName);
    grow_table(at, wanted);
    take_pages(at, wanted);
  }

  void free_before(SequenceId sequence, Index position, Index keep_first) {
    const std::size_t at = find(sequence);
    require_that(position >= 0 && keep_first >= 0, kName, "free_before position ", position,
                 ", keeping the first ", keep_first, ", expected 0 or more");
    problem::KeyRange& gone = list_.gone[at];
    const Index end = (std::min)(position, list_.shortest(at)) / page_size_,
                begin = (std::min)(pages_for(keep_first, page_size_), end);
    if (begin == end || end * page_size_ <= gone.end) return;
    require_that(gone.end == 0 || pages_for(gone.begin, page_size_) == begin, kName, "sequence ",
                 sequence, " has given up positions from ", gone.begin, " on, keeping the first ",
                 keep_first, " would be from ", begin * page_size_);
    auto& pages = list_.pages[at];
    for (Index p = end; p-- > (std::max)(begin, gone.end / page_size_);) {
      auto& page = pages[static_cast<std::size_t>(p)];
      pool_.release(std::exchange(page, pool_.gone_page()));
      pool_.retain(page);
    }
    gone = {gone.end == 0 ? begin * page_size_ : gone.begin, end * page_size_};
  }

  // ---- prefixes -------------------------------------------------------------------------------

  Index find_prefix(std::span<const std::int32_t> tokens, const PrefixKey& key) const {
    Index found = 0;
    walk_prefix(tokens, key, [&](std::int32_t) { ++found; });
    return found * page_size_;
  }

  Index share_prefix(SequenceId sequence, std::span<const std::int32_t> tokens,
                     const PrefixKey& key) {
    const std::size_t at = find(sequence);
    require_that(list_.longest(at) == 0, kName, "share_prefix: sequence ", sequence, " has ",
                 list_.longest(at), " positions, expected none");
    const Index most = most_shared(tokens);
    grow_table(at, (std::min)(most, pool_.count()));
    auto& pages = list_.pages[at];
    std::size_t found = 0;
    walk_prefix(tokens, key, [&](std::int32_t page) {
      pool_.retain(page);
      if (found < pages.size())  // one that was reserved
        pool_.release(std::exchange(pages[found], page));
      else
        pages.push_back(page);
      ++found;
    });
    const Index count = static_cast<Index>(found);
    for (auto& lengths : list_.lengths) lengths[at] = count * page_size_;
    hits_ += count;
    misses_ += most - count;
    return count * page_size_;
  }

  Index keep_prefix(SequenceId sequence, std::span<const std::int32_t> tokens,
                    const PrefixKey& key) {
    const std::size_t at = find(sequence);
    const Index count =
        (std::min)(list_.shortest(at), static_cast<Index>(tokens.size())) / page_size_;
    const std::string text = text_of(key);
    PrefixIndex& index = pool_.index();
    index.prepare();
    auto place = index.root(text);
    for (Index p = 0; p < count; ++p) {
      std::int32_t& own = list_.pages[at][static_cast<std::size_t>(p)];
      const auto part = page_of(tokens, p);
      const bool whole =
          (p + 1) * page_size_ <= list_.gone[at].begin || p * page_size_ >= list_.gone[at].end;
      auto next = index.find(place, part);
      if (next.page == PrefixIndex::kNone) {
        if (!whole || index.has(own)) return p * page_size_;
        index.add(place, next.hash, own, part);
        next.page = own;
      } else if (whole && own != next.page) {
        pool_.retain(next.page);
        pool_.release(std::exchange(own, next.page));
      }
      place = next;
    }
    return count * page_size_;
  }

  void forget_prefixes() { pool_.forget_prefixes(); }

  // ---- append: require_pages, then claim, then advance; added(i) positions to ids[i] ----------

  /// Throws where the pool has not enough pages for the new positions of all sequences.
  template <typename Added>
  void require_pages(std::size_t layer, std::span<const SequenceId> ids, const Added& added) {
    Index needed = 0;
    ++appends_;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::size_t at = find(ids[i]);
      require_that(std::exchange(list_.last_append[at], appends_) != appends_, kName, "sequence ",
                   ids[i], " comes twice in an append");
      const Index begin = list_.lengths[layer][at];
      require_capacity(added(i) <= total_slots() - begin, kName, added(i),
                       " more positions behind ", begin, " of sequence ", ids[i], ", the pool has ",
                       total_slots());
      const Index pages = pages_for(begin + added(i), page_size_);
      needed += std::max<Index>(0, pages - static_cast<Index>(list_.pages[at].size()));
    }
    needed += copies_needed(layer, ids, added);
    pool_.require_free(needed, kName);
  }

  /// Gives every sequence pages of its own, which require_pages has found, for its new positions,
  /// or throws with nothing changed.
  template <typename Added>
  void claim(std::size_t layer, std::span<const SequenceId> ids, const Added& added) {
    const auto end_of = [&](std::size_t i, std::size_t at) {
      return list_.lengths[layer][at] + added(i);
    };
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::size_t at = find(ids[i]);
      grow_table(at, pages_for(end_of(i, at), page_size_));
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {  // nothing throws from here on
      const std::size_t at = find(ids[i]);
      if (added(i) == 0) continue;
      const auto [first, last] = held_pages(at, list_.lengths[layer][at], end_of(i, at));
      for (Index p = first; p < last; ++p)
        pool_.make_own(list_.pages[at][static_cast<std::size_t>(p)]);
      take_pages(at, pages_for(end_of(i, at), page_size_));
    }
  }

  template <typename Added>
  void advance(std::size_t layer, std::span<const SequenceId> ids, const Added& added) {
    for (std::size_t i = 0; i < ids.size(); ++i) list_.lengths[layer][find(ids[i])] += added(i);
  }

  // ---- figures --------------------------------------------------------------------------------

  PagedKvStatistics statistics() const {
    PagedKvStatistics result;
    result.sequences = list_.count();
    result.pages_total = pool_.count();
    result.pages_used = pool_.count() - pool_.free_count();
    result.pages_peak = pool_.peak();
    result.pages_shared = pool_.shared_count();
    result.pages_cached = pool_.index().resting();
    result.copies = pool_.copies();
    result.prefix_hits = hits_;
    result.prefix_misses = misses_;
    result.prefix_evictions = pool_.index().evictions();
    std::vector<Index> filled(static_cast<std::size_t>(pool_.count()) + 1, 0);
    for (std::size_t at = 0; at < list_.ids.size(); ++at) {
      const Index length = list_.longest(at);
      result.tokens += length - (list_.gone[at].end - list_.gone[at].begin);
      fill_pages(filled, list_.pages[at], page_size_, length);
    }
    filled.back() = 0;  // the page that is gone
    for (Index used : filled) result.slots_used += used;
    if (result.pages_used > 0)
      result.utilisation = static_cast<double>(result.slots_used) /
                           static_cast<double>(result.pages_used * page_size_);
    return result;
  }

 private:
  /// A sequence goes on behind `length`: what it has given up is all before that, or all behind.
  void require_held(std::size_t at, Index length) const {
    const problem::KeyRange gone = list_.gone[at];
    require_that(length <= gone.begin || length >= gone.end, kName, "sequence ", list_.ids[at],
                 " cannot go on at length ", length, ": it has given up the positions ", gone.begin,
                 " to ", gone.end - 1);
  }
  static void shorten_gone(problem::KeyRange& gone, Index length) {
    if (length <= gone.begin) gone = {0, 0};
  }

  /// Gives back the pages behind the first `kept`, last ones first.
  void give_back(std::size_t at, Index kept) {
    auto& pages = list_.pages[at];
    while (static_cast<Index>(pages.size()) > kept) {
      pool_.release(pages.back());
      pages.pop_back();
    }
  }
  void grow_table(std::size_t at, Index pages) {
    auto& table = list_.pages[at];
    if (static_cast<std::size_t>(pages) > table.capacity())
      table.reserve((std::max)(static_cast<std::size_t>(pages), table.capacity() * 2));
    list_.tables[at] = table.data();
  }
  void take_pages(std::size_t at, Index pages) {
    auto& table = list_.pages[at];
    while (static_cast<Index>(table.size()) < pages) table.push_back(pool_.take());
  }

  /// Pages of a sequence that positions [begin, end) fall into and that it holds already.
  std::pair<Index, Index> held_pages(std::size_t at, Index begin, Index end) const {
    const Index held = static_cast<Index>(list_.pages[at].size());
    return {(std::min)(begin / page_size_, held), (std::min)(pages_for(end, page_size_), held)};
  }
  /// How many pages the batch must copy.
  template <typename Added>
  Index copies_needed(std::size_t layer, std::span<const SequenceId> ids, const Added& added) {
    return pool_.copies_needed([&](auto&& visit) {
      for (std::size_t i = 0; i < ids.size(); ++i) {
        if (added(i) == 0) continue;
        const std::size_t at = find(ids[i]);
        const Index length = list_.lengths[layer][at];
        const auto [first, last] = held_pages(at, length, length + added(i));
        for (Index p = first; p < last; ++p) visit(list_.pages[at][static_cast<std::size_t>(p)]);
      }
    });
  }

  std::span<const std::int32_t> page_of(std::span<const std::int32_t> tokens, Index page) const {
    return tokens.subspan(static_cast<std::size_t>(page * page_size_),
                          static_cast<std::size_t>(page_size_));
  }
  /// Whole pages of tokens but for the last token, which is to be computed.
  Index most_shared(std::span<const std::int32_t> tokens) const {
    return tokens.empty() ? 0 : (static_cast<Index>(tokens.size()) - 1) / page_size_;
  }
  /// visit(page) for the pages of the index that hold the first tokens, in order.
  template <typename Visit>
  void walk_prefix(std::span<const std::int32_t> tokens, const PrefixKey& key,
                   Visit&& visit) const {
    const std::string text = text_of(key);
    auto place = pool_.index().root(text);
    for (Index p = 0; p < most_shared(tokens); ++p) {
      place = pool_.index().find(place, page_of(tokens, p));
      if (place.page == PrefixIndex::kNone) return;
      visit(place.page);
    }
  }

  Index page_size_ = 1;
  PagePool pool_;
  KvSequences list_;
  std::int64_t appends_ = 0, hits_ = 0, misses_ = 0;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
