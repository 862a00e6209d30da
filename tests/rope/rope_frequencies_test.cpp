// Frequencies of the caller's: equal to the definition and to a table made of them, also where they
// change between two steps; those of longer contexts equal Hugging Face's (transformers 5.24,
// modeling_rope_utils.ROPE_INIT_FUNCTIONS, head_dim 16; the calls stand beside the numbers).
#include <eigenformer/reference/rope.h>
#include <eigenformer/rope/frequencies.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere{};

void expect_frequencies(const ef::RopeOptions& options, double attention_factor,
                        const std::vector<double>& expected) {
  EXPECT_NEAR(static_cast<double>(options.attention_factor), attention_factor, 1e-6);
  ASSERT_EQ(options.frequencies.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i)  // theirs are computed in float
    EXPECT_NEAR(options.frequencies[i] / expected[i], 1.0, 2e-6) << i;
  EXPECT_EQ(options.rotary_dim, 2 * static_cast<Index>(expected.size()));
}

TEST(RopeFrequencies, AreHuggingFaces) {
  // rope_type llama3, factor 8, low 1, high 4, original 8192, theta 500000
  expect_frequencies(
      ef::llama3_rope(16, 500000, {.factor = 8, .trained_length = 8192}), 1.0,
      {1.0, 0.193922758102417, 0.03760603070259094, 0.00729266507551074, 0.0005248460220173001,
       3.428102354519069e-05, 6.647869668086059e-06, 1.289173155782919e-06});
  // yarn, factor 4, original 2048, theta 10000
  expect_frequencies(
      ef::yarn_rope(16, 10000, {.factor = 4, .trained_length = 2048}), 1.138629436111989,
      {1.0, 0.3162277638912201, 0.10000000149011612, 0.025693506002426147, 0.00624999962747097,
       0.0013834965648129582, 0.0002500000118743628, 7.905694656074047e-05});
  // yarn, factor 32, original 4096, truncate false, theta 150000 (gpt-oss)
  expect_frequencies(
      ef::yarn_rope(16, 150000, {.factor = 32, .trained_length = 4096, .truncate = false}),
      1.3465735902799727,
      {1.0, 0.22541800141334534, 0.05081327259540558, 0.006794959306716919, 0.0004564839182421565,
       1.818833698052913e-05, 4.099978468730114e-06, 9.242089618055616e-07});
  // yarn, factor 40, original 4096, mscale 0.707, mscale_all_dim 1 (DeepSeek)
  expect_frequencies(
      ef::yarn_rope(16, 10000,
                    {.factor = 40, .trained_length = 4096, .mscale = 0.707, .mscale_all_dim = 1}),
      0.9210423553163399,
      {1.0, 0.3162277638912201, 0.10000000149011612, 0.023914724588394165, 0.005124999675899744,
       0.0008498621755279601, 2.499999936844688e-05, 7.905694474175107e-06});
  // dynamic, factor 2, max_position_embeddings 2048, seq_len 5000
  expect_frequencies(
      ef::ntk_rope(16, 10000, 2, 2048, 5000), 1.0,
      {1.0, 0.26051709055900574, 0.0678691565990448, 0.017681075260043144, 0.00460622226819396,
       0.001199999707750976, 0.00031262042466551065, 8.144296589307487e-05});
  // longrope, factor 32, original 4096, short 1 + 0.1 i, long 2 + i, seq_len 100 and 5000
  ef::LongRopeOptions how{.factor = 32, .trained_length = 4096, .length = 100};
  how.short_factors = {1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7};
  how.long_factors = {2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0};
  expect_frequencies(
      ef::longrope(16, 10000, how), 1.1902380714238083,
      {1.0, 0.2874797582626343, 0.0833333358168602, 0.024325214326381683, 0.0071428571827709675,
       0.0021081853192299604, 0.0006249999860301614, 0.0001860163320088759});
  how.length = 5000;
  expect_frequencies(
      ef::longrope(16, 10000, how), 1.1902380714238083,
      {0.5, 0.10540924966335297, 0.02500000037252903, 0.006324555724859238, 0.0016666667070239782,
       0.00045175396371632814, 0.0001250000059371814, 3.513641786412336e-05});
}

