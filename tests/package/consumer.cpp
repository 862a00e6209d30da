// A program of somebody else: the umbrella header, a few calls of the contract, and an exit code.
#include <eigenformer/eigenformer.h>

#include <cstdio>

namespace ef = eigenformer;

int main() {
  const ef::Tensor<float, 3> mask = ef::create_causal_mask<float>(3, 2);
  ef::Tensor<float, 2> weights(2, 2);
  weights.setValues({{-2.0f, 1.5f}, {3.0f, -1.0f}});
  auto [q, scale] = ef::quantize_weights_int8(weights);
  ef::Tensor<float, 2> logits(1, 4);
  logits.setValues({{0.5f, 2.0f, -1.0f, 1.0f}});
  const bool ok = mask(1, 2, 2) == 0.0f && q(1, 0) == 127 && q(0, 1) == 64 && scale == 3.0f / 127 &&
                  ef::greedy_sample(logits)(0) == 1;
  std::printf("consumer: %s\n", ok ? "ok" : "wrong results");
  return ok ? 0 : 1;
}
