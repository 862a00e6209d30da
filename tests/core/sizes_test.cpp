// Sizes near the end of Index, in every call of the operators on rows and matrices, attention and
// sampling: a std::invalid_argument that names the operator before anything is read or allocated,
// no overflow on the way (UBSan), and tensors without elements that are done at once, however large
// their other sizes.
#include <eigenformer/eigenformer.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere{};
constexpr Index kMost = (std::numeric_limits<Index>::max)();

template <typename T, int Rank>
ef::TensorView<T, Rank> nowhere(std::array<Index, static_cast<std::size_t>(Rank)> sizes) {
  return ef::TensorView<T, Rank>(nullptr, dimensions_of<Rank>(sizes));
}

/// Shapes whose elements or bytes do not fit an Index, whether or not a size of 0 hides it.
std::vector<std::array<Index, 2>> absurd_shapes() {
  return {{kMost, 1},         {1, kMost}, {kMost, kMost}, {kMost / 2 + 1, 2}, {kMost / 2 + 1, 4},
          {kMost / 4 + 1, 4}, {kMost, 0}, {0, kMost},     {kMost / 2, 1},     {kMost - 65535, 1}};
}

using Refusal = std::invalid_argument;

TEST(Sizes, OfRowsThatOverflow) {
  const auto table = random_tensor<float, 2>({3, 3}, 1);
  ef::Tensor<float, 1> gradient(3);
  const std::vector<Index> positions(3);
  for (const auto& [rows, columns] : absurd_shapes()) {
    const auto x = nowhere<float, 2>({rows, columns});
    const auto each = nowhere<const float, 1>({columns});
    const auto heads = nowhere<const float, 3>({rows, 1, columns});
    const auto expect = [&](const char* name, auto&& call) {
      expect_throws<Refusal>(call, {name, "overflow"});
    };
    expect("rms_norm", [&] { ef::rms_norm(x, each); });
    expect("rms_norm", [&] { ef::rms_norm_into(kHere, x, x, each); });
    expect("add_rms_norm", [&] { ef::add_rms_norm_into(kHere, x, x, x, each); });
    expect("layer_norm", [&] { ef::layer_norm(x, each, each); });
    expect("layer_norm", [&] { ef::layer_norm_into(kHere, x, x, each, each); });
    expect("rms_norm_backward",
           [&] { ef::rms_norm_backward_into(kHere, x, gradient, x, x, each); });
    expect("layer_norm_backward",
           [&] { ef::layer_norm_backward_into(kHere, x, gradient, gradient, x, x, each); });
    expect("silu", [&] { ef::silu(x); });
    expect("gelu", [&] { ef::gelu_into(kHere, x, x); });
    expect("relu_backward", [&] { ef::relu_backward_into(kHere, x, x, x); });
    expect("swiglu", [&] { ef::swiglu(x, x); });
    expect("geglu_backward", [&] { ef::geglu_backward_into(kHere, x, x, x, x, x); });
    expect("residual_add", [&] { ef::residual_add(x, x); });
    expect("cross_entropy", [&] { ef::cross_entropy(x, {1, 2, 3}); });
    expect("embedding", [&] { ef::embedding(std::vector<std::int32_t>{1, 2}, x); });
    expect("embedding", [&] { ef::embedding(nowhere<std::int64_t, 2>({rows, columns}), table); });
    expect("rope", [&] { ef::rope(heads, positions); });
    expect("quantize_weights_int8", [&] { ef::quantize_weights_int8(x); });
    expect("quantize_weights_int8_per_channel", [&] { ef::quantize_weights_int8_per_channel(x); });
    expect("quantize_weights_int8_grouped", [&] { ef::quantize_weights_int8_grouped(x, 32); });
    const auto values = nowhere<std::int8_t, 2>({rows, columns});
    expect("quantize_activations_int8",
           [&] { ef::quantize_activations_int8_into(kHere, values, gradient, x); });
    expect("dequantize", [&] { ef::dequantize(values, 1.0f); });
    expect("dequantize_grouped", [&] {
      ef::dequantize_grouped(values, nowhere<float, 2>({1, 1}), 64);
    });
    expect("linear", [&] { ef::linear(x, nowhere<float, 2>({2, columns})); });
    expect("linear", [&] { ef::linear(nowhere<float, 2>({2, columns}), x); });
    expect("gated_linear", [&] {
      ef::gated_linear_into(kHere, nowhere<float, 2>({1, rows}), nowhere<float, 2>({1, columns}), x,
                            x, ef::Epilogue{});
    });
    expect("linear_backward_input", [&] {
      ef::linear_backward_input_into(kHere, nowhere<float, 2>({1, columns}),
                                     nowhere<float, 2>({1, rows}), x);
    });
    expect("linear_backward_weight", [&] {
      ef::linear_backward_weight_into(kHere, x, nowhere<float, 2>({1, rows}),
                                      nowhere<float, 2>({1, columns}));
    });
    expect("linear_backward_bias", [&] { ef::linear_backward_bias_into(kHere, gradient, x); });
    expect("pack_weight", [&] { ef::pack_weight<float>(x); });
    expect("pack_weight", [&] { ef::pack_weight<ef::bfloat16>(x); });
    expect("pack_weight", [&] { ef::pack_weight<std::int8_t>(x, {.group_size = 64}); });
    expect("pack_gated_weight", [&] { ef::pack_gated_weight<float>(x, x); });
    ef::SelfCommunicator self;
    expect("column_shard", [&] { ef::column_shard(x, 0, 1); });
    expect("column_parallel_linear", [&] {
      ef::column_parallel_linear(x, nowhere<float, 2>({2, columns}), self);
    });
    expect("row_parallel_linear", [&] {
      ef::row_parallel_linear(nowhere<float, 2>({2, columns}), x, self);
    });
    expect("vocabulary_parallel_greedy", [&] {
      ef::vocabulary_parallel_greedy(nowhere<float, 2>({2, columns}), x, self);
    });
  }
}

