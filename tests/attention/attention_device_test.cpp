// Attention forward on GPUs: dense, packed and cached, against the double reference.
#include <eigenformer/paged_kv_cache.h>

#include "attention_on_device.h"

using namespace eigenformer_test;

namespace {

TEST(AttentionOnDevice, EqualsTheReferenceForEveryOption) {
  const AttentionCase<float> c({2, 3, 75, 4, 2, 5, 7}, {75, 66});
  for (const NamedOptions& named : option_sweep(4)) check_forward(c, named);
}

TEST(AttentionOnDevice, EveryScalar) {
  const NamedOptions plain{"plain", {}}, causal{"causal", {.causal = true}};
  check_forward(AttentionCase<double>({2, 3, 67, 2, 1, 9, 4}, {67, 3}), causal);
  check_forward(AttentionCase<ef::half>({2, 2, 67, 2, 1, 33, 4}, {67, 64}), causal);
  check_forward(AttentionCase<ef::bfloat16>({2, 2, 67, 2, 2, 33, 4}, {65, 1}), plain);
}

TEST(AttentionOnDevice, Lengths) {
  const NamedOptions plain{"plain", {}}, causal{"causal", {.causal = true}},
      prefix{"prefix", {.causal = true, .prefix_length = 2}};
  for (const NamedOptions& named : {plain, causal, prefix}) {
    check_forward(AttentionCase<float>({3, 4, 4, 1, 1, 3, 2}, {4, 0, 3}), named);  // padded
    check_forward(AttentionCase<float>({2, 5, 3, 1, 1, 3, 2}, {3, 0}), named);     // more queries
    check_forward(AttentionCase<float>({3, 4, 9, 1, 1, 3, 2}, {9, 5, 7}, 1, {4, 0, 1}), named,
                  true);
    check_forward(AttentionCase<float>({0, 4, 4, 2, 1, 3, 2}, {}), named);
    check_forward(AttentionCase<float>({1, 0, 4, 2, 1, 3, 2}, {4}), named);
    check_forward(AttentionCase<float>({1, 2, 0, 2, 1, 3, 2}, {0}), named);
  }
  for (Index keys : {1, 31, 63, 64, 65, 128, 129})
    check_forward(AttentionCase<float>({1, 1, keys, 1, 1, 8, 8}, {keys}), causal);
  for (Index width : {1, 32, 64, 65, 128, 257})
    check_forward(AttentionCase<float>({1, 1, 5, 1, 1, width, width}, {5}), plain);
}

TEST(AttentionOnDevice, LargeScoresAndLargeValues) {
  check_forward(AttentionCase<float>({1, 2, 70, 1, 1, 16, 3}, {70}), {"large", {.scale = 40.0f}});
  AttentionCase<float> c({1, 2, 70, 1, 1, 16, 3}, {70});
  for (Index i = 0; i < c.v.size(); ++i) c.v.data()[i] = i % 3 == 0 ? 3.4e38f : c.v.data()[i];
  check_forward(c, {"large values", {}});
  AttentionCase<double> d({1, 2, 70, 1, 1, 16, 3}, {70});
  for (Index i = 0; i < d.v.size(); ++i) d.v.data()[i] = i % 3 == 0 ? 1.7e308 : 1.0;
  for_each_gpu([&](const auto& bench) {  // the reference itself leaves the range
    auto q = on_device(bench, d.q);
    auto k = on_device(bench, d.k);
    auto v = on_device(bench, d.v);
    auto out = on_device(bench, poisoned_tensor<double, 4>({1, 2, 1, 3}));
    ef::batched_attention_with_padding_into(bench.device, out.view(), q.cview(), k.cview(),
                                            v.cview(), {70});
    const auto got = out.host();
    for (Index i = 0; i < 2; ++i) {
      EXPECT_NEAR(got(0, i, 0, 0) / 1.7e308, 1.0, 1e-12);
      EXPECT_NEAR(got(0, i, 0, 1), 1.0, 1e-12);
    }
  });
}

// Row 0 sees no bad key; row 1 scores of -infinity only; row 2 +infinity; row 3 NaN; the values
// that rows 4 and 5 see are not finite in one column.
template <typename T>
void check_infinities() {
  const Index rows = 6;
  ef::Tensor<T, 4> q(1, rows, 1, 1), k(1, rows, 1, 1);
  auto v = random_tensor<T, 4>({1, rows, 1, 70}, 1);
  q.setConstant(static_cast<T>(1.0f));
  k.setConstant(static_cast<T>(1.0f));
  k(0, 1, 0, 0) = static_cast<T>(-INFINITY);
  k(0, 2, 0, 0) = static_cast<T>(INFINITY);
  k(0, 3, 0, 0) = static_cast<T>(NAN);
  v(0, 4, 0, 69) = static_cast<T>(NAN);
  v(0, 5, 0, 0) = static_cast<T>(INFINITY);
  for_each_gpu([&](const auto& bench) {
    auto device_q = on_device(bench, q);
    auto device_k = on_device(bench, k);
    auto device_v = on_device(bench, v);
    auto out = on_device(bench, poisoned_tensor<T, 4>({1, rows, 1, 70}));
    auto lse = on_device(bench, poisoned_tensor<float, 3>({1, 1, rows}));
    auto lse_view = lse.view();
    ef::batched_attention_with_padding_into(bench.device, out.view(), device_q.cview(),
                                            device_k.cview(), device_v.cview(), {rows},
                                            {.causal = true, .window = 1, .log_sum_exp = lse_view});
    const auto got = out.host();
    const auto log_sums = lse.host();
    for (Index d : {0, 69}) {
      EXPECT_EQ(got(0, 0, 0, d), v(0, 0, 0, d));
      EXPECT_EQ(static_cast<float>(got(0, 1, 0, d)), 0);
      EXPECT_TRUE(std::isnan(static_cast<float>(got(0, 2, 0, d))));
      EXPECT_TRUE(std::isnan(static_cast<float>(got(0, 3, 0, d))));
    }
    EXPECT_EQ(got(0, 4, 0, 0), v(0, 4, 0, 0));
    EXPECT_TRUE(std::isnan(static_cast<float>(got(0, 4, 0, 69))));
    EXPECT_EQ(static_cast<float>(got(0, 5, 0, 0)), INFINITY);
    EXPECT_EQ(got(0, 5, 0, 69), v(0, 5, 0, 69));
    EXPECT_EQ(log_sums(0, 0, 0), 1);
    EXPECT_EQ(log_sums(0, 0, 1), -INFINITY);
  });
}
TEST(AttentionOnDevice, InfinitiesStayInTheirRows) {
  check_infinities<float>();
  check_infinities<ef::half>();
}

// The output may be the query tensor.
TEST(AttentionOnDevice, InPlace) {
  const AttentionCase<float> c({1, 3, 3, 2, 1, 70, 70}, {3});
  const auto expected = c.reference({.causal = true});
  for_each_gpu([&](const auto& bench) {
    auto q = on_device(bench, c.q);
    auto k = on_device(bench, c.k);
    auto v = on_device(bench, c.v);
    ef::batched_attention_with_padding_into(bench.device, q.view(), q.cview(), k.cview(), v.cview(),
                                            {3}, {.causal = true});
    EXPECT_LT(relative_error(q.host(), expected.output), tolerance<float>());
  });
}

// Packed sequences, some without queries or keys, give the bits that each gives alone.
TEST(AttentionOnDevice, PackedRowsHaveTheBitsOfRowsAlone) {
  const std::vector<Index> q_offsets{0, 0, 2, 5, 5, 6}, kv_offsets{0, 3, 3, 70, 71, 75};
  const auto q = random_tensor<float, 3>({6, 2, 5}, 1), k = random_tensor<float, 3>({75, 1, 5}, 2),
             v = random_tensor<float, 3>({75, 1, 3}, 3);
  for_each_gpu([&](const auto& bench) {
    auto device_q = on_device(bench, q);
    auto device_k = on_device(bench, k);
    auto device_v = on_device(bench, v);
    auto out = on_device(bench, poisoned_tensor<float, 3>({6, 2, 3}));
    ef::variable_length_attention_into(bench.device, out.view(), device_q.cview(), device_k.cview(),
                                       device_v.cview(), q_offsets, kv_offsets, {.causal = true});
    const auto together = out.host();
    for (std::size_t b = 0; b + 1 < q_offsets.size(); ++b) {
      const Index first = q_offsets[b], rows = q_offsets[b + 1] - first, key = kv_offsets[b],
                  keys = kv_offsets[b + 1] - key;
      if (rows == 0) continue;
      using View = ef::TensorView<const float, 4>;
      auto alone = on_device(bench, poisoned_tensor<float, 4>({1, rows, 2, 3}));
      ef::batched_attention_with_padding_into(
          bench.device, alone.view(), View(device_q.cview().data() + first * 10, 1, rows, 2, 5),
          View(device_k.cview().data() + key * 5, 1, keys, 1, 5),
          View(device_v.cview().data() + key * 3, 1, keys, 1, 3), {keys},
          {.causal = true, .query_lengths = {rows}});
      const auto one = alone.host();
      for (Index i = 0; i < rows * 6; ++i)
        EXPECT_EQ(one.data()[i], together.data()[first * 6 + i]) << b << ' ' << i;
    }
  });
}

// Few rows are split over blocks by their keys, many are not: packed before the rows of another
// sequence two rows have the bits that they have alone. Splits meet at 512 keys.
template <typename T>
void check_splits(const ef::AttentionOptions& options, Index keys, Index dim) {
  const Index many_rows = sizeof(T) == 2 ? 264 * 64 : 1023;
  const AttentionCase<T> c({1, 2, keys, 1, 1, dim, dim}, {keys});
  const auto expected = c.reference(options);
  const auto copied = [&](const ef::Tensor<T, 4>& from, Index rows) {
    ef::Tensor<T, 3> all(rows, 1, dim);
    all.setConstant(static_cast<T>(0.5f));
    std::copy_n(from.data(), from.size(), all.data());
    return all;
  };
  for_each_gpu([&](const auto& bench) {
    const auto run = [&](Index others) {
      auto q = on_device(bench, copied(c.q, 2 + others));
      auto k = on_device(bench, copied(c.k, keys + 1));
      auto v = on_device(bench, copied(c.v, keys + 1));
      auto out = on_device(bench, poisoned_tensor<T, 3>({2 + others, 1, dim}));
      auto lse = on_device(bench, poisoned_tensor<ef::compute_type<T>, 2>({1, 2 + others}));
      auto lse_view = lse.view();
      auto with_lse = options;
      with_lse.log_sum_exp = lse_view;
      ef::variable_length_attention_into(bench.device, out.view(), q.cview(), k.cview(), v.cview(),
                                         {0, 2, 2 + others}, {0, keys, keys + 1}, with_lse);
      ef::Tensor<T, 4> rows(1, 2, 1, dim);
      std::copy_n(out.host().data(), rows.size(), rows.data());
      return std::pair(rows, std::pair(lse.host()(0, 0), lse.host()(0, 1)));
    };
    const auto alone = run(0), many = run(many_rows);
    EXPECT_LT(relative_error(alone.first, expected.output), tolerance<T>()) << keys;
    EXPECT_TRUE(same_bits(alone.first, many.first)) << keys;
    EXPECT_EQ(alone.second, many.second) << keys;
  });
}

TEST(AttentionOnDevice, SplitsDoNotChangeBits) {
  const std::vector<float> sinks{1.0f};
  check_splits<float>({.sinks = sinks}, 1030, 5);
  check_splits<float>({.causal = true, .window = 20, .prefix_length = 3}, 1100, 4);
  check_splits<ef::half>({.sinks = sinks}, 1030, 16);
}

// Two rows of a sequence, four heads to a KV head, are a step of decoding alone; packed before one of
// five rows they are in tiles, and have the same bits there.
template <typename T>
void check_steps(const ef::AttentionOptions& options, Index keys, Index width) {
  const Index rows = 2, others = 5, heads = 8, kv_heads = 2;
  const auto q = random_tensor<T, 3>({rows + others, heads, width}, 1),
             k = random_tensor<T, 3>({keys + 1, kv_heads, width}, 2);
  auto v = random_tensor<T, 3>({keys + 1, kv_heads, width}, 3);
  v(keys - 1, 0, width - 1) = std::numeric_limits<T>::infinity();  // row 0 does not see it
  for_each_gpu([&](const auto& bench) {
    const auto run = [&](Index all) {
      auto device_q =
          on_device(bench, ef::Tensor<T, 3>(q.slice(Eigen::array<Index, 3>{0, 0, 0},
                                                    Eigen::array<Index, 3>{all, heads, width})));
      auto device_k = on_device(bench, k);
      auto device_v = on_device(bench, v);
      auto out = on_device(bench, poisoned_tensor<T, 3>({all, heads, width}));
      auto lse = on_device(bench, poisoned_tensor<float, 2>({heads, all}));
      auto lse_view = lse.view();
      auto with_lse = options;
      with_lse.log_sum_exp = lse_view;
      ef::variable_length_attention_into(bench.device, out.view(), device_q.cview(),
                                         device_k.cview(), device_v.cview(), {0, rows, all},
                                         {0, keys, keys + 1}, with_lse);
      return std::pair(out.host(), lse.host());
    };
    const auto alone = run(rows), packed = run(rows + others);
    for (Index i = 0; i < rows * heads * width; ++i) {
      const auto a = static_cast<float>(alone.first.data()[i]),
                 b = static_cast<float>(packed.first.data()[i]);
      EXPECT_TRUE(a == b || (std::isnan(a) && std::isnan(b)))
          << keys << ' ' << i << ": " << a << ' ' << b;
    }
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < rows; ++i)
        EXPECT_EQ(alone.second(h, i), packed.second(h, i)) << h << ' ' << i;
    EXPECT_TRUE(std::isfinite(static_cast<float>(alone.first(0, 0, width - 1))));
    EXPECT_FALSE(std::isfinite(static_cast<float>(alone.first(1, 0, width - 1))));
  });
}

