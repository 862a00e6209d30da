// Top-k on every device: the ids of the reference, whatever k, order and ties; NaN is told.
#include <eigenformer/reference/top_k.h>
#include <eigenformer/top_k.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
void check_rows(Index rows, Index columns, Index k, const ef::TopKOptions& options) {
  auto x = random_tensor<T, 2>({rows, columns}, static_cast<unsigned>(columns), 3.0);
  for (Index i = 0; i < x.size(); i += 2)
    x.data()[i] = static_cast<T>(std::round(static_cast<float>(x.data()[i])));
  const auto expected = ef::reference::top_k(to_double(x), k, options);
  x(rows - 1, columns / 2) = std::numeric_limits<T>::quiet_NaN();
  for_each_device([&](const auto& bench) {
    const auto in = on_device(bench, x);
    const auto values = on_device(bench, poisoned_tensor<T, 2>({rows, k}));
    const auto ids = on_device(bench, poisoned_tensor<std::int32_t, 2>({rows, k}));
    const auto statuses = on_device(bench, poisoned_tensor<std::int8_t, 1>({rows}));
    ef::top_k_into(bench.device, values.view(), ids.view(), in.cview(), options,
                   {reinterpret_cast<ef::SampleStatus*>(statuses.view().data()),
                    static_cast<std::size_t>(rows)});
    const auto got = ids.host();
    const auto numbers = values.host();
    const auto status = statuses.host();
    for (Index r = 0; r < rows; ++r) {
      const bool bad = r == rows - 1;
      EXPECT_EQ(static_cast<ef::SampleStatus>(status(r)),
                bad ? ef::SampleStatus::nan : ef::SampleStatus::ok);
      for (Index i = 0; i < k; ++i) {
        ASSERT_EQ(got(r, i), bad ? -1 : expected(r, i)) << columns << " " << k << " row " << r;
        if (bad)
          ASSERT_TRUE(std::isnan(static_cast<float>(numbers(r, i))));
        else
          ASSERT_EQ(static_cast<double>(numbers(r, i)), static_cast<double>(x(r, got(r, i))));
      }
    }
  });
}

TEST(TopKOnDevice, IsTheReference) {
  for (const ef::TopKOptions& options :
       {ef::TopKOptions{}, ef::TopKOptions{.sorted = false}, ef::TopKOptions{.largest = false}}) {
    for (Index k : {0, 1, 5, 33}) check_rows<float>(3, 33, k, options);
    check_rows<float>(2, 1001, 70, options);
  }
  check_rows<double>(2, 130, 9, {});
  check_rows<ef::bfloat16>(2, 264, 9, {.largest = false});
  check_rows<ef::half>(2, 300, 300, {});
  check_rows<float>(140, 3, 2, {.largest = false});  // more rows than scratch
}

}  // namespace
