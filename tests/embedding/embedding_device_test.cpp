// Embedding and its gradient on every device: rows to the bit, additions in the order of tokens to
// the bit; on a GPU an id that is no row gives NaN and no gradient.
#include <eigenformer/embedding.h>
#include <eigenformer/linear.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename Id>
ef::Tensor<Id, 1> random_ids(Index tokens, Index vocab, unsigned seed) {
  std::mt19937 generator(seed);
  ef::Tensor<Id, 1> ids(tokens);
  for (Index t = 0; t < tokens; ++t)
    ids(t) = static_cast<Id>(generator() % static_cast<unsigned>(vocab));
  return ids;
}

template <typename Y, typename T, typename Id = std::int32_t>
void check_rows(Index tokens, Index features) {
  const auto table = random_tensor<T, 2>({9, features}, 1);
  const auto ids = random_ids<Id>(tokens, 9, 2);
  ef::Tensor<Y, 2> expected(tokens, features);
  for (Index t = 0; t < tokens; ++t)
    for (Index j = 0; j < features; ++j)
      expected(t, j) = static_cast<Y>(
          static_cast<ef::detail::common_compute_type<Y, T>>(table(static_cast<Index>(ids(t)), j)));
  for_each_device([&](const auto& bench) {
    auto device_table = on_device(bench, table);
    auto device_ids = on_device(bench, ids);
    auto y = on_device(bench, poisoned_tensor<Y, 2>({tokens, features}));
    ef::embedding_into(bench.device, y.view(), device_ids.cview(), device_table.cview());
    ASSERT_TRUE(same_bits(y.host(), expected)) << tokens << " x " << features;
  });
}

TEST(EmbeddingOnDevice, CopiesRows) {
  for (Index features : {0, 1, 8, 31, 32, 33, 257})
    for (Index tokens : {0, 1, 40}) {
      check_rows<float, float>(tokens, features);
      check_rows<ef::bfloat16, ef::bfloat16>(tokens, features);
      check_rows<float, ef::half, std::int64_t>(tokens, features);
      check_rows<ef::bfloat16, float>(tokens, features);
    }
  check_rows<ef::half, ef::half>(300, 24);
  check_rows<double, double>(5, 31);
  check_rows<float, double>(5, 32);
}

template <typename Y>
void check_int8_rows(Index tokens, Index features) {
  ef::Tensor<std::int8_t, 2> table(9, features);
  for (Index i = 0; i < table.size(); ++i)
    table.data()[i] = static_cast<std::int8_t>(i * 37 % 255 - 127);
  const auto scales = random_tensor<float, 1>({9}, 8);
  const auto ids = random_ids<std::int32_t>(tokens, 9, 9);
  ef::Tensor<Y, 2> expected(tokens, features);
  for (Index t = 0; t < tokens; ++t)
    for (Index j = 0; j < features; ++j)
      expected(t, j) = static_cast<Y>(static_cast<ef::compute_type<Y>>(table(ids(t), j)) *
                                      static_cast<ef::compute_type<Y>>(scales(ids(t))));
  for_each_device([&](const auto& bench) {
    auto device_table = on_device(bench, table);
    auto device_scales = on_device(bench, scales);
    auto device_ids = on_device(bench, ids);
    auto y = on_device(bench, poisoned_tensor<Y, 2>({tokens, features}));
    ef::embedding_into(bench.device, y.view(), device_ids.cview(), device_table.cview(),
                       device_scales.cview());
    ASSERT_TRUE(same_bits(y.host(), expected)) << tokens << " x " << features;
  });
}

template <typename Y, typename S>
void check_packed_rows(Index features, const ef::Int8Packing& options = {}) {
  const auto table = random_tensor<float, 2>({9, features}, 1);
  const auto ids = random_ids<std::int32_t>(21, 9, 2);
  ef::Tensor<Y, 2> expected(21, features);  // what a CPU reads
  ef::embedding_into(Eigen::DefaultDevice{}, expected, ids, ef::pack_weight<S>(table, options));
  for_each_device([&](const auto& bench) {
    auto device_table = on_device(bench, table);
    auto device_ids = on_device(bench, ids);
    const auto packed = ef::pack_weight<S>(bench.device, device_table.cview(), options);
    auto y = on_device(bench, poisoned_tensor<Y, 2>({21, features}));
    ef::embedding_into(bench.device, y.view(), device_ids.cview(), packed);
    ASSERT_TRUE(same_bits(y.host(), expected)) << features << ' ' << options.group_size;
  });
}

TEST(EmbeddingOnDevice, RowsOfPackedWeights) {
  for (Index features : {1, 16, 31, 33, 257}) {
    check_packed_rows<float, float>(features);
    check_packed_rows<ef::bfloat16, ef::bfloat16>(features);
    check_packed_rows<float, ef::half>(features);
    check_packed_rows<float, std::int8_t>(features);
    check_packed_rows<ef::bfloat16, std::int8_t>(features, {.group_size = 32});
  }
  check_packed_rows<float, std::int8_t>(320, {.group_size = 64});
}

