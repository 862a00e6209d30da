/// \file
/// A pool of equal pages in one allocation, with a count of holders for each: the allocator under
/// PagedKvCache. Pages that its index names outlive their last holder, until they are needed; of
/// what else a page holds it knows nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "page.h"
#include "prefix_index.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class PagePool {
 public:
  PagePool() noexcept = default;  // no pages
  PagePool(Index count, std::size_t page_bytes, PrefixIndex index, const Memory& memory,
           std::string_view operation)
      : block_(static_cast<std::size_t>(
                   checked_product(count, static_cast<Index>(page_bytes), operation, "the pool")),
               memory, Pages::huge),
        page_bytes_(page_bytes),
        pages_(static_cast<std::size_t>(count) + 1, block_.data()),
        holders_(pages_.size(), 0),
        marks_(pages_.size(), 0),
        free_(static_cast<std::size_t>(count)),
        index_(std::move(index)) {
    for (std::size_t i = 0; i < free_.size(); ++i) {
      pages_[i] = block_.data() + i * page_bytes;
      free_[i] = static_cast<std::int32_t>(free_.size() - 1 - i);  // page 0 is taken first
    }
    holders_.back() = 1;
  }

  /// Stands in page tables where a sequence has given up its page: memory that may be read, and
  /// holds anything. Its holders are counted as those of any page; there is one more always.
  std::int32_t gone_page() const { return static_cast<std::int32_t>(count()); }

  const Memory& memory() const { return block_.memory(); }
  Index count() const { return pages_.empty() ? 0 : static_cast<Index>(pages_.size()) - 1; }
  /// Pages that nobody holds, indexed ones included.
  Index free_count() const { return static_cast<Index>(free_.size()) + index_.resting(); }
  Index peak() const { return peak_; }
  std::int64_t copies() const { return copies_; }
  const std::byte* const* pages() const { return pages_.data(); }
  std::byte* page(std::int32_t id) const { return pages_[static_cast<std::size_t>(id)]; }
  std::int32_t holders(std::int32_t id) const { return holders_[static_cast<std::size_t>(id)]; }
  /// Pages with more than one holder.
  Index shared_count() const {
    return static_cast<Index>(std::count_if(holders_.begin(),
                                            holders_.begin() + static_cast<std::ptrdiff_t>(count()),
                                            [](std::int32_t n) { return n > 1; }));
  }
  /// Exactly how many pages must be copied before all of some holders write: for_each(visit) calls
  /// visit(page) once for each of them. Where all holders of a page write, the last keeps it.
  template <typename ForEach>
  Index copies_needed(ForEach&& for_each) {
    Index copies = 0;
    const auto mark = [&](std::int32_t id) -> auto& {
      return marks_[static_cast<std::size_t>(id)];
    };
    for_each([&](std::int32_t id) {
      if (holders(id) > 1) copies += ++mark(id) < holders(id) ? 1 : 0;
    });
    for_each([&](std::int32_t id) { mark(id) = 0; });
    return copies;
  }

  void require_free(Index pages, std::string_view operation) const {
    require_capacity(pages <= free_count(), operation, pages, " pages needed, ", free_count(),
                     " of ", count(), " are free");
  }

  /// A page with one holder; there must be a free one. Never throws: the list keeps its capacity.
  std::int32_t take() {
    const std::int32_t id = free_.empty() ? index_.evict() : free_.back();
    if (!free_.empty()) free_.pop_back();
    holders_[static_cast<std::size_t>(id)] = 1;
    peak_ = (std::max)(peak_, count() - free_count());
    return id;
  }
  void retain(std::int32_t id) {
    if (holders_[static_cast<std::size_t>(id)]++ > 0) return;
    index_.wake(id);
    peak_ = (std::max)(peak_, count() - free_count());
  }
  void release(std::int32_t id) {
    if (--holders_[static_cast<std::size_t>(id)] > 0) return;
    if (index_.has(id))
      index_.rest(id);
    else
      free_.push_back(id);
  }
  /// Before a holder writes into a page: puts a copy in place of one that others hold too, for
  /// which there must be a free one; the index forgets what will not be there any more.
  void make_own(std::int32_t& id) {
    if (holders(id) == 1) {
      if (index_.has(id)) index_.forget(id, free_);
      return;
    }
    const std::int32_t copy = take();
    block_.memory().copy(page(copy), page(id), page_bytes_);
    release(id);
    id = copy;
    ++copies_;
  }

  PrefixIndex& index() { return index_; }
  const PrefixIndex& index() const { return index_; }
  void forget_prefixes() { index_.forget_all(free_); }

 private:
  MemoryBlock block_;
  std::size_t page_bytes_ = 0;
  std::vector<std::byte*> pages_;      // [page id], and the page that is gone
  std::vector<std::int32_t> holders_;  // [page id]
  std::vector<std::int32_t> marks_;    // [page id] 0 between operations
  std::vector<std::int32_t> free_;
  PrefixIndex index_;
  Index peak_ = 0;
  std::int64_t copies_ = 0;
};

/// Raises `filled`, how many positions of each page hold something, to what a sequence of `length`
/// positions has in its pages.
inline void fill_pages(std::vector<Index>& filled, std::span<const std::int32_t> pages,
                       Index page_size, Index length) {
  for (std::int32_t page : pages) {
    auto& used = filled[static_cast<std::size_t>(page)];
    used = (std::max)(used, std::clamp<Index>(length, 0, page_size));
    length -= page_size;
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
