// vec<T, Isa> against scalar arithmetic, for every ISA of this build, every length of a tail, and
// every special value.
#include <eigenformer/cpu/simd/transpose.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T, typename Isa>
void check_loads_and_stores(Isa) {
  using V = ef::simd::Vec<float, Isa>;
  std::vector<T> source(static_cast<std::size_t>(2 * V::lanes + 1));
  for (std::size_t i = 0; i < source.size(); ++i)
    source[i] = static_cast<T>(static_cast<float>(i) * 3 - 20);
  for (int offset = 0; offset < V::lanes; ++offset) {  // misaligned on purpose
    std::vector<T> target(source.size(), static_cast<T>(99.0f));
    V::load(source.data() + offset).store(target.data() + offset);
    for (int i = 0; i < V::lanes; ++i)
      EXPECT_EQ(static_cast<float>(target[static_cast<std::size_t>(offset + i)]),
                static_cast<float>(source[static_cast<std::size_t>(offset + i)]));
    EXPECT_EQ(static_cast<float>(target[static_cast<std::size_t>(offset + V::lanes)]), 99.0f);
  }
  for (int n = 0; n <= V::lanes; ++n) {
    std::vector<T> exact(source.begin(), source.begin() + n);  // ASan sees a read or write past n
    std::vector<float> wide(static_cast<std::size_t>(V::lanes));
    const V loaded = V::load_partial(exact.data(), n);
    loaded.store(wide.data());
    for (int i = 0; i < V::lanes; ++i)
      EXPECT_EQ(wide[static_cast<std::size_t>(i)],
                i < n ? static_cast<float>(source[static_cast<std::size_t>(i)]) : 0.0f);
    std::vector<T> target(static_cast<std::size_t>(n));
    loaded.store_partial(target.data(), n);
    for (int i = 0; i < n; ++i)
      EXPECT_EQ(static_cast<float>(target[static_cast<std::size_t>(i)]),
                static_cast<float>(source[static_cast<std::size_t>(i)]));
  }
}

TEST(Simd, LoadsAndStoresEveryTail) {
  for_each_isa([](auto isa) {
    SCOPED_TRACE(isa.name);
    check_loads_and_stores<float>(isa);
    check_loads_and_stores<ef::bfloat16>(isa);
    check_loads_and_stores<ef::half>(isa);
    check_loads_and_stores<std::int8_t>(isa);
  });
}

TEST(Simd, SwapPairsExchangesNeighbours) {
  for_each_isa([](auto isa) {
    using V = ef::simd::Vec<float, decltype(isa)>;
    float values[V::lanes], swapped[V::lanes];
    for (int i = 0; i < V::lanes; ++i) values[i] = static_cast<float>(i);
    swap_pairs(V::load(values)).store(swapped);
    for (int i = 0; i < V::lanes; ++i) EXPECT_EQ(swapped[i], values[i ^ 1]) << isa.name;
  });
}

TEST(Simd, SelectedLanesStandNextToEachOther) {
  for_each_isa([](auto isa) {
    using V = ef::simd::Vec<float, decltype(isa)>;
    for (std::uint32_t set = 0; set < 1u << V::lanes; set += V::lanes < 16 ? 1 : 7) {
      float values[V::lanes], stored[V::lanes];
      for (int i = 0; i < V::lanes; ++i) values[i] = (set >> i & 1u) != 0 ? float(i) : -1.0f;
      const V v = V::load(values);
      const int count = store_selected(v, less_equal(V::zero(), v), stored);
      ASSERT_EQ(count, std::popcount(set)) << isa.name;
      ASSERT_EQ(V::mask_of(set | ~std::uint32_t{0} << V::lanes).bits(), set) << isa.name;
      for (int i = 0, at = 0; i < V::lanes; ++i)
        if ((set >> i & 1u) != 0) {
          ASSERT_EQ(stored[at++], float(i)) << isa.name << " " << set;
        }
    }
  });
}

TEST(Simd, LanesAreAddedInDouble) {
  for_each_isa([](auto isa) {
    using V = ef::simd::Vec<float, decltype(isa)>;
    float values[V::lanes];
    double sums[V::lanes];
    for (int i = 0; i < V::lanes; ++i) values[i] = 1.0f / float(i + 3), sums[i] = 1e9 + i;
    add_lanes(V::load(values), sums);
    for (int i = 0; i < V::lanes; ++i)
      EXPECT_EQ(sums[i], (1e9 + i) + double(values[i])) << isa.name;
  });
}

