// Experts against plain double, in every stored scalar and on every ISA; a token has the same bits
// alone, in any batch and on any number of threads, and its NaN is its own; k of all experts, one
// that all tokens share, experts without tokens, no tokens.
#include "expert_support.h"

#include <eigenformer/parallel_region.h>

#include "allocations.h"

using namespace eigenformer_test;

namespace {

constexpr Index kIn = 40, kHidden = 24;
const auto as_it_is = [](const ef::Tensor<float, 2>& x) { return x; };

template <typename T>
ef::Tensor<float, 2> random_weights(Index tokens, Index k) {
  auto weights = random_tensor<float, 2>({tokens, k}, 5);
  for (Index i = 0; i < weights.size(); ++i) weights.data()[i] = std::abs(weights.data()[i]);
  return weights;
}

template <typename T, typename S>
void expect_reference(double bound, const ef::PackingOptions<S>& options = {}) {
  for (const auto [tokens, experts, k, one] : {std::array<Index, 4>{1, 5, 2, -1},
                                               {9, 5, 2, -1},
                                               {33, 3, 3, -1},
                                               {20, 7, 1, 4},
                                               // more rows than are multiplied together, of one
                                               // expert and of two
                                               {200, 3, 2, 0},
                                               {0, 3, 2, -1}}) {
    const RandomExperts random(experts, kIn, kHidden);
    const auto x = random_tensor<T, 2>({tokens, kIn}, 7);
    const auto ids = some_experts(tokens, k, experts, one);
    const auto weights = random_weights<T>(tokens, k);
    ef::Tensor<double, 2> expected(tokens, kIn);
    expected.setZero();
    ef::reference::expert_feed_forward(expected, to_double(x), ids, to_double(weights),
                                       random.in_double(false), silu_unit);
    const auto check = [&](const auto& device, const std::string& name) {
      const PackedExperts<S> packed(device, random, as_it_is, options);
      auto y = poisoned_tensor<T, 2>({tokens, kIn});
      ef::expert_feed_forward_into(device, y, x, ids, weights, packed.gate_ups, packed.downs,
                                   ef::Epilogue{}.silu());
      EXPECT_LT(relative_error(y, expected), bound) << name << " " << tokens << " " << experts;
      for (Index t = 0; t < tokens; t += t < 30 ? 7 : 50) {  // alone, or in a part of the batch
        const Index n = std::min<Index>(tokens - t, t % 3 + 1);
        auto part = poisoned_tensor<T, 2>({n, kIn});
        ef::expert_feed_forward_into(device, part, rows_of(x, t, n),
                                     ef::TensorView<const std::int32_t, 2>(&ids(t, 0), n, k),
                                     ef::TensorView<const float, 2>(&weights(t, 0), n, k),
                                     packed.gate_ups, packed.downs, ef::Epilogue{}.silu());
        EXPECT_TRUE(same_bits(part, rows_of(y, t, n))) << name << " " << t;
      }
      return y;
    };
    for_each_product_isa([&](auto isa) { check(on(isa), std::string(isa.name)); });
    const auto alone = check(Eigen::DefaultDevice{}, "one thread");
    Threads threads(3);
    const ef::ParallelRegion region(threads.device);  // where small products have parts, too
    EXPECT_TRUE(same_bits(check(threads.device, "threads"), alone));
  }
}

TEST(ExpertFeedForward, IsPlainDouble) {
  expect_reference<float, float>(1e-6);
  expect_reference<float, std::int8_t>(0.02);
  expect_reference<float, std::int8_t>(0.02, {.group_size = 32});
  expect_reference<float, ef::int4>(0.2, {.zero_points = true});
  expect_reference<ef::bfloat16, ef::bfloat16>(0.01);
#if !defined(EIGENFORMER_SANITIZED)
  expect_reference<float, ef::half>(2e-3);
  expect_reference<double, double>(1e-6);
#endif
}

TEST(ExpertFeedForward, SomeExpertsHaveScalesThatAreHalves) {
  const Eigen::DefaultDevice device;
  const Index tokens = 21, experts = 5, k = 2;
  const RandomExperts random(experts, kIn, kHidden);
  const auto x = random_tensor<float, 2>({tokens, kIn}, 7);
  const auto ids = some_experts(tokens, k, experts);
  const auto weights = random_weights<float>(tokens, k);
  const auto y_of = [&](bool halves) {
    int matrices = 0;  // three of each expert
    const auto every_other = [&](const ef::Tensor<float, 2>& matrix) {
      return matrices++ / 3 % 2 == 0 ? in_blocks(matrix) : matrix;
    };
    const PackedExperts<std::int8_t> packed(device, random, every_other,
                                            {.group_size = 32, .half_scales = halves});
    for (std::size_t e = 0; e < packed.downs.size(); ++e) {
      EXPECT_EQ(packed.downs[e].half_scales() != nullptr, halves && e % 2 == 0);
      EXPECT_EQ(packed.gate_ups[e].pair().half_scales() != nullptr, halves && e % 2 == 0);
    }
    ef::Tensor<float, 2> y(tokens, kIn);
    ef::expert_feed_forward_into(device, y, x, ids, weights, packed.gate_ups, packed.downs,
                                 ef::Epilogue{}.silu());
    return y;
  };
  EXPECT_TRUE(same_bits(y_of(true), y_of(false)));
}

/// Everything that the parts of the call may have.
struct Parts {
  Index tokens, experts, k;
  RandomExperts random{experts, kIn, kHidden};
  ef::Tensor<float, 2> x = random_tensor<float, 2>({tokens, kIn}, 7);
  ef::Tensor<std::int32_t, 2> ids = some_experts(tokens, k, experts);
  ef::Tensor<float, 2> weights = random_weights<float>(tokens, k);
  PackedExperts<float> packed{Eigen::DefaultDevice{}, random, as_it_is};
  ef::Tensor<std::int32_t, 1> offsets{experts + 1}, order{tokens * k};
  ef::Tensor<std::int32_t, 2> places{tokens, k};
  ef::Tensor<float, 2> hidden{tokens * k, kHidden}, results{tokens * k, kIn}, y{tokens, kIn};

