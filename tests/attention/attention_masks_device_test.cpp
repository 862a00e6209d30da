// Biases, masks and windows of attention on GPUs, forward and as scores, against the double
// reference.
#include <eigenformer/reference/attention_scores.h>

#include "attention_on_device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
void check_masks(const AttentionCase<T>& c, const Masks& m, const NamedOptions& named) {
  check_forward(c, named, true, [&]<typename B>(const B& bench, ef::AttentionOptions& options) {
    return std::make_unique<DeviceMasks<B>>(bench, m, options);
  });
}

template <typename T>
void check_every_mask() {
  const AttentionShape s{2, 5, 75, 4, 2, 9, 7};
  const auto c = poisoned_case<T>(s, {75, 66}, {5, 3});
  const Masks all(s, 4, {0, 3}), one_head(s, 1, {0, 3});
  const std::span<const float> slopes(test_slopes().data(), 4), sinks(test_sinks().data(), 4);
  const Index row = s.keys, sequence = 4 * s.queries * row;
  check_masks(c, all, {"mask", {.mask = all.mask}});
  check_masks(c, one_head, {"mask of all heads", {.causal = true, .mask = one_head.mask}});
  check_masks(
      c, all,
      {"keys",
       {.mask = ef::ScoreView<std::uint8_t>(all.mask.data(), {1, 1, 1, row}, {0, 0, 0, 1})}});
  check_masks(c, all, {"bias", {.bias = all.bias}});
  check_masks(c, all,
              {"rows backwards",
               {.bias = ef::ScoreView<float>(all.bias.data() + 4 * row, {2, 4, 5, row},
                                             {sequence, 5 * row, -row, 1})}});
  const ef::AttentionOptions bits{.bit_mask = all.bits, .bit_mask_first_keys = all.first_keys};
  check_masks(c, all, {"bits", bits});
  check_masks(c, all,
              {"all",
               {.causal = true,
                .window = 40,
                .softcap = 3.0f,
                .alibi_slopes = slopes,
                .bias = all.bias,
                .mask = all.mask,
                .bit_mask = all.bits,
                .bit_mask_first_keys = all.first_keys,
                .sinks = sinks,
                .prefix_length = 7}});
}

TEST(AttentionMasksOnDevice, EqualTheReference) {
  check_every_mask<float>();
  check_every_mask<ef::half>();
}

// A tree of drafts: bits from the first query on, all earlier keys seen.
TEST(AttentionMasksOnDevice, Trees) {
  const AttentionShape s{2, 5, 75, 2, 1, 8, 8};
  const Masks m(s, 1, {70, 61});
  for (const auto& options : {ef::AttentionOptions{.bit_mask = m.bits},
                              ef::AttentionOptions{.causal = true, .bit_mask = m.bits}}) {
    check_masks(AttentionCase<float>(s, {75, 66}), m, {"tree", options});
    check_masks(AttentionCase<ef::half>(s, {75, 66}), m, {"tree", options});
  }
}

TEST(AttentionMasksOnDevice, WindowsToBothSides) {
  for (const NamedOptions& named :
       std::vector<NamedOptions>{{"window", {.window = 6}},
                                 {"left and right", {.window_left = 3, .window_right = 70}},
                                 {"right", {.window_right = 2, .prefix_length = 5}},
                                 {"left", {.causal = true, .window_left = 4}},
                                 {"own", {.window_left = 0, .window_right = 0}}}) {
    check_forward(AttentionCase<float>({2, 70, 70, 2, 1, 4, 4}, {70, 9}), named);
    check_forward(AttentionCase<ef::half>({2, 70, 70, 2, 1, 8, 8}, {70, 9}), named);
  }
}

// A row of which some splits of 512 keys see nothing, and one that sees nothing at all.
template <typename T>
void check_split_rows() {
  const AttentionShape s{1, 3, 1100, 1, 1, 8, 8};
  const auto c = AttentionCase<T>(s, {1100});
  Masks m(s, 1, {0});
  for (Index j = 0; j < s.keys; ++j) {
    m.mask(0, 0, 0, j) = j < 512 || j >= 1024 ? 0 : 1;
    m.mask(0, 0, 2, j) = j == 1099 ? 1 : 0;
  }
  const std::vector<float> sinks{1.0f};
  check_masks(c, m, {"splits", {.mask = m.mask, .sinks = sinks}});
}
TEST(AttentionMasksOnDevice, SplitsThatNobodySees) {
  check_split_rows<float>();
  check_split_rows<ef::half>();
}

