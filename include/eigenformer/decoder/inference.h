/// \file
/// A decoder's step of inference, ragged: every row of a step is a chunk of one sequence, one token
/// or thousands, and all rows go through each operator together. Ten operator calls per layer:
///
///   n = add_rms_norm(x, branch)      qkv = linear(n)         q, k = rope(qkv), rope(qkv)       append k, v
///   attended = attention(q, cache)   branch = linear(attended)
///   n = add_rms_norm(x, branch)      h = gated_linear(n)     branch = linear(h)
///
/// and four packings of activations; a DecoderForm says where other families differ. Only tokens
/// whose logits somebody wants go through the head. On a GPU everything is a launch on its stream:
/// nothing waits, until logits are fetched for the host. Token ids, positions and page tables are
/// host memory, which travels with the calls.
#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "../activation.h"
#include "../attention.h"
#include "../embedding.h"
#include "../expert_feed_forward.h"
#include "../normalization.h"
#include "../parallel_region.h"
#include "feed_forward.h"
#include "packed_weights.h"
#include "profile.h"
#include "step_rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

/// One step; holds references for the time of a call. Rows is PagedRows or DenseRows.
template <typename T, Device D, typename C, typename Rows>
class InferenceStep {
 public:
  InferenceStep(const D& device, const PackedDecoderWeights<T>& weights, C& communicator,
                InferenceScratch<T>& scratch, Rows rows, OperatorProfile* profile)
      : device_(device),
        weights_(weights),
        config_(weights.config()),
        form_(weights.form()),
        communicator_(communicator),
        s_(scratch),
        rows_(rows),
        profile_(profile) {
    plain_rope_.base = config_.rope_base;
    plain_rope_.layout = config_.rope_layout;
  }

  /// Checks, computes, appends; logits are a tensor of the host or a view of the device's memory.
  /// Where something throws the cache is as it was.
  template <typename Logits>
  void run(Logits& logits, const StepRows& step) {
    static_assert(std::is_same_v<scalar_of<Logits>, float>, "eigenformer: logits are float");
    const auto count = static_cast<Index>(step.logits_of.size()), classes = config_.vocabulary;
    if constexpr (!owns_its_elements<Logits>) {
      const auto view = output_view<2>(logits);
      require_that(view.dimension(0) == count && view.dimension(1) == classes, kName,
                   "logits has shape ", shape_text(view), ", expected (", count, ", ", classes,
                   ")");
      compute(step, [&] { return view; });
    } else if constexpr (CpuDevice<D>) {
      compute(step, [&] {
        detail::reshape(logits, count, classes);
        return output_view<2>(logits);
      });
    } else {
      compute(step, [&] {
        detail::reshape(logits, count, classes);
        return reshape(s_.logits, count, classes);
      });
      if (logits.size() > 0)
        to_host(device_, kName, logits.data(), s_.logits.view().data(), logits.size());
    }
  }

 private:
  static constexpr auto kName = "Decoder::step";

  void require_rows(const StepRows& step) const {
    const Index tokens = static_cast<Index>(step.tokens.size());
    require_that(!step.offsets.empty() && step.offsets.front() == 0 &&
                     step.offsets.back() == tokens &&
                     std::is_sorted(step.offsets.begin(), step.offsets.end()),
                 kName, "offsets of ", step.offsets.size(), " elements must rise from 0 to ",
                 tokens, " tokens");
    for (const Index at : step.logits_of)
      require_that(at >= 0 && at < tokens, kName, "logits_of holds ", at, ", expected 0 to ",
                   tokens - 1);
    require_ids(kName, step.tokens, config_.vocabulary);
  }

  // place() gives the memory of the device for the logits, (wanted, vocabulary).
  template <typename Place>
  void compute(const StepRows& step, Place&& place) {
    require_rows(step);
    if (step.tokens.empty()) {
      place();
      return;
    }
    const double cycles = step_cycles(weights_, static_cast<Index>(step.tokens.size()),
                                      static_cast<Index>(step.logits_of.size()));
    const ParallelRegion region(device_, {.serial = cycles < kSharedStepCycles});
    fill_positions(step);
    embed(step.tokens);
    attempt_or_undo([&] { layers(step, place); },
                    [&] {
                      if (appended_) rows_.undo(s_);
                    });
  }

