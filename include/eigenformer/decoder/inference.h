/// \file
/// A decoder's step of inference, ragged: every row of a step is a chunk of one sequence, one token
/// or thousands, and all rows go through each operator together. Ten operator calls per layer:
///
///   n = add_rms_norm(x, branch)      qkv = linear(n)         q, k = rope(qkv), rope(qkv)       append k, v
///   attended = attention(q, cache)   branch = linear(attended)
///   n = add_rms_norm(x, branch)      h = gated_linear(n)     branch = linear(h)
///
/// and four packings of activations. Only tokens whose logits somebody wants go through the head.
/// On a GPU everything is a launch on its stream: nothing waits, until logits are fetched for the
/// host. Token ids, positions and page tables are host memory, which travels with the calls.
#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "../activation.h"
#include "../attention.h"
#include "../embedding.h"
#include "../kv_cache.h"
#include "../normalization.h"
#include "../paged_kv_cache.h"
#include "../parallel_region.h"
#include "../rope.h"
#include "growing_tensor.h"
#include "packed_weights.h"
#include "profile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// What a step computes: row i appends tokens [offsets[i], offsets[i + 1]) to sequence i. A
/// StepPlan says the same with the tokens of its own that want logits.
struct StepRows {
  std::span<const std::int32_t> tokens;
  std::span<const Index> offsets;  ///< (rows + 1)
  /// Places in `tokens`, in any order; one row of logits for each.
  std::span<const Index> logits_of;
};

namespace detail {

/// Activations of a step, kept so that steps of no more tokens than one before allocate nothing.
template <typename T>
struct InferenceScratch {
  // of all tokens
  GrowingTensor<T, 2> stream, normalised, qkv, query, key, attended, gated, branch;
  GrowingTensor<T, 2> wanted, wanted_branch, last;  // of those whose logits are wanted
  GrowingTensor<float, 2> logits;                   // of a GPU, on their way to the host
  std::vector<Index> positions, turned, starts, capacities, offsets, logits_of;
  std::vector<std::int64_t> wanted_tokens;
  std::vector<std::int32_t> tokens;
  BasicRopeTable<compute_type<T>> angles;
};

/// y's shape, its memory kept where as much is needed. Where memory does not suffice y is empty:
/// Eigen's resize alone would leave a tensor that frees its old elements twice.
inline void reshape(Tensor<float, 2>& y, Index rows, Index columns) {
  if (y.size() != rows * columns) y = Tensor<float, 2>();
  y.resize(rows, columns);
}

/// Work below which the threads of a pool, woken for a step, cost more than they bring, in cycles
/// of one core: 330 us at 3 GHz. Models of 0.3 to 7 million parameters, Zen 3, 2 threads: steps
/// of 90 to 250 us on one thread took 0.9 to 1.5 of their time, those of 400 us 0.7 to 0.9
/// (report --filter '^small decoder' times such steps).
inline constexpr double kSharedStepCycles = 1e6;

/// Cycles of a step, rough: a weight is read from a cache and multiplied, INT8 three times as fast.
inline double step_cycles(const DecoderConfig& c, Index tokens, Index wanted, WeightFormat format) {
  const double q = static_cast<double>(c.heads * c.head_dim),
               kv = static_cast<double>(c.kv_heads * c.head_dim),
               d = static_cast<double>(c.features), hidden = static_cast<double>(c.hidden);
  const double layer = 2 * d * (q + kv) + 3 * d * hidden,
               head = d * static_cast<double>(c.vocabulary);
  return (format == WeightFormat::int8 ? 0.15 : 0.5) *
         (static_cast<double>(tokens * c.layers) * layer + static_cast<double>(wanted) * head);
}

/// Layers of different lengths would turn and mask tokens by the wrong positions.
inline void require_even_layers(Index first, Index other) {
  require_that(first == other, "Decoder::step", "a sequence has ", first,
               " positions in layer 0 of the cache and ", other,
               " in another, expected one length");
}

/// Sequences of a PagedKvCache as the rows of a step find them.
template <typename Cache>
struct PagedRows {
  Cache& cache;
  std::span<const SequenceId> sequences;

  template <typename D, typename K, typename V>
  void append(const D& device, std::span<const Index> offsets, Index layer, const K& k,
              const V& v) {
    cache.append(device, sequences, offsets, layer, k, v);
  }
  auto source(Index layer) { return cache.source(layer, sequences); }

