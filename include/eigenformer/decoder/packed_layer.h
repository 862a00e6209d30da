/// \file
/// One layer of a decoder as inference reads it, and how it is packed. packed_weights.h is the
/// manual.
#pragma once

#include <initializer_list>
#include <span>
#include <utility>
#include <vector>

#include "../core/packed_array.h"
#include "form.h"
#include "layer_views.h"
#include "packed_matrix.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

/// A norm's weights as a tensor.
inline TensorView<const float, 1> vector_of(const PackedArray<float>& x) {
  return {x.data(), x.size()};
}

/// Weight and bias (LayerNorm's alone) of a norm, (features) each.
struct PackedNorm {
  PackedArray<float> weight, bias;
};

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

/// One layer as inference reads it, T the scalar of activations; each matrix has its own format.
template <FloatingScalar T>
struct PackedDecoderLayer {
  detail::PackedNorm attention_norm, feed_forward_norm, after_attention_norm,
      after_feed_forward_norm;
  detail::PackedArray<float> query_norm, key_norm;
  PackedMatrix<T> qkv;  ///< queries, keys, values, one below the other
  PackedMatrix<T> output, down;
  PackedGatedMatrix<T> gate_up;  ///< of SwiGLU without biases, one product
  PackedMatrix<T> up;            ///< of other forms: gate and up, one below the other, or up alone
  detail::PackedArray<float> qkv_bias, output_bias, up_bias, down_bias;  ///< empty: none
  std::vector<float> sinks;
};

namespace detail {

/// Checks and packs the tensors of a layer.
struct LayerPacking {
  static constexpr auto kName = "PackedDecoderWeights";
  const DecoderConfig& config;
  const DecoderForm& form;

  template <typename View>
  static void require_shape(const View& view, const char* name, Index rows, Index columns) {
    require_that(view.dimension(0) == rows && view.dimension(1) == columns, kName, name,
                 " has shape ", detail::shape_text(view), ", the configuration says (", rows, ", ",
                 columns, ")");
  }
  /// Converted on the host: a few numbers, wherever they lie.
  template <typename D, typename W>
  static PackedArray<float> vector(const D& device, const TensorView<const W, 1>& view,
                                   const char* name, Index size, const Memory& memory) {
    require_that(view.dimension(0) == size, kName, name, " has ", view.dimension(0),
                 " elements, the configuration says ", size);
    const ReadableTensor<W, 1> readable(host_memory, view, memory);
    const Tensor<float, 1> converted = readable.view().template cast<float>();
    return array(device, {converted.data(), static_cast<std::size_t>(size)});
  }
  template <typename D>
  static PackedArray<float> array(const D& device, std::span<const float> values) {
    PackedArray<float> result;
    result.resize(static_cast<Index>(values.size()), memory_of(device));
    result.memory().copy_in(result.data(), values.data(), values.size() * sizeof(float));
    return result;
  }
  template <typename D>
  static PackedArray<float> zeros(const D& device, Index size) {
    return array(device, std::vector<float>(static_cast<std::size_t>(size)));
  }

  // Rows of query (or of all heads of a token), of key.
  Index query_rows() const { return config.heads * config.head_dim; }
  Index key_rows() const { return config.kv_heads * config.head_dim; }

  template <typename Views>
  void require_shapes(const Views& v) const {
    const Index q = query_rows(), kv = key_rows(), d = config.features, hidden = config.hidden;
    const auto shape = [](const auto& view, const char* name, Index rows, Index columns) {
      if (view.has_value()) require_shape(*view, name, rows, columns);
    };
    shape(v.query, "query", q, d);
    shape(v.key, "key", kv, d);
    shape(v.value, "value", kv, d);
    shape(v.output, "output", d, q);
    shape(v.gate, "gate", hidden, d);
    shape(v.up, "up", hidden, d);
    shape(v.down, "down", d, hidden);
    const auto together = [](bool a, bool b, const char* names) {
      require_that(a == b, kName, names, " go together, expected all of them or none");
    };
    together(v.query.has_value(), v.key.has_value(), "query, key and value");
    together(v.query.has_value(), v.value.has_value(), "query, key and value");
    together(v.query_bias.has_value(), v.key_bias.has_value(), "biases of query, key and value");
    together(v.query_bias.has_value(), v.value_bias.has_value(), "biases of query, key and value");
    together(v.gate.has_value(), form.gated && v.up.has_value(), "gate and up of a gated form");
    together(v.gate_bias.has_value(), form.gated && v.up_bias.has_value(),
             "biases of gate and up of a gated form");
    require_that(!v.up_bias.has_value() || form.feed_forward_bias, kName,
                 "the form has no biases of gate and up");
  }

  template <typename D, typename T, typename W, typename N, typename C>
  void pack_matrices(const D& device, PackedDecoderLayer<T>& packed,
                     const DecoderLayerViews<W, N>& v, const WeightStorage& storage,
                     const C& communicator, const Memory& memory) const {
    with_stored_scalar<T, W>(storage.format, [&]<typename S>(std::type_identity<S>) {
      pack_matrices_as<S>(device, packed, v, int8_packing<S>(storage), communicator, memory);
    });
  }

