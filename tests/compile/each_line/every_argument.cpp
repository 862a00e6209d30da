// Every tensor argument of every operator, given as an unevaluated expression, and what else is
// refused at compile time: each line below must be, and the first error of each must be one of our
// messages, or hold what the line expects (each_line.sh looks).
#include <eigenformer/eigenformer.h>

namespace ef = eigenformer;

template <int>
struct Same {
  template <typename T>
  T operator()(const T& x) const {
    return x;
  }
};

// Of another type on each line, since a static assertion speaks once for each type.
template <int Line, typename X>
auto expression(const X& x) {
  return x.unaryExpr(Same<Line>{});
}
#define E(x) expression<__LINE__>(x)

// clang-format off
void refused() {
  Eigen::DefaultDevice dev;
  auto rng = ef::Philox{1};
  auto cache = ef::KvCache<float>{};
  auto comm = ef::SelfCommunicator{};
  std::vector<ef::Index> off{0, 1}, pos64{0};
  std::vector<int> pos{0};
  float scale = 0;
  auto pw = ef::PackedWeight<float>{};
  auto gw = ef::PackedGatedWeight<float>{};
  ef::Tensor<float, 2> m, w, lg, lse2;
  ef::Tensor<float, 1> b, s;
  ef::Tensor<float, 3> t3, q3, p3, lse3;
  ef::Tensor<float, 4> t4;
  ef::Tensor<float, 5> qkv;
  ef::Tensor<std::int8_t, 2> q;
  ef::Tensor<std::int32_t, 1> ids1, idsn;
  ef::Tensor<std::int32_t, 2> draft;
  ef::SamplesWithLogProbabilities logged;
  ef::SpeculativeResult verified;
  ef::SpeculativeTreeResult tree;
  ef::BeamSearch search(1);
  ef::greedy_sample(E(lg));  // expect: this argument is neither an ef::Tensor nor an ef::TensorView. Evaluate an Eigen expression into an
  ef::greedy_sample(dev, E(lg));
  ef::top_k_sample(E(lg), 2, 1.0, rng);
  ef::top_p_sample(E(lg), .9, 1.0, rng);
  ef::sample(E(lg), ef::SamplingParams{}, rng);
  ef::sampling_probabilities(E(lg), ef::SamplingParams{});
  ef::sampling_probabilities_into(dev, E(lg), lg, ef::SamplingParams{});
  ef::sampling_probabilities_into(dev, lg, E(lg), ef::SamplingParams{});
  ef::sample_with_log_probabilities(E(lg), ef::SamplingParams{}, rng);
  ef::sample_with_log_probabilities_into(dev, logged, E(lg), ef::SamplingParams{}, rng);
  ef::log_probabilities_of(E(lg), ids1);
  ef::log_probabilities_of(lg, E(ids1));
  ef::log_probabilities_of(dev, E(lg), ids1, ef::SamplingParams{});
  ef::log_probabilities_of_into(dev, E(b), lg, ids1);
  ef::log_probabilities_of_into(dev, b, E(lg), ids1);
  ef::log_probabilities_of_into(dev, b, lg, E(ids1));
  ef::verify_speculative(E(draft), q3, p3, rng);
  ef::verify_speculative(draft, E(q3), p3, rng);
  ef::verify_speculative(draft, q3, E(p3), rng);
  ef::verify_speculative_into(dev, verified, E(draft), q3, p3, rng);
  ef::verify_speculative_into(dev, verified, draft, E(q3), p3, rng);
  ef::verify_speculative_into(dev, verified, draft, q3, E(p3), rng);
  ef::sample_into(dev, E(ids1), lg, ef::SamplingParams{}, rng);
  ef::sample_into(dev, ids1, E(lg), ef::SamplingParams{}, rng);
  ef::linear(E(m), w, b);
  ef::linear(m, E(w), b);
  ef::linear(m, w, E(b));
  ef::linear(E(m), w, ef::Epilogue{}.bias(b));
  ef::linear(m, E(w), ef::Epilogue{}.bias(b));
  ef::linear(E(m), w, ef::Epilogue{}.residual(m));
  ef::linear(m, E(w), ef::Epilogue{}.residual(m));
  ef::linear_into(dev, E(m), m, w, b);
  ef::linear_into(dev, m, E(m), w, b);
  ef::linear_into(dev, m, m, E(w), b);
  ef::linear_into(dev, m, m, w, E(b));
  ef::linear_into(dev, E(m), m, w);
  ef::linear_into(dev, m, E(m), w);
  ef::linear_into(dev, m, m, E(w));
  ef::linear(E(m), pw, b);
  ef::linear(m, pw, E(b));
  ef::linear(dev, E(m), w);
  ef::linear(dev, m, E(w));
  ef::gated_linear_into(dev, E(m), m, gw, ef::Epilogue{});
  ef::gated_linear_into(dev, m, E(m), gw, ef::Epilogue{});
  ef::gated_linear_into(dev, E(m), m, w, w, ef::Epilogue{});
  ef::gated_linear_into(dev, m, E(m), w, w, ef::Epilogue{});
  ef::gated_linear_into(dev, m, m, E(w), w, ef::Epilogue{});
  ef::gated_linear_into(dev, m, m, w, E(w), ef::Epilogue{});
  ef::linear_backward_input_into(dev, E(m), m, w);
  ef::linear_backward_input_into(dev, m, E(m), w);
  ef::linear_backward_input_into(dev, m, m, E(w));
  ef::linear_backward_weight_into(dev, E(w), m, m);
  ef::linear_backward_weight_into(dev, w, E(m), m);
  ef::linear_backward_weight_into(dev, w, m, E(m));
  ef::linear_backward_bias_into(dev, E(b), m);
  ef::linear_backward_bias_into(dev, b, E(m));
  ef::int8_linear(E(m), q, s);
  ef::int8_linear(m, E(q), s);
  ef::int8_linear(m, q, E(s));
  ef::int8_linear(E(m), q, s, b);
  ef::int8_linear(m, E(q), s, b);
  ef::int8_linear(m, q, E(s), b);
  ef::int8_linear(m, q, s, E(b));
  ef::int8_linear_into(dev, E(m), m, q, s, b);
  ef::int8_linear_into(dev, m, E(m), q, s, b);
  ef::int8_linear_into(dev, m, m, E(q), s, b);
  ef::int8_linear_into(dev, m, m, q, E(s), b);
  ef::int8_linear_into(dev, m, m, q, s, E(b));
  ef::quantize_weights_int8(E(w));
  ef::quantize_weights_int8_per_channel(E(w));
  ef::dequantize(E(q), s);
  ef::dequantize(q, E(s));
  ef::dequantize(E(q), 0.5f);
  ef::dequantize_grouped(E(q), w, 32);
  ef::dequantize_grouped(q, E(w), 32);
  ef::dequantize_into(dev, E(w), q, s);
  ef::dequantize_into(dev, w, E(q), s);
  ef::dequantize_into(dev, w, q, E(s));
  ef::quantize_weights_int8_grouped(E(w), 32);
  ef::quantize_weights_int8_into(dev, E(q), scale, w);
  ef::quantize_weights_int8_into(dev, q, scale, E(w));
  ef::quantize_weights_int8_per_channel_into(dev, E(q), s, w);
  ef::quantize_weights_int8_per_channel_into(dev, q, E(s), w);
  ef::quantize_weights_int8_per_channel_into(dev, q, s, E(w));
  ef::quantize_activations_int8_into(dev, E(q), s, m);
  ef::quantize_activations_int8_into(dev, q, E(s), m);
  ef::quantize_activations_int8_into(dev, q, s, E(m));
  ef::pack_weight<float>(E(w));
  ef::pack_weight<std::int8_t>(E(q), s);
  ef::pack_weight<std::int8_t>(q, E(s));
  ef::batched_attention_with_padding(qkv.chip(0, 2), t4, t4, pos);  // expect: Heads within a wider tensor (a chip of one) are ef::heads_of(
  ef::batched_attention_with_padding(E(t4), t4, t4, {3});
  ef::batched_attention_with_padding(t4, E(t4), t4, {3});
  ef::batched_attention_with_padding(t4, t4, E(t4), {3});
  ef::batched_attention_with_padding(E(t3), t3, t3, {3});
  ef::batched_attention_with_padding(t3, E(t3), t3, {3});
  ef::batched_attention_with_padding(t3, t3, E(t3), {3});
  ef::batched_attention_with_padding(dev, E(t4), t4, t4, {3});
  ef::batched_attention_with_padding(dev, t4, E(t4), t4, {3});
  ef::batched_attention_with_padding(dev, t4, t4, E(t4), {3});
  ef::batched_attention_with_padding_into(dev, E(t4), t4, t4, t4, {3});
  ef::batched_attention_with_padding_into(dev, t4, E(t4), t4, t4, {3});
  ef::batched_attention_with_padding_into(dev, t4, t4, E(t4), t4, {3});
  ef::batched_attention_with_padding_into(dev, t4, t4, t4, E(t4), {3});
  ef::variable_length_attention(E(t3), t3, t3, off, off);
  ef::variable_length_attention(t3, E(t3), t3, off, off);
  ef::variable_length_attention(t3, t3, E(t3), off, off);
  ef::variable_length_attention_into(dev, E(t3), t3, t3, t3, off, off);
  ef::variable_length_attention_into(dev, t3, E(t3), t3, t3, off, off);
  ef::variable_length_attention_into(dev, t3, t3, E(t3), t3, off, off);
  ef::variable_length_attention_into(dev, t3, t3, t3, E(t3), off, off);
  ef::attention_with_kv_cache(E(t4), cache, 0);
  ef::attention_with_kv_cache_into(dev, E(t4), t4, cache, 0);
  ef::attention_with_kv_cache_into(dev, t4, E(t4), cache, 0);
  ef::attention_backward(E(t4), t4, t4, t4, t4, lse3, {3});
  ef::attention_backward(t4, E(t4), t4, t4, t4, lse3, {3});
  ef::attention_backward(t4, t4, E(t4), t4, t4, lse3, {3});
  ef::attention_backward(t4, t4, t4, E(t4), t4, lse3, {3});
  ef::attention_backward(t4, t4, t4, t4, E(t4), lse3, {3});
  ef::attention_backward(t4, t4, t4, t4, t4, E(lse3), {3});
  ef::attention_backward_into(dev, E(t4), t4, t4, t4, t4, t4, t4, t4, lse3, {3});
  ef::attention_backward_into(dev, t4, E(t4), t4, t4, t4, t4, t4, t4, lse3, {3});
  ef::attention_backward_into(dev, t4, t4, E(t4), t4, t4, t4, t4, t4, lse3, {3});
  ef::attention_backward_into(dev, t4, t4, t4, E(t4), t4, t4, t4, t4, lse3, {3});
  ef::attention_backward_into(dev, t4, t4, t4, t4, E(t4), t4, t4, t4, lse3, {3});
  ef::attention_backward_into(dev, t4, t4, t4, t4, t4, E(t4), t4, t4, lse3, {3});
  ef::attention_backward_into(dev, t4, t4, t4, t4, t4, t4, E(t4), t4, lse3, {3});
  ef::attention_backward_into(dev, t4, t4, t4, t4, t4, t4, t4, E(t4), lse3, {3});
  ef::attention_backward_into(dev, t4, t4, t4, t4, t4, t4, t4, t4, E(lse3), {3});
  ef::variable_length_attention_backward(dev, E(t3), t3, t3, t3, t3, lse2, off, off);
  ef::variable_length_attention_backward(dev, t3, E(t3), t3, t3, t3, lse2, off, off);
  ef::variable_length_attention_backward(dev, t3, t3, E(t3), t3, t3, lse2, off, off);
  ef::variable_length_attention_backward(dev, t3, t3, t3, E(t3), t3, lse2, off, off);
  ef::variable_length_attention_backward(dev, t3, t3, t3, t3, E(t3), lse2, off, off);
  ef::variable_length_attention_backward(dev, t3, t3, t3, t3, t3, E(lse2), off, off);
  ef::rms_norm(E(m), b);
  ef::rms_norm(m, E(b));
  ef::layer_norm(E(m), b, b);
  ef::layer_norm(m, E(b), b);
  ef::layer_norm(m, b, E(b));
  ef::rms_norm_into(dev, E(m), m, b);
  ef::rms_norm_into(dev, m, E(m), b);
  ef::rms_norm_into(dev, m, m, E(b));
  ef::layer_norm_into(dev, E(m), m, b, b);
  ef::layer_norm_into(dev, m, E(m), b, b);
  ef::layer_norm_into(dev, m, m, E(b), b);
  ef::layer_norm_into(dev, m, m, b, E(b));
  ef::add_rms_norm_into(dev, E(m), m, m, b);
  ef::add_rms_norm_into(dev, m, E(m), m, b);
  ef::add_rms_norm_into(dev, m, m, E(m), b);
  ef::add_rms_norm_into(dev, m, m, m, E(b));
  ef::rms_norm_backward_into(dev, E(m), b, m, m, b);
  ef::rms_norm_backward_into(dev, m, E(b), m, m, b);
  ef::rms_norm_backward_into(dev, m, b, E(m), m, b);
  ef::rms_norm_backward_into(dev, m, b, m, E(m), b);
  ef::rms_norm_backward_into(dev, m, b, m, m, E(b));
  ef::layer_norm_backward_into(dev, E(m), b, b, m, m, b);
  ef::layer_norm_backward_into(dev, m, E(b), b, m, m, b);
  ef::layer_norm_backward_into(dev, m, b, E(b), m, m, b);
  ef::layer_norm_backward_into(dev, m, b, b, E(m), m, b);
  ef::layer_norm_backward_into(dev, m, b, b, m, E(m), b);
  ef::layer_norm_backward_into(dev, m, b, b, m, m, E(b));
  ef::rope(E(t4), pos);
  ef::rope_into(dev, E(t4), t4, pos);
  ef::rope_into(dev, t4, E(t4), pos);
  ef::rope_backward_into(dev, E(t4), t4, pos);
  ef::rope_backward_into(dev, t4, E(t4), pos);
  ef::silu(E(m));
  ef::gelu(E(m));
  ef::relu(E(m));
  ef::silu_into(dev, E(m), m);
  ef::silu_into(dev, m, E(m));
  ef::swiglu(E(m), m);
  ef::swiglu(m, E(m));
  ef::swiglu(E(m));
  ef::geglu(E(m), m);
  ef::geglu(m, E(m));
  ef::silu_backward_into(dev, E(m), m, m);
  ef::silu_backward_into(dev, m, E(m), m);
  ef::silu_backward_into(dev, m, m, E(m));
  ef::gelu_backward_into(dev, E(m), m, m);
  ef::gelu_backward_into(dev, m, E(m), m);
  ef::gelu_backward_into(dev, m, m, E(m));
  ef::swiglu_backward_into(dev, E(m), m, m, m, m);
  ef::swiglu_backward_into(dev, m, E(m), m, m, m);
  ef::swiglu_backward_into(dev, m, m, E(m), m, m);
  ef::swiglu_backward_into(dev, m, m, m, E(m), m);
  ef::swiglu_backward_into(dev, m, m, m, m, E(m));
  ef::residual_add(E(m), m);
  ef::residual_add(m, E(m));
  ef::residual_add_into(dev, E(m), m, m);
  ef::residual_add_into(dev, m, E(m), m);
  ef::residual_add_into(dev, m, m, E(m));
  ef::embedding(E(idsn), w);
  ef::embedding(idsn, E(w));
  ef::embedding_into(dev, E(m), idsn, w);
  ef::embedding_into(dev, m, E(idsn), w);
  ef::embedding_into(dev, m, idsn, E(w));
  ef::embedding_backward_into(dev, E(w), m, idsn);
  ef::embedding_backward_into(dev, w, E(m), idsn);
  ef::embedding_backward_into(dev, w, m, E(idsn));
  ef::cross_entropy(E(lg), ids1);
  ef::cross_entropy(lg, E(ids1));
  ef::cross_entropy(dev, E(lg), ids1);
  ef::cross_entropy(dev, lg, E(ids1));
  ef::cross_entropy_with_gradient_into(dev, E(lg), lg, ids1, 1.0);
  ef::cross_entropy_with_gradient_into(dev, lg, E(lg), ids1, 1.0);
  ef::cross_entropy_with_gradient_into(dev, lg, lg, E(ids1), 1.0);
  ef::update_kv_cache(cache, E(t4), t4, 0);
  ef::update_kv_cache(cache, t4, E(t4), 0);
  ef::append_kv_into(dev, E(t4), t4, t4, t4, pos64);
  ef::append_kv_into(dev, t4, E(t4), t4, t4, pos64);
  ef::append_kv_into(dev, t4, t4, E(t4), t4, pos64);
  ef::append_kv_into(dev, t4, t4, t4, E(t4), pos64);
  ef::column_parallel_linear(E(t3), w, comm, b);
  ef::column_parallel_linear(t3, E(w), comm, b);
  ef::column_parallel_linear(t3, w, comm, E(b));
  ef::row_parallel_linear(E(t3), w, comm, b);
  ef::row_parallel_linear(t3, E(w), comm, b);
  ef::row_parallel_linear(t3, w, comm, E(b));
  ef::column_parallel_linear_into(dev, E(t3), t3, w, comm, b);
  ef::column_parallel_linear_into(dev, t3, E(t3), w, comm, b);
  ef::column_parallel_linear_into(dev, t3, t3, E(w), comm, b);
  ef::column_parallel_linear_into(dev, t3, t3, w, comm, E(b));
  ef::column_shard(E(w), 0, 1);
  ef::vocabulary_parallel_greedy(E(m), w, comm);
  ef::vocabulary_parallel_greedy(m, E(w), comm);
  ef::vocabulary_parallel_top_k_sample(E(m), w, comm, 2, 1.f, rng);
  ef::vocabulary_parallel_top_k_sample(m, E(w), comm, 2, 1.f, rng);
  ef::vocabulary_parallel_top_k_sample_into(dev, E(ids1), m, w, comm, 2, 1.f, rng);
  ef::vocabulary_parallel_top_k_sample_into(dev, ids1, E(m), w, comm, 2, 1.f, rng);
  ef::vocabulary_parallel_top_k_sample_into(dev, ids1, m, E(w), comm, 2, 1.f, rng);
  ef::vocabulary_parallel_greedy_into(dev, E(ids1), m, w, comm);
  ef::vocabulary_parallel_greedy_into(dev, ids1, E(m), w, comm);
  ef::vocabulary_parallel_greedy_into(dev, ids1, m, E(w), comm);
  ef::vocabulary_parallel_sample(E(m), w, comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_sample(m, E(w), comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_sample_into(dev, E(ids1), m, w, comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_sample_into(dev, ids1, E(m), w, comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_sample_into(dev, ids1, m, E(w), comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_sample_with_log_probabilities(E(m), w, comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_sample_with_log_probabilities(m, E(w), comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_sample_with_log_probabilities_into(dev, logged, E(m), w, comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_sample_with_log_probabilities_into(dev, logged, m, E(w), comm, ef::SamplingParams{}, rng);
  ef::vocabulary_parallel_log_probabilities_of(E(m), w, comm, ids1);
  ef::vocabulary_parallel_log_probabilities_of(m, E(w), comm, ids1);
  ef::vocabulary_parallel_log_probabilities_of(m, w, comm, E(ids1));
  ef::vocabulary_parallel_log_probabilities_of_into(dev, E(b), m, w, comm, ids1);
  ef::vocabulary_parallel_log_probabilities_of_into(dev, b, E(m), w, comm, ids1);
  ef::vocabulary_parallel_log_probabilities_of_into(dev, b, m, E(w), comm, ids1);
  ef::vocabulary_parallel_log_probabilities_of_into(dev, b, m, w, comm, E(ids1));
  ef::vocabulary_parallel_sampling_probabilities(E(m), w, comm, ef::SamplingParams{});
  ef::vocabulary_parallel_sampling_probabilities(m, E(w), comm, ef::SamplingParams{});
  ef::vocabulary_parallel_sampling_probabilities_into(dev, E(lg), m, w, comm, ef::SamplingParams{});
  ef::vocabulary_parallel_sampling_probabilities_into(dev, lg, E(m), w, comm, ef::SamplingParams{});
  ef::vocabulary_parallel_sampling_probabilities_into(dev, lg, m, E(w), comm, ef::SamplingParams{});
  ef::vocabulary_parallel_verify_speculative(E(draft), q3, p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative(draft, E(q3), p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative(draft, q3, E(p3), 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_into(dev, verified, E(draft), q3, p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_into(dev, verified, draft, E(q3), p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_into(dev, verified, draft, q3, E(p3), 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree(E(draft), ids1, q3, p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree(draft, E(ids1), q3, p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree(draft, ids1, E(q3), p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree(draft, ids1, q3, E(p3), 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree(draft, ids1, E(p3), 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree_into(dev, tree, E(draft), ids1, q3, p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree_into(dev, tree, draft, E(ids1), q3, p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree_into(dev, tree, draft, ids1, E(q3), p3, 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree_into(dev, tree, draft, ids1, q3, E(p3), 9, comm, rng);
  ef::vocabulary_parallel_verify_speculative_tree_into(dev, tree, draft, ids1, E(p3), 9, comm, rng);
  ef::vocabulary_parallel_top_k(E(lg), 2, 9, comm);
  ef::vocabulary_parallel_top_k_into(dev, E(lg), draft, lg, 9, comm);
  ef::vocabulary_parallel_top_k_into(dev, lg, E(draft), lg, 9, comm);
  ef::vocabulary_parallel_top_k_into(dev, lg, draft, E(lg), 9, comm);
  ef::vocabulary_parallel_beam_search_step(dev, search, E(lg), 9, comm);
  ef::vocabulary_parallel_log_softmax(E(lg), 9, comm);
  ef::vocabulary_parallel_log_softmax_into(dev, E(lg), lg, 9, comm);
  ef::vocabulary_parallel_log_softmax_into(dev, lg, E(lg), 9, comm);
  ef::causal_mask_into(dev, E(t3));
}
void refused_besides() {
  Eigen::Tensor<float, 2> columns;  // column-major, which is Eigen's default
  Eigen::Tensor<float, 4> columns4;
  ef::Tensor<float, 3> t3;
  const ef::Tensor<float, 3> read_only;
  const std::vector<int> lengths{2};
  auto weights = std::make_shared<ef::DecoderWeights>(ef::DecoderConfig{});
  ef::greedy_sample(columns);  // expect: this tensor is column-major, which is Eigen's default. Declare it as ef::Tensor<T, Rank> (row-major)
  ef::batched_attention_with_padding(columns4, columns4, columns4, lengths);  // expect: this tensor is column-major
  ef::greedy_sample(t3);  // expect: this tensor has the wrong rank for this argument
  ef::batched_attention_with_padding(t3, t3, t3, std::vector<float>{2});  // expect: this argument holds lengths or offsets, which are integers
  ef::causal_mask_into(Eigen::DefaultDevice{}, read_only);  // expect: the output is read-only; pass a mutable ef::Tensor or an ef::TensorView of non-const T.
  ef::AttentionOptions{.log_sum_exp = ef::Tensor<float, 2>(1, 2)};  // expect: log_sum_exp, or its gradient, is a tensor that ends with the expression
  ef::AttentionOptions{.bias = ef::Tensor<float, 2>(1, 2)};  // expect: bias and mask are viewed, and this tensor ends with the expression
  ef::AttentionStateView(t3, ef::Tensor<float, 2>(1, 2));  // expect: a state of attention is viewed, and its output or log_sum_exp is a tensor that ends with the expression
  ef::AttentionOptions{.mask = t3};  // expect: a bias is of float, a mask of bool or std::uint8_t
  ef::batched_attention_with_padding(t3, t3, t3, lengths, {}, 3);  // expect: a function of scores takes a score
  ef::Epilogue{}.bias(ef::Tensor<float, 1>(4));  // expect: an epilogue holds a view, and this tensor ends with the expression. Give it a name first.
  ef::Decoder<float>(weights, Eigen::DefaultDevice{});  // expect: deleted
}
// clang-format on
