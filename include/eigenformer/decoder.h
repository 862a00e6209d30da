/// \file
/// A Llama-shaped decoder (Touvron et al., 2023), put together from the public operators alone:
///
///   x = embedding[ids]
///   per layer:  x += W_o attention(rope(W_q n), rope(W_k n), W_v n),  n = rms_norm(x)
///               x += W_down (silu(W_gate m) * (W_up m)),              m = rms_norm(x)
///   logits = W_head rms_norm(x)
///
/// One class serves training (it meets ef::TrainableModel), prefill, and decode over the caches, in
/// float, bfloat16 or half, with float or INT8 weights, alone or as one rank of a group that shares
/// the linear layers.
///
///   ef::Decoder<float> model({.vocabulary = 256, .features = 128}, /*seed=*/1);
///   ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f});
///   ef::train_step_with_grad_accumulation<Eigen::bfloat16>(model, optimizer, batches, 4);
///   model.quantize();                                            // INT8, per channel
///   ef::KvCache<float> cache;
///   auto logits = model.prefill(prompt, cache);                  // (batch, vocabulary)
///   logits = model.decode(ef::greedy_sample(logits), cache);
///
/// Every row of logits has the same bits whether its sequence is alone or in a batch, prefilled
/// whole or in chunks or decoded token by token, on any number of threads and ranks (INT8 included:
/// activations are quantized by token).
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <variant>

#include "communicator.h"
#include "decoder/config.h"
#include "decoder/profile.h"
#include "decoder/training.h"
#include "decoder/weights.h"
#include "kv_cache.h"
#include "paged_kv_cache.h"
#include "parallel_region.h"
#include "quantization.h"
#include "tensor_parallel.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// T is the scalar of activations and caches in inference. A decoder belongs to one thread at a
/// time; ranks share DecoderWeights, which inference only reads. Device, communicator and profile
/// must outlive it. On a pool a step of inference is one ParallelRegion: it wakes the threads once.
template <FloatingScalar T = float, CpuDevice D = Eigen::DefaultDevice,
          typename C = SelfCommunicator>
class Decoder {
 public:
  /// A decoder of its own with random weights, on the calling thread. Throws std::invalid_argument
  /// for an impossible shape.
  explicit Decoder(const DecoderConfig& config, std::uint64_t seed = 0)
    requires std::same_as<D, Eigen::DefaultDevice> && std::same_as<C, SelfCommunicator>
      : Decoder(std::make_shared<DecoderWeights>(config, seed), default_device()) {}

  /// A decoder on a device.
  Decoder(std::shared_ptr<DecoderWeights> weights, const D& device)
    requires std::same_as<C, SelfCommunicator>
      : weights_(std::move(weights)),
        device_(&device),
        own_communicator_(std::in_place),
        communicator_(&*own_communicator_) {}

  /// One rank of a group.
  Decoder(std::shared_ptr<DecoderWeights> weights, const D& device, C& communicator)
      : weights_(std::move(weights)), device_(&device), communicator_(&communicator) {}

  /// The device must outlive the decoder: a temporary one is refused.
  template <typename... Rest>
  Decoder(std::shared_ptr<DecoderWeights> weights, const D&& device, Rest&&... rest) = delete;

  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  const DecoderConfig& config() const { return weights_->config(); }
  const DecoderWeights& weights() const { return *weights_; }
  void set_profile(OperatorProfile* profile) { profile_ = profile; }

  // ---- training
  // -----------------------------------------------------------------------------------------------

  /// ids (batch, length), std::int32_t, in [0, vocabulary) -> logits (batch * length, vocabulary).
  /// Keeps what backward reads.
  template <typename Compute, typename Inputs>
  Tensor<Compute, 2> forward(const Inputs& ids) {
    require_masters("Decoder::forward");
    stale_ = true;  // weights are about to change: inference packs them again
    return pass<Compute>().forward(input_view<2>(ids));
  }

  /// Adds to the gradients of the weights; goes with the last forward<Compute>.
  template <typename Compute>
  void backward(const Tensor<Compute, 2>& logits_gradient) {
    pass<Compute>().backward(logits_gradient);
  }

  /// The master weights and their gradients, flattened; valid as long as the weights live.
  std::vector<Parameter> parameters() {
    require_masters("Decoder::parameters");
    return weights_->parameters();
  }

