/// \file
/// A KV cache for many sequences of different lengths that come and go (Kwon et al., "Efficient
/// Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023): one pool of
/// fixed pages, a page table per sequence, prefixes shared by copy-on-write.
///
///   ef::PagedKvCache<float> cache({.layers = 2, .kv_heads = 4, .head_dim = 64, .page_size = 16, .page_count = 1000});
///   const ef::SequenceId a = cache.add_sequence();
///   cache.append(a, layer, keys, values);                    // (n, kv_heads, head_dim)
///   const ef::SequenceId b = cache.fork(a);                  // shares every page of a until one of them writes
///   ef::update_kv_cache(cache, ids, new_keys, new_values, layer);   // (batch, n, kv_heads, head_dim), one sequence per row
///   cache.free(a);
///
/// Layers. A page holds page_size positions of every layer. Each layer of a sequence has its own
/// length, which its appends advance; the layer that is ahead claims pages, and the others follow
/// into them without claiming more. A step therefore appends the same tokens layer after layer, and
/// pages can run out in its first layer only; reserve(sequence, length) claims them before that.
///
/// Sharing. A page belongs to all sequences that were forked over it (a reference count). Whoever
/// appends into a page that others hold too gets a copy of it first; full pages are never written
/// again, so prefixes stay shared. A page is free when its last holder is gone.
///
/// Pages that run out: std::length_error, with nothing changed, for the whole batch of an append.
/// Unknown or freed ids: std::out_of_range (ids are never used twice). Wrong shapes:
/// std::invalid_argument. INT8 storage is that of kv_cache.h.
///
/// The pool is one allocation, made by the constructor; later ones are page tables only, amortised.
/// Unused slots hold anything. Const members may be called from many threads at once. A cache can
/// be moved, not copied; what was moved from is empty.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dispatch.h"
#include "kv/page_pool.h"
#include "kv/paged_config.h"
#include "kv/sequences.h"
#include "kv_cache.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

template <FloatingScalar T, typename Storage = T>
  requires KvStorage<Storage, T>
class PagedKvCache {
 public:
  using scalar = T;
  using storage = Storage;

  /// The pool lies in `memory`, such as ef::memory_of(device), as KvCache's pages may. Throws
  /// std::invalid_argument for sizes below 1 (page_count: below 0) or a pool that overflows,
  /// std::bad_alloc.
  explicit PagedKvCache(const PagedKvConfig& config, const Memory& memory = host_memory)
      : config_(detail::checked_config(config, kName)),
        layout_(detail::kv_page_layout<Storage>(config.page_size, config.kv_heads, config.head_dim,
                                                config.head_dim, kName)),
        pool_(config.page_count,
              static_cast<std::size_t>(detail::checked_product(
                  config.layers, static_cast<Index>(layout_.bytes), kName, "a page")),
              memory, kName),
        sequences_(config.layers),
        selections_(static_cast<std::size_t>(config.layers)) {}

  PagedKvCache(PagedKvCache&& other) noexcept { swap(other); }
  PagedKvCache& operator=(PagedKvCache&& other) noexcept {
    PagedKvCache(std::move(other)).swap(*this);
    return *this;
  }

  const PagedKvConfig& config() const { return config_; }
  const Memory& memory() const { return pool_.memory(); }

  // ---- sequences --------------------------------------------------------------------------------

  /// An empty sequence. Throws std::bad_alloc.
  SequenceId add_sequence() {
    sequences_.make_room_for_one();
    return sequences_.push({});
  }

