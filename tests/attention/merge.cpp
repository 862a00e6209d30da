// Attention over parts of the keys, merged, is attention over all of them; what merging refuses.
#include "attention_case.h"

using namespace eigenformer_test;

namespace {

/// Output and log_sum_exp of queries against keys [first, last) of one sequence.
template <typename T>
struct Part {
  ef::Tensor<T, 4> output;
  ef::Tensor<float, 3> log_sum_exp;

  Part(const AttentionCase<T>& c, Index first, Index last, ef::AttentionOptions options)
      : output(1, c.shape.queries, c.shape.heads, c.shape.value_dim),
        log_sum_exp(1, c.shape.heads, c.shape.queries) {
    const auto keys = [&](const ef::Tensor<T, 4>& from) {
      return ef::TensorView<const T, 4>(&from(0, first, 0, 0), 1, last - first, c.shape.kv_heads,
                                        from.dimension(3));
    };
    options.log_sum_exp = log_sum_exp;
    options.query_lengths = {c.shape.queries};
    ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, output, c.q, keys(c.k),
                                            keys(c.v), {last - first}, options);
  }
};

// Causal, the queries are the last positions: keys before them are seen by all, in any number of
// parts; the part with the queries' own keys is causal. Sinks are in one part.
template <typename T>
void check_split(const ef::AttentionOptions& options, double bound) {
  const Index queries = 5, keys = 200;
  const AttentionCase<T> c({1, queries, keys, 4, 2, 16, 24}, {keys});
  const Part<T> whole(c, 0, keys, options);
  auto shared = options, own = options;
  shared.causal = false;
  own.sinks = {};
  const Part<T> first(c, 0, 70, shared), last(c, 70, keys, own);
  const auto merged =
      ef::merge_attention_states(first.output, first.log_sum_exp, last.output, last.log_sum_exp);
  EXPECT_LT(relative_error(merged.output, to_double(whole.output)), bound);
  EXPECT_LT(relative_error(merged.log_sum_exp, to_double(whole.log_sum_exp)), 1e-6);
  shared.sinks = {};
  const Part<T> second(c, 70, 130, shared), third(c, 130, keys, own);
  Threads threads(2);
  const std::array states{ef::AttentionStateView(first.output, first.log_sum_exp),
                          ef::AttentionStateView(second.output, second.log_sum_exp),
                          ef::AttentionStateView(third.output, third.log_sum_exp)};
  const auto three = ef::merge_attention_states(threads.device, states);
  EXPECT_LT(relative_error(three.output, to_double(whole.output)), bound);
  EXPECT_LT(relative_error(three.log_sum_exp, to_double(whole.log_sum_exp)), 1e-6);
}

TEST(AttentionMerge, OfPartsIsTheWhole) {
  const std::span<const float> sinks(test_sinks().data(), 4);
  check_split<float>({}, 1e-5);
  check_split<float>({.causal = true, .softcap = 2.0f, .sinks = sinks}, 1e-5);
  check_split<ef::bfloat16>({.causal = true, .sinks = sinks}, 1e-2);
}

// Long lines, for the tails of every vector and for threads.
TEST(AttentionMerge, SameBitsOnThreadsAndWithinToleranceOnEveryIsa) {
  const Index rows = 400, width = 37;
  const auto a = random_tensor<float, 3>({rows, 3, width}, 1),
             b = random_tensor<float, 3>({rows, 3, width}, 2);
  const auto lse_a = random_tensor<float, 2>({3, rows}, 3),
             lse_b = random_tensor<float, 2>({3, rows}, 4);
  const auto expected = ef::merge_attention_states(a, lse_a, b, lse_b);
  Threads threads(3);
  const auto shared = ef::merge_attention_states(threads.device, a, lse_a, b, lse_b);
  EXPECT_TRUE(same_bits(shared.output, expected.output));
  EXPECT_TRUE(same_bits(shared.log_sum_exp, expected.log_sum_exp));
  for_each_isa([&](auto isa) {
    const auto got = ef::merge_attention_states(on(isa), a, lse_a, b, lse_b);
    EXPECT_LT(relative_error(got.output, to_double(expected.output)), 1e-6);
    EXPECT_TRUE(same_bits(got.log_sum_exp, expected.log_sum_exp));
  });
}

TEST(AttentionMerge, OfNoStatesIsZero) {
  auto out = poisoned_tensor<float, 3>({2, 3, 4});
  auto lse = poisoned_tensor<float, 2>({3, 2});
  ef::merge_attention_states_into(Eigen::DefaultDevice{}, out, lse,
                                  std::vector<ef::AttentionStateView<float, 3>>{});
  for (Index i = 0; i < out.size(); ++i) EXPECT_EQ(out.data()[i], 0.0f);
  for (Index i = 0; i < lse.size(); ++i) EXPECT_EQ(lse.data()[i], -INFINITY);
}

TEST(AttentionMerge, RefusesShapesThatDiffer) {
  const ef::Tensor<float, 4> a(2, 3, 4, 8), narrow(2, 3, 4, 7);
  const ef::Tensor<float, 3> lse(2, 4, 3), turned(2, 3, 4);
  ef::Tensor<float, 4> out(2, 3, 4, 8);
  const auto refuses = [&](auto&& call, const std::vector<std::string>& words) {
    out.setConstant(7.0f);
    expect_throws<std::invalid_argument>(call, words);
    for (Index i = 0; i < out.size(); ++i) ASSERT_EQ(out.data()[i], 7.0f);
  };
  const Eigen::DefaultDevice device;
  refuses([&] { ef::merge_attention_states_into(device, out, {}, a, lse, narrow, lse); },
          {"merge_attention_states", "output 1 has shape (2, 3, 4, 7)", "(2, 3, 4, 8)"});
  refuses([&] { ef::merge_attention_states_into(device, out, {}, a, turned, a, lse); },
          {"log_sum_exp 0 has shape (2, 3, 4)", "heads before rows of output (2, 3, 4, 8)"});
  ef::Tensor<float, 3> merged(2, 3, 4);
  refuses([&] { ef::merge_attention_states_into(device, out, merged, a, lse, a, lse); },
          {"log_sum_exp has shape (2, 3, 4)", "(2, 4, 3)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::merge_attention_states(std::vector<ef::AttentionStateView<float, 4>>{}); },
      {"no states"});
}

}  // namespace
