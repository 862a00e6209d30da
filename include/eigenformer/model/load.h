/// \file
/// A model's tensors, from its files into packed weights: one linear layer after the other, read
/// once (twice for INT8) where they lie, so that nothing but the largest of them is ever held
/// beside the packed ones.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "../decoder/packed_weights.h"
#include "config.h"
#include "mxfp4.h"
#include "stored_matrix.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Called as a model is packed, with bytes of tensors done and in all.
using LoadProgress = std::function<void(std::uint64_t done, std::uint64_t total)>;

namespace detail {

template <typename T, Device D>
class ModelLoader {
 public:
  using Weights = PackedDecoderWeights<T>;
  using Vector = std::vector<float>;

  ModelLoader(const D& device, const ModelConfig& config, const StoredTensors& tensors,
              const WeightStorage& storage, const LoadProgress& progress)
      : device_(device),
        m_(config),
        tensors_(tensors),
        progress_(progress),
        weights_(std::make_shared<Weights>(config.shape, storage, config.form)) {
    for (const auto& [name, tensor] : tensors_.map()) total_ += tensor.bytes.size();
  }

  /// `owner` keeps the tensors' memory alive: the embedding stays there where its scalar allows it.
  std::shared_ptr<const Weights> load(std::shared_ptr<const void> owner) {
    try {
      for (Index l = 0; l < m_.shape.layers; ++l) load_layer(l);
      load_rest(std::move(owner));
      require_all_used();
      weights_->require_complete();
    } catch (const std::invalid_argument& error) {  // what packing refuses: NaN, infinity
      fail_model(tensors_.file(), part_, error.what());
    }
    return weights_;
  }

 private:
  using Views = DecoderLayerViews<float>;

  std::string weight(std::string_view name) const { return std::string(name) + ".weight"; }
  std::string bias(std::string_view name) const { return std::string(name) + ".bias"; }
  std::string of_layer(Index l, std::string_view name) const {
    return m_.names.layer + std::to_string(l) + "." + std::string(name);
  }

  /// Mixtral's blocks in transformers, which calls them as other families'.
  static std::string transformers_name(std::string name) {
    constexpr std::string_view block = ".block_sparse_moe.";
    if (const std::size_t at = name.find(block); at != std::string::npos)
      name.replace(at, block.size(), ".mlp.");
    return name;
  }
  /// A tensor by its name, with or without what comes before the decoder's own names in files of
  /// larger or of bare models.
  const StoredTensor* find(const std::string& name) {
    part_ = name;
    const std::size_t dot = name.find('.');
    for (const std::string& tried :
         {name, "language_model." + name, "model.language_model." + name.substr(dot + 1),
          name.substr(dot + 1), transformers_name(name)}) {
      const StoredTensor* const tensor = tensors_.find(tried);
      if (tensor == nullptr) continue;
      if (used_.insert(tried).second) done_ += tensor->bytes.size();
      return tensor;
    }
    return nullptr;
  }
  const StoredTensor& at(const std::string& name, std::vector<std::int64_t> shape) {
    const StoredTensor* const tensor = find(name);
    if (tensor == nullptr) fail_model(tensors_.file(), name, "this tensor is missing");
    if (tensor->shape != shape)
      fail_model(tensors_.file(), name,
                 "has shape " + stored_shape_text(tensor->shape) + ", the configuration says " +
                     stored_shape_text(shape));
    return *tensor;
  }
  Vector vector(const std::string& name, Index size, float plus = 0) {
    const StoredTensor& tensor = at(name, {size});  // before memory is taken for what may be a lie
    Vector values(static_cast<std::size_t>(size));
    dequantize_rows(tensor, 0, values);
    for (float& value : values) value += plus;
    return values;
  }
  StoredMatrix matrix(const std::string& name, Index rows, Index columns) {
    std::vector<std::int64_t> shape{rows, columns};
    if (m_.transposed) std::swap(shape[0], shape[1]);
    const StoredTensor* const tensor = rows == 1 ? find(name) : nullptr;
    if (tensor != nullptr && tensor->shape.size() == 1) shape.erase(shape.begin());  // one row
    return StoredMatrix(at(name, shape), m_.transposed);
  }
  void report() const {
    if (progress_) progress_(done_, total_);
  }

  // ---- a layer ----------------------------------------------------------------------------------

  template <typename W>
  void pack(Index l, const DecoderLayerViews<W, float>& views) {
    weights_->pack_layer(device_, l, views, alone_);
    report();
  }

