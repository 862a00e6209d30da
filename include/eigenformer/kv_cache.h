/// \file
/// The KV cache of a decoder (Pope et al., "Efficiently Scaling Transformer Inference", 2022): keys
/// and values of earlier tokens, kept so that a step computes those of new tokens only. All
/// sequences of the batch have one length; sequences that differ, come and go are paged_kv_cache.h.
///
///   ef::KvCache<float> cache;
///   ef::update_kv_cache(cache, new_keys, new_values, layer_idx);   // both (batch, n, kv_heads, head_dim), n >= 1
///   ef::Tensor<float, 4> k = cache.keys(layer_idx);                // (batch, length, kv_heads, head_dim)
///   cache.select(parents);                                         // beam search: rows kept, dropped and duplicated
///
/// The first update of a layer fixes its batch, heads, head_dim and the width of values, value_dim,
/// which may be another (MLA: 576 and 512, or 192 and 128); layers may differ in heads and widths
/// and, while a step is under way, in length. Prefill is n > 1, decode n = 1. New keys and values
/// may lie in a QKV projection (ef::heads_of).
///
/// Memory: pages of 64 positions, taken from slabs that grow by half. An append writes the new
/// rows, moves no earlier one and costs O(new elements) amortised; after reserve(max_length) it
/// allocates nothing up to that length. Unused slots hold anything.
///
/// KvCache<T, Storage> stores T itself, a narrower floating-point scalar (rounded to nearest even),
/// or std::int8_t with one scale per position and head:
///
///   scale = max|x| / 127 over the row's head_dim elements; 1 where all are zero
///   q     = round_half_to_even(x / scale), in [-127, 127]
///
/// A row to be stored as INT8 that holds NaN, infinity or a double whose scale is above the largest
/// float has no scale: the update throws and names the element. That check reads the new elements
/// once more; on a GPU it is left out, and such a row gets the scale NaN. Other storage takes NaN
/// and infinity as they are.
///
/// A window (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024): a
/// cache that keeps the first positions and the newest ones, in memory that does not grow:
///
///   ef::KvCache<float> cache({.window = 4096, .sinks = 4});
///   ef::attention_with_kv_cache(q, cache, layer, {.causal = true, .window = 4096, .prefix_length = 4});
///
/// Positions stay what they were: keys are kept as they came, after RoPE at their own positions,
/// and nothing is turned again; length() counts every position that was ever appended. Attention
/// gives the bits of a cache that keeps everything, under the same options: query p sees the sinks
/// and p - window < j <= p. What is kept is whole pages of 64 (held() says which): at least what
/// all queries of an append of up to `chunk` positions see. A longer append is taken, but the keys
/// that its first queries see may be gone by its end. Attention refuses options, or a lack of them,
/// under which a query would see what is gone. Memory: sinks + window + chunk positions and two
/// pages.
///
/// A refused update leaves the cache bit for bit as it was, and so does one that runs out of
/// memory. Const members may be called from many threads at once. A copy is deep; what was moved
/// from is empty.
#pragma once

#include <limits>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/error.h"
#include "core/heads_view.h"
#include "cpu/kv_cache.h"
#include "kv/layer.h"
#include "kv_cache/buffers.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Names the first element that INT8 cannot hold, if there is one.
template <typename D, typename View>
void require_quantizable(const D& device, std::string_view operation, std::string_view name,
                         const View& view) {
  const auto [token_stride, head_stride] = strides_of(view);
  const Index width = view.dimension(rank_of<View> - 1),
              row = view.dimension(rank_of<View> - 2) * width, size = view.size();
  // What stands side by side is looked at in one go.
  const Index piece = head_stride != width ? width : token_stride != row ? row : size;
  for (Index first = 0; first < size; first += piece) {
    const auto* numbers =
        offset_by(view.data(), first / row * token_stride + first % row / width * head_stride);
    const Index at = run(device, problem::FirstNotQuantizable<scalar_of<View>>{numbers, piece});
    if (at < 0) continue;
    require_that(
        false, operation, name, " of shape ", shape_text(view), " holds ",
        static_cast<double>(numbers[at]), " at element ", first + at,
        ", expected finite values whose scale is within the range of float (INT8 storage)");
  }
}

}  // namespace detail