  /// A sequence with the first `length` positions of another (all of them where length is -1),
  /// sharing its pages. Costs O(pages), copies nothing. Throws std::out_of_range,
  /// std::invalid_argument where length exceeds that of the sequence.
  SequenceId fork(SequenceId sequence, Index length = -1) {
    const std::size_t parent = find(sequence);
    const Index longest = sequences_.longest(parent);
    detail::require_that(length >= -1 && length <= longest, kName, "fork at length ", length,
                         ", sequence ", sequence, " has ", longest, " positions");
    const Index kept = length == -1 ? longest : length;
    sequences_.make_room_for_one();
    const auto& held = sequences_.pages[parent];
    std::vector<std::int32_t> pages(held.begin(),
                                    held.begin() + detail::pages_for(kept, config_.page_size));
    for (std::int32_t page : pages) pool_.retain(page);
    return sequences_.push_fork(std::move(pages), parent, kept);
  }

  /// Ends a sequence and gives back the pages nobody else holds. Throws std::out_of_range, also the
  /// second time.
  void free(SequenceId sequence) {
    const std::size_t at = find(sequence);
    for (std::int32_t page : sequences_.pages[at]) pool_.release(page);
    sequences_.erase(at);
  }

  /// Forgets positions [length, ...) of every layer and gives back pages past them, reserved ones
  /// included; layers that are no longer than that stay. Throws std::out_of_range,
  /// std::invalid_argument for a negative length.
  void truncate(SequenceId sequence, Index length) {
    const std::size_t at = find(sequence);
    detail::require_that(length >= 0, kName, "truncate to length ", length, ", expected 0 or more");
    for (auto& lengths : sequences_.lengths) lengths[at] = (std::min)(lengths[at], length);
    auto& pages = sequences_.pages[at];
    const auto kept = static_cast<std::size_t>(
        detail::pages_for((std::min)(length, total_slots()), config_.page_size));
    while (pages.size() > kept) {
      pool_.release(pages.back());
      pages.pop_back();
    }
  }

  /// Claims pages for `length` positions of a sequence, so that appends up to there find them. What
  /// is shared is copied when it is written, not now. Throws std::out_of_range,
  /// std::invalid_argument, std::length_error.
  void reserve(SequenceId sequence, Index length) {
    const std::size_t at = find(sequence);
    detail::require_that(length >= 0, kName, "reserve a length of ", length,
                         ", expected 0 or more");
    auto& pages = sequences_.pages[at];
    const Index wanted = detail::pages_for(length, config_.page_size),
                held = static_cast<Index>(pages.size());
    if (wanted <= held) return;
    pool_.require_free(wanted - held, kName);
    grow_table(at, wanted);
    take_pages(at, wanted);
  }

  /// Frees every sequence.
  void clear() {
    while (sequences_.count() > 0) free(sequences_.ids.back());
  }

  bool contains(SequenceId sequence) const {
    return std::binary_search(sequences_.ids.begin(), sequences_.ids.end(), sequence);
  }
  Index sequence_count() const { return sequences_.count(); }
  /// Ids of the live sequences in order of creation; valid until one is added or freed.
  std::span<const SequenceId> sequences() const { return sequences_.ids; }

  /// Positions that every layer of a sequence holds. Throws std::out_of_range.
  Index length(SequenceId sequence) const { return sequences_.shortest(find(sequence)); }
  Index length(SequenceId sequence, Index layer_idx) const {
    return sequences_.lengths[checked_layer(layer_idx)][find(sequence)];
  }

  /// Positions the sequence has pages for, reserved ones included. Throws std::out_of_range.
  Index capacity(SequenceId sequence) const {
    return static_cast<Index>(sequences_.pages[find(sequence)].size()) * config_.page_size;
  }

  // ---- append -----------------------------------------------------------------------------------

  /// Appends n positions (n, kv_heads, head_dim) to one layer of one sequence. Keys and
  /// values of rank 3, here and in the ragged form, may be heads in the rows of a wider matrix
  /// (ef::heads_of).
  template <Device D, typename Keys, typename Values>
  void append(const D& device, SequenceId sequence, Index layer_idx, const Keys& keys,
              const Values& values) {
    const auto key_rows = detail::heads_input<3>(keys);
    const auto value_rows = detail::heads_input<3>(values);
    append_rows(device, std::span(&sequence, 1), layer_idx, key_rows, value_rows,
                key_rows.dimension(0), nullptr);
  }
  template <typename Keys, typename Values>
  void append(SequenceId sequence, Index layer_idx, const Keys& keys, const Values& values) {
    append(Eigen::DefaultDevice{}, sequence, layer_idx, keys, values);
  }

