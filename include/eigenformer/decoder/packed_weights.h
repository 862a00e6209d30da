/// \file
/// What inference reads: one rank's part of a decoder's linear layers, packed, the norms, and the
/// embedding. Made from views of memory that somebody else owns (a mapped file, DecoderWeights),
/// layer by layer in any order: each tensor is read where it lies (twice for INT8: its scales come
/// first) and written packed; no float copy is made of it.
///
/// It lies in the memory of the device that packs it. Views are of the host's memory where nothing
/// else is said; on a GPU each tensor is then copied there for the time of its packing.
///
///   auto packed = std::make_shared<ef::PackedDecoderWeights<float>>(config, ef::WeightFormat::int8);
///   packed->set_embedding(table, owner);                     // (vocabulary, features), kept as a view; on a GPU: own_embedding(device)
///   for (Index l = 0; l < config.layers; ++l) packed->pack_layer(device, l, views_of(l), communicator);
///   packed->pack_head(device, norm, head, communicator);
///   ef::Decoder<float> model(packed, device);                // serves; it has nothing to train
#pragma once

#include <memory>
#include <variant>
#include <vector>

#include "../core/packed_array.h"
#include "../quantization.h"
#include "../tensor_parallel.h"
#include "config.h"
#include "weights.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// How linear layers are stored.
enum class WeightFormat {
  activation,  ///< in the scalar of the activations
  int8,        ///< one scale an output channel; not with double
};

/// The tensors of one layer where they lie, W their scalar: (out, in) of each linear layer.
template <FloatingScalar W>
struct DecoderLayerViews {
  TensorView<const W, 1> attention_norm;  ///< (features)
  TensorView<const W, 2> query;           ///< (heads * head_dim, features)
  TensorView<const W, 2> key, value;      ///< (kv_heads * head_dim, features)
  TensorView<const W, 2> output;          ///< (features, heads * head_dim)
  TensorView<const W, 1> feed_forward_norm;
  TensorView<const W, 2> gate, up;  ///< (hidden, features)
  TensorView<const W, 2> down;      ///< (features, hidden)
};

namespace detail {

/// A norm's weights as a tensor.
inline TensorView<const float, 1> vector_of(const PackedArray<float>& x) {
  return {x.data(), x.size()};
}

/// A tensor where the kernels of a device read it: itself, or a copy that lives as long as this.
template <typename W, int Rank>
class ReadableTensor {
 public:
  ReadableTensor(const Memory& target, const TensorView<const W, Rank>& x, const Memory& memory)
      : data_(x.data()), sizes_(x.dimensions()) {
    if (memory.backend == target.backend) return;
    copy_.resize(x.size(), target);
    copy_bytes(target, copy_.data(), memory, x.data(),
               static_cast<std::size_t>(x.size()) * sizeof(W));
    data_ = copy_.data();
  }
  TensorView<const W, Rank> view() const { return {data_, sizes_}; }

 private:
  PackedArray<W> copy_;
  const W* data_;
  Eigen::DSizes<Index, Rank> sizes_;
};

}  // namespace detail

/// An embedding in INT8 with one scale per token.
struct QuantizedEmbedding {
  TensorView<const std::int8_t, 2> values;  ///< (vocabulary, features)
  TensorView<const float, 1> scales;        ///< (vocabulary)
};

/// One layer as inference reads it, S the scalar of its packed weights.
template <typename S>
struct PackedDecoderLayer {
  detail::PackedArray<float> attention_norm, feed_forward_norm;  ///< (features)
  PackedColumnShard<S> qkv;  ///< queries, keys, values, one below the other
  PackedColumnShard<S> output, down;
  PackedGatedColumnShard<S> gate_up;
};

/// All linear layers in one format.
template <typename S>
struct PackedDecoderLayers {
  std::vector<PackedDecoderLayer<S>> layers;
  PackedColumnShard<S> head;
};

/// T is the scalar of activations.
template <FloatingScalar T>
class PackedDecoderWeights {
  // INT8 products accumulate into float, so that double, which serves as a reference, has none.
  static constexpr bool kHasInt8 = !std::is_same_v<T, double>;

