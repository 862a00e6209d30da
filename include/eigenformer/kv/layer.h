/// \file
/// The memory of one layer of ef::KvCache: pages of 64 positions in slabs that grow by half, and
/// the tables that name them. Sequences may share pages: whoever writes gets one of its own first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "page.h"
#include "window.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

struct KvShape {
  Index batch = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  bool operator==(const KvShape&) const = default;
};

/// One layer's pages. Nothing was shared yet: page `g * batch + b` holds positions [64 g, 64 (g +
/// 1)) of sequence b.
///
/// What may run out of memory comes in two steps: prepare_... makes what is needed and changes
/// nothing that can be seen, commit() cannot fail.
template <typename Storage>
class KvLayer {
 public:
  static constexpr Index kPageSize = KvRing::kPageSize;

  KvLayer(const KvShape& shape, const KvRing& ring, const Memory& memory)
      : memory_(&memory),
        ring_(ring),
        layout_(kv_page_layout<Storage>(kPageSize, shape.kv_heads, shape.head_dim, shape.value_dim,
                                        "update_kv_cache")) {
    require_countable(shape.batch, 0);
    tables_.lengths.resize(static_cast<std::size_t>(shape.batch));
    tables_.gone.resize(tables_.lengths.size());
    set_length(0);
  }
  KvLayer(KvLayer&&) noexcept = default;
  KvLayer& operator=(KvLayer&&) noexcept = default;
  KvLayer(const KvLayer& other) : KvLayer(other.shape(), other.ring_, *other.memory_) {
    prepare(batch(), other.groups_, [](Index b) { return b; });
    commit();
    const Index used = ring_.pages_of(other.written_);
    for (Index b = 0; b < batch(); ++b)
      for (Index g = 0; g < used; ++g)
        memory_->copy(page(entry(b, g)), other.page(other.entry(b, g)), layout_.bytes);
    written_ = other.written_;
    closed_ = other.closed_;
    set_length(other.length_);
  }
  KvLayer& operator=(const KvLayer& other) { return *this = KvLayer(other); }
  ~KvLayer() = default;

  Index batch() const { return static_cast<Index>(tables_.lengths.size()); }
  KvShape shape() const { return {batch(), layout_.kv_heads, layout_.head_dim, layout_.value_dim}; }
  Index length() const { return length_; }
  /// What can be held without another allocation, as long as the largest Index where that is
  /// everything.
  Index capacity() const {
    return ring_.pages > 0 && groups_ == ring_.begin + ring_.pages
               ? (std::numeric_limits<Index>::max)()
               : groups_ * kPageSize;
  }
  HeldPositions held() const {
    const problem::KeyRange gone = this->gone();
    return gone.begin < gone.end ? HeldPositions{gone.begin, gone.end, length_}
                                 : HeldPositions{0, 0, length_};
  }

  /// After clear() the next update may bring another shape.
  bool closed() const { return closed_; }
  void close() { closed_ = true; }
  void clear() {
    written_ = 0;
    set_length(0);
    closed_ = false;
  }

  /// Whether the positions before `length` that a query there may see are held.
  bool may_truncate(Index length) const {
    const problem::KeyRange gone = this->gone();
    return length >= length_ || length <= gone.begin || length >= gone.end;
  }
  /// To one that it may be truncated to, or to one that was appended.
  void set_length(Index length) {
    length_ = length;
    const bool again = ring_.pages == 0 || length <= gone().begin;  // as if never longer
    written_ = again ? length : (std::max)(written_, length);
    std::fill(tables_.lengths.begin(), tables_.lengths.end(), length);
    std::fill(tables_.gone.begin(), tables_.gone.end(), gone());
  }
  /// What will be gone once the length is `length`.
  problem::KeyRange gone_at(Index length) const { return ring_.gone((std::max)(written_, length)); }

  /// Throws std::length_error where no memory would make room for `length` positions.
  void require_countable(Index length) const { require_countable(batch(), length); }

  /// Room for exactly `length` positions.
  void prepare_room(Index length) {
    drop();
    require_countable(batch(), length);
    const Index groups = ring_.pages_of(length);
    if (groups > groups_) prepare(batch(), groups, [](Index b) { return b; });
  }
  /// Row i of the batch becomes that which row rows[i] was.
  void prepare_select(std::span<const Index> rows) {
    const Index batch = static_cast<Index>(rows.size());
    require_countable(batch, groups_ * kPageSize);
    prepare(batch, groups_, [&](Index i) { return rows[static_cast<std::size_t>(i)]; });
  }
  void commit() noexcept {
    if (!pending_.made) return;
    if (!pending_.pages.empty()) {
      slabs_.push_back(std::move(pending_.slab));  // prepare has left room for it
      pages_.swap(pending_.pages);
    }
    std::swap(tables_, pending_.tables);
    groups_ = pending_.groups;
    drop();
  }
  /// Instead of commit().
  void drop() noexcept {
    pending_.made = false;
    pending_.slab = {};
    std::vector<std::byte*>().swap(pending_.pages);
  }

  /// Room for `length` positions, growing by half of what there is at least. Throws with nothing
  /// changed.
  void grow(Index length) {
    require_countable(batch(), length);
    const Index groups = ring_.pages_of(length);
    if (groups <= groups_) return;
    const Index half_more = (std::min)(groups_ + groups_ / 2, most_groups(batch()));
    prepare_room((std::max)(length, half_more * kPageSize));
    commit();
  }

  /// Gives every sequence pages of its own for positions [length(), end), but for those that will
  /// be gone.
  void own_pages(Index end) {
    const problem::KeyRange gone = gone_at(end);
    for (Index i = length_ / kPageSize; i < pages_for(end, kPageSize); ++i) {
      if (i * kPageSize >= gone.begin && i * kPageSize < gone.end) continue;
      for (Index b = 0; b < batch(); ++b) own_page(b, i);
    }
  }