  /// Where each row begins, into s.starts, and what undo needs.
  template <typename T>
  void begin(const DecoderConfig& model, std::size_t rows, InferenceScratch<T>& s) {
    require_that(cache.config().layers == model.layers, "Decoder::step", "the cache has ",
                 cache.config().layers, " layers, the model has ", model.layers);
    for (Index l = 0; l < model.layers; ++l) {
      const KvLayerShape c = cache.shape(l);
      require_that(c.kv_heads == model.kv_heads && c.head_dim == model.head_dim &&
                       c.value_dim == model.head_dim,
                   "Decoder::step", "the cache has ", c.kv_heads, " heads of ", c.head_dim,
                   ", the model has ", model.kv_heads, " of ", model.head_dim);
    }
    s.capacities.resize(rows);
    for (std::size_t i = 0; i < rows; ++i) {
      s.starts[i] = cache.length(sequences[i]);
      s.capacities[i] = cache.capacity(sequences[i]);
      require_even_layers(cache.length(sequences[i], 0), s.starts[i]);
    }
  }
  /// Takes back what was appended; pages that were reserved stay with their sequences.
  template <typename T>
  void undo(const InferenceScratch<T>& s) {
    for (std::size_t i = 0; i < s.starts.size(); ++i) {
      cache.truncate(sequences[i], s.starts[i]);
      cache.reserve(sequences[i], s.capacities[i]);  // out of the pages just given back
    }
  }
};

/// The same of a KvCache, whose rows have one length.
template <typename Cache>
struct DenseRows {
  Cache& cache;

  template <typename D, typename K, typename V>
  void append(const D& device, std::span<const Index> offsets, Index layer, const K& k,
              const V& v) {
    const Index batch = static_cast<Index>(offsets.size()) - 1;
    update_kv_cache(device, cache, batched(k, batch), batched(v, batch), layer);
  }
  auto source(Index layer) { return cache.source(layer); }
  template <typename T>
  void begin(const DecoderConfig& model, std::size_t, InferenceScratch<T>& s) {
    const Index length = cache.length(0);
    for (Index l = 1; l < model.layers; ++l) require_even_layers(length, cache.length(l));
    std::fill(s.starts.begin(), s.starts.end(), length);
    had_shape_ = cache.source(0).batch > 0;
  }
  template <typename T>
  void undo(const InferenceScratch<T>& s) {
    if (had_shape_)
      cache.truncate(s.starts.front());
    else
      cache.clear();  // its first update may bring another batch still
  }

  bool had_shape_ = false;