TEST(Simd, TransposeExchangesRowsAndColumns) {
  for_each_isa([](auto isa) {
    using V = ef::simd::Vec<float, decltype(isa)>;
    V rows[V::lanes];
    float values[V::lanes];
    for (int r = 0; r < V::lanes; ++r) {
      for (int c = 0; c < V::lanes; ++c) values[c] = static_cast<float>(r * V::lanes + c);
      rows[r] = V::load(values);
    }
    transpose(rows);
    for (int r = 0; r < V::lanes; ++r) {
      rows[r].store(values);
      for (int c = 0; c < V::lanes; ++c)
        EXPECT_EQ(values[c], static_cast<float>(c * V::lanes + r)) << isa.name;
    }
  });
}

TEST(Simd, NarrowingRoundsToNearestEvenLikeEigen) {
  std::mt19937 generator(1);
  for_each_isa([&](auto isa) {
    using V = ef::simd::Vec<float, decltype(isa)>;
    for (int trial = 0; trial < 20000; ++trial) {
      float values[V::lanes];
      for (float& x : values) x = std::bit_cast<float>(static_cast<std::uint32_t>(generator()));
      ef::bfloat16 narrow[V::lanes];
      ef::half halves[V::lanes];
      V::load(values).store(narrow);
      V::load(values).store(halves);
      for (int i = 0; i < V::lanes; ++i) {
        const auto expected = static_cast<ef::bfloat16>(values[i]);
        if (std::isnan(values[i])) {
          EXPECT_TRUE(std::isnan(static_cast<float>(narrow[i])));
          EXPECT_TRUE(std::isnan(static_cast<float>(halves[i])));
        } else {
          EXPECT_EQ(std::bit_cast<std::uint32_t>(static_cast<float>(narrow[i])),
                    std::bit_cast<std::uint32_t>(static_cast<float>(expected)))
              << isa.name << ' ' << values[i];
          EXPECT_EQ(static_cast<float>(halves[i]),
                    static_cast<float>(static_cast<ef::half>(values[i])))
              << isa.name;
        }
      }
    }
  });
}

template <typename V>
std::vector<float> lanes_of(V v) {
  std::vector<float> out(static_cast<std::size_t>(V::lanes));
  v.store(out.data());
  return out;
}

TEST(Simd, ArithmeticMasksAndReductions) {
  for_each_isa([](auto isa) {
    SCOPED_TRACE(isa.name);
    using V = ef::simd::Vec<float, decltype(isa)>;
    std::mt19937 generator(2);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<std::size_t>(V::lanes)), y(x);
    for (int trial = 0; trial < 100; ++trial) {
      for (auto& value : x) value = normal(generator);
      for (auto& value : y) value = normal(generator);
      x[0] = y[0];
      if (trial % 3 == 0) x[1] = std::numeric_limits<float>::quiet_NaN();
      const V a = V::load(x.data()), b = V::load(y.data());
      const auto sum = lanes_of(a + b), product = lanes_of(a * b), fused = lanes_of(fma(a, b, a)),
                 low = lanes_of(minimum(a, b)), high = lanes_of(maximum(a, b)),
                 magnitude = lanes_of(abs(a)), rounded = lanes_of(round(a)),
                 quotient = lanes_of(a / b), chosen = lanes_of(select(less(a, b), a, b)),
                 root = lanes_of(sqrt(abs(b)));
      const auto lt = less(a, b).bits(), le = less_equal(a, b).bits(), eq = equal(a, b).bits(),
                 nan = is_nan(a).bits(), unordered_bits = unordered(b, a).bits();
      for (int i = 0; i < V::lanes; ++i) {
        const auto u = static_cast<std::size_t>(i);
        if (!std::isnan(x[u])) {
          EXPECT_EQ(sum[u], x[u] + y[u]);
          EXPECT_EQ(product[u], x[u] * y[u]);
          EXPECT_EQ(quotient[u], x[u] / y[u]);
          EXPECT_NEAR(fused[u], x[u] * y[u] + x[u], 1e-5f);
          EXPECT_EQ(magnitude[u], std::fabs(x[u]));
          EXPECT_EQ(rounded[u], std::nearbyint(x[u]));
        }
        EXPECT_EQ(root[u], std::sqrt(std::fabs(y[u])));
        EXPECT_EQ(low[u], x[u] < y[u] ? x[u] : y[u]);
        EXPECT_EQ(high[u], x[u] > y[u] ? x[u] : y[u]);
        EXPECT_EQ(chosen[u], x[u] < y[u] ? x[u] : y[u]);
        EXPECT_EQ((lt >> i) & 1u, x[u] < y[u] ? 1u : 0u);
        EXPECT_EQ((le >> i) & 1u, x[u] <= y[u] ? 1u : 0u);
        EXPECT_EQ((eq >> i) & 1u, x[u] == y[u] ? 1u : 0u);
        EXPECT_EQ((nan >> i) & 1u, std::isnan(x[u]) ? 1u : 0u);
        EXPECT_EQ((unordered_bits >> i) & 1u, std::isnan(x[u]) ? 1u : 0u);
      }
      double total = 0;
      for (float value : y) total += static_cast<double>(value);
      EXPECT_NEAR(reduce_add(b), total, 1e-5 * V::lanes);
      EXPECT_EQ(reduce_max(b), *std::max_element(y.begin(), y.end()));
      EXPECT_EQ(reduce_min(b), *std::min_element(y.begin(), y.end()));
    }
  });
}