TEST(AttentionOnDevice, StepsHaveTheBitsOfTiles) {
  check_steps<ef::bfloat16>({.causal = true}, 530, 128);
  check_steps<ef::half>({.causal = true, .softcap = 3.0f}, 70, 72);
  check_steps<ef::bfloat16>({.causal = true, .scale = 2000.0f}, 70, 41);
}

// Many rows of many keys would leave more splits than memory should be asked for: 400 MB here, for
// rows that see one key.
TEST(AttentionOnDevice, ManySplitsAreNotLeftInMemory) {
  const Index rows = 32, heads = 64, keys = Index{1} << 22;
  ef::Tensor<ef::half, 4> q(1, rows, heads, 1), k(1, keys, 1, 1);
  q.setConstant(static_cast<ef::half>(1.0f));
  for (Index j = 0; j < keys; ++j) k.data()[j] = static_cast<ef::half>(static_cast<float>(j % 61));
  for_each_gpu([&](const auto& bench) {
    auto device_q = on_device(bench, q);
    auto device_k = on_device(bench, k);
    auto out = on_device(bench, poisoned_tensor<ef::half, 4>({1, rows, heads, 1}));
#if defined(EIGENFORMER_TEST_BLOCKS)
    const int before = bench.device.stream().launches;
#endif
    ef::batched_attention_with_padding_into(bench.device, out.view(), device_q.cview(),
                                            device_k.cview(), device_k.cview(), {keys},
                                            {.causal = true, .window = 1});
#if defined(EIGENFORMER_TEST_BLOCKS)
    EXPECT_EQ(bench.device.stream().launches, before + 1);  // no second one that merges
#endif
    const auto got = out.host();
    for (Index i = 0; i < rows; ++i)
      for (Index h = 0; h < heads; ++h)
        ASSERT_EQ(got(0, i, h, 0), k(0, keys - rows + i, 0, 0)) << i << ' ' << h;
  });
}