template <FloatingScalar T, typename Storage = T>
  requires KvStorage<Storage, T>
class KvCache {
 public:
  using scalar = T;
  using storage = Storage;

  KvCache() = default;
  /// Its pages lie in a memory, such as ef::memory_of(device), instead of the host's. Whoever
  /// appends or reads on a device that does not work on it gets std::invalid_argument.
  explicit KvCache(const Memory& memory) : memory_(&memory) {}
  /// Keeps a window only (above). Throws std::invalid_argument for negative sizes, a chunk below 1,
  /// or sinks without a window.
  explicit KvCache(const KvWindow& window, const Memory& memory = host_memory)
      : memory_(&memory), ring_(detail::checked_ring(window)) {}
  const Memory& memory() const { return *memory_; }

  /// Positions of a layer, those that are gone included; 0 for one that was never written. Throws
  /// std::invalid_argument for a negative layer.
  Index length(Index layer_idx) const {
    const auto* layer = find(layer_idx);
    return layer == nullptr ? 0 : layer->length();
  }
  /// Which of them are held: without a window all, {0, 0, length}.
  HeldPositions held(Index layer_idx) const {
    const auto* layer = find(layer_idx);
    return layer == nullptr ? HeldPositions{0, 0, 0} : layer->held();
  }

  /// Which of them will be, once the layer has `length` positions, no fewer than now.
  HeldPositions held_at(Index layer_idx, Index length) const {
    const auto* layer = find(layer_idx);
    const problem::KeyRange gone = layer == nullptr ? ring_.gone(length) : layer->gone_at(length);
    return gone.begin < gone.end ? HeldPositions{gone.begin, gone.end, length}
                                 : HeldPositions{0, 0, length};
  }

  /// A copy of a layer's keys or values (batch, length, kv_heads, head_dim or value_dim), INT8
  /// dequantized; (0, 0, 0, 0) for a layer that was never written. Throws std::invalid_argument for
  /// a negative layer, and where positions are gone. Cost: O(length); attention reads the cache
  /// itself, through source().
  template <CpuDevice D>
  Tensor<T, 4> keys(const D& device, Index layer_idx) const {
    return read(device, layer_idx, false);
  }
  template <CpuDevice D>
  Tensor<T, 4> values(const D& device, Index layer_idx) const {
    return read(device, layer_idx, true);
  }
  Tensor<T, 4> keys(Index layer_idx) const { return keys(Eigen::DefaultDevice{}, layer_idx); }
  Tensor<T, 4> values(Index layer_idx) const { return values(Eigen::DefaultDevice{}, layer_idx); }

  /// The same into `output` of that shape, on any device that works on the cache's memory.
  template <Device D, typename Output>
  void keys_into(const D& device, Output&& output, Index layer_idx) const {
    read_into(device, output, find(layer_idx), false);
  }
  template <Device D, typename Output>
  void values_into(const D& device, Output&& output, Index layer_idx) const {
    read_into(device, output, find(layer_idx), true);
  }

  /// What attention reads. Pointers only: valid until the cache is next changed, moved or
  /// destroyed. Empty for a layer never written, or not since clear().
  KvSource<Storage> source(Index layer_idx) const {
    const auto* layer = find(layer_idx);
    return layer == nullptr || !layer->closed() ? KvSource<Storage>{} : layer->source();
  }

  /// Forgets positions [length, ...) of every layer; a layer that is no longer than that stays as
  /// it is. Keeps memory and shapes. Throws std::invalid_argument for a negative length, or one
  /// among positions that are gone. Cost: O(layers x batch).
  void truncate(Index length) {
    constexpr auto name = "KvCache::truncate";
    detail::require_that(length >= 0, name, "length is ", length, ", expected 0 or more");
    for (const auto& [index, layer] : layers_)
      detail::require_that(layer.may_truncate(length), name, "length is ", length, ", layer ",
                           index, " holds positions [0, ", layer.held().prefix, ") and [",
                           layer.held().begin, ", ", layer.length(), ")");
    for (auto& [index, layer] : layers_)
      if (layer.length() > length) layer.set_length(length);
  }