TEST(Simd, MinAndMaxReturnTheSecondOperandWhereEitherIsNan) {
  for_each_isa([](auto isa) {
    SCOPED_TRACE(isa.name);
    using V = ef::simd::Vec<float, decltype(isa)>;
    const V nan = V::set1(std::numeric_limits<float>::quiet_NaN()), one = V::set1(1.0f);
    EXPECT_EQ(lanes_of(minimum(nan, one))[0], 1.0f);
    EXPECT_EQ(lanes_of(maximum(nan, one))[0], 1.0f);
    EXPECT_TRUE(std::isnan(lanes_of(minimum(one, nan))[0]));
    EXPECT_TRUE(std::isnan(lanes_of(maximum(one, nan))[0]));
  });
}

TEST(Simd, ExpIsWithinTwoUlpEverywhere) {
  for_each_isa([](auto isa) {
    SCOPED_TRACE(isa.name);
    using V = ef::simd::Vec<float, decltype(isa)>;
    for (float x = -103.9f; x < 88.7f; x += 0.00137f) {
      const float value = lanes_of(exp(V::set1(x)))[0];
      const double expected = std::exp(static_cast<double>(x));
      EXPECT_LE(std::fabs(value - expected), 1.2e-7 * expected + 1.5e-45) << x;
    }
    EXPECT_EQ(lanes_of(exp(V::set1(-kInfinity)))[0], 0.0f);
    EXPECT_EQ(lanes_of(exp(V::set1(kInfinity)))[0], kInfinity);
    EXPECT_EQ(lanes_of(exp(V::set1(-0.0f)))[0], 1.0f);
    EXPECT_TRUE(std::isnan(lanes_of(exp(V::set1(std::numeric_limits<float>::quiet_NaN())))[0]));
  });
}

// Beyond -87.7 a weight is exactly 0; numbers that are no normal floats are left to that.
TEST(Simd, ExpOfNonpositiveIsAsCloseAsItsArgument) {
  for_each_isa([](auto isa) {
    SCOPED_TRACE(isa.name);
    using V = ef::simd::Vec<float, decltype(isa)>;
    const auto value_at = [](float x) { return lanes_of(exp_of_nonpositive(V::set1(x)))[0]; };
    for (float x = -87.6f; x < 0; x += 0.00137f) {
      const double expected = std::exp(static_cast<double>(x));
      EXPECT_LE(std::fabs(value_at(x) - expected), (2.5e-7 - 7.5e-8 * double{x}) * expected) << x;
    }
    for (float x = -1; x < -1e-30f; x *= 0.99f) {
      const double expected = std::exp(static_cast<double>(x));
      EXPECT_LE(std::fabs(value_at(x) - expected), 2.5e-7 * expected) << x;
    }
    for (const float x : {-87.7f, -88.0f, -100.0f, -104.0f, -1e30f, -kInfinity})
      EXPECT_EQ(value_at(x), 0.0f) << x;
    for (const float x : {0.0f, -0.0f}) EXPECT_EQ(value_at(x), 1.0f);
    // of any payload: a sum of products hands on that of its operand
    for (const std::uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7fc001ffu, 0x7f800001u})
      EXPECT_TRUE(std::isnan(value_at(std::bit_cast<float>(bits)))) << bits;
  });
}

TEST(Simd, PowerOfTwoIsExact) {
  for_each_isa([](auto isa) {
    SCOPED_TRACE(isa.name);
    using V = ef::simd::Vec<float, decltype(isa)>;
    for (int n = -126; n <= 127; ++n)
      EXPECT_EQ(lanes_of(power_of_two(V::set1(static_cast<float>(n))))[0], std::ldexp(1.0f, n));
    EXPECT_EQ(lanes_of(power_of_two(V::set1(-127.0f)))[0], 0.0f);
  });
}

TEST(Simd, DoubleServesAsTheReferencePrecision) {
  using V = ef::simd::Vec<double, ef::isa::best>;
  double x[V::lanes], y[V::lanes];
  for (int i = 0; i < V::lanes; ++i) x[i] = 0.1 * i - 0.2;
  exp(V::load(x)).store(y);
  for (int i = 0; i < V::lanes; ++i) EXPECT_EQ(y[i], std::exp(x[i]));
}

}  // namespace