  /// Appends to several sequences at once, all or none: rows [offsets[i], offsets[i + 1]) of
  /// (tokens, kv_heads, head_dim) to sequence i.
  template <Device D, typename Keys, typename Values>
  void append(const D& device, std::span<const SequenceId> ids, std::span<const Index> offsets,
              Index layer_idx, const Keys& keys, const Values& values) {
    const auto key_rows = detail::heads_input<3>(keys);
    const auto value_rows = detail::heads_input<3>(values);
    detail::require_that(offsets.size() == ids.size() + 1 && offsets.front() == 0 &&
                             offsets.back() == key_rows.dimension(0) &&
                             std::is_sorted(offsets.begin(), offsets.end()),
                         kName, "offsets of ", offsets.size(), " elements must rise from 0 to ",
                         key_rows.dimension(0), " tokens in ", ids.size(), " + 1 steps");
    append_rows(device, ids, layer_idx, key_rows, value_rows, 0, offsets.data());
  }
  template <typename Keys, typename Values>
  void append(std::span<const SequenceId> ids, std::span<const Index> offsets, Index layer_idx,
              const Keys& keys, const Values& values) {
    append(Eigen::DefaultDevice{}, ids, offsets, layer_idx, keys, values);
  }

  /// The same number of positions to each: (batch, n, kv_heads, head_dim), row i to sequence
  /// ids[i].
  template <Device D, typename Keys, typename Values>
  void append(const D& device, std::span<const SequenceId> ids, Index layer_idx, const Keys& keys,
              const Values& values) {
    const auto k = input_view<4>(keys);
    const auto v = input_view<4>(values);
    detail::require_same_shape(kName, "keys", k, "values", v);
    const Index batch = k.dimension(0), n = k.dimension(1);
    detail::require_that(batch == static_cast<Index>(ids.size()), kName, "keys has a batch of ",
                         batch, ", there are ", ids.size(), " sequences");
    const Index tokens = detail::checked_product(batch, n, kName, "keys (batch, n)");
    const TensorView<const scalar_of<Keys>, 3> key_rows(k.data(), tokens, k.dimension(2),
                                                        k.dimension(3));
    const TensorView<const scalar_of<Values>, 3> value_rows(v.data(), tokens, v.dimension(2),
                                                            v.dimension(3));
    append_rows(device, ids, layer_idx, key_rows, value_rows, n, nullptr);
  }
  template <typename Keys, typename Values>
  void append(std::span<const SequenceId> ids, Index layer_idx, const Keys& keys,
              const Values& values) {
    append(Eigen::DefaultDevice{}, ids, layer_idx, keys, values);
  }

  // ---- read -------------------------------------------------------------------------------------

  /// A copy of a layer's keys or values of one sequence (length, kv_heads, head_dim), INT8
  /// dequantized.
  Tensor<T, 3> keys(SequenceId sequence, Index layer_idx) const {
    return read(sequence, layer_idx, false);
  }
  Tensor<T, 3> values(SequenceId sequence, Index layer_idx) const {
    return read(sequence, layer_idx, true);
  }
  /// The same into `output` of that shape, on any device that works on the pool's memory.
  template <Device D, typename Output>
  void keys_into(const D& device, Output&& output, SequenceId sequence, Index layer_idx) const {
    read_into(device, output, sequence, layer_idx, false);
  }
  template <Device D, typename Output>
  void values_into(const D& device, Output&& output, SequenceId sequence, Index layer_idx) const {
    read_into(device, output, sequence, layer_idx, true);
  }

  /// What attention reads: all live sequences in order of creation. Valid until the cache is next
  /// changed.
  KvSource<Storage> source(Index layer_idx) const {
    const std::size_t layer = checked_layer(layer_idx);
    return source_of(layer, sequence_count(), sequences_.lengths[layer].data(),
                     sequences_.tables.data());
  }