 public:
  using Layers =
      std::conditional_t<kHasInt8,
                         std::variant<PackedDecoderLayers<T>, PackedDecoderLayers<std::int8_t>>,
                         std::variant<PackedDecoderLayers<T>>>;
  /// (vocabulary, features), or INT8.
  using Embedding =
      std::variant<std::monostate, TensorView<const float, 2>, TensorView<const double, 2>,
                   TensorView<const bfloat16, 2>, TensorView<const half, 2>, QuantizedEmbedding>;

  /// Throws std::invalid_argument for an impossible shape, and for int8 where T is double.
  explicit PackedDecoderWeights(const DecoderConfig& config,
                                WeightFormat format = WeightFormat::activation)
      : config_(config), format_(format) {
    config.validate();
    detail::require_that(format == WeightFormat::activation || kHasInt8, kName,
                         "int8 weights do not serve activations of double");
    if constexpr (kHasInt8)
      if (format == WeightFormat::int8) layers_.template emplace<1>();
    std::visit([&](auto& all) { all.layers.resize(static_cast<std::size_t>(config.layers)); },
               layers_);
  }

  const DecoderConfig& config() const { return config_; }
  WeightFormat format() const { return format_; }

  /// Packs this rank's part of master weights on a device. The embedding is a view of theirs where
  /// the device works on their memory, else a copy.
  template <Device D, Communicator C>
  void pack(const D& device, std::shared_ptr<const DecoderWeights> masters, const C& communicator) {
    const DecoderWeights& from = *masters;
    const Memory& memory = from.memory();
    for (Index l = 0; l < config_.layers; ++l) {
      const DecoderWeights::Layer& w = from.layer(l);
      const DecoderLayerViews<float> views{.attention_norm = from.vector(w.attention_norm),
                                           .query = from.matrix(w.query),
                                           .key = from.matrix(w.key),
                                           .value = from.matrix(w.value),
                                           .output = from.matrix(w.output),
                                           .feed_forward_norm = from.vector(w.feed_forward_norm),
                                           .gate = from.matrix(w.gate),
                                           .up = from.matrix(w.up),
                                           .down = from.matrix(w.down)};
      pack_layer(device, l, views, communicator, memory);
    }
    pack_head(device, from.vector(from.norm()), from.matrix(from.head()), communicator, memory);
    set_embedding(from.matrix(from.embedding()), std::move(masters), memory);
    if (memory.backend != memory_of(device).backend)
      own_embedding(device, WeightFormat::activation);
  }

  /// Packs this rank's part of layer l on a device, from views of `memory`. Throws
  /// std::invalid_argument for a layer that is not there, for shapes other than the
  /// configuration's, and for what pack_weight refuses.
  template <Device D, typename W, Communicator C>
  void pack_layer(const D& device, Index l, const DecoderLayerViews<W>& views,
                  const C& communicator, const Memory& memory = host_memory) {
    detail::require_that(l >= 0 && l < config_.layers, kName, "layer is ", l, ", expected 0 to ",
                         config_.layers - 1);
    const Index q = config_.heads * config_.head_dim, kv = config_.kv_heads * config_.head_dim,
                d = config_.features, hidden = config_.hidden;
    require_shape(views.query, "query", q, d);
    require_shape(views.key, "key", kv, d);
    require_shape(views.value, "value", kv, d);
    require_shape(views.output, "output", d, q);
    require_shape(views.gate, "gate", hidden, d);
    require_shape(views.up, "up", hidden, d);
    require_shape(views.down, "down", d, hidden);
    std::visit(
        [&]<typename S>(PackedDecoderLayers<S>& all) {
          const auto readable = [&](const TensorView<const W, 2>& view) {
            return detail::ReadableTensor<W, 2>(memory_of(device), view, memory);
          };
          PackedDecoderLayer<S> packed;
          packed.attention_norm = norm(device, views.attention_norm, "attention_norm", memory);
          packed.feed_forward_norm =
              norm(device, views.feed_forward_norm, "feed_forward_norm", memory);
          {
            const auto query = readable(views.query), key = readable(views.key),
                       value = readable(views.value);
            packed.qkv = pack_stacked_column_shard<S>(
                device, std::array{query.view(), key.view(), value.view()}, communicator);
          }
          packed.output = pack_column_shard<S>(device, readable(views.output).view(), communicator);
          packed.gate_up = pack_gated_column_shard<S>(device, readable(views.gate).view(),
                                                      readable(views.up).view(), communicator);
          packed.down = pack_column_shard<S>(device, readable(views.down).view(), communicator);
          all.layers[static_cast<std::size_t>(l)] = std::move(packed);
        },
        layers_);
  }