TEST(Sizes, OfAttentionThatOverflow) {
  const std::vector<Index> none, zero{0};
  ef::KvCache<float> cache;
  ef::Tensor<float, 4> key(1, 1, 1, 4);
  key.setZero();
  ef::update_kv_cache(cache, key, key, 0);
  for (const auto& [rows, columns] : absurd_shapes()) {
    const auto expect = [&](const char* name, auto&& call) {
      expect_throws<Refusal>(call, {name, "overflow"});
    };
    const auto x = nowhere<float, 4>({1, rows, 1, columns});
    const auto one = nowhere<float, 4>({1, 1, 1, columns});
    const auto nobody = nowhere<float, 4>({0, rows, 1, columns});
    const auto joined = nowhere<float, 3>({1, rows, columns});
    const auto log_sum_exp = nowhere<float, 3>({1, 1, rows});
    const char* const dense = "batched_attention_with_padding";
    expect(dense, [&] { ef::batched_attention_with_padding(x, x, x, zero); });
    expect(dense, [&] { ef::batched_attention_with_padding(one, x, x, zero); });
    expect(dense, [&] { ef::batched_attention_with_padding(joined, joined, joined, zero); });
    expect(dense, [&] {
      ef::batched_attention_with_padding(nowhere<float, 4>({0, 1, 1, columns}), nobody, nobody,
                                         none);
    });
    expect(dense, [&] { ef::batched_attention_with_padding_into(kHere, x, x, x, x, zero); });
    expect(dense, [&] {
      ef::batched_attention_with_padding_into(kHere, one, one, x, x, zero,
                                              {.log_sum_exp = log_sum_exp});
    });
    expect(dense, [&] { ef::batched_attention_with_padding_into(kHere, x, key, key, key, zero); });
    const char* const cached = "attention_with_kv_cache";
    expect(cached, [&] { ef::attention_with_kv_cache(x, cache, 0); });
    expect(cached, [&] { ef::attention_with_kv_cache_into(kHere, x, x, cache, 0); });
    expect(cached, [&] { ef::attention_with_kv_cache_into(kHere, x, key, cache, 0); });
    const char* const backward = "attention_backward";
    expect(backward, [&] { ef::attention_backward(kHere, x, x, x, x, x, log_sum_exp, zero); });
    expect(backward,
           [&] { ef::attention_backward(kHere, one, one, x, x, one, log_sum_exp, zero); });
    expect(backward, [&] {
      ef::attention_backward_into(kHere, one, x, x, one, one, x, x, one, log_sum_exp, zero);
    });
    expect(backward, [&] {
      ef::attention_backward_into(kHere, key, key, key, x, key, key, key, x, log_sum_exp, zero);
    });
    for (const auto& p :
         {nowhere<float, 3>({rows, 1, columns}), nowhere<float, 3>({0, rows, columns})}) {
      const std::vector<Index> ends = p.dimension(0) == 0 ? zero : std::vector<Index>{0, rows};
      const auto lse = nowhere<float, 2>({p.dimension(1), p.dimension(0)});
      const char* const packed = "variable_length_attention";
      expect(packed, [&] { ef::variable_length_attention(p, p, p, ends, ends); });
      expect(packed, [&] { ef::variable_length_attention_into(kHere, p, p, p, p, ends, ends); });
      expect(packed, [&] {
        ef::variable_length_attention_backward(kHere, p, p, p, p, p, lse, ends, ends);
      });
      expect(packed, [&] {
        ef::variable_length_attention_backward_into(kHere, p, p, p, p, p, p, p, p, lse, ends, ends);
      });
    }
  }
}

