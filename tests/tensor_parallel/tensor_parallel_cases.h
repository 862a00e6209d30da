/// \file
/// What the tensor-parallel layers must do on every communicator, as functions that each rank
/// calls: the same cases run on one rank, on threads and under MPI. Every rank makes the same
/// inputs from the same seeds.
#pragma once

#include <eigenformer/reference/tensor_parallel.h>
#include <eigenformer/sampling.h>
#include <eigenformer/tensor_parallel.h>

#include "compare.h"

namespace eigenformer_test {

inline constexpr std::array<Index, 7> kOutputs{1, 2, 3, 5, 13, 64, 97};

template <typename T>
ef::Tensor<T, 3> random_input(Index batch, Index sequence, Index features) {
  return random_tensor<T, 3>({batch, sequence, features}, 1);
}

/// x as (tokens, features).
template <typename T>
ef::TensorView<const T, 2> tokens_of(const ef::Tensor<T, 3>& x) {
  return ef::TensorView<const T, 2>(x.data(), x.dimension(0) * x.dimension(1), x.dimension(2));
}

/// This rank's features of x.
template <typename T, ef::Communicator C>
ef::Tensor<T, 3> own_features(const ef::Tensor<T, 3>& x, const C& communicator) {
  const ef::ShardRange own =
      ef::shard_range(x.dimension(2), communicator.rank(), communicator.size());
  return x.slice(Eigen::array<Index, 3>{0, 0, own.begin},
                 Eigen::array<Index, 3>{x.dimension(0), x.dimension(1), own.size()});
}

template <typename T, ef::Communicator C>
void check_layers(C& communicator, Index batch, Index sequence, Index in, Index out) {
  const auto x = random_input<T>(batch, sequence, in);
  const auto weight = random_tensor<T, 2>({out, in}, 2);
  const auto bias = random_tensor<T, 1>({out}, 3);
  const auto full = ef::linear(tokens_of(x), weight),
             with_bias = ef::linear(tokens_of(x), weight, bias);

  const ef::Tensor<T, 3> y = ef::column_parallel_linear(x, weight, communicator);
  ASSERT_EQ(y.dimension(0), batch);
  ASSERT_EQ(y.dimension(1), sequence);
  ASSERT_EQ(y.dimension(2), out);
  ASSERT_TRUE(same_bits(y, full));
  ASSERT_TRUE(same_bits(ef::column_parallel_linear(x, weight, communicator, bias), with_bias));
  const ef::Tensor<T, 2> rank2 =
      ef::column_parallel_linear(tokens_of(x), weight, communicator, bias);
  ASSERT_TRUE(same_bits(rank2, with_bias));

  const ef::Tensor<T, 3> part =
      ef::column_parallel_linear(x, weight, communicator, bias, {.gather_output = false});
  const ef::ShardRange own = ef::shard_range(out, communicator.rank(), communicator.size());
  ASSERT_EQ(part.dimension(2), own.size());
  for (Index t = 0; t < with_bias.dimension(0); ++t)
    for (Index o = own.begin; o < own.end; ++o)
      ASSERT_EQ(
          std::memcmp(&part.data()[t * own.size() + o - own.begin], &with_bias(t, o), sizeof(T)),
          0);

  const ef::Tensor<T, 3> z =
      ef::row_parallel_linear(own_features(x, communicator), weight, communicator);
  ASSERT_TRUE(same_bits(z, full));
  ASSERT_TRUE(
      same_bits(ef::row_parallel_linear(own_features(x, communicator), weight, communicator, bias),
                with_bias));
}

/// A column-parallel layer in parts, then a row-parallel one: the two halves of a transformer
/// block's MLP.
template <ef::Communicator C>
void check_pair_of_layers(C& communicator) {
  for (Index hidden : {1, 5, 13, 300}) {
    const auto x = random_input<float>(2, 3, 24);
    const auto up = random_tensor<float, 2>({hidden, 24}, 5),
               down = random_tensor<float, 2>({11, hidden}, 6);
    const auto bias = random_tensor<float, 1>({11}, 7);
    const auto middle = ef::column_parallel_linear(x, up, communicator, {.gather_output = false});
    const auto y = ef::row_parallel_linear(middle, down, communicator, bias);
    ASSERT_TRUE(same_bits(y, ef::linear(ef::linear(tokens_of(x), up), down, bias))) << hidden;
  }
}

template <typename T, typename X, ef::Communicator C>
void check_packed(C& communicator) {
  for (Index out : kOutputs) {
    const Index in = 64;
    const auto x = random_input<X>(2, 3, in);
    const auto weight = random_tensor<float, 2>({out, in}, 8);
    const auto bias = random_tensor<float, 1>({out}, 9);
    const auto packed = ef::pack_weight<T>(weight);
    const auto shard = ef::pack_column_shard<T>(weight, communicator);
    ASSERT_EQ(shard.out_features, out);
    const auto full = ef::linear(tokens_of(x), packed, bias);
    ASSERT_TRUE(same_bits(ef::column_parallel_linear(x, shard, communicator),
                          ef::linear(tokens_of(x), packed)))
        << out;
    ASSERT_TRUE(same_bits(ef::column_parallel_linear(x, shard, communicator, bias), full)) << out;
    ASSERT_TRUE(same_bits(
        ef::row_parallel_linear(own_features(x, communicator), shard, communicator, bias), full))
        << out;
    const auto part =
        ef::column_parallel_linear(x, shard, communicator, bias, {.gather_output = false});
    ASSERT_EQ(part.dimension(2),
              ef::shard_range(out, communicator.rank(), communicator.size()).size());
  }
}

template <ef::Communicator C>
void check_vocabulary(C& communicator) {
  for (Index vocabulary : {1, 2, 5, 13, 97, 1000}) {
    const auto hidden = random_tensor<float, 2>({6, 32}, 10);
    auto head = random_tensor<float, 2>({vocabulary, 32}, 11, 0.2);
    if (vocabulary == 97)  // ties across ranks
      for (Index copy : {20, 50, 96}) head.chip(copy, 0) = head.chip(3, 0);
    const auto logits = ef::linear(hidden, head);
    const ef::Tensor<std::int32_t, 1> greedy =
        ef::vocabulary_parallel_greedy(hidden, head, communicator);
    const auto shard = ef::pack_column_shard<float>(head, communicator);
    const auto packed_logits = ef::linear(hidden, ef::pack_weight<float>(head));
    const auto packed_greedy = ef::vocabulary_parallel_greedy(hidden, shard, communicator);
    for (Index row = 0; row < 6; ++row) {
      ASSERT_EQ(greedy(row), ef::reference::by_likelihood(logits, row)[0]) << vocabulary;
      ASSERT_EQ(packed_greedy(row), ef::reference::by_likelihood(packed_logits, row)[0])
          << vocabulary;
    }
    for (Index k : {Index{1}, Index{2}, Index{7}, Index{50}, std::numeric_limits<Index>::max()}) {
      ef::Philox rng{99};
      for (int step = 0; step < 4; ++step) {
        const auto ids =
            ef::vocabulary_parallel_top_k_sample(hidden, head, communicator, k, 1.5f, rng);
        ASSERT_EQ(rng.position(), static_cast<std::uint64_t>(step) + 1);
        const ef::Philox used{99, static_cast<std::uint64_t>(step)};
        ef::Philox gathered = used;
        ASSERT_TRUE(same_bits(ids, ef::top_k_sample(logits, k, 1.5f, gathered)))
            << vocabulary << " " << k;
        for (Index row = 0; row < 6; ++row)
          ASSERT_EQ(ids(row),
                    ef::reference::top_k_token(logits, row, k, 1.5,
                                               used.uniform(static_cast<std::uint32_t>(row))))
              << vocabulary << " " << k;
      }
      const auto cold =
          ef::vocabulary_parallel_top_k_sample(hidden, head, communicator, k, 0.0f, rng);
      ASSERT_TRUE(same_bits(cold, greedy));
      ASSERT_EQ(rng.position(), 5u);
    }
  }
}

/// Rows that cannot be drawn from are refused on every rank, and the ranks can go on.
template <ef::Communicator C>
void check_vocabulary_refusals(C& communicator) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  ef::Philox rng{1};
  ef::Tensor<float, 2> hidden(3, 1);
  hidden.setConstant(1.0f);
  ef::Tensor<float, 2> head(9, 1);
  head.setConstant(0.5f);
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity}) {
    for (Index token : {0, 4, 8}) {
      head.setConstant(0.5f);
      head(token, 0) = bad;
      expect_throws<std::invalid_argument>(
          [&] { ef::vocabulary_parallel_greedy(hidden, head, communicator); },
          {"vocabulary_parallel_greedy", "row 0", "NaN or +infinity"});
      expect_throws<std::invalid_argument>(
          [&] { ef::vocabulary_parallel_top_k_sample(hidden, head, communicator, 3, 1.0f, rng); },
          {"row 0"});
    }
  }
  head.setConstant(-kInfinity);
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_greedy(hidden, head, communicator); },
      {"row 0", "all -infinity"});
  head(7, 0) = 0.0f;
  ASSERT_EQ(ef::vocabulary_parallel_greedy(hidden, head, communicator)(2), 7);
  ASSERT_EQ(ef::vocabulary_parallel_top_k_sample(hidden, head, communicator, 5, 1.0f, rng)(1), 7);
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_top_k_sample(hidden, head, communicator, 0, 1.0f, rng); },
      {"k is 0"});
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_top_k_sample(hidden, head, communicator, 1, -1.0f, rng); },
      {"temperature"});
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_greedy(hidden, ef::Tensor<float, 2>(9, 2), communicator); },
      {"weight has 2 columns, hidden has 1 features"});
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_greedy(hidden, ef::Tensor<float, 2>(0, 1), communicator); },
      {"0 rows"});
  EXPECT_EQ(ef::vocabulary_parallel_greedy(ef::Tensor<float, 2>(0, 1), head, communicator).size(),
            0);
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_top_k_sample(hidden, head, communicator, 1, kInfinity, rng); },
      {"temperature"});
  EXPECT_EQ(rng.position(), 1u);  // one call was good
}

