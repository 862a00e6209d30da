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
#include <utility>
#include <variant>
#include <vector>

#include "../core/packed_array.h"
#include "../quantization.h"
#include "../tensor_parallel.h"
#include "config.h"
#include "packed_layer.h"
#include "weights.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// How linear layers are stored.
enum class WeightFormat {
  activation,  ///< in the scalar of the activations
  int8,        ///< one scale an output channel; not with double
};

/// An embedding in INT8 with one scale per token.
struct QuantizedEmbedding {
  TensorView<const std::int8_t, 2> values;  ///< (vocabulary, features)
  TensorView<const float, 1> scales;        ///< (vocabulary)
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
                                WeightFormat format = WeightFormat::activation,
                                DecoderForm form = {})
      : config_(config), form_(std::move(form)), format_(format) {
    config.validate();
    form_.validate(config);
    detail::require_that(format == WeightFormat::activation || kHasInt8, kName,
                         "int8 weights do not serve activations of double");
    if constexpr (kHasInt8)
      if (format == WeightFormat::int8) layers_.template emplace<1>();
    std::visit([&](auto& all) { all.layers.resize(static_cast<std::size_t>(config.layers)); },
               layers_);
  }

  const DecoderConfig& config() const { return config_; }
  const DecoderForm& form() const { return form_; }
  WeightFormat format() const { return format_; }

  /// Packs this rank's part of master weights on a device. The embedding is a view of theirs where
  /// the device works on their memory, else a copy.
  template <Device D, Communicator C>
  void pack(const D& device, std::shared_ptr<const DecoderWeights> masters, const C& communicator) {
    const DecoderWeights& from = *masters;
    const Memory& memory = from.memory();
    for (Index l = 0; l < config_.layers; ++l)
      pack_layer(device, l, from.views(l), communicator, memory);
    pack_head(device, from.vector(from.norm()), from.matrix(from.head()), communicator, memory);
    set_embedding(from.matrix(from.embedding()), std::move(masters), memory);
    if (memory.backend != memory_of(device).backend)
      own_embedding(device, WeightFormat::activation);
  }

  /// Packs this rank's part of those tensors of layer l that `views` has, on a device, from views
  /// of `memory`. Throws std::invalid_argument for a layer that is not there, for shapes other than
  /// the configuration's, for a part of tensors that go together, and for what pack_weight refuses.
  template <Device D, typename W, typename N, Communicator C>
  void pack_layer(const D& device, Index l, const DecoderLayerViews<W, N>& views,
                  const C& communicator, const Memory& memory = host_memory) {
    detail::require_that(l >= 0 && l < config_.layers, kName, "layer is ", l, ", expected 0 to ",
                         config_.layers - 1);
    packing().require_shapes(views);
    std::visit(
        [&]<typename S>(PackedDecoderLayers<S>& all) {
          auto& packed = all.layers[static_cast<std::size_t>(l)];
          packing().pack_matrices(device, packed, views, communicator, memory);
          packing().pack_vectors(device, packed, views, memory);
        },
        layers_);
  }

  /// The norm behind the last layer (features), and this rank's part of the head (vocabulary,
  /// features).
  template <Device D, typename N, typename W, Communicator C>
  void pack_head(const D& device, const TensorView<const N, 1>& last_norm,
                 const TensorView<const W, 2>& head, const C& communicator,
                 const Memory& memory = host_memory) {
    Packing::require_shape(head, "head", config_.vocabulary, config_.features);
    auto packed_norm = Packing::vector(device, last_norm, "norm", config_.features, memory);
    const detail::ReadableTensor<W, 2> readable(memory_of(device), head, memory);
    std::visit(
        [&]<typename S>(PackedDecoderLayers<S>& all) {
          all.head = pack_column_shard<S>(device, readable.view(), communicator);
        },
        layers_);
    norm_.weight = std::move(packed_norm);
    if (form_.norm == DecoderNorm::layer && norm_.bias.size() == 0)
      norm_.bias = Packing::zeros(device, config_.features);
  }
  /// Bias of the norm behind the last layer (features), of forms with LayerNorm.
  template <Device D, typename N>
  void set_norm_bias(const D& device, const TensorView<const N, 1>& bias,
                     const Memory& memory = host_memory) {
    norm_.bias = Packing::vector(device, bias, "norm_bias", config_.features, memory);
  }
  /// Bias of the head (vocabulary).
  template <Device D, typename N>
  void set_head_bias(const D& device, const TensorView<const N, 1>& bias,
                     const Memory& memory = host_memory) {
    head_bias_ = Packing::vector(device, bias, "head_bias", config_.vocabulary, memory);
  }
  /// Table of learned positions (positions, features), of forms that have one; copied.
  template <Device D, typename W>
  void set_positions(const D& device, const TensorView<const W, 2>& table,
                     const Memory& memory = host_memory) {
    Packing::require_shape(table, "positions", form_.positions, config_.features);
    const TensorView<const W, 1> flat(table.data(), table.size());
    positions_ = Packing::vector(device, flat, "positions", table.size(), memory);
  }

  /// Keeps the embedding (vocabulary, features) as a view of `memory`, which is that of the device
  /// that serves; `owner` keeps it alive.
  template <typename W>
  void set_embedding(const TensorView<const W, 2>& table, std::shared_ptr<const void> owner,
                     const Memory& memory = host_memory) {
    Packing::require_shape(table, "embedding", config_.vocabulary, config_.features);
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
  const detail::PackedNorm& norm() const { return norm_; }
  const detail::PackedArray<float>& head_bias() const { return head_bias_; }
  /// (form().positions, features)
  TensorView<const float, 2> positions() const {
    return {positions_.data(), form_.positions, config_.features};
  }

  /// Throws std::invalid_argument where a device does not work on the memory of the weights.
  template <Device D>
  void require_reachable(const D& device) const {
    detail::require_memory(kName, "the embedding", *embedding_memory_, memory_of(device));
    detail::require_memory(kName, "the set of packed weights", norm_.weight.memory(),
                           memory_of(device));
  }

  /// Throws std::logic_error where a tensor of a layer, the head or the embedding is missing.
  void require_complete() const {
    const bool complete = std::visit(
        [&](const auto& all) {
          for (const auto& layer : all.layers)
            if (!packing().is_complete(layer)) return false;
          // none are left in weights that were moved from
          return !all.layers.empty() && all.head.out_features > 0;
        },
        layers_);
    if (!complete || std::holds_alternative<std::monostate>(embedding_) ||
        (form_.positions > 0 && positions_.size() == 0))
      detail::fail<std::logic_error>(
          "PackedDecoderWeights: a layer, the head or the embedding was not packed");
  }

  /// Bytes inference reads from: this rank's linear layers as packed (scales included, padding
  /// not), norms, embedding.
  std::size_t bytes() const {
    Index numbers = norm_.weight.size() + norm_.bias.size() + head_bias_.size() + positions_.size();
    Index total = 0;
    std::visit(
        [&]<typename S>(const PackedDecoderLayers<S>& all) {
          const auto add = [&](const auto& shard) {
            const Index rows = shard.rows() * (requires { shard.pair(); } ? 2 : 1);
            total += rows * shard.columns() * Index{sizeof(S)};
            if (std::is_same_v<S, std::int8_t>) total += rows * Index{sizeof(float)};
          };
          for (const auto& layer : all.layers) {
            add(layer.qkv.weight), add(layer.output.weight), add(layer.gate_up.weight);
            add(layer.up.weight), add(layer.down.weight);
            for (const auto* norm : {&layer.attention_norm, &layer.feed_forward_norm,
                                     &layer.after_attention_norm, &layer.after_feed_forward_norm})
              numbers += norm->weight.size() + norm->bias.size();
            for (const auto* vector : {&layer.query_norm, &layer.key_norm, &layer.qkv_bias,
                                       &layer.output_bias, &layer.up_bias, &layer.down_bias})
              numbers += vector->size();
          }
          add(all.head.weight);
        },
        layers_);
    total += numbers * Index{sizeof(float)};
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
  using Packing = detail::LayerPacking;
  Packing packing() const { return {config_, form_}; }
  static constexpr auto kName = detail::LayerPacking::kName;

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
  DecoderForm form_;
  WeightFormat format_;
  Layers layers_;
  Embedding embedding_;
  std::shared_ptr<const void> owner_;
  const Memory* embedding_memory_ = &host_memory;
  detail::PackedNorm norm_;
  detail::PackedArray<float> head_bias_, positions_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