  /// Chosen sequences in the order given (one may come twice), through tables of the caller's.
  /// Valid until the cache or the tables change.
  KvSource<Storage> source(Index layer_idx, std::span<const SequenceId> ids,
                           KvSelection& selection) const {
    const std::size_t layer = checked_layer(layer_idx);
    selection.tables.clear();
    selection.lengths.clear();
    for (SequenceId id : ids) {
      const std::size_t at = find(id);
      selection.tables.push_back(sequences_.tables[at]);
      selection.lengths.push_back(sequences_.lengths[layer][at]);
    }
    return source_of(layer, static_cast<Index>(ids.size()), selection.lengths.data(),
                     selection.tables.data());
  }

  /// The same through tables of the cache's own, one set a layer: valid until the cache changes or
  /// this is called again for the layer, and so, unlike the const members, for one thread at a
  /// time.
  KvSource<Storage> source(Index layer_idx, std::span<const SequenceId> ids) {
    return source(layer_idx, ids, selections_[checked_layer(layer_idx)]);
  }

  // ---- figures ----------------------------------------------------------------------------------

  Index pages_free() const { return pool_.free_count(); }
  /// Counts by walking every page table: O(pages held).
  PagedKvStatistics statistics() const {
    PagedKvStatistics result;
    result.sequences = sequence_count();
    result.pages_total = config_.page_count;
    result.pages_used = config_.page_count - pool_.free_count();
    result.pages_peak = pool_.peak();
    result.copies = pool_.copies();
    result.pages_shared = pool_.shared_count();
    std::vector<Index> filled(static_cast<std::size_t>(config_.page_count), 0);
    for (std::size_t at = 0; at < sequences_.ids.size(); ++at) {
      const Index length = sequences_.longest(at);
      result.tokens += length;
      detail::fill_pages(filled, sequences_.pages[at], config_.page_size, length);
    }
    for (Index used : filled) result.slots_used += used;
    if (result.pages_used > 0)
      result.utilisation = static_cast<double>(result.slots_used) /
                           static_cast<double>(result.pages_used * config_.page_size);
    return result;
  }

 private:
  static constexpr const char* kName = "PagedKvCache";
  PagedKvCache() noexcept = default;  // what was moved from
  auto members() noexcept {
    return std::tie(config_, layout_, pool_, sequences_, selections_, appends_);
  }
  void swap(PagedKvCache& other) noexcept {
    auto mine = members(), theirs = other.members();
    mine.swap(theirs);
  }
  Index total_slots() const { return config_.page_count * config_.page_size; }

  std::size_t checked_layer(Index layer_idx) const {
    detail::require_that(layer_idx >= 0 && layer_idx < config_.layers, kName, "layer_idx is ",
                         layer_idx, ", expected 0 to ", config_.layers - 1);
    return static_cast<std::size_t>(layer_idx);
  }
  std::size_t find(SequenceId id) const { return sequences_.find(id, kName); }

  void grow_table(std::size_t at, Index pages) {
    auto& table = sequences_.pages[at];
    if (static_cast<std::size_t>(pages) > table.capacity())
      table.reserve((std::max)(static_cast<std::size_t>(pages), table.capacity() * 2));
    sequences_.tables[at] = table.data();
  }
  void take_pages(std::size_t at, Index pages) {
    auto& table = sequences_.pages[at];
    while (static_cast<Index>(table.size()) < pages) table.push_back(pool_.take());
  }

  /// Pages of a sequence that positions [begin, end) fall into and that it holds already.
  std::pair<Index, Index> held_pages(std::size_t at, Index begin, Index end) const {
    const Index held = static_cast<Index>(sequences_.pages[at].size());
    return {(std::min)(begin / config_.page_size, held),
            (std::min)(detail::pages_for(end, config_.page_size), held)};
  }

