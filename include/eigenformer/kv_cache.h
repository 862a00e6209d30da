/// \file
/// The KV cache of a decoder (Pope et al., "Efficiently Scaling Transformer Inference", 2022): keys
/// and values of earlier tokens, kept so that a step computes those of new tokens only. All
/// sequences of the batch have one length; sequences that differ, come and go are paged_kv_cache.h.
///
///   ef::KvCache<float> cache;
///   ef::update_kv_cache(cache, new_keys, new_values, layer_idx);   // both (batch, n, kv_heads, head_dim), n >= 1
///   ef::Tensor<float, 4> k = cache.keys(layer_idx);                // (batch, length, kv_heads, head_dim)
///
/// The first update of a layer fixes its batch, heads and head_dim; layers may differ in heads and,
/// while a step is under way, in length. Prefill is n > 1, decode n = 1.
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
/// A refused update leaves the cache bit for bit as it was, and so does one that runs out of
/// memory. Const members may be called from many threads at once. A copy is deep; what was moved
/// from is empty.
#pragma once

#include <limits>
#include <map>
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
  const Memory& memory() const { return *memory_; }

  /// Positions held by a layer; 0 for one that was never written. Throws std::invalid_argument for
  /// a negative layer.
  Index length(Index layer_idx) const {
    const auto* layer = find(layer_idx);
    return layer == nullptr ? 0 : layer->length();
  }

  /// A copy of a layer's keys or values (batch, length, kv_heads, head_dim), INT8 dequantized;
  /// (0, 0, 0, 0) for a layer that was never written. Throws std::invalid_argument for a negative
  /// layer. Cost: O(length); attention reads the cache itself, through source().
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
  /// it is. Keeps memory and shapes. Throws std::invalid_argument for a negative length. Cost:
  /// O(layers x batch).
  void truncate(Index length) {
    detail::require_that(length >= 0, "KvCache::truncate", "length is ", length,
                         ", expected 0 or more");
    for (auto& [index, layer] : layers_)
      if (layer.length() > length) layer.set_length(length);
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
    if (layers_.empty() && max_length > reserved_) Layer(1, 1, 1, *memory_).growth_for(max_length);
    grow_layers((std::numeric_limits<Index>::max)(), max_length);
    reserved_ = (std::max)(reserved_, max_length);
  }

  /// The same, before the first update: fixes the shape of layers [0, layers), so that not even
  /// their first update allocates. Throws as the other does, and std::invalid_argument for other
  /// negative sizes, more than 65536 layers, or where a layer has another shape.
  void reserve(Index layers, Index batch, Index max_length, Index kv_heads, Index head_dim) {
    constexpr auto name = "KvCache::reserve";
    detail::require_that(
        layers >= 0 && batch >= 0 && max_length >= 0 && kv_heads >= 0 && head_dim >= 0, name,
        "layers, batch, max_length, kv_heads, head_dim are ", layers, ", ", batch, ", ", max_length,
        ", ", kv_heads, ", ", head_dim, ", expected 0 or more each");
    detail::require_that(layers <= 65536, name, "layers is ", layers, ", expected 65536 at most");
    Layers fresh;
    for (Index i = 0; i < layers; ++i) {
      const Layer* layer = find(i);
      if (layer != nullptr && layer->closed())
        require_shape(name, i, *layer, batch, kv_heads, head_dim);
      if (layer == nullptr || !layer->has_shape(batch, kv_heads, head_dim)) {
        Layer& made = fresh.try_emplace(i, batch, kv_heads, head_dim, *memory_).first->second;
        made.commit(made.growth_for(max_length));
      }
    }
    grow_layers(layers, max_length, &fresh);
    for (auto& [index, layer] : fresh) layers_.erase(index);
    layers_.merge(fresh);
    for (auto& [index, layer] : layers_)
      if (index < layers) layer.close();
  }

  /// Positions the layer can hold before it allocates again; 0 for one never written.
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
    detail::require_same_shape(name, "new_keys", keys, "new_values", values);
    if (keys.dimension(1) < 1)
      detail::require_that(false, name, "new_keys has shape ", detail::shape_text(keys),
                           ", expected n >= 1 new positions (batch, n, kv_heads, head_dim)");
    const Index batch = keys.dimension(0), kv_heads = keys.dimension(2),
                head_dim = keys.dimension(3);
    Layer* layer = const_cast<Layer*>(find(layer_idx));
    if (layer != nullptr && layer->closed())
      require_shape(name, layer_idx, *layer, batch, kv_heads, head_dim);
    if (layer != nullptr && layer->has_shape(batch, kv_heads, head_dim)) {
      write(device, *layer, keys, values);
    } else {  // the new layer joins the cache when nothing can fail any more
      Layers fresh;
      auto& made = fresh.try_emplace(layer_idx, batch, kv_heads, head_dim, *memory_).first->second;
      write(device, made, keys, values);
      layers_.erase(layer_idx);
      layers_.merge(fresh);
    }
  }

 private:
  using Layer = detail::KvLayer<Storage>;
  using Layers = std::map<Index, Layer>;

  /// Room in layers [0, layers) that are not in `replaced`: in all of them or, where one throws, in
  /// none.
  void grow_layers(Index layers, Index length, const Layers* replaced = nullptr) {
    std::vector<std::pair<Layer*, typename Layer::Growth>> growths;
    for (auto& [index, layer] : layers_)
      if (index < layers && (replaced == nullptr || replaced->count(index) == 0))
        growths.emplace_back(&layer, layer.growth_for(length));
    for (auto& [layer, growth] : growths) layer->commit(std::move(growth));
  }

  const Layer* find(Index layer_idx) const {
    detail::require_that(layer_idx >= 0, "KvCache", "layer_idx is ", layer_idx,
                         ", expected 0 or more");
    const auto found = layers_.find(layer_idx);
    return found == layers_.end() ? nullptr : &found->second;
  }

  static void require_shape(std::string_view name, Index index, const Layer& layer, Index batch,
                            Index kv_heads, Index head_dim) {
    detail::require_that(layer.has_shape(batch, kv_heads, head_dim), name, "layer ", index,
                         " of the cache holds (batch, length, kv_heads, head_dim) = (",
                         layer.batch(), ", ", layer.length(), ", ", layer.kv_heads(), ", ",
                         layer.head_dim(), "), new keys and values have (", batch, ", n, ",
                         kv_heads, ", ", head_dim, ")");
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
    if constexpr (std::is_same_v<Storage, std::int8_t> && detail::host_readable<D>) {
      detail::require_quantizable(device, "update_kv_cache", "new_keys", keys);
      detail::require_quantizable(device, "update_kv_cache", "new_values", values);
    }
    // A reservation older than the layer, which memory or page numbers may not suffice for, is no
    // reason to refuse an update.
    detail::attempt([&] { layer.commit(layer.growth_for(reserved_)); }, [](const char*) {});
    layer.grow(length + added);
    const KvSource<Storage> target = layer.source();
    detail::run(device,
                problem::KvAppend<T, Storage>{keys.data(), values.data(), detail::strides_of(keys),
                                              detail::strides_of(values), batch * added, added,
                                              nullptr, target.lengths, layer.capacity(), target});
    layer.set_length(length + added);
    layer.close();
  }

  template <typename D>
  Tensor<T, 4> read(const D& device, Index layer_idx, bool values) const {
    const Layer* layer = find(layer_idx);
    if (layer == nullptr || !layer->closed()) return Tensor<T, 4>(0, 0, 0, 0);
    Tensor<T, 4> output(layer->batch(), layer->length(), layer->kv_heads(), layer->head_dim());
    read_into(device, output, layer, values);
    return output;
  }

  template <typename D, typename Output>
  void read_into(const D& device, Output&& output, const Layer* layer, bool values) const {
    static_assert(std::is_same_v<scalar_of<Output>, T>,
                  "eigenformer: output holds the scalar T of ef::KvCache<T, Storage>");
    const auto to = output_view<4>(output);
    const bool none = layer == nullptr || !layer->closed();
    const auto sizes = none ? Eigen::DSizes<Index, 4>(0, 0, 0, 0)
                            : Eigen::DSizes<Index, 4>(layer->batch(), layer->length(),
                                                      layer->kv_heads(), layer->head_dim());
    detail::require_same_shape("KvCache", "output", to, "the layer",
                               TensorView<const T, 4>(nullptr, sizes));
    if (none) return;
    detail::require_memory("KvCache", "the cache", *memory_, memory_of(device));
    detail::run(device,
                problem::KvRead<T, Storage>{layer->source(), layer->length(), values, to.data()});
  }

  const Memory* memory_ = &host_memory;
  Layers layers_;
  Index reserved_ = 0;
};