/// A step of decoding through both caches: the CPU's result on host caches is the measure, that of
/// queries in double where INT8 is stored, which are not quantized.
template <typename T, typename Storage>
void check_caches(const ef::AttentionOptions& options, double bound, Index dim = 6,
                  Index value_dim = 6) {
  const Index heads = 4, kv_heads = 2;
  const std::vector<Index> offsets{0, 7, 7, 72};  // sequence 1 has no keys
  const auto keys = random_tensor<T, 3>({72, kv_heads, dim}, 1),
             values = random_tensor<T, 3>({72, kv_heads, value_dim}, 2);
  const auto q = random_tensor<T, 4>({3, 2, heads, dim}, 3);
  const auto ragged = random_tensor<T, 3>({4, heads, dim}, 4);
  const std::vector<Index> q_offsets{0, 1, 1, 4};
  const ef::PagedKvConfig config{.layers = 2,
                                 .kv_heads = kv_heads,
                                 .head_dim = dim,
                                 .page_size = 8,
                                 .page_count = 16,
                                 .value_dim = value_dim};
  const auto run = [&]<typename S>(const auto& bench, ef::PagedKvCache<S, Storage>& cache) {
    const auto as = [](const auto& tensor) {
      if constexpr (std::is_same_v<S, T>)
        return tensor;
      else
        return to_double(tensor);
    };
    std::vector<ef::SequenceId> ids;
    for (int i = 0; i < 3; ++i) ids.push_back(cache.add_sequence());
    auto k = on_device(bench, as(keys));
    auto v = on_device(bench, as(values));
    cache.append(bench.device, ids, offsets, 1, k.cview(), v.cview());
    auto device_q = on_device(bench, as(q));
    auto out = on_device(bench, poisoned_tensor<S, 4>({3, 2, heads, value_dim}));
    ef::attention_with_kv_cache_into(bench.device, out.view(), device_q.cview(), cache, 1, options);
    auto device_ragged = on_device(bench, as(ragged));
    auto ragged_out = on_device(bench, poisoned_tensor<S, 3>({4, heads, value_dim}));
    ef::attention_with_kv_source_into(bench.device, ragged_out.view(), device_ragged.cview(),
                                      cache.source(1), q_offsets, options);
    return std::pair(out.host(), ragged_out.host());
  };
  const Eigen::DefaultDevice host;
  ef::PagedKvCache<std::conditional_t<std::is_same_v<Storage, std::int8_t>, double, T>, Storage>
      host_cache(config);
  const auto [expected, ragged_expected] = run(HostBench<Eigen::DefaultDevice>{host}, host_cache);
  for_each_gpu([&](const auto& bench) {
    ef::PagedKvCache<T, Storage> cache(config, ef::memory_of(bench.device));
    const auto [got, ragged_got] = run(bench, cache);
    EXPECT_LT(relative_error(got, to_double(expected)), bound);
    EXPECT_LT(relative_error(ragged_got, to_double(ragged_expected)), bound);
  });
}

