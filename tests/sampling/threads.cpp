// Law: a row that several threads share has the bits of the row alone on one, whatever the stages.
#include <eigenformer/log_softmax.h>
#include <eigenformer/parallel_region.h>
#include <eigenformer/top_k.h>

#include "allocation_count.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

constexpr Index kWide = 200077;  // 7 threads have enough to do in a region

/// A peaked, a normal, a flat row; one of equals; one of few tokens in play.
ef::Tensor<float, 2> long_rows() {
  auto rows = random_tensor<float, 2>({5, kWide}, 8);
  for (Index v = 0; v < kWide; ++v) {
    rows(1, v) *= 3;
    rows(2, v) *= .01f;
    rows(3, v) = -2.5f;
    if (v % 11 != 3) rows(4, v) = -kInfinity;
  }
  rows(0, kWide / 3) = 16;
  return rows;
}

std::vector<ef::SamplingParams> chains() {
  return {{},
          {.temperature = .7, .top_p = .9},
          {.top_p = .5, .min_p = 1e-3},
          {.temperature = .8, .top_k = 50, .top_p = .95, .min_p = .05},
          {.typical_p = .9},
          {.top_p = .98, .typical_p = .9}};
}

template <typename T>
ef::Tensor<T, 2> row_at(const ef::Tensor<T, 2>& rows, Index r) {
  return rows.slice(Eigen::array<Index, 2>{r, 0}, Eigen::array<Index, 2>{1, kWide});
}

/// Calls check(device) where the threads of a region share a row.
template <typename Check>
void with_shared_rows(Check check) {
  for (int threads : {2, 3, 8}) {
    Eigen::ThreadPool pool(threads);
    const Eigen::ThreadPoolDevice device(&pool, threads);
    const ef::ParallelRegion region(device);
    ASSERT_NE(ef::cpu::pool_of_rows(device, 1, kWide), nullptr);
    check(device, threads);
  }
}

template <typename T>
void check_draws(const ef::Tensor<float, 2>& numbers) {
  const ef::Tensor<T, 2> rows = numbers.cast<T>();
  for (const ef::SamplingParams& params : chains()) {
    std::vector<ef::Philox> generators;
    for (unsigned r = 0; r < 5; ++r) generators.emplace_back(r);
    const Ids batch = ef::sample(rows, params, generators);
    with_shared_rows([&](const auto& device, int threads) {
      for (Index r = 0; r < 5; ++r) {
        const ef::Tensor<T, 2> row = row_at(rows, r);
        ef::Philox rng{static_cast<std::uint64_t>(r)};
        EXPECT_EQ(ef::sample(device, row, params, rng)(0), batch(r))
            << threads << " threads, row " << r << " of " << sizeof(T) << " bytes";
        EXPECT_EQ(ef::greedy_sample(device, row)(0), ef::greedy_sample(row)(0));
      }
    });
  }
}

TEST(SamplingThreads, ShareARow) {
  const auto rows = long_rows();
  check_draws<float>(rows);
  check_draws<ef::bfloat16>(rows);
  check_draws<double>(rows);
}

TEST(SamplingThreads, KeepTheBits) {
  const auto rows = long_rows();
  with_shared_rows([&](const auto& device, int threads) {
    for (Index r = 0; r < 5; ++r) {
      const ef::Tensor<float, 2> row = row_at(rows, r);
      for (const ef::SamplingParams& params : chains())
        EXPECT_TRUE(same_bits(ef::sampling_probabilities(device, row, params),
                              ef::sampling_probabilities(row, params)))
            << threads << " threads, row " << r;
      EXPECT_TRUE(same_bits(ef::log_softmax(device, row), ef::log_softmax(row)));
      const auto best = ef::top_k(device, row, 300), same = ef::top_k(row, 300);
      EXPECT_TRUE(same_bits(best.ids, same.ids) && same_bits(best.values, same.values));
    }
  });
}

TEST(SamplingThreads, SeeWhatIsWrongWithARow) {
  ef::Tensor<float, 2> row(1, kWide);
  Ids id(1);
  std::vector<ef::SampleStatus> status(1);
  const auto expect = [&](ef::SampleStatus expected) {
    with_shared_rows([&](const auto& device, int) {
      ef::Philox rng{1};
      ef::sample_into(device, id, row, {.top_p = .9}, rng, status);
      EXPECT_EQ(status[0], expected);
      EXPECT_EQ(id(0), -1);
    });
  };
  row.setConstant(-kInfinity);
  expect(ef::SampleStatus::no_token);
  row(0, 150000) = kInfinity;
  expect(ef::SampleStatus::positive_infinity);
  row(0, 77) = kNaN;
  expect(ef::SampleStatus::nan);
}

TEST(SamplingThreads, TakeNoMemory) {
  const ef::Tensor<float, 2> row = row_at(long_rows(), 1);
  ef::Tensor<float, 2> out(1, kWide);
  Ids id(1);
  std::vector<ef::SampleStatus> status(1);
  ef::Workspace workspace;
  Eigen::ThreadPool pool(2);
  const Eigen::ThreadPoolDevice device(&pool, 2);
  // a helper that leaves in between would have to be called back
  const ef::ParallelRegion region(device, {.linger = std::chrono::minutes(1)});
  ef::Philox rng{1};
  const std::vector<ef::SamplingParams> sets = chains();
  const auto calls = [&] {
    for (const ef::SamplingParams& params : sets)
      ef::sample_into(device, id, row, params, rng, status, workspace);
    ef::log_softmax_into(device, out, row, workspace);
  };
  calls();
  EXPECT_EQ(count_allocations(calls), 0);
}

}  // namespace
