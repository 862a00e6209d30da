/// \file
/// CUDA kernels of experts. The products are those of linear.cuh, int8_linear.cuh and
/// int4_linear.cuh, by a backend whose launches have a grid for all experts: each block finds the
/// expert whose rows it works on by counting the tiles of those before, out of `offsets`, which the
/// host never sees. The grid is for the worst case, (pairs / tokens of a tile + experts) tiles of
/// each row of tiles; blocks that find no expert end at once. Rows are as in those files, to the
/// bit. Weights are read by the tiles that have rows alone: bytes of the used experts, and the rows
/// of x once more to put them side by side. Expected speed: that of the linear layer with so many
/// rows in each expert; not measured yet.
///
/// The sums: one coalesced pass over the results, 16 bytes per thread.
#pragma once

#include <cmath>
#include <limits>
#include <span>
#include <type_traits>

#include "../problem/expert_feed_forward.h"
#include "functions.cuh"
#include "int4_linear.cuh"
#include "int8_linear.cuh"
#include "linear.cuh"
#include "packs.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Where an expert's numbers lie.
template <typename S>
struct ExpertPanels {
  const S* data;
  const float* scales;
  const float* minimums;  // of int4, or nullptr
};

template <typename S>
ExpertPanels<S> panels_of(const problem::PackedPanels<const S>& weight) {
  return {weight.data, weight.scales, weight.minimums};
}

/// What a block needs to know of all experts.
template <typename S>
struct Experts {
  const std::int32_t* offsets;    // (count + 1), of the device
  const ExpertPanels<S>* panels;  // (count), of the device
  ExpertPanels<S> first;          // of expert 0, whom launches are made for
  Index count, pairs, bias_size;
};

/// A device whose products are by expert.
template <typename D, typename S>
struct ByExpert {
  const D& device;
  Experts<S> experts;
};

/// An expert has a part of the rows; and what finds its own needs registers, too: with tiles as
/// large as those of one weight, kernels spill.
template <typename D, typename S>
inline constexpr int many_token_tiles<ByExpert<D, S>> = 2;

/// A block that is number `at` of `of`.
template <typename Block>
class BlockOfExpert {
 public:
  EIGENFORMER_DEVICE BlockOfExpert(Block& block, Index at, Index of)
      : block_(block), at_(at), of_(of) {}
  EIGENFORMER_DEVICE int thread() const { return block_.thread(); }
  EIGENFORMER_DEVICE int size() const { return block_.size(); }
  EIGENFORMER_DEVICE Index index() const { return at_; }
  EIGENFORMER_DEVICE Index count() const { return of_; }
  EIGENFORMER_DEVICE int lane() const { return block_.lane(); }
  EIGENFORMER_DEVICE int warp() const { return block_.warp(); }
  EIGENFORMER_DEVICE void barrier() const { block_.barrier(); }
  EIGENFORMER_DEVICE void warp_barrier() const { block_.warp_barrier(); }
  template <typename T>
  EIGENFORMER_DEVICE auto shared(Index count) const {
    return block_.template shared<T>(count);
  }
  template <typename T>
  EIGENFORMER_DEVICE T shuffle_xor(const T& value, int bits) const {
    return block_.shuffle_xor(value, bits);
  }
  template <typename T>
  EIGENFORMER_DEVICE void mma(FragmentD<T>& d, const FragmentA<T>& a, const FragmentB<T>& b) const {
    block_.mma(d, a, b);
  }
  template <typename Shared, typename T>
  EIGENFORMER_DEVICE void copy_async(const Shared& to, Index i, const T* from) const {
    block_.copy_async(to, i, from);
  }
  EIGENFORMER_DEVICE void commit_async() const { block_.commit_async(); }
  template <int Groups>
  EIGENFORMER_DEVICE void wait_async() const {
    block_.template wait_async<Groups>();
  }

 private:
  Block& block_;
  Index at_, of_;
};

template <typename Kernel>
concept IsProduct = requires(Kernel kernel) {
  kernel.weight.data;
  kernel.x.rows;
  kernel.end.finish.y;
};

