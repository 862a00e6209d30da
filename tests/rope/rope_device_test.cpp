// Rotary embedding on every device, against the double reference: both layouts, options and tables,
// forwards and back, whole and partly turned heads of any width, heads in a wider matrix, in place.
#include <eigenformer/reference/rope.h>
#include <eigenformer/rope.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

constexpr auto kInterleaved = ef::RopeLayout::interleaved;
constexpr auto kHalfSplit = ef::RopeLayout::half_split;

/// Near each other (one range of a table), far apart (its rows one by one), repeated.
const std::vector<std::vector<Index>> kPositions{{}, {7}, {3, 4, 5, 6}, {900, 0, 41}, {2, 2, 0}};

template <typename T, typename Y = T>
void check(const std::vector<Index>& positions, Index heads, Index head_dim,
           const ef::RopeOptions& options) {
  const auto tokens = static_cast<Index>(positions.size());
  const auto x = random_tensor<T, 3>({tokens, heads, head_dim}, 1);
  const auto expected = ef::reference::rope(to_double(x), positions, options);
  const auto back = ef::reference::rope(to_double(x), positions, options, true);
  const ef::BasicRopeTable<typename ef::problem::Rope<Y, T>::compute> table(901, head_dim, options);
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    const auto equals = [&](const auto& y, const auto& wanted) {
      ASSERT_TRUE(within(y.host(), wanted, tolerance<T>()))
          << tokens << " x " << heads << " x " << head_dim << " of " << options.rotary_dim;
    };
    auto y = on_device(bench, poisoned_tensor<Y, 3>({tokens, heads, head_dim}));
    ef::rope_into(bench.device, y.view(), device_x.cview(), positions, options);
    equals(y, expected);
    auto from_table = on_device(bench, poisoned_tensor<Y, 3>({tokens, heads, head_dim}));
    ef::rope_into(bench.device, from_table.view(), device_x.cview(), positions, table);
    equals(from_table, expected);
    ef::rope_backward_into(bench.device, y.view(), device_x.cview(), positions, table);
    equals(y, back);
    ef::rope_backward_into(bench.device, device_x.view(), device_x.cview(), positions, options);
    equals(device_x, back);
  });
}

TEST(RopeOnDevice, EqualsTheReference) {
  for (auto layout : {kHalfSplit, kInterleaved})
    for (const auto& positions : kPositions) {
      for (Index head_dim : {0, 2, 6, 34, 64, 66}) {
        check<float>(positions, 3, head_dim, {.layout = layout, .scale = 0.5f});
        check<ef::bfloat16>(positions, 3, head_dim, {.base = 500000.0f, .layout = layout});
      }
      check<float>(positions, 2, 64, {.layout = layout, .rotary_dim = 16});
      check<float>(positions, 2, 33, {.layout = layout, .rotary_dim = 14});
      check<ef::half>(positions, 1, 80, {.layout = layout, .rotary_dim = 32});
      check<double>(positions, 2, 20, {.layout = layout, .rotary_dim = 12});
      check<ef::bfloat16, float>(positions, 2, 48, {.layout = layout});
      check<float>(positions, 0, 8, {.layout = layout});
      check<float>(positions, 2, 24,
                   {.layout = layout,
                    .attention_factor = 1.5f,
                    .frequencies = {1.0, 0.3, 0.2, 0.05, -0.01, 0.0}});
    }
}

TEST(RopeOnDevice, HeadsWiderThanAPass) {
  for (auto layout : {kHalfSplit, kInterleaved}) {
    check<float>({5, 6}, 2, 1040, {.layout = layout});
    check<ef::bfloat16>({5, 6}, 1, 1030, {.layout = layout, .rotary_dim = 1026});
  }
}

TEST(RopeOnDevice, FarPositionsKeepTheirPrecision) {
  const std::vector<Index> positions{1000000, 999999, 524287, -5};
  const auto x = random_tensor<float, 3>({4, 2, 128}, 2);
  const auto expected = ef::reference::rope(to_double(x), positions, {.scale = 0.3f});
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    ef::rope_into(bench.device, device_x.view(), device_x.cview(), positions, {.scale = 0.3f});
    EXPECT_TRUE(within(device_x.host(), expected, tolerance<float>()));
  });
}

/// Queries within rows of queries, keys and values, which keep what is beside them.
template <typename T>
void check_heads_of_a_matrix(Index width) {
  const Index heads = 2, head_dim = 16;
  const std::vector<Index> positions{4, 9, 2};
  const auto matrix = random_tensor<T, 2>({3, width}, 3);
  ef::Tensor<double, 3> x(3, heads, head_dim);
  for (Index t = 0; t < 3; ++t)
    for (Index j = 0; j < heads * head_dim; ++j)
      x.data()[t * heads * head_dim + j] = static_cast<double>(matrix(t, width % 3 + j));
  const auto expected = ef::reference::rope(x, positions, {});
  for_each_device([&](const auto& bench) {
    auto device_matrix = on_device(bench, matrix);
    auto y = on_device(bench, poisoned_tensor<T, 3>({3, heads, head_dim}));
    ef::rope_into(bench.device, y.view(),
                  ef::heads_of(device_matrix.cview(), width % 3, heads, head_dim), positions);
    EXPECT_TRUE(within(y.host(), expected, tolerance<T>()));

    auto parts = random_tensor<T, 4>({3, heads, 3, head_dim}, 4);
    parts.chip(1, 2) = x.template cast<T>();
    auto device_parts = on_device(bench, parts);
    auto again = on_device(bench, poisoned_tensor<T, 3>({3, heads, head_dim}));
    ef::rope_into(bench.device, again.view(), ef::heads_of(device_parts.cview(), 1, 2), positions);
    EXPECT_TRUE(same_bits(again.host(), y.host()));
  });
}

TEST(RopeOnDevice, HeadsOfAWiderMatrix) {
  for (Index width : {34, 36, 48}) {
    check_heads_of_a_matrix<float>(width);
    check_heads_of_a_matrix<ef::bfloat16>(width);
  }
}

/// Rows of other positions than their numbers.
TEST(RopeOnDevice, AssignedTables) {
  const std::vector<Index> positions{500, 3, 77}, rows{0, 1, 2};
  const auto x = random_tensor<float, 3>({3, 2, 32}, 4);
  ef::RopeTable table;
  table.assign(positions, 32);
  const auto expected = ef::reference::rope(to_double(x), positions, {});
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    ef::rope_into(bench.device, device_x.view(), device_x.cview(), rows, table);
    EXPECT_TRUE(within(device_x.host(), expected, tolerance<float>()));
  });
}

}  // namespace
