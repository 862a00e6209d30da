// The calls of the contract, exactly as it writes them, compiled and run through the umbrella
// header alone.
// clang-format off
#include <eigenformer/eigenformer.h>

#include <gtest/gtest.h>

#include <list>
#include <numeric>
#include <random>

namespace ef = eigenformer;

namespace {

template <typename T, int Rank>
ef::Tensor<T, Rank> filled(std::initializer_list<Eigen::Index> sizes) {
  Eigen::DSizes<Eigen::Index, Rank> dimensions;
  std::copy(sizes.begin(), sizes.end(), dimensions.begin());
  ef::Tensor<T, Rank> tensor(dimensions);
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  for (Eigen::Index i = 0; i < tensor.size(); ++i) tensor.data()[i] = static_cast<T>(normal(generator));
  return tensor;
}

TEST(Contract, CausalMasks) {
  const int seq_length = 5, batch_size = 2, query_length = 4;
  ef::Tensor<float, 3> mask = ef::create_causal_mask<float>(seq_length, batch_size);   // (batch, seq, seq)
  ef::Tensor<float, 3> rect = ef::create_causal_mask<float>(query_length, batch_size,
      {.key_length = 12, .query_offset = 8, .window = 4});      // chunked prefill, sliding window
  auto expr = ef::causal_mask_expression<float>(seq_length, batch_size);   // lazy: no memory, use in any Eigen expression
  const ef::Tensor<float, 3> evaluated = expr + 0.0f;
  EXPECT_EQ(mask.dimension(0), 2);
  EXPECT_EQ(rect.dimension(2), 12);
  EXPECT_EQ(evaluated(1, 4, 0), 0.0f);
}

TEST(Contract, KvCache) {
  auto new_keys = filled<float, 4>({2, 3, 4, 8}), new_values = filled<float, 4>({2, 3, 4, 8});
  const int layer_idx = 1, length = 2;
  ef::KvCache<float> cache;                                   // the notebook's None: empty
  ef::update_kv_cache(cache, new_keys, new_values, layer_idx);   // both (batch, n, kv_heads, head_dim), n >= 1
  Eigen::Index n = cache.length(layer_idx);
  ef::Tensor<float, 4> k = cache.keys(layer_idx), v = cache.values(layer_idx);   // (batch, length, kv_heads, head_dim)
  EXPECT_EQ(n, 3);
  EXPECT_EQ(k(1, 2, 3, 7), new_keys(1, 2, 3, 7));
  EXPECT_EQ(v(0, 1, 0, 0), new_values(0, 1, 0, 0));
  cache.reserve(64);
  cache.truncate(length); cache.clear();                      // rollback after rejected speculation
  EXPECT_EQ(cache.length(layer_idx), 0);
}

TEST(Contract, Quantization) {
  ef::Tensor<float, 2> weights(2, 2);
  weights.setValues({{-2.0f, 1.5f}, {3.0f, -1.0f}});
  auto x = filled<float, 2>({3, 2});
  auto [q, scale] = ef::quantize_weights_int8(weights);               // any rank; q: ef::Tensor<int8_t, Rank>, scale: float
  auto [qc, scales] = ef::quantize_weights_int8_per_channel(weights);  // (out, in); scales: ef::Tensor<float, 1> of (out)
  ef::Tensor<float, 2> w = ef::dequantize(qc, scales);                 // and ef::dequantize(q, scale)
  ef::Tensor<float, 2> w1 = ef::dequantize(q, scale);
  ef::Tensor<float, 2> y = ef::int8_linear(x, qc, scales);             // (tokens, in) x (out, in)^T, activations quantized per token
  EXPECT_EQ(q(0, 0), -85);
  EXPECT_EQ(q(0, 1), 64);
  EXPECT_EQ(q(1, 0), 127);
  EXPECT_EQ(q(1, 1), -42);
  EXPECT_EQ(scale, 3.0f / 127);
  EXPECT_NEAR(w(1, 0), 3.0f, 1e-6f);
  EXPECT_NEAR(w1(0, 0), -2.0f, scale / 2 + 1e-6f);
  EXPECT_EQ(y.dimension(1), 2);
}

TEST(Contract, Attention) {
  const auto query = filled<float, 3>({2, 6, 8}), key = filled<float, 3>({2, 6, 8}), value = filled<float, 3>({2, 6, 8});
  const auto q4 = filled<float, 4>({2, 6, 4, 8}), k4 = filled<float, 4>({2, 6, 2, 8}), v4 = filled<float, 4>({2, 6, 2, 8});
  const auto q = filled<float, 3>({7, 4, 8}), k = filled<float, 3>({9, 2, 8}), v = filled<float, 3>({9, 2, 8});
  const std::vector<int> seq_lengths{6, 3};
  const std::vector<Eigen::Index> long_lengths{6, 3}, q_offsets{0, 3, 7}, kv_offsets{0, 5, 9};
  ef::KvCache<float> cache;
  const int layer_idx = 0;
  ef::update_kv_cache(cache, k4, v4, layer_idx);
  ef::Tensor<float, 3> out = ef::batched_attention_with_padding(query, key, value, seq_lengths);   // (batch, seq, d_model)
  ef::Tensor<float, 4> o4 = ef::batched_attention_with_padding(q4, k4, v4, seq_lengths, {.causal = true});  // (batch, seq, heads, head_dim)
  ef::Tensor<float, 3> packed = ef::variable_length_attention(q, k, v, q_offsets, kv_offsets, {.causal = true}); // (total_tokens, heads, head_dim)
  ef::Tensor<float, 4> dec = ef::attention_with_kv_cache(q4, cache, layer_idx, {.causal = true});   // KvCache or PagedKvCache
  EXPECT_EQ(out(1, 3, 0), 0.0f);  // past the length of 3
  EXPECT_EQ(o4.dimension(2), 4);
  EXPECT_EQ(packed.dimension(0), 7);
  EXPECT_EQ(dec(0, 5, 3, 7), o4(0, 5, 3, 7));  // the cache holds the same six keys
  const std::vector<Eigen::Index>& as_index = long_lengths;
  const std::span<const int> as_span(seq_lengths);
  ef::Tensor<float, 3> again = ef::batched_attention_with_padding(query, key, value, as_index), once_more = ef::batched_attention_with_padding(query, key, value, as_span);
  EXPECT_EQ(again(0, 0, 0), out(0, 0, 0));
  EXPECT_EQ(once_more(0, 0, 0), out(0, 0, 0));
  ef::PagedKvCache<float> paged({.layers = 1, .kv_heads = 2, .head_dim = 8, .page_size = 4, .page_count = 8});
  const auto first = paged.add_sequence(), second = paged.add_sequence();
  static_cast<void>(first), static_cast<void>(second);
  ef::update_kv_cache(paged, k4, v4, layer_idx);
  ef::Tensor<float, 4> dec2 = ef::attention_with_kv_cache(q4, paged, layer_idx, {.causal = true});
  EXPECT_EQ(dec2(1, 5, 3, 7), dec(1, 5, 3, 7));
}

TEST(Contract, Linear) {
  const auto input = filled<float, 3>({2, 3, 10});
  const auto weight = filled<float, 2>({13, 10});
  const auto bias = filled<float, 1>({13});
  const auto x = filled<float, 2>({6, 10});
  Eigen::ThreadPool pool(2);
  const Eigen::ThreadPoolDevice device(&pool, 2);
  ef::ThreadCommunicator::run(2, [&](auto& communicator) {
    const int rank = communicator.rank(), world_size = communicator.size();
    {
      ef::Tensor<float, 3> y = ef::column_parallel_linear(input, weight, communicator);          // input (batch, seq, hidden), weight (out, hidden)
      EXPECT_EQ(y.dimension(2), 13);
    }
    ef::Tensor<float, 3> y = ef::column_parallel_linear(input, weight, communicator, bias);    // (batch, seq, out) on every rank
    auto shard = ef::column_shard(weight, rank, world_size);                                   // a view: rows [begin, end) of weight
    EXPECT_EQ(shard.dimension(0), rank == 0 ? 7 : 6);
    EXPECT_EQ(y.dimension(2), 13);
    ef::Tensor<float, 3> part = ef::column_parallel_linear(input, weight, communicator, bias, {.gather_output = false});
    EXPECT_EQ(part.dimension(2), rank == 0 ? 7 : 6);
  });
  ef::SelfCommunicator communicator;
  ef::Tensor<float, 3> self = ef::column_parallel_linear(input, weight, communicator, bias);
  ef::Tensor<float, 2> y2 = ef::linear(x, weight, bias);                                     // (tokens, in) -> (tokens, out)
  EXPECT_EQ(self(0, 0, 0), ef::linear(ef::Tensor<float, 2>(input.reshape(Eigen::array<Eigen::Index, 2>{6, 10})), weight, bias)(0, 0));
  ef::PackedWeight<Eigen::bfloat16> w = ef::pack_weight<Eigen::bfloat16>(weight);            // from a float (out, in) weight, once
  ef::PackedWeight<std::int8_t> w8 = ef::pack_weight<std::int8_t>(weight);                   // quantized per channel; also from (q, scales)
  ef::Tensor<float, 2> y3 = ef::linear(device, x, w8, bias);                                 // x float or bfloat16; PackedWeight<float> too
  ef::Tensor<float, 2> y(6, 13);
  ef::linear_into(device, y, x, w8);  ef::linear_into(device, y, x, w8, bias);               // y: float or bfloat16 (tokens, out), no allocation
  EXPECT_EQ(y(5, 12), y3(5, 12));
  ef::Tensor<Eigen::bfloat16, 2> narrow(6, 13);
  const ef::Tensor<Eigen::bfloat16, 2> narrow_x = x.cast<Eigen::bfloat16>();
  ef::linear_into(device, narrow, narrow_x, w8, bias);
  ef::linear_into(device, narrow, x, w, bias);
  ef::Tensor<float, 2> y4 = ef::linear(device, x, ef::pack_weight<float>(weight), bias);
  EXPECT_EQ(y4(3, 4), y2(3, 4));
  auto [q, scales] = ef::quantize_weights_int8_per_channel(weight);
  ef::PackedWeight<std::int8_t> from_parts = ef::pack_weight<std::int8_t>(q, scales);
  ef::linear_into(device, y, x, from_parts, bias);
  EXPECT_EQ(y(5, 12), y3(5, 12));
}

TEST(Contract, Sampling) {
  const auto logits = filled<float, 2>({3, 100});
  const int k = 5;
  const float p = 0.9f, temperature = 0.8f;
  const std::uint64_t seed = 7;
  ef::Philox rng{seed};                                                        // counter-based
  ef::Tensor<std::int32_t, 1> ids = ef::greedy_sample(logits);                 // logits (batch, vocab)
  ids = ef::top_k_sample(logits, k, temperature, rng);
  ids = ef::top_p_sample(logits, p, temperature, rng);
  ids = ef::sample(logits, ef::SamplingParams{.temperature = .8f, .top_k = 50, .top_p = .95f, .min_p = .05f}, rng);
  const std::vector<ef::SamplingParams> rows(3);
  const std::span<const ef::SamplingParams> per_row_params(rows);
  ids = ef::sample(logits, per_row_params, rng);                               // std::span<const SamplingParams>, one per row
  const ef::SamplingParams params{.top_p = 0.5f};
  ef::Tensor<float, 2> probabilities = ef::sampling_probabilities(logits, params);         // the exact distribution drawn from
  std::vector<ef::Philox> generators{ef::Philox(1), ef::Philox(2), ef::Philox(3)};
  ids = ef::sample(logits, params, std::span<ef::Philox>(generators));
  EXPECT_EQ(ids.dimension(0), 3);
  EXPECT_EQ(probabilities.dimension(1), 100);
}

struct Model {  // one linear layer in plain loops
  ef::Tensor<float, 1> weight = filled<float, 1>({12}), weight_gradient = filled<float, 1>({12});
  ef::Tensor<float, 2> kept;
  template <typename Compute, typename Inputs> ef::Tensor<Compute, 2> forward(const Inputs& inputs) {
    kept = inputs;
    ef::Tensor<Compute, 2> logits(inputs.dimension(0), 3);
    for (Eigen::Index t = 0; t < inputs.dimension(0); ++t)
      for (Eigen::Index c = 0; c < 3; ++c) {
        float sum = 0;
        for (Eigen::Index i = 0; i < 4; ++i) sum += weight(c * 4 + i) * inputs(t, i);
        logits(t, c) = static_cast<Compute>(sum);
      }
    return logits;
  }
  template <typename Compute> void backward(const ef::Tensor<Compute, 2>& logits_gradient) {
    for (Eigen::Index t = 0; t < kept.dimension(0); ++t)
      for (Eigen::Index c = 0; c < 3; ++c)
        for (Eigen::Index i = 0; i < 4; ++i) weight_gradient(c * 4 + i) += static_cast<float>(logits_gradient(t, c)) * kept(t, i);
  }
  std::vector<ef::Parameter> parameters() {
    return {ef::Parameter{ef::TensorView<float, 1>(weight.data(), 12), ef::TensorView<float, 1>(weight_gradient.data(), 12)}};
  }
};
static_assert(ef::TrainableModel<Model>);

struct TrainingBatch {
  ef::Tensor<float, 2> inputs;
  ef::Tensor<std::int32_t, 1> targets;
};

TEST(Contract, Training) {
  Model model;
  const int accumulation_steps = 2;
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f, .weight_decay = 0.01f});   // and ef::Sgd; step(), zero_grad(), parameters()
  ef::Tensor<std::int32_t, 1> labels(5);
  labels.setValues({0, 2, -100, 1, 0});
  const auto inputs = filled<float, 2>({5, 4});
  std::list<TrainingBatch> data_loader(3, TrainingBatch{inputs, labels});
  const double first_loss = ef::cross_entropy(model.forward<float>(inputs), labels).mean();
  double average_loss = ef::train_step_with_grad_accumulation(model, optimizer, data_loader, accumulation_steps);
  EXPECT_LT(average_loss, first_loss);   // the second of two steps sees what the first has learned: by a rate of 1e-3
  EXPECT_NEAR(average_loss, first_loss, 0.02);
  ef::GradScaler scaler;     // scale 65536, growth 2 every 2000 good steps, backoff 0.5
  EXPECT_EQ(scaler.scale(), 65536.0f);
  const double second_loss = ef::cross_entropy(model.forward<float>(inputs), labels).mean();
  double loss = ef::train_step_mixed_precision<Eigen::half>(model, optimizer, inputs, labels, scaler);
  EXPECT_NEAR(loss, second_loss, 2e-3 * second_loss);
  ef::Sgd sgd(model.parameters(), {.learning_rate = 1e-3f});
  sgd.zero_grad();
  sgd.step();
  EXPECT_EQ(sgd.parameters().size(), 1u);
}

TEST(Contract, ContinuousBatching) {
  const int max_batch_size = 2, max_seq_length = 8;
  const std::string request_id = "a";
  const std::vector<std::int32_t> prompt_tokens{1, 2, 3};
  const std::int32_t new_token = 4;
  const bool is_finished = false;
  ef::ContinuousBatchScheduler scheduler(max_batch_size, max_seq_length);
  scheduler.add_request(request_id, prompt_tokens);      // std::string, std::span<const std::int32_t>
  ef::Batch batch = scheduler.get_batch();               // request_ids, input_ids (batch, longest), attention_mask, sequence_lengths
  scheduler.update_batch(request_id, new_token, is_finished);
  bool room = scheduler.can_add_more_requests();         // a request added now would join the batch at once
  EXPECT_TRUE(room);
  EXPECT_EQ(batch.request_ids[0], "a");
  EXPECT_EQ(batch.input_ids(0, 2), 3);
  EXPECT_EQ(batch.sequence_lengths[0], 3);
  EXPECT_EQ(batch.attention_mask.dimension(1), 3);
}

}  // namespace