  // Where every token stands in its sequence, and the angles it turns by, once for all layers.
  void fill_positions(const StepRows& step) {
    const std::size_t rows = step.offsets.size() - 1;
    starts_.resize(rows);
    s_.positions.resize(step.tokens.size());
    s_.turned.resize(step.tokens.size());
    rows_.begin(config_, form_, step.offsets, s_);
    for (std::size_t i = 0; i < rows; ++i) {
      for (Index t = step.offsets[i]; t < step.offsets[i + 1]; ++t)
        s_.positions[static_cast<std::size_t>(t)] = starts_[i] + t - step.offsets[i];
    }
    for (const Index position : s_.positions)
      require_that(form_.positions == 0 || position < form_.positions, kName, "a sequence reaches ",
                   "position ", position, ", the model has ", form_.positions);
    if constexpr (CpuDevice<D>) {
      std::iota(s_.turned.begin(), s_.turned.end(), Index{0});
      const std::size_t rotations = std::max<std::size_t>(1, form_.ropes.size());
      if (s_.angles.size() < rotations) s_.angles.resize(rotations);
      timed("rope", [&] {
        for (std::size_t r = 0; r < rotations; ++r)
          s_.angles[r].assign(s_.positions, config_.head_dim, rope_options(static_cast<int>(r)));
      });
    }
  }

  void embed(std::span<const std::int32_t> tokens) {
    auto x = reshape(s_.stream, static_cast<Index>(tokens.size()), config_.features);
    timed("embedding", [&] {
      std::visit(
          [&]<typename Table>(const Table& table) {
            const auto ids = [&] { return staged(device_, "embedding", tokens); };
            if constexpr (rank_of<Table> == 2)
              embedding_into(device_, x, ids(), table);
            else if constexpr (std::is_same_v<Table, QuantizedEmbedding>)
              embedding_into(device_, x, ids(), table.values, table.scales);
            else if constexpr (std::is_same_v<Table, EncodedEmbedding> && CpuDevice<D>)
              decode_rows_into(device_, x, tokens, table);
            else if constexpr (std::is_same_v<Table, TiedEmbedding>)
              std::visit([&](const auto& head) { embedding_into(device_, x, ids(), head.weight); },
                         weights_.head());
          },
          weights_.embedding());
    });
    scale(x, form_.embedding_scale);
    if (form_.positions == 0) return;
    s_.wanted_tokens.assign(s_.positions.begin(), s_.positions.end());
    auto rows = reshape(s_.branch, x.dimension(0), config_.features);
    timed("embedding", [&] {
      embedding_into(device_, rows,
                     staged(device_, "embedding", std::span<const std::int64_t>(s_.wanted_tokens)),
                     weights_.positions());
      residual_add_into(device_, x, x, rows);
    });
  }

  template <typename Place>
  void layers(const StepRows& step, Place& place) {
    const std::vector<PackedDecoderLayer<T>>& all = weights_.layers();
    auto x = s_.stream.view();
    auto normalised = reshape(s_.normalised, x.dimension(0), config_.features);
    if (form_.norm_before()) norm_into(normalised, x, all.front().attention_norm);
    for (std::size_t l = 0; l < all.size(); ++l) {
      const PackedDecoderLayer<T>& w = all[l];
      auto branch = reshape(s_.branch, x.dimension(0), config_.features);
      attend(w, static_cast<Index>(l), input(), step);
      project(branch, s_.attended.view(), w.output, w.output_bias);
      if (form_.parallel()) {
        auto side = reshape(s_.side, x.dimension(0), config_.features);
        if (!form_.shares_norm()) norm_into(normalised, x, w.feed_forward_norm);
        feed_forward(w, static_cast<Index>(l), side, normalised);
        timed("activation", [&] { residual_add_into(device_, branch, branch, side); });
      } else {
        if (form_.norm_after()) norm_into(branch, branch, w.after_attention_norm);
        join(normalised, x, branch, w.feed_forward_norm);
        feed_forward(w, static_cast<Index>(l), branch, input());
        if (form_.norm_after()) norm_into(branch, branch, w.after_feed_forward_norm);
      }
      // The last layer's branch is joined by the head, for the tokens somebody wants.
      if (l + 1 < all.size()) join(normalised, x, branch, all[l + 1].attention_norm);
    }
    head(place, step.logits_of);
  }

