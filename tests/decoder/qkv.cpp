// One product for queries, keys and values, and what takes its output where it lies. Laws: stacked
// weights give the bits of each weight alone, also divided among ranks; heads in the rows of a
// wider matrix give the bits of a dense copy; ragged queries give the bits of each sequence alone.
#include <eigenformer/attention.h>
#include <eigenformer/kv_cache.h>
#include <eigenformer/paged_kv_cache.h>
#include <eigenformer/rope.h>
#include <eigenformer/tensor_parallel.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kOneThread;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// (tokens, heads, width) of its own, from a HeadsView.
template <typename T>
ef::Tensor<T, 3> dense(const ef::HeadsView<const T>& x) {
  const Index tokens = x.dimension(0), heads = x.dimension(1), width = x.dimension(2);
  ef::Tensor<T, 3> copy(tokens, heads, width);
  for (Index t = 0; t < tokens; ++t)
    std::copy_n(x.data() + t * x.token_stride(), heads * width, copy.data() + t * heads * width);
  return copy;
}

// Row counts that end within a panel of every ISA, a matrix without rows, one row alone.
TEST(StackedWeight, GivesTheBitsOfEachAlone) {
  const std::vector<Index> rows{5, 1, 0, 37, 64, 3};
  for (const Index in : {1, 33, 257}) {
    std::vector<ef::Tensor<float, 2>> parts;
    std::vector<ef::TensorView<const float, 2>> views;
    for (std::size_t p = 0; p < rows.size(); ++p)
      parts.push_back(random_tensor<float, 2>({rows[p], in}, static_cast<unsigned>(p)));
    for (const auto& part : parts) views.push_back(ef::input_view<2>(part));
    const auto x = random_tensor<float, 2>({7, in}, 9);
    for_each_product_isa([&](auto isa) {
      const auto device = on(isa);
      const auto check = [&](auto scalar, const ef::Int8Packing& options) {
        using S = decltype(scalar);
        const auto stacked = ef::pack_stacked_weight<S>(device, views, options);
        ASSERT_EQ(stacked.rows(), 110);
        const auto all = ef::linear(device, x, stacked);
        Index column = 0;
        for (const auto& view : views) {
          const auto own = ef::linear(device, x, ef::pack_weight<S>(device, view, options));
          for (Index t = 0; t < 7; ++t)
            for (Index o = 0; o < view.dimension(0); ++o)
              ASSERT_EQ(std::bit_cast<std::uint32_t>(all(t, column + o)),
                        std::bit_cast<std::uint32_t>(own(t, o)))
                  << isa.name << " in " << in << " output " << column + o;
          column += view.dimension(0);
        }
      };
      check(float{}, {});
      check(ef::bfloat16{}, {});
      check(ef::half{}, {});
      check(std::int8_t{}, {});
      check(std::int8_t{}, {.group_size = 32});
    });
  }
}

TEST(StackedWeight, RefusesWithTheMatrixNamed) {
  auto a = random_tensor<float, 2>({3, 8}, 1), b = random_tensor<float, 2>({2, 8}, 2);
  const auto narrow = random_tensor<float, 2>({2, 7}, 3);
  const auto pack = [&](const ef::Tensor<float, 2>& second, auto scalar) {
    return ef::pack_stacked_weight<decltype(scalar)>(
        kOneThread, std::array{ef::input_view<2>(a), ef::input_view<2>(second)});
  };
  expect_throws<std::invalid_argument>(
      [&] { pack(narrow, float{}); },
      {"pack_stacked_weight", "weights[1] has shape (2, 7)", "8 columns"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::pack_stacked_weight<float>(kOneThread, std::vector<ef::TensorView<const float, 2>>{});
      },
      {"weights is empty"});
  b(1, 5) = kNan;
  expect_throws<std::invalid_argument>([&] { pack(b, std::int8_t{}); }, {"weights[1][1, 5] is"});
  EXPECT_EQ(pack(b, float{}).rows(), 5);
  // On every rank, also where a rank owns no row of what is wrong: else the others wait for it.
  const float one = 1;
  const ef::TensorView<const float, 2> endless(&one, Index{1} << 62, 4);
  ef::ThreadCommunicator::run(2, [&](auto& communicator) {
    EXPECT_THROW(
        ef::pack_stacked_column_shard<float>(
            kOneThread, std::array{ef::input_view<2>(a), ef::input_view<2>(narrow)}, communicator),
        std::invalid_argument);
    EXPECT_THROW(
        ef::pack_stacked_column_shard<float>(kOneThread, std::array{endless}, communicator),
        std::invalid_argument);
  });
}

