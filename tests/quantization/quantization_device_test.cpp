// Quantization by row and by group on every device: the numbers of the definition, exactly.
#include <eigenformer/quantization.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

/// group 0: one scale per row.
template <typename T>
void check(Index rows, Index columns, Index group) {
  const Index width = group == 0 ? columns : group, groups = (columns + width - 1) / width;
  auto weights = random_tensor<T, 2>({rows, columns}, 3);
  for (Index j = 0; rows > 1 && j < columns; ++j) weights(1, j) = T(0);
  for_each_device([&](const auto& bench) {
    auto device_weights = on_device(bench, weights);
    auto values = on_device(bench, poisoned_tensor<std::int8_t, 2>({rows, columns}));
    auto scales = on_device(bench, poisoned_tensor<float, 2>({rows, groups}));
    const ef::TensorView<float, 1> row_scales(scales.view().data(), rows);
    if (group == 0)
      ef::quantize_weights_int8_per_channel_into(bench.device, values.view(), row_scales,
                                                 device_weights.cview());
    else
      ef::quantize_weights_int8_grouped_into(bench.device, values.view(), scales.view(),
                                             device_weights.cview(), group);
    const auto q = values.host();
    const auto s = scales.host();
    for (Index r = 0; r < rows; ++r)
      for (Index g = 0; g < groups; ++g) {
        using C = ef::compute_type<T>;
        const Index begin = g * width, end = std::min(begin + width, columns);
        C largest = 0;
        for (Index j = begin; j < end; ++j)
          largest = std::max(largest, std::abs(static_cast<C>(weights(r, j))));
        const float scale = largest == 0 ? 1.0f : static_cast<float>(largest / C(127));
        ASSERT_EQ(s(r, g), scale);
        for (Index j = begin; j < end; ++j)
          ASSERT_EQ(q(r, j), static_cast<int>(std::nearbyint(static_cast<C>(weights(r, j)) /
                                                             static_cast<C>(scale))))
              << r << ' ' << j;
      }
  });
}

TEST(QuantizationOnDevice, EqualsItsDefinition) {
  for (Index columns : {1, 17, 256, 1000})
    for (Index rows : {1, 5, 64})
      for (Index group : {0, 32, 128}) {
        check<float>(rows, columns, group);
        check<ef::bfloat16>(rows, columns, group);
        check<ef::half>(rows, columns, group);
      }
}

}  // namespace
