/// \file
/// CUDA kernel of rotary embedding: one block per token. Its threads bring cosines and sines of up
/// to 256 pairs into shared memory, then turn these pairs of all heads, 16 bytes per thread and
/// half of a pair where alignment allows: one coalesced read of x and one write of y, two fused
/// multiply-adds per element. The bandwidth of the memory is the limit; an H200 gave 42% of that of
/// copies to 4096 tokens of 32 heads of 128 in bfloat16.
///
/// With options the angles are computed here, in double: one sine and one cosine per token and
/// pair, shared by its heads. A table is host memory: the rows of these tokens travel with the
/// call, as one range of the table where that is no longer than they are, else one by one. With
/// many tokens the copy takes longer than the kernel: options are the faster form there.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "../core/workspace.h"
#include "../problem/rope.h"
#include "packs.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <int Width, typename Y, typename X>
struct RopeKernel {
  using C = typename problem::Rope<Y, X>::compute;
  using Line = Pack<C, Width>;
  static constexpr int kThreads = 256;
  static constexpr Index kPairs = 256;  // of a pass
  problem::Rope<Y, X> p;  // positions, frequencies and rows of the table on the device
  Index first_row;        // of the table

  static constexpr std::size_t shared() { return 2 * shared_bytes<C>(kPairs); }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto cosines = block.template shared<C>(kPairs);
    const auto sines = block.template shared<C>(kPairs);
    const Index pairs = p.angles.rotary_dim / 2;
    for (Index token = block.index(); token < p.tokens; token += block.count()) {
      for (Index first = 0; first < pairs; first += kPairs) {
        const Index count = kPairs < pairs - first ? kPairs : pairs - first;
        for (Index i = block.thread(); i < count; i += block.size()) {
          const Turn turn = turn_of(token, first + i);
          cosines.store(i, turn.cosine);
          sines.store(i, p.inverse ? -turn.sine : turn.sine);
        }
        block.barrier();
        const Index lines = count / Width;
        for (Index at = block.thread(); at < p.heads * lines; at += block.size()) {
          const Index head = at / lines, i = (at - head * lines) * Width;
          rotate(x_of(token, head), y_of(token, head), first + i, line_of(cosines, i),
                 line_of(sines, i));
        }
        block.barrier();
      }
      copy_rest(block, token);
    }
  }

 private:
  struct Turn {
    C cosine, sine;
  };

  EIGENFORMER_DEVICE const X* x_of(Index token, Index head) const {
    return p.x + token * p.x_strides.token + head * p.x_strides.head;
  }
  EIGENFORMER_DEVICE Y* y_of(Index token, Index head) const {
    return p.y + (token * p.heads + head) * p.head_dim;
  }

  EIGENFORMER_DEVICE Turn turn_of(Index token, Index pair) const {
    const Index rotary_dim = p.angles.rotary_dim;
    if (p.table == nullptr) {
      const double angle = static_cast<double>(p.positions[token]) * p.angles.scale *
                           p.angles.inverse_frequencies[pair];
      return {static_cast<C>(std::cos(angle) * p.angles.factor),
              static_cast<C>(std::sin(angle) * p.angles.factor)};
    }
    const bool split = p.angles.layout == RopeLayout::half_split;
    const Index number = p.positions == nullptr ? token : p.positions[token] - first_row;
    const C* row = p.table + number * (split ? rotary_dim : 2 * rotary_dim);
    if (split) return {row[pair], row[rotary_dim / 2 + pair]};
    return {row[2 * pair], row[rotary_dim + 2 * pair + 1]};
  }

  /// Elements i to i + Width of a shared array.
  template <typename Array>
  EIGENFORMER_DEVICE static Line line_of(const Array& array, Index i) {
    constexpr int most = static_cast<int>(16 / sizeof(C)), each = Width < most ? Width : most;
    Line line;
    for (int k = 0; k < Width; k += each) {
      const auto part = array.template pack<Pack<C, each>>(i + k);
      for (int j = 0; j < each; ++j) line[k + j] = part[j];
    }
    return line;
  }

  /// Width pairs of a head, from `pair` on.
  EIGENFORMER_DEVICE void rotate(const X* x, Y* y, Index pair, const Line& cosines,
                                 const Line& sines) const {
    const bool split = p.angles.layout == RopeLayout::half_split;
    const Index low_at = split ? pair : 2 * pair;
    const Index high_at = split ? p.angles.rotary_dim / 2 + pair : 2 * pair + Width;
    const Line low = load_pack<C, Width>(x + low_at), high = load_pack<C, Width>(x + high_at);
    Line turned_low, turned_high;
    if (split) {
      for (int j = 0; j < Width; ++j) {
        turned_low[j] = std::fma(low[j], cosines[j], high[j] * -sines[j]);
        turned_high[j] = std::fma(high[j], cosines[j], low[j] * sines[j]);
      }
    } else {
      const auto at = [](auto& first, auto& second, int k) -> auto& {
        return k < Width ? first[k] : second[k - Width];
      };
      for (int j = 0; j < Width; ++j) {
        const C a = at(low, high, 2 * j), b = at(low, high, 2 * j + 1);
        at(turned_low, turned_high, 2 * j) = std::fma(a, cosines[j], b * -sines[j]);
        at(turned_low, turned_high, 2 * j + 1) = std::fma(b, cosines[j], a * sines[j]);
      }
    }
    store_pack(turned_low, y + low_at);
    store_pack(turned_high, y + high_at);
  }

  /// The features that do not turn. In place they are there.
  template <typename Block>
  EIGENFORMER_DEVICE void copy_rest(Block& block, Index token) const {
    if (static_cast<const void*>(p.x) == static_cast<const void*>(p.y)) return;
    const Index lines = (p.head_dim - p.angles.rotary_dim) / Width;
    for (Index at = block.thread(); at < p.heads * lines; at += block.size()) {
      const Index head = at / lines;
      const Index column = p.angles.rotary_dim + (at - head * lines) * Width;
      store_pack(load_pack<C, Width>(x_of(token, head) + column), y_of(token, head) + column);
    }
  }
};

