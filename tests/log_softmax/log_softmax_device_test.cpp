// Log-softmax on every device, against the double reference: widths around runs and blocks, rows
// that have no softmax.
#include <eigenformer/log_softmax.h>
#include <eigenformer/reference/log_softmax.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
void check_rows(Index rows, Index columns) {
  using Y = ef::compute_type<T>;
  const auto x = random_tensor<T, 2>({rows, columns}, static_cast<unsigned>(columns), 3.0);
  const auto expected = ef::reference::log_softmax(to_double(x));
  for_each_device([&](const auto& bench) {
    const auto in = on_device(bench, x);
    const auto y = on_device(bench, poisoned_tensor<Y, 2>({rows, columns}));
    ef::log_softmax_into(bench.device, y.view(), in.cview());
    EXPECT_TRUE(within(y.host(), expected, 2 * std::numeric_limits<Y>::epsilon()))
        << rows << " x " << columns;
  });
}

TEST(LogSoftmaxOnDevice, EqualsTheReference) {
  for (Index columns : {1, 33, 255, 256, 1001}) check_rows<float>(3, columns);
  check_rows<double>(2, 130);
  check_rows<ef::bfloat16>(2, 300);
  check_rows<ef::half>(2, 129);
  check_rows<float>(0, 5);
}

TEST(LogSoftmaxOnDevice, RowsWithoutASoftmaxAreNaN) {
  const float infinity = std::numeric_limits<float>::infinity();
  auto x = random_tensor<float, 2>({4, 70}, 4);
  x(0, 69) = std::numeric_limits<float>::quiet_NaN();
  x(1, 3) = infinity;
  for (Index i = 0; i < 70; ++i) x(2, i) = -infinity;
  x(3, 5) = -infinity;
  for_each_device([&](const auto& bench) {
    const auto in = on_device(bench, x);
    ef::log_softmax_into(bench.device, in.view(), in.cview());  // in place
    const auto y = in.host();
    for (Index r = 0; r < 4; ++r)
      for (Index i = 0; i < 70; ++i) ASSERT_EQ(std::isnan(y(r, i)), r < 3);
    EXPECT_EQ(y(3, 5), -infinity);
  });
}

}  // namespace