TEST(Sizes, OfAttentionScratchThatOverflow) {
  const std::vector<Index> zero{0};
  const auto v = nowhere<float, 4>({1, 0, 1, 1}), out = nowhere<float, 4>({1, 1, 1, 1});
  const auto query = [](Index width) { return nowhere<float, 4>({1, 1, 1, width}); };
  const auto key = [](Index width) { return nowhere<float, 4>({1, 0, 1, width}); };
  const auto q = query(kMost / 64), k = key(kMost / 64);  // 128 rows of them overflow
  expect_throws<Refusal>(
      [&] { ef::batched_attention_with_padding_into(kHere, out, q, k, v, zero); },
      {"attention", "overflow"});
  const auto lse = nowhere<float, 3>({1, 1, 1});
  const auto wide_q = query(kMost / 8), wide_k = key(kMost / 8);  // a band of few rows
  expect_throws<Refusal>(
      [&] {
        ef::attention_backward_into(kHere, wide_q, wide_k, v, out, wide_q, wide_k, v, out, lse,
                                    zero);
      },
      {"attention_backward", "overflow"});
}

TEST(Sizes, OfSamplingThatOverflow) {
  const ef::SamplingParams params;
  ef::SpeculativeResult verified;
  ef::SamplesWithLogProbabilities drawn;
  const ef::Generators rng = ef::Philox(1);
  for (const auto& [rows, columns] : absurd_shapes()) {
    const auto expect = [&](const char* name, auto&& call) {
      expect_throws<Refusal>(call, {name, "overflow"});
    };
    const auto all_forms = [&](const auto& x) {
      const auto ids = nowhere<std::int32_t, 1>({x.dimension(0)});
      const auto numbers = nowhere<float, 1>({x.dimension(0)});
      const auto table = nowhere<float, 2>({x.dimension(0), x.dimension(1)});
      expect("greedy_sample", [&] { ef::greedy_sample(x); });
      expect("greedy_sample", [&] { ef::greedy_sample_into(kHere, ids, x); });
      expect("sample", [&] { ef::sample(x, params, rng); });
      expect("sample", [&] { ef::sample_into(kHere, ids, x, params, rng); });
      expect("top_k_sample", [&] { ef::top_k_sample(x, 2, 1.0, rng); });
      expect("top_p_sample", [&] { ef::top_p_sample(x, 0.5, 1.0, rng); });
      expect("sampling_probabilities", [&] { ef::sampling_probabilities(x, params); });
      expect("sampling_probabilities",
             [&] { ef::sampling_probabilities_into(kHere, table, x, params); });
      expect("log_probabilities_of", [&] { ef::log_probabilities_of(x, ids); });
      expect("log_probabilities_of",
             [&] { ef::log_probabilities_of_into(kHere, numbers, x, ids); });
      expect("sample_with_log_probabilities",
             [&] { ef::sample_with_log_probabilities(x, params, rng, {.best = kMost}); });
      expect("sample_with_log_probabilities",
             [&] { ef::sample_with_log_probabilities_into(kHere, drawn, x, params, rng); });
    };
    all_forms(nowhere<float, 2>({rows, columns}));
    all_forms(nowhere<ef::half, 2>({kMost / 4 + 1, 1}));  // these fit, their numbers do not
    for (const Index drafts : {0, 1}) {
      const auto tokens = nowhere<std::int32_t, 2>({rows, drafts});
      const auto draft = nowhere<float, 3>({rows, drafts, columns}),
                 target = nowhere<float, 3>({rows, drafts + 1, columns});
      expect("verify_speculative", [&] { ef::verify_speculative(tokens, draft, target, rng); });
      expect("verify_speculative",
             [&] { ef::verify_speculative_into(kHere, verified, tokens, draft, target, rng); });
    }
  }
}

