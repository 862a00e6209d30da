// Gradients of attention on GPUs, against the formulas in double.
#include "attention_on_device.h"
#include "gradient_case.h"

using namespace eigenformer_test;

namespace {

template <typename T>
struct Found {
  ef::Tensor<T, 4> grad_q, grad_k, grad_v;
  std::vector<float> grad_sinks;
};

/// The gradients of a case on a device; what is padding holds NaN, what is written held NaN.
template <typename T, typename B, typename Keep = decltype(kAsTheyAre)>
Found<T> gradients_on(const B& bench, const GradientCase<T>& c, ef::AttentionOptions options,
                      const Keep& keep = kAsTheyAre) {
  const AttentionShape& s = c.shape;
  auto grad_out = c.weights;
  for (Index b = 0; b < s.batch; ++b)
    for (Index i = c.query_lengths[static_cast<std::size_t>(b)]; i < s.queries; ++i)
      std::fill_n(&grad_out(b, i, 0, 0), s.heads * s.value_dim,
                  std::numeric_limits<T>::quiet_NaN());
  std::vector<float> grad_sinks(options.sinks.size(), 7.0f);
  options.sinks_gradient = grad_sinks;
  if (s.queries != s.keys || c.query_lengths != c.key_lengths)
    options.query_lengths = c.query_lengths;
  [[maybe_unused]] const auto kept = keep(bench, options);
  auto q = on_device(bench, c.q);
  auto k = on_device(bench, c.k);
  auto v = on_device(bench, c.v);
  auto g = on_device(bench, grad_out);
  auto out = on_device(bench, poisoned_tensor<T, 4>({s.batch, s.queries, s.heads, s.value_dim}));
  auto lse =
      on_device(bench, poisoned_tensor<ef::compute_type<T>, 3>({s.batch, s.heads, s.queries}));
  auto gq = on_device(bench, poisoned_tensor<T, 4>({s.batch, s.queries, s.heads, s.head_dim}));
  auto gk = on_device(bench, poisoned_tensor<T, 4>({s.batch, s.keys, s.kv_heads, s.head_dim}));
  auto gv = on_device(bench, poisoned_tensor<T, 4>({s.batch, s.keys, s.kv_heads, s.value_dim}));
  ef::attention_backward_into(bench.device, gq.view(), gk.view(), gv.view(), g.cview(), q.cview(),
                              k.cview(), v.cview(), out.cview(), lse.cview(), c.key_lengths,
                              options);
  return {gq.host(), gk.host(), gv.host(), grad_sinks};
}

template <typename T, typename Keep = decltype(kAsTheyAre)>
void check(const GradientCase<T>& c, const NamedOptions& named, double bound = tolerance<T>(),
           const Keep& keep = kAsTheyAre) {
  SCOPED_TRACE(named.name);
  ef::AttentionOptions options = named.options;
  const auto expected = c.reference_gradients(options);
  for_each_gpu([&](const auto& bench) {
    const auto found = gradients_on(bench, c, options, keep);
    EXPECT_LE(relative_error(found.grad_q, expected.grad_q), bound);
    EXPECT_LE(relative_error(found.grad_k, expected.grad_k), bound);
    EXPECT_LE(relative_error(found.grad_v, expected.grad_v), bound);
    for (std::size_t h = 0; h < found.grad_sinks.size(); ++h)
      EXPECT_NEAR(found.grad_sinks[h], expected.grad_sinks[h],
                  std::max(bound, 1e-6) * (1 + std::abs(expected.grad_sinks[h])))
          << h;
  });
}

TEST(AttentionBackwardOnDevice, EqualsTheFormulasForEveryOption) {
  const GradientCase<float> c({1, 67, 67, 2, 1, 5, 7}, {66});
  for (const NamedOptions& named : option_sweep(2)) check(c, named);
}

TEST(AttentionBackwardOnDevice, EveryScalar) {
  const NamedOptions causal{"causal", {.causal = true}}, all = option_sweep(2).back();
  check(GradientCase<double>({1, 65, 65, 2, 1, 9, 4}, {65}), causal);
  check(GradientCase<ef::half>({1, 65, 65, 2, 1, 17, 33}, {65}), all);
  check(GradientCase<ef::half>({1, 9, 9, 4, 2, 32, 16}, {8}), causal);
  check(GradientCase<ef::bfloat16>({1, 65, 65, 2, 2, 8, 7}, {65}), all);
}

TEST(AttentionBackwardOnDevice, Lengths) {
  const NamedOptions plain{"plain", {}}, window{"window", {.causal = true, .window = 3}},
      prefix{"prefix", {.causal = true, .prefix_length = 2}};
  for (const NamedOptions& named : {plain, window, prefix}) {
    check(GradientCase<float>({3, 4, 4, 2, 1, 3, 2}, {4, 0, 3}), named);  // padded
    check(GradientCase<float>({2, 5, 3, 1, 1, 3, 2}, {3, 0}), named);     // more queries
    check(GradientCase<float>({2, 3, 130, 1, 1, 3, 2}, {130, 65}), named);
    check(GradientCase<float>({1, 130, 3, 1, 1, 3, 2}, {3}), named);
    check(GradientCase<float>({1, 0, 4, 2, 1, 3, 2}, {4}), named);
    check(GradientCase<float>({1, 2, 0, 2, 1, 3, 2}, {0}), named);
  }
  for (Index length : {1, 64, 129})
    check(GradientCase<float>({1, length, length, 1, 1, 4, 4}, {length}), window);
  for (Index width : {1, 31, 32, 65})
    check(GradientCase<float>({1, 3, 3, 1, 1, width, width}, {3}), plain);
}

// Pairs that masks hide take no part, whatever they hold.
template <typename T>
void check_masks() {
  const AttentionShape s{2, 5, 75, 2, 1, 9, 7};
  const Masks m(s, 2, {0, 3});
  GradientCase<T> c(s, {75, 66});
  poison_hidden(c);
  const std::span<const float> sinks(test_sinks().data(), 2);
  const auto keep = [&]<typename B>(const B& bench, ef::AttentionOptions& options) {
    return std::make_unique<DeviceMasks<B>>(bench, m, options);
  };
  check(c, {"bias", {.softcap = 2.0f, .bias = m.bias}}, tolerance<T>(), keep);
  check(c,
        {"all",
         {.causal = true,
          .window_left = 60,
          .mask = m.mask,
          .bit_mask = m.bits,
          .bit_mask_first_keys = m.first_keys,
          .sinks = sinks}},
        tolerance<T>(), keep);
}
TEST(AttentionBackwardOnDevice, Masks) {
  check_masks<float>();
  check_masks<ef::half>();
  check(GradientCase<float>({1, 70, 70, 1, 1, 4, 4}, {70}), {"window", {.window = 6}});
}

// A loss that takes log_sum_exp as well.
template <typename T>
void check_log_sum_exp_gradient() {
  const GradientCase<T> c({2, 7, 75, 2, 1, 9, 5}, {75, 4});
  const auto lse_gradient = random_tensor<float, 3>({2, 2, 7}, 9);
  const auto wide = to_double(lse_gradient);
  const std::span<const float> sinks(test_sinks().data(), 2);
  const ef::AttentionOptions options{.causal = true, .softcap = 2.0f, .sinks = sinks};
  const auto expected = ef::reference::attention_backward(
      to_double(c.weights), to_double(c.q), to_double(c.k), to_double(c.v), c.key_lengths,
      c.query_lengths, options, &wide);
  for_each_gpu([&](const auto& bench) {
    const auto found =
        gradients_on(bench, c, options, [&](const auto& here, ef::AttentionOptions& changed) {
          using B = std::remove_cvref_t<decltype(here)>;
          auto kept = std::make_unique<DeviceTensor<B, float, 3>>(here, lse_gradient);
          const auto view = kept->cview();
          changed.log_sum_exp_gradient = view;
          return kept;
        });
    EXPECT_LE(relative_error(found.grad_q, expected.grad_q), tolerance<T>());
    EXPECT_LE(relative_error(found.grad_k, expected.grad_k), tolerance<T>());
    EXPECT_LE(relative_error(found.grad_v, expected.grad_v), tolerance<T>());
    for (std::size_t h = 0; h < 2; ++h)
      EXPECT_NEAR(found.grad_sinks[h], expected.grad_sinks[h], tolerance<T>() * 10) << h;
  });
}
TEST(AttentionBackwardOnDevice, GradientOfLogSumExp) {
  check_log_sum_exp_gradient<float>();
  check_log_sum_exp_gradient<ef::half>();
}

// q, k and v, and their gradients, as parts of a tensor (batch, seq, heads, 3, width): the bits of
// tensors of their own.
template <typename T>
void check_one_projection() {
  constexpr Index rows = 5, heads = 2, width = 8;
  const GradientCase<T> c({2, rows, rows, heads, heads, width, width}, {rows, 3});
  ef::Tensor<T, 5> stacked(2, rows, heads, 3, width);
  const auto line = [&](auto& tensor, Index part, Index i) {
    return tensor.data() + (i * 3 + part) * width;
  };
  for (Index i = 0; i < 2 * rows * heads; ++i) {
    std::copy_n(c.q.data() + i * width, width, line(stacked, 0, i));
    std::copy_n(c.k.data() + i * width, width, line(stacked, 1, i));
    std::copy_n(c.v.data() + i * width, width, line(stacked, 2, i));
  }
  const ef::AttentionOptions options{.causal = true};
  for_each_gpu([&](const auto& bench) {
    const auto expected = gradients_on(bench, c, options);
    auto grad_out = c.weights;
    std::fill_n(&grad_out(1, 3, 0, 0), 2 * heads * width, std::numeric_limits<T>::quiet_NaN());
    auto g = on_device(bench, grad_out);
    auto qkv = on_device(bench, stacked);
    auto gradients = on_device(bench, poisoned_tensor<T, 5>({2, rows, heads, 3, width}));
    auto lse = on_device(bench, poisoned_tensor<ef::compute_type<T>, 3>({2, heads, rows}));
    const auto parts = qkv.cview();
    const auto to = gradients.view();
    auto gq = ef::heads_of(to, 0, 3), gk = ef::heads_of(to, 1, 3), gv = ef::heads_of(to, 2, 3);
    ef::attention_backward_into(bench.device, gq, gk, gv, g.cview(), ef::heads_of(parts, 0, 3),
                                ef::heads_of(parts, 1, 3), ef::heads_of(parts, 2, 3), g.cview(),
                                lse.cview(), {rows, 3}, options);
    const auto found = gradients.host();
    const ef::Tensor<T, 4>* const wanted[]{&expected.grad_q, &expected.grad_k, &expected.grad_v};
    for (Index part = 0; part < 3; ++part)
      for (Index i = 0; i < 2 * rows * heads; ++i)
        EXPECT_EQ(
            std::memcmp(line(found, part, i), wanted[part]->data() + i * width, width * sizeof(T)),
            0)
            << part << ' ' << i;
  });
}
TEST(AttentionBackwardOnDevice, PartsOfOneProjection) {
  check_one_projection<float>();
  check_one_projection<ef::half>();
}

// Small gradients of half lose nothing, and large ones nothing either.
TEST(AttentionBackwardOnDevice, TheRangeOfHalf) {
  for (const float size : {1e-3f, 500.0f}) {
    GradientCase<ef::half> c({1, 66, 66, 1, 1, 16, 64}, {66});
    for (Index i = 0; i < c.weights.size(); ++i)
      c.weights.data()[i] = static_cast<ef::half>(static_cast<float>(c.weights.data()[i]) * size);
    check(c, {"size " + std::to_string(size), {}});
  }
}

TEST(AttentionBackwardOnDevice, LargeScores) {
  const std::vector<float> sinks{1e6f, 999999.0f};
  for (const float scale : {8e5f, 48.0f}) {
    GradientCase<float> c({1, 70, 70, 2, 1, 3, 8}, {70});
    set_exact_scores<float>(c);
    check(c, {"scale " + std::to_string(scale), {.causal = true, .scale = scale}});
    check(c, {"sinks, scale " + std::to_string(scale), {.scale = scale, .sinks = sinks}});
  }
  const std::vector<float> slopes{100.0f, 1.5f};
  GradientCase<float> c({1, 70, 70, 2, 1, 24, 19}, {70});
  for (Index x = 0; x < c.q.size(); ++x) c.q.data()[x] *= 10;
  check(c, {"softcap and slopes", {.softcap = 1e3f, .scale = 1.0f, .alibi_slopes = slopes}});
}

// The second sequence of a batch, alone and packed, gives the same bits.
TEST(AttentionBackwardOnDevice, BitsDoNotDependOnBatchOrPacking) {
  const GradientCase<float> c({2, 70, 70, 2, 1, 12, 5}, {70, 66});
  const auto options = option_sweep(2).back().options;
  for_each_gpu([&](const auto& bench) {
    const auto together = gradients_on(bench, c, options);
    const auto rows_of = [&](const ef::Tensor<float, 4>& tensor) {
      ef::Tensor<float, 3> rows(66, tensor.dimension(2), tensor.dimension(3));
      std::copy_n(&tensor(1, 0, 0, 0), rows.size(), rows.data());
      return rows;
    };
    auto q = on_device(bench, rows_of(c.q));
    auto k = on_device(bench, rows_of(c.k));
    auto v = on_device(bench, rows_of(c.v));
    auto g = on_device(bench, rows_of(c.weights));
    auto lse = on_device(bench, poisoned_tensor<float, 2>({2, 66}));
    auto gq = on_device(bench, poisoned_tensor<float, 3>({66, 2, 12}));
    auto gk = on_device(bench, poisoned_tensor<float, 3>({66, 1, 12}));
    auto gv = on_device(bench, poisoned_tensor<float, 3>({66, 1, 5}));
    ef::variable_length_attention_backward_into(
        bench.device, gq.view(), gk.view(), gv.view(), g.cview(), q.cview(), k.cview(), v.cview(),
        g.cview(), lse.cview(), {0, 0, 66, 66}, {0, 0, 66, 66}, options);
    EXPECT_TRUE(same_bits(gq.host(), rows_of(together.grad_q)));
    EXPECT_TRUE(same_bits(gk.host(), rows_of(together.grad_k)));
    EXPECT_TRUE(same_bits(gv.host(), rows_of(together.grad_v)));
  });
}

// NaN in a key that row 66 alone sees (window 1): its row, its key and nothing else.
template <typename T>
void check_reach() {
  for (const bool in_query : {false, true}) {
    const GradientCase<T> clean({1, 68, 68, 1, 1, 16, 16}, {68});
    auto dirty = clean;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    (in_query ? dirty.q : dirty.k)(0, 66, 0, 3) = nan;
    (in_query ? dirty.weights : dirty.v)(0, 5, 0, 3) = nan;
    const ef::AttentionOptions options{.causal = true, .window = 1};
    for_each_gpu([&](const auto& bench) {
      const auto a = gradients_on(bench, clean, options), b = gradients_on(bench, dirty, options);
      for (Index i = 0; i < 68; ++i) {
        const bool reached = i == 66 || i == 5;
        for (const Index d : {0, 3, 15}) {
          const auto same = [&](const auto& x, const auto& y) {
            return std::memcmp(&x(0, i, 0, d), &y(0, i, 0, d), sizeof(T)) == 0;
          };
          EXPECT_TRUE(reached || (same(a.grad_q, b.grad_q) && same(a.grad_k, b.grad_k) &&
                                  same(a.grad_v, b.grad_v)))
              << i << ' ' << d;
          EXPECT_EQ(reached, std::isnan(static_cast<float>(b.grad_q(0, i, 0, d))));
        }
      }
    });
  }
}
TEST(AttentionBackwardOnDevice, NaNReachesOnlyWhatItTakesPartIn) {
  check_reach<float>();
  check_reach<ef::half>();
}

// A row of NaN among them leaves the small gradients of half rows what they are.
TEST(AttentionBackwardOnDevice, NaNKeepsTheRangeOfHalf) {
  GradientCase<ef::half> c({1, 66, 66, 1, 1, 16, 16}, {66});
  for (Index i = 0; i < c.q.size(); ++i) {
    c.q.data()[i] = static_cast<ef::half>(static_cast<float>(c.q.data()[i]) * 0x1p-7f);
    c.weights.data()[i] = static_cast<ef::half>(static_cast<float>(c.weights.data()[i]) * 0x1p-16f);
  }
  const ef::AttentionOptions options{.scale = 32.0f};
  auto expected = c.reference_gradients(options).grad_q;
  for (Index d = 0; d < 16; ++d) {
    c.q(0, 5, 0, d) = std::numeric_limits<ef::half>::quiet_NaN();
    expected(0, 5, 0, d) = 0;
  }
  for_each_gpu([&](const auto& bench) {
    auto found = gradients_on(bench, c, options).grad_q;
    for (Index d = 0; d < 16; ++d) {
      EXPECT_TRUE(std::isnan(static_cast<float>(found(0, 5, 0, d))));
      found(0, 5, 0, d) = static_cast<ef::half>(0.0f);
    }
    EXPECT_LE(relative_error(found, expected), tolerance<ef::half>());
  });
}

// Rows that see no key, or whose scores are all -infinity, give nothing whatever they hold.
TEST(AttentionBackwardOnDevice, SilentRows) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> sinks{0.5f};
  const ef::AttentionOptions options{.causal = true, .sinks = sinks};
  GradientCase<float> c({1, 6, 3, 1, 1, 8, 8}, {3});
  GradientCase<float> dirty = c;
  for (Index i = 0; i < 3; ++i)
    for (Index d = 0; d < 8; ++d) dirty.q(0, i, 0, d) = dirty.weights(0, i, 0, d) = nan;
  GradientCase<float> infinite({1, 2, 2, 1, 1, 1, 1}, {2});
  infinite.q.setConstant(1e20f), infinite.k.setConstant(-1e20f), infinite.weights.setConstant(nan);
  for_each_gpu([&](const auto& bench) {
    const auto a = gradients_on(bench, c, options), b = gradients_on(bench, dirty, options),
               none = gradients_on(bench, infinite, options);
    EXPECT_TRUE(same_bits(a.grad_q, b.grad_q) && same_bits(a.grad_k, b.grad_k) &&
                same_bits(a.grad_v, b.grad_v));
    EXPECT_EQ(a.grad_sinks, b.grad_sinks);
    for (Index d = 0; d < 8; ++d) EXPECT_EQ(b.grad_q(0, 1, 0, d), 0.0f);
    for (Index i = 0; i < 2; ++i)
      EXPECT_TRUE(none.grad_q(0, i, 0, 0) == 0 && none.grad_k(0, i, 0, 0) == 0 &&
                  none.grad_v(0, i, 0, 0) == 0);
    EXPECT_EQ(none.grad_sinks[0], 0.0f);
  });
}

}  // namespace
