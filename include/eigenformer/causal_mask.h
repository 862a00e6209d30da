/// \file
/// Causal attention masks (Vaswani et al., "Attention Is All You Need", 2017), with the variants
/// that decoders use:
///
///   mask[b, i, j] = 0 where query i of sequence b may attend to key j, -infinity elsewhere
///
/// of shape (batch, query_length, key_length), in float, double, bfloat16 or half.
/// Query i stands at the absolute position p = query_offset + i and sees key j where j <= p and
///   - window w > 0:       j > p - w: the w most recent keys, its own included (Beltagy et al., "Longformer", 2020)
///   - prefix_length n:    or j < n: a prefix that all may see (prefix-LM, Raffel et al., "T5", 2020)
///   - segment_ids s:      and s[p] == s[j]: documents packed into one sequence see only themselves
///
/// A query_offset below zero makes leading rows empty (all -infinity); it is never clamped.
/// Attention takes the same options and needs no mask in memory; these functions serve code that
/// wants one. Half and bfloat16 hold a true -infinity.
///
/// Throws std::invalid_argument for sizes, windows and prefixes below zero, for a shape whose size
/// in bytes overflows and for a wrong number of segment ids, before anything is written. Cost: one
/// write of the mask. The _into form allocates nothing. Results do not depend on threads.
#pragma once

#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/values.h"
#include "cpu/causal_mask.h"
#include "problem/visibility.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct CausalMaskOptions {
  Index key_length = -1;   ///< keys in a row; -1 means query_offset + query_length
  Index query_offset = 0;  ///< absolute position of the first query, for chunked prefill
  Index window = 0;  ///< most recent keys visible, the current one included; 0 means no window
  Index prefix_length = 0;  ///< leading keys visible to all
  /// Document of each position, (key_length) shared by the batch or (batch, key_length); empty
  /// means one document. Memory of the device. A query whose position is outside [0, key_length)
  /// then sees nothing.
  Values<std::int32_t> segment_ids = {};
};

namespace detail {

inline Index causal_mask_key_length(Index query_length, const CausalMaskOptions& options) {
  if (options.key_length != -1) return options.key_length;
  Index keys = 0;
  require_that(add_fits(options.query_offset, query_length, keys), "create_causal_mask",
               "query_offset of ", options.query_offset, " + query_length of ", query_length,
               " overflows");
  return std::max<Index>(0, keys);
}

template <typename T>
problem::CausalMask<T> causal_mask_problem(T* mask, Index batch, Index query_length,
                                           Index key_length, const CausalMaskOptions& options) {
  constexpr auto name = "create_causal_mask";
  require_that(batch >= 0, name, "batch_size is ", batch, ", expected 0 or more");
  require_that(query_length >= 0, name, "query_length is ", query_length, ", expected 0 or more");
  require_that(key_length >= 0, name, "key_length is ", key_length, ", expected 0 or more");
  require_that(options.window >= 0, name, "window is ", options.window,
               ", expected 0 (none) or more");
  require_that(options.prefix_length >= 0, name, "prefix_length is ", options.prefix_length,
               ", expected 0 or more");
  constexpr Index limit = (std::numeric_limits<Index>::max)() / 4;
  require_that(
      options.query_offset > -limit && options.query_offset < limit && options.window < limit, name,
      "query_offset is ", options.query_offset, " and window is ", options.window,
      ", expected magnitudes below ", limit);
  // Products of two sizes too: that of a mask with no element would hide them.
  const Index area = checked_product(query_length, key_length, name, "mask");
  const Index batch_keys = checked_product(batch, key_length, name, "mask");
  checked_product(batch, query_length, name, "mask");
  checked_product(checked_product(batch, area, name, "mask"), Index{sizeof(T)}, name, "mask");
  const Index segments = static_cast<Index>(options.segment_ids.size());
  require_that(segments == 0 || segments == key_length || segments == batch_keys, name,
               "segment_ids has ", segments, " elements, expected ", key_length,
               " (key_length) or ", batch_keys, " (batch x key_length)");
  return {mask,
          batch,
          query_length,
          key_length,
          options.query_offset,
          problem::Visibility::of(true, options.window, options.prefix_length),
          segments == 0 ? nullptr : options.segment_ids.data(),
          segments == key_length ? 0 : key_length};
}

}  // namespace detail

/// Writes the mask into `mask` (batch, query_length, key_length); options.key_length must be -1 or
/// agree. Throws std::invalid_argument.
template <Device D, typename Mask>
void causal_mask_into(const D& device, Mask&& mask, const CausalMaskOptions& options = {}) {
  auto view = output_view<3>(mask);
  using T = scalar_of<Mask>;
  static_assert(FloatingScalar<T>,
                "eigenformer: a mask holds float, double, Eigen::bfloat16 or Eigen::half");
  detail::require_that(options.key_length == -1 || options.key_length == view.dimension(2),
                       "causal_mask_into", "mask has ", view.dimension(2),
                       " keys, options.key_length is ", options.key_length);
  const auto problem = detail::causal_mask_problem(view.data(), view.dimension(0),
                                                   view.dimension(1), view.dimension(2), options);
  detail::run(device, problem);
}