  template <typename D, typename Keys, typename Values>
  void append_rows(const D& device, std::span<const SequenceId> ids, Index layer_idx,
                   const Keys& keys, const Values& values, Index each, const Index* offsets) {
    static_assert(std::is_same_v<scalar_of<Keys>, T> && std::is_same_v<scalar_of<Values>, T>,
                  "eigenformer: keys and values hold the scalar T of ef::PagedKvCache<T, Storage>");
    detail::require_same_shape(kName, "keys", keys, "values", values);
    detail::require_memory(kName, "the pool", pool_.memory(), memory_of(device));
    const std::size_t layer = checked_layer(layer_idx);
    if (keys.dimension(1) != config_.kv_heads || keys.dimension(2) != config_.head_dim)
      detail::require_that(false, kName, "keys (tokens, kv_heads, head_dim) has shape ",
                           detail::shape_text(keys), ", the cache has ", config_.kv_heads,
                           " heads of ", config_.head_dim);
    KvSelection& selection = selections_[layer];
    // checks ids, and grows the tables while a failure still changes nothing
    source(layer_idx, ids, selection);
    const auto added = [&](std::size_t i) {
      return offsets == nullptr ? each : offsets[i + 1] - offsets[i];
    };
    // Sizes before data: what a view too large for the pool points to must not be read.
    require_pages(layer, ids, added);
    detail::checked_size(kName, "keys", keys);
    if constexpr (std::is_same_v<Storage, std::int8_t> && detail::host_readable<D>) {
      detail::require_quantizable(device, kName, "keys", keys);
      detail::require_quantizable(device, kName, "values", values);
    }
    claim(layer, ids, added);
    const KvSource<Storage> target = source(layer_idx, ids, selection);
    detail::run(device, problem::KvAppend<T, Storage>{
                            keys.data(), values.data(), detail::strides_of(keys),
                            detail::strides_of(values), keys.dimension(0), each, offsets,
                            selection.lengths.data(), total_slots(), target});
    for (std::size_t i = 0; i < ids.size(); ++i)
      sequences_.lengths[layer][find(ids[i])] += added(i);
  }

