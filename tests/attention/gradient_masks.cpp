// Gradients of attention under what hides keys and moves scores, and of a loss that depends on
// log_sum_exp; the same bits on any number of threads where one KV head is all there is.
#include "gradient_case.h"
#include "infinity.h"

using namespace eigenformer_test;

namespace {

/// Biases, masks and bits that hide one key in four, and all keys of row 1.
struct Masks {
  ef::Tensor<float, 4> bias;          // (1, heads, rows, keys)
  ef::Tensor<bool, 3> mask;           // (batch, rows, keys)
  ef::Tensor<std::uint64_t, 2> bits;  // (batch * rows, words)

  explicit Masks(const AttentionShape& s)
      : bias(random_tensor<float, 4>({1, s.heads, s.queries, s.keys}, 5)),
        mask(s.batch, s.queries, s.keys),
        bits(s.batch * s.queries, (s.keys + 63) / 64) {
    std::mt19937_64 generator(6);
    for (Index i = 0; i < bias.size(); ++i)
      if (generator() % 4 == 0 || i / s.keys % s.queries == 1) bias.data()[i] = -kInfinity;
    for (Index i = 0; i < mask.size(); ++i)
      mask.data()[i] = generator() % 4 != 0 && i / s.keys % s.queries != 1;
    for (Index i = 0; i < bits.size(); ++i) bits.data()[i] = generator() | generator();
  }
};

template <typename T>
void check_every_mask(GradientCase<T> c, double element_factor = kElementFactor<T>) {
  const Masks masks(c.shape);
  const std::vector<int> first_keys(static_cast<std::size_t>(c.shape.batch), 3);
  const std::span<const float> sinks(test_sinks().data(), static_cast<std::size_t>(c.shape.heads));
  const auto check = [&](const char* name, const ef::AttentionOptions& options) {
    check_against_definition(c, {name, options}, tolerance<T>(), element_factor);
  };
  check("window to both sides", {.window = 7});
  check("left and right", {.window_left = 70, .window_right = 3, .prefix_length = 2});
  check("bias", {.softcap = 2.0f, .bias = masks.bias, .sinks = sinks});
  check("mask", {.causal = true, .mask = masks.mask});
  check("bits", {.bit_mask = masks.bits, .bit_mask_first_keys = first_keys});
  check("all", {.causal = true,
                .window = 66,
                .bias = masks.bias,
                .mask = masks.mask,
                .bit_mask = masks.bits,
                .bit_mask_first_keys = first_keys,
                .sinks = sinks,
                .prefix_length = 3});
}

TEST(AttentionGradients, AreTheDefinitionUnderMasks) {
  check_every_mask(GradientCase<double>({2, 75, 75, 4, 2, 5, 7}, {75, 66}));
  check_every_mask(GradientCase<float>({1, 5, 140, 2, 1, 8, 8}, {139}));
  check_every_mask(GradientCase<ef::bfloat16>({2, 75, 75, 4, 2, 40, 33}, {75, 66}));
  GradientCase<float> large({1, 9, 75, 2, 1, 8, 8}, {75});  // scores that are taken in double
  for (Index i = 0; i < large.q.size(); ++i) large.q.data()[i] *= 50.0f;
  check_every_mask(large, 3);
}

TEST(AttentionGradients, AreNotReachedByWhatAMaskHides) {
  GradientCase<float> c({1, 70, 70, 2, 1, 8, 9}, {70});
  ef::Tensor<bool, 2> mask(70, 70);
  mask.setConstant(true);
  for (Index i = 0; i < 70; ++i) mask(i, 5) = mask(i, 66) = mask(17, i) = false;
  const auto clean = c.gradients(Eigen::DefaultDevice{}, {.mask = mask});
  for (Index d = 0; d < 8; ++d) {
    c.k(0, 5, 0, d) = c.v(0, 66, 0, d) = std::numeric_limits<float>::quiet_NaN();
    c.q(0, 17, 1, d) = c.weights(0, 17, 0, d) = kInfinity;
  }
  const auto g = c.gradients(Eigen::DefaultDevice{}, {.mask = mask});
  EXPECT_TRUE(same_bits(g.grad_q, clean.grad_q) && same_bits(g.grad_k, clean.grad_k) &&
              same_bits(g.grad_v, clean.grad_v));
  EXPECT_EQ(g.grad_k(0, 5, 0, 0), 0.0f);
  EXPECT_EQ(g.grad_v(0, 66, 0, 0), 0.0f);
  EXPECT_EQ(g.grad_q(0, 17, 1, 0), 0.0f);
}

TEST(AttentionGradients, HaveTheSameBitsOnAnyThreadsWhereOneHeadIsAll) {
  GradientCase<float> c({1, 210, 210, 2, 1, 8, 24}, {205});  // three bands of 96 positions
  const ef::AttentionOptions options{.causal = true, .window = 150};
  const auto alone = c.gradients(Eigen::DefaultDevice{}, options);
  for (const int threads : {2, 5}) {
    Threads pool(threads);
    const auto g = c.gradients(pool.device, options);
    EXPECT_TRUE(same_bits(g.grad_q, alone.grad_q) && same_bits(g.grad_k, alone.grad_k) &&
                same_bits(g.grad_v, alone.grad_v))
        << threads;
  }
}

// One projection holds q, k and v, another tensor their gradients: the bits are those of copies.
TEST(AttentionGradients, ReadAndWritePartsOfOneProjection) {
  constexpr Index kHeads = 4, kKvHeads = 2, kDim = 8, kColumns = (kHeads + 2 * kKvHeads) * kDim;
  const auto qkv = random_tensor<float, 3>({2, 70, kColumns}, 1);
  auto grad_qkv = poisoned_tensor<float, 3>({2, 70, kColumns});
  GradientCase<float> c({2, 70, 70, kHeads, kKvHeads, kDim, kDim}, {70, 40});
  const auto parts = [](auto& x, auto&& f) {
    f(ef::heads_of(x, 0, kHeads, kDim), ef::heads_of(x, kHeads * kDim, kKvHeads, kDim),
      ef::heads_of(x, (kHeads + kKvHeads) * kDim, kKvHeads, kDim));
  };
  const auto copy = [](const auto& view, ef::Tensor<float, 4>& to) {
    for (Index t = 0; t < 140; ++t)
      for (Index h = 0; h < view.dimension(2); ++h)
        std::copy_n(view.data() + t * view.token_stride() + h * view.head_stride(), kDim,
                    to.data() + (t * view.dimension(2) + h) * kDim);
  };
  const ef::AttentionOptions options{.causal = true};
  ef::AttentionGradients<float, 4> expected{c.q, c.k, c.v}, found = expected;
  parts(qkv, [&](auto q, auto k, auto v) {
    copy(q, c.q), copy(k, c.k), copy(v, c.v);
    expected = c.gradients(Eigen::DefaultDevice{}, options);
    parts(grad_qkv, [&](auto grad_q, auto grad_k, auto grad_v) {
      ef::attention_backward_into(Eigen::DefaultDevice{}, grad_q, grad_k, grad_v, c.weights, q, k,
                                  v, c.out, c.lse, c.key_lengths, options);
      copy(grad_q, found.grad_q), copy(grad_k, found.grad_k), copy(grad_v, found.grad_v);
    });
  });
  EXPECT_TRUE(same_bits(found.grad_q, expected.grad_q) &&
              same_bits(found.grad_k, expected.grad_k) && same_bits(found.grad_v, expected.grad_v));
}

/// loss(out) + the sum of lse_weights * log_sum_exp.
double loss_with_lse(GradientCase<double>& c, ef::AttentionOptions options,
                     const ef::Tensor<double, 3>& lse_weights) {
  options.log_sum_exp = c.lse;
  double sum = c.loss(options);
  for (Index i = 0; i < c.lse.size(); ++i)
    if (std::isfinite(c.lse.data()[i])) sum += lse_weights.data()[i] * c.lse.data()[i];
  return sum;
}

TEST(AttentionGradients, OfLogSumExpAreTheDerivative) {
  GradientCase<double> c({2, 7, 9, 4, 2, 3, 5}, {9, 4});
  const auto lse_weights = random_tensor<double, 3>({2, 4, 7}, 9);
  const std::span<const float> sinks(test_sinks().data(), 4);
  for (const bool every : {false, true}) {
    ef::AttentionOptions options{.causal = true};
    std::vector<float> sinks_gradient(4);
    if (every) {
      options = {.causal = true, .window = 4, .softcap = 2.0f, .sinks = sinks};
      options.sinks_gradient = sinks_gradient;
    }
    options.log_sum_exp_gradient = lse_weights;
    const auto g = c.gradients(Eigen::DefaultDevice{}, options);
    const auto check = [&](ef::Tensor<double, 4>& x, const ef::Tensor<double, 4>& gradient) {
      for (Index i = 0; i < x.size(); ++i) {
        if (std::isnan(x.data()[i])) continue;
        const double step = 1e-5, kept = x.data()[i];
        x.data()[i] = kept + step;
        const double above = loss_with_lse(c, options, lse_weights);
        x.data()[i] = kept - step;
        const double below = loss_with_lse(c, options, lse_weights),
                     expected = (above - below) / (2 * step);
        x.data()[i] = kept;
        ASSERT_NEAR(gradient.data()[i], expected, 1e-7 * (1 + std::abs(expected))) << i;
      }
    };
    check(c.q, g.grad_q);
    check(c.k, g.grad_k);
    check(c.v, g.grad_v);
    const auto expected = ef::reference::attention_backward(c.weights, c.q, c.k, c.v, c.key_lengths,
                                                            c.query_lengths, options, &lse_weights);
    EXPECT_TRUE(within(g.grad_q, expected.grad_q, 1e-12));
    EXPECT_TRUE(within(g.grad_k, expected.grad_k, 1e-12));
    for (std::size_t h = 0; h < (every ? 4u : 0u); ++h)
      EXPECT_NEAR(sinks_gradient[h], expected.grad_sinks[h], 1e-6) << h;
  }
  const ef::Tensor<double, 3> narrow(2, 4, 6);
  expect_throws<std::invalid_argument>(
      [&] { c.gradients(Eigen::DefaultDevice{}, {.log_sum_exp_gradient = narrow}); },
      {"log_sum_exp_gradient has shape (2, 4, 6), expected (2, 4, 7)"});
}

}  // namespace