  void load_layer(Index l) {
    load_vectors(l);
    load_attention(l);
    if (m_.form.has_experts(l))
      load_experts(l);
    else
      load_feed_forward(l);
  }

  void load_vectors(Index l) {
    const ModelNames& n = m_.names;
    const DecoderForm& form = m_.form;
    const Index d = m_.shape.features, width = m_.shape.head_dim;
    const float plus = m_.norm_plus_one ? 1.0f : 0.0f;
    std::vector<Vector> values;
    values.reserve(16);  // views of them are kept
    Views v;
    const auto set = [&](auto& to, Vector from) {
      values.push_back(std::move(from));
      to.emplace(values.back().data(), static_cast<Index>(values.back().size()));
    };
    const auto norm = [&](auto& to, auto* to_bias, const std::string& name, Index size) {
      set(to, vector(of_layer(l, weight(name)), size, plus));
      if (to_bias != nullptr && m_.norm_bias) set(*to_bias, vector(of_layer(l, bias(name)), size));
    };
    if (form.norm_before()) {
      norm(v.attention_norm, &v.attention_norm_bias, n.attention_norm, d);
      if (!form.shares_norm())
        norm(v.feed_forward_norm, &v.feed_forward_norm_bias, n.feed_forward_norm, d);
    }
    constexpr typename Views::Vector* kNone = nullptr;
    if (form.norm_after()) {
      norm(v.after_attention_norm, kNone, n.after_attention_norm, d);
      norm(v.after_feed_forward_norm, kNone, n.after_feed_forward_norm, d);
    }
    if (form.query_key_norm != QueryKeyNorm::none) {
      const bool row = form.query_key_norm == QueryKeyNorm::row;
      norm(v.query_norm, kNone, n.query_norm, row ? m_.shape.heads * width : width);
      norm(v.key_norm, kNone, n.key_norm, row ? m_.shape.kv_heads * width : width);
    }
    if (form.sinks) set(v.sinks, vector(of_layer(l, n.sinks), m_.shape.heads));
    if (m_.output_bias) set(v.output_bias, vector(of_layer(l, bias(n.output)), d));
    if (form.has_experts(l)) {
      if (m_.router_bias)
        set(v.router_bias, vector(of_layer(l, bias(n.router)), form.experts.count));
    } else if (form.feed_forward_bias) {
      const Index hidden = m_.shape.hidden;
      if (form.gated) set(v.gate_bias, vector(of_layer(l, bias(n.gate)), hidden));
      set(v.up_bias, vector(of_layer(l, bias(n.up)), hidden));
      set(v.down_bias, vector(of_layer(l, bias(n.down)), d));
    }
    const QkvRows rows = qkv_rows();
    if (m_.qkv_bias && m_.qkv_layout == QkvLayout::apart) {
      set(v.query_bias, vector(of_layer(l, bias(n.query)), rows.count(0)));
      set(v.key_bias, vector(of_layer(l, bias(n.key)), rows.count(1)));
      set(v.value_bias, vector(of_layer(l, bias(n.value)), rows.count(2)));
    } else if (m_.qkv_bias) {
      const Vector all = vector(of_layer(l, bias(n.qkv)), rows.total());
      set(v.query_bias, rows.gather(0, all.data(), 1));
      set(v.key_bias, rows.gather(1, all.data(), 1));
      set(v.value_bias, rows.gather(2, all.data(), 1));
    }
    pack(l, v);
  }

  QkvRows qkv_rows() const {
    return {m_.qkv_layout, m_.shape.heads, m_.shape.kv_heads, m_.shape.head_dim};
  }

