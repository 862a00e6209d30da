// The dense KV append on every device: new rows stand where they belong, nothing else is touched.
#include <eigenformer/kv_cache.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T, typename Storage>
void check(Index added, std::vector<Index> starts) {
  const Index batch = static_cast<Index>(starts.size()), capacity = 9, heads = 3, dim = 5;
  const auto keys = random_tensor<T, 4>({batch, added, heads, dim}, 1),
             values = random_tensor<T, 4>({batch, added, heads, dim}, 2);
  ef::Tensor<Index, 1> positions(batch);
  std::copy(starts.begin(), starts.end(), positions.data());
  for_each_device([&](const auto& bench) {
    auto key_buffer = on_device(bench, poisoned_tensor<Storage, 4>({batch, capacity, heads, dim}));
    auto value_buffer =
        on_device(bench, poisoned_tensor<Storage, 4>({batch, capacity, heads, dim}));
    auto new_keys = on_device(bench, keys);
    auto new_values = on_device(bench, values);
    auto where = on_device(bench, positions);
    ef::append_kv_into(bench.device, key_buffer.view(), value_buffer.view(), new_keys.cview(),
                       new_values.cview(),
                       std::span<const Index>(where.view().data(), starts.size()));
    const auto got_keys = key_buffer.host(), got_values = value_buffer.host();
    for (Index b = 0; b < batch; ++b)
      for (Index j = 0; j < capacity; ++j)
        for (Index h = 0; h < heads; ++h)
          for (Index d = 0; d < dim; ++d) {
            const Index start = starts[static_cast<std::size_t>(b)], i = j - start;
            if (start >= 0 && i >= 0 && i < added) {
              ASSERT_EQ(static_cast<float>(got_keys(b, j, h, d)),
                        static_cast<float>(static_cast<Storage>(keys(b, i, h, d))));
              ASSERT_EQ(static_cast<float>(got_values(b, j, h, d)),
                        static_cast<float>(static_cast<Storage>(values(b, i, h, d))));
            } else {
              ASSERT_TRUE(std::isnan(static_cast<float>(got_keys(b, j, h, d))));
              ASSERT_TRUE(std::isnan(static_cast<float>(got_values(b, j, h, d))));
            }
          }
  });
}

TEST(KvAppendOnDevice, WritesNewRowsAndNothingElse) {
  check<float, float>(1, {0, 8, 3});
  check<float, float>(4, {5, -1, 0, 2});
  check<float, ef::bfloat16>(2, {7, 0});
  check<ef::half, ef::half>(3, {1});
  check<ef::bfloat16, ef::bfloat16>(9, {0, 0});
}

}  // namespace