TEST(RopeFrequencies, WithinTheTrainedLengthNtkIsTheBase) {
  const auto options = ef::ntk_rope(32, 10000, 4, 2048, 100);
  for (std::size_t i = 0; i < 16; ++i)
    EXPECT_NEAR(options.frequencies[i], std::pow(10000.0, -2.0 * static_cast<double>(i) / 32),
                1e-15);
}

TEST(RopeFrequencies, TurnAsTheReferenceSaysWithOptionsAndWithTables) {
  const std::vector<Index> positions{0, 5, 70, 299};
  const auto x = random_tensor<float, 3>({4, 3, 20}, 1);
  for (auto layout : {ef::RopeLayout::half_split, ef::RopeLayout::interleaved})
    for (Index rotary_dim : {0, 12}) {
      const ef::RopeOptions options{.layout = layout,
                                    .rotary_dim = rotary_dim,
                                    .scale = 0.5f,
                                    .attention_factor = 1.25f,
                                    .frequencies = {1.0, 0.5, -0.25, 0.0, 0.03, 1e-3}};
      const ef::Tensor<float, 3> y = ef::rope(x, positions, options);
      EXPECT_LT(relative_error(y, ef::reference::rope(to_double(x), positions, options)), 1e-6);
      EXPECT_TRUE(same_bits(ef::rope(x, positions, ef::RopeTable(300, 20, options)), y));
      auto back = poisoned_tensor<float, 3>({4, 3, 20});
      ef::rope_backward_into(kHere, back, x, positions, options);
      EXPECT_LT(relative_error(back, ef::reference::rope(to_double(x), positions, options, true)),
                1e-6);
    }
}

TEST(RopeFrequencies, AnAssignedTableFollowsThem) {
  const std::vector<Index> positions{9, 2}, rows{0, 1};
  const auto x = random_tensor<float, 3>({2, 1, 8}, 2);
  ef::RopeTable table;
  ef::RopeOptions options;
  const auto expect_current = [&] {
    table.assign(positions, 8, options);
    EXPECT_TRUE(same_bits(ef::rope(x, rows, table), ef::rope(x, positions, options)));
  };
  expect_current();
  options.frequencies = {1.0, 0.5, 0.25, 0.125};
  expect_current();
  options.frequencies = {1.0, 0.5, 0.25, 0.1};
  expect_current();
  options.attention_factor = 2.0f;
  expect_current();
  options.frequencies = {};
  expect_current();
}

TEST(RopeFrequencies, RefusesWhatCannotBe) {
  const auto x = random_tensor<float, 3>({1, 1, 8}, 3);
  const std::vector<Index> at{0};
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const auto refused = [](auto&& call, const std::vector<std::string>& words) {
    expect_throws<std::invalid_argument>(call, words);
  };
  refused(
      [&] {
        ef::rope(x, at, {.rotary_dim = 8, .frequencies = {1.0, 2.0}});
      },
      {"rope", "frequencies has 2", "expected 4"});
  refused([&] { ef::rope(x, at, {.frequencies = {1.0, nan}}); }, {"frequencies[1] is nan"});
  refused(
      [&] {
        ef::rope(x, at, {.frequencies = {1.0, 1.0, 1.0, 1.0, 1.0}});
      },
      {"rotary_dim is 10", "head_dim, 8"});
  refused([&] { ef::rope(x, at, {.attention_factor = std::numeric_limits<float>::infinity()}); },
          {"attention_factor is inf"});
  refused([] { ef::llama3_rope(7, 10000); }, {"llama3_rope", "rotary_dim is 7"});
  refused([] { ef::llama3_rope(8, 0); }, {"base is 0"});
  refused([] { ef::llama3_rope(8, 10000, {.high_frequency_factor = 1}); },
          {"high_frequency_factor is 1"});
  refused([] { ef::yarn_rope(8, 10000, {.factor = nan}); }, {"yarn_rope", "factor is nan"});
  refused([] { ef::yarn_rope(8, 1); }, {"base is 1"});
  refused([] { ef::ntk_rope(2, 10000, 2, 100, 200); }, {"ntk_rope", "rotary_dim is 2"});
  refused([] { ef::ntk_rope(8, 10000, 2, -1, 200); }, {"trained_length is -1"});
  refused([] { ef::longrope(8, 10000, {.short_factors = {1.0}}); },
          {"longrope", "short_factors has 1"});
  refused(
      [] {
        ef::longrope(4, 10000, {.length = 5000, .long_factors = {1.0, 0.0}});
      },
      {"long_factors is 0"});
}

}  // namespace
