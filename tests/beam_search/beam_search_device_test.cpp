// Beam search takes from a GPU what top_k finds there: the same beams as on the CPU.
#include <eigenformer/beam_search.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

TEST(BeamSearchOnDevice, KeepsTheBeamsOfTheCpu) {
  constexpr Index batch = 2, beams = 3, vocab = 140, steps = 3;
  const ef::BeamSearchOptions options{
      .beams = beams, .max_new_tokens = steps, .end_tokens = {7, 139}};
  for_each_gpu([&](const auto& bench) {
    ef::BeamSearch search(batch, options), expected(batch, options);
    for (Index s = 0; s < steps; ++s) {
      const auto scores = random_tensor<float, 2>({s == 0 ? batch : batch * beams, vocab},
                                                  static_cast<unsigned>(s));
      const auto on_gpu = on_device(bench, scores);
      search.step(bench.device, on_gpu.cview());
      expected.step(Eigen::DefaultDevice{}, scores);
      EXPECT_TRUE(same_bits(search.tokens(), expected.tokens()));
      for (std::size_t i = 0; i < batch * beams; ++i) {
        EXPECT_EQ(search.parents()[i], expected.parents()[i]);
        EXPECT_EQ(search.scores()[i], expected.scores()[i]);
      }
    }
    EXPECT_TRUE(search.done());
    for (Index b = 0; b < batch; ++b)
      EXPECT_EQ(search.hypotheses(b)[0].tokens, expected.hypotheses(b)[0].tokens);
  });
}

}  // namespace
