// Laws: weights in float are as right as they say, and decide nothing that sums in double would
// decide otherwise: rows of float keep and draw the tokens of the same rows in double, which no
// float sum touches.
#include <eigenformer/sampling.h>

#include <cfloat>

#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

TEST(SamplingBulk, WeightsAreAsRightAsTheySay) {
  for_each_isa([](auto isa) {
    using V = ef::simd::Vec<float, decltype(isa)>;
    using Error = ef::cpu::BulkError;
    for (double inverse : {1.0, .3, 7.0}) {
      const ef::cpu::SamplingRow<float> row{nullptr, 0, nullptr, {3.25f, -1e30f, 0}, inverse};
      const ef::cpu::BulkWeights<V> weights(row);
      for (double at = 0; at < 85; at += .00137 * V::lanes) {
        float x[V::lanes], w[V::lanes];
        for (int i = 0; i < V::lanes; ++i)
          x[i] = static_cast<float>(3.25 - (at + .00137 * i) / inverse);
        V v[1] = {V::load(x)};
        weights.apply(v);
        v[0].store(w);
        for (int i = 0; i < V::lanes; ++i) {
          const double exponent = (static_cast<double>(x[i]) - 3.25) * inverse;
          const double allowed = Error::weight - Error::log_weight * exponent;
          ASSERT_NEAR(static_cast<double>(w[i]) / std::exp(exponent), 1.0, allowed)
              << isa.name << " " << exponent;
        }
      }
    }
    float x[V::lanes];
    std::fill(x, x + V::lanes, -kInfinity);
    V v[1] = {V::load(x)};
    const ef::cpu::SamplingRow<float> row{nullptr, 0, nullptr, {0, -1, 0}, 1.0};
    ef::cpu::BulkWeights<V>(row).apply(v);
    EXPECT_EQ(reduce_max(v[0]), 0.0f) << isa.name;
  });
}

TEST(SamplingBulk, FusedWeightsAreAsRightAsTheySay) {
  for_each_isa([](auto isa) {
    using V = ef::simd::Vec<float, decltype(isa)>;
    for (const float best : {3.25f, 38.7f, -911.3f, 0.0f})
      for (double inverse : {1.0, .3, 7.0}) {
        const ef::cpu::SamplingRow<float> row{nullptr, 0, nullptr, {best, -1e30f, 0}, inverse};
        const ef::cpu::FusedWeights<V> weights(row);
        for (double at = 0; at < 85; at += .00531 * V::lanes) {
          float x[V::lanes], w[V::lanes];
          for (int i = 0; i < V::lanes; ++i)
            x[i] = static_cast<float>(static_cast<double>(best) - (at + .00531 * i) / inverse);
          V v[1] = {V::load(x)};
          weights.apply(v);
          v[0].store(w);
          for (int i = 0; i < V::lanes; ++i) {
            const double difference = static_cast<double>(x[i]) - static_cast<double>(best);
            const double exponent = difference * inverse,
                         right = static_cast<double>(w[i]) * weights.unit / std::exp(exponent);
            ASSERT_NEAR(right, 1.0, weights.weight - weights.log_weight * exponent)
                << isa.name << " " << best << " " << exponent;
          }
        }
      }
  });
}

/// Rows of every kind: peaked, normal, flat, of equals, of few numbers, with -infinity, stepped.
ef::Tensor<float, 2> rows_of_every_kind(Index vocab, unsigned seed) {
  auto rows = random_tensor<float, 2>({8, vocab}, seed);
  std::mt19937 generator(seed);
  for (Index v = 0; v < vocab; ++v) {
    rows(1, v) *= 3;
    rows(2, v) *= .01f;
    rows(3, v) = 7.5f;
    rows(4, v) = std::nearbyint(rows(4, v) * 4);
    if (generator() % 4 != 0) rows(5, v) = -kInfinity;
    rows(6, v) = static_cast<float>(v / (vocab / 7)) * 3 + rows(6, v) * .001f;
    rows(7, v) = static_cast<float>(static_cast<ef::bfloat16>(rows(7, v) * 2 + 30));
  }
  rows(0, static_cast<Index>(generator() % static_cast<unsigned>(vocab))) = 14;
  return rows;
}

/// Whether two tensors of probabilities are positive at the same tokens.
testing::AssertionResult keep_same_tokens(const ef::Tensor<float, 2>& p,
                                          const ef::Tensor<float, 2>& q) {
  for (Index r = 0; r < p.dimension(0); ++r)
    for (Index v = 0; v < p.dimension(1); ++v)
      if ((p(r, v) > 0) != (q(r, v) > 0))
        return testing::AssertionFailure()
               << "row " << r << " token " << v << ": " << p(r, v) << " and " << q(r, v);
  return testing::AssertionSuccess();
}