  /// What attention and feed-forward read: the stream, normalised where the form does so.
  TensorView<T, 2> input() { return form_.norm_before() ? s_.normalised.view() : s_.stream.view(); }

  // x -> attended, keys and values into the cache.
  void attend(const PackedDecoderLayer<T>& w, Index l, const TensorView<T, 2>& x,
              const StepRows& step) {
    const DecoderConfig& c = config_;
    const DecoderLayerForm layer = form_.layer(l);
    const Index tokens = static_cast<Index>(step.tokens.size()), q_columns = c.heads * c.head_dim,
                kv_columns = c.kv_heads * c.head_dim;
    auto qkv = reshape(s_.qkv, tokens, q_columns + 2 * kv_columns);
    project(qkv, x, w.qkv, w.qkv_bias);
    const auto part = [&](Index first, Index heads) {
      return HeadsView<const T>(qkv.data() + first, {tokens, heads, c.head_dim}, qkv.dimension(1));
    };
    const auto q = turned(s_.query, part(0, c.heads), w.query_norm, layer.rope),
               k = turned(s_.key, part(q_columns, c.kv_heads), w.key_norm, layer.rope);
    timed("kv_cache", [&] {
      rows_.append(device_, step.offsets, l, k, part(q_columns + kv_columns, c.kv_heads));
    });
    appended_ = true;
    TensorView<T, 3> attended(reshape(s_.attended, tokens, q_columns).data(), tokens, c.heads,
                              c.head_dim);
    AttentionOptions options{
        .causal = true, .window = layer.window, .softcap = form_.attention_softcap};
    if (form_.attention_scale != 0) options.scale = form_.attention_scale;
    if (form_.sinks) options.sinks = w.sinks;
    options.alibi_slopes = form_.alibi_slopes;
    timed("attention", [&] {
      attention_with_kv_source_into(device_, attended, q, rows_.source(l), step.offsets, options);
    });
  }

  /// Queries or keys as attention takes them: normalised and turned where the form says so, in
  /// `memory` then.
  HeadsView<const T> turned(GrowingTensor<T, 2>& memory, const HeadsView<const T>& heads,
                            const PackedNorm& norm, int rope) {
    const Index tokens = heads.dimension(0), count = heads.dimension(1), width = config_.head_dim;
    HeadsView<const T> x = heads;
    if (form_.query_key_norm == QueryKeyNorm::none && rope < 0) return x;
    TensorView<T, 3> y(reshape(memory, tokens, count * width).data(), tokens, count, width);
    const HeadsView<const T> result(y.data(), {tokens, count, width}, count * width);
    if (form_.query_key_norm == QueryKeyNorm::layer_head) {
      const TensorView<const float, 2> weight(norm.weight.data(), count, width),
          bias(norm.bias.data(), count, width);
      timed("normalization",
            [&] { layer_norm_into(device_, y, x, weight, bias, {.epsilon = config_.epsilon}); });
      x = result;
    } else if (form_.query_key_norm != QueryKeyNorm::none) {
      const bool row = form_.query_key_norm == QueryKeyNorm::row;
      const Index groups = row ? 1 : count, features = row ? count * width : width;
      TensorView<T, 3> to(y.data(), tokens, groups, features);
      timed("normalization", [&] {
        rms_norm_into(device_, to,
                      HeadsView<const T>(x.data(), {tokens, groups, features}, x.token_stride()),
                      vector_of(norm.weight), RmsNormOptions{.epsilon = config_.epsilon});
      });
      x = result;
    }
    if (rope >= 0) rotate(y, x, rope);
    return result;
  }