TEST(AttentionOnDevice, ThroughPagesOfEveryStorage) {
  const std::vector<float> slopes{0.5f, 0.25f, 0.1f, 0.0f};
  const ef::AttentionOptions causal{.causal = true},
      window{.causal = true, .window = 11, .alibi_slopes = slopes},
      prefix{.causal = true, .window = 3, .prefix_length = 2};
  check_caches<float, float>(causal, 1e-5);
  check_caches<float, float>(window, 1e-5);
  check_caches<float, float>(prefix, 1e-5);
  check_caches<float, std::int8_t>(causal, 1e-5);
  check_caches<float, ef::bfloat16>(window, 1e-5);
  check_caches<ef::half, ef::half>(window, 2e-3);
  check_caches<ef::bfloat16, std::int8_t>(prefix, 1e-2);
  check_caches<double, double>(causal, 1e-12);
  // rows that begin where 16 bytes can be read at once, and others
  check_caches<float, std::int8_t>(causal, 1e-5, 48, 48);
  check_caches<float, std::int8_t>(causal, 1e-5, 37, 16);
  check_caches<ef::half, ef::half>(causal, 2e-3, 32, 40);
}

// A prompt has the same bits whole and token by token through a cache.
template <typename T>
void check_tokens(Index dim) {
  const Index tokens = 67, heads = 2;
  const auto q = random_tensor<T, 4>({1, tokens, heads, dim}, 1),
             k = random_tensor<T, 4>({1, tokens, 1, dim}, 2),
             v = random_tensor<T, 4>({1, tokens, 1, dim}, 3);
  for_each_gpu([&](const auto& bench) {
    auto device_q = on_device(bench, q);
    auto device_k = on_device(bench, k);
    auto device_v = on_device(bench, v);
    auto out = on_device(bench, poisoned_tensor<T, 4>({1, tokens, heads, dim}));
    ef::batched_attention_with_padding_into(bench.device, out.view(), device_q.cview(),
                                            device_k.cview(), device_v.cview(), {tokens},
                                            {.causal = true});
    const auto whole = out.host();
    ef::KvCache<T> cache(ef::memory_of(bench.device));
    auto step = on_device(bench, poisoned_tensor<T, 4>({1, 1, heads, dim}));
    using View = ef::TensorView<const T, 4>;
    for (Index i = 0; i < tokens; ++i) {
      ef::update_kv_cache(bench.device, cache,
                          View(device_k.cview().data() + i * dim, 1, 1, 1, dim),
                          View(device_v.cview().data() + i * dim, 1, 1, 1, dim), 0);
      if (i % 13 != 0 && i + 4 < tokens) continue;
      ef::attention_with_kv_cache_into(
          bench.device, step.view(),
          View(device_q.cview().data() + i * heads * dim, 1, 1, heads, dim), cache, 0,
          {.causal = true});
      const auto row = step.host();
      for (Index x = 0; x < heads * dim; ++x)
        EXPECT_EQ(row.data()[x], whole.data()[i * heads * dim + x]) << i;
    }
  });
}