  void load_attention(Index l) {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features;
    const QkvRows rows = qkv_rows();
    const auto pack_qkv = [&]<typename W>(const TensorView<const W, 2>& q,
                                          const TensorView<const W, 2>& k,
                                          const TensorView<const W, 2>& v) {
      DecoderLayerViews<W, float> views;
      views.query.emplace(q);
      views.key.emplace(k);
      views.value.emplace(v);
      pack(l, views);
    };
    if (m_.qkv_layout == QkvLayout::apart) {
      StoredMatrix q = matrix(of_layer(l, weight(n.query)), rows.count(0), d),
                   k = matrix(of_layer(l, weight(n.key)), rows.count(1), d),
                   v = matrix(of_layer(l, weight(n.value)), rows.count(2), d);
      visit_matrices(pack_qkv, q, k, v);
    } else {
      matrix(of_layer(l, weight(n.qkv)), rows.total(), d)
          .visit([&]<typename W>(const TensorView<const W, 2>& all) {
            if (m_.qkv_layout == QkvLayout::stacked) {
              const W* const keys = all.data() + rows.count(0) * d;
              pack_qkv(TensorView<const W, 2>(all.data(), rows.count(0), d),
                       TensorView<const W, 2>(keys, rows.count(1), d),
                       TensorView<const W, 2>(keys + rows.count(1) * d, rows.count(2), d));
              return;
            }
            const std::array parts{rows.gather(0, all.data(), d), rows.gather(1, all.data(), d),
                                   rows.gather(2, all.data(), d)};
            pack_qkv(TensorView<const W, 2>(parts[0].data(), rows.count(0), d),
                     TensorView<const W, 2>(parts[1].data(), rows.count(1), d),
                     TensorView<const W, 2>(parts[2].data(), rows.count(2), d));
          });
    }
    pack_one(l, n.output, d, rows.count(0), [](auto& views) { return &views.output; });
  }

  /// One matrix of a layer; place(views) points to where it belongs.
  template <typename Place>
  void pack_one(Index l, const std::string& name, Index rows, Index columns, Place&& place) {
    matrix(of_layer(l, weight(name)), rows, columns)
        .visit([&]<typename W>(const TensorView<const W, 2>& view) {
          DecoderLayerViews<W, float> views;
          place(views)->emplace(view);
          pack(l, views);
        });
  }

  void load_feed_forward(Index l) {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features, hidden = m_.shape.hidden;
    const auto pack_gated = [&]<typename W>(const TensorView<const W, 2>& gate,
                                            const TensorView<const W, 2>& up) {
      DecoderLayerViews<W, float> views;
      views.gate.emplace(gate);
      views.up.emplace(up);
      pack(l, views);
    };
    if (!m_.form.gated) {
      pack_one(l, n.up, hidden, d, [](auto& views) { return &views.up; });
    } else if (m_.fused_gate_up) {
      matrix(of_layer(l, weight(n.gate_up)), 2 * hidden, d)
          .visit([&]<typename W>(const TensorView<const W, 2>& both) {
            pack_gated(TensorView<const W, 2>(both.data(), hidden, d),
                       TensorView<const W, 2>(both.data() + hidden * d, hidden, d));
          });
    } else {
      StoredMatrix gate = matrix(of_layer(l, weight(n.gate)), hidden, d),
                   up = matrix(of_layer(l, weight(n.up)), hidden, d);
      visit_matrices(pack_gated, gate, up);
    }
    pack_one(l, n.down, d, hidden, [](auto& views) { return &views.down; });
  }

  // ---- experts ----------------------------------------------------------------------------------

  void load_experts(Index l) {
    const ModelNames& n = m_.names;
    const DecoderExperts& experts = m_.form.experts;
    const Index d = m_.shape.features;
    pack_one(l, n.router, experts.count, d, [](auto& views) { return &views.router; });
    if (experts.shared_gate)
      pack_one(l, n.shared_gate, 1, d, [](auto& views) { return &views.shared_gate; });
    if (experts.shared_hidden > 0)
      pack_unit(l, -1, matrix_of(l, n.shared_gate_proj, experts.shared_hidden, d),
                matrix_of(l, n.shared_up_proj, experts.shared_hidden, d),
                matrix_of(l, n.shared_down_proj, d, experts.shared_hidden));
    const std::string of_experts = of_layer(l, n.experts);
    if (!n.all_gates.empty())
      load_experts_by_part(l);
    else if (m_.turned_experts)
      load_turned_experts(l, of_experts);
    else if (find(of_experts + "gate_up_proj") != nullptr)
      load_stacked_experts(l, of_experts);
    else
      for (Index e = 0; e < experts.count; ++e) {
        const std::string own = n.experts + std::to_string(e) + ".";
        pack_unit(l, e, matrix_of(l, own + n.expert_gate, experts.hidden, d),
                  matrix_of(l, own + n.expert_up, experts.hidden, d),
                  matrix_of(l, own + n.expert_down, d, experts.hidden));
      }
  }
  StoredMatrix matrix_of(Index l, const std::string& name, Index rows, Index columns) {
    return matrix(of_layer(l, weight(name)), rows, columns);
  }