  // ---- inference
  // -----------------------------------------------------------------------------------------------

  /// Packs this rank's part of the weights in type T. prefill and decode pack by themselves, the
  /// first time and after training, in the type packed last; call this (or quantize) where the
  /// weights changed in another way.
  void pack() { pack_as<T>(); }

  /// Quantizes this rank's part of the weights of all linear layers to INT8, one scale an output
  /// channel. Not for double.
  void quantize()
    requires(!std::same_as<T, double>)
  {
    pack_as<std::int8_t>();
  }

  /// Lets go of the float master weights, for a decoder that serves and trains no more: what stays
  /// are the weights as packed last (packed now where they are not), the norms, and the embedding,
  /// as float or, beside INT8 weights, as INT8 with one scale per token, whose rounding the logits
  /// then carry. Memory goes back once nobody shares the weights. Later calls of forward,
  /// parameters, pack and quantize throw std::logic_error.
  void release_master_weights() {
    require_masters("Decoder::release_master_weights");
    pack_if_stale();
    const bool int8 = is_quantized();
    weights_ = weights_->for_inference(int8);
    const Index embedding = config().features * config().vocabulary;
    if (int8)
      weight_bytes_ -= static_cast<std::size_t>(embedding) * (sizeof(float) - 1) -
                       static_cast<std::size_t>(config().vocabulary) * sizeof(float);
    tapes_ = {};
  }

  /// Bytes inference reads from: linear layers as packed on this rank (their numbers, scales
  /// included, without padding), the rest as float.
  std::size_t weight_bytes() const { return weight_bytes_; }

  /// Appends ids (batch, n) to sequences of equal length; positions start at cache.length(0), so
  /// that a prompt may come in chunks. Returns the logits (batch, vocabulary) after the last of
  /// them. Throws std::invalid_argument for an id outside the vocabulary or another batch.
  template <typename Ids, typename Storage>
  Tensor<float, 2> prefill(const Ids& ids, KvCache<T, Storage>& cache) {
    const auto view = input_view<2>(ids);
    const Index batch = view.dimension(0), n = view.dimension(1), start = cache.length(0);
    require_that(n > 0, "Decoder::prefill", "ids has shape ", detail::shape_text(view),
                 ", expected at least one token a sequence");
    fill_positions(batch, n, [&](Index, Index i) { return start + i; });
    rows_.resize(static_cast<std::size_t>(batch));
    for (Index b = 0; b < batch; ++b) rows_[static_cast<std::size_t>(b)] = b * n + n - 1;
    return run(view, [&](Index layer, const Heads& q, const Heads& k, const Heads& v, Heads& out) {
      timed("kv_cache", [&] { update_kv_cache(*device_, cache, k, v, layer); });
      timed("attention",
            [&] { attention_with_kv_cache_into(*device_, out, q, cache, layer, causal()); });
    });
  }

  /// One token (batch) for each sequence of the cache -> logits (batch, vocabulary).
  template <typename Ids, typename Storage>
  Tensor<float, 2> decode(const Ids& ids, KvCache<T, Storage>& cache) {
    const auto view = input_view<1>(ids);
    return prefill(TensorView<const std::int32_t, 2>(view.data(), view.dimension(0), 1), cache);
  }

