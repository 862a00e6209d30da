/// \file
/// The stage top_p of divided rows (divided_rows.h) by sums of floats: rows ask for the weights of
/// a sample, twice, which tells an interval of logits in which the set likely ends, then for the
/// weights above, below and in it, whose logits are gathered. What travels are sums, about a
/// twentieth of the logits where they are flat and fewer where they are not. A row whose end the
/// errors of all sums leave open asks for `bins`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "../cpu/vocabulary_nucleus.h"
#include "divided_search.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Whether nuclei may be looked for so, which all ranks say alike.
template <typename Rows>
bool serves_nucleus(const Rows& divided) {
  constexpr Index least_vocab = 8192, least_shard = 1024;  // of less a sample is no smaller
  return std::is_same_v<typename Rows::C, float> && divided.weighs_in_float &&
         divided.sampling.vocab >= least_vocab &&
         divided.sampling.vocab / divided.ranks() >= least_shard;
}

/// A row whose nucleus is looked for, the same on all ranks but for `shard`.
struct NucleusSearch {
  bool runs;
  int rounds, attempts;
  double total;  // estimated
  problem::NucleusSums sums;
  Index begin, count;  // of the joined list, in the store of all
  problem::NucleusEnd end;
};

template <typename Rows>
struct DividedNuclei {
  using Question = problem::NucleusQuestion;
  static constexpr float infinity = std::numeric_limits<float>::infinity();

  Rows& divided;
  problem::ShardNucleus* asked;  // (rows)
  NucleusSearch* searches;       // (rows)
  Index *counts, *begins;        // (rows, ranks) logits listed, and where all are gathered
  float* listed;                 // (rows, room) of this rank
  Index room;

  DividedNuclei(Rows& rows, Workspace::Frame& frame)
      : divided(rows),
        asked(frame.take<problem::ShardNucleus>(rows.shard.rows)),
        searches(frame.take<NucleusSearch>(rows.shard.rows)),
        counts(frame.take<Index>(rows.shard.rows * rows.ranks())),
        begins(frame.take<Index>(rows.shard.rows * rows.ranks())),
        room(rows.shard.shard.size() / 4) {
    listed = frame.take<float>(rows.shard.rows * room);
    for (Index r = 0; r < divided.shard.rows; ++r) start(r);
  }

  /// p of the weights are kept.
  double share(Index r) const { return (std::max)(divided.params_of(r).top_p, 0.0); }
  bool is_open(Index r) const { return searches[r].runs && asked[r].question != Question::none; }

  /// Ends that lie the denser the nearer they are to the best logit, and that of all.
  void start(Index r) {
    asked[r] = {};
    searches[r] = {};
    if (divided.asked[r].question != problem::ShardQuestion::nucleus) return;
    searches[r].runs = true;
    asked[r].question = Question::sample;
    const auto& row = divided.asked[r];
    const double best = static_cast<double>(row.band.hi);
    // 40 units below the best all tokens together weigh nothing
    double distance = 40;
    for (Index i = problem::ShardNucleus::most_ends - 1; i > 1; --i, distance *= .6)
      asked[r].ends[i] =
          static_cast<float>((std::max)(best - distance / row.inverse_temperature,
                                        static_cast<double>(std::numeric_limits<float>::lowest())));
    asked[r].ends[1] = row.band.hi;
    asked[r].ends[0] = infinity;
  }

  void give_up(Index r) {
    searches[r].runs = false;
    asked[r].question = Question::none;
    divided.asked[r].question = problem::ShardQuestion::bins;
  }