  /// A gated unit: expert e, or for -1 the shared one.
  void pack_unit(Index l, Index e, StoredMatrix gate, StoredMatrix up, StoredMatrix down) {
    visit_matrices(
        [&]<typename W>(const TensorView<const W, 2>& first, const TensorView<const W, 2>& second,
                        const TensorView<const W, 2>& third) {
          DecoderLayerViews<W, float> views;
          views.expert = e;
          views.gate.emplace(first);
          views.up.emplace(second);
          views.down.emplace(third);
          pack(l, views);
        },
        gate, up, down);
  }

  /// gate_up_proj (experts, 2 * hidden, in), each gate above its up, and down_proj (experts, in, hidden).
  void load_stacked_experts(Index l, const std::string& name) {
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const StoredTensor& both = at(name + "gate_up_proj", {count, 2 * hidden, d});
    const StoredTensor& downs = at(name + "down_proj", {count, d, hidden});
    for (Index e = 0; e < count; ++e) {
      const StoredTensor gate = stored_rows(both, 2 * e * hidden, hidden),
                         up = stored_rows(both, (2 * e + 1) * hidden, hidden),
                         down = stored_rows(downs, e * d, d);
      pack_unit(l, e, StoredMatrix(gate), StoredMatrix(up), StoredMatrix(down));
    }
  }

  /// Gates, ups and downs of all experts, (experts, out, in) each, and their biases, (experts, out).
  void load_experts_by_part(Index l) {
    const ModelNames& n = m_.names;
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const std::array names{of_layer(l, n.all_gates), of_layer(l, n.all_ups),
                           of_layer(l, n.all_downs)};
    const std::array<Index, 3> rows{hidden, hidden, d};
    std::array<const StoredTensor*, 3> parts{};
    std::array<Vector, 3> biases;
    for (std::size_t p = 0; p < 3; ++p) {
      parts[p] = &at(weight(names[p]), {count, rows[p], p < 2 ? d : hidden});
      if (m_.form.feed_forward_bias) biases[p] = all_of(bias(names[p]), {count, rows[p]});
    }
    for (Index e = 0; e < count; ++e) {
      const std::array own{stored_rows(*parts[0], e * rows[0], rows[0]),
                           stored_rows(*parts[1], e * rows[1], rows[1]),
                           stored_rows(*parts[2], e * rows[2], rows[2])};
      pack_unit(l, e, StoredMatrix(own[0]), StoredMatrix(own[1]), StoredMatrix(own[2]));
      if (!m_.form.feed_forward_bias) continue;
      Views views;
      views.expert = e;
      views.gate_bias.emplace(biases[0].data() + e * rows[0], rows[0]);
      views.up_bias.emplace(biases[1].data() + e * rows[1], rows[1]);
      views.down_bias.emplace(biases[2].data() + e * rows[2], rows[2]);
      pack(l, views);
    }
  }

  /// gpt-oss: gate_up_proj (experts, in, 2 * hidden), columns of gate and up in turn, down_proj
  /// (experts, hidden, in), with biases; or, row by row, in MXFP4.
  void load_turned_experts(Index l, const std::string& name) {
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const Vector up_biases = all_of(name + "gate_up_proj_bias", {count, 2 * hidden}),
                 down_biases = all_of(name + "down_proj_bias", {count, d});
    for (Index e = 0; e < count; ++e) {
      const Vector both = expert_rows(name + "gate_up_proj", e, 2 * hidden, d),
                   down = expert_rows(name + "down_proj", e, d, hidden);
      Vector parts[2], biases[2];
      for (Vector& part : parts) part.reserve(static_cast<std::size_t>(hidden * d));
      for (Index h = 0; h < hidden; ++h)
        for (Index part = 0; part < 2; ++part) {
          const float* const row = both.data() + (2 * h + part) * d;
          parts[part].insert(parts[part].end(), row, row + d);
          biases[part].push_back(up_biases[static_cast<std::size_t>((e * hidden + h) * 2 + part)]);
        }
      Views views;
      views.expert = e;
      views.gate.emplace(parts[0].data(), hidden, d);
      views.up.emplace(parts[1].data(), hidden, d);
      views.down.emplace(down.data(), d, hidden);
      views.gate_bias.emplace(biases[0].data(), hidden);
      views.up_bias.emplace(biases[1].data(), hidden);
      views.down_bias.emplace(down_biases.data() + e * d, d);
      pack(l, views);
    }
  }
  Vector all_of(const std::string& name, const std::vector<std::int64_t>& shape) {
    const StoredTensor& tensor = at(name, shape);
    Vector values(static_cast<std::size_t>(shape[0] * shape[1]));
    dequantize_rows(tensor, 0, values);
    return values;
  }
  /// An expert's matrix (rows, columns) out of a tensor (experts, columns, rows), or MXFP4 rows.
  Vector expert_rows(const std::string& name, Index e, Index rows, Index columns) {
    const Index count = m_.form.experts.count;
    Vector values;
    if (find(name + "_blocks") != nullptr) {
      if (columns % 32 != 0)
        fail_model(tensors_.file(), name, "rows in MXFP4 are no multiple of 32 elements");
      const StoredTensor& blocks = at(name + "_blocks", {count, rows, columns / 32, 16});
      const StoredTensor& scales = at(name + "_scales", {count, rows, columns / 32});
      for (const StoredTensor* tensor : {&blocks, &scales})
        if (tensor->format != StoredFormat::u8)
          fail_model(tensors_.file(), tensor->name, "is not of U8, as MXFP4 is");
      values.resize(static_cast<std::size_t>(rows * columns));
      dequantize_mxfp4(blocks, scales, static_cast<std::size_t>(e * rows * (columns / 32)), values);
      return values;
    }
    const StoredTensor& all = at(name, {count, columns, rows});
    Vector turned(static_cast<std::size_t>(rows * columns));
    values.resize(turned.size());
    dequantize_rows(all, e * columns, turned);
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < columns; ++c)
        values[static_cast<std::size_t>(r * columns + c)] =
            turned[static_cast<std::size_t>(c * rows + r)];
    return values;
  }

