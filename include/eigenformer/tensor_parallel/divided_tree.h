/// \file
/// The walk of speculative verification over places whose distributions are divided among ranks:
/// that of cpu/sampling/speculative_tree.h, of all rows side by side. All ranks hold the same
/// numbers (the probabilities of drafted tokens, sums with the bits of the whole row) and take the
/// same steps; a row goes on until a sum is needed.
#pragma once

#include <limits>
#include <span>

#include "../problem/speculative_tree.h"
#include "block_sums.h"
#include "product.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

enum class WalkStep : std::uint8_t {
  weigh,        // what refused drafts have left, for the sibling that is next
  draw,         // from what is left of the target
  draw_target,  // from all of it, where nothing is left
  find,         // the token in a block of the sum that was drawn from
  done
};

/// Where the walk of a row is.
struct DraftWalk {
  WalkStep step = WalkStep::weigh;
  SampleStatus status = SampleStatus::ok;
  Index node = -1, next = 0;  // the last node accepted; the first one that is not looked at
  Index depth = 0;            // nodes accepted
  Index refused = 0;          // children
  double target_mass = 1, draft_mass = 1;
  bool is_weighed = true;  // the masses are of what is left
  // of a draw: the block that its token is in, the sum before it, the limit
  Index block = -1;
  double before = 0, target = 0;
  int holder = -1;  // rank
};

/// Trees, or chains, of which this rank has a shard of the probabilities.
template <typename Draft, typename Target, typename Comm>
struct DividedTrees {
  const problem::SpeculativeTree<Draft, Target>& tree;  // its vocabulary is whole
  Index draft_places;    // distributions of a row's draft: nodes + 1, or nodes of a chain
  const Index* lengths;  // (batch) nodes that count, or nullptr: all
  Comm& communicator;
  Workspace& workspace;
  ShardRange shard;
  std::span<DraftWalk> walks;
  problem::RefusedDraft* refused;  // (batch, nodes)
  const double* drafted;           // (batch, nodes, 2) target and draft probability of each token

  DividedBlocks blocks() const { return {tree.vocab, communicator.size()}; }
  bool is_certain() const { return tree.draft == nullptr; }
  /// Whether node i is a child of the row's last one.
  bool is_child(Index r, Index i) const {
    if (lengths != nullptr && i >= lengths[r]) return false;
    return tree.is_child(tree.draft_tokens + r * tree.nodes, tree.parents + r * tree.parents_stride,
                         walks[static_cast<std::size_t>(r)].node, i);
  }
  problem::PlaceInShard<Draft, Target> place_of(Index r) const {
    const DraftWalk& walk = walks[static_cast<std::size_t>(r)];
    const Index place = walk.node + 1;
    const Target* const target = tree.target + (r * (tree.nodes + 1) + place) * shard.size();
    // the draft of a place is looked at where one of its children was refused
    const bool has_draft = !is_certain() && walk.refused > 0 && walk.step != WalkStep::draw_target;
    return {target, has_draft ? tree.draft + (r * draft_places + place) * shard.size() : nullptr,
            refused + r * tree.nodes, walk.step == WalkStep::draw_target ? 0 : walk.refused};
  }
};

template <typename Trees>
void end_walk(Trees& trees, Index r, SampleStatus status, std::int32_t last) {
  DraftWalk& walk = trees.walks[static_cast<std::size_t>(r)];
  const auto& tree = trees.tree;
  std::int32_t* const tokens = tree.tokens + r * (tree.nodes + 1);
  std::int32_t* const nodes = tree.accepted_nodes + r * tree.nodes;
  walk.step = WalkStep::done;
  tree.statuses[r] = status;
  tree.accepted[r] = static_cast<std::int32_t>(walk.depth);
  tokens[walk.depth] = last;
  if (status == SampleStatus::ok) return;
  tree.accepted[r] = 0;
  std::fill(tokens, tokens + tree.nodes + 1, -1);
  std::fill(nodes, nodes + tree.nodes, -1);
}

/// What is left of a target probability by the refused drafts of its place.
inline double left_of_target(double target, double draft,
                             std::span<const problem::RefusedDraft> refused) {
  for (const problem::RefusedDraft& each : refused)
    target = (std::max)(0.0, multiply_add(target, each.target_scale, -(draft * each.draft_scale)));
  return target;
}

