/// \file
/// The experts of a layer and its router out of a model's files, which hold them in one of four
/// ways: each by itself, or stacked, one tensor for all of a kind.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../mxfp4.h"
#include "model_packing.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename T, Device D>
class ExpertLoader {
 public:
  ExpertLoader(ModelPacking<T, D>& to, Index layer)
      : to_(to), m_(to.model), from_(to.from), layer_(layer) {}

  void load() {
    const ModelNames& n = m_.names;
    const DecoderExperts& experts = m_.form.experts;
    const Index d = m_.shape.features;
    to_.pack_router(layer_, n.router, experts.count, [](auto& views) { return &views.router; });
    if (experts.shared_gate)
      to_.pack_router(layer_, n.shared_gate, 1, [](auto& views) { return &views.shared_gate; });
    if (experts.shared_hidden > 0)
      pack_unit(-1, to_.matrix_of(layer_, n.shared_gate_proj, experts.shared_hidden, d),
                to_.matrix_of(layer_, n.shared_up_proj, experts.shared_hidden, d),
                to_.matrix_of(layer_, n.shared_down_proj, d, experts.shared_hidden));
    const std::string of_experts = of_layer(n.experts);
    if (!n.all_gates.empty())
      load_by_part();
    else if (m_.turned_experts)
      load_turned(of_experts);
    else if (from_.find(of_experts + "gate_up_proj") != nullptr)
      load_stacked(of_experts);
    else
      load_apart();
  }

 private:
  using Vector = std::vector<float>;
  using Views = DecoderLayerViews<float>;

  /// A gated unit: expert e, or for -1 the shared one.
  void pack_unit(Index e, StoredMatrix gate, StoredMatrix up, StoredMatrix down) {
    const WeightStorage storage = to_.storage_of(gate, up, down);
    visit_matrices(
        to_.device,
        [&]<typename View>(const View& first, const View& second, const View& third) {
          DecoderLayerViews<scalar_of_matrix<View>, float> views;
          views.expert = e;
          views.gate.emplace(first);
          views.up.emplace(second);
          views.down.emplace(third);
          pack(views, storage);
        },
        gate, up, down);
  }

  void load_apart() {
    const ModelNames& n = m_.names;
    const Index hidden = m_.form.experts.hidden, d = m_.shape.features;
    for (Index e = 0; e < m_.form.experts.count; ++e) {
      const std::string own = n.experts + std::to_string(e) + ".";
      pack_unit(e, to_.matrix_of(layer_, own + n.expert_gate, hidden, d),
                to_.matrix_of(layer_, own + n.expert_up, hidden, d),
                to_.matrix_of(layer_, own + n.expert_down, d, hidden));
    }
  }

  /// gate_up_proj (experts, 2 * hidden, in), each gate above its up, and down_proj (experts, in,
  /// hidden).
  void load_stacked(const std::string& name) {
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const StoredTensor& both = from_.at(name + "gate_up_proj", {count, 2 * hidden, d});
    const StoredTensor& downs = from_.at(name + "down_proj", {count, d, hidden});
    for (Index e = 0; e < count; ++e) {
      const StoredTensor gate = stored_rows(both, 2 * e * hidden, hidden),
                         up = stored_rows(both, (2 * e + 1) * hidden, hidden),
                         down = stored_rows(downs, e * d, d);
      pack_unit(e, to_.expert_matrix(gate), to_.expert_matrix(up), to_.expert_matrix(down));
    }
  }

  /// Gates, ups and downs of all experts, (experts, out, in) each, and their biases (experts, out).
  void load_by_part() {
    const ModelNames& n = m_.names;
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const std::array names{of_layer(n.all_gates), of_layer(n.all_ups), of_layer(n.all_downs)};
    const std::array<Index, 3> rows{hidden, hidden, d};
    std::array<const StoredTensor*, 3> parts{};
    std::array<Vector, 3> biases;
    for (std::size_t p = 0; p < 3; ++p) {
      parts[p] = &from_.at(weight_name(names[p]), {count, rows[p], p < 2 ? d : hidden});
      if (m_.form.feed_forward_bias)
        biases[p] = from_.all_of(bias_name(names[p]), {count, rows[p]});
    }
    for (Index e = 0; e < count; ++e) {
      const std::array own{stored_rows(*parts[0], e * rows[0], rows[0]),
                           stored_rows(*parts[1], e * rows[1], rows[1]),
                           stored_rows(*parts[2], e * rows[2], rows[2])};
      pack_unit(e, to_.expert_matrix(own[0]), to_.expert_matrix(own[1]), to_.expert_matrix(own[2]));
      if (!m_.form.feed_forward_bias) continue;
      Views views;
      views.expert = e;
      views.gate_bias.emplace(biases[0].data() + e * rows[0], rows[0]);
      views.up_bias.emplace(biases[1].data() + e * rows[1], rows[1]);
      views.down_bias.emplace(biases[2].data() + e * rows[2], rows[2]);
      pack(views, to_.weights->storage());
    }
  }

