/// \file
/// A Llama-shaped decoder (Touvron et al., 2023), put together from the public operators alone:
///
///   x = embedding[ids]
///   per layer:  x += W_o attention(rope(W_q n), rope(W_k n), W_v n),  n = rms_norm(x)
///               x += W_down (silu(W_gate m) * (W_up m)),              m = rms_norm(x)
///   logits = W_head rms_norm(x)
///
/// One class serves training (it meets ef::TrainableModel; decoder/training.h) and inference
/// (decoder/inference.h) in float, bfloat16 or half, with float or INT8 weights, alone or as one
/// rank of a group that shares the linear layers. Inference has one entry, a step over ragged rows:
/// prompts, chunks of prompts and single tokens side by side; prefill and decode are such steps.
/// Packed weights may have the form of another family (decoder/form.h); training has this one.
///
///   ef::Decoder<float> model({.vocabulary = 256, .features = 128}, /*seed=*/1);
///   ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f});
///   ef::train_step_with_grad_accumulation<Eigen::bfloat16>(model, optimizer, batches, 4);
///   model.quantize();                                            // INT8, per channel
///   ef::KvCache<float> cache;
///   auto logits = model.prefill(prompt, cache);                  // (batch, vocabulary)
///   logits = model.decode(ef::greedy_sample(logits), cache);
///
///   ef::PagedKvCache<float> pages({.layers = 4, .kv_heads = 4, .head_dim = 32, .page_size = 16, .page_count = 1000});
///   while (scheduler.next_step(plan))                            // an ef::StepScheduler serves many requests
///     logits = model.step(plan, pages, sequences);               // one row for each row of the plan that wants a token
///
/// Every row of logits has the same bits whether its sequence is alone or in a batch, prefilled
/// whole or in chunks or decoded token by token, on any number of threads and ranks (INT8 included:
/// activations are quantized by token).
///
/// Throws std::invalid_argument for an impossible shape, an id outside the vocabulary, sizes that
/// do not fit and memory that is another device's, std::length_error where pages run out,
/// std::logic_error for training without master weights; a refused step leaves the cache as it was.
///
/// On a GPU ids and plans are host memory, as on a CPU. Packed weights and activations lie in the
/// memory of the device; so do the pages of its caches and, for training, the master weights:
///
///   ef::Decoder model(std::make_shared<ef::DecoderWeights>(config, 1, ef::memory_of(device)), device);
///   ef::KvCache<float> cache(ef::memory_of(device));
///   auto logits = model.prefill(prompt, cache);                  // the host's: waits for the device
///   model.step_into(view, rows, pages, sequences);               // a view of the device's memory: waits for nothing
///   ef::AdamW optimizer(model.parameters(), {}, ef::memory_of(device));
///   ef::train_step_mixed_precision<Eigen::bfloat16>(device, model, optimizer, ids, labels, scaler);
///
/// Master weights of the host serve a decoder on a GPU for inference: packing copies them there.
/// An ef::StepGraph (step_graph.h) launches a step_into as a CUDA graph, each time with that step's
/// ids, positions and pages. In a graph captured otherwise they stay those of the capture, and a
/// step of that size comes before it, since memory must have grown.
///
/// Cost of a step: ten operator calls per layer; the packed weights are read once for up to four
/// rows, attention reads the cache of each sequence once. A step of no more tokens than one before
/// allocates nothing but its logits.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <tuple>