/// Tries child i, whose probabilities are known; false where the row has ended.
template <typename Trees>
bool try_child(Trees& trees, Index r, Index i) {
  DraftWalk& walk = trees.walks[static_cast<std::size_t>(r)];
  const auto& tree = trees.tree;
  const double* const drafted = trees.drafted + 2 * (r * tree.nodes + i);
  const double target = drafted[0], draft = drafted[1];
  for (const double read : {target, draft})
    if (const SampleStatus status = problem::status_of_probability(read);
        status != SampleStatus::ok) {
      end_walk(trees, r, status, -1);
      return false;
    }
  const std::int32_t token = tree.draft_tokens[r * tree.nodes + i];
  const double u = tree.uniform(r, i, Philox::Purpose::acceptance);
  problem::RefusedDraft* const refused = trees.refused + r * tree.nodes;
  bool accepted;
  if (trees.is_certain()) {
    accepted = u * walk.target_mass < target;
    walk.target_mass -= target;
    refused[walk.refused] = {1.0, 1.0, token};
  } else {
    if (walk.target_mass == 0 || walk.draft_mass == 0) return true;
    double left = target;
    if (walk.refused > 0)
      left = left_of_target(target, draft, {refused, static_cast<std::size_t>(walk.refused)}) /
             walk.target_mass;
    accepted = u * (draft / walk.draft_mass) < left;
    refused[walk.refused] = {1 / walk.target_mass, 1 / walk.draft_mass,
                             tree.with_replacement ? -1 : token};
    walk.is_weighed = false;
  }
  if (!accepted) {
    ++walk.refused;
    return true;
  }
  tree.tokens[r * (tree.nodes + 1) + walk.depth] = token;
  tree.accepted_nodes[r * tree.nodes + walk.depth++] = static_cast<std::int32_t>(i);
  walk.node = i;
  walk.refused = 0;
  walk.target_mass = walk.draft_mass = 1;
  walk.is_weighed = true;
  return true;
}

/// Goes on until a sum is needed.
template <typename Trees>
void walk_on(Trees& trees, Index r) {
  DraftWalk& walk = trees.walks[static_cast<std::size_t>(r)];
  for (; walk.next < trees.tree.nodes; ++walk.next) {
    if (!trees.is_child(r, walk.next)) continue;
    if (!walk.is_weighed) {
      walk.step = WalkStep::weigh;
      return;
    }
    if (!try_child(trees, r, walk.next)) return;
  }
  walk.step = WalkStep::draw;
}

/// The probabilities of all drafted tokens, from the ranks that have them.
template <typename Trees>
const double* gather_drafted(const Trees& trees, Workspace::Frame& frame) {
  const auto& tree = trees.tree;
  const int ranks = trees.communicator.size();
  const Index nodes = tree.nodes, all = tree.batch * nodes;
  double* const drafted = frame.take<double>(2 * all);
  std::fill(drafted, drafted + 2 * all, 0.0);
  const std::span<Index> counts(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  const auto for_each = [&](int rank, auto&& f) {
    const ShardRange there = problem::shard_of(tree.vocab, rank, ranks);
    for (Index r = 0; r < tree.batch; ++r)
      for (Index i = 0; i < (trees.lengths == nullptr ? nodes : trees.lengths[r]); ++i)
        if (const std::int32_t token = tree.draft_tokens[r * nodes + i];
            token >= there.begin && token < there.end)
          f(r, i, token);
  };
  Index total = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    Index& count = counts[static_cast<std::size_t>(rank)] = 0;
    for_each(rank, [&](Index, Index, std::int32_t) { count += 2; });
    total += count;
  }
  const Index own_count = counts[static_cast<std::size_t>(trees.communicator.rank())];
  double *const own = frame.take<double>(own_count), *const parts = frame.take<double>(total);
  double* to = own;
  const ShardRange& shard = trees.shard;
  for_each(trees.communicator.rank(), [&](Index r, Index i, std::int32_t token) {
    const Index place = tree.parents[r * tree.parents_stride + i] + 1, at = token - shard.begin;
    *to++ = static_cast<double>(tree.target[(r * (nodes + 1) + place) * shard.size() + at]);
    *to++ =
        trees.is_certain()
            ? 1.0
            : static_cast<double>(tree.draft[(r * trees.draft_places + place) * shard.size() + at]);
  });
  trees.communicator.all_gather(std::span<const double>(own, static_cast<std::size_t>(own_count)),
                                std::span<double>(parts, static_cast<std::size_t>(total)),
                                std::span<const Index>(counts));
  const double* from = parts;
  for (int rank = 0; rank < ranks; ++rank)
    for_each(rank, [&](Index r, Index i, std::int32_t) {
      drafted[2 * (r * nodes + i)] = *from++;
      drafted[2 * (r * nodes + i) + 1] = *from++;
    });
  return drafted;
}

