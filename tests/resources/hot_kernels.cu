// The kernels that a decoder lives in, in the scalars that it uses, by public calls: one line adds
// one. Compiled for each architecture and never run; tests/resources/check.sh reads what the
// compiler made of them.
#include <eigenformer/activation.h>
#include <eigenformer/attention.h>
#include <eigenformer/causal_mask.h>
#include <eigenformer/embedding.h>
#include <eigenformer/expert_feed_forward.h>
#include <eigenformer/expert_routing.h>
#include <eigenformer/kv_cache.h>
#include <eigenformer/linear.h>
#include <eigenformer/loss.h>
#include <eigenformer/normalization.h>
#include <eigenformer/optimizer.h>
#include <eigenformer/quantization.h>
#include <eigenformer/rope.h>
#include <eigenformer/sampling.h>

namespace ef = eigenformer;

namespace {

using T = ef::bfloat16;
template <typename S, int Rank>
using View = ef::TensorView<S, Rank>;

/// Tensors of nothing: shapes are what a kernel is told when it is run.
struct Views {
  View<T, 2> a{nullptr, 0, 0}, b = a, c = a;
  View<T, 3> heads{nullptr, 0, 0, 0};
  View<T, 4> q{nullptr, 0, 0, 0, 0}, k = q;
  View<float, 1> row{nullptr, 0};
  View<float, 2> sums{nullptr, 0, 0};
  View<std::int32_t, 1> ids{nullptr, 0};
  View<std::int8_t, 2> int8{nullptr, 0, 0};
  View<std::int32_t, 2> pairs{nullptr, 0, 0};
  std::vector<ef::Index> lengths;
};

/// Of one expert, and of all.
template <typename S>
struct Weights {
  ef::PackedGatedWeight<S> pair;
  ef::PackedWeight<S> down;
  std::vector<ef::PackedGatedWeight<S>> pairs;
  std::vector<ef::PackedWeight<S>> downs;
};

}  // namespace

void norms(const Eigen::GpuDevice& device, Views v) {
  ef::rms_norm_into(device, v.a, v.b, v.row);
  ef::add_rms_norm_into(device, v.a, v.b, v.c, v.row);
  ef::rms_norm_backward_into(device, v.a, v.row, v.b, v.c, v.row);
  ef::layer_norm_into(device, v.a, v.b, v.row, v.row);
}

void elementwise(const Eigen::GpuDevice& device, Views v) {
  ef::swiglu_into(device, v.a, v.b, v.c);
  ef::swiglu_backward_into(device, v.a, v.b, v.c, v.a, v.b);
  ef::residual_add_into(device, v.a, v.b, v.c);
  ef::rope_into(device, v.heads, v.heads, v.lengths);
  ef::embedding_into(device, v.a, v.ids, v.b);
  ef::embedding_backward_into(device, v.sums, v.a, v.ids);
  ef::causal_mask_into(device, v.heads);
}

void quantization(const Eigen::GpuDevice& device, Views v) {
  ef::quantize_weights_int8_per_channel_into(device, v.int8, v.row, v.a);
  ef::quantize_activations_int8_into(device, v.int8, v.row, v.a);
  ef::dequantize_into(device, v.a, v.int8, v.row);
}

void training(const Eigen::GpuDevice& device, Views v) {
  ef::cross_entropy_with_gradient_into(device, v.a, v.a, v.lengths, 1.0);
  const std::vector<ef::Parameter> parameters{{v.row, v.row}};
  ef::AdamW(parameters, {}, ef::memory_of(device)).step(device);
  ef::clip_gradient_norm(device, parameters, 1.0);
}

void attention(const Eigen::GpuDevice& device, Views v) {
  ef::KvCache<T> cache(ef::memory_of(device));
  ef::KvCache<T, std::int8_t> int8_cache(ef::memory_of(device));
  ef::update_kv_cache(device, cache, v.k, v.k, 0);
  ef::update_kv_cache(device, int8_cache, v.k, v.k, 0);
  ef::batched_attention_with_padding_into(device, v.q, v.q, v.k, v.k, v.lengths);
  ef::attention_with_kv_cache_into(device, v.q, v.q, cache, 0);
}

void sampling(const Eigen::GpuDevice& device, Views v) {
  ef::Philox random;
  ef::greedy_sample_into(device, v.ids, v.a);
  ef::top_k_sample_into(device, v.ids, v.a, 50, 1.0, random);
  ef::sample_into(device, v.ids, v.a, ef::SamplingParams{.top_p = 0.9f}, random);
}

void linear(const Eigen::GpuDevice& device, Views v) {
  const auto packed = ef::pack_weight<T>(device, v.a);
  const auto int8 = ef::pack_weight<std::int8_t>(device, v.a);
  ef::linear_into(device, v.a, v.b, packed);
  ef::linear_into(device, v.a, v.b, int8);
  ef::linear_backward_input_into(device, v.a, v.b, v.c);
  ef::linear_backward_weight_into(device, v.sums, v.b, v.c);
}

template <typename S>
void feed_forward(const Eigen::GpuDevice& device, Views v, const Weights<S>& w) {
  ef::gated_linear_into(device, v.a, v.b, w.pair, ef::Epilogue{}.silu());
  ef::linear_into(device, v.a, v.b, w.down);
  ef::expert_feed_forward_into(device, v.a, v.b, v.pairs, v.sums, w.pairs, w.downs,
                               ef::Epilogue{}.silu());
}
void feed_forwards(const Eigen::GpuDevice& device, Views v, const Weights<T>& as_it_is,
                   const Weights<std::int8_t>& int8, const Weights<ef::int4>& int4) {
  feed_forward(device, v, as_it_is);
  feed_forward(device, v, int8);
  feed_forward(device, v, int4);
  ef::expert_routing_into(device, v.pairs, v.sums, v.a, v.row);
}
