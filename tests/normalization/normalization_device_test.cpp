// RMSNorm on every device, against the double reference.
#include <eigenformer/normalization.h>
#include <eigenformer/reference/normalization.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
void check(Index rows, Index features) {
  const auto x = random_tensor<T, 2>({rows, features}, 1);
  const auto weight = random_tensor<float, 1>({features}, 2);
  const auto expected = ef::reference::rms_norm(to_double(x), to_double(weight), 1e-5);
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto y = on_device(bench, poisoned_tensor<T, 2>({rows, features}));
    ef::rms_norm_into(bench.device, y.view(), device_x.cview(), device_weight.cview());
    EXPECT_LT(relative_error(y.host(), expected), tolerance<T>()) << rows << " x " << features;
  });
}

TEST(RmsNormOnDevice, EqualsTheReference) {
  for (Index features : {1, 31, 256, 1000, 4096})
    for (Index rows : {0, 1, 7}) {
      check<float>(rows, features);
      check<ef::bfloat16>(rows, features);
      check<ef::half>(rows, features);
      check<double>(rows, features);
    }
}

}  // namespace