  /// Prompts of different lengths: ids (batch, longest), padded; row b is appended to sequences[b]
  /// of the cache, which must be empty. Attention runs over the padded batch. Returns the logits
  /// (batch, vocabulary) after the last token of each. Throws std::length_error, with nothing
  /// changed, where the pages do not suffice for all.
  template <typename Ids, typename Storage>
  Tensor<float, 2> prefill(const Ids& ids, std::span<const Index> lengths,
                           PagedKvCache<T, Storage>& cache, std::span<const SequenceId> sequences) {
    const auto view = input_view<2>(ids);
    const Index batch = view.dimension(0), n = view.dimension(1);
    constexpr auto name = "Decoder::prefill";
    require_that(static_cast<Index>(lengths.size()) == batch &&
                     static_cast<Index>(sequences.size()) == batch,
                 name, "ids has ", batch, " rows, but there are ", lengths.size(), " lengths and ",
                 sequences.size(), " sequences");
    for (Index b = 0; b < batch; ++b) {
      const Index length = lengths[static_cast<std::size_t>(b)];
      require_that(length > 0 && length <= n, name, "lengths[", b, "] is ", length,
                   ", expected 1 to ", n);
      require_that(cache.length(sequences[static_cast<std::size_t>(b)]) == 0, name, "sequence ", b,
                   " already holds tokens: decode appends to it");
    }
    fill_positions(batch, n, [&](Index, Index i) { return i; });
    rows_.resize(static_cast<std::size_t>(batch));
    for (Index b = 0; b < batch; ++b)
      rows_[static_cast<std::size_t>(b)] = b * n + lengths[static_cast<std::size_t>(b)] - 1;
    clear_padding(view, lengths);
    const Index row = config().kv_heads * config().head_dim;
    return run(TensorView<const std::int32_t, 2>(padded_ids_.data(), batch, n),
               [&](Index layer, const Heads& q, const Heads& k, const Heads& v, Heads& out) {
                 if (layer == 0) claim_pages(cache, sequences, lengths);
                 timed("kv_cache", [&] {
                   for (Index b = 0; b < batch; ++b) {
                     const auto at = static_cast<std::size_t>(b);
                     const auto own = [&](const Heads& x) {
                       return TensorView<const T, 3>(x.data() + b * n * row, lengths[at],
                                                     config().kv_heads, config().head_dim);
                     };
                     cache.append(*device_, sequences[at], layer, own(k), own(v));
                   }
                 });
                 timed("attention", [&] {
                   batched_attention_with_padding_into(*device_, out, q, k, v, lengths, causal());
                 });
               });
  }

  /// One token (batch) for each of the sequences, whatever their lengths -> logits (batch,
  /// vocabulary).
  template <typename Ids, typename Storage>
  Tensor<float, 2> decode(const Ids& ids, PagedKvCache<T, Storage>& cache,
                          std::span<const SequenceId> sequences) {
    const auto view = input_view<1>(ids);
    const Index batch = view.dimension(0);
    require_that(static_cast<Index>(sequences.size()) == batch, "Decoder::decode", "ids has ",
                 batch, " rows, but there are ", sequences.size(), " sequences");
    fill_positions(batch, 1, [&](Index b, Index) {
      return cache.length(sequences[static_cast<std::size_t>(b)]);
    });
    rows_.resize(static_cast<std::size_t>(batch));
    for (Index b = 0; b < batch; ++b) rows_[static_cast<std::size_t>(b)] = b;
    return run(TensorView<const std::int32_t, 2>(view.data(), batch, 1),
               [&](Index layer, const Heads& q, const Heads& k, const Heads& v, Heads& out) {
                 timed("kv_cache", [&] { cache.append(*device_, sequences, layer, k, v); });
                 timed("attention", [&] {
                   attention_with_kv_source_into(*device_, out, q, cache.source(layer, sequences),
                                                 causal());
                 });
               });
  }

 private:
  using Heads = TensorView<T, 4>;
  template <typename W>
  struct PackedLayer {
    PackedColumnShard<W> query, key, value, output, gate, up, down;
  };
  template <typename W>
  struct Packed {
    std::vector<PackedLayer<W>> layers;
    PackedColumnShard<W> head;
  };
  // INT8 products accumulate into float, so that double, which serves as a reference, has none.
  static constexpr bool kHasInt8 = !std::is_same_v<T, double>;
  using PackedWeights =
      std::conditional_t<kHasInt8, std::variant<std::monostate, Packed<T>, Packed<std::int8_t>>,
                         std::variant<std::monostate, Packed<T>>>;

  // Activations of inference, kept so that a step of the same shape allocates nothing but its
  // logits.
  struct Scratch {
    Tensor<T, 2> stream, normalised, query, key, value, attended, gate, up, branch;
  };

  static const Eigen::DefaultDevice& default_device() {
    static const Eigen::DefaultDevice device;
    return device;
  }

  template <typename Compute>
  detail::DecoderPass<Compute, D> pass() {
    return {*device_, *weights_, std::get<DecoderTape<Compute>>(tapes_), profile_};
  }

  static AttentionOptions causal() { return {.causal = true}; }

  void require_masters(std::string_view name) const {
    if (!weights_->complete())
      detail::fail<std::logic_error>(std::string(name) + ": the master weights were released");
  }
  bool is_quantized() const {
    if constexpr (kHasInt8)
      return std::holds_alternative<Packed<std::int8_t>>(packed_weights_);
    else
      return false;
  }
  // In the type packed last.
  void pack_if_stale() {
    if (!stale_) return;
    if constexpr (kHasInt8)
      if (is_quantized()) return quantize();
    pack();
  }