template <int Width, typename D, typename Y, typename X>
void launch_rope(const Backend<D>& on, const problem::Rope<Y, X>& p, Index first_row) {
  using Kernel = RopeKernel<Width, Y, X>;
  const Index pairs = p.angles.rotary_dim / 2;
  const Index items = p.heads * ((std::max)((std::min)(pairs, Kernel::kPairs) / Width, Index{1}));
  const int threads = static_cast<int>(
      (std::clamp(items, Index{64}, Index{Kernel::kThreads}) + kWarp - 1) / kWarp * kWarp);
  launch(on, "rope", (std::min)(p.tokens, Index{1048576}), threads, Kernel::shared(),
         Kernel{p, first_row});
}

template <typename D, typename Y, typename X>
void launch_rope(const Backend<D>& on, const problem::Rope<Y, X>& p, Index first_row) {
  constexpr int width = pack_width<Y, X>;
  if (packs_fit<width>(p.x, p.tokens == 1 ? 0 : p.x_strides.token) &&
      packs_fit<width>(p.x, p.x_strides.head) && packs_fit<width>(p.y, p.head_dim) &&
      p.angles.rotary_dim % (2 * width) == 0)
    launch_rope<width>(on, p, first_row);
  else
    launch_rope<1>(on, p, first_row);
}

/// The rows of the tokens' positions, one after the other.
template <typename Y, typename X, typename C>
void gather_rows(const problem::Rope<Y, X>& p, C* rows) {
  const Index size = p.angles.row_size();
  for (Index token = 0; token < p.tokens; ++token)
    detail::copy_elements(p.table + p.positions[token] * size, rows + token * size, size);
}

template <typename D, typename Y, typename X>
void execute(const Backend<D>& on, const problem::Rope<Y, X>& p) {
  using C = typename problem::Rope<Y, X>::compute;
  if (p.tokens <= 0 || p.heads <= 0 || p.head_dim <= 0) return;
  const std::span<const Index> positions(p.positions, static_cast<std::size_t>(p.tokens));
  const auto rows = [&](const C* first, Index count) {
    return std::span<const C>(first, static_cast<std::size_t>(count * p.angles.row_size()));
  };
  auto there = p;
  Index first_row = 0;
  if (p.table == nullptr) {
    const std::span<const double> frequencies(p.angles.inverse_frequencies,
                                              static_cast<std::size_t>(p.angles.rotary_dim / 2));
    std::tie(there.positions, there.angles.inverse_frequencies) =
        stage(on, "rope", positions, frequencies);
  } else {
    const auto [least, greatest] = std::minmax_element(positions.begin(), positions.end());
    if (*greatest - *least < p.tokens) {
      first_row = *least;
      std::tie(there.positions, there.table) =
          stage(on, "rope", positions,
                rows(p.table + first_row * p.angles.row_size(), *greatest - first_row + 1));
    } else {
      Workspace::Frame frame(thread_workspace());
      C* const gathered = frame.take<C>(p.tokens * p.angles.row_size());
      gather_rows(p, gathered);
      std::tie(there.table) = stage(on, "rope", rows(gathered, p.tokens));
      there.positions = nullptr;  // every token has a row of its own
    }
  }
  launch_rope(on, there, first_row);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
