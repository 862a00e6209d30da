/// \file
/// Rotary position embedding (Su et al., "RoFormer", 2021): pairs of features of a head turn by an
/// angle that grows with the position,
///
///   (y[a], y[b]) = (x[a] cos t - x[b] sin t,  x[b] cos t + x[a] sin t),   t = position * scale * base^(-2 i / rotary_dim)
///
/// for pair i of rotary_dim / 2; RopeLayout says which features a and b are. Features from
/// rotary_dim on are copied. `scale` below 1 is position interpolation (Chen et al., 2023): 0.25
/// serves contexts four times the length trained.
///
/// x is (tokens, heads, head_dim) or (batch, seq, heads, head_dim), y has its shape. positions has
/// one element a token, batch * seq of them for rank 4: a std::vector, a std::span, an ef::Tensor
/// of rank 1 or any other contiguous range of integers, or a braced list. Scalars are float,
/// double, bfloat16 and half; y's may differ from x's. Angles, cosines and sines are computed in
/// double (an angle is right to 1e-10 at position 10^6) and rounded once: to float, or to double
/// where x or y is.
///
/// Two forms give the same bits. With options, cosines and sines are computed once a token, for all
/// its heads (about 2 us for 64 pairs). With a RopeTable they are read: nothing is computed but the
/// rotation, nothing allocated; the hot path.
///
/// Aliasing: y may be x itself (the same memory and scalar); any other overlap is undefined. Throws
/// std::invalid_argument for a number of positions other than of tokens, an odd or too large
/// rotary_dim, a base or scale that is not positive and finite, and, with a table, a position
/// outside it (O(tokens)), before anything is written. Cost: one read of x and one write of y.
/// Results do not depend on threads or on other tokens.
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/values.h"
#include "core/workspace.h"
#include "cpu/rope.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct RopeOptions {
  float base = 10000.0f;  ///< of the geometric series of frequencies; larger for longer contexts
  RopeLayout layout = RopeLayout::half_split;  ///< which features are a pair
  Index rotary_dim = 0;  ///< leading features of a head that turn, even; 0 means head_dim
  float scale = 1.0f;    ///< multiplies positions
};

namespace detail {

inline Index rope_rotary_dim(std::string_view name, Index head_dim, const RopeOptions& options) {
  require_that(head_dim >= 0, name, "head_dim is ", head_dim, ", expected 0 or more");
  const Index rotary_dim = options.rotary_dim == 0 ? head_dim : options.rotary_dim;
  require_that(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= head_dim, name,
               "rotary_dim is ", rotary_dim, ", expected an even number of at most head_dim, ",
               head_dim);
  require_that(options.base > 0 && std::isfinite(options.base), name, "base is ", options.base,
               ", expected positive and finite");
  checked_product(rotary_dim, 2 * Index{sizeof(double)}, name, "rotary_dim");  // of a row of angles
  require_that(options.scale > 0 && std::isfinite(options.scale), name, "scale is ", options.scale,
               ", expected positive and finite");
  return rotary_dim;
}

inline void write_inverse_frequencies(float base, Index rotary_dim, double* out) {
  for (Index i = 0; i < rotary_dim / 2; ++i)
    out[i] = std::pow(static_cast<double>(base),
                      -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim));
}

/// Positions as whatever holds them.
template <typename P>
LengthSpan position_span(const P& positions) {
  static_assert(std::is_convertible_v<const P&, LengthSpan>,
                "eigenformer: positions are a std::vector, a std::span, an ef::Tensor of rank 1 or "
                "any other contiguous range of integers");
  return LengthSpan(positions);
}

template <typename X>
auto rope_input(const X& x) {
  static_assert(
      rank_of<X> == -1 || rank_of<X> == 3 || rank_of<X> == 4,
      "eigenformer: rope takes (tokens, heads, head_dim) or (batch, seq, heads, head_dim)");
  return input_view<rank_of<X>>(x);
}

/// Tokens of x, one for each position.
template <typename X>
Index rope_tokens(std::string_view name, std::string_view x_name, const X& x,
                  const LengthSpan& positions) {
  checked_size(name, x_name, x);
  const Index tokens = rank_of<X> == 3
                           ? x.dimension(0)
                           : checked_product(x.dimension(0), x.dimension(1), name, x_name);
  require_that(positions.size() == tokens, name, "positions has ", positions.size(), " elements, ",
               x_name, " has ", tokens, " tokens");
  return tokens;
}

