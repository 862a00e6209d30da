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
/// Shapes. All layers hold keys (n, kv_heads, head_dim) and values (n, kv_heads, value_dim), with a
/// value_dim of 0 as wide as keys; or layer_shapes states those of each layer. Where it does not,
/// the first positions that a layer gets may have any other shape with no more elements per
/// position (and, its scales and alignment included, no more bytes per page); the layer keeps it
/// from then on, also when every sequence is freed.
///
/// Sharing. A page belongs to all sequences that were forked over it (a reference count). Whoever
/// appends into a page that others hold too gets a copy of it first; full pages are never written
/// again, so prefixes stay shared. A page is free when its last holder is gone.
///
/// Prefixes. Where nobody knows whose prefix a prompt begins with, the tokens say it:
///
///   const ef::Index known = cache.share_prefix(b, prompt);   // pages of whoever computed these tokens before
///   ...                                                      // compute and append prompt[known], ...
///   cache.keep_prefix(b, text);                              // and let others find them
///
/// A hash finds pages and tokens are compared, so that nothing is ever shared by mistake; a key
/// keeps adapters and tenants apart. Pages that are known stay in the pool when their last holder
/// is gone, and count as free: what is needed is taken from pages nobody knows, then from those
/// that were unused longest, never from one before those that continue it. Writing into a known
/// page (after truncate) makes it unknown, with all that continue it. The same calls give the same
/// pages on every run.
///
/// Pages that run out: std::length_error, with nothing changed, for the whole batch of an append.
/// Unknown or freed ids: std::out_of_range (ids are never used twice). Wrong shapes:
/// std::invalid_argument. INT8 storage is that of kv_cache.h.
///
/// The pool is one allocation, made by the constructor; later ones are page tables only, amortised,
/// and the tokens of keep_prefix. Unused slots hold anything. Const members may be called from many
/// threads at once. A cache can be moved, not copied; what was moved from is empty.
#pragma once

