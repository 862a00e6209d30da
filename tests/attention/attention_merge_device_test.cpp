// Merged results of attention on every device, against the double reference: every tail of a pack,
// any number of states, empty ones with NaN, outputs in place.
#include <eigenformer/attention/merge.h>
#include <eigenformer/reference/attention_merge.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

/// States (batch, rows, heads, width) with random log_sum_exp; of state i every third line is
/// empty, from line i on, and holds NaN.
template <typename T>
struct States {
  using C = ef::compute_type<T>;
  std::vector<ef::Tensor<T, 4>> outputs;
  std::vector<ef::Tensor<C, 3>> log_sums;
  std::vector<ef::reference::AttentionResult> expected;

  States(Index count, Index batch, Index rows, Index heads, Index width) {
    for (Index i = 0; i < count; ++i) {
      const unsigned seed = static_cast<unsigned>(2 * i);
      auto output = random_tensor<T, 4>({batch, rows, heads, width}, seed);
      auto sums = random_tensor<C, 3>({batch, heads, rows}, seed + 1, 3.0);
      ef::reference::AttentionResult wide{to_double(output), to_double(sums)};
      for (Index at = i; at < sums.size(); at += 3) {
        const Index r = at % rows, h = at / rows % heads, b = at / rows / heads;
        sums(b, h, r) = -std::numeric_limits<C>::infinity();
        wide.log_sum_exp(b, h, r) = -INFINITY;
        for (Index d = 0; d < width; ++d) output(b, r, h, d) = std::numeric_limits<T>::quiet_NaN();
      }
      outputs.push_back(output);
      log_sums.push_back(sums);
      expected.push_back(wide);
    }
  }
};

template <typename C>
void expect_log_sums(const ef::Tensor<C, 3>& got, const ef::Tensor<double, 3>& expected) {
  for (Index i = 0; i < got.size(); ++i) {
    const double a = static_cast<double>(got.data()[i]), e = expected.data()[i];
    if (std::isinf(e))
      ASSERT_EQ(a, e) << i;
    else
      ASSERT_LT(std::abs(a - e), 1e-5) << i;
  }
}

/// Output and log_sum_exp in place of the last state's; then apart, with the same bits.
template <typename T>
void check(Index count, Index batch, Index rows, Index heads, Index width) {
  using C = ef::compute_type<T>;
  const States<T> states(count, batch, rows, heads, width);
  const auto expected = ef::reference::merge_attention_states(states.expected);
  for_each_device([&](const auto& bench) {
    using B = std::remove_cvref_t<decltype(bench)>;
    std::vector<std::unique_ptr<DeviceTensor<B, T, 4>>> outputs;
    std::vector<std::unique_ptr<DeviceTensor<B, C, 3>>> log_sums;
    std::vector<ef::AttentionStateView<T, 4>> views;
    for (std::size_t i = 0; i < states.outputs.size(); ++i) {
      outputs.push_back(std::make_unique<DeviceTensor<B, T, 4>>(bench, states.outputs[i]));
      log_sums.push_back(std::make_unique<DeviceTensor<B, C, 3>>(bench, states.log_sums[i]));
      views.emplace_back(outputs.back()->cview(), log_sums.back()->cview());
    }
    auto out = on_device(bench, poisoned_tensor<T, 4>({batch, rows, heads, width}));
    auto lse = on_device(bench, poisoned_tensor<C, 3>({batch, heads, rows}));
    ef::merge_attention_states_into(bench.device, out.view(), lse.view(), views);
    const auto got = out.host();
    ASSERT_LT(relative_error(got, expected.output), tolerance<T>()) << count << ' ' << width;
    expect_log_sums(lse.host(), expected.log_sum_exp);
    ef::merge_attention_states_into(bench.device, outputs.back()->view(), log_sums.back()->view(),
                                    views);
    ASSERT_TRUE(same_bits(outputs.back()->host(), got));
    ASSERT_TRUE(same_bits(log_sums.back()->host(), lse.host()));
  });
}

TEST(AttentionMergeOnDevice, EqualsTheReference) {
  for (const Index width : {1, 3, 4, 31, 32, 33, 128, 257}) {
    check<float>(2, 2, 3, 2, width);
    check<ef::bfloat16>(3, 1, 5, 2, width);
  }
  check<ef::half>(2, 2, 3, 2, 64);
  check<double>(5, 2, 3, 2, 7);
  check<float>(1, 1, 4, 3, 8);
  check<float>(2, 1, 40, 1, 5);
  check<float>(2, 0, 3, 2, 4);
  check<float>(2, 2, 3, 2, 0);
}