  /// Throws where the pool has not enough pages for the new positions of all sequences.
  template <typename Added>
  void require_pages(std::size_t layer, std::span<const SequenceId> ids, const Added& added) {
    Index needed = 0;
    ++appends_;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::size_t at = find(ids[i]);
      detail::require_that(std::exchange(sequences_.last_append[at], appends_) != appends_, kName,
                           "sequence ", ids[i], " comes twice in an append");
      const Index begin = sequences_.lengths[layer][at];
      detail::require_capacity(added(i) <= total_slots() - begin, kName, added(i),
                               " more positions behind ", begin, " of sequence ", ids[i],
                               ", the pool has ", total_slots());
      const Index pages = detail::pages_for(begin + added(i), config_.page_size);
      needed += std::max<Index>(0, pages - static_cast<Index>(sequences_.pages[at].size()));
    }
    needed += copies_needed(layer, ids, added);
    pool_.require_free(needed, kName);
  }

  /// Gives every sequence pages of its own, which require_pages has found, for its new positions,
  /// or throws with nothing changed.
  template <typename Added>
  void claim(std::size_t layer, std::span<const SequenceId> ids, const Added& added) {
    const auto end_of = [&](std::size_t i, std::size_t at) {
      return sequences_.lengths[layer][at] + added(i);
    };
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::size_t at = find(ids[i]);
      grow_table(at, detail::pages_for(end_of(i, at), config_.page_size));
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {  // nothing throws from here on
      const std::size_t at = find(ids[i]);
      if (added(i) == 0) continue;
      const auto [first, last] = held_pages(at, sequences_.lengths[layer][at], end_of(i, at));
      for (Index p = first; p < last; ++p)
        pool_.make_own(sequences_.pages[at][static_cast<std::size_t>(p)]);
      take_pages(at, detail::pages_for(end_of(i, at), config_.page_size));
    }
  }

  /// How many pages the batch must copy.
  template <typename Added>
  Index copies_needed(std::size_t layer, std::span<const SequenceId> ids, const Added& added) {
    return pool_.copies_needed([&](auto&& visit) {
      for (std::size_t i = 0; i < ids.size(); ++i) {
        if (added(i) == 0) continue;
        const std::size_t at = find(ids[i]);
        const Index length = sequences_.lengths[layer][at];
        const auto [first, last] = held_pages(at, length, length + added(i));
        for (Index p = first; p < last; ++p)
          visit(sequences_.pages[at][static_cast<std::size_t>(p)]);
      }
    });
  }

  KvSource<Storage> source_of(std::size_t layer, Index batch, const Index* lengths,
                              const std::int32_t* const* tables) const {
    return detail::paged_source<Storage>(layout_, batch, lengths, pool_.pages(), tables,
                                         layer * layout_.bytes);
  }

  Tensor<T, 3> read(SequenceId sequence, Index layer_idx, bool values) const {
    Tensor<T, 3> output(length(sequence, layer_idx), config_.kv_heads, config_.head_dim);
    read_into(Eigen::DefaultDevice{}, output, sequence, layer_idx, values);
    return output;
  }

  template <typename D, typename Output>
  void read_into(const D& device, Output&& output, SequenceId sequence, Index layer_idx,
                 bool values) const {
    static_assert(std::is_same_v<scalar_of<Output>, T>,
                  "eigenformer: output holds the scalar T of ef::PagedKvCache<T, Storage>");
    const std::size_t layer = checked_layer(layer_idx), at = find(sequence);
    const Index length = sequences_.lengths[layer][at];
    const auto to = output_view<3>(output);
    detail::require_same_shape(
        kName, "output", to, "the sequence",
        TensorView<const T, 3>(nullptr, length, config_.kv_heads, config_.head_dim));
    detail::require_memory(kName, "the pool", pool_.memory(), memory_of(device));
    const auto one = source_of(layer, 1, &sequences_.lengths[layer][at], &sequences_.tables[at]);
    detail::run(device, problem::KvRead<T, Storage>{one, length, values, to.data()});
  }

  PagedKvConfig config_;
  detail::KvPageLayout layout_;
  detail::PagePool pool_;
  detail::KvSequences sequences_;
  std::vector<KvSelection> selections_;  // [layer]
  std::int64_t appends_ = 0;
};

/// Appends to the given sequences, row i to ids[i]; see PagedKvCache::append.
template <Device D, typename T, typename Storage, typename Keys, typename Values>
void update_kv_cache(const D& device, PagedKvCache<T, Storage>& cache,
                     std::span<const SequenceId> ids, const Keys& new_keys,
                     const Values& new_values, Index layer_idx) {
  cache.append(device, ids, layer_idx, new_keys, new_values);
}
template <typename T, typename Storage, typename Keys, typename Values>
void update_kv_cache(PagedKvCache<T, Storage>& cache, std::span<const SequenceId> ids,
                     const Keys& new_keys, const Values& new_values, Index layer_idx) {
  cache.append(ids, layer_idx, new_keys, new_values);
}

/// Appends to all live sequences in order of creation: (batch, n, kv_heads, head_dim) with as many
/// rows as there are sequences.
template <Device D, typename T, typename Storage, typename Keys, typename Values>
void update_kv_cache(const D& device, PagedKvCache<T, Storage>& cache, const Keys& new_keys,
                     const Values& new_values, Index layer_idx) {
  cache.append(device, cache.sequences(), layer_idx, new_keys, new_values);
}
template <typename T, typename Storage, typename Keys, typename Values>
void update_kv_cache(PagedKvCache<T, Storage>& cache, const Keys& new_keys,
                     const Values& new_values, Index layer_idx) {
  update_kv_cache(Eigen::DefaultDevice{}, cache, new_keys, new_values, layer_idx);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
