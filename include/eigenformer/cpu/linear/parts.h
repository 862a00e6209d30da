/// \file
/// Products out of parts, a block of rows each: a product of many rows is one part after the other,
/// those of the experts that have few rows are parts that go side by side. Threads pack the
/// activations of all parts, and when all are packed they share the panels, each a range of equal
/// cost that may begin and end within a part. A barrier for all parts, where a loop over products
/// has one for each.
#pragma once

#include <algorithm>
#include <new>

#include "linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Rows of a product that are multiplied together, and where they begin among all parts.
template <typename Problem>
struct ProductPart {
  const Problem* problem;
  Index row, rows;
  Index padded_row = 0, tile = 0, cost = 0;

  /// Of a step of a panel, in cycles: two for each row, and eight to fetch its weights.
  Index panel_cost() const { return 2 * rows + 8; }
};

/// Parts of products of one shape, which threads share as if they were one product.
template <typename Dot, typename D, typename Isa, typename Problem>
class ProductParts {
  using Part = ProductPart<Problem>;
  using Block = ProductBlock<Dot, Isa, Problem>;

 public:
  /// Scratch is taken for so many rows, padded, if the parts have fewer.
  ProductParts(const Backend<D, Isa>& on, Part* parts, Index count, Index scratch_rows = 0)
      : on_(on), parts_(parts), count_(count), depth_(parts->problem->depth) {
    panels_ = (parts->problem->columns + Block::outputs - 1) / Block::outputs;
    steps_ = tile::product_steps<Dot>(depth_);
    for (Index i = 0; i < count; ++i) {
      Part& part = parts[i];
      part.padded_row = padded_rows_;
      part.tile = tiles_;
      part.cost = cost_;
      const Tiles<Dot> own(part.rows);
      rows_ += part.rows;
      padded_rows_ += own.padded_rows();
      most_padded_rows_ = (std::max)(most_padded_rows_, own.padded_rows());
      tiles_ += own.count();
      cost_ += panels_ * part.panel_cost();
    }
    padded_rows_ = (std::max)(padded_rows_, scratch_rows);
    most_padded_rows_ = (std::max)(most_padded_rows_, scratch_rows);
  }

  void multiply() {
    if (rows_ == 0 || panels_ == 0) return;
    Workspace::Frame frame(on_.workspace);
    activations_ = frame.take<typename Dot::Unit>(padded_rows_ * steps_ * Dot::units);
    take_scales(frame);
    parallel_for(on_, tiles_, Cost{rows_ * depth_ / tiles_, kPackCycles},
                 [&](Index first, Index last, int) { pack(first, last); });
    const Index group = (std::min)(kGroupPanels, panels_), workers = worker_count(on_);
    const Index sums = group * most_padded_rows_ * Dot::columns;
    const Index chunk =
        Block::packed ? 0 : group * block_steps<Dot, Block::packed>() * Block::panel_step;
    auto* const all_sums = frame.take<typename Block::Sum>(workers * sums);
    auto* const all_chunks = frame.take<typename Dot::Stored>(workers * chunk);
    const auto scratch = [&](int worker) {
      return typename Block::Scratch{all_sums + worker * sums, all_chunks + worker * chunk};
    };
    if (count_ == 1 && panels_ < workers && tiles_ > panels_)
      parallel_for(on_, tiles_, Cost{(steps_ + 1) * cost_ / tiles_, 1},
                   [&](Index first, Index last, int worker) {
                     block_of(parts_[0]).run(scratch(worker), 0, panels_, first, last);
                   });
    else
      parallel_for(on_, cost_, Cost{steps_ + 1, 1},
                   [&](Index first, Index last, int worker) { run(scratch(worker), first, last); });
  }

 private:
  void take_scales(Workspace::Frame& frame) {
    const Problem& problem = *parts_->problem;
    if constexpr (Block::grouped) {
      scales_.group = problem.weights.group;
      scales_.groups = (depth_ + scales_.group - 1) / scales_.group;
    } else {
      scales_.group = std::max<Index>(depth_, 1);
      scales_.groups = 1;
    }
    const Index numbers = padded_rows_ * scales_.groups;
    scales_.scales = frame.take<float>(padded_rows_);
    scales_.offsets = frame.take<std::int32_t>(numbers);
    if constexpr (tile::is_int4<Dot>) {
      const bool minimums = problem.weights.minimums != nullptr;
      scales_.offset_factor = minimums ? 0 : 8;
      scales_.sums = minimums ? frame.take<float>(numbers) : nullptr;
    }
  }
  Block block_of(const Part& part) const {
    ActivationScales scales = scales_;
    scales.scales += part.padded_row;
    scales.offsets += part.padded_row * scales.groups;
    if (scales.sums != nullptr) scales.sums += part.padded_row * scales.groups;
    return {*part.problem,
            part.row,
            Tiles<Dot>(part.rows),
            steps_,
            activations_ + part.padded_row * steps_ * Dot::units,
            scales};
  }
  void pack(Index first, Index last) const {
    for (Index i = 0; i < count_; ++i) {
      const Block block = block_of(parts_[i]);
      const Index begin = (std::max)(first - parts_[i].tile, Index{0}),
                  end = (std::min)(last - parts_[i].tile, block.tiles.count());
      if (begin < end) block.pack(begin, end);
    }
  }
  /// The panels that begin in [first, last) of the cost of all.
  void run(const typename Block::Scratch& scratch, Index first, Index last) const {
    for (Index i = 0; i < count_; ++i) {
      const Index each = parts_[i].panel_cost();
      const auto panel = [&](Index cost) {
        const Index own = std::clamp<Index>(cost - parts_[i].cost, 0, panels_ * each);
        return (own + each - 1) / each;
      };
      const Block block = block_of(parts_[i]);
      if (panel(first) < panel(last))
        block.run(scratch, panel(first), panel(last), 0, block.tiles.count());
    }
  }

  const Backend<D, Isa>& on_;
  Part* parts_;
  Index count_, depth_, panels_, steps_, rows_ = 0, padded_rows_ = 0, most_padded_rows_ = 0,
                                         tiles_ = 0, cost_ = 0;
  typename Dot::Unit* activations_ = nullptr;
  ActivationScales scales_ = {};
};

template <typename Dot, typename D, typename Isa, typename Problem>
void product(const Backend<D, Isa>& on, const Problem& p, Index scratch_rows = 0) {
  if (p.columns == 0) return;  // of however many rows
  const Index most = block_rows<Dot, is_packed<decltype(p.weights)>>(),
              at_once = even_block_rows<Dot>(p.rows, most);
  for (Index row = 0; row < p.rows; row += at_once) {
    ProductPart<Problem> part{&p, row, (std::min)(at_once, p.rows - row)};
    ProductParts<Dot, D, Isa, Problem>(on, &part, 1, scratch_rows).multiply();
  }
}

/// Products of one shape, of a row or more each and few together, or one of however many. Scratch
/// is that of any that have up to `scratch_rows` padded rows together, and of one.
template <typename Dot, typename D, typename Isa, typename Problem>
void products(const Backend<D, Isa>& on, const Problem* all, Index count, Index scratch_rows) {
  Workspace::Frame frame(on.workspace);
  auto* const parts = frame.take<ProductPart<Problem>>(scratch_rows);
  if (count == 1) return product<Dot>(on, all[0], scratch_rows);
  for (Index i = 0; i < count; ++i)
    ::new (static_cast<void*>(parts + i)) ProductPart<Problem>{all + i, 0, all[i].rows};
  ProductParts<Dot, D, Isa, Problem>(on, parts, count, scratch_rows).multiply();
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
