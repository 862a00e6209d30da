// Laws: every layer equals ef::linear on the full weight, bit for bit, for every world size,
// communicator, device and scalar; tokens are those of the gathered logits; bad arguments are
// refused before anything is sent; failures of a rank reach the others.
#include "tensor_parallel_cases.h"

#include "allocations.h"

using namespace eigenformer_test;

namespace {

TEST(TensorParallel, EqualsLinearOnOneRank) {
  ef::SelfCommunicator communicator;
  check_tensor_parallel(communicator);
}

TEST(TensorParallel, EqualsLinearForEveryWorldSize) {
  for (int ranks = 1; ranks <= 7; ++ranks)
    ef::ThreadCommunicator::run(ranks,
                                [](auto& communicator) { check_tensor_parallel(communicator); });
}

TEST(TensorParallel, EqualsItsReference) {
  const auto x = random_tensor<double, 2>({5, 37}, 1);
  const auto weight = random_tensor<double, 2>({13, 37}, 2);
  const auto bias = random_tensor<double, 1>({13}, 3);
  for (int ranks : {1, 3, 20})
    ef::ThreadCommunicator::run(ranks, [&](auto& communicator) {
      const auto expected = ef::reference::column_parallel_linear(x, weight, bias, ranks);
      EXPECT_LT(relative_error(ef::column_parallel_linear(x, weight, communicator, bias), expected),
                tolerance<double>());
      const ef::ShardRange own = ef::shard_range(37, communicator.rank(), ranks);
      const ef::Tensor<double, 2> part =
          x.slice(Eigen::array<Index, 2>{0, own.begin}, Eigen::array<Index, 2>{5, own.size()});
      const auto rows = ef::reference::row_parallel_linear(x, weight, bias, ranks);
      EXPECT_LT(relative_error(ef::row_parallel_linear(part, weight, communicator, bias), rows),
                tolerance<double>());
      EXPECT_LT(relative_error(rows, expected), tolerance<double>());
    });
}

// The contract's calls, exactly as written there.
TEST(TensorParallel, ContractCalls) {
  const auto input = random_tensor<float, 3>({2, 3, 8}, 1);
  const auto weight = random_tensor<float, 2>({5, 8}, 2);
  const auto bias = random_tensor<float, 1>({5}, 3);
  const int world_size = 3;
  std::array<bool, 3> done{};
  ef::ThreadCommunicator::run(world_size, [&](auto& communicator) {
    const int rank = communicator.rank();
    {
      // input (batch, seq, hidden), weight (out, hidden)
      ef::Tensor<float, 3> y = ef::column_parallel_linear(input, weight, communicator);
      EXPECT_EQ(y.dimension(2), 5);
    }
    // (batch, seq, out) on every rank
    ef::Tensor<float, 3> y = ef::column_parallel_linear(input, weight, communicator, bias);
    auto shard = ef::column_shard(weight, rank, world_size);  // a view: rows [begin, end) of weight
    EXPECT_EQ(shard.data(), weight.data() + ef::shard_range(5, rank, world_size).begin * 8);
    EXPECT_EQ(shard.dimension(0), rank < 2 ? 2 : 1);
    EXPECT_EQ(shard.dimension(1), 8);
    const auto part =
        ef::column_parallel_linear(input, weight, communicator, {.gather_output = false});
    EXPECT_EQ(part.dimension(2), rank < 2 ? 2 : 1);
    EXPECT_EQ(y.dimension(2), 5);
    done[static_cast<std::size_t>(rank)] = true;
  });
  EXPECT_TRUE(done[0] && done[1] && done[2]);
}

TEST(TensorParallel, EveryDeviceAndViewGivesTheSameBits) {
  const auto x = random_tensor<float, 3>({3, 20, 70}, 1);
  auto weight = random_tensor<float, 2>({301, 70}, 2);
  const auto bias = random_tensor<float, 1>({301}, 3);
  const auto expected = ef::linear(tokens_of(x), weight, bias);
  for (int threads : {1, 2, 3}) {
    Threads pool(threads);
    ef::ThreadCommunicator::run(2, [&](auto& communicator) {
      const ef::TensorView<const float, 3> view(x.data(), 3, 20, 70);
      const ef::TensorView<float, 2> mutable_weight(weight.data(), 301, 70);
      ASSERT_TRUE(same_bits(
          ef::column_parallel_linear(pool.device, view, mutable_weight, communicator, bias),
          expected));
      auto output = poisoned_tensor<float, 3>({3, 20, 301});
      ef::column_parallel_linear_into(pool.device, output, x, weight, communicator, bias);
      ASSERT_TRUE(same_bits(output, expected));
      output = poisoned_tensor<float, 3>({3, 20, 301});
      ef::row_parallel_linear_into(pool.device, output, own_features(x, communicator), weight,
                                   communicator, bias);
      ASSERT_TRUE(same_bits(output, expected));
      const auto part = ef::column_parallel_linear(pool.device, x, weight, communicator, bias,
                                                   {.gather_output = false});
      ASSERT_EQ(part.dimension(2), communicator.rank() == 0 ? 151 : 150);
      ef::Philox rng{5};
      const auto ids = ef::vocabulary_parallel_top_k_sample(pool.device, tokens_of(x), weight,
                                                            communicator, 9, 1.0f, rng);
      ASSERT_TRUE(same_bits(ids, [&] {
        ef::SelfCommunicator self;
        ef::Philox again{5};
        return ef::vocabulary_parallel_top_k_sample(tokens_of(x), weight, self, 9, 1.0f, again);
      }()));
    });
  }
}

TEST(TensorParallel, ShardsAreViewsThatCoverTheWeight) {
  auto weight = random_tensor<float, 2>({13, 4}, 1);
  auto bias = random_tensor<float, 1>({13}, 1);
  for (int ranks : {1, 2, 5, 20}) {
    const float *row = weight.data(), *element = bias.data();
    for (int rank = 0; rank < ranks; ++rank) {
      const auto rows = ef::column_shard(weight, rank, ranks);
      const auto elements = ef::column_shard(std::as_const(bias), rank, ranks);
      EXPECT_EQ(rows.data(), row);
      EXPECT_EQ(elements.size(), rows.dimension(0));
      row += rows.size();
      element += elements.size();
    }
    EXPECT_EQ(row, weight.data() + weight.size());
    EXPECT_EQ(element, bias.data() + bias.size());
  }
  static_assert(std::is_same_v<decltype(ef::column_shard(weight, 0, 1)), ef::TensorView<float, 2>>);
  static_assert(std::is_same_v<decltype(ef::column_shard(std::as_const(weight), 0, 1)),
                               ef::TensorView<const float, 2>>);
  expect_throws<std::invalid_argument>([&] { ef::column_shard(weight, 3, 3); }, {"rank is 3"});
  expect_throws<std::invalid_argument>([&] { ef::column_shard(weight, 0, 0); },
                                       {"world_size is 0"});
}

TEST(TensorParallel, ManyRunsHaveNoRaces) {
  const auto x = random_tensor<float, 3>({2, 2, 16}, 1);
  const auto up = random_tensor<float, 2>({13, 16}, 2), down = random_tensor<float, 2>({6, 13}, 3);
  const auto expected = ef::linear(ef::linear(tokens_of(x), up), down);
  for (int run = 0; run < 120; ++run)
    ef::ThreadCommunicator::run(1 + run % 7, [&](auto& communicator) {
      for (int step = 0; step < 5; ++step) {
        const auto middle =
            ef::column_parallel_linear(x, up, communicator, {.gather_output = false});
        ASSERT_TRUE(same_bits(ef::row_parallel_linear(middle, down, communicator), expected));
      }
    });
}

TEST(TensorParallel, AFailingRankIsAnErrorNotAHang) {
  const auto x = random_tensor<float, 3>({2, 2, 16}, 1);
  const auto weight = random_tensor<float, 2>({13, 16}, 2),
             narrow = random_tensor<float, 2>({13, 15}, 2),
             longer = random_tensor<float, 2>({14, 16}, 2);
  for (int run = 0; run < 30; ++run) {
    const int ranks = 2 + run % 5;
    expect_throws<std::invalid_argument>(
        [&] {
          ef::ThreadCommunicator::run(ranks, [&](auto& communicator) {
            ef::column_parallel_linear(x, communicator.rank() == run % ranks ? narrow : weight,
                                       communicator);
          });
        },
        {"weight has 15 columns, input has 16 features"});
    expect_throws<ef::CommunicatorError>(  // ranks that disagree on the layer
        [&] {
          ef::ThreadCommunicator::run(ranks, [&](auto& communicator) {
            ef::column_parallel_linear(x, communicator.rank() == run % ranks ? longer : weight,
                                       communicator);
          });
        },
        {"all_gather of", "52 float", "56 float"});
  }
}

TEST(TensorParallel, IntoAllocatesNothingAfterTheFirstCall) {
  const auto x = random_tensor<float, 3>({2, 4, 64}, 1);
  const auto weight = random_tensor<float, 2>({97, 64}, 2);
  const auto bias = random_tensor<float, 1>({97}, 3);
  const Eigen::DefaultDevice device;
  std::atomic<long> before{0}, after{0};
  ef::ThreadCommunicator::run(2, [&](auto& communicator) {
    ef::Tensor<float, 3> y(2, 4, 97);
    const auto part = own_features(x, communicator);
    const auto shard = ef::pack_column_shard<std::int8_t>(weight, communicator);
    for (int step = 0; step < 6; ++step) {
      communicator.barrier();
      if (step == 3 && communicator.rank() == 0) before = allocation_count.load();
      communicator.barrier();
      ef::column_parallel_linear_into(device, y, x, weight, communicator, bias);
      ef::row_parallel_linear_into(device, y, part, weight, communicator, bias);
      ef::column_parallel_linear_into(device, y, x, shard, communicator);
    }
    communicator.barrier();
    if (communicator.rank() == 0) after = allocation_count.load();
    communicator.barrier();
  });
  EXPECT_EQ(before, after);
}

}  // namespace