  // ---- embedding and head -----------------------------------------------------------------------

  void load_rest(std::shared_ptr<const void> owner) {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features, vocabulary = m_.shape.vocabulary;
    const Vector norm = vector(weight(n.norm), d, m_.norm_plus_one ? 1.0f : 0.0f);
    const auto view = [](const Vector& x) {
      return TensorView<const float, 1>(x.data(), static_cast<Index>(x.size()));
    };
    const auto table = [&](const std::string& name, Index rows) {
      return StoredMatrix(at(name, {rows, d}));
    };
    // Newer files call every head lm_head.
    const std::string own = tensors_.find("lm_head.weight") != nullptr ? "lm_head" : n.head;
    table(weight(m_.tied_head ? n.embedding : own), vocabulary).visit([&](const auto& head) {
      weights_->pack_head(device_, view(norm), head, alone_);
    });
    if (m_.norm_bias) weights_->set_norm_bias(device_, view(vector(bias(n.norm), d)));
    if (m_.head_bias) weights_->set_head_bias(device_, view(vector(bias(n.head), vocabulary)));
    if (m_.form.positions > 0)
      table(weight(n.positions), m_.form.positions).visit([&](const auto& positions) {
        weights_->set_positions(device_, positions);
      });
    report();
    if (m_.tied_head) return weights_->tie_embedding();
    struct Kept {
      StoredMatrix table;
      std::shared_ptr<const void> owner;
    };
    auto kept =
        std::make_shared<Kept>(Kept{table(weight(n.embedding), vocabulary), std::move(owner)});
    kept->table.visit([&](const auto& embedding) { weights_->set_embedding(embedding, kept); });
    if (memory_of(device_).backend != host_memory.backend)
      weights_->own_embedding(device_, WeightFormat::activation);
    report();
  }

  /// Tensors of the file that are no part of the decoder as configured: an error, but for what
  /// files carry without need.
  void require_all_used() const {
    for (const auto& [name, tensor] : tensors_.map()) {
      if (used_.contains(name)) continue;
      const auto ends = [&, n = std::string_view(name)](std::string_view end) {
        return n.ends_with(end);
      };
      const bool buffer = ends(".rotary_emb.inv_freq") || ends(".attn.bias") ||
                          ends(".attn.masked_bias") || ends(".attention.bias") ||
                          ends(".attention.masked_bias") || name == "rope_freqs.weight" ||
                          name == "rope_factors_long.weight" || name == "rope_factors_short.weight";
      const bool copy = m_.tied_head && ends(weight(m_.names.head));
      const bool vision = name.find("vision_tower.") != std::string::npos ||
                          name.find("multi_modal_projector.") != std::string::npos;
      if (!buffer && !copy && !vision)
        fail_model(tensors_.file(), name, "no part of a " + m_.family + " model has this name");
    }
  }

  const D& device_;
  const ModelConfig& m_;
  const StoredTensors& tensors_;
  const LoadProgress& progress_;
  std::shared_ptr<Weights> weights_;
  SelfCommunicator alone_;
  std::set<std::string, std::less<>> used_;
  std::string part_;
  std::uint64_t done_ = 0, total_ = 0;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
