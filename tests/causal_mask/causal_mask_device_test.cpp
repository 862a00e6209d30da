// The causal mask on every device, against the plain definition.
#include <eigenformer/causal_mask.h>
#include <eigenformer/reference/causal_mask.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
void check(Index batch, Index queries, Index keys, ef::CausalMaskOptions options) {
  options.key_length = keys;
  for_each_device([&](const auto& bench) {
    auto mask = on_device(bench, poisoned_tensor<T, 3>({batch, queries, keys}));
    ef::CausalMaskOptions device_options = options;
    ef::Tensor<std::int32_t, 1> ids(static_cast<Index>(options.segment_ids.size()));
    std::copy(options.segment_ids.begin(), options.segment_ids.end(), ids.data());
    auto device_ids = on_device(bench, ids);
    if (ids.size() > 0)
      device_options.segment_ids = {device_ids.view().data(), options.segment_ids.size()};
    ef::causal_mask_into(bench.device, mask.view(), device_options);
    const auto got = mask.host();
    const auto expected = ef::reference::causal_mask(queries, batch, keys, options);
    for (Index i = 0; i < got.size(); ++i)
      ASSERT_EQ(static_cast<double>(got.data()[i]), expected.data()[i]) << i;
  });
}

template <typename T>
void check_all() {
  check<T>(2, 5, 5, {});
  check<T>(0, 5, 5, {});
  check<T>(1, 70, 33, {.query_offset = 4, .window = 9});
  check<T>(3, 17, 300, {.query_offset = -3, .window = 2, .prefix_length = 5});
  const std::vector<std::int32_t> ids{0, 0, 1, 1, 1, 2};
  check<T>(2, 6, 6, {.segment_ids = ids});
}

TEST(CausalMaskOnDevice, EqualsItsDefinition) {
  check_all<float>();
  check_all<ef::bfloat16>();
  check_all<ef::half>();
  check_all<double>();
}

}  // namespace
