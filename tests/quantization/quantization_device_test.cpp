// Per-channel quantization on every device: the numbers of the definition, exactly.
#include <eigenformer/quantization.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
void check(Index rows, Index columns) {
  auto weights = random_tensor<T, 2>({rows, columns}, 3);
  for (Index j = 0; rows > 1 && j < columns; ++j) weights(1, j) = T(0);
  for_each_device([&](const auto& bench) {
    auto device_weights = on_device(bench, weights);
    auto values = on_device(bench, poisoned_tensor<std::int8_t, 2>({rows, columns}));
    auto scales = on_device(bench, poisoned_tensor<float, 1>({rows}));
    ef::quantize_weights_int8_per_channel_into(bench.device, values.view(), scales.view(),
                                               device_weights.cview());
    const auto q = values.host();
    const auto s = scales.host();
    for (Index r = 0; r < rows; ++r) {
      using C = ef::compute_type<T>;
      C largest = 0;
      for (Index j = 0; j < columns; ++j)
        largest = std::max(largest, std::abs(static_cast<C>(weights(r, j))));
      const float scale = largest == 0 ? 1.0f : static_cast<float>(largest / C(127));
      ASSERT_EQ(s(r), scale);
      for (Index j = 0; j < columns; ++j)
        ASSERT_EQ(q(r, j), static_cast<int>(std::nearbyint(static_cast<C>(weights(r, j)) /
                                                           static_cast<C>(scale))))
            << r << ' ' << j;
    }
  });
}

TEST(QuantizationOnDevice, EqualsItsDefinition) {
  for (Index columns : {1, 17, 256, 1000})
    for (Index rows : {1, 5, 64}) {
      check<float>(rows, columns);
      check<ef::bfloat16>(rows, columns);
      check<ef::half>(rows, columns);
    }
}

}  // namespace