  void take_sample(Index r, const ShardAnswers& answers) {
    auto& nucleus = asked[r];
    NucleusSearch& search = searches[r];
    const auto& band = divided.asked[r].band;
    const double p = share(r), tokens = answers.sum(r, nucleus.most_ends);
    if (tokens == 0) return give_up(r);
    if (search.rounds == 0) {
      search.total = answers.sum(r, 0);
      nucleus.lo = (std::max)(band.lo, nucleus.ends[nucleus.most_ends - 1]);
      nucleus.hi = band.hi;
    }
    const double rest = (1.0 - p) * search.total,
                 doubt = search.total * (2.0 * std::sqrt(p * (1.0 - p) / tokens) + .1 * (1.0 - p));
    float lo = nucleus.lo, hi = nucleus.hi;
    for (Index i = 0; i < nucleus.most_ends; ++i) {
      const float end = nucleus.ends[i];
      const double mass = answers.sum(r, i);
      if (end <= nucleus.hi && mass <= rest - doubt) lo = (std::max)(lo, end);
      if (end >= nucleus.lo && mass >= rest + doubt) hi = (std::min)(hi, end);
    }
    nucleus.lo = lo, nucleus.hi = hi;
    const float step = (hi - lo) / static_cast<float>(nucleus.most_ends + 1);
    if (++search.rounds == 2 || !(lo + step > lo)) {
      nucleus.question = Question::interval;
    } else {
      for (Index i = 0; i < nucleus.most_ends; ++i)
        nucleus.ends[i] = lo + step * static_cast<float>(i + 1);
    }
  }

  void take_interval(Index r, const ShardAnswers& answers) {
    auto& nucleus = asked[r];
    NucleusSearch& search = searches[r];
    search.sums = {answers.sum(r, 0), answers.sum(r, 1), answers.sum(r, 2)};
    const double above = search.sums.above, target = share(r) * (above + search.sums.rest);
    const float lowest = divided.asked[r].band.lo;
    bool fits = ++search.attempts <= 3;
    search.count = 0;
    for (int rank = 0; rank < divided.ranks(); ++rank) {
      const auto count = static_cast<Index>(answers.of(rank, r, 3));
      counts[r * divided.ranks() + rank] = count;
      search.count += count;
      fits = fits && count <= divided.shard_of(rank).size() / 4;
    }
    if (target > above && !(nucleus.lo > lowest)) fits = false;
    if (!fits) return give_up(r);
    if (target <= above - search.sums.inside) {
      nucleus.lo = std::nextafter(nucleus.hi, infinity), nucleus.hi = infinity;
    } else if (target > above) {
      nucleus.hi = std::nextafter(nucleus.lo, -infinity), nucleus.lo = lowest;
    } else {
      nucleus.question = Question::none;
    }
  }

  template <typename D>
  ShardAnswers ask(const D& device, Workspace::Frame& frame) const {
    const Index rows = divided.shard.rows;
    Index* const begin = frame.take<Index>(rows + 1);
    begin[0] = 0;
    for (Index r = 0; r < rows; ++r)
      begin[r + 1] = begin[r] + problem::numbers_of(asked[r].question);
    double* const own = frame.take<double>(begin[rows]);
    detail::run(device,
                problem::AskNucleus{divided.shard, divided.asked, asked, begin, own, listed, room},
                divided.workspace);
    return divided.exchange(own, begin, begin[rows], frame);
  }
  bool any_open() const {
    for (Index r = 0; r < divided.shard.rows; ++r)
      if (is_open(r)) return true;
    return false;
  }

  /// The intervals of all rows.
  template <typename D>
  void find_intervals(const D& device) {
    while (any_open()) {
      Workspace::Frame frame(divided.workspace);
      const ShardAnswers answers = ask(device, frame);
      for (Index r = 0; r < divided.shard.rows; ++r) {
        if (!is_open(r)) continue;
        asked[r].question == Question::sample ? take_sample(r, answers) : take_interval(r, answers);
      }
    }
  }