/// A kernel of products over the rows of all experts.
template <typename Kernel, typename S>
struct ExpertsKernel {
  static constexpr int kThreads = Kernel::kThreads;
  static constexpr int kBlocks = [] {
    if constexpr (requires { Kernel::kBlocksOfExperts; })
      return Kernel::kBlocksOfExperts;
    else
      return 0;
  }();
  Kernel kernel;
  Experts<S> experts;

  /// Blocks that the tiles of so many rows take.
  EIGENFORMER_HOST_DEVICE static Index blocks_of(Kernel one, Index rows) {
    one.x.rows = rows;
    constexpr Index each = [] {
      if constexpr (requires { Kernel::kTilesOfBlock; })
        return Index{Kernel::kTilesOfBlock};
      else
        return Index{1};
    }();
    return (one.tiles() + each - 1) / each;
  }
  /// Never fewer than the experts' together, wherever the rows are.
  Index most_blocks() const {
    const Index used = experts.count < experts.pairs ? experts.count : experts.pairs;
    return blocks_of(kernel, experts.pairs) + used * blocks_of(kernel, 1);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    Index begin = 0;  // blocks of the experts before
    for (Index e = 0; e < experts.count; ++e) {
      const Index first = experts.offsets[e], rows = experts.offsets[e + 1] - first;
      if (rows <= 0) continue;
      const Index blocks = blocks_of(kernel, rows);
      if (block.index() < begin + blocks) {
        BlockOfExpert<Block> own(block, block.index() - begin, blocks);
        of_expert(e, first, rows)(own);
        return;
      }
      begin += blocks;
    }
  }

 private:
  EIGENFORMER_DEVICE Kernel of_expert(Index e, Index first, Index rows) const {
    Kernel own = kernel;
    const ExpertPanels<S> panels = experts.panels[e];
    move(own.weight.data, panels.data, experts.first.data);
    own.x.data[0] += first * own.x.stride;
    own.x.rows = rows;
    own.end.finish.y += first * own.end.finish.out;
    if (own.end.finish.epilogue.bias != nullptr)
      own.end.finish.epilogue.bias += e * experts.bias_size;
    if constexpr (requires { own.end.x_scales; }) own.end.x_scales += first;
    if constexpr (requires { own.end.scales; })
      move(own.end.scales, panels.scales, experts.first.scales);
    if constexpr (requires { own.scales.groups; }) {
      move(own.scales.data, panels.scales, experts.first.scales);
      move(own.scales.minimums, panels.minimums, experts.first.minimums);
      if (own.scales.token_sums != nullptr) own.scales.token_sums += first * own.scales.groups;
    }
    if constexpr (requires { own.weight.minimums; }) {
      move(own.weight.scales, panels.scales, experts.first.scales);
      move(own.weight.minimums, panels.minimums, experts.first.minimums);
    }
    return own;
  }
  /// Pointers into what expert 0 has, into what another has.
  template <typename P, int Matrices>
  EIGENFORMER_DEVICE static void move(P (&pointers)[Matrices], P to, P from) {
    if (from == nullptr) return;
    for (P& pointer : pointers) pointer = to + (pointer - from);
  }
};

/// Products are launched for all experts, what else they need as it is.
template <typename D, typename S, typename Kernel>
void launch(const Backend<ByExpert<D, S>>& on, const char* name, Index blocks, int threads,
            std::size_t shared, const Kernel& kernel) {
  const Backend<D> device{on.device.device};
  if constexpr (IsProduct<Kernel>) {
    const ExpertsKernel<Kernel, S> all{kernel, on.device.experts};
    launch(device, name, all.most_blocks(), threads, shared, all);
  } else {
    launch(device, name, blocks, threads, shared, kernel);
  }
}
template <typename D, typename S>
auto& stage_ring(const Backend<ByExpert<D, S>>& on) {
  return stage_ring(Backend<D>{on.device.device});
}
/// cuBLASLt has no products by expert.
template <typename D, typename S, typename T, typename R>
bool gemm(const Backend<ByExpert<D, S>>&, const char*, const GemmShape&, R*, const T*, const T*,
          std::byte*) {
  return false;
}