  /// The norm behind the last layer (features), and this rank's part of the head (vocabulary,
  /// features).
  template <Device D, typename W, Communicator C>
  void pack_head(const D& device, const TensorView<const W, 1>& last_norm,
                 const TensorView<const W, 2>& head, const C& communicator,
                 const Memory& memory = host_memory) {
    require_shape(head, "head", config_.vocabulary, config_.features);
    auto packed_norm = norm(device, last_norm, "norm", memory);
    const detail::ReadableTensor<W, 2> readable(memory_of(device), head, memory);
    std::visit(
        [&]<typename S>(PackedDecoderLayers<S>& all) {
          all.head = pack_column_shard<S>(device, readable.view(), communicator);
        },
        layers_);
    norm_ = std::move(packed_norm);
  }

  /// Keeps the embedding (vocabulary, features) as a view of `memory`, which is that of the device
  /// that serves; `owner` keeps it alive.
  template <typename W>
  void set_embedding(const TensorView<const W, 2>& table, std::shared_ptr<const void> owner,
                     const Memory& memory = host_memory) {
    require_shape(table, "embedding", config_.vocabulary, config_.features);
    embedding_.template emplace<TensorView<const W, 2>>(table);
    owner_ = std::move(owner);
    embedding_memory_ = &memory;
  }
  /// Replaces the embedding by a copy of its own in the memory of a device: INT8 with one scale per
  /// token where `format`, that of the layers if none is given, says so; else in the scalar it has.
  template <Device D = Eigen::DefaultDevice>
  void own_embedding(const D& device = {}) {
    own_embedding(device, format_);
  }
  template <Device D>
  void own_embedding(const D& device, WeightFormat format) {
    std::visit(
        [&]<typename Table>(const Table& table) {
          if constexpr (rank_of<Table> == 2) {
            if (format == WeightFormat::int8)
              own_quantized(device, table);
            else
              own_copy(device, table);
          }
        },
        Embedding(embedding_));
  }

  const Layers& layers() const { return layers_; }
  const Embedding& embedding() const { return embedding_; }
  const detail::PackedArray<float>& norm() const { return norm_; }

  /// Throws std::invalid_argument where a device does not work on the memory of the weights.
  template <Device D>
  void require_reachable(const D& device) const {
    detail::require_memory(kName, "the embedding", *embedding_memory_, memory_of(device));
    detail::require_memory(kName, "the set of packed weights", norm_.memory(), memory_of(device));
  }

  /// Throws std::logic_error where a layer, the head or the embedding is missing.
  void require_complete() const {
    const bool complete = std::visit(
        [&](const auto& all) {
          for (const auto& layer : all.layers)
            if (layer.down.out_features == 0) return false;
          // none are left in weights that were moved from
          return !all.layers.empty() && all.head.out_features > 0;
        },
        layers_);
    if (!complete || std::holds_alternative<std::monostate>(embedding_))
      detail::fail<std::logic_error>(
          "PackedDecoderWeights: a layer, the head or the embedding was not packed");
  }