  template <typename W>
  void pack_as() {
    require_masters("Decoder::pack");
    Packed<W> packed;
    weight_bytes_ = 0;
    const auto shard = [&](std::size_t tensor) {
      const auto full = std::as_const(*weights_).matrix(tensor);
      PackedColumnShard<W> result = pack_column_shard<W>(full, *communicator_);
      weight_bytes_ +=
          static_cast<std::size_t>(result.weight.rows() * result.weight.columns()) * sizeof(W);
      if (std::is_same_v<W, std::int8_t>)
        weight_bytes_ += static_cast<std::size_t>(result.weight.rows()) * sizeof(float);
      return result;
    };
    for (Index l = 0; l < config().layers; ++l) {
      const DecoderWeights::Layer& w = weights_->layer(l);
      packed.layers.push_back({shard(w.query), shard(w.key), shard(w.value), shard(w.output),
                               shard(w.gate), shard(w.up), shard(w.down)});
    }
    packed.head = shard(weights_->head());
    weight_bytes_ += static_cast<std::size_t>(config().features *
                                              (config().vocabulary + 2 * config().layers + 1)) *
                     sizeof(float);
    packed_weights_ = std::move(packed);
    stale_ = false;
  }

  template <typename F>
  void fill_positions(Index batch, Index n, F&& position) {
    positions_.resize(static_cast<std::size_t>(batch * n));
    for (Index b = 0; b < batch; ++b)
      for (Index i = 0; i < n; ++i)
        positions_[static_cast<std::size_t>(b * n + i)] = position(b, i);
  }

  // Ids beyond a length are nobody's: they become 0, which every vocabulary has.
  void clear_padding(const TensorView<const std::int32_t, 2>& ids, std::span<const Index> lengths) {
    const Index n = ids.dimension(1);
    padded_ids_.assign(static_cast<std::size_t>(ids.size()), 0);
    for (Index b = 0; b < ids.dimension(0); ++b)
      std::copy_n(ids.data() + b * n, lengths[static_cast<std::size_t>(b)],
                  padded_ids_.begin() + b * n);
  }

  // All pages or none, before anything is written.
  template <typename Storage>
  static void claim_pages(PagedKvCache<T, Storage>& cache, std::span<const SequenceId> sequences,
                          std::span<const Index> lengths) {
    detail::attempt_or_undo(
        [&] {
          for (std::size_t b = 0; b < sequences.size(); ++b)
            cache.reserve(sequences[b], lengths[b]);
        },
        [&] {
          for (SequenceId sequence : sequences) cache.truncate(sequence, 0);
        });
  }

  template <typename Attend>
  Tensor<float, 2> run(const TensorView<const std::int32_t, 2>& ids, Attend&& attend) {
    pack_if_stale();
    return std::visit(
        [&](const auto& packed) -> Tensor<float, 2> {
          if constexpr (std::is_same_v<std::remove_cvref_t<decltype(packed)>, std::monostate>)
            return {};
          else
            return run_packed(packed, ids, attend);
        },
        packed_weights_);
  }

  template <typename W, typename Attend>
  Tensor<float, 2> run_packed(const Packed<W>& packed, const TensorView<const std::int32_t, 2>& ids,
                              Attend&& attend) {
    const DecoderConfig& c = config();
    const Index batch = ids.dimension(0), n = ids.dimension(1), tokens = batch * n;
    const ParallelRegion region(*device_);
    Tensor<T, 2>&x = scratch_.stream, &normalised = scratch_.normalised, &branch = scratch_.branch;
    Tensor<T, 2>&q = scratch_.query, &k = scratch_.key, &v = scratch_.value,
              &attended = scratch_.attended;
    Tensor<T, 2>&gate = scratch_.gate, &up = scratch_.up;
    x.resize(tokens, c.features);
    attended.resize(tokens, c.heads * c.head_dim);
    timed("embedding", [&] { embed(x, {ids.data(), tokens}); });
    for (Index l = 0; l < c.layers; ++l) {
      const PackedLayer<W>& w = packed.layers[static_cast<std::size_t>(l)];
      const DecoderWeights::Layer& names = weights_->layer(l);
      norm(normalised, x, names.attention_norm);
      project(q, normalised, w.query);
      project(k, normalised, w.key);
      project(v, normalised, w.value);
      Heads q4(q.data(), batch, n, c.heads, c.head_dim),
          k4(k.data(), batch, n, c.kv_heads, c.head_dim),
          v4(v.data(), batch, n, c.kv_heads, c.head_dim);
      rotate(q4);
      rotate(k4);
      Heads out(attended.data(), batch, n, c.heads, c.head_dim);
      attend(l, q4, k4, v4, out);
      project(branch, attended, w.output);
      join(x, branch);
      norm(normalised, x, names.feed_forward_norm);
      project(gate, normalised, w.gate);
      project(up, normalised, w.up);
      timed("activation", [&] { swiglu_into(*device_, gate, gate, up); });
      project(branch, gate, w.down);
      join(x, branch);
    }
    return head(x, packed.head);
  }

