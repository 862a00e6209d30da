// PyTorch's results, tests/golden/attention.txt, made by tests/golden/make_attention.py.
#include <fstream>
#include <map>
#include <sstream>

#include "attention_case.h"

using namespace eigenformer_test;

namespace {

std::map<std::string, std::vector<double>> read_golden(const std::string& file) {
  std::map<std::string, std::vector<double>> entries;
  std::ifstream in(std::string(EIGENFORMER_GOLDEN_DIR) + "/" + file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    for (double x; words >> x;) entries[name].push_back(x);
  }
  return entries;
}

/// The inputs of make_attention.py.
ef::Tensor<double, 4> golden_values(std::uint32_t seed, Index heads) {
  ef::Tensor<double, 4> x(2, 7, heads, 6);
  for (Index i = 0; i < x.size(); ++i)
    x.data()[i] =
        static_cast<double>((static_cast<std::uint32_t>(i) * 2654435761u + seed * 40503u) >> 16) /
            16384.0 -
        2.0;
  return x;
}

void expect_golden(const ef::Tensor<double, 4>& actual, const std::vector<double>& expected,
                   const std::string& name) {
  ASSERT_EQ(static_cast<std::size_t>(actual.size()), expected.size()) << name;
  for (Index i = 0; i < actual.size(); ++i)
    ASSERT_NEAR(actual.data()[i], expected[static_cast<std::size_t>(i)], 1e-10) << name << " " << i;
}

TEST(AttentionGolden, AgreesWithPyTorch) {
  const auto golden = read_golden("attention.txt");
  ASSERT_EQ(golden.size(), 21u);
  const auto q = golden_values(1, 4), k = golden_values(2, 2), v = golden_values(3, 2),
             grad_out = golden_values(4, 4);
  const std::vector<int> lengths{7, 4};
  const std::vector<float> slopes{0.5f, 0.25f, 0.125f, 0.0625f}, sinks{0.5f, -1.0f, 2.0f, 0.0f};
  std::vector<float> sinks_gradient(4);
  ef::Tensor<float, 4> bias(1, 4, 7, 7);
  const auto bias_values = golden_values(5, 4);
  for (Index i = 0; i < bias.size(); ++i)
    bias.data()[i] = bias_values.data()[i] > 1.5 ? -std::numeric_limits<float>::infinity()
                                                 : static_cast<float>(bias_values.data()[i]);
  const std::vector<NamedOptions> cases{
      {"causal", {.causal = true}},
      {"scale", {.scale = 0.75f}},
      {"flex", {.causal = true, .window = 3, .softcap = 3.0f, .alibi_slopes = slopes}},
      {"sinks", {.causal = true, .sinks = sinks, .sinks_gradient = sinks_gradient}},
      {"bias", {.bias = bias}}};
  for (const auto& [name, given] : cases) {
    ef::AttentionOptions options = given;
    ef::Tensor<double, 3> lse(2, 4, 7);
    options.log_sum_exp = lse;
    const auto out = ef::batched_attention_with_padding(q, k, v, lengths, options);
    expect_golden(out, golden.at(name + ".out"), name + ".out");
    const auto g = ef::attention_backward(grad_out, q, k, v, out, lse, lengths, options);
    expect_golden(g.grad_q, golden.at(name + ".grad_q"), name + ".grad_q");
    expect_golden(g.grad_k, golden.at(name + ".grad_k"), name + ".grad_k");
    expect_golden(g.grad_v, golden.at(name + ".grad_v"), name + ".grad_v");
  }
  for (std::size_t h = 0; h < 4; ++h)
    EXPECT_NEAR(sinks_gradient[h], golden.at("sinks.grad_sinks")[h], 1e-6);
}

}  // namespace