TEST(Sizes, OfNumbersThatOverflow) {
  for (Index size : {kMost, kMost - 1, kMost / 2, kMost / 2 + 1}) {
    expect_throws<Refusal>([&] { ef::alibi_slopes(size); }, {"alibi_slopes", "overflow"});
    expect_throws<Refusal>([&] { ef::RopeTable(size, 64); }, {"RopeTable", "overflow"});
    for (const auto layout : {ef::RopeLayout::half_split, ef::RopeLayout::interleaved})
      expect_throws<Refusal>([&] { ef::RopeTable(1, size / 2 * 2, {.layout = layout}); },
                             {"RopeTable", "overflow"});
    expect_throws<Refusal>([&] { ef::create_causal_mask<float>(size, 1); }, {"overflow"});
    expect_throws<Refusal>([&] { ef::create_causal_mask<float>(2, size); }, {"overflow"});
    expect_throws<Refusal>([&] { ef::create_causal_mask<float>(1, 1, {.key_length = size}); },
                           {"overflow"});
    expect_throws<Refusal>([&] { ef::create_causal_mask<float>(1, 1, {.query_offset = size}); },
                           {"query_offset"});
    expect_throws<Refusal>([&] { ef::create_causal_mask<float>(1, 1, {.window = size}); },
                           {"window"});
    expect_throws<Refusal>([&] { ef::causal_mask_expression<float>(size, size); }, {"overflow"});
    const std::vector<float> slopes{1.0f};
    expect_throws<Refusal>([&] { ef::create_alibi_mask<float>(size, slopes); }, {"overflow"});
    const ef::ShardRange last = ef::shard_range(size, 6, 7), first = ef::shard_range(size, 0, 7);
    EXPECT_EQ(first.begin, 0);
    EXPECT_EQ(last.end, size);
    EXPECT_LE(first.size() - last.size(), 1);
    EXPECT_EQ(ef::shard_range(size, (std::numeric_limits<int>::max)() - 1,
                              (std::numeric_limits<int>::max)())
                  .end,
              size);
  }
  for (Index size : {Index{-1}, -kMost, -kMost - 1}) {
    expect_throws<Refusal>([&] { ef::alibi_slopes(size); }, {"alibi_slopes"});
    expect_throws<Refusal>([&] { ef::RopeTable(size, 64); }, {"RopeTable"});
    expect_throws<Refusal>([&] { ef::RopeTable(4, size); }, {"RopeTable"});
    expect_throws<Refusal>([&] { ef::create_causal_mask<float>(size, 1); }, {"query_length"});
    expect_throws<Refusal>([&] { ef::shard_range(size, 0, 1); }, {"shard_range"});
  }
  EXPECT_EQ(ef::create_causal_mask<float>(3, 1, {.prefix_length = kMost}).dimension(2), 3);
  constexpr int most_ranks = (std::numeric_limits<int>::max)();
  expect_throws<Refusal>([] { ef::ThreadCommunicatorGroup{most_ranks}; }, {"world_size"});
  expect_throws<Refusal>([] { ef::ThreadCommunicator::run(most_ranks, [](auto&) {}); },
                         {"world_size"});
}