TEST(EmbeddingOnDevice, RowsOfInt8TimesTheirScales) {
  for (Index features : {0, 1, 16, 31, 33, 257})
    for (Index tokens : {0, 1, 40}) {
      check_int8_rows<float>(tokens, features);
      check_int8_rows<ef::bfloat16>(tokens, features);
    }
  check_int8_rows<ef::half>(5, 32);
  check_int8_rows<double>(5, 32);
  ef::Tensor<std::int8_t, 2> table(4, 3);
  table.setZero();
  ef::Tensor<float, 2> y(1, 3);
  const ef::Tensor<float, 1> few(3);
  const std::vector<std::int32_t> id{3}, foreign{4};
  expect_throws<std::invalid_argument>(
      [&] { ef::embedding_into(Eigen::DefaultDevice{}, y, id, table, few); },
      {"embedding: scales has 3 elements, table has 4 rows"});
  const ef::Tensor<float, 1> scales(4);
  expect_throws<std::invalid_argument>(
      [&] { ef::embedding_into(Eigen::DefaultDevice{}, y, foreign, table, scales); },
      {"id 4 at position 0"});
}

/// A row of the table that no token has keeps what it holds; `vocab` ids for `tokens` tokens.
template <typename G, typename GY, typename Id = std::int32_t>
void check_gradient(Index tokens, Index features, Index vocab) {
  const auto ids = random_ids<Id>(tokens, vocab, 3);
  const auto grad_y = random_tensor<GY, 2>({tokens, features}, 4);
  const auto start = random_tensor<G, 2>({vocab + 1, features}, 5);
  using C = ef::detail::common_compute_type<G, GY>;
  ef::Tensor<G, 2> expected = start;
  for (Index t = 0; t < tokens; ++t)
    for (Index j = 0; j < features; ++j) {
      G& sum = expected(static_cast<Index>(ids(t)), j);
      sum = static_cast<G>(static_cast<C>(sum) + static_cast<C>(grad_y(t, j)));
    }
  for_each_device([&](const auto& bench) {
    auto grad_table = on_device(bench, start);
    auto device_grad = on_device(bench, grad_y);
    auto device_ids = on_device(bench, ids);
    ef::embedding_backward_into(bench.device, grad_table.view(), device_grad.cview(),
                                device_ids.cview());
    ASSERT_TRUE(same_bits(grad_table.host(), expected)) << tokens << " x " << features;
  });
}

TEST(EmbeddingOnDevice, GradientsAddInTheOrderOfTokens) {
  for (Index features : {0, 1, 4, 31, 32, 33})
    for (Index tokens : {0, 1, 31, 33}) {
      check_gradient<float, float>(tokens, features, 7);
      check_gradient<float, ef::bfloat16>(tokens, features, 7);
    }
  check_gradient<float, float>(600, 12, 5);         // ids that meet again blocks of tokens later
  check_gradient<float, ef::half>(257, 5, 300);     // mostly alone
  check_gradient<float, float>(256, 3, 1);          // all of them
  check_gradient<float, ef::bfloat16>(9, 2056, 3);  // more columns than a block takes at once
  check_gradient<float, float>(9, 1030, 3);
  check_gradient<double, double, std::int64_t>(40, 18, 7);
  check_gradient<double, float>(40, 17, 7);
  check_gradient<float, double>(40, 16, 7);
}

TEST(EmbeddingOnDevice, AnIdThatIsNoRow) {
  const auto table = random_tensor<float, 2>({4, 9}, 6);
  const auto grad_y = random_tensor<float, 2>({5, 9}, 7);
  ef::Tensor<std::int32_t, 1> ids(5);
  ids.setValues({1, -1, 4, 1 << 30, 3});
  for_each_device([&](const auto& bench) {
    using D = std::remove_cvref_t<decltype(bench.device)>;
    if constexpr (!ef::CpuDevice<D>) {  // which throws
      auto device_table = on_device(bench, table), device_grad = on_device(bench, grad_y);
      auto device_ids = on_device(bench, ids);
      auto y = on_device(bench, poisoned_tensor<float, 2>({5, 9}));
      ef::embedding_into(bench.device, y.view(), device_ids.cview(), device_table.cview());
      ef::embedding_backward_into(bench.device, device_table.view(), device_grad.cview(),
                                  device_ids.cview());
      ef::Tensor<std::int8_t, 2> int8(4, 9);
      int8.setConstant(5);
      ef::Tensor<float, 1> scales(4);
      scales.setConstant(0.5f);
      auto device_int8 = on_device(bench, int8);
      auto device_scales = on_device(bench, scales);
      auto scaled = on_device(bench, poisoned_tensor<float, 2>({5, 9}));
      ef::embedding_into(bench.device, scaled.view(), device_ids.cview(), device_int8.cview(),
                         device_scales.cview());
      const auto of_int8 = scaled.host();
      for (Index j = 0; j < 9; ++j) {
        EXPECT_EQ(of_int8(0, j), 2.5f);
        for (Index t : {1, 2, 3}) EXPECT_TRUE(std::isnan(of_int8(t, j)));
      }
      const auto rows = y.host();
      const auto sums = device_table.host();
      for (Index j = 0; j < 9; ++j) {
        EXPECT_EQ(rows(0, j), table(1, j));
        EXPECT_EQ(rows(4, j), table(3, j));
        for (Index t : {1, 2, 3}) EXPECT_TRUE(std::isnan(rows(t, j)));
        EXPECT_EQ(sums(0, j), table(0, j));
        EXPECT_EQ(sums(1, j), table(1, j) + grad_y(0, j));
        EXPECT_EQ(sums(2, j), table(2, j));
        EXPECT_EQ(sums(3, j), table(3, j) + grad_y(4, j));
      }
    }
  });
}

}  // namespace