TEST(SamplingBulk, TokensAreThoseOfSumsInDouble) {
  std::mt19937 generator(11);
  std::uniform_real_distribution<double> uniform(0, 1);
  const auto pick = [&](std::initializer_list<double> values) {
    return *(values.begin() + generator() % values.size());
  };
  for (Index vocab : {4100, 8192, 20011, 40000})
    for (unsigned trial = 0; trial < 25; ++trial) {
      const auto rows = rows_of_every_kind(vocab, 100 * trial + static_cast<unsigned>(vocab % 97));
      const ef::Tensor<double, 2> exact = rows.cast<double>();
      ef::SamplingParams params{.temperature = pick({1, 1, .3, 2.5})};
      if (trial % 5 != 0) params.top_p = pick({.9, .5, .1, .99, .999, uniform(generator)});
      if (trial % 3 == 0) params.min_p = pick({.05, .5, 1e-4});
      if (trial % 4 == 1) params.top_k = static_cast<Index>(pick({1, 50, 700, 5000}));
      if (trial % 7 == 3) params.min_tokens_to_keep = 5;
      if (trial % 6 == 2) params.typical_p = pick({.9, .3, .99});
      if (trial % 2 == 1) params.order = ef::kLlamaCppOrder;
      ef::Philox rng{trial}, same{trial};
      const Ids expected = ef::sample(exact, params, same);
      const Ids ids = ef::sample(rows, params, rng);
      const auto p = ef::sampling_probabilities(rows, params),
                 q = ef::sampling_probabilities(exact, params);
      for (Index r = 0; r < 8; ++r)
        EXPECT_EQ(ids(r), expected(r)) << "vocab " << vocab << " trial " << trial << " row " << r;
      ASSERT_TRUE(keep_same_tokens(p, q)) << "vocab " << vocab << " trial " << trial;
      if (trial % 5 == 3)
        for_each_isa([&](auto isa) {
          Ids other(8);
          ef::Philox again{trial};
          ef::sample_into(on(isa), other, rows, params, again);
          EXPECT_TRUE(same_bits(other, expected)) << isa.name << " " << vocab << " " << trial;
        });
    }
}

TEST(SamplingBulk, MomentsAreAsRightAsTheySay) {
  for (Index vocab : {300, 20011}) {
    auto rows = rows_of_every_kind(vocab, 3);
    for (Index v = 1; v < vocab; v += 3) rows(1, v) = v % 2 == 0 ? -1e30f : -FLT_MAX;
    for (Index r = 0; r < 8; ++r)
      for (double inverse : {1.0, .3, 7.0})
        for_each_isa([&](auto isa) {
          using Isa = decltype(isa);
          using Weights = ef::cpu::FusedWeights<ef::simd::Vec<float, Isa>>;
          const auto blocks = static_cast<std::size_t>(vocab / 128 + 1);
          std::vector<float> maxima(blocks), found(static_cast<std::size_t>(vocab) + 1024),
              lanes(16 * blocks);
          std::vector<std::int32_t> begin(blocks + 1);
          ef::cpu::SamplingRow<float> row{&rows(r, 0), vocab, maxima.data(), {}, 1.0};
          ef::cpu::scan_row<Isa>(row);
          row.inverse_temperature = inverse;
          ef::cpu::WeighedRow<float> sums{};
          sums.lanes = lanes.data(), sums.begin = begin.data();
          const Weights weights(row, row.band.hi - 1);
          const float nearer = .5f, farther = 1.25f;
          const ef::cpu::Ring ring{row.band.hi - 1, nearer, farther};
          ef::cpu::RowWeighing<Isa, float, ef::cpu::ByDistance>{row, weights, ring.rule(weights),
                                                                found.data()}(sums);
          const ef::cpu::BulkMoments moments(row, weights, sums);
          long double total = 0, moment = 0, first = 0;
          Index gathered = 0, at_ends = 0;
          for (Index v = 0; v < vocab; ++v) {
            const long double w = ef::cpu::token_weight(rows(r, v), row.band.hi, inverse);
            total += w;
            if (w > 0) moment += w * rows(r, v);
            const double distance = std::abs(static_cast<double>(rows(r, v)) - weights.zero);
            const auto is_at = [&](double end) { return std::abs(distance - end) < 2e-7 * end; };
            if (is_at(nearer) || is_at(farther)) {
              ++at_ends;
            } else {
              if (distance < nearer) first += w;
              gathered += distance > nearer && distance < farther;
            }
          }
          EXPECT_NEAR(static_cast<double>(total), moments.total.value, moments.total.error)
              << isa.name << " row " << r << " of " << vocab << " " << inverse;
          EXPECT_NEAR(static_cast<double>(moment / total), moments.mean.value, moments.mean.error)
              << isa.name << " row " << r << " of " << vocab << " " << inverse;
          EXPECT_LT(moments.mean.error, 1e-5 * (1 + moments.spread) / (std::min)(inverse, 1.0));
          if (at_ends == 0) {
            EXPECT_NEAR(static_cast<double>(first), sums.total_above * weights.unit,
                        2e-6 * static_cast<double>(first));
            EXPECT_EQ(gathered, sums.count);
          }
        });
  }
}