TEST(AttentionOnDevice, WholeAndTokenByTokenGiveTheSameBits) {
  check_tokens<float>(4);
  check_tokens<ef::bfloat16>(24);
}

// On tensor cores: every option, groups that do not divide a tile, widths of any size.
TEST(AttentionOnDevice, SixteenBits) {
  const AttentionCase<ef::half> c({2, 3, 75, 6, 2, 20, 40}, {75, 66});
  for (const NamedOptions& named : option_sweep(6)) check_forward(c, named);
  const NamedOptions causal{"causal", {.causal = true}}, plain{"plain", {}};
  check_forward(AttentionCase<ef::bfloat16>({2, 70, 70, 3, 1, 64, 160}, {70, 3}), causal);
  check_forward(AttentionCase<ef::bfloat16>({1, 2, 130, 1, 1, 256, 256}, {130}), plain);
  check_forward(AttentionCase<ef::half>({1, 2, 9, 1, 1, 257, 8}, {9}),
                plain);  // too wide for tiles
  check_forward(AttentionCase<ef::half>({1, 2, 70, 1, 1, 16, 3}, {70}),
                {"large", {.scale = 4000.0f}});
  for (float scale : {4e9f, 4e20f, -4e36f, 2.5e37f})
    check_forward(AttentionCase<ef::bfloat16>({1, 2, 70, 1, 1, 16, 3}, {70}),
                  {"greatest", {.scale = scale}});
  AttentionCase<ef::bfloat16> large({1, 2, 70, 1, 1, 16, 3}, {70});
  large.v.setConstant(static_cast<ef::bfloat16>(3.38e38f));
  check_forward(large, {"large values", {}});
}