  template <typename S, typename D, typename T, typename W, typename N, typename C>
  void pack_matrices_as(const D& device, PackedDecoderLayer<T>& packed,
                        const DecoderLayerViews<W, N>& v, const Int8Packing& options,
                        const C& communicator, const Memory& memory) const {
    using Readable = ReadableTensor<W, 2>;
    const auto readable = [&](const auto& view) {
      return Readable(memory_of(device), *view, memory);
    };
    const auto one = [&](const auto& tensor) {
      return pack_column_shard<S>(device, tensor.view(), communicator, options);
    };
    const auto stacked = [&](const auto&... tensors) {
      return pack_stacked_column_shard<S>(device, std::array{tensors.view()...}, communicator,
                                          options);
    };
    if (v.query) packed.qkv = stacked(readable(v.query), readable(v.key), readable(v.value));
    if (v.output) packed.output = one(readable(v.output));
    if (v.gate && form.fuses_gates())
      packed.gate_up = pack_gated_column_shard<S>(device, readable(v.gate).view(),
                                                  readable(v.up).view(), communicator, options);
    else if (v.gate)
      packed.up = stacked(readable(v.gate), readable(v.up));
    else if (v.up)
      packed.up = stacked(readable(v.up));
    if (v.down) packed.down = one(readable(v.down));
  }

  template <typename D, typename T, typename W, typename N>
  void pack_vectors(const D& device, PackedDecoderLayer<T>& packed,
                    const DecoderLayerViews<W, N>& v, const Memory& memory) const {
    const Index d = config.features, q = query_rows(), kv = key_rows(), hidden = config.hidden;
    const auto set = [&](PackedArray<float>& to, const auto& view, const char* name, Index size) {
      if (view.has_value()) to = vector(device, *view, name, size, memory);
    };
    const auto set_norm = [&](PackedNorm& to, const auto& weight, const char* name) {
      set(to.weight, weight, name, d);
      if (weight.has_value() && form.norm == DecoderNorm::layer && to.bias.size() == 0)
        to.bias = zeros(device, d);
    };
    set_norm(packed.attention_norm, v.attention_norm, "attention_norm");
    set_norm(packed.feed_forward_norm, v.feed_forward_norm, "feed_forward_norm");
    set_norm(packed.after_attention_norm, v.after_attention_norm, "after_attention_norm");
    set_norm(packed.after_feed_forward_norm, v.after_feed_forward_norm, "after_feed_forward_norm");
    set(packed.attention_norm.bias, v.attention_norm_bias, "attention_norm_bias", d);
    set(packed.feed_forward_norm.bias, v.feed_forward_norm_bias, "feed_forward_norm_bias", d);
    const bool rows = form.query_key_norm == QueryKeyNorm::row;
    set(packed.query_norm, v.query_norm, "query_norm", rows ? q : config.head_dim);
    set(packed.key_norm, v.key_norm, "key_norm", rows ? kv : config.head_dim);
    set(packed.output_bias, v.output_bias, "output_bias", d);
    set(packed.down_bias, v.down_bias, "down_bias", d);
    // Biases of products that are one, one after the other.
    const auto joined = [&](std::initializer_list<std::pair<const char*, Index>> parts,
                            const auto&... views) {
      std::vector<float> all;
      auto part = parts.begin();
      const auto append = [&](const auto& view) {
        const auto one = vector(Eigen::DefaultDevice{}, *view, part->first, part->second, memory);
        all.insert(all.end(), one.data(), one.data() + one.size());
        ++part;
      };
      (append(views), ...);
      return array(device, all);
    };
    if (v.query_bias)
      packed.qkv_bias = joined({{"query_bias", q}, {"key_bias", kv}, {"value_bias", kv}},
                               v.query_bias, v.key_bias, v.value_bias);
    if (v.gate_bias)
      packed.up_bias = joined({{"gate_bias", hidden}, {"up_bias", hidden}}, v.gate_bias, v.up_bias);
    else if (v.up_bias)
      packed.up_bias = joined({{"up_bias", hidden}}, v.up_bias);
    if (v.sinks) {
      const auto sinks = vector(Eigen::DefaultDevice{}, *v.sinks, "sinks", config.heads, memory);
      packed.sinks.assign(sinks.data(), sinks.data() + sinks.size());
    }
  }

  template <typename T>
  bool is_complete(const PackedDecoderLayer<T>& layer) const {
    const auto norm = [&](const PackedNorm& x, bool expected) {
      return !expected || x.weight.size() > 0;
    };
    const bool gates = form.fuses_gates();
    return out_features(layer.qkv) > 0 && out_features(layer.output) > 0 &&
           out_features(layer.down) > 0 &&
           (gates ? out_features(layer.gate_up) : out_features(layer.up)) > 0 &&
           norm(layer.attention_norm, form.norm_before()) &&
           norm(layer.feed_forward_norm, form.norm_before() && !form.shares_norm()) &&
           norm(layer.after_attention_norm, form.norm_after()) &&
           norm(layer.after_feed_forward_norm, form.norm_after()) &&
           (form.query_key_norm == QueryKeyNorm::none ||
            (layer.query_norm.size() > 0 && layer.key_norm.size() > 0)) &&
           (!form.sinks || !layer.sinks.empty());
  }
};

/// Bytes of a layer's tensors that lie in the memory of its device.
template <typename T>
Index stored_bytes(const PackedDecoderLayer<T>& layer) {
  Index numbers = 0;
  for (const auto* norm : {&layer.attention_norm, &layer.feed_forward_norm,
                           &layer.after_attention_norm, &layer.after_feed_forward_norm})
    numbers += norm->weight.size() + norm->bias.size();
  for (const auto* vector : {&layer.query_norm, &layer.key_norm, &layer.qkv_bias,
                             &layer.output_bias, &layer.up_bias, &layer.down_bias})
    numbers += vector->size();
  return numbers * Index{sizeof(float)} + stored_bytes(layer.qkv) + stored_bytes(layer.output) +
         stored_bytes(layer.gate_up) + stored_bytes(layer.up) + stored_bytes(layer.down);
}
template <typename T>
double cycles_per_token(const PackedDecoderLayer<T>& layer) {
  return cycles_per_token(layer.qkv) + cycles_per_token(layer.output) +
         cycles_per_token(layer.gate_up) + cycles_per_token(layer.up) +
         cycles_per_token(layer.down);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