// The maxima of the blocks tell of some of these that the best token is all that is kept: around
// where they stop to, and around where others are kept too.
TEST(SamplingBulk, PeaksKeepTheTokensOfSumsInDouble) {
  constexpr Index vocab = 9001, peaks = 40;
  auto rows = random_tensor<float, 2>({peaks, vocab}, 4);
  for (Index r = 0; r < peaks; ++r) {
    const float peak = 6 + .25f * static_cast<float>(r);
    rows(r, 128 * r + r) = peak;
    if (r % 3 == 1) rows(r, 128 * r + r + 1) = peak - .01f;
    if (r % 3 == 2) rows(r, 7000) = peak - static_cast<float>(r % 4);
  }
  const ef::Tensor<double, 2> exact = rows.cast<double>();
  for (double p : {.05, .4, .9, .999})
    for (double temperature : {.7, 1.0, 1.6})
      for (const ef::SamplingParams& params :
           {ef::SamplingParams{.temperature = temperature, .top_p = p},
            ef::SamplingParams{.temperature = temperature, .typical_p = p}})
        ASSERT_TRUE(keep_same_tokens(ef::sampling_probabilities(rows, params),
                                     ef::sampling_probabilities(exact, params)))
            << p << " " << temperature;
}

/// Makes tokens of a row as far above its mean logit as others are below, but for a rounding.
void mirror_about_mean(ef::Tensor<float, 2>& rows, Index r) {
  const Index vocab = rows.dimension(1);
  for (int round = 0; round < 4; ++round) {
    double best = rows(r, 0), total = 0, mean = 0;
    for (Index v = 0; v < vocab; ++v) best = (std::max)(best, static_cast<double>(rows(r, v)));
    for (Index v = 0; v < vocab; ++v) {
      const double w = std::exp(static_cast<double>(rows(r, v)) - best);
      total += w;
      mean += w * static_cast<double>(rows(r, v));
    }
    for (Index v = 0; v + 1 < vocab; v += 2)
      if (const double below = mean / total - static_cast<double>(rows(r, v)); below > 0)
        rows(r, v + 1) = static_cast<float>(mean / total + below);
  }
}

// Of flat rows about one in eight is too near for float.
TEST(SamplingBulk, NearestTokensAreThoseOfSumsInDouble) {
  std::mt19937 generator(3);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (Index vocab : {300, 5000, 9001, 40000})
    for (unsigned trial = 0; trial < 12; ++trial) {
      auto rows = rows_of_every_kind(vocab, 100 * trial + static_cast<unsigned>(vocab % 97));
      for (Index v = 0; v < vocab; ++v) rows(6, v) = rows(0, v) * .2f;
      mirror_about_mean(rows, 6);
      for (Index v = 1; v < vocab; v += 3) rows(0, v) = v % 2 == 0 ? -1e30f : -FLT_MAX;
      const ef::Tensor<double, 2> exact = rows.cast<double>();
      ef::SamplingParams params{.typical_p = trial % 4 == 0 ? .9 : uniform(generator)};
      if (trial % 3 == 1) params.temperature = .05 + 2 * uniform(generator);
      if (trial % 4 == 2) params.top_p = .5 + .5 * uniform(generator);
      if (trial % 2 == 1) params.order = ef::kLlamaCppOrder;
      const auto p = ef::sampling_probabilities(rows, params),
                 q = ef::sampling_probabilities(exact, params);
      ASSERT_TRUE(keep_same_tokens(p, q)) << "vocab " << vocab << " trial " << trial;
      if (trial % 4 == 0)
        for_each_isa([&](auto isa) {
          ef::Tensor<float, 2> other(8, vocab);
          ef::sampling_probabilities_into(on(isa), other, rows, params);
          EXPECT_TRUE(same_bits(other, p)) << isa.name << " " << vocab << " " << trial;
        });
    }
}

