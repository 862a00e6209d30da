/// \file
/// What inference reads: one rank's part of a decoder's linear layers, packed, the norms, and the
/// embedding. Made from views of memory that somebody else owns (a mapped file, DecoderWeights),
/// layer by layer in any order: each tensor is read where it lies (twice for INT8: its scales come
/// first) and written packed; no float copy is made of it.
///
///   auto packed = std::make_shared<ef::PackedDecoderWeights<float>>(config, ef::WeightFormat::int8);
///   packed->set_embedding(table, owner);                     // (vocabulary, features), kept as a view
///   for (Index l = 0; l < config.layers; ++l) packed->pack_layer(device, l, views_of(l), communicator);
///   packed->pack_head(device, norm, head, communicator);
///   ef::Decoder<float> model(packed, device);                // serves; it has nothing to train
#pragma once

#include <memory>
#include <variant>
#include <vector>

#include "../quantization.h"
#include "../tensor_parallel.h"
#include "config.h"

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

/// One layer as inference reads it, S the scalar of its packed weights.
template <typename S>
struct PackedDecoderLayer {
  Tensor<float, 1> attention_norm, feed_forward_norm;
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
  /// (vocabulary, features), or INT8 with one scale per token.
  using Embedding =
      std::variant<std::monostate, TensorView<const float, 2>, TensorView<const double, 2>,
                   TensorView<const bfloat16, 2>, TensorView<const half, 2>, QuantizedChannels>;

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
    norm_.resize(0);
  }

  const DecoderConfig& config() const { return config_; }
  WeightFormat format() const { return format_; }

  /// Packs this rank's part of layer l on a device. Throws std::invalid_argument for a layer that
  /// is not there, for shapes other than the configuration's, and for what pack_weight refuses.
  template <CpuDevice D, typename W, Communicator C>
  void pack_layer(const D& device, Index l, const DecoderLayerViews<W>& views,
                  const C& communicator) {
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
          PackedDecoderLayer<S> packed;
          packed.attention_norm = norm(views.attention_norm, "attention_norm");
          packed.feed_forward_norm = norm(views.feed_forward_norm, "feed_forward_norm");
          packed.qkv = pack_stacked_column_shard<S>(
              device, std::array{views.query, views.key, views.value}, communicator);
          packed.output = pack_column_shard<S>(device, views.output, communicator);
          packed.gate_up = pack_gated_column_shard<S>(device, views.gate, views.up, communicator);
          packed.down = pack_column_shard<S>(device, views.down, communicator);
          all.layers[static_cast<std::size_t>(l)] = std::move(packed);
        },
        layers_);
  }

  /// The norm behind the last layer (features), and this rank's part of the head (vocabulary,
  /// features).
  template <CpuDevice D, typename W, Communicator C>
  void pack_head(const D& device, const TensorView<const W, 1>& last_norm,
                 const TensorView<const W, 2>& head, const C& communicator) {
    require_shape(head, "head", config_.vocabulary, config_.features);
    auto packed_norm = norm(last_norm, "norm");
    std::visit(
        [&]<typename S>(PackedDecoderLayers<S>& all) {
          all.head = pack_column_shard<S>(device, head, communicator);
        },
        layers_);
    norm_ = std::move(packed_norm);
  }

  /// Keeps the embedding (vocabulary, features) as a view; `owner` keeps its memory alive.
  template <typename W>
  void set_embedding(const TensorView<const W, 2>& table, std::shared_ptr<const void> owner) {
    require_shape(table, "embedding", config_.vocabulary, config_.features);
    embedding_.template emplace<TensorView<const W, 2>>(table);
    owner_ = std::move(owner);
  }
  /// Replaces the embedding by a copy of its own: INT8 with one scale per token beside INT8
  /// weights, the same scalar otherwise.
  void own_embedding() {
    std::visit(
        [&]<typename Table>(const Table& table) {
          if constexpr (rank_of<Table> == 2) {
            if (format_ == WeightFormat::int8) {
              embedding_ = quantize_weights_int8_per_channel(Table(table));
              owner_.reset();
            } else {
              auto copy = std::make_shared<Tensor<scalar_of<Table>, 2>>(table);
              set_embedding(input_view<2>(*copy), copy);
            }
          }
        },
        Embedding(embedding_));
  }

  const Layers& layers() const { return layers_; }
  const Embedding& embedding() const { return embedding_; }
  const Tensor<float, 1>& norm() const { return norm_; }

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
          else if constexpr (std::is_same_v<Table, QuantizedChannels>)
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
  template <typename View>
  Tensor<float, 1> norm(const View& view, const char* name) const {
    detail::require_that(view.dimension(0) == config_.features, kName, name, " has ",
                         view.dimension(0), " elements, the configuration says ", config_.features);
    return view.template cast<float>();
  }

  DecoderConfig config_;
  WeightFormat format_;
  Layers layers_;
  Embedding embedding_;
  std::shared_ptr<const void> owner_;
  Tensor<float, 1> norm_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