/// Rows of tokens side by side, in the order of pairs.
template <typename X>
struct GatherByExpertBody {
  X* to;
  const X* from;
  const std::int32_t* order;
  const std::int32_t* end;  // pairs that have an expert
  Index chosen, tokens, in;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index row, Index column) const {
    if (row >= *end) return;
    const Index token = order[row] / chosen;
    if (token < 0 || token >= tokens) return;
    store_pack(load_pack<X, W>(from + token * in + column), to + row * in + column);
  }
};

template <typename D, typename Y, typename X, typename S, bool Gated, typename E>
void product_by_expert(const Backend<D>& on, const problem::ExpertLinear<Y, X, S, Gated, E>& p,
                       const ExpertPanels<S>* panels, const X* rows) {
  const problem::PackedPanels<const S>& first = p.weights[0];
  const ByExpert<D, S> device{
      on.device, {p.offsets, panels, panels_of(first), p.experts, p.pairs, p.bias_size()}};
  execute(Backend<ByExpert<D, S>>{device}, problem::PackedLinear<Y, X, S, Gated, E>{
                                               p.y, rows, first, p.pairs, p.in, p.out, p.epilogue});
}

template <typename D, typename Y, typename X, typename S, bool Gated, typename E>
void execute(const Backend<D>& on, const problem::ExpertLinear<Y, X, S, Gated, E>& p) {
  constexpr auto name = "expert_linear";
  if (p.pairs == 0 || p.out == 0) return;
  // Scratch of the products comes after this frame's.
  auto frame = scratch_frame(on);
  Workspace::Frame host(thread_workspace());
  auto* const panels = host.template take<ExpertPanels<S>>(p.experts);
  for (Index e = 0; e < p.experts; ++e) panels[e] = panels_of(p.weights[e]);
  const auto [on_device] = stage(
      on, name, std::span<const ExpertPanels<S>>(panels, static_cast<std::size_t>(p.experts)));
  const X* rows = p.x;
  if (p.order != nullptr) {
    X* const gathered = frame.template take<X>(p.pairs * p.in);
    constexpr int width = pack_width<X>;
    launch_for_each_pack<width>(on, name, p.pairs, p.in,
                                packs_fit<width>(p.x, p.in) && packs_fit<width>(gathered, p.in),
                                GatherByExpertBody<X>{gathered, p.x, p.order, p.offsets + p.experts,
                                                      p.pairs / p.tokens, p.tokens, p.in});
    rows = gathered;
  }
  product_by_expert(on, p, on_device, rows);
}

template <typename Y, typename X, typename W>
struct ExpertCombineBody {
  using Problem = problem::ExpertCombine<Y, X, W>;
  using C = typename Problem::compute;
  Problem p;

  template <int Width>
  EIGENFORMER_DEVICE void operator()(WidthOf<Width>, Index token, Index column) const {
    Pack<C, Width> sum;
    for (int i = 0; i < Width; ++i) sum[i] = C(0);
    const auto add = [&](C weight, const X* from) {
      const auto x = load_pack<C, Width>(from + column);
      for (int i = 0; i < Width; ++i) sum[i] = std::fma(weight, x[i], sum[i]);
    };
    for (Index j = 0; j < p.chosen; ++j) {
      const Index place = p.places[token * p.chosen + j];
      if (place >= 0 && place < p.pairs)
        add(static_cast<C>(p.weights[token * p.chosen + j]), p.x + place * p.features);
      else
        for (int i = 0; i < Width; ++i) sum[i] = std::numeric_limits<C>::quiet_NaN();
    }
    if (p.shared != nullptr) {
      const C gate =
          p.shared_gate == nullptr ? C(1) : sigmoid(static_cast<C>(p.shared_gate[token]));
      add(gate, p.shared + token * p.features);
    }
    store_pack(sum, p.y + token * p.features + column);
  }
};

template <typename D, typename Y, typename X, typename W>
void execute(const Backend<D>& on, const problem::ExpertCombine<Y, X, W>& p) {
  constexpr int width = pack_width<Y, X>;
  const bool fit = packs_fit<width>(p.y, p.features) && packs_fit<width>(p.x, p.features) &&
                   packs_fit<width>(p.shared, p.features);
  launch_for_each_pack<width>(on, "combine_experts", p.tokens, p.features, fit,
                              ExpertCombineBody<Y, X, W>{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
