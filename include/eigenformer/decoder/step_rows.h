/// \file
/// What a decoder's step of inference is given and keeps: its rows, the caches they are appended
/// to, activations. inference.h is the step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "../kv_cache.h"
#include "../paged_kv_cache.h"
#include "../rope.h"
#include "growing_tensor.h"
#include "packed_weights.h"

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
  GrowingTensor<T, 2> gate_up, side;  // of forms with biases or other activations; parallel blocks
  GrowingTensor<T, 2> expert_hidden, expert_results, shared;  // of layers with experts
  GrowingTensor<T, 2> expert_gate_up;                         // gate and up before they are one
  GrowingTensor<compute_type<T>, 2> router_logits, expert_weights, shared_gate;
  GrowingTensor<std::int32_t, 2> expert_ids, expert_places;
  GrowingTensor<std::int32_t, 1> expert_offsets, expert_order;
  GrowingTensor<T, 2> wanted, wanted_branch, last;  // of those whose logits are wanted
  GrowingTensor<float, 2> logits;                   // of a GPU, on their way to the host
  std::vector<Index> positions, turned, starts, capacities, offsets, logits_of;
  std::vector<std::int64_t> wanted_tokens;
  std::vector<std::int32_t> tokens;
  std::vector<BasicRopeTable<compute_type<T>>> angles;  // one for each of the form's rotations
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

/// Cycles of a step, rough: that of every layer as of the first.
template <typename T>
double step_cycles(const PackedDecoderWeights<T>& weights, Index tokens, Index wanted) {
  const auto& layer = weights.layers().front();
  const DecoderExperts& experts = weights.form().experts;
  const double of_experts = 0.5 * static_cast<double>(experts.chosen) *
                            static_cast<double>(3 * experts.hidden * weights.config().features);
  return static_cast<double>(tokens * weights.config().layers) *
             (cycles_per_token(layer) + of_experts) +
         static_cast<double>(wanted) * cycles_per_token(weights.head());
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
  void begin(const DecoderConfig& model, const DecoderForm&, std::span<const Index> offsets,
             InferenceScratch<T>& s) {
    const std::size_t rows = offsets.size() - 1;
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
  void begin(const DecoderConfig& model, const DecoderForm& form, std::span<const Index> offsets,
             InferenceScratch<T>& s) {
    for (std::size_t i = 1; i < offsets.size(); ++i)
      require_that(offsets[i] - offsets[i - 1] == offsets[1], "Decoder::step", "row ", i - 1,
                   " has ", offsets[i] - offsets[i - 1], " tokens, row 0 has ", offsets[1],
                   ", expected rows of one length");
    const Index length = cache.length(0);
    for (Index l = 1; l < model.layers; ++l) require_even_layers(length, cache.length(l));
    std::fill(s.starts.begin(), s.starts.end(), length);
    had_shape_ = cache.source(0).batch > 0;
    require_held(form, model.layers, offsets[1]);
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
  /// The first of `added` positions sees nothing that the cache will have given up by then: where
  /// attention says so, the cache has been written to.
  void require_held(const DecoderForm& form, Index layers, Index added) const {
    const Index start = cache.length(0);
    for (Index l = 0; l < layers; ++l) {
      const HeldPositions held = cache.held_at(l, start + added);
      const Index window = form.layer(l).window;
      require_that(held.begin <= held.prefix || (window > 0 && start - window + 1 >= held.begin),
                   "Decoder::step", "layer ", l, " of the cache would give up the positions ",
                   held.prefix, " to ", held.begin - 1, ", which position ", start, " sees");
    }
  }
  template <typename T>
  static HeadsView<T, 4> batched(const HeadsView<T>& x, Index batch) {
    const Index n = batch == 0 ? 0 : x.dimension(0) / batch;
    return {
        x.data(), {batch, n, x.dimension(1), x.dimension(2)}, x.token_stride(), x.head_stride()};
  }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