TEST(StackedWeight, DividedAmongRanksGivesTheWholeProduct) {
  const auto q = random_tensor<float, 2>({13, 20}, 1), k = random_tensor<float, 2>({3, 20}, 2),
             v = random_tensor<float, 2>({4, 20}, 3), x = random_tensor<float, 2>({5, 20}, 4);
  const std::array views{ef::input_view<2>(q), ef::input_view<2>(k), ef::input_view<2>(v)};
  const auto expected = ef::linear(x, ef::pack_stacked_weight<float>(kOneThread, views));
  const auto gate = random_tensor<float, 2>({11, 20}, 5), up = random_tensor<float, 2>({11, 20}, 6);
  const auto pair =
      ef::gated_linear(x, ef::pack_gated_weight<float>(gate, up), ef::Epilogue{}.silu());
  for (const int ranks : {1, 2, 3, 5, 23})
    ef::ThreadCommunicator::run(ranks, [&](auto& communicator) {
      const auto shard = ef::pack_stacked_column_shard<float>(kOneThread, views, communicator);
      EXPECT_TRUE(same_bits(ef::column_parallel_linear(x, shard, communicator), expected));
      const auto gated = ef::pack_gated_column_shard<float>(kOneThread, gate, up, communicator);
      auto y = poisoned_tensor<float, 2>({5, 11});
      ef::column_parallel_gated_linear_into(kOneThread, y, x, gated, communicator,
                                            ef::Epilogue{}.silu());
      EXPECT_TRUE(same_bits(y, pair));
    });
  ef::SelfCommunicator self;
  const auto gated = ef::pack_gated_column_shard<float>(kOneThread, gate, up, self);
  const auto bias = random_tensor<float, 1>({22}, 7);
  ef::Tensor<float, 2> y(5, 11), wrong(5, 10);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::column_parallel_gated_linear_into(kOneThread, y, x, gated, self,
                                              ef::Epilogue{}.bias(bias));
      },
      {"column_parallel_gated_linear", "a function alone"});
  EXPECT_THROW(ef::column_parallel_gated_linear_into(kOneThread, wrong, x, gated, self,
                                                     ef::Epilogue{}.silu()),
               std::invalid_argument);
}

TEST(HeadsView, TurnsAsADenseCopyDoes) {
  const Index tokens = 6, heads = 3, width = 10;
  auto qkv = random_tensor<float, 2>({tokens, 50}, 1);
  for (Index t = 0; t < tokens; ++t)
    for (Index c = 0; c < 50; ++c)
      if (c < 7 || c >= 37) qkv(t, c) = kNan;  // not part of it
  const std::vector<Index> positions{4, 0, 1000, 3, 3, 77};
  const auto view = ef::heads_of(std::as_const(qkv), 7, heads, width);
  const auto copy = dense(view);
  for (const auto layout : {ef::RopeLayout::half_split, ef::RopeLayout::interleaved})
    for (const Index rotary : {10, 6}) {
      const ef::RopeOptions options{.layout = layout, .rotary_dim = rotary};
      for_each_isa([&](auto isa) {
        const auto expected = ef::rope(on(isa), copy, positions, options);
        EXPECT_TRUE(same_bits(ef::rope(on(isa), view, positions, options), expected));
        // A table of the very positions, by row number.
        ef::RopeTable table;
        std::vector<Index> rows(positions.size());
        for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<Index>(i);
        table.assign(positions, width, options);
        EXPECT_TRUE(same_bits(ef::rope(on(isa), view, rows, table), expected));
        table.assign(std::vector<Index>{9}, width, options);  // again, for fewer
        EXPECT_EQ(table.max_positions(), 1);
      });
    }
  expect_throws<std::invalid_argument>([&] { ef::heads_of(qkv, 21, 3, 10); },
                                       {"heads_of", "3 heads of 10", "column 21", "50"});
  EXPECT_THROW(ef::heads_of(qkv, -1, 1, 10), std::invalid_argument);
  EXPECT_THROW(ef::heads_of(qkv, 51, 0, 10), std::invalid_argument);
}