/// A row that cannot be drawn from is told by its status on every rank and harms no other.
template <ef::Communicator C>
void check_vocabulary_statuses(C& communicator) {
  using Status = ef::SampleStatus;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto good = random_tensor<float, 2>({5, 4}, 10);
  const auto head = random_tensor<float, 2>({9, 4}, 11);
  ef::Tensor<float, 2> hidden = good;
  hidden(1, 2) = std::numeric_limits<float>::quiet_NaN();
  const std::vector<Status> nan_only{Status::ok, Status::nan, Status::ok, Status::ok, Status::ok};
  const Eigen::DefaultDevice device;
  ef::Philox rng{3}, same{3};
  const auto sampled = ef::vocabulary_parallel_top_k_sample(good, head, communicator, 4, 1.f, same);
  const auto best = ef::vocabulary_parallel_greedy(good, head, communicator);
  const auto check = [&](const auto& ids, const auto& expected, Index bad) {
    for (Index r = 0; r < 5; ++r) ASSERT_EQ(ids(r), r == bad ? -1 : expected(r)) << r;
  };
  ef::Tensor<std::int32_t, 1> ids(5);
  std::vector<Status> statuses(5, Status::negative);
  ef::vocabulary_parallel_greedy_into(device, ids, hidden, head, communicator, statuses);
  check(ids, best, 1);
  ASSERT_EQ(statuses, nan_only);
  statuses.assign(5, Status::negative);
  ef::vocabulary_parallel_top_k_sample_into(device, ids, hidden, head, communicator, 4, 1.f, rng,
                                            statuses);
  check(ids, sampled, 1);
  ASSERT_EQ(statuses, nan_only);
  ASSERT_EQ(rng.position(), 1u);
  ef::vocabulary_parallel_greedy_into(device, ids, hidden, head, communicator);  // no statuses
  check(ids, best, 1);
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_top_k_sample(hidden, head, communicator, 4, 1.f, rng); },
      {"row 1", "NaN or +infinity"});
  ASSERT_EQ(rng.position(), 1u);
  // +infinity in one rank's rows and NaN in another's; all -infinity.
  ef::Tensor<float, 2> one(2, 1), column(9, 1);
  one.setConstant(1.f);
  ef::Tensor<std::int32_t, 1> two(2);
  std::vector<Status> both(2);
  const auto status = [&](float first, float last) {
    column.setConstant(0.f);
    column(0, 0) = first;
    column(8, 0) = last;
    ef::vocabulary_parallel_greedy_into(device, two, one, column, communicator, both);
    EXPECT_EQ(both[0], both[1]);
    return both[1];
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  ASSERT_EQ(status(0.f, kInfinity), Status::positive_infinity);
  ASSERT_EQ(status(kInfinity, nan), Status::nan);
  ASSERT_EQ(status(nan, kInfinity), Status::nan);
  ASSERT_EQ(status(1.f, -kInfinity), Status::ok);
  column.setConstant(-kInfinity);
  ef::vocabulary_parallel_greedy_into(device, two, one, column, communicator, both);
  ASSERT_EQ(both[1], Status::no_token);
  ASSERT_EQ(two(1), -1);
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_greedy_into(device, two, good, head, communicator); },
      {"ids has 2", "5 rows"});
  expect_throws<std::invalid_argument>(
      [&] { ef::vocabulary_parallel_greedy_into(device, ids, good, head, communicator, both); },
      {"statuses has 2", "5 rows"});
}