  /// Beam search: row i of the batch, in every layer, becomes what row rows[i] was. Rows may come
  /// in any order, several times or not at all; the batch is then as large as `rows`. Nothing is
  /// copied: rows that were one share their pages, and an append copies the page that it writes to,
  /// one for each row but one, where it holds earlier positions. Costs O(batch x length / 64) per
  /// layer, and allocates nothing while neither batch nor capacity outgrows what it was at the last
  /// call. Throws, with nothing changed, std::invalid_argument for a row that a layer does not
  /// have, what reserve throws where the batch grows.
  void select(std::span<const Index> rows) {
    bool any = rows.empty();
    for (const auto& [index, layer] : layers_) {
      if (!layer.closed()) continue;
      any = true;
      for (std::size_t i = 0; i < rows.size(); ++i)
        detail::require_that(rows[i] >= 0 && rows[i] < layer.batch(), "KvCache::select", "rows[", i,
                             "] is ", rows[i], ", layer ", index, " has a batch of ",
                             layer.batch());
    }
    detail::require_that(any, "KvCache::select", rows.size(), " rows of a cache that holds none");
    change_layers([&](Index, Layer& layer) {
      if (layer.closed()) layer.prepare_select(rows);
    });
  }

  /// Forgets everything, shapes included, as if newly made; memory and reservations are kept, and
  /// reused where the next shape is the same.
  void clear() {
    for (auto& [index, layer] : layers_) layer.clear();
  }

  /// Room for `max_length` positions, at once in layers of known shape: appending allocates nothing
  /// up to that length. Layers that come later get it with their first update, where memory
  /// suffices for it; where not, they grow as they need. Less than an earlier reservation changes
  /// nothing. Throws, with nothing changed, std::invalid_argument for a negative length,
  /// std::length_error for more pages than a page table counts to (2^37 positions of all
  /// sequences), std::bad_alloc where memory does not suffice, be it for a layer of one head of one
  /// element only. (Without exceptions, memory that does not suffice ends the program:
  /// core/error.h.)
  void reserve(Index max_length) {
    detail::require_that(max_length >= 0, "KvCache::reserve", "max_length is ", max_length,
                         ", expected 0 or more");
    if (layers_.empty() && max_length > reserved_)
      Layer({1, 1, 1, 1}, ring_, *memory_).prepare_room(max_length);
    change_layers([&](Index, Layer& layer) { layer.prepare_room(max_length); });
    reserved_ = (std::max)(reserved_, max_length);
  }

  /// The same, before the first update: fixes the shape of layers [0, layers), so that not even
  /// their first update allocates. Values are as wide as keys unless value_dim is given. Throws as
  /// the other does, and std::invalid_argument for other negative sizes, more than 65536 layers, or
  /// where a layer has another shape.
  void reserve(Index layers, Index batch, Index max_length, Index kv_heads, Index head_dim,
               std::optional<Index> value_dim = std::nullopt) {
    constexpr auto name = "KvCache::reserve";
    const detail::KvShape shape{batch, kv_heads, head_dim, value_dim.value_or(head_dim)};
    detail::require_that(layers >= 0 && batch >= 0 && max_length >= 0 && kv_heads >= 0 &&
                             head_dim >= 0 && shape.value_dim >= 0,
                         name, "layers, batch, max_length, kv_heads, head_dim, value_dim are ",
                         layers, ", ", batch, ", ", max_length, ", ", kv_heads, ", ", head_dim,
                         ", ", shape.value_dim, ", expected 0 or more each");
    detail::require_that(layers <= 65536, name, "layers is ", layers, ", expected 65536 at most");
    Layers fresh;
    for (Index i = 0; i < layers; ++i) {
      const Layer* layer = find(i);
      if (layer != nullptr && layer->closed()) require_shape(name, i, *layer, shape);
      if (layer == nullptr || layer->shape() != shape) {
        Layer& made = fresh.try_emplace(i, shape, ring_, *memory_).first->second;
        made.prepare_room(max_length);
        made.commit();
      }
    }
    change_layers([&](Index index, Layer& layer) {
      if (index < layers && fresh.count(index) == 0) layer.prepare_room(max_length);
    });
    for (auto& [index, layer] : fresh) layers_.erase(index);
    layers_.merge(fresh);
    for (auto& [index, layer] : layers_)
      if (index < layers) layer.close();
  }

