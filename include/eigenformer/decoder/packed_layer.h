/// \file
/// One layer of a decoder as inference reads it, and how it is packed. packed_weights.h is the
/// manual.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
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

/// The same of four-bit values.
template <>
class ReadableTensor<int4, 2> {
 public:
  ReadableTensor(const Memory& target, const Int4View& x, const Memory& memory)
      : values_(target, x.values, memory), scales_(target, x.scales, memory), group_(x.group_size) {
    if (x.minimums.has_value()) minimums_.emplace(target, *x.minimums, memory);
  }
  Int4View view() const {
    Int4View view{values_.view(), scales_.view(), {}, group_};
    if (minimums_.has_value()) view.minimums.emplace(minimums_->view());
    return view;
  }

 private:
  ReadableTensor<std::int8_t, 2> values_;
  ReadableTensor<float, 2> scales_;
  std::optional<ReadableTensor<float, 2>> minimums_;
  Index group_;
};

}  // namespace detail

/// One layer as inference reads it, T the scalar of activations; each matrix has its own format.
template <FloatingScalar T>
struct PackedDecoderLayer {
  detail::PackedNorm attention_norm, feed_forward_norm, after_attention_norm,
      after_feed_forward_norm, query_norm, key_norm;
  PackedMatrix<T> qkv;  ///< queries, keys, values, one below the other
  PackedMatrix<T> output, down;
  PackedGatedMatrix<T> gate_up;  ///< of SwiGLU without biases, one product
  PackedMatrix<T> up;            ///< of other forms: gate and up, one below the other, or up alone
  detail::PackedArray<float> qkv_bias, output_bias, up_bias, down_bias;  ///< empty: none
  std::vector<float> sinks;
  // Of layers with experts, whose shared expert has the place of the feed-forward.
  PackedMatrix<T> router, shared_gate;
  PackedExperts<T> experts;
  detail::PackedArray<float> router_bias, router_correction;
  detail::PackedArray<float> expert_up_bias, expert_down_bias;  ///< one expert's after the other's
};

namespace detail {

/// Checks and packs the tensors of a layer.
struct LayerPacking {
  static constexpr auto kName = "PackedDecoderWeights";
  const DecoderConfig& config;
  const DecoderForm& form;
  Index layer;