  void run(ef::Workspace& workspace) {
    const Eigen::DefaultDevice device;
    ef::expert_order_into(device, offsets, order, places, ids, workspace);
    ef::expert_linear_into(device, hidden, x, packed.gate_ups, offsets, order,
                           ef::Epilogue{}.bias(random.gate_up_bias).silu(), workspace);
    ef::expert_linear_into(device, results, hidden, packed.downs, offsets,
                           ef::Epilogue{}.bias(random.down_bias), workspace);
    ef::combine_experts_into(device, y, results, places, weights);
  }
};

TEST(ExpertFeedForward, BiasesAreThoseOfTheExpert) {
  Parts p{11, 4, 2};
  ef::Workspace workspace;
  p.run(workspace);
  ef::Tensor<double, 2> expected(p.tokens, kIn);
  expected.setZero();
  ef::reference::expert_feed_forward(expected, to_double(p.x), p.ids, to_double(p.weights),
                                     p.random.in_double(true), silu_unit);
  EXPECT_LT(relative_error(p.y, expected), 1e-6);
  EXPECT_EQ(count_allocations([&] { p.run(workspace); }), 0);
}

// Evenly, all through one expert, nine of them (whose tile is as high as twelve): whatever came
// first has taken what the others need.
TEST(ExpertFeedForward, OtherRoutesTakeNoMoreMemory) {
  using Route = Index (*)(Index);
  const Route routes[] = {[](Index t) { return t % 39; }, [](Index) { return Index{7}; },
                          [](Index t) { return t / 9 % 39; }};
  for (const Index tokens : {Index{1}, Index{20}, Index{230}}) {
    Parts p{tokens, 40, 2};
    for (std::size_t first = 0; first < 3; ++first) {
      ef::Workspace workspace;
      const auto run = [&](std::size_t route) {
        for (Index t = 0; t < tokens; ++t) {
          p.ids(t, 0) = static_cast<std::int32_t>(routes[route](t));
          p.ids(t, 1) = p.ids(t, 0) + 1;
        }
        p.run(workspace);
      };
      run(first);
      for (const std::size_t route : {0, 1, 2})
        EXPECT_EQ(count_allocations([&] { run(route); }), 0)
            << tokens << " " << first << " " << route;
    }
  }
}

TEST(ExpertFeedForward, NaNIsItsTokens) {
  Parts p{9, 4, 2};
  ef::Workspace workspace;
  p.run(workspace);
  const auto expected = p.y;
  p.x(4, 3) = std::numeric_limits<float>::quiet_NaN();
  p.weights(6, 1) = std::numeric_limits<float>::quiet_NaN();
  p.run(workspace);
  for (Index t = 0; t < 9; ++t)
    for (Index i = 0; i < kIn; ++i)
      if (t == 4 || t == 6)
        EXPECT_TRUE(std::isnan(p.y(t, i)));
      else
        EXPECT_EQ(p.y(t, i), expected(t, i)) << t;
}

TEST(ExpertFeedForward, ASharedExpertIsAdded) {
  Parts p{5, 4, 2};
  ef::Workspace workspace;
  p.run(workspace);
  const auto shared = random_tensor<float, 2>({5, kIn}, 11);
  const auto gate = random_tensor<float, 1>({5}, 12);
  ef::Tensor<float, 2> with(5, kIn), gated(5, kIn);
  ef::combine_experts_into(Eigen::DefaultDevice{}, with, p.results, p.places, p.weights, shared);
  ef::combine_experts_into(Eigen::DefaultDevice{}, gated, p.results, p.places, p.weights, shared,
                           gate);
  for (Index t = 0; t < 5; ++t)
    for (Index i = 0; i < kIn; ++i) {
      EXPECT_NEAR(with(t, i), p.y(t, i) + shared(t, i), 1e-5);
      EXPECT_NEAR(gated(t, i), p.y(t, i) + shared(t, i) / (1 + std::exp(-gate(t))), 1e-5);
    }
}

TEST(ExpertFeedForward, BadArgumentsAreRefused) {
  Parts p{3, 4, 2};
  ef::Workspace workspace;
  p.run(workspace);
  const Eigen::DefaultDevice device;
  const auto refused = [&](auto&& call, const std::vector<std::string>& text) {
    p.y.setConstant(-7);
    p.results.setConstant(-7);
    expect_throws<std::invalid_argument>(call, text);
    EXPECT_EQ(p.y(0, 0), -7);
    EXPECT_EQ(p.results(0, 0), -7);
  };
  const auto linear = [&] {
    ef::expert_linear_into(device, p.results, p.hidden, p.packed.downs, p.offsets);
  };
  const std::int32_t last = p.offsets(4);
  for (const std::int32_t bad : {last - 1, last + 1}) {
    p.offsets(4) = bad;
    refused(linear, {"expert_linear", "offsets do not rise from 0 to 6"});
  }
  p.offsets(4) = last;
  const std::int32_t middle = p.offsets(2);
  p.offsets(2) = 100;
  refused(linear, {"offsets do not rise"});
  p.offsets(2) = middle;
  const std::int32_t pair = p.order(1);
  p.order(1) = 6;
  refused(
      [&] {
        ef::expert_linear_into(device, p.hidden, p.x, p.packed.gate_ups, p.offsets, p.order,
                               ef::Epilogue{}.silu());
      },
      {"order holds 6 at 1"});
  p.order(1) = pair;
  p.places(1, 1) = -1;
  refused([&] { ef::combine_experts_into(device, p.y, p.results, p.places, p.weights); },
          {"combine_experts", "places holds -1, x has 6 rows"});
  p.places(1, 1) = 0;
  // tensors without memory are given, too
  refused(
      [&] {
        ef::combine_experts_into(device, p.y, p.results, p.places, p.weights,
                                 ef::Tensor<float, 2>(0, 0));
      },
      {"shared has shape (0, 0)"});
  refused(
      [&] {
        ef::combine_experts_into(device, p.y, p.results, p.places, p.weights,
                                 ef::Tensor<float, 2>(p.y), ef::Tensor<float, 1>(0));
      },
      {"shared_gate has 0 elements, y has 3 rows"});
  auto few = p.packed.downs;
  few.pop_back();
  refused([&] { ef::expert_linear_into(device, p.results, p.hidden, few, p.offsets); },
          {"4 experts", "weights of 3"});
  few.push_back(ef::pack_weight<float>(random_tensor<float, 2>({kIn, kHidden + 1}, 1)));
  refused([&] { ef::expert_linear_into(device, p.results, p.hidden, few, p.offsets); },
          {"expected one shape"});
  const auto matrix = random_tensor<float, 2>({kIn, kHidden}, 1);
  std::vector<ef::PackedWeight<ef::int4>> mixed(4, ef::pack_weight<ef::int4>(matrix));
  for (const ef::Int4Packing& other :
       {ef::Int4Packing{.group_size = 64}, ef::Int4Packing{.zero_points = true},
        ef::Int4Packing{.quantize_activations = false}}) {
    mixed[2] = ef::pack_weight<ef::int4>(matrix, other);
    refused([&] { ef::expert_linear_into(device, p.results, p.hidden, mixed, p.offsets); },
            {"packed in different ways"});
  }
  few.clear();
  refused([&] { ef::expert_linear_into(device, p.results, p.hidden, few, p.offsets); },
          {"weights is empty"});
  refused(
      [&] {
        ef::expert_linear_into(device, p.results, p.hidden, p.packed.downs, p.offsets,
                               ef::Epilogue{}.bias(p.random.gate_up_bias));
      },
      {"bias has 192 elements, expected 40 for each of 4 experts"});
  refused([&] { ef::expert_linear_into(device, p.results, p.x, p.packed.downs, p.offsets); },
          {"x has 3 rows, there are 6 pairs"});
  p.ids(1, 1) = 4;
  refused(
      [&] {
        ef::expert_feed_forward_into(device, p.y, p.x, p.ids, p.weights, p.packed.gate_ups,
                                     p.packed.downs, ef::Epilogue{}.silu());
      },
      {"id 4 of pair 3 is no expert"});
}

}  // namespace
