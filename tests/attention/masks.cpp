// Laws of what hides keys and moves scores beside positions: windows to both sides, bias, mask,
// mask of bits. All that say the same give the same bits, and none lets through what it hides.
#include <eigenformer/causal_mask.h>
#include <eigenformer/kv_cache.h>

#include <atomic>
#include <cstddef>

#include "allocation_count.h"
#include "attention_case.h"
#include "infinity.h"

using namespace eigenformer_test;

namespace {

template <typename T, int Rank>
ef::Tensor<T, Rank> random_choice(const std::array<Index, std::size_t{Rank}>& sizes, unsigned seed,
                                  T often, T seldom) {
  std::mt19937 generator(seed);
  ef::Tensor<T, Rank> x(dimensions_of<Rank>(sizes));
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = generator() % 4 == 0 ? seldom : often;
  return x;
}

/// Random biases, one in four -infinity, and the first row of all.
ef::Tensor<float, 4> random_bias(const std::array<Index, 4>& sizes, unsigned seed) {
  auto bias = random_tensor<float, 4>(sizes, seed);
  const auto hidden = random_choice<float, 4>(sizes, seed, 0.0f, -kInfinity);
  for (Index i = 0; i < bias.size(); ++i)
    if (hidden.data()[i] != 0 || i < sizes[3]) bias.data()[i] = -kInfinity;
  return bias;
}

/// Bit j of a row: mask(row, first + j), of (rows, keys).
ef::Tensor<std::uint64_t, 2> pack_bits(const ef::Tensor<bool, 2>& mask, Index first) {
  const Index keys = mask.dimension(1) - first;
  ef::Tensor<std::uint64_t, 2> words(mask.dimension(0), (keys + 63) / 64);
  words.setZero();
  for (Index i = 0; i < mask.dimension(0); ++i)
    for (Index j = 0; j < keys; ++j)
      words(i, j / 64) |= std::uint64_t{mask(i, first + j)} << j % 64;
  return words;
}

template <typename T>
ef::Tensor<T, 4> attend(const AttentionCase<T>& c, ef::AttentionOptions options,
                        ef::Tensor<ef::compute_type<T>, 3>* lse = nullptr, int threads = 1) {
  if (c.shape.queries != c.shape.keys) options.query_lengths = c.query_lengths;
  if (lse != nullptr) options.log_sum_exp = *lse;
  auto out =
      poisoned_tensor<T, 4>({c.shape.batch, c.shape.queries, c.shape.heads, c.shape.value_dim});
  Threads pool(threads);
  ef::batched_attention_with_padding_into(pool.device, out, c.q, c.k, c.v, c.key_lengths, options);
  return out;
}

template <typename T>
void check(const AttentionCase<T>& c, const ef::AttentionOptions& options, const char* name) {
  SCOPED_TRACE(name);
  const auto expected = c.reference(options);
  auto lse =
           poisoned_tensor<ef::compute_type<T>, 3>({c.shape.batch, c.shape.heads, c.shape.queries}),
       again = lse;
  const auto out = attend(c, options, &lse);
  ASSERT_TRUE(within(out, expected.output, tolerance<T>()));
  for (Index i = 0; i < lse.size(); ++i) {
    const double e = expected.log_sum_exp.data()[i], x = static_cast<double>(lse.data()[i]);
    ASSERT_TRUE(x == e || std::abs(x - e) < 1e-5 * (1 + std::abs(e))) << i << ": " << x << " " << e;
  }
  ASSERT_TRUE(same_bits(out, attend(c, options, &again, 3)));
  ASSERT_TRUE(same_bits(lse, again));
}

template <typename T>
void check_every_mask(const AttentionCase<T>& c) {
  const auto [batch, rows, keys, heads, kv_heads, head_dim, value_dim] = c.shape;
  const auto whole = random_bias({batch, heads, rows, keys}, 5),
             row = random_bias({1, 1, 1, keys}, 6),
             position = random_bias({1, heads, rows, keys}, 7);
  const auto mask = random_choice<bool, 3>({batch, rows, keys}, 8, true, false);
  const auto tree = random_choice<bool, 2>({batch * rows, keys}, 9, true, false);
  const auto all_bits = pack_bits(tree, 0), late_bits = pack_bits(tree, 3);
  const std::span<const float> slopes(test_slopes().data(), static_cast<std::size_t>(heads)),
      sinks(test_sinks().data(), static_cast<std::size_t>(heads));
  check(c, {.window = 7}, "window without causal");
  check(c, {.window_left = 70, .window_right = 0, .prefix_length = 2}, "left window");
  check(c, {.window_right = 65}, "right window");
  check(c, {.causal = true, .window_left = 4, .window_right = 9}, "causal and windows");
  check(c, {.bias = whole}, "bias of every score");
  check(c, {.causal = true, .softcap = 2.0f, .alibi_slopes = slopes, .bias = position},
        "bias of positions");
  check(c, {.bias = row, .sinks = sinks}, "bias of keys");
  check(c, {.mask = mask}, "mask");
  check(
      c,
      {.bit_mask = all_bits,
       .bit_mask_first_keys = ef::LengthSpan(std::vector<int>(static_cast<std::size_t>(batch), 0))},
      "bits of all keys");
  check(
      c,
      {.causal = true,
       .window = 66,
       .bias = position,
       .mask = mask,
       .bit_mask = late_bits,
       .bit_mask_first_keys = ef::LengthSpan(std::vector<int>(static_cast<std::size_t>(batch), 3)),
       .sinks = sinks,
       .prefix_length = 3},
      "all");
}

TEST(AttentionMasks, EqualTheirDefinition) {
  check_every_mask(AttentionCase<float>({2, 75, 75, 4, 2, 12, 20}, {75, 66}));
  check_every_mask(AttentionCase<float>({2, 3, 140, 2, 1, 8, 8}, {140, 64}));
  check_every_mask(AttentionCase<ef::bfloat16>({1, 5, 70, 4, 4, 8, 8}, {69}));
  AttentionCase<float> large({1, 9, 75, 2, 1, 8, 8}, {75});  // scores that are taken in double
  for (Index i = 0; i < large.q.size(); ++i) large.q.data()[i] *= 50.0f;
  check_every_mask(large);
}

// A window said as a window, as a mask, as a bias, as bits or as create_causal_mask.
TEST(AttentionMasks, ThatSayTheSameGiveTheSameBits) {
  for (const Index queries : {Index{1}, Index{6}, Index{150}}) {
    const AttentionCase<float> c({1, queries, 150, 4, 2, 16, 16}, {150});
    for (const Index window : {Index{0}, Index{5}, Index{70}}) {
      const ef::AttentionOptions plain{.causal = true, .window = window, .prefix_length = 4};
      const auto expected = attend(c, plain);
      const auto bias = ef::create_causal_mask<float>(
          queries, 1,
          {.key_length = 150, .query_offset = 150 - queries, .window = window, .prefix_length = 4});
      ef::Tensor<bool, 2> mask(queries, 150);
      for (Index i = 0; i < mask.size(); ++i) mask.data()[i] = bias.data()[i] == 0;
      const auto bits = pack_bits(mask, 0);
      EXPECT_TRUE(same_bits(attend(c, {.bias = bias}), expected));
      EXPECT_TRUE(same_bits(attend(c, {.mask = mask}), expected));
      EXPECT_TRUE(same_bits(attend(c, {.bit_mask = bits, .bit_mask_first_keys = {0}}), expected));
      EXPECT_TRUE(
          same_bits(attend(c, {.causal = true, .mask = mask, .prefix_length = 150}), expected));
      const ef::AttentionOptions sides{
          .window_left = window - 1, .window_right = 0, .prefix_length = 4};
      EXPECT_TRUE(same_bits(attend(c, sides), expected));
    }
    // holes as well, and bits that begin late, or with the queries as those of a tree of tokens
    const auto holes = random_choice<bool, 2>({queries, 150}, 3, true, false);
    ef::Tensor<float, 2> bias(queries, 150);
    for (Index i = 0; i < bias.size(); ++i) bias.data()[i] = holes.data()[i] ? 0.0f : -kInfinity;
    const auto expected = attend(c, {.causal = true, .mask = holes});
    EXPECT_TRUE(same_bits(attend(c, {.causal = true, .bias = bias}), expected));
    for (const Index first : {Index{70}, 150 - queries}) {
      auto late = holes;
      for (Index i = 0; i < queries; ++i)
        for (Index j = 0; j < first; ++j) late(i, j) = true;
      const auto bits = pack_bits(late, first);
      ef::AttentionOptions options{.causal = true, .bit_mask = bits};
      if (first == 70) options.bit_mask_first_keys = {70};
      EXPECT_TRUE(same_bits(attend(c, options), attend(c, {.causal = true, .mask = late})));
    }
  }
}

TEST(AttentionMasks, KeepOutWhateverAHiddenKeyHolds) {
  for (const Index queries : {Index{1}, Index{5}, Index{80}}) {
    AttentionCase<float> c({1, queries, 130, 4, 2, 16, 24}, {130});
    auto mask = random_choice<bool, 2>({queries, 130}, 3, true, false);
    for (Index i = 0; i < queries; ++i) mask(i, 17) = mask(i, 100) = i == 2;  // one row sees them
    ef::Tensor<float, 3> lse(1, 4, queries), again(1, 4, queries);
    const auto clean = attend(c, {.mask = mask}, &lse);
    for (Index h = 0; h < 2; ++h) {
      for (Index x = 0; x < 16; ++x) c.k(0, 17, h, x) = std::nanf("");
      for (Index x = 0; x < 24; ++x)
        c.v(0, 17, h, x) = std::nanf(""), c.v(0, 100, h, x) = kInfinity;
    }
    const auto out = attend(c, {.mask = mask}, &again);
    for (Index i = 0; i < queries; ++i)
      for (Index h = 0; h < 4; ++h) {
        if (i == 2) {
          EXPECT_TRUE(std::isnan(out(0, i, h, 0)));
          continue;
        }
        EXPECT_EQ(std::memcmp(&out(0, i, h, 0), &clean(0, i, h, 0), 24 * sizeof(float)), 0) << i;
        EXPECT_EQ(lse(0, h, i), again(0, h, i));
      }
  }
}

TEST(AttentionMasks, KeepOutAScaleThatIsNoNumber) {
  struct Page {  // of 8 positions, one head of 8
    std::int8_t keys[64], values[64];
    float key_scales[8], value_scales[8];
  } page;
  for (int i = 0; i < 64; ++i) page.keys[i] = page.values[i] = static_cast<std::int8_t>(i * 37);
  for (int j = 0; j < 8; ++j) page.key_scales[j] = page.value_scales[j] = 0.01f;
  const std::byte* const pages[] = {reinterpret_cast<const std::byte*>(&page)};
  const std::int32_t table[] = {0};
  const std::int32_t* const tables[] = {table};
  const Index length = 8;
  const ef::KvSource<std::int8_t> source{.batch = 1,
                                         .kv_heads = 1,
                                         .head_dim = 8,
                                         .lengths = &length,
                                         .pages = pages,
                                         .tables = tables,
                                         .page_size = 8,
                                         .value_offset = offsetof(Page, values),
                                         .key_scale_offset = offsetof(Page, key_scales),
                                         .value_scale_offset = offsetof(Page, value_scales)};
  const auto q = random_tensor<float, 4>({1, 1, 2, 8}, 1);
  ef::Tensor<bool, 2> mask(1, 8);
  for (Index j = 0; j < 8; ++j) mask(0, j) = j % 3 != 1;
  const auto clean = ef::attention_with_kv_source(q, source, {.mask = mask});
  page.key_scales[4] = page.value_scales[4] = std::nanf("");
  EXPECT_TRUE(same_bits(ef::attention_with_kv_source(q, source, {.mask = mask}), clean));
}

TEST(AttentionMasks, ARowWithoutKeysIsZeroSinksOrNot) {
  const AttentionCase<float> c({1, 3, 1200, 2, 1, 8, 8}, {1200});
  ef::Tensor<bool, 2> mask(3, 1200);
  mask.setConstant(false);
  mask(1, 1100) = true;  // behind a first fold that is hidden
  for (const bool with_sinks : {false, true})
    for (const int threads : {1, 4}) {
      ef::Tensor<float, 3> lse(1, 2, 3);
      ef::AttentionOptions options{.mask = mask};
      if (with_sinks) options.sinks = {0.5f, 1.0f};
      const auto out = attend(c, options, &lse, threads);
      const auto expected = c.reference(options);
      EXPECT_TRUE(within(out, expected.output, 1e-5));
      for (Index h = 0; h < 2; ++h) {
        EXPECT_EQ(lse(0, h, 0), -kInfinity);
        EXPECT_EQ(out(0, 2, h, 3), 0.0f);
        EXPECT_NEAR(lse(0, h, 1), expected.log_sum_exp(0, h, 1), 1e-5);
      }
    }
}

// What some frameworks mask with: where it is everywhere, all keys count alike.
TEST(AttentionMasks, ABiasOfTheLeastFloatHidesNothing) {
  const AttentionCase<float> c({1, 2, 70, 2, 1, 8, 8}, {70});
  ef::Tensor<float, 2> bias(2, 70);
  bias.setConstant(std::numeric_limits<float>::lowest());
  bias(1, 3) = 0;
  const auto out = attend(c, {.bias = bias});
  EXPECT_TRUE(within(out, c.reference({.bias = bias}).output, 1e-5));
  EXPECT_EQ(out(0, 1, 0, 5), c.v(0, 3, 0, 5));
}

TEST(AttentionMasks, AreReadByTheirStrides) {
  const AttentionCase<float> c({2, 9, 70, 4, 2, 8, 8}, {70, 30});
  const auto bias = random_tensor<float, 4>({2, 4, 9, 70}, 3);
  const auto expected = attend(c, {.bias = bias});
  ef::Tensor<float, 4> turned(70, 9, 4, 2);  // keys first, in falling order
  for (Index i = 0; i < bias.size(); ++i) {
    const Index j = i % 70, row = i / 70 % 9, h = i / 630 % 4, b = i / 2520;
    turned(69 - j, row, h, b) = bias.data()[i];
  }
  const ef::ScoreView<float> view(&turned(69, 0, 0, 0), {2, 4, 9, 70}, {1, 2, 8, -72});
  EXPECT_TRUE(same_bits(attend(c, {.bias = view}), expected));
  // what one row serves, written out
  const auto one = random_tensor<float, 4>({1, 4, 1, 75}, 4);
  ef::Tensor<float, 4> all(2, 4, 9, 75);
  for (Index i = 0; i < all.size(); ++i) all.data()[i] = one.data()[i % 75 + i / (75 * 9) % 4 * 75];
  EXPECT_TRUE(same_bits(attend(c, {.bias = one}), attend(c, {.bias = all})));
}

// Packed rows, sequences in a cache by tokens, and stored as INT8: rows and columns are where the
// manual says.
TEST(AttentionMasks, MeanTheSameInPackedAndCachedCalls) {
  const std::vector<Index> lengths{90, 7};
  const AttentionCase<float> c({2, 90, 90, 4, 2, 16, 16}, lengths);
  const auto bias = random_bias({2, 1, 90, 90}, 3);
  const auto dense = attend(c, {.causal = true, .bias = bias});
  ef::Tensor<float, 3> q(97, 4, 16), k(97, 2, 16), v(97, 2, 16);
  ef::Tensor<float, 2> packed_bias(97, 90);
  for (Index b = 0, at = 0; b < 2; at += lengths[static_cast<std::size_t>(b++)])
    for (Index i = 0; i < lengths[static_cast<std::size_t>(b)]; ++i) {
      std::copy_n(&c.q(b, i, 0, 0), 64, &q(at + i, 0, 0));
      std::copy_n(&c.k(b, i, 0, 0), 32, &k(at + i, 0, 0));
      std::copy_n(&c.v(b, i, 0, 0), 32, &v(at + i, 0, 0));
      std::copy_n(&bias(b, 0, i, 0), 90, &packed_bias(at + i, 0));
    }
  const auto packed = ef::variable_length_attention(q, k, v, {0, 90, 97}, {0, 90, 97},
                                                    {.causal = true, .bias = packed_bias});
  for (Index i = 0; i < 97; ++i)
    EXPECT_EQ(std::memcmp(&packed(i, 0, 0), i < 90 ? &dense(0, i, 0, 0) : &dense(1, i - 90, 0, 0),
                          64 * sizeof(float)),
              0)
        << i;

  ef::KvCache<float> cache;
  ef::KvCache<float, std::int8_t> bytes;
  const auto rows = [](const ef::Tensor<float, 4>& x, Index i) {
    return ef::Tensor<float, 4>(x.slice(Eigen::array<Index, 4>{0, i, 0, 0},
                                        Eigen::array<Index, 4>{1, 1, x.dimension(2), 16}));
  };
  for (Index i = 0; i < 90; ++i) {
    ef::update_kv_cache(cache, rows(c.k, i), rows(c.v, i), 0);
    ef::update_kv_cache(bytes, rows(c.k, i), rows(c.v, i), 0);
    const ef::TensorView<const float, 4> line(&bias(0, 0, i, 0), 1, 1, 1, 90);
    const auto token = ef::attention_with_kv_cache(rows(c.q, i), cache, 0, {.bias = line});
    EXPECT_EQ(std::memcmp(token.data(), &dense(0, i, 0, 0), 64 * sizeof(float)), 0) << i;
  }
  ef::Tensor<bool, 2> mask(1, 90);
  for (Index j = 0; j < 90; ++j) mask(0, j) = j > 89 - 20;
  EXPECT_TRUE(same_bits(
      ef::attention_with_kv_cache(rows(c.q, 89), bytes, 0, {.mask = mask}),
      ef::attention_with_kv_cache(rows(c.q, 89), bytes, 0, {.causal = true, .window = 20})));
}

/// Differs by every number it is told, and reads memory for the keys that are there.
struct TestFunction {
  const float* keys;
  template <typename S>
  S operator()(S score, const ef::ScorePosition& at) const {
    return score * static_cast<S>(0.5) + static_cast<S>(at.batch + at.head) * static_cast<S>(0.1) -
           static_cast<S>(at.query - at.key) * static_cast<S>(0.02) + static_cast<S>(keys[at.key]);
  }
};

TEST(AttentionFunctions, AreAppliedBeforeTheMask) {
  const auto of_keys = random_tensor<float, 1>({90}, 1);
  const TestFunction function{of_keys.data()};
  AttentionCase<float> c({2, 90, 90, 4, 2, 16, 16}, {90, 70});
  const auto bias = random_bias({1, 4, 90, 90}, 3);
  for (const float size : {1.0f, 60.0f}) {  // scores in double as well
    for (Index i = 0; i < c.q.size(); ++i) c.q.data()[i] *= size;
    for (const ef::AttentionOptions& options :
         {ef::AttentionOptions{}, {.causal = true, .window = 30, .softcap = 20.0f, .bias = bias}}) {
      const auto out =
          ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, options, function);
      const auto expected =
          ef::reference::attention(to_double(c.q), to_double(c.k), to_double(c.v), c.key_lengths,
                                   c.query_lengths, options, function);
      EXPECT_TRUE(within(out, expected.output, 1e-5));
      Threads threads(3);
      EXPECT_TRUE(
          same_bits(out, ef::batched_attention_with_padding(threads.device, c.q, c.k, c.v,
                                                            c.key_lengths, options, function)));
    }
  }
  // few rows, by tokens through a cache
  ef::KvCache<float> cache;
  ef::Tensor<float, 4> q(2, 1, 4, 16);
  ef::update_kv_cache(cache, c.k, c.v, 0);
  for (Index b = 0; b < 2; ++b) std::copy_n(&c.q(b, 89, 0, 0), 64, &q(b, 0, 0, 0));
  const auto last = ef::attention_with_kv_cache(q, cache, 0, {.causal = true}, function);
  const auto all =
      ef::batched_attention_with_padding(c.q, c.k, c.v, {90, 90}, {.causal = true}, function);
  EXPECT_EQ(std::memcmp(&last(0, 0, 0, 0), &all(0, 89, 0, 0), 64 * sizeof(float)), 0);
}

