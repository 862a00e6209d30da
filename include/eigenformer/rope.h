/// \file
/// Rotary position embedding (Su et al., "RoFormer", 2021): pairs of features of a head turn by an
/// angle that grows with the position,
///
///   (y[a], y[b]) = (x[a] cos t - x[b] sin t,  x[b] cos t + x[a] sin t),   t = position * scale * base^(-2 i / rotary_dim)
///
/// for pair i of rotary_dim / 2; RopeLayout says which features a and b are. Features from
/// rotary_dim on are copied. `scale` below 1 is position interpolation (Chen et al., 2023): 0.25
/// serves contexts four times the length trained. `frequencies` of the caller's stand in place of
/// base^(-2 i / rotary_dim), and `attention_factor` multiplies y: rope/frequencies.h makes both for
/// Llama 3, YaRN, NTK and LongRoPE.
///
/// x is (tokens, heads, head_dim) or (batch, seq, heads, head_dim), or heads in the rows of a wider
/// matrix (ef::heads_of, core/heads_view.h); y has its shape. positions has one element per token,
/// batch * seq of them for rank 4: a std::vector, a std::span, an ef::Tensor of rank 1 or any other
/// contiguous range of integers, or a braced list. Scalars are float, double, bfloat16 and half;
/// y's may differ from x's. Angles, cosines and sines are computed in double (an angle is right to
/// 1e-10 at position 10^6) and rounded once: to float, or to double where x or y is.
///
/// Two forms give the same bits. With options, cosines and sines are computed once per token, for
/// all its heads (about 2 us for 64 pairs). With a RopeTable they are read: nothing is computed but
/// the rotation, nothing allocated; the hot path. On a GPU they agree to the last bits: options use
/// its own sine and cosine, while the rows of a table, host memory, travel with every call.
///
/// Aliasing: y may be x itself (the same memory and scalar); any other overlap is undefined. Throws
/// std::invalid_argument for a number of positions other than of tokens, an odd or too large
/// rotary_dim, a base or scale that is not positive and finite, frequencies that are not finite or
/// of another number than pairs, and, with a table, a position outside it (O(tokens)), before
/// anything is written. Cost: one read of x and one write of y. Results do not depend on threads or
/// on other tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/heads_view.h"
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
  /// Multiplies cosines and sines, so that scores of queries and keys grow by its square.
  float attention_factor = 1.0f;
  /// Radians per position of each pair; none: base^(-2 i / rotary_dim). With them rotary_dim 0
  /// means twice their number.
  Values<double> frequencies = {};
};