  void feed_forward(const PackedDecoderLayer<T>& w, Index l, TensorView<T, 2> y,
                    const TensorView<T, 2>& x) {
    if (form_.has_experts(l)) return mixture(w, y, x);
    dense_feed_forward(w, config_.hidden, y, x);
  }
  void dense_feed_forward(const PackedDecoderLayer<T>& w, Index hidden, TensorView<T, 2> y,
                          const TensorView<T, 2>& x) {
    const Index tokens = x.dimension(0);
    auto gated = reshape(s_.gated, tokens, hidden);
    if (out_features(w.gate_up) > 0) {
      project_gated(gated, x, w.gate_up);
    } else if (form_.gated) {
      auto both = reshape(s_.gate_up, tokens, 2 * hidden);
      project(both, x, w.up, w.up_bias);
      timed("activation", [&] { activate_gated(device_, form_, gated, both); });
    } else {
      project(gated, x, w.up, w.up_bias);
      timed("activation", [&] { activate(device_, form_, gated); });
    }
    project(y, gated, w.down, w.down_bias);
  }

  // ---- experts ----------------------------------------------------------------------------------

  void mixture(const PackedDecoderLayer<T>& w, TensorView<T, 2> y, const TensorView<T, 2>& x) {
    const DecoderExperts& experts = form_.experts;
    const Index tokens = x.dimension(0), pairs = tokens * experts.chosen;
    auto logits = reshape(s_.router_logits, tokens, experts.count),
         parts = reshape(s_.expert_weights, tokens, experts.chosen);
    auto ids = reshape(s_.expert_ids, tokens, experts.chosen),
         places = reshape(s_.expert_places, tokens, experts.chosen);
    project(logits, x, w.router, w.router_bias);
    timed("expert_routing", [&] {
      if (w.router_correction.size() > 0)
        expert_routing_into(device_, ids, parts, logits, vector_of(w.router_correction),
                            experts.routing);
      else
        expert_routing_into(device_, ids, parts, logits, experts.routing);
      expert_order_into(device_, reshape(s_.expert_offsets, experts.count + 1),
                        reshape(s_.expert_order, pairs), places, ids);
    });
    auto results = reshape(s_.expert_results, pairs, config_.features);
    timed("expert_feed_forward", [&] {
      std::visit(
          [&](const auto& stack) { expert_products(device_, form_, w, stack, s_, results, x); },
          w.experts);
    });
    if (experts.shared_hidden == 0) {
      timed("expert_feed_forward",
            [&] { combine_experts_into(device_, y, results, places, parts); });
      return;
    }
    auto shared = reshape(s_.shared, tokens, config_.features);
    dense_feed_forward(w, experts.shared_hidden, shared, x);
    if (!experts.shared_gate) {
      timed("expert_feed_forward",
            [&] { combine_experts_into(device_, y, results, places, parts, shared); });
      return;
    }
    auto gate = reshape(s_.shared_gate, tokens, 1);
    project(gate, x, w.shared_gate, {});
    const TensorView<compute_type<T>, 1> gates(gate.data(), tokens);
    timed("expert_feed_forward",
          [&] { combine_experts_into(device_, y, results, places, parts, shared, gates); });
  }

  template <typename Place>
  void head(Place& place, std::span<const Index> logits_of) {
    const Index count = static_cast<Index>(logits_of.size()), features = config_.features;
    TensorView<float, 2> logits = place();
    if (count == 0) return;
    auto wanted = reshape(s_.wanted, count, features),
         branch = reshape(s_.wanted_branch, count, features),
         last = reshape(s_.last, count, features);
    s_.wanted_tokens.assign(logits_of.begin(), logits_of.end());
    const auto at =
        staged(device_, "Decoder::step", std::span<const std::int64_t>(s_.wanted_tokens));
    embedding_into(device_, wanted, at, s_.stream.view());  // a row each, as of a table
    embedding_into(device_, branch, at, s_.branch.view());
    scale(branch, form_.residual_scale);
    if (form_.norm == DecoderNorm::rms) {
      add_norm(last, wanted, branch, weights_.norm());
    } else {
      timed("activation", [&] { residual_add_into(device_, wanted, wanted, branch); });
      norm_into(last, wanted, weights_.norm());
    }
    project(logits, last, weights_.head(), weights_.head_bias());
    if (form_.logit_scale != 1 || form_.logit_softcap != 0)
      timed("activation", [&] {
        softcap_into(device_, logits, logits,
                     {.cap = form_.logit_softcap, .scale = form_.logit_scale});
      });
  }