// One projection (batch, seq, heads, 3, width) read in place has the bits of copies.
template <typename T>
void check_heads_in_place(Index rows, Index width) {
  const auto qkv = random_tensor<T, 5>({1, rows, 2, 3, width}, 1);
  for_each_gpu([&](const auto& bench) {
    auto all = on_device(bench, qkv);
    auto q = on_device(bench, ef::Tensor<T, 4>(qkv.chip(0, 3)));
    auto k = on_device(bench, ef::Tensor<T, 4>(qkv.chip(1, 3)));
    auto v = on_device(bench, ef::Tensor<T, 4>(qkv.chip(2, 3)));
    auto out = on_device(bench, poisoned_tensor<T, 4>({1, rows, 2, width}));
    auto expected = on_device(bench, poisoned_tensor<T, 4>({1, rows, 2, width}));
    ef::batched_attention_with_padding_into(
        bench.device, out.view(), ef::heads_of(all.cview(), 0, 3), ef::heads_of(all.cview(), 1, 3),
        ef::heads_of(all.cview(), 2, 3), {rows}, {.causal = true});
    ef::batched_attention_with_padding_into(bench.device, expected.view(), q.cview(), k.cview(),
                                            v.cview(), {rows}, {.causal = true});
    EXPECT_TRUE(same_bits(out.host(), expected.host())) << rows << " x " << width;
  });
}
TEST(AttentionOnDevice, HeadsInPlaceHaveTheBitsOfCopies) {
  for (Index width : {5, 8}) check_heads_in_place<float>(3, width);
  for (Index width : {7, 16}) check_heads_in_place<ef::half>(3, width);
  check_heads_in_place<ef::half>(70, 8);
}