/// Returns the mask (batch_size, query_length, key_length), every sequence of the batch written
/// out. Throws std::invalid_argument for negative or overflowing sizes, a negative window or a
/// wrong number of segment ids.
///
///   ef::Tensor<float, 3> mask = ef::create_causal_mask<float>(seq_length, batch_size);
///   ef::Tensor<float, 3> rect = ef::create_causal_mask<float>(4, 1, {.key_length = 12, .query_offset = 8, .window = 4});
template <FloatingScalar T, CpuDevice D>
Tensor<T, 3> create_causal_mask(const D& device, Index query_length, Index batch_size,
                                const CausalMaskOptions& options = {}) {
  const Index key_length = detail::causal_mask_key_length(query_length, options);
  detail::causal_mask_problem<T>(nullptr, batch_size, query_length, key_length, options);
  Tensor<T, 3> mask(batch_size, query_length, key_length);
  causal_mask_into(device, mask, options);
  return mask;
}

template <FloatingScalar T>
Tensor<T, 3> create_causal_mask(Index query_length, Index batch_size,
                                const CausalMaskOptions& options = {}) {
  return create_causal_mask<T>(Eigen::DefaultDevice{}, query_length, batch_size, options);
}

/// The same mask as a lazy Eigen expression (batch_size, query_length, key_length): no memory,
/// computed where it is used. A container of segment ids that has a name must outlive the
/// expression.
///
///   scores += ef::causal_mask_expression<float>(seq_length, batch_size);
template <FloatingScalar T>
auto causal_mask_expression(Index query_length, Index batch_size,
                            const CausalMaskOptions& options = {}) {
  const Index key_length = detail::causal_mask_key_length(query_length, options);
  const auto problem =
      detail::causal_mask_problem<T>(nullptr, batch_size, query_length, key_length, options);
  // Eigen nests leaves by reference and operations by value: an immutable 1 x 1 x 1 leaf that is
  // never read gives the expression a life of its own.
  static const T unread{};
  static const TensorView<const T, 3> leaf(&unread, 1, 1, 1);
  const auto generator = [problem, ids = options.segment_ids](const Eigen::array<Index, 3>& at) {
    auto here = problem;
    here.segment_ids = ids.empty() ? nullptr : ids.data();  // those of this copy of the expression
    return here.visible(at[0], at[1], at[2]) ? T(0) : -std::numeric_limits<T>::infinity();
  };
  return leaf.broadcast(Eigen::array<Index, 3>{batch_size, query_length, key_length})
      .generate(generator);
}

/// Slopes of ALiBi (Press et al., "Train Short, Test Long", 2022) for any number of heads:
/// 2^(-8 (h + 1) / n) for the largest power of two n not above heads, then the odd powers of the
/// sequence for 2n.
inline std::vector<float> alibi_slopes(Index heads) {
  detail::require_that(heads >= 0, "alibi_slopes", "heads is ", heads, ", expected 0 or more");
  detail::checked_product(heads, Index{sizeof(float)}, "alibi_slopes", "result");
  Index power = 1;
  while (power <= heads / 2) power *= 2;
  std::vector<float> slopes(static_cast<std::size_t>(heads));
  for (Index h = 0; h < heads; ++h)
    slopes[static_cast<std::size_t>(h)] = static_cast<float>(
        h < power ? std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(power))
                  : std::exp2(-4.0 * static_cast<double>(2 * (h - power) + 1) /
                              static_cast<double>(power)));
  return slopes;
}

/// The mask with ALiBi's linear bias, (heads, query_length, key_length): slope[h] * (j - p) where
/// visible, -infinity elsewhere. segment_ids, where given, are (key_length). Throws
/// std::invalid_argument like create_causal_mask.
template <FloatingScalar T>
Tensor<T, 3> create_alibi_mask(Index query_length, std::span<const float> slopes,
                               const CausalMaskOptions& options = {}) {
  const Index heads = static_cast<Index>(slopes.size());
  Tensor<T, 3> mask = create_causal_mask<T>(query_length, heads, options);
  if (mask.size() == 0) return mask;
  for (Index h = 0; h < heads; ++h)
    for (Index i = 0; i < query_length; ++i)
      for (Index j = 0; j < mask.dimension(2); ++j)
        if (mask(h, i, j) == T(0))
          mask(h, i, j) = static_cast<T>(slopes[static_cast<std::size_t>(h)] *
                                         static_cast<float>(j - options.query_offset - i));
  return mask;
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