/// Counts the keys that a window of 3 and a prefix of 2 hide.
struct CountHidden {
  std::atomic<int>* hidden;
  template <typename S>
  S operator()(S score, const ef::ScorePosition& at) const {
    if (at.key >= 2 && (at.key > at.query || at.key <= at.query - 3)) ++*hidden;
    return score;
  }
};

TEST(AttentionFunctions, AreCalledForKeysInSight) {
  const AttentionCase<float> c({1, 60, 60, 1, 1, 4, 4}, {60});
  const ef::AttentionOptions options{.causal = true, .window = 3, .prefix_length = 2};
  std::atomic<int> hidden{0};
  const auto out = ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, options,
                                                      CountHidden{&hidden});
  EXPECT_EQ(hidden, 0);
  EXPECT_TRUE(within(out, c.reference(options).output, 1e-5));
}

TEST(AttentionMasks, AllocateNothingTheSecondTime) {
  const AttentionCase<float> c({2, 70, 70, 4, 2, 16, 16}, {70, 30});
  const auto bias = random_bias({2, 1, 70, 70}, 3);
  const auto bits =
      random_choice<std::uint64_t, 2>({140, 2}, 3, ~std::uint64_t{0}, std::uint64_t{5});
  ef::Tensor<float, 4> out(2, 70, 4, 16);
  ef::Workspace workspace;
  const auto call = [&] {
    ef::batched_attention_with_padding_into(
        Eigen::DefaultDevice{}, out, c.q, c.k, c.v, c.key_lengths,
        {.bias = bias, .bit_mask = bits, .bit_mask_first_keys = {0, 4}}, workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
}

TEST(AttentionMasks, ThatDoNotFitAreRefused) {
  const AttentionCase<float> c({2, 9, 70, 4, 2, 8, 8}, {70, 30});
  const auto refuse = [&](const ef::AttentionOptions& options,
                          const std::vector<std::string>& text) {
    expect_throws<std::invalid_argument>([&] { attend(c, options); }, text);
  };
  refuse({.window = 3, .window_left = 2}, {"window is 3", "window_left 2"});
  refuse({.window_right = -2}, {"window_right -2"});
  const ef::Tensor<float, 4> heads(1, 3, 9, 70), rows(2, 4, 8, 70), keys(2, 1, 1, 69);
  refuse({.bias = heads}, {"bias has shape (1, 3, 9, 70)", "(2, 4, 9, 70 or more)"});
  refuse({.bias = rows}, {"(2, 4, 8, 70)"});
  refuse({.bias = keys}, {"(2, 1, 1, 69)"});
  const ef::Tensor<bool, 3> mask(3, 9, 70);
  refuse({.mask = mask}, {"mask has shape (3, 1, 9, 70)"});
  const ef::Tensor<std::uint64_t, 2> few(17, 2), words(18, 1);
  refuse({.bit_mask = few}, {"bit_mask has 17 rows, expected 18"});
  refuse({.bit_mask = words, .bit_mask_first_keys = {5, 0}}, {"65 keys from key 5 of sequence 0"});
  refuse({.bit_mask = words, .bit_mask_first_keys = {6}}, {"bit_mask_first_keys has 1"});
  refuse({.bit_mask = words, .bit_mask_first_keys = {6, -1}}, {"bit_mask_first_keys[1] is -1"});
  refuse({.bit_mask_first_keys = {1, 2}}, {"a bit_mask"});
  const float* const nothing = nullptr;
  refuse({.bias = {nothing, {1, 1, 1, 70}, {0, 0, 0, 1}}}, {"bias has a null pointer"});
  refuse({.bit_mask = {nullptr, 18, 2}}, {"bit_mask has a null pointer"});
}

}  // namespace