  /// What all ranks have listed, rank by rank and row by row.
  const float* gather_lists(Workspace::Frame& frame) const {
    const int ranks = divided.ranks(), own_rank = divided.communicator.rank();
    const std::span<Index> sizes(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
    Index total = 0;
    for (int rank = 0; rank < ranks; ++rank) {
      const Index begin = total;
      for (Index r = 0; r < divided.shard.rows; total += count_of(r++, rank))
        begins[r * ranks + rank] = total;
      sizes[static_cast<std::size_t>(rank)] = total - begin;
    }
    const Index own_size = sizes[static_cast<std::size_t>(own_rank)];
    float *const own = frame.take<float>(own_size), *const all = frame.take<float>(total);
    float* to = own;
    for (Index r = 0; r < divided.shard.rows; ++r)
      to = std::copy_n(listed + r * room, count_of(r, own_rank), to);
    divided.communicator.all_gather(std::span<const float>(own, static_cast<std::size_t>(own_size)),
                                    std::span<float>(all, static_cast<std::size_t>(total)),
                                    std::span<const Index>(sizes));
    return all;
  }
  Index count_of(Index r, int rank) const {
    return searches[r].runs ? counts[r * divided.ranks() + rank] : 0;
  }
  /// The part of a rank in a row's list.
  std::span<const float> part_of(const float* all, Index r, int rank) const {
    return {all + begins[r * divided.ranks() + rank], static_cast<std::size_t>(count_of(r, rank))};
  }

  /// The ends of all rows, from the lists.
  template <typename D>
  void find_ends(const D& device, const float* all, Workspace::Frame& frame) {
    constexpr Index slack = 16;
    Index size = 0;
    for (Index r = 0; r < divided.shard.rows; ++r) {
      searches[r].begin = size;
      if (searches[r].runs) size += searches[r].count + slack;
    }
    float* const store = frame.take<float>(size);
    for (Index r = 0; r < divided.shard.rows; ++r) {
      NucleusSearch& search = searches[r];
      if (!search.runs) continue;
      float *const list = store + search.begin, *to = list;
      for (int rank = 0; rank < divided.ranks(); ++rank) {
        const auto part = part_of(all, r, rank);
        to = std::copy(part.begin(), part.end(), to);
      }
      detail::run(
          device,
          problem::NarrowNucleus{divided.asked[r], divided.sampling.vocab, share(r), search.sums,
                                 asked[r].lo, asked[r].hi, list, search.count, search.end},
          divided.workspace);
      if (search.count == 0) {
        give_up(r);
      } else if (!search.end.certain) {
        asked[r].question = Question::exact;
        asked[r].lo = list[0];
      }
    }
    if (!any_open()) return;
    Workspace::Frame of_answers(divided.workspace);
    const ShardAnswers answers = ask(device, of_answers);
    for (Index r = 0; r < divided.shard.rows; ++r) {
      if (!is_open(r)) continue;
      NucleusSearch& search = searches[r];
      const double total = answers.sum(r, 0);
      detail::run(Eigen::DefaultDevice{},
                  problem::EndNucleus{divided.asked[r], share(r), answers.sum(r, 1), total,
                                      divided.margin(total), store + search.begin, search.count,
                                      search.end},
                  divided.workspace);
      asked[r].question = Question::none;
      if (!search.end.certain) give_up(r);
    }
  }

  /// Of the logits at which a row ends the ranks have as many as they have listed.
  void end_bands(const float* all) {
    for (Index r = 0; r < divided.shard.rows; ++r) {
      const NucleusSearch& search = searches[r];
      if (!search.runs) continue;
      Index equals = 0;
      for (int rank = 0; rank < divided.ranks(); ++rank) {
        const auto part = part_of(all, r, rank);
        const auto own = static_cast<Index>(std::count(part.begin(), part.end(), search.end.value));
        divided.counts[r * divided.ranks() + rank] = own;
        equals += own;
      }
      divided.asked[r].value = search.end.value;
      end_band_at(divided, r, search.end.taken, equals);
    }
  }
};

/// Runs top_p on the rows that ask for their nucleus.
template <typename D, typename Rows>
void settle_nuclei(const D& device, Rows& divided) {
  if constexpr (std::is_same_v<typename Rows::C, float> && CpuDevice<D>) {
    const auto asks = [](const auto& row) {
      return row.question == problem::ShardQuestion::nucleus;
    };
    if (std::none_of(divided.asked, divided.asked + divided.shard.rows, asks)) return;
    Workspace::Frame frame(divided.workspace);
    DividedNuclei<Rows> nuclei(divided, frame);
    nuclei.find_intervals(device);
    const float* const all = nuclei.gather_lists(frame);
    nuclei.find_ends(device, all, frame);
    nuclei.end_bands(all);
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