template <typename Storage>
void expect_strided_append() {
  const Index heads = 2, width = 9;
  auto qkv = random_tensor<float, 2>({8, 60}, 2);
  for (Index t = 0; t < 8; ++t) qkv(t, 59) = qkv(t, 0) = kNan;
  const auto k = ef::heads_of(std::as_const(qkv), 3, heads, width),
             v = ef::heads_of(std::as_const(qkv), 30, heads, width);
  const auto key_copy = dense(k), value_copy = dense(v);
  const ef::PagedKvConfig config{
      .layers = 1, .kv_heads = heads, .head_dim = width, .page_size = 3, .page_count = 10};
  ef::PagedKvCache<float, Storage> strided(config), plain(config);
  const std::vector<Index> offsets{0, 5, 8};
  for (auto* cache : {&strided, &plain}) {
    const std::vector<ef::SequenceId> ids{cache->add_sequence(), cache->add_sequence()};
    if (cache == &strided)
      cache->append(ids, offsets, 0, k, v);
    else
      cache->append(ids, offsets, 0, key_copy, value_copy);
  }
  for (const ef::SequenceId id : {0, 1}) {
    EXPECT_TRUE(same_bits(strided.keys(id, 0), plain.keys(id, 0)));
    EXPECT_TRUE(same_bits(strided.values(id, 0), plain.values(id, 0)));
  }
  ef::KvCache<float, Storage> batched, expected;
  const std::array<Index, 4> sizes{2, 4, heads, width};
  update_kv_cache(batched, ef::HeadsView<const float, 4>(k.data(), sizes, 60),
                  ef::HeadsView<const float, 4>(v.data(), sizes, 60), 0);
  update_kv_cache(expected, ef::TensorView<const float, 4>(key_copy.data(), 2, 4, heads, width),
                  ef::TensorView<const float, 4>(value_copy.data(), 2, 4, heads, width), 0);
  EXPECT_TRUE(same_bits(batched.keys(0), expected.keys(0)));
  EXPECT_TRUE(same_bits(batched.values(0), expected.values(0)));
  if constexpr (std::is_same_v<Storage, std::int8_t>) {
    qkv(6, 3 + 4) = kNan;  // element 4 of token 6
    const ef::SequenceId id = 0;
    expect_throws<std::invalid_argument>(
        [&] {
          strided.append(std::span(&id, 1), std::vector<Index>{0, 8}, 0, k, v);
        },
        {"keys of shape (8, 2, 9)", "at element 112"});
    EXPECT_EQ(strided.length(0), 5);
  }
}

TEST(HeadsView, IsAppendedAsADenseCopyIs) {
  expect_strided_append<float>();
  expect_strided_append<ef::half>();
  expect_strided_append<std::int8_t>();
}

// Sequences whose chunks have 3, 0, 1 and 17 queries at the end of 3, 4, 30 and 20 keys.
TEST(RaggedAttention, GivesTheBitsOfEachSequenceAlone) {
  const Index heads = 4, kv_heads = 2, width = 12;
  const std::vector<Index> keys{3, 4, 30, 20}, offsets{0, 3, 3, 4, 21};
  ef::PagedKvCache<float> cache(
      {.layers = 1, .kv_heads = kv_heads, .head_dim = width, .page_size = 4, .page_count = 40});
  std::vector<ef::SequenceId> ids;
  for (std::size_t b = 0; b < keys.size(); ++b) {
    ids.push_back(cache.add_sequence());
    cache.append(ids.back(), 0,
                 random_tensor<float, 3>({keys[b], kv_heads, width}, static_cast<unsigned>(b)),
                 random_tensor<float, 3>({keys[b], kv_heads, width}, static_cast<unsigned>(b) + 9));
  }
  const auto query = random_tensor<float, 3>({21, heads, width}, 30);
  for (const ef::AttentionOptions& options :
       {ef::AttentionOptions{.causal = true}, ef::AttentionOptions{},
        ef::AttentionOptions{.causal = true, .window = 5, .softcap = 3.0f}})
    for (const int count : {1, 3}) {
      Threads threads(count);
      const auto whole = ef::attention_with_kv_source(threads.device, query, cache.source(0, ids),
                                                      offsets, options);
      for (std::size_t b = 0; b < keys.size(); ++b) {
        const Index n = offsets[b + 1] - offsets[b];
        if (n == 0) continue;
        const ef::TensorView<const float, 4> q(query.data() + offsets[b] * heads * width, 1, n,
                                               heads, width);
        const auto own =
            ef::attention_with_kv_source(q, cache.source(0, std::span(&ids[b], 1)), options);
        EXPECT_EQ(std::memcmp(whole.data() + offsets[b] * heads * width, own.data(),
                              static_cast<std::size_t>(own.size()) * sizeof(float)),
                  0)
            << "sequence " << b;
      }
    }
  const std::vector<Index> short_of{0, 3, 3, 4, 20};
  expect_throws<std::invalid_argument>(
      [&] { ef::attention_with_kv_source(kOneThread, query, cache.source(0, ids), short_of); },
      {"attention_with_kv_cache", "q_offsets ends at 20", "21"});
}

}  // namespace
