/// \file
/// The k largest (or smallest) elements of every row, and where they are:
///
///   values[r, j] = x[r, ids[r, j]]   the j-th best of row r; equals by lowest index
///
/// Order and ties are those of sampling.h: -0 equals 0, infinities are numbers like others. With
/// {.sorted = false} the same elements come by index.
///
/// x is (rows, columns) of float, double, bfloat16 or half, values (rows, k) of the same scalar,
/// ids (rows, k) of int32. A row that holds NaN has no order: the form that returns throws
/// std::invalid_argument naming it, the _into form writes ids of -1, NaN and SampleStatus::nan into
/// `statuses`, (rows), where given, and serves the others. std::invalid_argument too for k outside
/// [0, columns] and shapes that disagree. An output must not overlap x. On a GPU all are device
/// memory. The _into form allocates nothing after the first call at a size.
///
/// Cost: one read of x, then the blocks of 128 that hold what may be among the k (sampling.h), then
/// k log k. Smallest: a copy more.
#pragma once

#include <limits>
#include <span>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/top_k.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct TopKOptions {
  bool largest = true;  ///< false: the smallest
  bool sorted = true;   ///< best first; false: by index
};

/// auto [values, ids] = ef::top_k(logits, 8);
template <typename T>
struct TopKResult {
  Tensor<T, 2> values;          ///< (rows, k)
  Tensor<std::int32_t, 2> ids;  ///< (rows, k)
};

namespace detail {

/// Checks what receives the best of `rows` rows of x.
template <typename T, typename Values, typename Ids>
void check_best(std::string_view name, const Values& values, const Ids& ids, Index rows,
                std::span<const SampleStatus> statuses) {
  static_assert(
      std::is_same_v<scalar_of<Values>, T> && std::is_same_v<scalar_of<Ids>, std::int32_t>,
      "eigenformer: values have the scalar of x, and ids are std::int32_t");
  require_that(values.dimension(0) == rows, name, "values has ", values.dimension(0),
               " rows, x has ", rows);
  require_same_shape(name, "ids", ids, "values", values);
  require_that(statuses.empty() || static_cast<Index>(statuses.size()) == rows, name,
               "statuses has ", statuses.size(), " elements, x has ", rows, " rows");
}

/// The best of `rows` rows in tensors of their own, which write(values, ids, statuses) fills.
template <typename T, typename Write>
TopKResult<T> best_in_tensors(std::string_view name, Index rows, Index k, Write&& write) {
  const Eigen::DSizes<Index, 2> sizes(rows, k);
  TopKResult<T> result{make_tensor<T, 2>(name, "values", sizes),
                       make_tensor<std::int32_t, 2>(name, "ids", sizes)};
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(rows));
  write(result.values, result.ids, std::span<SampleStatus>(statuses));
  for (std::size_t r = 0; r < statuses.size(); ++r)
    require_that(statuses[r] == SampleStatus::ok, name, "row ", r, " of x holds NaN");
  return result;
}

}  // namespace detail

/// k is the number of columns of values and ids.
template <Device D, typename Values, typename Ids, typename X>
void top_k_into(const D& device, Values&& values, Ids&& ids, const X& x,
                const TopKOptions& options = {}, std::span<SampleStatus> statuses = {},
                Workspace& workspace = thread_workspace()) {
  constexpr auto name = "top_k";
  const auto input = input_view<2>(x);
  auto best = output_view<2>(values);
  auto places = output_view<2>(ids);
  using T = scalar_of<decltype(input)>;
  detail::require_floating_scalars<decltype(input)>();
  detail::checked_size(name, "x", input);
  const Index rows = input.dimension(0), columns = input.dimension(1), k = best.dimension(1);
  detail::require_that(columns <= (std::numeric_limits<std::int32_t>::max)(), name, "x has ",
                       columns, " columns, expected at most 2147483647");
  detail::require_that(k <= columns, name, "k is ", k, ", expected 0 to ", columns,
                       ", the columns of x");
  detail::check_best<T>(name, best, places, rows, statuses);
  detail::run(device,
              problem::TopK<T>{input.data(), best.data(), places.data(),
                               statuses.empty() ? nullptr : statuses.data(), rows, columns, k,
                               options.largest, options.sorted},
              workspace);
}

template <CpuDevice D, typename X>
auto top_k(const D& device, const X& x, Index k, const TopKOptions& options = {}) {
  constexpr auto name = "top_k";
  const auto input = input_view<2>(x);
  detail::require_that(k >= 0 && k <= input.dimension(1), name, "k is ", k, ", expected 0 to ",
                       input.dimension(1), ", the columns of x");
  return detail::best_in_tensors<scalar_of<X>>(
      name, input.dimension(0), k, [&](auto& values, auto& ids, std::span<SampleStatus> statuses) {
        top_k_into(device, values, ids, input, options, statuses);
      });
}
template <typename X>
  requires(!Device<X>)
auto top_k(const X& x, Index k, const TopKOptions& options = {}) {
  return top_k(Eigen::DefaultDevice{}, x, k, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