#include <algorithm>
#include <cstdint>
#include <istream>
#include <ostream>
#include <span>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dispatch.h"
#include "kv/paged_config.h"
#include "kv/paged_file.h"
#include "kv/paged_layers.h"
#include "kv/paged_sequences.h"
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
        layers_(detail::paged_layers<Storage>(config_, kName)),
        sequences_(config_, layers_.back().offset + layers_.back().bytes, memory),
        selections_(layers_.size()) {}

  PagedKvCache(PagedKvCache&& other) noexcept { swap(other); }
  PagedKvCache& operator=(PagedKvCache&& other) noexcept {
    PagedKvCache(std::move(other)).swap(*this);
    return *this;
  }

  const PagedKvConfig& config() const { return config_; }
  const Memory& memory() const { return pool().memory(); }
  /// Throws std::invalid_argument for a layer that there is not, as all members do.
  KvLayerShape shape(Index layer_idx) const { return layers_[checked_layer(layer_idx)].shape(); }

  /// INT8 only: stores the keys of a layer by channel instead of by position, with scales that
  /// calibration found, (kv_heads, head_dim) in host memory:
  ///
  ///   q = clamp(round_half_to_even(x / scale of its channel), -127, 127)
  ///
  /// Attention multiplies its queries by the scales and reads the keys as they are. (Where queries
  /// are then quantized, see attention.h, a channel far above the others costs queries what it cost
  /// keys.) Fixes the layer's shape. Throws std::invalid_argument for another shape, scales that
  /// are not positive and finite, or a layer that has positions or had some.
  template <typename Scales>
    requires std::is_same_v<Storage, std::int8_t>
  void set_key_scales(Index layer_idx, const Scales& scales) {
    const std::size_t layer = checked_layer(layer_idx);
    static_assert(std::is_same_v<scalar_of<Scales>, float>, "eigenformer: key scales are float");
    const auto from = input_view<2>(scales);
    const KvLayerShape s = shape(layer_idx);
    detail::require_same_shape(kName, "key scales", from, "the layer",
                               TensorView<const float, 2>(nullptr, s.kv_heads, s.head_dim));
    key_scales_.set(layers_, layer, {from.data(), static_cast<std::size_t>(from.size())}, memory(),
                    kName);
  }

  // ---- sequences --------------------------------------------------------------------------------

  /// An empty sequence. Throws std::bad_alloc.
  SequenceId add_sequence() { return sequences_.add(); }

  /// A sequence with the first `length` positions of another (all of them where length is -1),
  /// sharing its pages. Costs O(pages), copies nothing. Throws std::out_of_range,
  /// std::invalid_argument where length exceeds that of the sequence or lies among positions that
  /// it has given up.
  SequenceId fork(SequenceId sequence, Index length = -1) {
    return sequences_.fork(sequence, length);
  }

  /// Ends a sequence and gives back the pages nobody else holds. Throws std::out_of_range, also the
  /// second time.
  void free(SequenceId sequence) { sequences_.free(sequence); }

  /// Forgets positions [length, ...) of every layer and gives back pages past them, reserved ones
  /// included; layers that are no longer than that stay. Throws std::out_of_range,
  /// std::invalid_argument for a negative length, or one among positions that are given up.
  void truncate(SequenceId sequence, Index length) { sequences_.truncate(sequence, length); }

  /// Claims pages for `length` positions of a sequence, so that appends up to there find them. What
  /// is shared is copied when it is written, not now. Throws std::out_of_range,
  /// std::invalid_argument, std::length_error.
  void reserve(SequenceId sequence, Index length) { sequences_.reserve(sequence, length); }

  /// Gives up positions [keep_first, position) of every layer, but for pages that hold others too
  /// or positions that a layer is still to come to, and gives back their pages: behind the window
  /// of attention, the sinks kept. Positions keep their numbers. Attention that would see what is
  /// gone (window, prefix_length), keys and values refuse. All layers share a page: where full
  /// layers stand beside layers with a window, give each kind a cache of its own. Throws
  /// std::out_of_range, std::invalid_argument for negative positions, or another page of keep_first
  /// than in the calls before.
  void free_before(SequenceId sequence, Index position, Index keep_first = 0) {
    sequences_.free_before(sequence, position, keep_first);
  }

  /// Frees every sequence.
  void clear() { sequences_.clear(); }

  bool contains(SequenceId sequence) const {
    return std::binary_search(list().ids.begin(), list().ids.end(), sequence);
  }
  Index sequence_count() const { return list().count(); }
  /// Ids of the live sequences in order of creation; valid until one is added or freed.
  std::span<const SequenceId> sequences() const { return list().ids; }

  /// Positions that every layer of a sequence holds. Throws std::out_of_range.
  Index length(SequenceId sequence) const { return list().shortest(find(sequence)); }
  Index length(SequenceId sequence, Index layer_idx) const {
    return list().lengths[checked_layer(layer_idx)][find(sequence)];
  }

  /// Positions the sequence has pages for, reserved ones included. Throws std::out_of_range.
  Index capacity(SequenceId sequence) const {
    return static_cast<Index>(list().pages[find(sequence)].size()) * config_.page_size;
  }

  // ---- prefixes ---------------------------------------------------------------------------------

  /// Makes the full pages of a sequence known by their tokens: tokens[i] is the id at position i. A
  /// page that is known already, with the same tokens behind the same pages, is taken over in place
  /// of the sequence's own, which goes back; so requests that computed one prompt side by side end
  /// up with one copy. Positions that not every layer holds, and a last page that is not full, are
  /// left for a later call. Returns how many positions of the sequence are known now. Costs
  /// O(tokens) and, the first time, an allocation of 48 + 4 page_size bytes per page of the pool.
  /// Throws std::out_of_range, std::bad_alloc.
  Index keep_prefix(SequenceId sequence, std::span<const std::int32_t> tokens,
                    const PrefixKey& key = {}) {
    return sequences_.keep_prefix(sequence, tokens, key);
  }

  /// Gives an empty sequence the pages known by the first of these tokens, as fork would, and
  /// returns how many positions they hold: a multiple of page_size, less than tokens.size(), for
  /// the last token is to be computed. Takes the place of pages reserved before. Costs O(tokens).
  /// Throws std::out_of_range, std::invalid_argument for a sequence that has positions,
  /// std::bad_alloc.
  Index share_prefix(SequenceId sequence, std::span<const std::int32_t> tokens,
                     const PrefixKey& key = {}) {
    return sequences_.share_prefix(sequence, tokens, key);
  }

  /// What share_prefix would return.
  Index find_prefix(std::span<const std::int32_t> tokens, const PrefixKey& key = {}) const {
    return sequences_.find_prefix(tokens, key);
  }

  /// Forgets all tokens of all pages, as new weights demand; sequences keep what they hold.
  void forget_prefixes() { sequences_.forget_prefixes(); }

  // ---- append -----------------------------------------------------------------------------------

  /// Appends n positions (n, kv_heads, head_dim) to one layer of one sequence. Keys and values may
  /// be heads in the rows of a wider matrix (ef::heads_of), in all three forms.
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
    const auto k = detail::heads_input<4>(keys);
    const auto v = detail::heads_input<4>(values);
    detail::require_same_rows(kName, "keys", k, "values", v);
    const Index batch = k.dimension(0), n = k.dimension(1);
    detail::require_that(batch == static_cast<Index>(ids.size()), kName, "keys has a batch of ",
                         batch, ", there are ", ids.size(), " sequences");
    const Index tokens = detail::checked_product(batch, n, kName, "keys (batch, n)");
    const auto rows_of = [&](const auto& x) {
      const auto [token_stride, head_stride] = detail::strides_of(x);
      return HeadsView(x.data(), {tokens, x.dimension(2), x.dimension(3)}, token_stride,
                       head_stride);
    };
    append_rows(device, ids, layer_idx, rows_of(k), rows_of(v), n, nullptr);
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
    return source_of(layer, sequence_count(), list().lengths[layer].data(), list().tables.data(),
                     list().gone.data());
  }

  /// Chosen sequences in the order given (one may come twice), through tables of the caller's.
  /// Valid until the cache or the tables change.
  KvSource<Storage> source(Index layer_idx, std::span<const SequenceId> ids,
                           KvSelection& selection) const {
    const std::size_t layer = checked_layer(layer_idx);
    selection.tables.clear();
    selection.lengths.clear();
    selection.gone.clear();
    for (SequenceId id : ids) {
      const std::size_t at = find(id);
      selection.tables.push_back(list().tables[at]);
      selection.lengths.push_back(list().lengths[layer][at]);
      selection.gone.push_back(list().gone[at]);
    }
    return source_of(layer, static_cast<Index>(ids.size()), selection.lengths.data(),
                     selection.tables.data(), selection.gone.data());
  }

  /// The same through tables of the cache's own, one set a layer: valid until the cache changes or
  /// this is called again for the layer, and so, unlike the const members, for one thread at a
  /// time.
  KvSource<Storage> source(Index layer_idx, std::span<const SequenceId> ids) {
    return source(layer_idx, ids, selections_[checked_layer(layer_idx)]);
  }

  // ---- to and from streams ----------------------------------------------------------------------

  /// Writes a sequence, as it is stored, with a checksum (format: kv/paged_file.h). Waits for the
  /// work of a GPU, page by page. Throws std::out_of_range, std::runtime_error where the stream
  /// fails, std::bad_alloc.
  void save(SequenceId sequence, std::ostream& stream) const {
    detail::save_sequence<Storage>(stream, layers_, key_scales_, sequences_, find(sequence));
    if (!stream) detail::fail<std::runtime_error>("PagedKvCache: save: the stream failed");
  }

  /// A new sequence out of such a stream, from a cache of the same Storage, layers, shapes and key
  /// scales by channel; its page_size and memory may be others. A layer without a shape yet takes
  /// the stream's. The stream may come from anybody: all of it is checked, and where it is refused
  /// there is no new sequence (known prefixes may have made room for it). Throws
  /// std::invalid_argument, std::length_error where pages do not suffice, std::bad_alloc.
  SequenceId load(std::istream& stream) {
    checked_layer(0);
    return detail::load_sequence<Storage>(stream, config_, layers_, key_scales_, sequences_);
  }

  // ---- figures ----------------------------------------------------------------------------------

  Index pages_free() const { return pool().free_count(); }
  /// Counts by walking every page table: O(pages held).
  PagedKvStatistics statistics() const { return sequences_.statistics(); }

 private:
  static constexpr const char* kName = "PagedKvCache";
  PagedKvCache() noexcept = default;  // what was moved from
  auto members() noexcept {
    return std::tie(config_, layers_, sequences_, selections_, key_scales_);
  }
  void swap(PagedKvCache& other) noexcept {
    auto mine = members(), theirs = other.members();
    mine.swap(theirs);
  }
  const detail::PagePool& pool() const { return sequences_.pool(); }
  const detail::KvSequences& list() const { return sequences_.list(); }

  std::size_t checked_layer(Index layer_idx) const {
    detail::require_that(layer_idx >= 0 && layer_idx < config_.layers, kName, "layer_idx is ",
                         layer_idx, ", expected 0 to ", config_.layers - 1);
    return static_cast<std::size_t>(layer_idx);
  }
  std::size_t find(SequenceId id) const { return sequences_.find(id); }

  template <typename D, typename Keys, typename Values>
  void append_rows(const D& device, std::span<const SequenceId> ids, Index layer_idx,
                   const Keys& keys, const Values& values, Index each, const Index* offsets) {
    static_assert(std::is_same_v<scalar_of<Keys>, T> && std::is_same_v<scalar_of<Values>, T>,
                  "eigenformer: keys and values hold the scalar T of ef::PagedKvCache<T, Storage>");
    detail::require_same_rows(kName, "keys", keys, "values", values);
    detail::require_memory(kName, "the pool", pool().memory(), memory_of(device));
    const std::size_t layer = checked_layer(layer_idx);
    const detail::PagedLayer fitted = detail::fitted_layer<Storage>(
        config_, layers_, layer, {keys.dimension(1), keys.dimension(2), values.dimension(2)},
        keys.dimension(0), kName);
    KvSelection& selection = selections_[layer];
    // checks ids, and grows the tables while a failure still changes nothing
    source(layer_idx, ids, selection);
    const auto added = [&](std::size_t i) {
      return offsets == nullptr ? each : offsets[i + 1] - offsets[i];
    };
    // Sizes before data: what a view too large for the pool points to must not be read.
    sequences_.require_pages(layer, ids, added);
    detail::checked_size(kName, "keys", keys);
    detail::checked_size(kName, "values", values);
    if constexpr (std::is_same_v<Storage, std::int8_t> && detail::host_readable<D>) {
      detail::require_quantizable(device, kName, "keys", keys);
      detail::require_quantizable(device, kName, "values", values);
    }
    sequences_.claim(layer, ids, added);
    if (keys.dimension(0) > 0) layers_[layer] = fitted;
    const KvSource<Storage> target = source(layer_idx, ids, selection);
    detail::run(device, problem::KvAppend<T, Storage>{
                            keys.data(), values.data(), detail::strides_of(keys),
                            detail::strides_of(values), keys.dimension(0), each, offsets,
                            selection.lengths.data(), sequences_.total_slots(), target});
    sequences_.advance(layer, ids, added);
  }

  /// Of sequences whose tables, lengths and losses these are.
  KvSource<Storage> source_of(std::size_t layer, Index batch, const Index* lengths,
                              const std::int32_t* const* tables,
                              const problem::KeyRange* gone) const {
    auto source = detail::paged_source<Storage>(layers_[layer].layout, batch, lengths,
                                                pool().pages(), tables, layers_[layer].offset);
    source.gone = gone;
    source.key_channel_scales = key_scales_.of(layer);
    return source;
  }

  Tensor<T, 3> read(SequenceId sequence, Index layer_idx, bool values) const {
    const KvLayerShape s = shape(layer_idx);
    Tensor<T, 3> output(length(sequence, layer_idx), s.kv_heads, values ? s.value_dim : s.head_dim);
    read_into(Eigen::DefaultDevice{}, output, sequence, layer_idx, values);
    return output;
  }

  template <typename D, typename Output>
  void read_into(const D& device, Output&& output, SequenceId sequence, Index layer_idx,
                 bool values) const {
    static_assert(std::is_same_v<scalar_of<Output>, T>,
                  "eigenformer: output holds the scalar T of ef::PagedKvCache<T, Storage>");
    const std::size_t layer = checked_layer(layer_idx), at = find(sequence);
    const Index length = list().lengths[layer][at];
    const auto to = output_view<3>(output);
    const KvLayerShape s = shape(layer_idx);
    detail::require_same_shape(
        kName, "output", to, "the sequence",
        TensorView<const T, 3>(nullptr, length, s.kv_heads, values ? s.value_dim : s.head_dim));
    const problem::KeyRange gone = list().gone[at];
    detail::require_that(gone.begin == gone.end, kName, "sequence ", sequence,
                         " has given up the positions ", gone.begin, " to ", gone.end - 1);
    detail::require_memory(kName, "the pool", pool().memory(), memory_of(device));
    const auto one =
        source_of(layer, 1, &list().lengths[layer][at], &list().tables[at], &list().gone[at]);
    detail::run(device, problem::KvRead<T, Storage>{one, length, values, to.data()});
  }

  PagedKvConfig config_;
  std::vector<detail::PagedLayer> layers_;  // [layer]
  detail::PagedSequences sequences_;
  std::vector<KvSelection> selections_;  // [layer]
  detail::KeyChannelScales key_scales_;
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