TEST(SamplingBulk, NearestTokensOfTheLargestFloats) {
  for (Index vocab : {300, 9000}) {
    ef::Tensor<float, 2> rows(2, vocab);
    for (Index v = 0; v < vocab; ++v) {
      rows(0, v) = v % 3 == 0 ? FLT_MAX : -FLT_MAX;
      rows(1, v) = v % 3 == 0 ? -3.4e38f : -FLT_MAX;
    }
    check_distribution(rows, {.typical_p = .5}, "equals");
    rows(0, 1) = 3.4e38f;
    check_distribution(rows, {.typical_p = .5}, "others");
  }
}

double probability_of(const ef::Tensor<double, 2>& rows, Index r, Index token) {
  double best = -kInfinity, total = 0;
  for (Index v = 0; v < rows.dimension(1); ++v) best = (std::max)(best, rows(r, v));
  for (Index v = 0; v < rows.dimension(1); ++v)
    total += ef::cpu::token_weight(rows(r, v), best, 1.0);
  return ef::cpu::token_weight(rows(r, token), best, 1.0) / total;
}

// Thresholds at a token's own probability are decided by sums in double, others by float.
TEST(SamplingBulk, StagesKeepTheTokensOfSumsInDouble) {
  std::mt19937 generator(5);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (Index vocab : {4100, 9001, 40000})
    for (unsigned trial = 0; trial < 14; ++trial) {
      auto rows = rows_of_every_kind(vocab, 100 * trial + static_cast<unsigned>(vocab % 97));
      for (Index v = 1; v < vocab; v += 3) rows(6, v) = v % 2 == 0 ? -1e30f : -FLT_MAX;
      const ef::Tensor<double, 2> exact = rows.cast<double>();
      const auto token = static_cast<Index>(generator() % static_cast<unsigned>(vocab));
      const double share = uniform(generator), at_token = probability_of(exact, trial % 8, token);
      ef::SamplingParams params{.order = ef::kLlamaCppOrder};
      switch (trial % 7) {
        case 0:
          params.top_h = share;
          break;
        case 1:
          params.mirostat = 2, params.mirostat_mu = -std::log2(at_token);
          break;
        case 2:
          params.mirostat = 2, params.mirostat_mu = 16 * share;
          break;
        case 3:
          params.xtc_probability = 1, params.xtc_threshold = (std::min)(at_token, .5);
          break;
        case 4:
          params.top_n_sigma = 3 * share;
          break;
        case 5:
          params.epsilon_cutoff = at_token;
          break;
        default:
          params.eta_cutoff = (std::min)(1e-3 * share, at_token);
      }
      if (trial % 7 > 4) params.order = ef::kHuggingFaceOrder;
      if (trial % 3 == 1) params.temperature = .2 + 2 * uniform(generator);
      if (trial % 4 == 1) params.min_tokens_to_keep = 40;
      const auto p = ef::sampling_probabilities(rows, params),
                 q = ef::sampling_probabilities(exact, params);
      ASSERT_TRUE(keep_same_tokens(p, q)) << "vocab " << vocab << " trial " << trial;
      if (vocab == 9001)
        for_each_isa([&](auto isa) {
          ef::Tensor<float, 2> other(8, vocab);
          ef::sampling_probabilities_into(on(isa), other, rows, params);
          EXPECT_TRUE(same_bits(other, p)) << isa.name << " " << trial;
        });
    }
}

// Squares of float that overflow say nothing of the deviation.
TEST(SamplingBulk, TopNSigmaOfLogitsWhoseSquaresOverflow) {
  ef::Tensor<float, 2> row(1, 8192);
  for (Index i = 0; i < row.size(); ++i) row(0, i) = static_cast<float>(i % 7);
  for (float best : {1.5e19f, 3e19f, 1e20f, std::numeric_limits<float>::max()}) {
    row(0, 4321) = best;
    const auto p =
        ef::sampling_probabilities(row, ef::SamplingParams{.temperature = 1e25, .top_n_sigma = 1});
    EXPECT_EQ(p(0, 4321), 1.0f) << best;
  }
}

// Many draws from a flat row, of which one in some twenty is too near for float.
TEST(SamplingBulk, DrawsAreThoseOfSumsInDouble) {
  const auto row = random_tensor<float, 2>({1, 50000}, 5, .01);
  const ef::Tensor<float, 2> rows = row.broadcast(Eigen::array<Index, 2>{40, 1});
  const ef::Tensor<double, 2> exact = rows.cast<double>();
  for (double p : {1.0, .9, .02}) {
    ef::Philox rng{7}, same{7};
    for (int step = 0; step < 4; ++step)
      EXPECT_TRUE(
          same_bits(ef::sample(rows, {.top_p = p}, rng), ef::sample(exact, {.top_p = p}, same)))
          << p;
  }
}

}  // namespace