  // ---- one call of a public operator each, charged to its name ----------------------------------
  // Matrix is a PackedMatrix, or the PackedHeadMatrix.
  template <typename Y, typename Matrix>
  void project(Y& y, const TensorView<T, 2>& x, const Matrix& weight,
               const PackedArray<float>& bias) {
    timed("linear", [&] {
      std::visit(
          [&](const auto& shard) {
            if (bias.size() == 0)
              column_parallel_linear_into(device_, y, x, shard, communicator_);
            else
              column_parallel_linear_into(device_, y, x, shard, communicator_, vector_of(bias));
          },
          weight);
    });
  }
  void project_gated(TensorView<T, 2>& y, const TensorView<T, 2>& x,
                     const PackedGatedMatrix<T>& weight) {
    timed("linear", [&] {
      std::visit(
          [&](const auto& shard) {
            column_parallel_gated_linear_into(device_, y, x, shard, communicator_,
                                              Epilogue{}.silu());
          },
          weight);
    });
  }
  /// x += branch; y the norm of x where a norm stands before what follows.
  void join(TensorView<T, 2>& y, TensorView<T, 2>& x, TensorView<T, 2>& branch,
            const PackedNorm& weight) {
    scale(branch, form_.residual_scale);
    if (form_.norm_before() && form_.norm == DecoderNorm::rms)
      return add_norm(y, x, branch, weight);
    timed("activation", [&] { residual_add_into(device_, x, x, branch); });
    if (form_.norm_before()) norm_into(y, x, weight);
  }
  void add_norm(TensorView<T, 2>& y, TensorView<T, 2>& x, const TensorView<T, 2>& branch,
                const PackedNorm& weight) {
    timed("normalization", [&] {
      add_rms_norm_into(device_, y, x, branch, vector_of(weight.weight),
                        {.epsilon = config_.epsilon});
    });
  }
  void norm_into(TensorView<T, 2>& y, const TensorView<T, 2>& x, const PackedNorm& weight) {
    timed("normalization", [&] {
      if (form_.norm == DecoderNorm::rms)
        rms_norm_into(device_, y, x, vector_of(weight.weight),
                      RmsNormOptions{.epsilon = config_.epsilon});
      else
        layer_norm_into(device_, y, x, vector_of(weight.weight), vector_of(weight.bias),
                        {.epsilon = config_.epsilon});
    });
  }
  void scale(TensorView<T, 2>& x, float factor) {
    if (factor != 1) timed("activation", [&] { softcap_into(device_, x, x, {.scale = factor}); });
  }
  // On a GPU positions travel and angles are computed: fewer bytes than a table has.
  template <typename X>
  void rotate(TensorView<T, 3>& y, const X& x, int rope) {
    timed("rope", [&] {
      if constexpr (CpuDevice<D>)
        rope_into(device_, y, x, s_.turned, s_.angles[static_cast<std::size_t>(rope)]);
      else
        rope_into(device_, y, x, s_.positions, rope_options(rope));
    });
  }
  const RopeOptions& rope_options(int rope) const {
    return form_.ropes.empty() ? plain_rope_ : form_.ropes[static_cast<std::size_t>(rope)];
  }
  template <typename U>
  TensorView<U, 2> reshape(GrowingTensor<U, 2>& x, Index rows, Index columns) const {
    return x.reshape(memory_of(device_), Eigen::DSizes<Index, 2>(rows, columns));
  }
  template <typename U>
  TensorView<U, 1> reshape(GrowingTensor<U, 1>& x, Index size) const {
    return x.reshape(memory_of(device_), Eigen::DSizes<Index, 1>(size));
  }
  template <typename Call>
  decltype(auto) timed(std::string_view name, Call&& call) {
    return OperatorProfile::timed(profile_, name, std::forward<Call>(call));
  }

  const D& device_;
  const PackedDecoderWeights<T>& weights_;
  const DecoderConfig& config_;
  const DecoderForm& form_;
  C& communicator_;
  InferenceScratch<T>& s_;
  Rows rows_;
  OperatorProfile* profile_;
  RopeOptions plain_rope_;
  std::vector<Index>& starts_ = s_.starts;
  bool appended_ = false;  // to one layer at least
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
