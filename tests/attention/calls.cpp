// Calls of the contract, empty tensors, aliasing, memory, and what is refused with the argument
// named.
#include "allocations.h"
#include "gradient_case.h"

using namespace eigenformer_test;

namespace {

TEST(AttentionCalls, OfTheContract) {
  const auto query = random_tensor<float, 3>({2, 4, 8}, 1),
             key = random_tensor<float, 3>({2, 4, 8}, 2),
             value = random_tensor<float, 3>({2, 4, 8}, 3);
  const auto q4 = random_tensor<float, 4>({2, 4, 4, 8}, 1),
             k4 = random_tensor<float, 4>({2, 4, 2, 8}, 2),
             v4 = random_tensor<float, 4>({2, 4, 2, 8}, 3);
  const auto q = random_tensor<float, 3>({5, 2, 8}, 4), k = random_tensor<float, 3>({5, 2, 8}, 5),
             v = random_tensor<float, 3>({5, 2, 8}, 6);
  const auto call = [&](const auto& seq_lengths) {
    ef::Tensor<float, 3> out = ef::batched_attention_with_padding(query, key, value, seq_lengths);
    ef::Tensor<float, 4> o4 =
        ef::batched_attention_with_padding(q4, k4, v4, seq_lengths, {.causal = true});
    EXPECT_EQ(out(0, 3, 7), 0.0f);  // the notebook's example: lengths 3 and 2
    EXPECT_EQ(out(1, 2, 0), 0.0f);
    EXPECT_NE(out(1, 1, 0), 0.0f);
    EXPECT_EQ(o4(1, 0, 3, 2), v4(1, 0, 1, 2));  // the first query sees itself only
    return out;
  };
  const int array[]{3, 2};
  const std::vector<Index> wide{3, 2};
  const std::vector<int> narrow{3, 2};
  const auto expected = call(wide);
  EXPECT_TRUE(same_bits(expected, call(narrow)));
  EXPECT_TRUE(same_bits(expected, call(std::span<const Index>(wide))));
  EXPECT_TRUE(same_bits(expected, call(std::span<const int>(narrow))));
  EXPECT_TRUE(same_bits(expected, call(std::array<int, 2>{3, 2})));
  EXPECT_TRUE(same_bits(expected, call(array)));
  EXPECT_TRUE(same_bits(expected, ef::batched_attention_with_padding(query, key, value, {3, 2})));

  const std::vector<int> q_offsets{0, 2, 5};
  const std::vector<Index> kv_offsets{0, 1, 5};
  ef::Tensor<float, 3> packed =
      ef::variable_length_attention(q, k, v, q_offsets, kv_offsets, {.causal = true});
  EXPECT_EQ(packed(0, 0, 0), 0.0f);  // two queries, one key: the first is before it
  EXPECT_EQ(packed(1, 0, 0), v(0, 0, 0));

  Threads threads(2);
  ef::TensorView<const float, 3> view(query.data(), 2, 4, 8);
  EXPECT_TRUE(same_bits(
      expected, ef::batched_attention_with_padding(threads.device, view, key, value, wide)));
  EXPECT_TRUE(same_bits(packed, ef::variable_length_attention(threads.device, q, k, v, q_offsets,
                                                              kv_offsets, {.causal = true})));
}

TEST(AttentionCalls, EmptyTensorsAreLegal) {
  const std::vector<Index> none;
  EXPECT_EQ(ef::batched_attention_with_padding(ef::Tensor<float, 3>(0, 4, 8),
                                               ef::Tensor<float, 3>(0, 4, 8),
                                               ef::Tensor<float, 3>(0, 4, 8), none)
                .size(),
            0);
  EXPECT_EQ(ef::batched_attention_with_padding(ef::Tensor<float, 3>(2, 0, 8),
                                               ef::Tensor<float, 3>(2, 0, 8),
                                               ef::Tensor<float, 3>(2, 0, 8), {0, 0})
                .size(),
            0);
  const ef::Tensor<float, 4> q = random_tensor<float, 4>({1, 2, 2, 8}, 1);
  const auto out = ef::batched_attention_with_padding(q, ef::Tensor<float, 4>(1, 0, 2, 8),
                                                      ef::Tensor<float, 4>(1, 0, 2, 8), {0});
  for (Index i = 0; i < out.size(); ++i) EXPECT_EQ(out.data()[i], 0.0f);
  EXPECT_EQ(
      ef::variable_length_attention(ef::Tensor<float, 3>(0, 2, 8), ef::Tensor<float, 3>(0, 2, 8),
                                    ef::Tensor<float, 3>(0, 2, 8), {0, 0, 0}, {0, 0, 0})
          .size(),
      0);
}

TEST(AttentionCalls, OutputMayBeTheQuery) {
  auto q = random_tensor<float, 4>({2, 150, 4, 16}, 1);
  const auto k = random_tensor<float, 4>({2, 150, 2, 16}, 2),
             v = random_tensor<float, 4>({2, 150, 2, 16}, 3);
  const auto expected = ef::batched_attention_with_padding(q, k, v, {150, 90}, {.causal = true});
  Threads threads(2);
  ef::batched_attention_with_padding_into(threads.device, q, q, k, v, {150, 90}, {.causal = true});
  EXPECT_TRUE(same_bits(q, expected));
}

// "(1, 1001, 4, 16)" is too long for the buffer of a std::string: no check may make such a text.
TEST(AttentionCalls, IntoFormAllocatesNothingTheSecondTime) {
  const AttentionCase<ef::bfloat16> c({1, 1001, 1001, 4, 2, 16, 16}, {70});
  ef::Tensor<ef::bfloat16, 4> out(1, 1001, 4, 16);
  ef::Workspace workspace;
  const auto call = [&] {
    ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, out, c.q, c.k, c.v,
                                            c.key_lengths, {.causal = true}, workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
}

TEST(AttentionCalls, MergingAllocatesNothingTheSecondTime) {
  const auto out = random_tensor<float, 3>({9, 2, 8}, 1),
             other = random_tensor<float, 3>({9, 2, 8}, 2);
  const auto lse = random_tensor<float, 2>({2, 9}, 3);
  ef::Tensor<float, 3> merged(9, 2, 8);
  ef::Workspace workspace;
  const auto call = [&] {
    ef::merge_attention_states_into(Eigen::DefaultDevice{}, merged, {}, out, lse, other, lse,
                                    workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
}

// Threads that share the keys of a row have the padding beside it in common, which one of them
// writes, and hold the sums of a few tasks at a time, however many there are.
TEST(AttentionCalls, ThreadsShareTheKeysOfFewRows) {
  constexpr Index rows = 32, keys = 9000;
  Threads threads(3);
  std::size_t memory = 0;
  for (const Index heads : {2, 11}) {
    const auto q = random_tensor<float, 4>({1, rows, heads, 8}, 1),
               k = random_tensor<float, 4>({1, keys, heads, 8}, 2),
               v = random_tensor<float, 4>({1, keys, heads, 8}, 3);
    const ef::AttentionOptions options{.causal = true, .query_lengths = {5}};
    const auto expected = ef::batched_attention_with_padding(q, k, v, {keys}, options);
    EXPECT_EQ(expected(0, 5, 0, 0), 0.0f);
    auto out = poisoned_tensor<float, 4>({1, rows, heads, 8});
    ef::Workspace workspace;
    ef::batched_attention_with_padding_into(threads.device, out, q, k, v, {keys}, options,
                                            workspace);
    EXPECT_TRUE(same_bits(out, expected));
    if (memory == 0) memory = workspace.capacity();
    EXPECT_LT(workspace.capacity(), memory + memory / 10);
  }
}

TEST(AttentionCalls, BackwardAllocatesNothingTheSecondTime) {
  GradientCase<float> c({1, 1001, 1001, 2, 1, 16, 16}, {40});
  const auto expected = c.gradients(Eigen::DefaultDevice{}, {.causal = true});
  auto gq = poisoned_tensor<float, 4>({1, 1001, 2, 16});
  auto gk = poisoned_tensor<float, 4>({1, 1001, 1, 16});
  auto gv = poisoned_tensor<float, 4>({1, 1001, 1, 16});
  ef::Workspace workspace;
  const auto call = [&] {
    ef::attention_backward_into(Eigen::DefaultDevice{}, gq, gk, gv, c.weights, c.q, c.k, c.v, c.out,
                                c.lse, c.key_lengths, {.causal = true}, workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
  EXPECT_TRUE(same_bits(gq, expected.grad_q) && same_bits(gk, expected.grad_k) &&
              same_bits(gv, expected.grad_v));
}

TEST(AttentionCalls, RefusesWithTheArgumentNamed) {
  const auto q = random_tensor<float, 4>({2, 4, 4, 8}, 1),
             k = random_tensor<float, 4>({2, 4, 2, 8}, 2),
             v = random_tensor<float, 4>({2, 4, 2, 8}, 3);
  const auto refuses = [&](const ef::AttentionOptions& options, std::initializer_list<int> lengths,
                           const std::vector<std::string>& words) {
    ef::Tensor<float, 4> out(2, 4, 4, 8);
    out.setConstant(7.0f);
    expect_throws<std::invalid_argument>(
        [&] {
          ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, out, q, k, v, lengths,
                                                  options);
        },
        words);
    for (Index i = 0; i < out.size(); ++i) ASSERT_EQ(out.data()[i], 7.0f);
  };
  const std::vector<float> three(3, 1.0f), bad(4, std::numeric_limits<float>::quiet_NaN());
  refuses({}, {5, 1}, {"batched_attention_with_padding", "seq_lengths[0] is 5", "0 to 4"});
  refuses({}, {4, -1}, {"seq_lengths[1] is -1"});
  refuses({}, {4}, {"seq_lengths has 1", "2 (batch)"});
  refuses({.causal = true, .window = -2}, {4, 4}, {"window is -2"});
  refuses({.softcap = -1.0f}, {4, 4}, {"softcap"});
  refuses({.scale = std::nanf("")}, {4, 4}, {"scale is nan"});
  refuses({.scale = -std::numeric_limits<float>::infinity()}, {4, 4},
          {"scale is -inf", "a finite value"});
  refuses({.alibi_slopes = three}, {4, 4}, {"alibi_slopes has 3", "4 (heads)"});
  refuses({.sinks = three}, {4, 4}, {"sinks has 3"});
  refuses({.sinks = bad}, {4, 4}, {"sinks holds nan"});
  refuses({.causal = true, .prefix_length = -1}, {4, 4}, {"prefix_length is -1"});
  const std::vector<int> ragged{5, 0};
  refuses({.query_lengths = ragged}, {4, 4}, {"query_lengths[0] is 5"});
  ef::Tensor<float, 3> lse(2, 4, 5);
  refuses({.log_sum_exp = lse}, {4, 4}, {"log_sum_exp has shape (2, 4, 5)", "(2, 4, 4)"});
  ef::Tensor<double, 3> wide(2, 4, 4);
  refuses({.log_sum_exp = wide}, {4, 4}, {"log_sum_exp is a tensor of double", "float"});

  const auto call = [](const auto& a, const auto& b, const auto& c) {
    return ef::batched_attention_with_padding(a, b, c, {1, 1});
  };
  const ef::Tensor<float, 4> narrow(2, 4, 2, 7), three_heads(2, 4, 3, 8), short_keys(2, 3, 2, 8),
      one(1, 4, 2, 8);
  expect_throws<std::invalid_argument>([&] { call(q, narrow, v); },
                                       {"key has shape (2, 4, 2, 7)", "width 8"});
  expect_throws<std::invalid_argument>([&] { call(q, three_heads, three_heads); },
                                       {"query has 4 heads", "multiple of the 3"});
  expect_throws<std::invalid_argument>([&] { call(q, k, short_keys); },
                                       {"value has shape (2, 3, 2, 8)"});
  expect_throws<std::invalid_argument>([&] { call(q, one, one); }, {"query has batch 2, key 1"});
  ef::Tensor<float, 4> small(2, 4, 4, 7);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, small, q, k, v, {1, 1});
      },
      {"output has shape (2, 4, 4, 7)"});

  const ef::Tensor<float, 3> p = random_tensor<float, 3>({5, 2, 8}, 4);
  const auto packed = [&](std::initializer_list<int> a, std::initializer_list<int> b) {
    return ef::variable_length_attention(p, p, p, a, b);
  };
  expect_throws<std::invalid_argument>(
      [&] {
        packed({0, 4}, {0, 5});
      },
      {"variable_length_attention", "q_offsets ends at 4", "5 (tokens)"});
  expect_throws<std::invalid_argument>(
      [&] {
        packed({0, 3, 5}, {0, 5});
      },
      {"kv_offsets has 2", "3"});
  expect_throws<std::invalid_argument>(
      [&] {
        packed({0, 3, 2, 5}, {0, 1, 2, 5});
      },
      {"q_offsets falls from 3 to 2"});
  expect_throws<std::invalid_argument>([&] { packed({1, 5}, {0, 5}); }, {"q_offsets starts at 1"});
  expect_throws<std::invalid_argument>([&] { packed({}, {}); }, {"q_offsets is empty"});
}

}  // namespace