  /// Positions the layer can hold before it allocates again; 0 for one never written, the largest
  /// Index for a window whose pages are all there.
  Index capacity(Index layer_idx) const {
    const auto* layer = find(layer_idx);
    return layer == nullptr ? 0 : layer->capacity();
  }

  /// update_kv_cache as a member.
  template <Device D, typename Keys, typename Values>
  void append(const D& device, const Keys& new_keys, const Values& new_values, Index layer_idx) {
    constexpr auto name = "update_kv_cache";
    const auto keys = detail::heads_input<4>(new_keys);
    const auto values = detail::heads_input<4>(new_values);
    static_assert(
        std::is_same_v<scalar_of<Keys>, T> && std::is_same_v<scalar_of<Values>, T>,
        "eigenformer: new_keys and new_values hold the scalar T of ef::KvCache<T, Storage>");
    detail::require_same_rows(name, "new_keys", keys, "new_values", values);
    if (keys.dimension(1) < 1)
      detail::require_that(false, name, "new_keys has shape ", detail::shape_text(keys),
                           ", expected n >= 1 new positions (batch, n, kv_heads, head_dim)");
    const detail::KvShape shape{keys.dimension(0), keys.dimension(2), keys.dimension(3),
                                values.dimension(3)};
    Layer* layer = const_cast<Layer*>(find(layer_idx));
    if (layer != nullptr && layer->closed()) require_shape(name, layer_idx, *layer, shape);
    if (layer != nullptr && layer->shape() == shape) {
      write(device, *layer, keys, values);
    } else {  // the new layer joins the cache when nothing can fail any more
      Layers fresh;
      auto& made = fresh.try_emplace(layer_idx, shape, ring_, *memory_).first->second;
      write(device, made, keys, values);
      layers_.erase(layer_idx);
      layers_.merge(fresh);
    }
  }

 private:
  using Layer = detail::KvLayer<Storage>;
  using Layers = std::map<Index, Layer>;

  /// What prepare(index, layer) prepares, in all layers or, where one throws, in none.
  template <typename Prepare>
  void change_layers(const Prepare& prepare) {
    struct Dropped {
      Layers& layers;
      ~Dropped() {
        for (auto& [index, layer] : layers) layer.drop();
      }
    } dropped{layers_};
    for (auto& [index, layer] : layers_) prepare(index, layer);
    for (auto& [index, layer] : layers_) layer.commit();
  }

  const Layer* find(Index layer_idx) const {
    detail::require_that(layer_idx >= 0, "KvCache", "layer_idx is ", layer_idx,
                         ", expected 0 or more");
    const auto found = layers_.find(layer_idx);
    return found == layers_.end() ? nullptr : &found->second;
  }

  static void require_shape(std::string_view name, Index index, const Layer& layer,
                            const detail::KvShape& asked) {
    const detail::KvShape held = layer.shape();
    detail::require_that(held == asked, name, "layer ", index,
                         " of the cache holds (batch, length, kv_heads, head_dim) = (", held.batch,
                         ", ", layer.length(), ", ", held.kv_heads, ", ", held.head_dim,
                         ") and values of width ", held.value_dim, ", new keys and values have (",
                         asked.batch, ", n, ", asked.kv_heads, ", ", asked.head_dim, ") and width ",
                         asked.value_dim);
  }