  template <typename View>
  static void require_shape(const View& view, const char* name, Index rows, Index columns) {
    require_that(view.dimension(0) == rows && view.dimension(1) == columns, kName, name,
                 " has shape ", detail::shape_text(view), ", the configuration says (", rows, ", ",
                 columns, ")");
  }
  static void require_shape(const Int4View& view, const char* name, Index rows, Index columns) {
    require_shape(view.values, name, rows, columns);
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
    require_expert(v);
    const Index q = query_rows(), kv = key_rows(), d = config.features, hidden = hidden_of(v);
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
    shape(v.router, "router", form.experts.count, d);
    shape(v.shared_gate, "shared_gate", 1, d);
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

  /// Width of what gate, up and down belong to.
  template <typename Views>
  Index hidden_of(const Views& v) const {
    return v.expert >= 0 ? form.experts.hidden : form.hidden(config, layer);
  }
  template <typename Views>
  void require_expert(const Views& v) const {
    const bool experts = form.has_experts(layer);
    require_that(v.expert >= -1 && v.expert < (experts ? form.experts.count : 0), kName,
                 "expert is ", v.expert, ", layer ", layer, " has ",
                 experts ? form.experts.count : 0);
    require_that(experts || !(v.router || v.router_bias || v.router_correction || v.shared_gate),
                 kName, "layer ", layer, " has no experts and so no router");
    require_that(!v.shared_gate || form.experts.shared_gate, kName, "the form has no shared_gate");
  }

  template <typename D, typename T, typename W, typename N, typename C>
  void pack_matrices(const D& device, PackedDecoderLayer<T>& packed,
                     const DecoderLayerViews<W, N>& v, const WeightStorage& storage,
                     const C& communicator, const Memory& memory) const {
    const auto pack_as = [&]<typename S>(std::type_identity<S>) {
      pack_matrices_as<S>(device, packed, v, packing_options<S>(storage), communicator, memory);
    };
    if constexpr (!std::is_same_v<W, int4>) {
      if (v.router)  // a few rows that decide a lot: never rounded more than activations are
        packed.router = pack_column_shard<T>(
            device, ReadableTensor<W, 2>(memory_of(device), *v.router, memory).view(),
            communicator);
      if (v.shared_gate)
        packed.shared_gate = pack_column_shard<T>(
            device, ReadableTensor<W, 2>(memory_of(device), *v.shared_gate, memory).view(),
            communicator);
      with_stored_scalar<T, W>(storage.format, pack_as);
    } else {
      require_that(storage.format == WeightFormat::as_stored && !v.router && !v.shared_gate, kName,
                   "four-bit values are packed as stored alone, and not as a router");
      require_that(stores<T, int4>, kName, "int4 weights do not serve activations of double");
      if constexpr (stores<T, int4>) pack_as(std::type_identity<int4>{});
    }
  }

  template <typename S, typename D, typename T, typename W, typename N, typename C>
  void pack_matrices_as(const D& device, PackedDecoderLayer<T>& packed,
                        const DecoderLayerViews<W, N>& v, const PackingOptions<S>& options,
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
    if (v.expert >= 0) return pack_expert<S>(device, packed, v, options, memory);
    if (v.gate && form.fuses_gates())
      packed.gate_up = pack_gated_column_shard<S>(device, readable(v.gate).view(),
                                                  readable(v.up).view(), communicator, options);
    else if (v.gate)
      packed.up = stacked(readable(v.gate), readable(v.up));
    else if (v.up)
      packed.up = stacked(readable(v.up));
    if (v.down) packed.down = one(readable(v.down));
  }

  template <typename S, typename D, typename T, typename W, typename N>
  void pack_expert(const D& device, PackedDecoderLayer<T>& packed, const DecoderLayerViews<W, N>& v,
                   const PackingOptions<S>& options, const Memory& memory) const {
    using Stack = PackedExpertStack<S>;
    const auto count = static_cast<std::size_t>(form.experts.count),
               e = static_cast<std::size_t>(v.expert);
    const bool empty = std::visit([](const auto& all) { return all.down.empty(); }, packed.experts);
    if (empty && !std::holds_alternative<Stack>(packed.experts))
      packed.experts.template emplace<Stack>();
    Stack* const stack = std::get_if<Stack>(&packed.experts);
    require_that(stack != nullptr, kName, "experts of a layer have two formats, expected one");
    stack->down.resize(count);
    if (form.fuses_experts())
      stack->gate_up.resize(count);
    else
      stack->up.resize(count);
    using Readable = ReadableTensor<W, 2>;
    if (v.gate) {
      const Readable gate(memory_of(device), *v.gate, memory), up(memory_of(device), *v.up, memory);
      if (form.fuses_experts())
        stack->gate_up[e] = pack_gated_weight<S>(device, gate.view(), up.view(), options);
      else
        stack->up[e] = pack_stacked_weight<S>(device, std::array{gate.view(), up.view()}, options);
    }
    if (v.down) {
      const Readable down(memory_of(device), *v.down, memory);
      stack->down[e] = pack_weight<S>(device, down.view(), options);
    }
  }

  /// One expert's part of the biases of all.
  template <typename D, typename N>
  void set_expert_bias(const D& device, PackedArray<float>& to, const TensorView<const N, 1>& view,
                       const char* name, Index expert, Index size, Index first, Index width,
                       const Memory& memory) const {
    if (to.size() == 0) to = zeros(device, form.experts.count * size);
    const auto one = vector(Eigen::DefaultDevice{}, view, name, width, memory);
    to.memory().copy_in(to.data() + expert * size + first, one.data(),
                        static_cast<std::size_t>(width) * sizeof(float));
  }

  template <typename D, typename T, typename W, typename N>
  void pack_vectors(const D& device, PackedDecoderLayer<T>& packed,
                    const DecoderLayerViews<W, N>& v, const Memory& memory) const {
    const Index d = config.features, q = query_rows(), kv = key_rows(), hidden = hidden_of(v);
    const auto set = [&](PackedArray<float>& to, const auto& view, const char* name, Index size) {
      if (view.has_value()) to = vector(device, *view, name, size, memory);
    };
    const auto set_weight = [&](PackedNorm& to, const auto& weight, const char* name, Index size,
                                bool has_bias) {
      set(to.weight, weight, name, size);
      if (weight.has_value() && has_bias && to.bias.size() == 0) to.bias = zeros(device, size);
    };
    const auto set_norm = [&](PackedNorm& to, const auto& weight, const char* name) {
      set_weight(to, weight, name, d, form.norm == DecoderNorm::layer);
    };
    set_norm(packed.attention_norm, v.attention_norm, "attention_norm");
    set_norm(packed.feed_forward_norm, v.feed_forward_norm, "feed_forward_norm");
    set_norm(packed.after_attention_norm, v.after_attention_norm, "after_attention_norm");
    set_norm(packed.after_feed_forward_norm, v.after_feed_forward_norm, "after_feed_forward_norm");
    set(packed.attention_norm.bias, v.attention_norm_bias, "attention_norm_bias", d);
    set(packed.feed_forward_norm.bias, v.feed_forward_norm_bias, "feed_forward_norm_bias", d);
    const bool layer_head = form.query_key_norm == QueryKeyNorm::layer_head;
    const Index query_weights = form.query_key_norm_weights(config, config.heads),
                key_weights = form.query_key_norm_weights(config, config.kv_heads);
    set_weight(packed.query_norm, v.query_norm, "query_norm", query_weights, layer_head);
    set_weight(packed.key_norm, v.key_norm, "key_norm", key_weights, layer_head);
    require_that(layer_head || !(v.query_norm_bias || v.key_norm_bias), kName,
                 "the form has no query_norm_bias and key_norm_bias");
    set(packed.query_norm.bias, v.query_norm_bias, "query_norm_bias", query_weights);
    set(packed.key_norm.bias, v.key_norm_bias, "key_norm_bias", key_weights);
    set(packed.output_bias, v.output_bias, "output_bias", d);
    set(packed.router_bias, v.router_bias, "router_bias", form.experts.count);
    set(packed.router_correction, v.router_correction, "router_correction", form.experts.count);
    if (v.expert >= 0) {
      if (v.gate_bias) {
        set_expert_bias(device, packed.expert_up_bias, *v.gate_bias, "gate_bias", v.expert,
                        2 * hidden, 0, hidden, memory);
        set_expert_bias(device, packed.expert_up_bias, *v.up_bias, "up_bias", v.expert, 2 * hidden,
                        hidden, hidden, memory);
      }
      if (v.down_bias)
        set_expert_bias(device, packed.expert_down_bias, *v.down_bias, "down_bias", v.expert, d, 0,
                        d, memory);
    } else {
      set(packed.down_bias, v.down_bias, "down_bias", d);
    }
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
    if (v.expert < 0 && v.gate_bias)
      packed.up_bias = joined({{"gate_bias", hidden}, {"up_bias", hidden}}, v.gate_bias, v.up_bias);
    else if (v.expert < 0 && v.up_bias)
      packed.up_bias = joined({{"up_bias", hidden}}, v.up_bias);
    if (v.sinks) {
      const auto sinks = vector(Eigen::DefaultDevice{}, *v.sinks, "sinks", config.heads, memory);
      packed.sinks.assign(sinks.data(), sinks.data() + sinks.size());
    }
  }

  /// Throws std::invalid_argument where the experts are there and differ in form: one product
  /// serves them all.
  template <typename T>
  bool has_all_experts(const PackedDecoderLayer<T>& packed) const {
    const auto all = [&](const auto& weights) {
      if (static_cast<Index>(weights.size()) != form.experts.count ||
          !std::all_of(weights.begin(), weights.end(),
                       [](const auto& weight) { return weight.rows() > 0; }))
        return false;
      require_expert_weights("the experts of a layer", weights);
      return true;
    };
    return out_features(packed.router) > 0 &&
           (!form.experts.shared_gate || out_features(packed.shared_gate) > 0) &&
           std::visit(
               [&](const auto& stack) {
                 return all(stack.down) &&
                        (form.fuses_experts() ? all(stack.gate_up) : all(stack.up));
               },
               packed.experts);
  }

  template <typename T>
  bool is_complete(const PackedDecoderLayer<T>& packed) const {
    const auto norm = [&](const PackedNorm& x, bool expected) {
      return !expected || form.has_all_of(x.weight.size(), x.bias.size());
    };
    const auto query_key_norm = [&](const PackedNorm& x) {
      return form.query_key_norm == QueryKeyNorm::none ||
             (x.weight.size() > 0 &&
              (form.query_key_norm != QueryKeyNorm::layer_head || x.bias.size() > 0));
    };
    const bool gates = form.fuses_gates();
    return out_features(packed.qkv) > 0 && out_features(packed.output) > 0 &&
           (form.hidden(config, layer) == 0 ||
            (out_features(packed.down) > 0 &&
             (gates ? out_features(packed.gate_up) : out_features(packed.up)) > 0)) &&
           (!form.has_experts(layer) || has_all_experts(packed)) &&
           norm(packed.attention_norm, form.norm_before()) &&
           norm(packed.feed_forward_norm, form.norm_before() && !form.shares_norm()) &&
           norm(packed.after_attention_norm, form.norm_after()) &&
           norm(packed.after_feed_forward_norm, form.norm_after()) &&
           query_key_norm(packed.query_norm) && query_key_norm(packed.key_norm) &&
           (!form.sinks || !packed.sinks.empty());
  }
};

/// Bytes of a layer's tensors that lie in the memory of its device.
template <typename T>
Index stored_bytes(const PackedDecoderLayer<T>& layer) {
  Index numbers = 0;
  for (const auto* norm :
       {&layer.attention_norm, &layer.feed_forward_norm, &layer.after_attention_norm,
        &layer.after_feed_forward_norm, &layer.query_norm, &layer.key_norm})
    numbers += norm->weight.size() + norm->bias.size();
  for (const auto* vector :
       {&layer.qkv_bias, &layer.output_bias, &layer.up_bias, &layer.down_bias, &layer.router_bias,
        &layer.router_correction, &layer.expert_up_bias, &layer.expert_down_bias})
    numbers += vector->size();
  return numbers * Index{sizeof(float)} + stored_bytes(layer.qkv) + stored_bytes(layer.output) +
         stored_bytes(layer.gate_up) + stored_bytes(layer.up) + stored_bytes(layer.down) +
         stored_bytes(layer.router) + stored_bytes(layer.shared_gate) +
         std::visit([](const auto& stack) { return stored_bytes(stack); }, layer.experts);
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