template <typename X>
auto rope_result(const X& x, const LengthSpan& positions) {
  rope_tokens("rope", "x", x, positions);
  return tensor_like("rope", "x", x);
}

/// Everything but the angles, checked.
template <typename Y, typename X>
problem::Rope<scalar_of<Y>, scalar_of<X>> rope_problem(std::string_view name,
                                                       std::string_view y_name, Y y,
                                                       std::string_view x_name, X x,
                                                       const LengthSpan& positions, bool inverse) {
  require_floating_scalars<Y, X>();
  require_same_shape(name, y_name, y, x_name, x);
  constexpr int rank = rank_of<X>;
  const Index tokens = rope_tokens(name, x_name, x, positions);
  const Index heads = x.dimension(rank - 2), head_dim = x.dimension(rank - 1);
  return {y.data(), x.data(), positions, tokens, heads, head_dim, {}, nullptr, nullptr, inverse};
}

}  // namespace detail

/// Cosines and sines of positions 0 to max_positions - 1, for heads of head_dim: max_positions *
/// rotary_dim elements (twice that for the interleaved layout). C is float, which serves float,
/// bfloat16 and half, or double. Immutable: share it between layers and threads.
template <typename C>
class BasicRopeTable {
  static_assert(std::is_same_v<C, float> || std::is_same_v<C, double>);

 public:
  BasicRopeTable() = default;  ///< no position
  /// Throws std::invalid_argument for bad sizes and options.
  BasicRopeTable(Index max_positions, Index head_dim, const RopeOptions& options = {})
      : options_(options),
        head_dim_(head_dim),
        rotary_dim_(detail::rope_rotary_dim("RopeTable", head_dim, options)) {
    const Index row_size = angles().row_size();
    require_that(max_positions >= 0, "RopeTable", "max_positions is ", max_positions,
                 ", expected 0 or more");
    const Index size = checked_product(max_positions, row_size, "RopeTable", "table");
    checked_product(size, Index{sizeof(C)}, "RopeTable", "table");
    max_positions_ = max_positions;
    frequencies_.resize(static_cast<std::size_t>(rotary_dim_ / 2));
    detail::write_inverse_frequencies(options.base, rotary_dim_, frequencies_.data());
    rows_.resize(static_cast<std::size_t>(size));
    for (Index p = 0; p < max_positions; ++p)
      angles().write_row(static_cast<double>(p), rows_.data() + p * row_size);
  }

  Index max_positions() const { return max_positions_; }
  Index head_dim() const { return head_dim_; }
  const RopeOptions& options() const { return options_; }

  /// For kernels: how rows are laid out, and the first of them.
  problem::RopeAngles angles() const {
    return {frequencies_.data(), rotary_dim_, options_.layout, static_cast<double>(options_.scale)};
  }
  const C* rows() const { return rows_.data(); }

 private:
  RopeOptions options_;
  Index head_dim_ = 0, rotary_dim_ = 0, max_positions_ = 0;
  std::vector<double> frequencies_;
  std::vector<C> rows_;
};

///   ef::RopeTable table(max_seq_length, head_dim, {.base = 500000.0f});
using RopeTable = BasicRopeTable<float>;

namespace detail {

template <typename D, typename Problem>
void rope_with_options(std::string_view name, const D& device, Problem problem,
                       const RopeOptions& options, Workspace& workspace) {
  const Index rotary_dim = rope_rotary_dim(name, problem.head_dim, options);
  if (problem.tokens == 0 || problem.heads == 0) return;
  Workspace::Frame frame(workspace);
  double* frequencies = frame.take<double>(rotary_dim / 2);
  write_inverse_frequencies(options.base, rotary_dim, frequencies);
  problem.angles = {frequencies, rotary_dim, options.layout, static_cast<double>(options.scale)};
  problem.rows =
      frame.take<typename Problem::compute>(cpu::worker_count(device) * problem.angles.row_size());
  detail::run(device, problem);
}

template <typename D, typename Problem, typename C>
void rope_with_table(std::string_view name, const D& device, Problem problem,
                     const BasicRopeTable<C>& table) {
  static_assert(std::is_same_v<C, typename Problem::compute>,
                "eigenformer: RopeTable serves float, bfloat16 and half; double takes a "
                "BasicRopeTable<double>");
  require_that(problem.head_dim == table.head_dim(), name, "table is for head_dim ",
               table.head_dim(), ", x has head_dim ", problem.head_dim);
  for (Index t = 0; t < problem.tokens; ++t)
    require_that(problem.positions[t] >= 0 && problem.positions[t] < table.max_positions(), name,
                 "positions[", t, "] is ", problem.positions[t], ", table has positions 0 to ",
                 table.max_positions() - 1);
  problem.angles = table.angles();
  problem.table = table.rows();
  detail::run(device, problem);
}

}  // namespace detail