// The row of a batch has the bits that it has alone; views are packed (tokens, heads, width).
TEST(AttentionMergeOnDevice, PackedRowsHaveTheBitsOfRowsAlone) {
  const auto a = random_tensor<float, 3>({5, 2, 9}, 1), b = random_tensor<float, 3>({5, 2, 9}, 2);
  const auto lse_a = random_tensor<float, 2>({2, 5}, 3), lse_b = random_tensor<float, 2>({2, 5}, 4);
  for_each_device([&](const auto& bench) {
    const auto merge = [&](Index first, Index rows) {
      const auto part = [&](const auto& from) {
        ef::Tensor<float, 3> rest(rows, 2, 9);
        std::copy_n(from.data() + first * 18, rest.size(), rest.data());
        return rest;
      };
      const auto sums = [&](const auto& from) {
        ef::Tensor<float, 2> rest(2, rows);
        for (Index h = 0; h < 2; ++h)
          for (Index r = 0; r < rows; ++r) rest(h, r) = from(h, first + r);
        return rest;
      };
      auto out_a = on_device(bench, part(a)), out_b = on_device(bench, part(b));
      auto sums_a = on_device(bench, sums(lse_a)), sums_b = on_device(bench, sums(lse_b));
      auto out = on_device(bench, poisoned_tensor<float, 3>({rows, 2, 9}));
      ef::merge_attention_states_into(bench.device, out.view(), {}, out_a.cview(), sums_a.cview(),
                                      out_b.cview(), sums_b.cview());
      return out.host();
    };
    const auto all = merge(0, 5);
    for (Index r = 0; r < 5; ++r) {
      const auto one = merge(r, 1);
      for (Index i = 0; i < 18; ++i) EXPECT_EQ(one.data()[i], all.data()[r * 18 + i]) << r;
    }
  });
}

// Rows of one element: nobody sees a key, +infinity, NaN, the greatest numbers, an infinite value,
// and a weight of 0 beside a great one.
template <typename T>
void check_special_rows() {
  using C = ef::compute_type<T>;
  constexpr Index rows = 6;
  const C inf = std::numeric_limits<C>::infinity(), nan = std::numeric_limits<C>::quiet_NaN();
  const T most = (std::numeric_limits<T>::max)(), wrong = std::numeric_limits<T>::quiet_NaN(),
          one = T(1), infinite = std::numeric_limits<T>::infinity();
  ef::Tensor<T, 3> a(rows, 1, 1), b(rows, 1, 1);
  ef::Tensor<C, 2> lse_a(1, rows), lse_b(1, rows);
  a.setValues({{{wrong}}, {{one}}, {{one}}, {{most}}, {{infinite}}, {{one}}});
  b.setValues({{{wrong}}, {{one}}, {{one}}, {{most}}, {{one}}, {{wrong}}});
  lse_a.setValues({{-inf, inf, nan, C(0.7), C(0), C(3e4)}});
  lse_b.setValues({{-inf, C(0), C(0), C(0.1), C(0), -inf}});
  for_each_device([&](const auto& bench) {
    auto out_a = on_device(bench, a), out_b = on_device(bench, b);
    auto sums_a = on_device(bench, lse_a), sums_b = on_device(bench, lse_b);
    ef::merge_attention_states_into(bench.device, out_a.view(), sums_b.view(), out_a.cview(),
                                    sums_a.cview(), out_b.cview(), sums_b.cview());
    const auto out = out_a.host();
    const auto lse = sums_b.host();
    EXPECT_EQ(out(0, 0, 0), T(0));
    EXPECT_EQ(lse(0, 0), -inf);
    for (const Index r : {1, 2}) {
      EXPECT_TRUE(std::isnan(static_cast<double>(out(r, 0, 0)))) << r;
      EXPECT_TRUE(std::isnan(lse(0, r))) << r;
    }
    EXPECT_NEAR(static_cast<double>(out(3, 0, 0)) / static_cast<double>(most), 1, 1e-6);
    EXPECT_EQ(out(4, 0, 0), infinite);
    EXPECT_EQ(out(5, 0, 0), one);
    EXPECT_EQ(lse(0, 5), C(3e4));
  });
}

TEST(AttentionMergeOnDevice, SpecialRows) {
  check_special_rows<float>();
  check_special_rows<double>();
  check_special_rows<ef::half>();
}

}  // namespace