/// The rows of a round, and what all ranks say of them.
template <typename Draft, typename Target>
struct WalkRound {
  std::span<const Index> rows;
  const problem::PlaceInShard<Draft, Target>* places;
  const bool* weighs_draft;
  const double* const* parts;  // (ranks, rows)

  const double* of(int rank, Index i) const {
    return parts[static_cast<Index>(rank) * static_cast<Index>(rows.size()) + i];
  }
};

/// Asks the shards for the sums of the rows that need one.
template <typename D, typename Draft, typename Target, typename Comm>
WalkRound<Draft, Target> weigh_places(const D& device,
                                      const DividedTrees<Draft, Target, Comm>& trees,
                                      Workspace::Frame& frame) {
  using Place = problem::PlaceInShard<Draft, Target>;
  const Index batch = trees.tree.batch;
  const DividedBlocks blocks = trees.blocks();
  const int ranks = blocks.ranks, own_rank = trees.communicator.rank();
  Index* const rows = frame.take<Index>(batch);
  Place* const places = frame.take<Place>(batch);
  bool* const weighs_draft = frame.take<bool>(batch);
  Index count = 0;
  for (Index r = 0; r < batch; ++r) {
    const DraftWalk& walk = trees.walks[static_cast<std::size_t>(r)];
    if (walk.step == WalkStep::done) continue;
    rows[count] = r;
    places[count] = trees.place_of(r);
    weighs_draft[count++] = walk.step == WalkStep::weigh && !trees.tree.with_replacement;
  }
  if (count == 0) return {{}, nullptr, nullptr, nullptr};
  const auto** const parts = frame.take<const double*>(ranks * count);
  auto** const answers = frame.take<double*>(count);
  const std::span<Index> sizes(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  const auto size_of = [&](int rank, Index i) {
    return 2 + blocks.of(rank).size() * (weighs_draft[i] ? 2 : 1);
  };
  Index total = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    Index& size = sizes[static_cast<std::size_t>(rank)] = 0;
    for (Index i = 0; i < count; ++i) size += size_of(rank, i);
    total += size;
  }
  double *const all = frame.take<double>(total), *from = all;
  for (int rank = 0; rank < ranks; ++rank)
    for (Index i = 0; i < count; ++i) {
      if (rank == own_rank) answers[i] = from;
      parts[rank * count + i] = from;
      from += size_of(rank, i);
    }
  detail::run(device,
              problem::WeighPlaces<Draft, Target>{places, weighs_draft, count, trees.tree.vocab,
                                                  trees.shard, answers},
              trees.workspace);
  trees.communicator.all_gather(
      std::span<const double>(answers[0],
                              static_cast<std::size_t>(sizes[static_cast<std::size_t>(own_rank)])),
      std::span<double>(all, static_cast<std::size_t>(total)), std::span<const Index>(sizes));
  return {{rows, static_cast<std::size_t>(count)}, places, weighs_draft, parts};
}

/// The first status of a distribution that is not ok: that of the target comes first.
template <typename Round>
SampleStatus status_of_round(const Round& round, Index i, int ranks) {
  for (int distribution = 0; distribution < 2; ++distribution)
    for (int rank = 0; rank < ranks; ++rank)
      if (const auto status =
              static_cast<SampleStatus>(static_cast<int>(round.of(rank, i)[distribution]));
          status != SampleStatus::ok)
        return status;
  return SampleStatus::ok;
}