  template <typename D, typename Keys, typename Values>
  void write(const D& device, Layer& layer, const Keys& keys, const Values& values) {
    const Index batch = keys.dimension(0), added = keys.dimension(1), length = layer.length();
    detail::require_memory("update_kv_cache", "the cache", *memory_, memory_of(device));
    detail::require_capacity(added <= (std::numeric_limits<Index>::max)() - length,
                             "update_kv_cache", "length ", length, " + ", added, " overflows");
    // Sizes before data: what a view too large for any memory points to must not be read.
    layer.require_countable(length + added);
    detail::checked_size("update_kv_cache", "new_keys", keys);
    detail::checked_size("update_kv_cache", "new_values", values);
    if constexpr (std::is_same_v<Storage, std::int8_t> && detail::host_readable<D>) {
      detail::require_quantizable(device, "update_kv_cache", "new_keys", keys);
      detail::require_quantizable(device, "update_kv_cache", "new_values", values);
    }
    // A reservation older than the layer, which memory or page numbers may not suffice for, is no
    // reason to refuse an update.
    if (layer.capacity() < reserved_)
      detail::attempt(
          [&] {
            layer.prepare_room(reserved_);
            layer.commit();
          },
          [&](const char*) { layer.drop(); });
    layer.grow(length + added);
    layer.own_pages(length + added);
    const KvSource<Storage> target = layer.source();
    detail::run(device,
                problem::KvAppend<T, Storage>{keys.data(), values.data(), detail::strides_of(keys),
                                              detail::strides_of(values), batch * added, added,
                                              nullptr, target.lengths, layer.capacity(), target,
                                              layer.gone_at(length + added)});
    layer.set_length(length + added);
    layer.close();
  }

  template <typename D>
  Tensor<T, 4> read(const D& device, Index layer_idx, bool values) const {
    const Layer* layer = find(layer_idx);
    if (layer == nullptr || !layer->closed()) return Tensor<T, 4>(0, 0, 0, 0);
    Tensor<T, 4> output(sizes_of(*layer, values));
    read_into(device, output, layer, values);
    return output;
  }

  /// Of what keys() and values() return.
  static Eigen::DSizes<Index, 4> sizes_of(const Layer& layer, bool values) {
    const HeldPositions held = layer.held();
    detail::require_that(held.prefix == held.begin, "KvCache", "positions [", held.prefix, ", ",
                         held.begin, ") of ", held.end, " are gone and cannot be read");
    const detail::KvShape shape = layer.shape();
    return Eigen::DSizes<Index, 4>(shape.batch, layer.length(), shape.kv_heads,
                                   values ? shape.value_dim : shape.head_dim);
  }

  template <typename D, typename Output>
  void read_into(const D& device, Output&& output, const Layer* layer, bool values) const {
    static_assert(std::is_same_v<scalar_of<Output>, T>,
                  "eigenformer: output holds the scalar T of ef::KvCache<T, Storage>");
    const auto to = output_view<4>(output);
    const bool none = layer == nullptr || !layer->closed();
    const auto sizes = none ? Eigen::DSizes<Index, 4>(0, 0, 0, 0) : sizes_of(*layer, values);
    detail::require_same_shape("KvCache", "output", to, "the layer",
                               TensorView<const T, 4>(nullptr, sizes));
    if (none) return;
    detail::require_memory("KvCache", "the cache", *memory_, memory_of(device));
    detail::run(device,
                problem::KvRead<T, Storage>{layer->source(), layer->length(), values, to.data()});
  }

  const Memory* memory_ = &host_memory;
  detail::KvRing ring_ = {};
  Layers layers_;
  Index reserved_ = 0;
};

/// Appends new_keys (batch, n, kv_heads, head_dim) and new_values (batch, n, kv_heads, value_dim)
/// of T with n >= 1 to a layer of the cache. Throws std::invalid_argument for shapes that differ
/// from each other or from the layer's, n < 1, sizes that overflow, a negative layer, or what INT8
/// cannot hold; std::length_error for more pages than a page table counts to; std::bad_alloc. The
/// cache is then as it was.
template <Device D, typename T, typename Storage, typename Keys, typename Values>
void update_kv_cache(const D& device, KvCache<T, Storage>& cache, const Keys& new_keys,
                     const Values& new_values, Index layer_idx) {
  cache.append(device, new_keys, new_values, layer_idx);
}

template <typename T, typename Storage, typename Keys, typename Values>
void update_kv_cache(KvCache<T, Storage>& cache, const Keys& new_keys, const Values& new_values,
                     Index layer_idx) {
  cache.append(Eigen::DefaultDevice{}, new_keys, new_values, layer_idx);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