TEST(Sizes, ThatContradictAreFoundBeforeAnythingIsRead) {
  const auto x = random_tensor<float, 2>({2, 3}, 1);
  const Index many = kMost / 4096 * 64;
  const auto vast = nowhere<float, 2>({many, 3});
  const auto x_row = random_tensor<float, 1>({2}, 2);
  const auto vast_vector = nowhere<float, 1>({many});
  ef::Tensor<float, 2> y(2, 3);
  ef::Tensor<std::int8_t, 2> q(2, 3);
  expect_throws<Refusal>([&] { ef::rms_norm(x, vast_vector); }, {"weight has"});
  expect_throws<Refusal>([&] { ef::rms_norm_into(kHere, y, vast, vast_vector); }, {"shape"});
  expect_throws<Refusal>([&] { ef::swiglu(x, vast); }, {"shape"});
  expect_throws<Refusal>([&] { ef::cross_entropy(vast, {1, 2}); }, {"targets has 2"});
  expect_throws<Refusal>(
      [&] {
        ef::rope(nowhere<float, 3>({many / 2, 1, 2}), {1, 2});
      },
      {"positions has 2"});
  expect_throws<Refusal>([&] { ef::linear(x, nowhere<float, 2>({many, 2})); }, {"2 columns"});
  expect_throws<Refusal>([&] { ef::rms_norm(vast, x_row); }, {"weight has 2"});
  expect_throws<Refusal>([&] { ef::layer_norm(vast, x_row, x_row); }, {"weight has 2"});
  expect_throws<Refusal>([&] { ef::residual_add(vast, x); }, {"shape"});
  expect_throws<Refusal>([&] { ef::geglu(vast, x); }, {"shape"});
  expect_throws<Refusal>([&] { ef::dequantize(q, vast_vector); }, {"scales has"});
  expect_throws<Refusal>([&] { ef::pack_weight(q, vast_vector); }, {"scales has"});
  expect_throws<Refusal>([&] { ef::int8_linear(x, q, vast_vector); }, {"scales has"});
}