  /// gpt-oss: gate_up_proj (experts, in, 2 * hidden), columns of gate and up in turn, down_proj
  /// (experts, hidden, in), with biases; or, row by row, in MXFP4.
  void load_turned(const std::string& name) {
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const Vector up_biases = from_.all_of(name + "gate_up_proj_bias", {count, 2 * hidden}),
                 down_biases = from_.all_of(name + "down_proj_bias", {count, d});
    require_turned(name + "gate_up_proj", 2 * hidden, d);  // before memory is taken for them
    require_turned(name + "down_proj", d, hidden);
    const WeightStorage storage = to_.storage_for(
        {format_of_turned(name + "gate_up_proj"), format_of_turned(name + "down_proj")});
    const auto sized = [](Index size) { return Vector(static_cast<std::size_t>(size)); };
    Vector gate = sized(hidden * d), up = sized(hidden * d), down = sized(d * hidden),
           gate_bias = sized(hidden), up_bias = sized(hidden);
    for (Index e = 0; e < count; ++e) {
      read_turned(name + "gate_up_proj", e, 2 * hidden, d,
                  [&](Index r) { return (r % 2 == 0 ? gate : up).data() + r / 2 * d; });
      read_turned(name + "down_proj", e, d, hidden,
                  [&](Index r) { return down.data() + r * hidden; });
      for (Index h = 0; h < hidden; ++h) {
        const float* const two = up_biases.data() + (e * hidden + h) * 2;
        gate_bias[static_cast<std::size_t>(h)] = two[0];
        up_bias[static_cast<std::size_t>(h)] = two[1];
      }
      Views views;
      views.expert = e;
      views.gate.emplace(gate.data(), hidden, d);
      views.up.emplace(up.data(), hidden, d);
      views.down.emplace(down.data(), d, hidden);
      views.gate_bias.emplace(gate_bias.data(), hidden);
      views.up_bias.emplace(up_bias.data(), hidden);
      views.down_bias.emplace(down_biases.data() + e * d, d);
      pack(views, storage);
    }
  }
  void require_turned(const std::string& name, Index rows, Index columns) {
    const Index count = m_.form.experts.count;
    if (from_.find(name + "_blocks") == nullptr)
      from_.at(name, {count, columns, rows});
    else if (columns % 32 != 0)
      from_.fail(name, "rows in MXFP4 are no multiple of 32 elements");
    else
      from_.at(name + "_blocks", {count, rows, columns / 32, 16});
  }
  /// Numbers of MXFP4 are exact in bfloat16.
  StoredFormat format_of_turned(const std::string& name) {
    const StoredTensor* const whole = from_.find(name);
    return whole != nullptr ? whole->format : StoredFormat::bf16;
  }
  /// Row r of an expert's matrix (rows, columns) to to(r): a column of a tensor (experts, columns,
  /// rows), or a row in MXFP4.
  template <typename To>
  void read_turned(const std::string& name, Index e, Index rows, Index columns, To&& to) {
    const Index count = m_.form.experts.count, blocks_of_row = columns / 32;
    if (from_.find(name + "_blocks") == nullptr)
      return convert_turned(to_.device, from_.at(name, {count, columns, rows}), e * columns,
                            columns, to);
    const StoredTensor& blocks = from_.at(name + "_blocks", {count, rows, blocks_of_row, 16});
    const StoredTensor& scales = from_.at(name + "_scales", {count, rows, blocks_of_row});
    for (const StoredTensor* tensor : {&blocks, &scales})
      if (tensor->format != StoredFormat::u8) from_.fail(tensor->name, "is not of U8, as MXFP4 is");
    for_ranges_of_rows(to_.device, rows, columns, [&](Index begin, Index end) {
      for (Index r = begin; r < end; ++r)
        dequantize_mxfp4(blocks, scales, static_cast<std::size_t>((e * rows + r) * blocks_of_row),
                         {to(r), static_cast<std::size_t>(columns)});
    });
  }

  std::string of_layer(std::string_view name) const { return to_.of_layer(layer_, name); }
  template <typename W>
  void pack(const DecoderLayerViews<W, float>& views, const WeightStorage& storage) {
    to_.pack(layer_, views, storage);
  }

  ModelPacking<T, D>& to_;
  const ModelConfig& m_;
  ModelTensors& from_;
  Index layer_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