template <ef::Communicator C>
void check_layer_refusals(C& communicator) {
  const auto x = random_input<float>(2, 3, 128);
  const auto weight = random_tensor<float, 2>({10, 96}, 2),
             good = random_tensor<float, 2>({10, 128}, 2);
  const auto bias = random_tensor<float, 1>({9}, 3);
  expect_throws<std::invalid_argument>(
      [&] { ef::column_parallel_linear(x, weight, communicator); },
      {"column_parallel_linear: weight has 96 columns, input has 128 features"});
  expect_throws<std::invalid_argument>(
      [&] { ef::column_parallel_linear(x, good, communicator, bias); },
      {"column_parallel_linear: bias has 9 elements, weight has 10 rows"});
  const Index own = ef::shard_range(128, communicator.rank(), communicator.size()).size();
  const ef::Tensor<float, 3> one_more(2, 3, own + 1);
  expect_throws<std::invalid_argument>(
      [&] { ef::row_parallel_linear(one_more, good, communicator); },
      {"row_parallel_linear: input has " + std::to_string(own + 1) + " features",
       "has " + std::to_string(own)});
  expect_throws<std::invalid_argument>(
      [&] { ef::row_parallel_linear(own_features(x, communicator), good, communicator, bias); },
      {"bias has 9"});
  ef::Tensor<float, 3> output(2, 3, 11);
  output.setConstant(7.0f);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::column_parallel_linear_into(Eigen::DefaultDevice{}, output, x, good, communicator);
      },
      {"output has shape (2, 3, 11)", "10 output features"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::row_parallel_linear_into(Eigen::DefaultDevice{}, output, own_features(x, communicator),
                                     good, communicator);
      },
      {"(2, 3, 11)"});
  EXPECT_EQ(output(0, 0, 0), 7.0f);
  const auto shard = ef::pack_column_shard<float>(good, communicator);
  auto of_other_group = shard, of_other_rank = shard;
  of_other_group.world_size += 1;
  of_other_rank.rank = communicator.rank() + 1;
  for (const auto& other : {of_other_group, of_other_rank})
    expect_throws<std::invalid_argument>(
        [&] { ef::column_parallel_linear(x, other, communicator); },
        {"weight was packed for rank"});
}

template <ef::Communicator C>
void check_tensor_parallel(C& communicator) {
  for (Index out : kOutputs) {
    check_layers<float>(communicator, 2, 3, 40, out);
    check_layers<float>(communicator, 1, 1, 300, out);
    check_layers<float>(communicator, 0, 3, 8, out);
    check_layers<float>(communicator, 2, 2, 1, out);
    check_layers<double>(communicator, 1, 3, 33, out);
    check_layers<ef::bfloat16>(communicator, 2, 3, 40, out);
    check_layers<ef::half>(communicator, 1, 5, 17, out);
  }
  check_layers<float>(communicator, 2, 2, 5, 0);
  check_layers<float>(communicator, 2, 2, 0, 5);
  check_pair_of_layers(communicator);
  check_packed<float, float>(communicator);
  check_packed<ef::bfloat16, float>(communicator);
  check_packed<ef::bfloat16, ef::bfloat16>(communicator);
  check_packed<std::int8_t, float>(communicator);
  check_vocabulary(communicator);
  check_vocabulary_refusals(communicator);
  check_vocabulary_statuses(communicator);
  check_layer_refusals(communicator);
}

}  // namespace eigenformer_test
