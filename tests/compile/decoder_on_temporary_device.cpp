// expect: deleted
#include <eigenformer/decoder.h>
namespace ef = eigenformer;
int main() {
  auto weights = std::make_shared<ef::DecoderWeights>(ef::DecoderConfig{});
  ef::Decoder<float> model(weights, Eigen::DefaultDevice{});
}