/// Goes on with row i of a round.
template <typename Trees, typename Round>
void take_sums(Trees& trees, const Round& round, Index i) {
  const Index r = round.rows[static_cast<std::size_t>(i)];
  DraftWalk& walk = trees.walks[static_cast<std::size_t>(r)];
  const DividedBlocks blocks = trees.blocks();
  if (const SampleStatus status = status_of_round(round, i, blocks.ranks);
      status != SampleStatus::ok)
    return end_walk(trees, r, status, -1);
  const auto of_target = [&](int rank) { return round.of(rank, i) + 2; };
  const auto of_draft = [&](int rank) { return of_target(rank) + blocks.of(rank).size(); };
  const double u = trees.tree.uniform(r, 0, Philox::Purpose::last_token);
  const problem::DrawnBlock drawn = blocks.join(of_target, u, trees.workspace);
  if (walk.step == WalkStep::weigh) {
    walk.target_mass = drawn.total;
    if (round.weighs_draft[i]) walk.draft_mass = blocks.join(of_draft, u, trees.workspace).total;
    walk.is_weighed = true;
    return walk_on(trees, r);
  }
  if (drawn.total == 0 && walk.step == WalkStep::draw && walk.refused > 0) {
    walk.step = WalkStep::draw_target;
  } else if (drawn.block < 0) {
    end_walk(trees, r, drawn.total == 0 ? SampleStatus::no_token : SampleStatus::positive_infinity,
             -1);
  } else if (drawn.token >= 0) {
    end_walk(trees, r, SampleStatus::ok, drawn.token);
  } else {
    walk.step = WalkStep::find;
    walk.block = drawn.block;
    walk.before = drawn.before;
    walk.target = drawn.target;
    walk.holder = blocks.holder(drawn.block);
  }
}

/// Last tokens, from the ranks that have their blocks.
template <typename D, typename Draft, typename Target, typename Comm>
void find_last_tokens(const D& device, DividedTrees<Draft, Target, Comm>& trees,
                      const WalkRound<Draft, Target>& round) {
  const Index count = static_cast<Index>(round.rows.size());
  const auto walk_of = [&](Index i) -> DraftWalk& {
    return trees.walks[static_cast<std::size_t>(round.rows[static_cast<std::size_t>(i)])];
  };
  bool any = false;
  for (Index i = 0; i < count; ++i) any = any || walk_of(i).step == WalkStep::find;
  if (!any) return;
  Workspace::Frame frame(trees.workspace);
  const Index all_count = count * trees.communicator.size();
  Index* const blocks = frame.take<Index>(count);
  double *const before = frame.take<double>(count), *const targets = frame.take<double>(count);
  std::int32_t* const own = frame.take<std::int32_t>(count);
  std::int32_t* const all = frame.take<std::int32_t>(all_count);
  for (Index i = 0; i < count; ++i) {
    const DraftWalk& walk = walk_of(i);
    const bool is_own = walk.step == WalkStep::find && walk.holder == trees.communicator.rank();
    blocks[i] = is_own ? walk.block : -1;
    before[i] = walk.before;
    targets[i] = walk.target;
  }
  detail::run(device,
              problem::FindInPlaces<Draft, Target>{round.places, blocks, before, targets, count,
                                                   trees.shard, own},
              trees.workspace);
  trees.communicator.all_gather(std::span<const std::int32_t>(own, static_cast<std::size_t>(count)),
                                std::span<std::int32_t>(all, static_cast<std::size_t>(all_count)));
  for (Index i = 0; i < count; ++i)
    if (const DraftWalk& walk = walk_of(i); walk.step == WalkStep::find)
      end_walk(trees, round.rows[static_cast<std::size_t>(i)], SampleStatus::ok,
               all[walk.holder * count + i]);
}

/// Verifies all rows; the results, memory of the host, are the same on every rank.
template <typename D, typename Draft, typename Target, typename Comm>
void verify_divided_trees(const D& device, const problem::SpeculativeTree<Draft, Target>& tree,
                          Index draft_places, const Index* lengths, Comm& communicator,
                          Workspace& workspace) {
  if (tree.batch == 0) return;
  Workspace::Frame frame(workspace);
  DividedTrees<Draft, Target, Comm> trees{
      tree,
      draft_places,
      lengths,
      communicator,
      workspace,
      problem::shard_of(tree.vocab, communicator.rank(), communicator.size()),
      {frame.take<DraftWalk>(tree.batch), static_cast<std::size_t>(tree.batch)},
      frame.take<problem::RefusedDraft>(tree.batch * tree.nodes),
      nullptr};
  std::fill(trees.walks.begin(), trees.walks.end(), DraftWalk{});
  std::fill(tree.tokens, tree.tokens + tree.batch * (tree.nodes + 1), -1);
  std::fill(tree.accepted_nodes, tree.accepted_nodes + tree.batch * tree.nodes, -1);
  trees.drafted = gather_drafted(trees, frame);
  for (Index r = 0; r < tree.batch; ++r) walk_on(trees, r);
  for (;;) {
    Workspace::Frame of_round(workspace);
    const auto round = weigh_places(device, trees, of_round);
    if (round.rows.empty()) return;
    for (Index i = 0; i < static_cast<Index>(round.rows.size()); ++i) take_sums(trees, round, i);
    find_last_tokens(device, trees, round);
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
