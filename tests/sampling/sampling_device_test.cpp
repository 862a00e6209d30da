// Greedy and top-k sampling on every device: the same rule, the same random numbers, bad rows
// reported.
#include <eigenformer/sampling.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
ef::Tensor<T, 2> rows_with_ties_and_faults(Index vocab) {
  auto logits = random_tensor<T, 2>({6, vocab}, 4, 3.0);
  for (Index t = 0; t < vocab; ++t)
    logits(1, t) = static_cast<T>(static_cast<float>(t % 3));  // many equals
  logits(2, vocab / 2) = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
  logits(3, vocab - 1) = static_cast<T>(kInfinity);
  for (Index t = 0; t < vocab; ++t) logits(4, t) = static_cast<T>(-kInfinity);
  logits(5, 0) = static_cast<T>(-kInfinity);
  return logits;
}

constexpr ef::SampleStatus kStatuses[] = {
    ef::SampleStatus::ok,       ef::SampleStatus::ok,
    ef::SampleStatus::nan,      ef::SampleStatus::positive_infinity,
    ef::SampleStatus::no_token, ef::SampleStatus::ok};

ef::Tensor<std::int8_t, 1> poisoned_statuses() { return poisoned_tensor<std::int8_t, 1>({6}); }

template <typename T>
void check(Index vocab, Index k, double temperature, bool by_row = false) {
  const auto logits = rows_with_ties_and_faults<T>(vocab);
  const auto generator = [&](Index row) {
    return ef::Philox(by_row ? static_cast<std::uint64_t>(20 + row) : 11, 5);
  };
  for_each_device([&](const auto& bench) {
    auto device_logits = on_device(bench, logits);
    auto ids = on_device(bench, poisoned_tensor<std::int32_t, 1>({6}));
    auto raw = on_device(bench, poisoned_statuses());
    const std::span<ef::SampleStatus> statuses(
        reinterpret_cast<ef::SampleStatus*>(raw.view().data()), 6);
    std::vector<ef::Philox> generators;
    for (Index r = 0; r < 6; ++r) generators.push_back(generator(r));
    if (temperature == 0)
      ef::greedy_sample_into(bench.device, ids.view(), device_logits.cview(), statuses);
    else if (by_row)
      ef::top_k_sample_into(bench.device, ids.view(), device_logits.cview(), k, temperature,
                            generators, statuses);
    else
      ef::top_k_sample_into(bench.device, ids.view(), device_logits.cview(), k, temperature,
                            generators[0], statuses);
    const auto got = ids.host();
    const auto got_statuses = raw.host();
    for (Index r = 0; r < 6; ++r) {
      ASSERT_EQ(static_cast<int>(got_statuses(r)), static_cast<int>(kStatuses[r]));
      if (kStatuses[r] != ef::SampleStatus::ok) {
        ASSERT_EQ(got(r), -1);
        continue;
      }
      // By definition: order by logit, then index; keep k; walk the cumulative weights in token
      // order.
      std::vector<std::pair<double, Index>> order;
      for (Index t = 0; t < vocab; ++t) order.push_back({-static_cast<double>(logits(r, t)), t});
      std::sort(order.begin(), order.end());
      if (temperature == 0) {
        ASSERT_EQ(got(r), order[0].second);
        continue;
      }
      std::vector<std::pair<Index, double>> kept;
      double total = 0;
      for (Index i = 0; i < std::min(k, vocab); ++i) {
        const auto& [negative, token] = order[static_cast<std::size_t>(i)];
        kept.push_back({token, std::exp((order[0].first - negative) / temperature)});
        total += kept.back().second;
      }
      std::sort(kept.begin(), kept.end());
      const auto row = static_cast<std::uint32_t>(by_row ? 0 : r);
      const double target = generator(r).uniform(row) * total;
      double passed = 0;
      Index expected = -1;
      bool near_boundary = false;
      for (const auto& [token, weight] : kept) {
        passed += weight;
        near_boundary = near_boundary || std::abs(passed - target) < 1e-9 * total;
        if (expected < 0 && target < passed) expected = token;
      }
      if (!near_boundary) {
        ASSERT_EQ(got(r), expected) << "row " << r << " vocab " << vocab << " k " << k;
      }
    }
  });
}

TEST(SamplingOnDevice, GreedyAndTopKFollowTheirDefinition) {
  for (Index vocab : {2, 31, 256, 1000, 5000})
    for (Index k : {1, 2, 40, 100000}) {
      check<float>(vocab, k, 0.0);
      check<float>(vocab, k, 0.7);
      check<float>(vocab, k, 0.7, true);
      check<ef::bfloat16>(vocab, k, 1.3);
      check<double>(vocab, k, 1.0);
    }
}

}  // namespace