  /// Bytes inference reads from: this rank's linear layers as packed (scales included, padding
  /// not), norms, embedding.
  std::size_t bytes() const {
    Index total = (2 * config_.layers + 1) * config_.features * Index{sizeof(float)};
    std::visit(
        [&]<typename S>(const PackedDecoderLayers<S>& all) {
          const auto add = [&](const auto& shard) {
            const Index rows = shard.rows() * (requires { shard.pair(); } ? 2 : 1);
            total += rows * shard.columns() * Index{sizeof(S)};
            if (std::is_same_v<S, std::int8_t>) total += rows * Index{sizeof(float)};
          };
          for (const auto& layer : all.layers) {
            add(layer.qkv.weight), add(layer.output.weight), add(layer.gate_up.weight);
            add(layer.down.weight);
          }
          add(all.head.weight);
        },
        layers_);
    std::visit(
        [&]<typename Table>(const Table& table) {
          if constexpr (rank_of<Table> == 2)
            total += table.size() * Index{sizeof(scalar_of<Table>)};
          else if constexpr (std::is_same_v<Table, QuantizedEmbedding>)
            total += table.values.size() + table.scales.size() * Index{sizeof(float)};
        },
        embedding_);
    return static_cast<std::size_t>(total);
  }

 private:
  static constexpr auto kName = "PackedDecoderWeights";

  template <typename View>
  static void require_shape(const View& view, const char* name, Index rows, Index columns) {
    detail::require_that(view.dimension(0) == rows && view.dimension(1) == columns, kName, name,
                         " has shape ", detail::shape_text(view), ", the configuration says (",
                         rows, ", ", columns, ")");
  }
  /// Converted on the host: a few numbers, wherever they lie.
  template <typename D, typename W>
  detail::PackedArray<float> norm(const D& device, const TensorView<const W, 1>& view,
                                  const char* name, const Memory& memory) const {
    detail::require_that(view.dimension(0) == config_.features, kName, name, " has ",
                         view.dimension(0), " elements, the configuration says ", config_.features);
    const detail::ReadableTensor<W, 1> readable(host_memory, view, memory);
    const Tensor<float, 1> converted = readable.view().template cast<float>();
    detail::PackedArray<float> result;
    result.resize(view.size(), memory_of(device));
    result.memory().copy_in(result.data(), converted.data(),
                            static_cast<std::size_t>(view.size()) * sizeof(float));
    return result;
  }

  template <typename D, typename W>
  void own_copy(const D& device, const TensorView<const W, 2>& table) {
    auto copy = std::make_shared<detail::PackedArray<W>>();
    copy->resize(table.size(), memory_of(device));
    detail::copy_bytes(copy->memory(), copy->data(), *embedding_memory_, table.data(),
                       static_cast<std::size_t>(table.size()) * sizeof(W));
    const TensorView<const W, 2> view(copy->data(), table.dimension(0), table.dimension(1));
    set_embedding(view, std::move(copy), memory_of(device));
  }
  template <typename D, typename W>
  void own_quantized(const D& device, const TensorView<const W, 2>& table) {
    struct Owned {
      detail::PackedArray<std::int8_t> values;
      detail::PackedArray<float> scales;
    };
    const Index rows = table.dimension(0), columns = table.dimension(1);
    const auto owned = std::make_shared<Owned>();
    owned->values.resize(table.size(), memory_of(device));
    owned->scales.resize(rows, memory_of(device));
    const detail::ReadableTensor<W, 2> readable(memory_of(device), table, *embedding_memory_);
    quantize_weights_int8_per_channel_into(
        device, TensorView<std::int8_t, 2>(owned->values.data(), rows, columns),
        TensorView<float, 1>(owned->scales.data(), rows), readable.view());
    embedding_.template emplace<QuantizedEmbedding>(  // assignment would copy elements
        QuantizedEmbedding{{owned->values.data(), rows, columns}, {owned->scales.data(), rows}});
    owner_ = owned;
    embedding_memory_ = &memory_of(device);
  }

  DecoderConfig config_;
  WeightFormat format_;
  Layers layers_;
  Embedding embedding_;
  std::shared_ptr<const void> owner_;
  const Memory* embedding_memory_ = &host_memory;
  detail::PackedArray<float> norm_;  // (features)
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