/// y = x, turned. The workspace takes one row of cosines and sines a thread.
template <CpuDevice D, typename Y, typename X, typename P = LengthSpan>
void rope_into(const D& device, Y&& y, const X& x, const P& positions,
               const RopeOptions& options = {}, Workspace& workspace = thread_workspace()) {
  detail::rope_with_options(
      "rope", device,
      detail::rope_problem("rope", "y", output_view<rank_of<X>>(y), "x", detail::rope_input(x),
                           detail::position_span(positions), false),
      options, workspace);
}

/// y = x, turned by the angles of the table: no sine, no allocation.
template <CpuDevice D, typename Y, typename X, typename P = LengthSpan, typename C>
void rope_into(const D& device, Y&& y, const X& x, const P& positions,
               const BasicRopeTable<C>& table) {
  detail::rope_with_table(
      "rope", device,
      detail::rope_problem("rope", "y", output_view<rank_of<X>>(y), "x", detail::rope_input(x),
                           detail::position_span(positions), false),
      table);
}

/// Returns x turned, in its scalar and shape.
template <CpuDevice D, typename X, typename P = LengthSpan>
auto rope(const D& device, const X& x, const P& positions, const RopeOptions& options = {}) {
  auto y = detail::rope_result(detail::rope_input(x), detail::position_span(positions));
  rope_into(device, y, x, positions, options);
  return y;
}
///   ef::Tensor<float, 3> q = ef::rope(query, positions, {.base = 500000.0f});   // or
/// ef::rope(query, positions, table)
template <typename X, typename P = LengthSpan>
  requires(!Device<X>)
auto rope(const X& x, const P& positions, const RopeOptions& options = {}) {
  return rope(Eigen::DefaultDevice{}, x, positions, options);
}

template <CpuDevice D, typename X, typename P = LengthSpan, typename C>
auto rope(const D& device, const X& x, const P& positions, const BasicRopeTable<C>& table) {
  auto y = detail::rope_result(detail::rope_input(x), detail::position_span(positions));
  rope_into(device, y, x, positions, table);
  return y;
}
template <typename X, typename P = LengthSpan, typename C>
  requires(!Device<X>)
auto rope(const X& x, const P& positions, const BasicRopeTable<C>& table) {
  return rope(Eigen::DefaultDevice{}, x, positions, table);
}

/// Gradient of x from that of y: the rotation by the opposite angle. grad_x may be grad_y itself.
template <CpuDevice D, typename GX, typename GY, typename P = LengthSpan>
void rope_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const P& positions,
                        const RopeOptions& options = {},
                        Workspace& workspace = thread_workspace()) {
  detail::rope_with_options(
      "rope_backward", device,
      detail::rope_problem("rope_backward", "grad_x", output_view<rank_of<GY>>(grad_x), "grad_y",
                           detail::rope_input(grad_y), detail::position_span(positions), true),
      options, workspace);
}
template <CpuDevice D, typename GX, typename GY, typename P = LengthSpan, typename C>
void rope_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const P& positions,
                        const BasicRopeTable<C>& table) {
  detail::rope_with_table(
      "rope_backward", device,
      detail::rope_problem("rope_backward", "grad_x", output_view<rank_of<GY>>(grad_x), "grad_y",
                           detail::rope_input(grad_y), detail::position_span(positions), true),
      table);
}

/// The same, returned; `how` is RopeOptions or a table.
template <CpuDevice D, typename GY, typename P = LengthSpan, typename How = RopeOptions>
auto rope_backward(const D& device, const GY& grad_y, const P& positions, const How& how = {}) {
  auto grad_x = detail::rope_result(detail::rope_input(grad_y), detail::position_span(positions));
  rope_backward_into(device, grad_x, grad_y, positions, how);
  return grad_x;
}
template <typename GY, typename P = LengthSpan, typename How = RopeOptions>
  requires(!Device<GY>)
auto rope_backward(const GY& grad_y, const P& positions, const How& how = {}) {
  return rope_backward(Eigen::DefaultDevice{}, grad_y, positions, how);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