/// Appends new_keys and new_values, both (batch, n, kv_heads, head_dim) of T with n >= 1, to a
/// layer of the cache. Throws std::invalid_argument for shapes that differ from each other or from
/// the layer's, n < 1, sizes that overflow, a negative layer, or what INT8 cannot hold;
/// std::length_error for more pages than a page table counts to; std::bad_alloc. The cache is then
/// as it was.
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

/// The cache as a plain buffer of the caller's, on any device: writes new_keys and new_values
/// (batch, n, kv_heads, head_dim) of T into key_buffer and value_buffer (batch, capacity, kv_heads,
/// head_dim) of T or a narrower floating-point scalar, sequence b at positions [positions[b],
/// positions[b] + n). A negative position leaves its sequence out. Other rows are not touched;
/// buffers and new rows must not overlap. `positions` (batch) is memory of the device. Throws
/// std::invalid_argument for shapes and sizes that overflow, std::length_error where a position + n
/// exceeds the capacity, before anything is written; on a GPU positions cannot be read by the host,
/// and a row past the capacity is left out instead. Allocates nothing.
template <Device D, typename KeyBuffer, typename ValueBuffer, typename Keys, typename Values>
void append_kv_into(const D& device, KeyBuffer&& key_buffer, ValueBuffer&& value_buffer,
                    const Keys& new_keys, const Values& new_values,
                    std::span<const Index> positions) {
  constexpr auto name = "append_kv_into";
  using T = scalar_of<Keys>;
  using Storage = scalar_of<KeyBuffer>;
  auto key_rows = output_view<4>(key_buffer);
  auto value_rows = output_view<4>(value_buffer);
  const auto keys = detail::heads_input<4>(new_keys);
  const auto values = detail::heads_input<4>(new_values);
  static_assert(
      std::is_same_v<scalar_of<Values>, T> && std::is_same_v<scalar_of<ValueBuffer>, Storage>,
      "eigenformer: keys and values have one scalar, and so have their buffers");
  static_assert(KvStorage<Storage, T> && FloatingScalar<Storage>,
                "eigenformer: a buffer holds the scalar of the new rows or a narrower "
                "floating-point one; INT8 needs the scales of a cache");
  detail::require_same_shape(name, "new_keys", keys, "new_values", values);
  detail::require_same_shape(name, "key_buffer", key_rows, "value_buffer", value_rows);
  const Index batch = keys.dimension(0), added = keys.dimension(1),
              capacity = key_rows.dimension(1);
  if (key_rows.dimension(0) != batch || key_rows.dimension(2) != keys.dimension(2) ||
      key_rows.dimension(3) != keys.dimension(3))
    detail::require_that(false, name, "key_buffer (batch, capacity, kv_heads, head_dim) has shape ",
                         detail::shape_text(key_rows), ", new_keys has shape ",
                         detail::shape_text(keys));
  detail::require_that(static_cast<Index>(positions.size()) == batch, name, "positions has ",
                       positions.size(), " elements, new_keys has a batch of ", batch);
  if constexpr (detail::host_readable<D>)
    for (Index b = 0; b < batch; ++b) {
      const Index position = positions[static_cast<std::size_t>(b)];
      detail::require_capacity(position < 0 || (added <= capacity && position <= capacity - added),
                               name, "sequence ", b, " at position ", position, " + ", added,
                               " new ones exceeds the capacity of ", capacity);
    }
  for (std::size_t d = 0; d < 4; ++d)
    if (keys.dimension(d) == 0) return;  // and sizes of tensors that hold nothing may overflow
  detail::checked_size(name, "key_buffer", key_rows);
  detail::checked_size(name, "new_keys", keys);
  KvSource<Storage> target{};
  target.batch = batch;
  target.kv_heads = keys.dimension(2);
  target.head_dim = target.head_stride = target.value_head_stride = keys.dimension(3);
  target.row_stride = target.value_row_stride = target.kv_heads * target.head_dim;
  target.sequence_stride = target.value_sequence_stride = capacity * target.row_stride;
  target.keys = key_rows.data();
  target.values = value_rows.data();
  detail::run(device,
              problem::KvBufferAppend<T, Storage>{
                  {keys.data(), values.data(), detail::strides_of(keys), detail::strides_of(values),
                   batch * added, added, nullptr, positions.data(), capacity, target}});
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
