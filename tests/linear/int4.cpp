// Laws of four-bit weights: the definition bit for bit on every ISA, of values that are given and
// of values found here; the same bits alone, in a batch, on threads and stacked; what is refused.
#include <eigenformer/linear.h>
#include <eigenformer/quantization.h>
#include <eigenformer/reference/linear.h>
#include <eigenformer/reference/quantization.h>

#include "allocation_count.h"
#include "linear_support.h"

using namespace eigenformer_test;

namespace {

/// Any values that may be stored: -8 to 7, or 0 to 15 with minimums; scales of both signs.
struct StoredInt4 {
  ef::Tensor<std::int8_t, 2> values;
  ef::Tensor<float, 2> scales, minimums;

  StoredInt4(Index out, Index in, Index group, bool with_minimums, unsigned seed)
      : values(out, in),
        scales(random_tensor<float, 2>({out, (in + group - 1) / group}, seed)),
        minimums(random_tensor<float, 2>({out, (in + group - 1) / group}, seed + 1)) {
    for (Index i = 0; i < values.size(); ++i)
      values.data()[i] =
          static_cast<std::int8_t>((i * 7 + i / 16 + seed) % 16 - (with_minimums ? 0 : 8));
  }

  template <typename Device>
  ef::PackedWeight<ef::int4> pack(const Device& device, bool with_minimums,
                                  const ef::Int4Packing& options) const {
    return with_minimums ? ef::pack_weight<ef::int4>(device, values, scales, minimums, options)
                         : ef::pack_weight<ef::int4>(device, values, scales, options);
  }
};

template <typename X>
void check_definition(Index tokens, Index in, Index out, Index group, bool with_minimums,
                      unsigned seed) {
  const auto x = random_tensor<X, 2>({tokens, in}, seed);
  const auto bias = random_tensor<float, 1>({out}, seed + 1);
  const StoredInt4 w(out, in, group, with_minimums, seed + 2);
  const auto expected = ef::reference::grouped_linear(
      x, w.values, w.scales, with_minimums ? w.minimums.data() : nullptr, group, bias.data());
  for_each_product_isa([&](auto isa) {
    const auto packed = w.pack(on(isa), with_minimums, {.group_size = group});
    const auto y = linear_by<decltype(isa), float>(isa, x, packed, out, ef::Epilogue{}.bias(bias));
    ASSERT_TRUE(same_bits(y, expected)) << isa.name << " " << tokens << " x " << in << " x " << out
                                        << " by " << group << " " << with_minimums;
  });
}

TEST(LinearInt4, EqualsItsDefinitionOnEveryIsa) {
  unsigned seed = 1;
  for (Index group : {32, 64, 128})
    for (Index in : {0, 1, 5, 31, 32, 33, 127, 128, 130, 300, 1100, 4200})
      for (Index out : {1, 17, 33, 70}) {
        if (in > 1100 && out != 33) continue;
        ++seed;
        check_definition<float>(1 + seed % 17, in, out, group, seed % 2 == 0, seed);
        check_definition<float>(1 + seed % 3, in, out, group, seed % 2 == 1, seed);
      }
  check_definition<ef::bfloat16>(14, 300, 33, 32, false, 3);
  check_definition<ef::half>(14, 300, 33, 32, true, 4);
  check_definition<float>(0, 300, 33, 32, false, 5);
  check_definition<float>(200, 130, 65, 64, true, 6);
}

TEST(LinearInt4, PackingFromNumbersGivesTheValuesOfQuantization) {
  using enum ef::Int4Fit;
  const Index out = 45, in = 331;
  const auto x = random_tensor<float, 2>({5, in}, 1);
  const auto weight = random_tensor<float, 2>({out, in}, 2);
  for (const auto& [group, fit] : {std::pair{32, extremes}, {64, least_squares}, {128, extremes}})
    for_each_product_isa([&, group = group, fit = fit](auto isa) {
      const auto [q, scales] = ef::quantize_weights_int4(weight, group, fit);
      const auto [u, steps, minimums] = ef::quantize_weights_int4_with_minimums(weight, group, fit);
      const auto packed =
          ef::pack_weight<ef::int4>(on(isa), weight, {.group_size = group, .fit = fit});
      const auto above = ef::pack_weight<ef::int4>(
          on(isa), weight, {.group_size = group, .zero_points = true, .fit = fit});
      EXPECT_EQ(packed.group_size(), group);
      EXPECT_EQ(packed.minimums(), nullptr);
      const ef::Epilogue<> end;
      ASSERT_TRUE(same_bits(linear_by<decltype(isa), float>(isa, x, packed, out, end),
                            ef::reference::grouped_linear(x, q, scales, nullptr, group, nullptr)));
      ASSERT_TRUE(
          same_bits(linear_by<decltype(isa), float>(isa, x, above, out, end),
                    ef::reference::grouped_linear(x, u, steps, minimums.data(), group, nullptr)));
    });
}

TEST(LinearInt4, RowsThreadsAndStackingChangeNothing) {
  const Index tokens = 41, in = 4802, out = 300, group = 64;
  const auto x = random_tensor<float, 2>({tokens, in}, 1);
  const auto weight = random_tensor<float, 2>({out, in}, 2);
  const ef::Int4Packing options{.group_size = group, .zero_points = true};
  const auto packed = ef::pack_weight<ef::int4>(weight, options);
  // half a byte a weight, and padding up to whole panels
  EXPECT_LE(packed.bytes(), (out + 32) * (in + 16) / 2);
  const ef::Tensor<float, 2> y = ef::linear(x, packed);
  // weights rounded to four bits, activations to eight
  EXPECT_LE(relative_error(y, ef::reference::linear(to_double(x), to_double(weight))), 0.12);
  for (Index t : {0, 11, 12, 40}) {
    const ef::TensorView<const float, 2> row(x.data() + t * in, 1, in);
    const ef::Tensor<float, 2> alone = ef::linear(row, packed);
    for (Index o = 0; o < out; ++o) ASSERT_EQ(alone(0, o), y(t, o)) << t << " " << o;
  }
  for (int count : {2, 3}) {
    Threads threads(count);
    const auto there = ef::pack_weight<ef::int4>(threads.device, weight, options);
    ASSERT_TRUE(same_bits(y, ef::Tensor<float, 2>(ef::linear(threads.device, x, there)))) << count;
  }
  const ef::TensorView<const float, 2> top(weight.data(), 101, in),
      rest(weight.data() + 101 * in, out - 101, in);
  const auto stacked =
      ef::pack_stacked_weight<ef::int4>(Eigen::DefaultDevice{}, std::array{top, rest}, options);
  EXPECT_TRUE(same_bits(y, ef::Tensor<float, 2>(ef::linear(x, stacked))));
}

/// Panels, scales and minimums.
template <typename T>
bool same_memory(const ef::PackedWeight<T>& a, const ef::PackedWeight<T>& b) {
  const Index factors = ef::detail::PanelAccess::scales(a).size(),
              halves = ef::detail::PanelAccess::half_scales(a).size();
  const auto same = [](const void* x, const void* y, Index bytes) {
    return bytes == 0 || std::memcmp(x, y, static_cast<std::size_t>(bytes)) == 0;
  };
  return a.rows() == b.rows() && a.columns() == b.columns() && a.layout() == b.layout() &&
         a.group_size() == b.group_size() && a.bytes() == b.bytes() &&
         same(a.data(), b.data(), a.bytes()) &&
         ef::detail::PanelAccess::scales(b).size() == factors &&
         ef::detail::PanelAccess::half_scales(b).size() == halves &&
         same(a.scales(), b.scales(), factors * 4) &&
         same(a.half_scales(), b.half_scales(), halves * 2) &&
         (a.minimums() == nullptr) == (b.minimums() == nullptr) &&
         (a.minimums() == nullptr || same(a.minimums(), b.minimums(), factors * 4));
}

// Weights that are never whole in memory: here of every scalar.
TEST(Packing, SlicesChangeNothing) {
  const Index rows = 133, columns = 70;
  auto weight = random_tensor<float, 2>({rows, columns}, 4);
  const auto check = [&]<typename T>(const auto& on, T, const ef::PackingOptions<T>& options) {
    const auto whole = ef::pack_weight<T>(on, weight, options);
    for (const Index size : {0, 40 * 70, 100 * 70, 1000 * 70}) {
      Index next = 0;
      ef::Tensor<float, 2> slice;
      const auto sliced = ef::detail::pack_slices<T>(
          on, rows, columns, options,
          [&](Index first, Index count) {
            EXPECT_EQ(first, next);
            next += count;
            slice = ef::Tensor<float, 2>(count, columns);
            std::copy_n(weight.data() + first * columns, slice.size(), slice.data());
            return ef::TensorView<const float, 2>(slice.data(), count, columns);
          },
          size);
      EXPECT_EQ(next, rows);
      EXPECT_TRUE(same_memory(whole, sliced)) << size;
    }
  };
  const auto check_all = [&](const auto& on) {
    check(on, float{}, {});
    check(on, ef::half{}, {});
    check(on, std::int8_t{}, {});
    check(on, std::int8_t{}, {.group_size = 32});
    check(on, ef::int4{}, {});
    check(on, ef::int4{}, {.group_size = 64, .zero_points = true});
  };
  for_each_product_isa([&](auto isa) { check_all(on(isa)); });
  Threads threads(3);
  check_all(threads.device);
  // Scales that are halves, all of them, all but one of the last slice, and of the first.
  const ef::Tensor<float, 2> blocks = in_blocks(weight);
  for (const Index other : {rows, rows - 1, Index{1}}) {
    weight = blocks;
    if (other < rows) weight(other, 69) = 0.3f;
    for_each_product_isa(
        [&](auto isa) { check(on(isa), std::int8_t{}, {.group_size = 32, .half_scales = true}); });
    const auto whole =
        ef::pack_weight<std::int8_t>(weight, {.group_size = 32, .half_scales = true});
    EXPECT_EQ(whole.half_scales() != nullptr, other == rows);
  }
  ef::Tensor<float, 2> bad(weight);
  bad(132, 69) = std::numeric_limits<float>::quiet_NaN();
  expect_throws<std::invalid_argument>(
      [&] {
        ef::detail::pack_slices<std::int8_t>(
            Eigen::DefaultDevice{}, rows, columns, {},
            [&](Index first, Index count) {
              return ef::TensorView<const float, 2>(bad.data() + first * columns, count, columns);
            },
            40 * 70);
      },
      {"pack_weight", "weights from row 128 on[4, 69] is nan"});
}

// W4A16: what the weights stand for, as a float weight.
template <typename X>
void check_wide(Index tokens, Index in, Index out, Index group, bool with_minimums, unsigned seed) {
  const auto x = random_tensor<X, 2>({tokens, in}, seed);
  const StoredInt4 w(out, in, group, with_minimums, seed + 1);
  const ef::Tensor<float, 2> numbers =
      with_minimums ? ef::dequantize_grouped(w.values, w.scales, w.minimums, group)
                    : ef::dequantize_grouped(w.values, w.scales, group);
  const auto bias = random_tensor<float, 1>({out}, seed + 2);
  for_each_product_isa([&](auto isa) {
    const auto packed =
        w.pack(on(isa), with_minimums, {.group_size = group, .quantize_activations = false});
    EXPECT_FALSE(packed.quantizes_activations());
    const auto end = ef::Epilogue{}.bias(bias);
    ASSERT_TRUE(same_bits(linear_by<decltype(isa), float>(isa, x, packed, out, end),
                          linear_by<decltype(isa), float>(
                              isa, x, ef::pack_weight<float>(on(isa), numbers), out, end)))
        << isa.name << " " << tokens << " x " << in << " x " << out << " by " << group;
  });
}

TEST(LinearInt4, WithActivationsAsTheyAreEqualsAFloatWeight) {
  unsigned seed = 1;
  for (Index in : {0, 1, 7, 32, 130, 1100})
    for (Index out : {1, 33, 300})
      for (Index tokens : {0, 1, 3, 14, 30}) {
        ++seed;
        check_wide<float>(tokens, in, out, 32 << seed % 3, seed % 2 == 0, seed);
      }
  check_wide<ef::bfloat16>(5, 130, 33, 64, false, 3);
  check_wide<ef::half>(5, 130, 33, 64, true, 4);
  const auto x = random_tensor<float, 2>({5, 130}, 1), gate = random_tensor<float, 2>({37, 130}, 2),
             up = random_tensor<float, 2>({37, 130}, 3);
  const auto wide = [&](const ef::Tensor<float, 2>& weight) {
    const auto [q, scales] = ef::quantize_weights_int4(weight);
    return ef::dequantize_grouped(q, scales, 32);
  };
  const ef::Tensor<float, 2> gates = wide(gate), ups = wide(up);
  for_each_product_isa([&](auto isa) {
    auto y = poisoned_tensor<float, 2>({5, 37}), expected = poisoned_tensor<float, 2>({5, 37});
    const auto end = ef::Epilogue{}.silu();
    ef::gated_linear_into(
        on(isa), y, x,
        ef::pack_gated_weight<ef::int4>(on(isa), gate, up, {.quantize_activations = false}), end);
    ef::gated_linear_into(on(isa), expected, x, ef::pack_gated_weight<float>(on(isa), gates, ups),
                          end);
    ASSERT_TRUE(same_bits(y, expected)) << isa.name;
  });
}

TEST(LinearInt4, EpiloguesAndPairs) {
  const Index tokens = 9, in = 200, out = 37;
  const auto x = random_tensor<ef::bfloat16, 2>({tokens, in}, 1);
  const auto gate = random_tensor<float, 2>({out, in}, 2),
             up = random_tensor<float, 2>({out, in}, 3),
             residual = random_tensor<float, 2>({tokens, out}, 4);
  for (const bool zero_points : {false, true}) {
    const ef::Int4Packing options{.zero_points = zero_points};
    const ef::Tensor<float, 2> u = ef::linear(x, ef::pack_weight<ef::int4>(up, options)),
                               activated = ef::linear(x, ef::pack_weight<ef::int4>(gate, options),
                                                      ef::Epilogue{}.silu());
    const auto pair = ef::pack_gated_weight<ef::int4>(gate, up, options);
    const ef::Tensor<float, 2> y =
        ef::gated_linear(x, pair, ef::Epilogue{}.silu().residual(residual));
    // A tensor of its own, so that no compiler makes product and sum one rounding.
    const ef::Tensor<float, 2> product = activated * u;
    const ef::Tensor<float, 2> expected = residual + product;
    ASSERT_TRUE(same_bits(y, expected)) << zero_points;
  }
}

TEST(LinearInt4, ATokenWithNanHurtsOnlyItself) {
  expect_nan_stays_with_its_token(
      ef::pack_weight<ef::int4>(random_tensor<float, 2>({40, 50}, 2), {.zero_points = true}));
}

TEST(LinearInt4, NothingIsAllocatedTwice) {
  const Eigen::DefaultDevice device;
  const auto x = random_tensor<float, 2>({14, 90}, 1),
             weight = random_tensor<float, 2>({70, 90}, 2);
  auto packed = ef::pack_weight<ef::int4>(weight, {.zero_points = true});
  ef::Tensor<float, 2> y(14, 70);
  const auto all = [&] {
    ef::pack_weight_into(device, packed, weight, {.zero_points = true});
    ef::linear_into(device, y, x, packed);
  };
  all();
  EXPECT_EQ(count_allocations(all), 0);
}

TEST(LinearInt4, CopiesMovesAndRepacks) {
  const auto x = random_tensor<float, 2>({3, 90}, 1), weight = random_tensor<float, 2>({40, 90}, 2);
  auto packed = ef::pack_weight<ef::int4>(weight, {.group_size = 64, .zero_points = true});
  const ef::Tensor<float, 2> expected = ef::linear(x, packed);
  const auto copy = packed;
  auto moved = std::move(packed);
  EXPECT_TRUE(same_bits(expected, ef::Tensor<float, 2>(ef::linear(x, copy))));
  EXPECT_TRUE(same_bits(expected, ef::Tensor<float, 2>(ef::linear(x, moved))));
  ef::pack_weight_into(Eigen::DefaultDevice{}, moved, weight);  // symmetric, in the same memory
  EXPECT_EQ(moved.minimums(), nullptr);
  EXPECT_EQ(moved.group_size(), 32);
  EXPECT_TRUE(same_bits(ef::Tensor<float, 2>(ef::linear(x, moved)),
                        ef::Tensor<float, 2>(ef::linear(x, ef::pack_weight<ef::int4>(weight)))));
}

// Views of values are packed as the numbers that they were quantized from.
TEST(LinearInt4, ViewsPackAsTheirNumbers) {
  const Index out = 45, in = 131;
  const Eigen::DefaultDevice device;
  const auto a = random_tensor<float, 2>({out, in}, 1), b = random_tensor<float, 2>({out, in}, 2);
  for (const bool zero_points : {false, true}) {
    const ef::Int4Packing options{.group_size = 64, .zero_points = zero_points};
    const auto p = ef::quantize_weights_int4(a, 64), q = ef::quantize_weights_int4(b, 64);
    const auto r = ef::quantize_weights_int4_with_minimums(a, 64),
               s = ef::quantize_weights_int4_with_minimums(b, 64);
    const auto view = [](const auto& w) {
      ef::Int4View v{ef::input_view<2>(w.values), ef::input_view<2>(w.scales), {}, 64};
      if constexpr (requires { w.minimums; }) v.minimums.emplace(ef::input_view<2>(w.minimums));
      return v;
    };
    const ef::Int4View first = zero_points ? view(r) : view(p),
                       second = zero_points ? view(s) : view(q);
    EXPECT_TRUE(same_memory(ef::pack_weight<ef::int4>(device, first),
                            ef::pack_weight<ef::int4>(a, options)));
    EXPECT_TRUE(same_memory(ef::pack_gated_weight<ef::int4>(device, first, second).pair(),
                            ef::pack_gated_weight<ef::int4>(a, b, options).pair()));
    const std::array numbers{ef::input_view<2>(a), ef::input_view<2>(b)};
    EXPECT_TRUE(same_memory(ef::pack_stacked_weight<ef::int4>(device, std::array{first, second}),
                            ef::pack_stacked_weight<ef::int4>(device, numbers, options)));
    ef::Int4View other = second;
    other.group_size = 32;
    expect_throws<std::invalid_argument>(
        [&] { ef::pack_gated_weight<ef::int4>(device, first, other); }, {"groups of 64 and 32"});
    other = zero_points ? view(q) : view(s);
    expect_throws<std::invalid_argument>(
        [&] {
          ef::pack_stacked_weight<ef::int4>(device, std::array{first, other});
        },
        {"pack_stacked_weight", "one alone has minimums"});
  }
  expect_throws<std::invalid_argument>(
      [&] { ef::pack_stacked_weight<ef::int4>(device, std::vector<ef::Int4View>{}); },
      {"weights is empty"});
}

ef::Int4View view_of(const StoredInt4& w, Index group) {
  return {ef::input_view<2>(w.values), ef::input_view<2>(w.scales), ef::input_view<2>(w.minimums),
          group};
}

// Views are packed into the memory that is there, and a refusal leaves what it holds.
TEST(LinearInt4, ViewsArePackedAgain) {
  const Index group = 32;
  const StoredInt4 a(45, 131, group, true, 1), b(45, 131, group, true, 2);
  const StoredInt4 wider(45, 132, group, true, 3);
  const ef::Int4View first = view_of(a, group), second = view_of(b, group);
  const Eigen::DefaultDevice device;
  ef::PackedWeight<ef::int4> one, all;
  ef::PackedGatedWeight<ef::int4> pair;
  const auto pack = [&](const ef::Int4View& top, const ef::Int4View& rest) {
    ef::pack_weight_into(device, one, top);
    ef::pack_gated_weight_into(device, pair, top, rest, {.quantize_activations = false});
    ef::pack_stacked_weight_into(device, all, std::array{top, rest});
  };
  pack(first, second);
  EXPECT_EQ(count_allocations([&] { pack(second, first); }), 0);
  const auto stacked = ef::pack_stacked_weight<ef::int4>(device, std::array{second, first});
  EXPECT_TRUE(same_memory(one, ef::pack_weight<ef::int4>(device, second)));
  EXPECT_FALSE(pair.pair().quantizes_activations());
  EXPECT_TRUE(same_memory(all, stacked));
  expect_throws<std::invalid_argument>(
      [&] {
        ef::pack_stacked_weight_into(device, all, std::array{first, view_of(wider, group)});
      },
      {"pack_stacked_weight", "131 and 132 columns"});
  expect_throws<std::invalid_argument>(
      [&] { ef::pack_gated_weight_into(device, pair, first, view_of(wider, group)); },
      {"pack_gated_weight", "131", "132"});
  EXPECT_TRUE(same_memory(all, stacked));
}

TEST(LinearInt4, BadArguments) {
  auto weight = random_tensor<float, 2>({5, 40}, 1);
  expect_throws<std::invalid_argument>(
      [&] { ef::pack_weight<ef::int4>(weight, {.group_size = 0}); }, {"group_size is 0", "128"});
  StoredInt4 w(5, 40, 32, false, 1);
  const auto packed = [&](bool with_minimums) {
    return w.pack(Eigen::DefaultDevice{}, with_minimums, {});
  };
  expect_throws<std::invalid_argument>(
      [&] { ef::pack_weight<ef::int4>(w.values, w.scales, {.group_size = 64}); },
      {"pack_weight", "scales has shape (5, 2)", "(5, 1)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::pack_weight<ef::int4>(w.values, w.scales, {.zero_points = true}); },
      {"zero_points", "no minimums"});
  expect_throws<std::invalid_argument>([&] { packed(true); }, {"weight[0, ", "expected 0 to 15"});
  w.values(4, 39) = 8;
  expect_throws<std::invalid_argument>([&] { packed(false); }, {"weight[4, 39] is 8", "-8 to 7"});
  w.values(4, 39) = 7;
  w.scales(3, 1) = std::numeric_limits<float>::infinity();
  expect_throws<std::invalid_argument>([&] { packed(false); }, {"scales[3, 1] is inf"});
  StoredInt4 above(5, 40, 32, true, 1);
  above.minimums(2, 0) = std::numeric_limits<float>::quiet_NaN();
  expect_throws<std::invalid_argument>([&] { above.pack(Eigen::DefaultDevice{}, true, {}); },
                                       {"minimums[2, 0] is nan"});
  auto kept = ef::pack_weight<ef::int4>(weight);
  const auto x = random_tensor<float, 2>({2, 40}, 3);
  const ef::Tensor<float, 2> before = ef::linear(x, kept);
  weight(4, 33) = std::numeric_limits<float>::quiet_NaN();
  for (const bool zero_points : {false, true})
    expect_throws<std::invalid_argument>(
        [&] {
          ef::pack_weight_into(Eigen::DefaultDevice{}, kept, weight, {.zero_points = zero_points});
        },
        {"pack_weight", "weights[4, 33] is nan"});
  EXPECT_TRUE(same_bits(before, ef::Tensor<float, 2>(ef::linear(x, kept))));
  // a double whose scale over 7 steps is no float, though INT8's is
  ef::Tensor<double, 2> huge(1, 40);
  huge.setConstant(1.0);
  huge(0, 35) = 1e40;
  for (const bool zero_points : {false, true})
    expect_throws<std::invalid_argument>(
        [&] { ef::pack_weight<ef::int4>(huge, {.zero_points = zero_points}); },
        {"weights[0, 35] is 1000000"});
}

}  // namespace
