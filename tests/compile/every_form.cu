// Every form with a destination, and all that owns memory, takes a GpuDevice: nothing but the
// kernels decides what runs on a GPU. A kernel for whatever problem stands in for those that are
// not written; this compiles and is never run.
#include <eigenformer/core/dispatch.h>

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// What a kernel returns, whatever that is.
struct Anything {
  template <typename T>
  operator T() const {
    return T{};
  }
};

template <typename D, typename Problem>
Anything execute(const Backend<D>&, const Problem&) {
  return {};
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include <eigenformer/activation.h>
#include <eigenformer/attention.h>
#include <eigenformer/beam_search.h>
#include <eigenformer/embedding.h>
#include <eigenformer/expert_feed_forward.h>
#include <eigenformer/expert_routing.h>
#include <eigenformer/grad_scaler.h>
#include <eigenformer/log_softmax.h>
#include <eigenformer/loss.h>
#include <eigenformer/normalization.h>
#include <eigenformer/optimizer.h>
#include <eigenformer/paged_kv_cache.h>
#include <eigenformer/quantization.h>
#include <eigenformer/rope.h>
#include <eigenformer/sampling.h>
#include <eigenformer/tensor_parallel.h>
#include <eigenformer/top_k.h>

namespace ef = eigenformer;
using ef::Index;

namespace {

/// A stage of sampling.
struct HalvedLogit {
  __host__ __device__ float operator()(Index, Index, float logit) const { return logit / 2; }
};

/// One rank that moves the memory of a GPU.
struct GpuRank : ef::SelfCommunicator {
  template <ef::Device D>
  static constexpr bool kReaches = true;
};

template <typename T, int Rank>
using View = ef::TensorView<T, Rank>;

struct Views {
  View<float, 1> v1{nullptr, 0};
  View<float, 2> v2{nullptr, 0, 0};
  View<float, 3> v3{nullptr, 0, 0, 0};
  View<float, 4> v4{nullptr, 0, 0, 0, 0};
  View<std::int32_t, 1> ids{nullptr, 0};
  View<std::int32_t, 2> tokens{nullptr, 0, 0};
  View<std::int8_t, 2> q{nullptr, 0, 0};
  std::vector<Index> lengths;
};

template <typename D>
void elementwise(const D& device, Views v) {
  ef::silu_into(device, v.v2, v.v2);
  ef::softcap_into(device, v.v2, v.v2, {.cap = 30.0f});
  ef::silu_backward_into(device, v.v2, v.v2, v.v2);
  ef::swiglu_into(device, v.v2, v.v2, v.v2);
  ef::swiglu_backward_into(device, v.v2, v.v2, v.v2, v.v2, v.v2);
  ef::residual_add_into(device, v.v2, v.v2, v.v2);
  ef::rms_norm_into(device, v.v2, v.v2, v.v1);
  ef::add_rms_norm_into(device, v.v2, v.v2, v.v2, v.v1);
  ef::rms_norm_backward_into(device, v.v2, v.v1, v.v2, v.v2, v.v1);
  ef::layer_norm_into(device, v.v2, v.v2, v.v1, v.v1);
  ef::layer_norm_backward_into(device, v.v2, v.v1, v.v1, v.v2, v.v2, v.v1);
  ef::rope_into(device, v.v3, v.v3, v.lengths);
  ef::embedding_into(device, v.v2, v.ids, v.v2);
  ef::embedding_into(device, v.v2, v.ids, v.q, v.v1);
  ef::embedding_backward_into(device, v.v2, v.v2, v.ids);
  ef::clamped_swiglu_into(device, v.v2, v.v2);
  ef::expert_routing_into(device, v.tokens, v.v2, v.v2);
  ef::expert_routing_into(device, v.tokens, v.v2, v.v2, v.v1);
  ef::expert_order_into(device, v.ids, v.ids, v.tokens, v.tokens);
  const std::vector<ef::PackedGatedWeight<float>> gates;
  const std::vector<ef::PackedWeight<std::int8_t>> downs;
  ef::expert_feed_forward_into(device, v.v2, v.v2, v.tokens, v.v2, gates, downs,
                               ef::Epilogue{}.silu());
  ef::combine_experts_into(device, v.v2, v.v2, v.tokens, v.v2, v.v2);
  ef::combine_experts_into(device, v.v2, v.v2, v.tokens, v.v2, v.v2, v.v1);
  ef::cross_entropy(device, v.v2, v.lengths);
  ef::cross_entropy_with_gradient_into(device, v.v2, v.v2, v.lengths, 1.0);
}

template <typename D>
void linear(const D& device, Views v) {
  auto packed = ef::pack_weight<float>(device, v.v2);
  auto int8 = ef::pack_weight<std::int8_t>(device, v.v2, {.group_size = 32});
  int8 = ef::pack_weight(device, v.q, v.v1);
  auto gated = ef::pack_gated_weight<std::int8_t>(device, v.v2, v.v2);
  auto stacked = ef::pack_stacked_weight<float>(device, std::vector<View<const float, 2>>{});
  ef::linear_into(device, v.v2, v.v2, v.v2, v.v1);
  ef::linear_into(device, v.v2, v.v2, packed, v.v1);
  ef::linear_into(device, v.v2, v.v2, int8, ef::Epilogue{}.gelu().residual(v.v2));
  ef::gated_linear_into(device, v.v2, v.v2, gated, ef::Epilogue{}.silu());
  ef::linear_backward_input_into(device, v.v2, v.v2, v.v2);
  ef::linear_backward_weight_into(device, v.v2, v.v2, v.v2);
  ef::linear_backward_bias_into(device, v.v1, v.v2);
  float scale = 1;
  ef::quantize_weights_int8_into(device, v.q, scale, v.v2);
  ef::quantize_weights_int8_per_channel_into(device, v.q, v.v1, v.v2);
  ef::quantize_weights_int8_grouped_into(device, v.q, v.v2, v.v2, 32);
  ef::quantize_activations_int8_into(device, v.q, v.v1, v.v2);
  ef::dequantize_into(device, v.v2, v.q, scale);
  ef::dequantize_into(device, v.v2, v.q, v.v1);
  ef::dequantize_grouped_into(device, v.v2, v.q, v.v2, 32);
  ef::int8_linear_into(device, v.v2, v.v2, v.q, v.v1);

  GpuRank rank;
  const auto shard = ef::pack_column_shard<float>(device, v.v2, rank);
  const auto gate_up = ef::pack_gated_column_shard<float>(device, v.v2, v.v2, rank);
  ef::column_parallel_linear_into(device, v.v2, v.v2, shard, rank, v.v1);
  ef::column_parallel_gated_linear_into(device, v.v2, v.v2, gate_up, rank, ef::Epilogue{}.silu());
  ef::row_parallel_linear_into(device, v.v2, v.v2, v.v2, rank);
  ef::vocabulary_parallel_greedy_into(device, v.ids, v.v2, shard, rank);
  ef::Philox random;
  ef::vocabulary_parallel_sample_into(device, v.ids, v.v2, v.v2, rank,
                                      ef::SamplingParams{.top_k = 3}, ef::Philox{1});
  ef::vocabulary_parallel_top_k_sample_into(device, v.ids, v.v2, v.v2, rank, 3, 1.0f, random);
  ef::vocabulary_parallel_sample_with_log_probabilities_into(
      device, ef::SampleViews{v.ids, v.v1, v.v1, v.ids, v.tokens, v.v2, v.v2, {}}, v.v2, v.v2, rank,
      ef::SamplingParams{}, random);
  ef::vocabulary_parallel_log_probabilities_of_into(device, v.v1, v.v2, v.v2, rank,
                                                    std::vector<std::int32_t>{});
  ef::vocabulary_parallel_sampling_probabilities_into(device, v.v2, v.v2, v.v2, rank,
                                                      ef::SamplingParams{});
  ef::vocabulary_parallel_top_k_into(device, v.v2, v.tokens, v.v2, 1, rank);
  ef::vocabulary_parallel_log_softmax_into(device, v.v2, v.v2, 1, rank);
  ef::SpeculativeResult chains;
  ef::SpeculativeTreeResult trees;
  const ef::Tensor<std::int32_t, 2> drafts(0, 0);
  const ef::Tensor<std::int32_t, 1> parents(0);
  ef::vocabulary_parallel_verify_speculative_into(device, chains, drafts, v.v3, v.v3, 1, rank,
                                                  random);
  ef::vocabulary_parallel_verify_speculative_tree_into(device, trees, drafts, parents, v.v3, v.v3,
                                                       1, rank, random);
  ef::vocabulary_parallel_verify_speculative_tree_into(device, trees, drafts, parents, v.v3, 1,
                                                       rank, random);
  const HalvedLogit halved;
  const std::span<ef::SampleStatus> none;
  auto& workspace = ef::thread_workspace();
  ef::vocabulary_parallel_sample_into(device, v.ids, v.v2, v.v2, rank, ef::SamplingParams{}, random,
                                      none, workspace, halved);
  ef::vocabulary_parallel_sampling_probabilities_into(
      device, v.v2, v.v2, v.v2, rank, ef::SamplingParams{}, none, workspace, halved);
  ef::vocabulary_parallel_sample_with_log_probabilities_into(
      device, ef::SampleViews{v.ids, v.v1, v.v1, v.ids, v.tokens, v.v2, v.v2, {}}, v.v2, v.v2, rank,
      ef::SamplingParams{}, random, workspace, halved);
  ef::vocabulary_parallel_log_probabilities_of_into(device, v.v1, v.v2, v.v2, rank,
                                                    std::vector<std::int32_t>{},
                                                    ef::SamplingParams{}, none, workspace, halved);
  ef::BeamSearch search(1);
  ef::vocabulary_parallel_beam_search_step(device, search, v.v2, 1, rank);
}

template <typename D>
void attention(const D& device, Views v) {
  ef::KvCache<float, std::int8_t> cache(ef::memory_of(device));
  ef::PagedKvCache<float, std::int8_t> paged({}, ef::memory_of(device));
  ef::update_kv_cache(device, cache, v.v4, v.v4, 0);
  ef::update_kv_cache(device, paged, v.v4, v.v4, 0);
  paged.append(device, 0, 0, v.v3, v.v3);
  paged.append(device, std::span<const ef::SequenceId>{}, std::span<const Index>{}, 0, v.v3, v.v3);
  ef::append_kv_into(device, v.v4, v.v4, v.v4, v.v4, {});
  ef::batched_attention_with_padding_into(device, v.v4, v.v4, v.v4, v.v4, v.lengths);
  ef::variable_length_attention_into(device, v.v3, v.v3, v.v3, v.v3, v.lengths, v.lengths);
  ef::attention_with_kv_cache_into(device, v.v4, v.v4, cache, 0);
  ef::merge_attention_states_into(device, v.v4, v.v3, v.v4, v.v3, v.v4, v.v3);
  ef::attention_scores_into(device, v.v4, v.v4, v.v4, v.lengths, ef::AttentionScoreStage::masked);
}

template <typename D>
void sampling(const D& device, Views v) {
  ef::Philox random;
  ef::greedy_sample_into(device, v.ids, v.v2);
  ef::top_k_sample_into(device, v.ids, v.v2, 3, 1.0, random);
  ef::sample_into(device, v.ids, v.v2, ef::SamplingParams{}, random);
  ef::sampling_probabilities_into(device, v.v2, v.v2, ef::SamplingParams{});
  ef::Workspace& workspace = ef::thread_workspace();
  ef::sample_into(device, v.ids, v.v2, ef::SamplingParams{}, random, {}, workspace, HalvedLogit{});
  ef::sampling_probabilities_into(device, v.v2, v.v2, ef::SamplingParams{}, {}, workspace,
                                  HalvedLogit{});
  ef::log_probabilities_of_into(device, v.v1, v.v2, v.ids, ef::SamplingParams{}, {}, workspace,
                                HalvedLogit{});
  ef::sample_with_log_probabilities_into(
      device, ef::SampleViews{v.ids, v.v1, v.v1, v.ids, v.tokens, v.v2, v.v2, {}}, v.v2,
      ef::SamplingParams{}, random, workspace, HalvedLogit{});
  ef::log_probabilities_of_into(device, v.v1, v.v2, v.ids);
  ef::sample_with_log_probabilities_into(
      device, ef::SampleViews{v.ids, v.v1, v.v1, v.ids, v.tokens, v.v2, v.v2, {}}, v.v2,
      ef::SamplingParams{}, random);
  ef::log_softmax_into(device, v.v2, v.v2);
  ef::top_k_into(device, v.v2, v.tokens, v.v2);
  ef::BeamSearch(1).step(device, v.v2);
  ef::verify_speculative_tree_into(device, ef::SpeculativeTreeViews{v.ids, v.tokens, v.tokens, {}},
                                   v.tokens, v.ids, v.v3, v.v3, random);
  ef::verify_speculative_into(device, ef::SpeculativeViews{v.ids, v.tokens, {}}, v.tokens, v.v3,
                              v.v3, random);
}

template <typename D>
void training(const D& device, Views v) {
  const std::vector<ef::Parameter> parameters{{v.v1, v.v1}};
  ef::AdamW adamw(parameters, {}, ef::memory_of(device));
  ef::Sgd sgd(parameters, {.momentum = 0.9}, ef::memory_of(device));
  ef::GradScaler scaler;
  scaler.unscale(device, adamw);
  scaler.step(device, adamw);
  sgd.step(device);
  sgd.zero_grad(device);
  ef::clip_gradient_norm(device, parameters, 1.0);
  ef::all_finite(device, parameters);
}

}  // namespace

void every_form(const Eigen::GpuDevice& device) {
  elementwise(device, {});
  linear(device, {});
  attention(device, {});
  sampling(device, {});
  training(device, {});
}