#include "communicator.h"
#include "decoder/config.h"
#include "decoder/inference.h"
#include "decoder/packed_weights.h"
#include "decoder/profile.h"
#include "decoder/training.h"
#include "decoder/weights.h"
#include "kv_cache.h"
#include "paged_kv_cache.h"
#include "scheduler/step_plan.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// T is the scalar of activations and caches in inference. A decoder belongs to one thread at a
/// time; ranks share DecoderWeights, which inference only reads. Device, communicator and profile
/// must outlive it. On a pool a step of inference is one ParallelRegion: it wakes the threads once.
template <FloatingScalar T = float, Device D = Eigen::DefaultDevice, typename C = SelfCommunicator>
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
      : config_(weights->config()),
        weights_(std::move(weights)),
        device_(&device),
        own_communicator_(std::in_place),
        communicator_(&*own_communicator_) {}

  /// One rank of a group.
  Decoder(std::shared_ptr<DecoderWeights> weights, const D& device, C& communicator)
      : config_(weights->config()),
        weights_(std::move(weights)),
        device_(&device),
        communicator_(&communicator) {}

  /// One that serves and does not train, from weights packed elsewhere, for this rank. Throws
  /// std::logic_error where some are missing.
  Decoder(std::shared_ptr<const PackedDecoderWeights<T>> packed, const D& device)
    requires std::same_as<C, SelfCommunicator>
      : config_(packed->config()),
        device_(&device),
        own_communicator_(std::in_place),
        communicator_(&*own_communicator_),
        packed_(std::move(packed)) {
    packed_->require_complete();
    packed_->require_reachable(device);
  }
  Decoder(std::shared_ptr<const PackedDecoderWeights<T>> packed, const D& device, C& communicator)
      : config_(packed->config()),
        device_(&device),
        communicator_(&communicator),
        packed_(std::move(packed)) {
    packed_->require_complete();
    packed_->require_reachable(device);
  }

  /// The device must outlive the decoder: a temporary one is refused.
  template <typename Weights, typename... Rest>
  Decoder(std::shared_ptr<Weights> weights, const D&& device, Rest&&... rest) = delete;

  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  const DecoderConfig& config() const { return config_; }
  void set_profile(OperatorProfile* profile) { profile_ = profile; }

  // ---- training: throws std::logic_error without master weights ---------------------------------

  const DecoderWeights& weights() const { return masters("Decoder::weights"); }

  /// ids (batch, length), std::int32_t, in [0, vocabulary) -> logits (batch * length, vocabulary).
  /// Keeps what backward reads; on a GPU also the logits, a view of which is returned, until the
  /// next forward<Compute>.
  template <typename Compute, typename Inputs>
  detail::ModelTensor<D, Compute, 2> forward(const Inputs& ids) {
    masters("Decoder::forward");
    stale_ = true;  // weights are about to change: inference packs them again
    return pass<Compute>().forward(input_view<2>(ids));
  }

  /// Adds to the gradients of the weights; goes with the last forward<Compute>.
  template <typename Compute>
  void backward(const detail::ModelTensor<D, Compute, 2>& logits_gradient) {
    masters("Decoder::backward");
    stale_ = true;  // also where inference came between
    pass<Compute>().backward(input_view<2>(logits_gradient));
  }

  /// The master weights and their gradients, flattened; valid as long as the weights live.
  std::vector<Parameter> parameters() {
    auto& weights = masters("Decoder::parameters");
    stale_ = true;
    return weights.parameters();
  }

  // ---- weights of inference ---------------------------------------------------------------------

  /// Packs this rank's part of the master weights. Inference packs by itself, in the format packed
  /// last: the first time, and after forward, backward or parameters() of this decoder. Call this
  /// (or quantize) where the weights changed otherwise: an optimizer's step behind an inference, or
  /// another decoder that shares them.
  void pack(const WeightStorage& storage = {}) {
    masters("Decoder::pack");
    auto packed = std::make_shared<PackedDecoderWeights<T>>(config_, storage);
    packed->pack(*device_, std::shared_ptr<const DecoderWeights>(weights_), *communicator_);
    packed_ = std::move(packed);
    stale_ = false;
  }

  /// Packs the linear layers as INT8, one scale per output channel. Not for double.
  void quantize()
    requires(!std::same_as<T, double>)
  {
    pack(WeightFormat::int8);
  }

  /// Lets go of the float master weights, for a decoder that serves and trains no more: what stays
  /// are the weights as packed last (packed now where they are not), the norms, and the embedding,
  /// as float or, beside INT8 weights, as INT8 with one scale per token, whose rounding the logits
  /// then carry. Memory goes back once nobody shares the weights. Later calls of forward,
  /// parameters, pack and quantize throw std::logic_error.
  void release_master_weights() {
    masters("Decoder::release_master_weights");
    pack_if_stale();
    // A decoder with masters has packed for itself alone: no copy of all the weights is needed.
    std::const_pointer_cast<PackedDecoderWeights<T>>(packed_)->own_embedding(*device_);
    weights_.reset();
    tapes_ = {};
  }

  /// Bytes inference reads from: linear layers as packed on this rank (their numbers, scales
  /// included, without padding), the norms, the embedding. 0 where nothing is packed yet.
  std::size_t weight_bytes() const { return packed_ == nullptr ? 0 : packed_->bytes(); }

  // ---- inference --------------------------------------------------------------------------------

  /// One step over ragged rows: row i of `rows` is appended to sequences[i] of the cache, whatever
  /// it holds already. logits (rows.logits_of.size(), vocabulary) are those after the tokens that
  /// rows.logits_of names: an ef::Tensor, which takes this shape, or an ef::TensorView of it in
  /// memory of the device, which a GPU has written once its stream is there. The cache has as many
  /// layers as the model. Once a step had as many tokens nothing is allocated, but `logits` where
  /// its shape differs and the ParallelRegion of a pool. Throws std::invalid_argument for an id
  /// outside the vocabulary, for a cache of another shape or whose layers differ in length, for
  /// sizes that do not fit and for a sequence that comes twice, std::out_of_range for an unknown
  /// sequence, std::length_error where pages do not suffice for all; the cache is then as it was.
  template <typename Logits, typename Storage>
  void step_into(Logits&& logits, const StepRows& rows, PagedKvCache<T, Storage>& cache,
                 std::span<const SequenceId> sequences) {
    detail::require_that(sequences.size() + 1 == rows.offsets.size(), "Decoder::step",
                         "sequences has ", sequences.size(), " elements, offsets has ",
                         rows.offsets.size(), ", expected one more");
    run(logits, rows, detail::PagedRows<PagedKvCache<T, Storage>>{cache, sequences});
  }
  template <typename Storage>
  Tensor<float, 2> step(const StepRows& rows, PagedKvCache<T, Storage>& cache,
                        std::span<const SequenceId> sequences) {
    Tensor<float, 2> logits;
    step_into(logits, rows, cache, sequences);
    return logits;
  }

  /// The step a scheduler has planned: sequences[i] is the cache's sequence of plan.requests[i] and
  /// holds plan.positions[i] positions. One row of logits for each row of the plan that wants a
  /// token, in their order.
  template <typename Logits, typename Storage>
  void step_into(Logits&& logits, const StepPlan& plan, PagedKvCache<T, Storage>& cache,
                 std::span<const SequenceId> sequences) {
    constexpr auto name = "Decoder::step";
    const std::size_t rows = plan.requests.size();
    detail::require_that(sequences.size() == rows && plan.offsets.size() == rows + 1 &&
                             plan.positions.size() == rows && plan.wants_token.size() == rows,
                         name, "the plan has ", rows, " rows, ", plan.offsets.size(), " offsets, ",
                         plan.positions.size(), " positions, there are ", sequences.size(),
                         " sequences");
    scratch_.logits_of.clear();
    for (std::size_t i = 0; i < rows; ++i) {
      const Index length = cache.length(sequences[i]);
      detail::require_that(plan.positions[i] == length, name, "row ", i, " begins at position ",
                           plan.positions[i], ", its sequence ", sequences[i], " holds ", length);
      if (plan.wants_token[i] == 0) continue;
      detail::require_that(plan.offsets[i] < plan.offsets[i + 1], name, "row ", i,
                           " wants a token and has none of its own");
      scratch_.logits_of.push_back(plan.offsets[i + 1] - 1);
    }
    step_into(logits, StepRows{plan.tokens, plan.offsets, scratch_.logits_of}, cache, sequences);
  }
  template <typename Storage>
  Tensor<float, 2> step(const StepPlan& plan, PagedKvCache<T, Storage>& cache,
                        std::span<const SequenceId> sequences) {
    Tensor<float, 2> logits;
    step_into(logits, plan, cache, sequences);
    return logits;
  }

  /// The step over a KvCache, whose batch is the rows, all of one length.
  template <typename Logits, typename Storage>
  void step_into(Logits&& logits, const StepRows& rows, KvCache<T, Storage>& cache) {
    run(logits, rows, detail::DenseRows<KvCache<T, Storage>>{cache});
  }

  /// Appends ids (batch, n) to sequences of equal length; positions start at cache.length(0), so
  /// that a prompt may come in chunks. Returns the logits (batch, vocabulary) after the last of
  /// them. Throws std::invalid_argument for an id outside the vocabulary or another batch.
  template <typename Ids, typename Storage>
  Tensor<float, 2> prefill(const Ids& ids, KvCache<T, Storage>& cache) {
    const auto view = input_view<2>(ids);
    const Index batch = view.dimension(0), n = view.dimension(1);
    detail::checked_size("Decoder::prefill", "ids", view);
    detail::require_that(n > 0, "Decoder::prefill", "ids has shape ", detail::shape_text(view),
                         ", expected at least one token a sequence");
    Tensor<float, 2> logits;
    run(logits, whole_rows({view.data(), static_cast<std::size_t>(view.size())}, batch, n),
        detail::DenseRows<KvCache<T, Storage>>{cache});
    return logits;
  }

  /// One token (batch) for each sequence of the cache -> logits (batch, vocabulary).
  template <typename Ids, typename Storage>
  Tensor<float, 2> decode(const Ids& ids, KvCache<T, Storage>& cache) {
    const auto view = input_view<1>(ids);
    return prefill(TensorView<const std::int32_t, 2>(view.data(), view.dimension(0), 1), cache);
  }

  /// Prompts, or chunks of them, of different lengths: ids (batch, longest), padded; the first
  /// lengths[b] of row b are appended to sequences[b] of the cache. Returns the logits (batch,
  /// vocabulary) after the last token of each. Throws what step throws.
  template <typename Ids, typename Storage>
  Tensor<float, 2> prefill(const Ids& ids, std::span<const Index> lengths,
                           PagedKvCache<T, Storage>& cache, std::span<const SequenceId> sequences) {
    const auto view = input_view<2>(ids);
    const Index batch = view.dimension(0), longest = view.dimension(1);
    constexpr auto name = "Decoder::prefill";
    detail::checked_size(name, "ids", view);
    detail::require_that(static_cast<Index>(lengths.size()) == batch, name, "ids has ", batch,
                         " rows, but there are ", lengths.size(), " lengths");
    scratch_.tokens.clear();
    scratch_.offsets.assign(1, 0);
    scratch_.logits_of.clear();
    for (Index b = 0; b < batch; ++b) {
      const Index length = lengths[static_cast<std::size_t>(b)];
      detail::require_that(length > 0 && length <= longest, name, "lengths[", b, "] is ", length,
                           ", expected 1 to ", longest);
      const std::int32_t* row = view.data() + b * longest;
      scratch_.tokens.insert(scratch_.tokens.end(), row, row + length);
      scratch_.offsets.push_back(scratch_.offsets.back() + length);
      scratch_.logits_of.push_back(scratch_.offsets.back() - 1);
    }
    return step(StepRows{scratch_.tokens, scratch_.offsets, scratch_.logits_of}, cache, sequences);
  }

  /// One token (batch) for each of the sequences, whatever their lengths -> logits (batch,
  /// vocabulary).
  template <typename Ids, typename Storage>
  Tensor<float, 2> decode(const Ids& ids, PagedKvCache<T, Storage>& cache,
                          std::span<const SequenceId> sequences) {
    const auto view = input_view<1>(ids);
    detail::checked_size("Decoder::decode", "ids", view);
    return step(whole_rows({view.data(), static_cast<std::size_t>(view.size())}, view.size(), 1),
                cache, sequences);
  }

 private:
  static const Eigen::DefaultDevice& default_device() {
    static const Eigen::DefaultDevice device;
    return device;
  }

  DecoderWeights& masters(std::string_view name) const {
    if (weights_ == nullptr) {
      std::string text(name);  // g++ 12 sees a sum of the two out of bounds
      text += ": there are no master weights";
      detail::fail<std::logic_error>(text);
    }
    return *weights_;
  }

  template <typename Compute>
  detail::DecoderPass<Compute, D> pass() {
    return {*device_, *weights_, std::get<detail::DecoderTape<Compute>>(tapes_), profile_};
  }

  void pack_if_stale() {
    if (packed_ == nullptr || (stale_ && weights_ != nullptr))
      pack(packed_ == nullptr ? WeightStorage{} : packed_->storage());
  }

  // `batch` rows of n tokens each, with the logits after the last of each.
  StepRows whole_rows(std::span<const std::int32_t> tokens, Index batch, Index n) {
    scratch_.offsets.clear();
    scratch_.logits_of.clear();
    for (Index b = 0; b <= batch; ++b) scratch_.offsets.push_back(b * n);
    for (Index b = 1; b <= batch; ++b) scratch_.logits_of.push_back(b * n - 1);
    return {tokens, scratch_.offsets, scratch_.logits_of};
  }

  template <typename Logits, typename Rows>
  void run(Logits& logits, const StepRows& step, const Rows& rows) {
    pack_if_stale();
    detail::InferenceStep<T, D, C, Rows>(*device_, *packed_, *communicator_, scratch_, rows,
                                         profile_)
        .run(logits, step);
  }

  DecoderConfig config_;
  std::shared_ptr<DecoderWeights> weights_;  // nullptr once released, or where there never were any
  const D* device_;
  std::optional<C> own_communicator_;
  C* communicator_;
  OperatorProfile* profile_ = nullptr;
  std::tuple<detail::DecoderTape<float>, detail::DecoderTape<double>, detail::DecoderTape<bfloat16>,
             detail::DecoderTape<half>>
      tapes_;
  std::shared_ptr<const PackedDecoderWeights<T>> packed_;
  bool stale_ = true;
  detail::InferenceScratch<T> scratch_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