  KvSource<Storage> source() const {
    auto source = paged_source<Storage>(layout_, batch(), tables_.lengths.data(), pages_.data(),
                                        tables_.rows.data(), 0);
    source.ring = ring_;
    if (ring_.pages > 0) source.gone = tables_.gone.data();
    return source;
  }

 private:
  static constexpr auto kName = "KvCache";
  /// Pages have numbers of 32 bits; positions are counted in Index.
  static constexpr Index kMostPages = (std::min)(Index{(std::numeric_limits<std::int32_t>::max)()},
                                                 (std::numeric_limits<Index>::max)() / kPageSize);

  struct Tables {
    // (batch), all equal: what KvSource points to
    std::vector<Index> lengths;
    std::vector<problem::KeyRange> gone;
    std::vector<std::int32_t> entries;      // (batch, groups) page ids
    std::vector<const std::int32_t*> rows;  // [sequence] -> its row of entries
    std::vector<std::int32_t> holders;      // [page id] entries that name it
    std::vector<std::int32_t> free;         // ids of pages without holder, the next one last
  };
  struct Change {
    bool made = false;
    Index groups = 0;
    MemoryBlock slab;
    std::vector<std::byte*> pages;  // all of them, where some are new
    Tables tables;                  // once committed those of before, whose memory is used again
  };

  static Index most_groups(Index batch) { return kMostPages / (std::max)(Index{1}, batch); }
  void require_countable(Index batch, Index length) const {
    require_capacity(batch <= kMostPages, kName, "a batch of ", batch, " sequences, expected ",
                     kMostPages, " at most");
    require_capacity(ring_.pages_of(length) <= most_groups(batch), kName, length, " positions of ",
                     batch, " sequences take more pages of ", kPageSize, " than the ", kMostPages,
                     " that a page table counts to");
  }

  problem::KeyRange gone() const { return ring_.gone(written_); }
  std::byte* page(std::int32_t id) const { return pages_[static_cast<std::size_t>(id)]; }
  const std::int32_t& entry(Index b, Index g) const {
    return tables_.entries[static_cast<std::size_t>(b * groups_ + g)];
  }

  /// Tables of a batch whose sequence b has the pages of row_of(b), and as many more as it takes to
  /// have `groups`. There are never fewer pages than entries, so that where an entry shares its
  /// page another one is free.
  template <typename RowOf>
  void prepare(Index batch, Index groups, const RowOf& row_of) {
    drop();
    const auto held = pages_.size(), wanted = static_cast<std::size_t>(batch * groups),
               total = (std::max)(held, wanted);
    if (total > held) add_pages(total - held);
    Tables& t = pending_.tables;
    t.lengths.assign(static_cast<std::size_t>(batch), length_);
    t.gone.assign(t.lengths.size(), gone());
    t.holders.assign(total, 0);
    t.entries.resize(wanted);
    t.rows.resize(t.lengths.size());
    const Index kept = (std::min)(groups, groups_);
    for (Index b = 0; b < batch; ++b) {
      std::int32_t* const row = t.entries.data() + b * groups;
      t.rows[static_cast<std::size_t>(b)] = row;
      for (Index g = 0; g < kept; ++g) {
        row[g] = entry(row_of(b), g);
        ++t.holders[static_cast<std::size_t>(row[g])];
      }
    }
    t.free.clear();
    t.free.reserve(total);
    for (std::size_t id = total; id-- > 0;)
      if (t.holders[id] == 0) t.free.push_back(static_cast<std::int32_t>(id));
    for (Index g = kept; g < groups; ++g)
      for (Index b = 0; b < batch; ++b)
        t.entries[static_cast<std::size_t>(b * groups + g)] = take(t);
    pending_.groups = groups;
    pending_.made = true;
  }
  void add_pages(std::size_t count) {
    const Index bytes = checked_product(
        static_cast<Index>(count), static_cast<Index>(layout_.bytes), kName, "a slab of pages");
    pending_.slab = MemoryBlock(static_cast<std::size_t>(bytes), *memory_, Pages::huge);
    pending_.pages.reserve(pages_.size() + count);
    pending_.pages = pages_;
    for (std::size_t i = 0; i < count; ++i)
      pending_.pages.push_back(pending_.slab.data() + i * layout_.bytes);
    if (slabs_.size() == slabs_.capacity()) slabs_.reserve(slabs_.size() * 2 + 4);
  }
  static std::int32_t take(Tables& t) {
    const std::int32_t id = t.free.back();
    t.free.pop_back();
    t.holders[static_cast<std::size_t>(id)] = 1;
    return id;
  }

  /// Page i of sequence b, before positions from the length on are written to it.
  void own_page(Index b, Index i) {
    const Index place = b * groups_ + ring_.place(i);
    std::int32_t& id = tables_.entries[static_cast<std::size_t>(place)];
    std::int32_t& holders = tables_.holders[static_cast<std::size_t>(id)];
    if (holders == 1) return;
    const std::int32_t own = take(tables_);
    if (i * kPageSize < length_) memory_->copy(page(own), page(id), layout_.bytes);
    --holders;
    id = own;
  }

  const Memory* memory_;  // of the slabs
  KvRing ring_ = {};
  KvPageLayout layout_;
  Index length_ = 0, written_ = 0;  // written_: the most there were since the ring began to turn
  Index groups_ = 0;                // pages of a sequence
  bool closed_ = false;
  std::vector<MemoryBlock> slabs_;
  std::vector<std::byte*> pages_;  // [page id]
  Tables tables_;
  Change pending_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