// A mask hides what a bias of -infinity hides, with the same bits; packed rows have those that they
// have alone.
TEST(AttentionMasksOnDevice, OneMaskGivesTheBitsOfAnother) {
  const AttentionShape s{2, 5, 75, 4, 2, 9, 7};
  const auto c = poisoned_case<float>(s, {75, 75}, {5, 5});
  Masks m(s, 4, {0, 0});
  for (Index i = 0; i < m.bias.size(); ++i) m.bias.data()[i] = m.mask.data()[i] == 0 ? kHidden : 0;
  for_each_gpu([&](const auto& bench) {
    using B = std::remove_cvref_t<decltype(bench)>;
    auto q = on_device(bench, c.q), k = on_device(bench, c.k), v = on_device(bench, c.v);
    auto out = on_device(bench, poisoned_tensor<float, 4>({2, 5, 4, 7}));
    const auto run = [&](ef::AttentionOptions options) {
      const DeviceMasks<B> kept(bench, m, options);
      ef::batched_attention_with_padding_into(bench.device, out.view(), q.cview(), k.cview(),
                                              v.cview(), {75, 75}, options);
      return out.host();
    };
    const auto masked = run({.mask = m.mask});
    EXPECT_TRUE(same_bits(masked, run({.bias = m.bias})));
    // row i of the rows of both sequences, in a mask whose rows are packed: every head that of 0
    const ef::AttentionOptions one_head{
        .mask = ef::ScoreView<std::uint8_t>(m.mask.data(), {2, 1, 5, 75}, {4 * 5 * 75, 0, 75, 1})};
    const auto dense = run(one_head);
    ef::Tensor<std::uint8_t, 2> rows(10, 75);
    for (Index r = 0; r < 10; ++r)
      for (Index j = 0; j < 75; ++j) rows(r, j) = m.mask(r / 5, 0, r % 5, j);
    const auto packed_rows = on_device(bench, rows);
    const auto packed_mask = packed_rows.cview();
    const ef::AttentionOptions packed{.mask = packed_mask};
    using View = ef::TensorView<const float, 3>;
    ef::variable_length_attention_into(
        bench.device, ef::TensorView<float, 3>(out.view().data(), 10, 4, 7),
        View(q.cview().data(), 10, 4, 9), View(k.cview().data(), 150, 2, 9),
        View(v.cview().data(), 150, 2, 7), {0, 5, 10}, {0, 75, 150}, packed);
    EXPECT_TRUE(same_bits(dense, out.host()));
  });
}

/// ALiBi of slopes 1/8, 1/4, ... by heads.
struct Tilt {
  template <typename S>
  EIGENFORMER_HOST_DEVICE S operator()(S score, const ef::ScorePosition& at) const {
    return score + static_cast<S>(at.key - at.query) * static_cast<S>(1 + at.head) / 8;
  }
};
template <typename T>
void check_function() {
  const std::vector<float> slopes{0.125f, 0.25f, 0.375f};
  const AttentionCase<T> c({2, 9, 75, 3, 1, 16, 8}, {75, 66});
  const auto expected = c.reference({.causal = true, .alibi_slopes = slopes});
  const auto weights = ef::reference::attention_scores(
      to_double(c.q), to_double(c.k), c.key_lengths, c.query_lengths,
      ef::AttentionScoreStage::probabilities, {.causal = true, .alibi_slopes = slopes});
  for_each_gpu([&](const auto& bench) {
    auto q = on_device(bench, c.q), k = on_device(bench, c.k), v = on_device(bench, c.v);
    auto out = on_device(bench, poisoned_tensor<T, 4>({2, 9, 3, 8}));
    auto p = on_device(bench, poisoned_tensor<float, 4>({2, 3, 9, 75}));
    ef::batched_attention_with_padding_into(bench.device, out.view(), q.cview(), k.cview(),
                                            v.cview(), {75, 66}, {.causal = true},
                                            ef::thread_workspace(), Tilt{});
    ef::attention_scores_into(bench.device, p.view(), q.cview(), k.cview(), {75, 66},
                              ef::AttentionScoreStage::probabilities, {.causal = true},
                              ef::thread_workspace(), Tilt{});
    EXPECT_LT(relative_error(out.host(), expected.output), tolerance<T>());
    EXPECT_LT(relative_error(p.host(), weights), 1e-6);
  });
}
TEST(AttentionMasksOnDevice, FunctionsOfScores) {
  check_function<float>();
  check_function<ef::half>();
}

TEST(AttentionMasksOnDevice, Scores) {
  const AttentionShape s{2, 5, 75, 4, 2, 9, 7};
  const auto c = poisoned_case<float>(s, {75, 66}, {5, 3});
  const Masks m(s, 4, {0, 3});
  for (const auto stage :
       {ef::AttentionScoreStage::masked, ef::AttentionScoreStage::probabilities}) {
    const ef::AttentionOptions options{.bias = m.bias,
                                       .mask = m.mask,
                                       .bit_mask = m.bits,
                                       .bit_mask_first_keys = m.first_keys,
                                       .query_lengths = c.query_lengths};
    const auto expected = ef::reference::attention_scores(
        to_double(c.q), to_double(c.k), c.key_lengths, c.query_lengths, stage, options);
    for_each_device([&](const auto& bench) {
      using B = std::remove_cvref_t<decltype(bench)>;
      auto q = on_device(bench, c.q), k = on_device(bench, c.k);
      auto out = on_device(bench, poisoned_tensor<float, 4>({2, 4, 5, 75}));
      auto here = options;
      const DeviceMasks<B> kept(bench, m, here);
      ef::attention_scores_into(bench.device, out.view(), q.cview(), k.cview(), c.key_lengths,
                                stage, here);
      const auto got = out.host();
      for (Index i = 0; i < got.size(); ++i) {
        const double e = expected.data()[i];
        if (std::isinf(e))
          ASSERT_EQ(static_cast<double>(got.data()[i]), e) << i;
        else
          ASSERT_NEAR(static_cast<double>(got.data()[i]), e, 1e-5) << i;
      }
    });
  }
}

}  // namespace
