/// \file
/// What inference reads: one rank's part of a decoder's linear layers, packed, the norms, and the
/// embedding. Made from views of memory that somebody else owns (a mapped file, DecoderWeights),
/// layer by layer in any order: each tensor is read where it lies (twice for INT8 and INT4: scales
/// come first) and written packed; no float copy is made of it. Each matrix has a format of its
/// own, that of the whole decoder where packing is told none (packed_matrix.h):
///
///   activations   matrices of
///   float         float, bfloat16, half, INT8 by output channel or by groups of 32, 64 or 128
///                 inputs, INT4 by such groups
///   bfloat16      bfloat16, INT8, INT4; other floating scalars are rounded to it
///   half          half, INT8, INT4
///   double        double
///
/// A decoder of INT4 has its head in INT8. Scales and minimums of its groups are those of least
/// squares (quantization.h), floats: 6 bits for each weight in groups of 32, 5 of 64, 4.5 of 128,
/// and 5, 4.5 and 4.25 without minimums (Int4Storage). Scales of INT8 by groups are halves where
/// each of a matrix is one, floats otherwise: 8.5 or 9 bits for each weight by 32. Of the trained
/// model stories260K perplexity is 4.0% above float's in groups of 32, 6.1% of 64 and 8.6% of 128;
/// without minimums 6.7% of 32 and 8.6% of 64.
///
/// bfloat16 and half weights beside activations of float are widened, exactly: logits have the bits
/// of the float decoder whose weights were rounded to that scalar before.
///
/// It lies in the memory of the device that packs it. Views are of the host's memory where nothing
/// else is said; on a GPU each tensor is then copied there for the time of its packing.
///
///   auto packed =
///       std::make_shared<ef::PackedDecoderWeights<float>>(config, ef::WeightFormat::int8);
///   // (vocabulary, features), kept as a view; on a GPU: own_embedding(device)
///   packed->set_embedding(table, owner);
///   for (Index l = 0; l < config.layers; ++l)
///     packed->pack_layer(device, l, views_of(l), communicator);
///   packed->pack_head(device, norm, head, communicator);
///   ef::Decoder<float> model(packed, device);  // serves; it has nothing to train
#pragma once

#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "../core/packed_array.h"
#include "../quantization.h"
#include "../tensor_parallel.h"
#include "config.h"
#include "encoded_embedding.h"
#include "packed_layer.h"
#include "weights.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// An embedding in INT8 with one scale per token.
struct QuantizedEmbedding {
  TensorView<const std::int8_t, 2> values;  ///< (vocabulary, features)
  TensorView<const float, 1> scales;        ///< (vocabulary)
};

/// An embedding that is the head: its rows come out of the packed head.
struct TiedEmbedding {};

namespace detail {
struct PackedParts;
}

/// T is the scalar of activations.
template <FloatingScalar T>
class PackedDecoderWeights {
 public:
  /// (vocabulary, features), or INT8, or the head's rows, or blocks of a file.
  using Embedding =
      std::variant<std::monostate, TensorView<const float, 2>, TensorView<const double, 2>,
                   TensorView<const bfloat16, 2>, TensorView<const half, 2>, QuantizedEmbedding,
                   TiedEmbedding, EncodedEmbedding>;

  /// Throws std::invalid_argument for an impossible shape, for int8 where T is double and for
  /// groups that are not.
  explicit PackedDecoderWeights(const DecoderConfig& config, const WeightStorage& storage = {},
                                DecoderForm form = {})
      : config_(config), form_(std::move(form)), storage_(storage) {
    config.validate();
    form_.validate(config);
    detail::require_storage<T>(storage, kName);
    layers_.resize(static_cast<std::size_t>(config.layers));
  }