  void embed(Tensor<T, 2>& x, const TensorView<const std::int32_t, 1>& ids) {
    const QuantizedChannels& table = weights_->int8_embedding();
    if (table.values.size() == 0)
      return embedding_into(*device_, x, ids,
                            std::as_const(*weights_).matrix(weights_->embedding()));
    const Index features = config().features, vocabulary = config().vocabulary;
    for (Index t = 0; t < ids.dimension(0); ++t)
      require_that(ids(t) >= 0 && ids(t) < vocabulary, "embedding", "ids[", t, "] is ", ids(t),
                   ", expected 0 to ", vocabulary - 1);
    for (Index t = 0; t < ids.dimension(0); ++t)
      dequantize_into(
          *device_, TensorView<T, 1>(x.data() + t * features, features),
          TensorView<const std::int8_t, 1>(table.values.data() + ids(t) * features, features),
          table.scales(ids(t)));
  }

  // Only the rows that somebody samples from go through the head.
  template <typename W>
  Tensor<float, 2> head(const Tensor<T, 2>& x, const PackedColumnShard<W>& weight) {
    const Index count = static_cast<Index>(rows_.size());
    Tensor<T, 2>&last = scratch_.branch, &normalised = scratch_.normalised;
    last.resize(count, config().features);
    for (Index r = 0; r < count; ++r)
      std::copy_n(x.data() + rows_[static_cast<std::size_t>(r)] * config().features,
                  config().features, last.data() + r * config().features);
    norm(normalised, last, weights_->norm());
    Tensor<T, 2> logits;
    project(logits, normalised, weight);
    if constexpr (std::is_same_v<T, float>)
      return logits;
    else
      return logits.template cast<float>();
  }

  template <typename W>
  void project(Tensor<T, 2>& y, const Tensor<T, 2>& x, const PackedColumnShard<W>& weight) {
    y.resize(x.dimension(0), weight.out_features);
    timed("linear", [&] { column_parallel_linear_into(*device_, y, x, weight, *communicator_); });
  }
  void norm(Tensor<T, 2>& y, const Tensor<T, 2>& x, std::size_t weight) {
    y.resize(x.dimensions());
    timed("normalization", [&] {
      rms_norm_into(*device_, y, x, std::as_const(*weights_).vector(weight),
                    {.epsilon = config().epsilon});
    });
  }
  void rotate(Heads& x) {
    timed("rope", [&] {
      rope_into(*device_, x, x, positions_,
                {.base = config().rope_base, .layout = config().rope_layout});
    });
  }
  void join(Tensor<T, 2>& x, const Tensor<T, 2>& branch) {
    timed("activation", [&] { residual_add_into(*device_, x, x, branch); });
  }
  template <typename Call>
  decltype(auto) timed(std::string_view name, Call&& call) {
    return OperatorProfile::timed(profile_, name, std::forward<Call>(call));
  }

  std::shared_ptr<DecoderWeights> weights_;
  const D* device_;
  std::optional<C> own_communicator_;
  C* communicator_;
  OperatorProfile* profile_ = nullptr;
  std::tuple<DecoderTape<float>, DecoderTape<double>, DecoderTape<bfloat16>, DecoderTape<half>>
      tapes_;
  PackedWeights packed_weights_;
  bool stale_ = true;
  std::size_t weight_bytes_ = 0;
  Scratch scratch_;
  std::vector<Index> positions_, rows_;
  std::vector<std::int32_t> padded_ids_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