 private:
  template <typename T>
  static HeadsView<T, 4> batched(const HeadsView<T>& x, Index batch) {
    const Index n = batch == 0 ? 0 : x.dimension(0) / batch;
    return {
        x.data(), {batch, n, x.dimension(1), x.dimension(2)}, x.token_stride(), x.head_stride()};
  }
};

/// One step; holds references for the time of a call. Rows is PagedRows or DenseRows.
template <typename T, Device D, typename C, typename Rows>
class InferenceStep {
 public:
  InferenceStep(const D& device, const PackedDecoderWeights<T>& weights, C& communicator,
                InferenceScratch<T>& scratch, Rows rows, OperatorProfile* profile)
      : device_(device),
        weights_(weights),
        config_(weights.config()),
        communicator_(communicator),
        s_(scratch),
        rows_(rows),
        profile_(profile) {}

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
    const double cycles = step_cycles(config_, static_cast<Index>(step.tokens.size()),
                                      static_cast<Index>(step.logits_of.size()), weights_.format());
    const ParallelRegion region(device_, {.serial = cycles < kSharedStepCycles});
    fill_positions(step);
    embed(step.tokens);
    attempt_or_undo(
        [&] { std::visit([&](const auto& all) { layers(all, step, place); }, weights_.layers()); },
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
    rows_.begin(config_, rows, s_);
    for (std::size_t i = 0; i < rows; ++i) {
      for (Index t = step.offsets[i]; t < step.offsets[i + 1]; ++t)
        s_.positions[static_cast<std::size_t>(t)] = starts_[i] + t - step.offsets[i];
    }
    if constexpr (CpuDevice<D>) {
      std::iota(s_.turned.begin(), s_.turned.end(), Index{0});
      timed("rope", [&] { s_.angles.assign(s_.positions, config_.head_dim, rope_options()); });
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
          },
          weights_.embedding());
    });
  }

  template <typename S, typename Place>
  void layers(const PackedDecoderLayers<S>& all, const StepRows& step, Place& place) {
    auto x = s_.stream.view();
    const Index tokens = x.dimension(0);
    auto normalised = reshape(s_.normalised, tokens, config_.features);
    timed("normalization", [&] {
      rms_norm_into(device_, normalised, x, vector_of(all.layers.front().attention_norm), norm());
    });
    for (std::size_t l = 0; l < all.layers.size(); ++l) {
      const PackedDecoderLayer<S>& w = all.layers[l];
      attend(w, static_cast<Index>(l), step);
      auto branch = reshape(s_.branch, tokens, config_.features);
      project(branch, s_.attended.view(), w.output);
      add_norm(normalised, x, branch, w.feed_forward_norm);
      auto gated = reshape(s_.gated, tokens, config_.hidden);
      timed("linear", [&] {
        column_parallel_gated_linear_into(device_, gated, normalised, w.gate_up, communicator_,
                                          Epilogue{}.silu());
      });
      project(branch, gated, w.down);
      if (l + 1 < all.layers.size())
        add_norm(normalised, x, branch, all.layers[l + 1].attention_norm);
    }
    head(place, all.head, step.logits_of);
  }

  // normalised -> attended, keys and values into the cache.
  template <typename S>
  void attend(const PackedDecoderLayer<S>& w, Index l, const StepRows& step) {
    const DecoderConfig& c = config_;
    const Index tokens = static_cast<Index>(step.tokens.size()), q_columns = c.heads * c.head_dim,
                kv_columns = c.kv_heads * c.head_dim;
    auto qkv = reshape(s_.qkv, tokens, q_columns + 2 * kv_columns);
    project(qkv, s_.normalised.view(), w.qkv);
    auto keys = reshape(s_.key, tokens, kv_columns);
    TensorView<T, 3> q(reshape(s_.query, tokens, q_columns).data(), tokens, c.heads, c.head_dim),
        k(keys.data(), tokens, c.kv_heads, c.head_dim);
    rotate(q, heads_of(qkv, 0, c.heads, c.head_dim));
    rotate(k, heads_of(qkv, q_columns, c.kv_heads, c.head_dim));
    timed("kv_cache", [&] {
      rows_.append(device_, step.offsets, l, heads_of(keys, 0, c.kv_heads, c.head_dim),
                   heads_of(qkv, q_columns + kv_columns, c.kv_heads, c.head_dim));
    });
    appended_ = true;
    TensorView<T, 3> attended(reshape(s_.attended, tokens, q_columns).data(), tokens, c.heads,
                              c.head_dim);
    timed("attention", [&] {
      attention_with_kv_source_into(device_, attended, q, rows_.source(l), step.offsets,
                                    {.causal = true});
    });
  }

  template <typename S, typename Place>
  void head(Place& place, const PackedColumnShard<S>& weight, std::span<const Index> logits_of) {
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
    add_norm(last, wanted, branch, weights_.norm());
    project(logits, last, weight);
  }

  // ---- one call of a public operator each, charged to its name ----------------------------------
  template <typename Y, typename S>
  void project(Y& y, const TensorView<T, 2>& x, const PackedColumnShard<S>& weight) {
    timed("linear", [&] { column_parallel_linear_into(device_, y, x, weight, communicator_); });
  }
  void add_norm(TensorView<T, 2>& y, TensorView<T, 2>& x, const TensorView<T, 2>& branch,
                const PackedArray<float>& weight) {
    timed("normalization",
          [&] { add_rms_norm_into(device_, y, x, branch, vector_of(weight), norm()); });
  }
  // On a GPU positions travel and angles are computed: fewer bytes than a table has.
  template <typename X>
  void rotate(TensorView<T, 3>& y, const X& x) {
    timed("rope", [&] {
      if constexpr (CpuDevice<D>)
        rope_into(device_, y, x, s_.turned, s_.angles);
      else
        rope_into(device_, y, x, s_.positions, rope_options());
    });
  }
  RopeOptions rope_options() const {
    return {.base = config_.rope_base, .layout = config_.rope_layout};
  }
  template <typename U>
  TensorView<U, 2> reshape(GrowingTensor<U, 2>& x, Index rows, Index columns) const {
    return x.reshape(memory_of(device_), Eigen::DSizes<Index, 2>(rows, columns));
  }
  RmsNormOptions norm() const { return {.epsilon = config_.epsilon}; }
  template <typename Call>
  decltype(auto) timed(std::string_view name, Call&& call) {
    return OperatorProfile::timed(profile_, name, std::forward<Call>(call));
  }

  const D& device_;
  const PackedDecoderWeights<T>& weights_;
  const DecoderConfig& config_;
  C& communicator_;
  InferenceScratch<T>& s_;
  Rows rows_;
  OperatorProfile* profile_;
  std::vector<Index>& starts_ = s_.starts;
  bool appended_ = false;  // to one layer at least
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