  const DecoderConfig& config() const { return config_; }
  const DecoderForm& form() const { return form_; }
  const WeightStorage& storage() const { return storage_; }

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
    pack_layer(device, l, views, storage_, communicator, memory);
  }
  /// The same of matrices in a format of their own.
  template <Device D, typename W, typename N, Communicator C>
  void pack_layer(const D& device, Index l, const DecoderLayerViews<W, N>& views,
                  const WeightStorage& storage, const C& communicator,
                  const Memory& memory = host_memory) {
    detail::require_storage<T>(storage, kName);
    detail::require_that(l >= 0 && l < config_.layers, kName, "layer is ", l, ", expected 0 to ",
                         config_.layers - 1);
    packing(l).require_shapes(views);
    auto& packed = layers_[static_cast<std::size_t>(l)];
    packing(l).pack_matrices(device, packed, views, storage, communicator, memory);
    packing(l).pack_vectors(device, packed, views, memory);
  }

  /// The norm behind the last layer (features), and this rank's part of the head (vocabulary,
  /// features).
  template <Device D, typename N, typename W, Communicator C>
  void pack_head(const D& device, const TensorView<const N, 1>& last_norm,
                 const TensorView<const W, 2>& head, const C& communicator,
                 const Memory& memory = host_memory) {
    pack_head(device, last_norm, head, storage_, communicator, memory);
  }
  template <Device D, typename N, typename W, Communicator C>
  void pack_head(const D& device, const TensorView<const N, 1>& last_norm,
                 const TensorView<const W, 2>& head, const WeightStorage& storage,
                 const C& communicator, const Memory& memory = host_memory) {
    Packing::require_shape(head, "head", config_.vocabulary, config_.features);
    const detail::ReadableTensor<W, 2> readable(memory_of(device), head, memory);
    set_head<W>(device, last_norm, storage, memory, [&]<typename S>(const auto& options) {
      return pack_column_shard<S>(device, readable.view(), communicator, options);
    });
  }
  /// The same of a head that need not be whole in memory, for one rank: slice_of(first, count)
  /// gives a view (count, features) of its rows from `first` on, which is read before the next is
  /// asked for.
  template <CpuDevice D, typename N, typename Slice>
  void pack_head_slices(const D& device, const TensorView<const N, 1>& last_norm, Slice&& slice_of,
                        const WeightStorage& storage) {
    using W = scalar_of<decltype(slice_of(Index{}, Index{}))>;
    set_head<W>(device, last_norm, storage, host_memory, [&]<typename S>(const auto& options) {
      const Index rows = config_.vocabulary, columns = config_.features;
      return PackedColumnShard<S>{detail::pack_slices<S>(device, rows, columns, options, slice_of),
                                  rows, columns, 0, 1};
    });
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
  /// The same of a table in blocks. Serves devices that work on the host's memory; for others
  /// own_embedding makes it numbers.
  void set_embedding(const EncodedEmbedding& table, std::shared_ptr<const void> owner) {
    detail::require_that(table.rows == config_.vocabulary && table.columns == config_.features,
                         kName, "embedding has shape (", table.rows, ", ", table.columns,
                         "), expected (", config_.vocabulary, ", ", config_.features, ")");
    const Index block = table.block_elements;
    detail::require_that(table.decode != nullptr && table.block_bytes > 0 && block > 0 &&
                             EncodedEmbedding::kPiece % block == 0 && table.columns % block == 0,
                         kName, "embedding has blocks of ", block, " elements in ",
                         table.block_bytes, " bytes, expected a divisor of ",
                         EncodedEmbedding::kPiece, " and of ", table.columns,
                         ", and a function that decodes them");
    embedding_.template emplace<EncodedEmbedding>(table);
    owner_ = std::move(owner);
    embedding_memory_ = &host_memory;
  }
  /// The head is the embedding as well, as packed: one tensor in memory, INT8 where the head is. It
  /// must be whole, that of one rank. Throws std::logic_error where no head is packed yet.
  void tie_embedding() {
    std::visit(
        [](const auto& shard) {
          if (shard.out_features == 0)
            detail::fail<std::logic_error>("PackedDecoderWeights: the head was not packed yet");
          detail::require_that(shard.world_size == 1, kName, "the head is divided among ",
                               shard.world_size, " ranks, an embedding has all rows");
        },
        head_);
    embedding_.template emplace<TiedEmbedding>();
    owner_.reset();
    embedding_memory_ = &norm_.weight.memory();
  }
  /// Replaces the embedding, unless it is the head, by a copy of its own in the memory of a device:
  /// INT8 with one scale per token where `format`, that of the layers if none is given, says so;
  /// else in the scalar it has, float of blocks.
  template <Device D = Eigen::DefaultDevice>
  void own_embedding(const D& device = {}) {
    own_embedding(device, storage_.format);
  }
  template <Device D>
  void own_embedding(const D& device, WeightFormat format) {
    if (std::holds_alternative<EncodedEmbedding>(embedding_)) decode_embedding();
    std::visit(
        [&]<typename Table>(const Table& table) {
          if constexpr (rank_of<Table> == 2) {
            if (detail::is_quantized(format))
              own_quantized(device, table);
            else
              own_copy(device, table);
          }
        },
        Embedding(embedding_));
  }

  const std::vector<PackedDecoderLayer<T>>& layers() const { return layers_; }
  const PackedHeadMatrix<T>& head() const { return head_; }
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

  /// Throws std::logic_error where a tensor of a layer, the head or the embedding is missing,
  /// std::invalid_argument where experts of a layer differ in form.
  void require_complete() const {
    // none are left in weights that were moved from
    bool complete = !layers_.empty() && detail::out_features(head_) > 0 &&
                    form_.has_all_of(norm_.weight.size(), norm_.bias.size());
    for (std::size_t l = 0; l < layers_.size(); ++l)
      complete = complete && packing(static_cast<Index>(l)).is_complete(layers_[l]);
    if (!complete || std::holds_alternative<std::monostate>(embedding_) ||
        (form_.positions > 0 && positions_.size() == 0))
      detail::fail<std::logic_error>(
          "PackedDecoderWeights: a layer, the head or the embedding was not packed");
  }

  /// Bytes inference reads from: this rank's linear layers as packed (scales included, padding
  /// not), norms, embedding.
  std::size_t bytes() const {
    Index embedding = 0;
    std::visit(
        [&]<typename Table>(const Table& table) {
          if constexpr (rank_of<Table> == 2)
            embedding = table.size() * Index{sizeof(scalar_of<Table>)};
          else if constexpr (std::is_same_v<Table, QuantizedEmbedding>)
            embedding = table.values.size() + table.scales.size() * Index{sizeof(float)};
          else if constexpr (std::is_same_v<Table, EncodedEmbedding>)
            embedding = table.bytes();
        },
        embedding_);
    return bytes_of_layers() + static_cast<std::size_t>(embedding);
  }
  /// The same without a table of an embedding, of which a step reads the rows of its tokens.
  std::size_t bytes_of_layers() const {
    const Index numbers =
        norm_.weight.size() + norm_.bias.size() + head_bias_.size() + positions_.size();
    Index total = numbers * Index{sizeof(float)} + detail::stored_bytes(head_);
    for (const auto& layer : layers_) total += detail::stored_bytes(layer);
    return static_cast<std::size_t>(total);
  }

 private:
  friend struct detail::PackedParts;
  using Packing = detail::LayerPacking;
  Packing packing(Index layer) const { return {config_, form_, layer}; }
  static constexpr auto kName = detail::LayerPacking::kName;

  /// pack(options) of a scalar that holds W gives the head.
  template <typename W, typename D, typename N, typename Pack>
  void set_head(const D& device, const TensorView<const N, 1>& last_norm,
                const WeightStorage& storage, const Memory& memory, Pack&& pack) {
    detail::require_storage<T>(storage, kName);
    auto packed_norm = Packing::vector(device, last_norm, "norm", config_.features, memory);
    const WeightStorage format = detail::without_int4(storage);
    detail::with_stored_scalar<T, W>(format.format, [&]<typename S>(std::type_identity<S>) {
      if constexpr (!std::is_same_v<S, int4>)
        head_ = pack.template operator()<S>(detail::packing_options<S>(format));
    });
    norm_.weight = std::move(packed_norm);
    if (form_.norm == DecoderNorm::layer && norm_.bias.size() == 0)
      norm_.bias = Packing::zeros(device, config_.features);
  }

  /// Blocks as a table of float in the host's memory.
  void decode_embedding() {
    const auto table = std::get<EncodedEmbedding>(embedding_);
    auto numbers = std::make_shared<detail::PackedArray<float>>();
    numbers->resize(table.rows * table.columns);
    for (Index r = 0; r < table.rows; ++r)
      detail::decode_row(table, r, numbers->data() + r * table.columns);
    const TensorView<const float, 2> view(numbers->data(), table.rows, table.columns);
    set_embedding(view, std::move(numbers));
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
  DecoderForm form_;
  WeightStorage storage_;
  std::vector<PackedDecoderLayer<T>> layers_;
  PackedHeadMatrix<T> head_;
  Embedding embedding_;
  std::shared_ptr<const void> owner_;
  const Memory* embedding_memory_ = &host_memory;
  detail::PackedNorm norm_;
  detail::PackedArray<float> head_bias_, positions_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