namespace detail {

inline Index rope_rotary_dim(std::string_view name, Index head_dim, const RopeOptions& options) {
  require_that(head_dim >= 0, name, "head_dim is ", head_dim, ", expected 0 or more");
  const Index pairs = static_cast<Index>(options.frequencies.size());
  const Index all = pairs > 0 ? checked_product(pairs, 2, name, "frequencies") : head_dim;
  const Index rotary_dim = options.rotary_dim == 0 ? all : options.rotary_dim;
  require_that(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= head_dim, name,
               "rotary_dim is ", rotary_dim, ", expected an even number of at most head_dim, ",
               head_dim);
  require_that(options.base > 0 && std::isfinite(options.base), name, "base is ", options.base,
               ", expected positive and finite");
  checked_product(rotary_dim, 2 * Index{sizeof(double)}, name, "rotary_dim");  // of a row of angles
  require_that(options.scale > 0 && std::isfinite(options.scale), name, "scale is ", options.scale,
               ", expected positive and finite");
  require_that(std::isfinite(options.attention_factor), name, "attention_factor is ",
               options.attention_factor, ", expected a finite number");
  require_that(pairs == 0 || 2 * pairs == rotary_dim, name, "frequencies has ", pairs,
               " elements, expected ", rotary_dim / 2, ", one for each pair of rotary_dim");
  for (Index i = 0; i < pairs; ++i) {
    const double frequency = options.frequencies[static_cast<std::size_t>(i)];
    require_that(std::isfinite(frequency), name, "frequencies[", i, "] is ", frequency,
                 ", expected a finite number");
  }
  return rotary_dim;
}

inline void write_inverse_frequencies(const RopeOptions& options, Index rotary_dim, double* out) {
  if (!options.frequencies.empty()) {
    std::copy(options.frequencies.begin(), options.frequencies.end(), out);
    return;
  }
  for (Index i = 0; i < rotary_dim / 2; ++i)
    out[i] = std::pow(static_cast<double>(options.base),
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
  return heads_input<rank_of<X>>(x);
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

}  // namespace detail

/// Cosines and sines of positions 0 to max_positions - 1, for heads of head_dim: max_positions *
/// rotary_dim elements (twice that for the interleaved layout). C is float, which serves float,
/// bfloat16 and half, or double. Share it between layers and threads.
template <typename C>
class BasicRopeTable {
  static_assert(std::is_same_v<C, float> || std::is_same_v<C, double>);

 public:
  BasicRopeTable() = default;  ///< no position
  /// Throws std::invalid_argument for bad sizes and options.
  BasicRopeTable(Index max_positions, Index head_dim, const RopeOptions& options = {}) {
    const Index rotary_dim = detail::rope_rotary_dim("RopeTable", head_dim, options);
    detail::require_that(max_positions >= 0, "RopeTable", "max_positions is ", max_positions,
                         ", expected 0 or more");
    resize(max_positions, head_dim, rotary_dim, options);
    for (Index p = 0; p < max_positions; ++p) write(p, static_cast<double>(p));
  }

  /// Makes row i that of positions[i], whatever positions these are: rope_into then takes row
  /// numbers in their place. For the layers of a step that turn the same tokens. Reuses memory.
  /// Throws std::invalid_argument for bad sizes and options.
  template <typename P>
  void assign(const P& positions, Index head_dim, const RopeOptions& options = {}) {
    const LengthSpan span = detail::position_span(positions);
    const Index rotary_dim = detail::rope_rotary_dim("RopeTable", head_dim, options);
    resize(span.size(), head_dim, rotary_dim, options);
    for (Index i = 0; i < span.size(); ++i) write(i, static_cast<double>(span[i]));
  }

  Index max_positions() const { return max_positions_; }
  Index head_dim() const { return head_dim_; }

  /// For kernels: how rows are laid out, and the first of them.
  problem::RopeAngles angles() const {
    return {frequencies_.data(), rotary_dim_, layout_, scale_, attention_factor_};
  }
  const C* rows() const { return rows_.data(); }

 private:
  void resize(Index rows, Index head_dim, Index rotary_dim, const RopeOptions& options) {
    const Index row_size =
        problem::RopeAngles{nullptr, rotary_dim, options.layout, 1, 1}.row_size();
    const Index size = detail::checked_product(rows, row_size, "RopeTable", "table");
    detail::checked_product(size, Index{sizeof(C)}, "RopeTable", "table");
    rows_.resize(static_cast<std::size_t>(size));
    // Computed anew only where they differ: the table of a step is assigned at each step.
    const float base = options.frequencies.empty() ? options.base : 0.0f;
    if (frequencies_.empty() || rotary_dim != rotary_dim_ || base != base_ || base == 0.0f) {
      frequencies_.resize(static_cast<std::size_t>(rotary_dim / 2));
      detail::write_inverse_frequencies(options, rotary_dim, frequencies_.data());
    }
    base_ = base;
    layout_ = options.layout;
    scale_ = static_cast<double>(options.scale);
    attention_factor_ = static_cast<double>(options.attention_factor);
    head_dim_ = head_dim;
    rotary_dim_ = rotary_dim;
    max_positions_ = rows;
  }
  void write(Index row, double position) {
    angles().write_row(position, rows_.data() + row * angles().row_size());
  }

  float base_ = 0;  // of the frequencies; 0: the caller's
  RopeLayout layout_ = RopeLayout::half_split;
  double scale_ = 1, attention_factor_ = 1;
  Index head_dim_ = 0, rotary_dim_ = 0, max_positions_ = 0;
  std::vector<double> frequencies_;
  std::vector<C> rows_;
};

///   ef::RopeTable table(max_seq_length, head_dim, {.base = 500000.0f});
using RopeTable = BasicRopeTable<float>;

namespace detail {

/// Everything but the angles, checked.
template <typename Y, typename X>
problem::Rope<scalar_of<Y>, scalar_of<X>> rope_problem(std::string_view name,
                                                       std::string_view y_name, const Y& y,
                                                       std::string_view x_name, const X& x,
                                                       const LengthSpan& positions, bool inverse,
                                                       Workspace::Frame& frame) {
  require_floating_scalars<Y, X>();
  require_same_shape(name, y_name, y, x_name, x);
  constexpr int rank = rank_of<X>;
  const Index tokens = rope_tokens(name, x_name, x, positions);
  const Index heads = x.dimension(rank - 2), head_dim = x.dimension(rank - 1);
  return {y.data(),      x.data(), indices(positions, frame),
          tokens,        heads,    head_dim,
          strides_of(x), {},       nullptr,
          nullptr,       inverse};
}

/// The angles of a table.
template <typename Problem, typename C>
void set_angles(std::string_view name, Problem& p, const BasicRopeTable<C>& table, int,
                Workspace::Frame&) {
  static_assert(std::is_same_v<C, typename Problem::compute>,
                "eigenformer: RopeTable serves float, bfloat16 and half; double takes a "
                "BasicRopeTable<double>");
  require_that(p.head_dim == table.head_dim(), name, "table is for head_dim ", table.head_dim(),
               ", x has head_dim ", p.head_dim);
  for (Index t = 0; t < p.tokens; ++t)
    require_that(p.positions[t] >= 0 && p.positions[t] < table.max_positions(), name, "positions[",
                 t, "] is ", p.positions[t], ", table has positions 0 to ",
                 table.max_positions() - 1);
  p.angles = table.angles();
  p.table = table.rows();
}
/// Those of options, with a row of cosines and sines for each worker.
template <typename Problem>
void set_angles(std::string_view name, Problem& p, const RopeOptions& options, int workers,
                Workspace::Frame& frame) {
  const Index rotary_dim = rope_rotary_dim(name, p.head_dim, options);
  if (p.heads == 0) p.tokens = 0;
  if (p.tokens == 0) return;
  double* const frequencies = frame.take<double>(rotary_dim / 2);
  write_inverse_frequencies(options, rotary_dim, frequencies);
  p.angles = {frequencies, rotary_dim, options.layout, static_cast<double>(options.scale),
              static_cast<double>(options.attention_factor)};
  p.rows = frame.take<typename Problem::compute>(workers * p.angles.row_size());
}

}  // namespace detail

// In all forms `how` is RopeOptions or a table.

/// y = x, turned. Scratch, from the workspace: with options a row of cosines and sines per thread;
/// positions of another type than Index, as Index.
template <Device D, typename Y, typename X, typename P = LengthSpan, typename How = RopeOptions>
void rope_into(const D& device, Y&& y, const X& x, const P& positions, const How& how = {},
               Workspace& workspace = thread_workspace()) {
  constexpr auto name = "rope";
  const LengthSpan at = detail::position_span(positions);
  Workspace::Frame frame(workspace);
  auto problem = detail::rope_problem(name, "y", output_view<rank_of<X>>(y), "x",
                                      detail::rope_input(x), at, false, frame);
  detail::set_angles(name, problem, how, detail::worker_count(device), frame);
  detail::run(device, problem);
}

/// Returns x turned, in its scalar and shape.
///
///   ef::Tensor<float, 3> q = ef::rope(query, positions, {.base = 500000.0f});   // or ef::rope(query, positions, table)
template <CpuDevice D, typename X, typename P = LengthSpan, typename How = RopeOptions>
auto rope(const D& device, const X& x, const P& positions, const How& how = {}) {
  const auto from = detail::rope_input(x);
  detail::rope_tokens("rope", "x", from, detail::position_span(positions));
  auto y = detail::tensor_like("rope", "x", from);
  rope_into(device, y, x, positions, how);
  return y;
}
template <typename X, typename P = LengthSpan, typename How = RopeOptions>
  requires(!Device<X>)
auto rope(const X& x, const P& positions, const How& how = {}) {
  return rope(Eigen::DefaultDevice{}, x, positions, how);
}

/// Gradient of x from that of y: the rotation by the opposite angle. grad_x may be grad_y itself.
template <Device D, typename GX, typename GY, typename P = LengthSpan, typename How = RopeOptions>
void rope_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const P& positions,
                        const How& how = {}, Workspace& workspace = thread_workspace()) {
  constexpr auto name = "rope_backward";
  const LengthSpan at = detail::position_span(positions);
  Workspace::Frame frame(workspace);
  auto problem = detail::rope_problem(name, "grad_x", output_view<rank_of<GY>>(grad_x), "grad_y",
                                      detail::rope_input(grad_y), at, true, frame);
  detail::set_angles(name, problem, how, detail::worker_count(device), frame);
  detail::run(device, problem);
}
template <CpuDevice D, typename GY, typename P = LengthSpan, typename How = RopeOptions>
auto rope_backward(const D& device, const GY& grad_y, const P& positions, const How& how = {}) {
  const auto from = detail::rope_input(grad_y);
  detail::rope_tokens("rope_backward", "grad_y", from, detail::position_span(positions));
  auto grad_x = detail::tensor_like("rope_backward", "grad_y", from);
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
