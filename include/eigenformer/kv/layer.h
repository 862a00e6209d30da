/// \file
/// The memory of one layer of ef::KvCache: pages of 64 positions in slabs that grow by half, and
/// the tables that name them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "page.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// One layer's pages: page `g * batch + b` holds positions [64 g, 64 (g + 1)) of sequence b.
template <typename Storage>
class KvLayer {
 public:
  static constexpr Index kPageSize = 64;

  KvLayer(Index batch, Index kv_heads, Index head_dim, const Memory& memory)
      : memory_(&memory),
        layout_(
            kv_page_layout<Storage>(kPageSize, kv_heads, head_dim, head_dim, "update_kv_cache")),
        lengths_(checked_batch(batch), 0) {}
  KvLayer(KvLayer&&) noexcept = default;
  KvLayer& operator=(KvLayer&&) noexcept = default;
  KvLayer(const KvLayer& other)
      : memory_(other.memory_),
        layout_(other.layout_),
        length_(other.length_),
        closed_(other.closed_),
        lengths_(other.lengths_) {
    commit(growth_to(other.groups_, slab_for(other.groups_)));
    const std::size_t used =
        static_cast<std::size_t>(pages_for(length_, kPageSize)) * lengths_.size();
    for (std::size_t id = 0; id < used; ++id)
      memory_->copy(pages_[id], other.pages_[id], layout_.bytes);
  }
  KvLayer& operator=(const KvLayer& other) { return *this = KvLayer(other); }
  ~KvLayer() = default;

  Index batch() const { return static_cast<Index>(lengths_.size()); }
  Index kv_heads() const { return layout_.kv_heads; }
  Index head_dim() const { return layout_.head_dim; }
  Index length() const { return length_; }
  Index capacity() const { return groups_ * kPageSize; }
  bool has_shape(Index batch, Index kv_heads, Index head_dim) const {
    return this->batch() == batch && this->kv_heads() == kv_heads && this->head_dim() == head_dim;
  }

  /// After clear() the next update may bring another shape.
  bool closed() const { return closed_; }
  void close() { closed_ = true; }
  void clear() {
    set_length(0);
    closed_ = false;
  }

  void set_length(Index length) {
    length_ = length;
    std::fill(lengths_.begin(), lengths_.end(), length);
  }

  /// New pages and the tables that name them, made before anything changes.
  struct Growth {
    Index groups = 0;  // 0: there is room already
    MemoryBlock slab;
    std::vector<std::byte*> pages;
    std::vector<std::int32_t> entries;
    std::vector<const std::int32_t*> tables;
  };

  /// What it takes to have room for exactly `length` positions. Changes nothing that can be seen.
  Growth growth_for(Index length) {
    const Index groups = checked_groups(length);
    return groups <= groups_ ? Growth{} : growth_to(groups, slab_for(groups));
  }
  void commit(Growth&& growth) noexcept {
    if (growth.groups <= groups_) return;
    slabs_.push_back(std::move(growth.slab));  // growth_to has left room for it
    pages_ = std::move(growth.pages);
    entries_ = std::move(growth.entries);
    tables_ = std::move(growth.tables);
    groups_ = growth.groups;
  }

  /// Throws std::length_error where no memory would make room for `length` positions.
  void require_countable(Index length) const { checked_groups(length); }

  /// Room for `length` positions, growing by half of what there is at least. Throws with nothing
  /// changed.
  void grow(Index length) {
    const Index groups = checked_groups(length);
    if (groups <= groups_) return;
    const Index wanted = (std::max)(groups, (std::min)(groups_ + groups_ / 2, most_groups()));
    commit(growth_to(wanted, slab_for(wanted)));
  }

  KvSource<Storage> source() const {
    return paged_source<Storage>(layout_, batch(), lengths_.data(), pages_.data(), tables_.data(),
                                 0);
  }

 private:
  static constexpr auto kName = "KvCache";
  /// Pages have numbers of 32 bits; positions are counted in Index.
  static constexpr Index kMostPages = (std::min)(Index{(std::numeric_limits<std::int32_t>::max)()},
                                                 (std::numeric_limits<Index>::max)() / kPageSize);

  static std::size_t checked_batch(Index batch) {
    require_capacity(batch <= kMostPages, kName, "a batch of ", batch, " sequences, expected ",
                     kMostPages, " at most");
    return static_cast<std::size_t>(batch);
  }
  Index most_groups() const { return kMostPages / (std::max)(Index{1}, batch()); }
  Index checked_groups(Index length) const {
    const Index groups = pages_for(length, kPageSize);
    require_capacity(groups <= most_groups(), kName, length, " positions of ", batch(),
                     " sequences take more pages of ", kPageSize, " than the ", kMostPages,
                     " that a page table counts to");
    return groups;
  }
  MemoryBlock slab_for(Index groups) const {
    const Index bytes = checked_product(
        (groups - groups_) * batch(), static_cast<Index>(layout_.bytes), kName, "a slab of pages");
    return MemoryBlock(static_cast<std::size_t>(bytes), *memory_);
  }

  Growth growth_to(Index groups, MemoryBlock slab) {
    const Index count = groups * batch(), added = count - static_cast<Index>(pages_.size());
    Growth growth{groups, std::move(slab), pages_, {}, {}};
    growth.pages.reserve(static_cast<std::size_t>(count));
    for (Index i = 0; i < added; ++i)
      growth.pages.push_back(growth.slab.data() + static_cast<std::size_t>(i) * layout_.bytes);
    growth.entries.resize(static_cast<std::size_t>(count));
    growth.tables.resize(lengths_.size());
    for (Index b = 0; b < batch(); ++b) {
      std::int32_t* table = growth.entries.data() + b * groups;
      growth.tables[static_cast<std::size_t>(b)] = table;
      for (Index g = 0; g < groups; ++g) table[g] = static_cast<std::int32_t>(g * batch() + b);
    }
    if (slabs_.size() == slabs_.capacity()) slabs_.reserve(slabs_.size() * 2 + 4);
    return growth;
  }

  const Memory* memory_;  // of the slabs
  KvPageLayout layout_;
  Index length_ = 0, groups_ = 0;
  bool closed_ = false;
  std::vector<Index> lengths_;  // (batch), all equal: what KvSource points to
  std::vector<MemoryBlock> slabs_;
  std::vector<std::byte*> pages_;            // [page id]
  std::vector<std::int32_t> entries_;        // (batch, groups) page ids
  std::vector<const std::int32_t*> tables_;  // [sequence] -> its row of entries_
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