TEST(Sizes, WithoutElementsAreDoneAtOnce) {
  const Index many = kMost / 4096 * 64;
  const auto x = nowhere<float, 2>({many, 0}), wide = nowhere<float, 2>({0, many});
  const ef::Tensor<float, 1> none(0);
  ef::Tensor<float, 1> gradient(0);
  EXPECT_EQ(ef::rms_norm(x, none).dimension(0), many);
  EXPECT_EQ(ef::layer_norm(x, none, none).dimension(0), many);
  ef::add_rms_norm_into(kHere, x, x, x, none);
  ef::rms_norm_backward_into(kHere, x, gradient, x, x, none);
  ef::layer_norm_backward_into(kHere, x, gradient, gradient, x, x, none);
  EXPECT_EQ(ef::rms_norm(wide, nowhere<float, 1>({many})).dimension(1), many);
  EXPECT_EQ(ef::swiglu(x).dimension(0), many);
  EXPECT_EQ(ef::swiglu(x, x).dimension(0), many);
  EXPECT_EQ(ef::silu(wide).dimension(1), many);
  EXPECT_EQ(ef::rope(nowhere<float, 3>({0, 1, many}), std::vector<Index>{}).dimension(2), many);
  EXPECT_EQ(ef::rope(nowhere<float, 4>({0, 2, many, 4}), std::vector<Index>{}).dimension(2), many);
  EXPECT_EQ(ef::embedding(std::vector<std::int32_t>{}, nowhere<float, 2>({many, 4})).size(), 0);
  EXPECT_EQ(ef::linear(x, nowhere<float, 2>({0, 0})).dimension(0), many);
  EXPECT_EQ(ef::linear(nowhere<float, 2>({0, 5}), nowhere<float, 2>({many / 8, 5})).size(), 0);
  ef::linear_backward_bias_into(kHere, gradient, x);
  const auto [values, scales] = ef::quantize_weights_int8_grouped(x, 32);
  EXPECT_EQ(values.dimension(0), many);
  EXPECT_EQ(ef::dequantize_grouped(values, scales, 32).dimension(0), many);
  EXPECT_EQ(ef::dequantize(values, 1.0f).dimension(0), many);
  EXPECT_EQ(ef::create_causal_mask<float>(many, 1, {.key_length = 0}).dimension(1), many);
  EXPECT_EQ(ef::create_alibi_mask<float>(many, std::vector<float>{1.0f}, {.key_length = 0}).size(),
            0);
  EXPECT_EQ(ef::cross_entropy(wide, std::vector<int>{}).count, 0);
  EXPECT_EQ(ef::column_shard(x, 1, 2).dimension(0), many / 2);
}

TEST(Sizes, OfAttentionWithoutElementsAreDoneAtOnce) {
  const Index many = kMost / 4096 * 64;
  const std::vector<Index> none, zero{0}, one{1}, all{0, many};
  using Shape = std::array<Index, 4>;
  for (const Shape& shape : {Shape{1, many, 1, 0}, Shape{1, 0, many, 4}, Shape{1, 1, many, 0},
                             Shape{1, many, 0, 4}, Shape{0, many, 1, 4}}) {
    const auto x = nowhere<float, 4>(shape);
    const auto lse = nowhere<float, 3>({shape[0], shape[2], shape[1]});
    const auto& lengths = shape[0] == 0 ? none : zero;
    EXPECT_EQ(ef::batched_attention_with_padding(x, x, x, lengths).dimension(1), shape[1]);
    ef::attention_backward_into(kHere, x, x, x, x, x, x, x, x, lse, lengths);
    EXPECT_EQ(ef::attention_backward(x, x, x, x, x, lse, lengths).grad_k.dimension(2), shape[2]);
  }
  const ef::KvSource<float> source{.batch = 1, .kv_heads = 1, .lengths = one.data()};
  EXPECT_EQ(ef::attention_with_kv_source(nowhere<float, 4>({1, many / 4, 4, 0}), source).size(), 0);
  const auto rows = nowhere<float, 3>({many, 1, 0}), heads = nowhere<float, 3>({0, many, 4});
  EXPECT_EQ(ef::variable_length_attention(rows, rows, rows, all, all).dimension(0), many);
  EXPECT_EQ(ef::variable_length_attention(heads, heads, heads, zero, zero).dimension(1), many);
  const std::vector<float> sinks(2);
  std::vector<float> sinks_gradient(2, 7.0f);
  const auto x = nowhere<float, 4>({1, many / 4, 2, 0});
  const auto lse = nowhere<float, 3>({1, 2, many / 4});
  ef::attention_backward_into(kHere, x, x, x, x, x, x, x, x, lse, zero,
                              {.sinks = sinks, .sinks_gradient = sinks_gradient});
  EXPECT_EQ(sinks_gradient, std::vector<float>(2));
}

}  // namespace