// A cache with a window, its values narrower than keys: the bits of one that keeps everything.
template <typename T>
void check_window() {
  const ef::AttentionOptions options{.causal = true, .window = 64, .prefix_length = 2};
  for_each_gpu([&](const auto& bench) {
    const ef::Memory& memory = ef::memory_of(bench.device);
    ef::KvCache<T> full(memory), ring({.window = 64, .sinks = 2, .chunk = 4}, memory);
    unsigned seed = 0;
    for (Index n : {300, 3, 1}) {
      auto k = on_device(bench, random_tensor<T, 4>({2, n, 1, 8}, ++seed));
      auto v = on_device(bench, random_tensor<T, 4>({2, n, 1, 5}, ++seed));
      for (auto* cache : {&full, &ring})
        ef::update_kv_cache(bench.device, *cache, k.cview(), v.cview(), 0);
      auto q = on_device(bench, random_tensor<T, 4>({2, 1, 2, 8}, ++seed));
      auto out = on_device(bench, poisoned_tensor<T, 4>({2, 1, 2, 5}));
      auto expected = on_device(bench, poisoned_tensor<T, 4>({2, 1, 2, 5}));
      ef::attention_with_kv_cache_into(bench.device, out.view(), q.cview(), ring, 0, options);
      ef::attention_with_kv_cache_into(bench.device, expected.view(), q.cview(), full, 0, options);
      EXPECT_TRUE(same_bits(out.host(), expected.host())) << n;
    }
    EXPECT_GT(ring.held(0).begin, 64);
  });
}
TEST(AttentionOnDevice, AWindowHasTheBitsOfACacheThatKeepsEverything) {
  check_window<float>();
  check_window<ef::half>();
}

}  // namespace
