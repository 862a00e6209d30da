/// \file
/// Where a filter's tokens end in a divided row: the shortest prefix of the tokens in play, in the
/// filter's order, whose terms reach a target. Ranks sum the terms of 64 bins of half a nat, the
/// one in which the prefix ends is divided again (problem::ShardKeys), and once it holds few
/// tokens, or one key, these are looked at. Keys that lie close in a wide interval are bounded
/// first. A bin or token counts where no error that sums may have could change it; where one could,
/// all tokens in play travel.
#pragma once

#include "divided_sums.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename Rows>
void ask_shards(Rows& divided, Index r, problem::ShardQuestion question) {
  divided.asked[r].question = question;
}

/// Asks for sums with the bits of the whole row.
template <typename Rows>
void ask_sums(Rows& divided, Index r, problem::ShardSum of) {
  divided.asked[r].sum = of;
  ask_shards(divided, r, problem::ShardQuestion::sums);
}

/// All tokens that were in play before the stage decide.
template <typename Rows>
void send_all_in_play(Rows& divided, Index r) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  row.sends_all = true;
  asked.band = divided.before[r];
  asked.sure = asked.band.lo;
  ask_shards(divided, r, problem::ShardQuestion::count);
}

/// `scale`: the sum of all terms, 0 where they are whole numbers.
template <typename Rows>
void prepare_search(Rows& divided, Index r, problem::ShardTerm term, bool by_distance,
                    double target, double scale) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  row.is_searching = true;
  row.search = {target, divided.margin(scale)};
  asked.term = term;
  asked.by_distance = by_distance;
}
template <typename Rows>
void start_search(Rows& divided, Index r, problem::ShardTerm term, bool by_distance, double target,
                  double scale) {
  prepare_search(divided, r, term, by_distance, target, scale);
  ask_shards(divided, r, problem::ShardQuestion::bins);
}

/// Of the numbers of [first, last] the first for which `holds`, which does for all after it; the
/// last where it does for none.
template <typename Holds>
std::uint64_t first_of(std::uint64_t first, std::uint64_t last, Holds&& holds) {
  while (first < last) {
    const std::uint64_t middle = first + (last - first) / 2;
    if (holds(middle))
      last = middle;
    else
      first = middle + 1;
  }
  return last;
}

/// From the first key asked to this one.
template <typename C>
double distance_of_key(const problem::ShardRow<C>& asked, std::uint64_t key) {
  return asked.by_distance ? std::bit_cast<double>(key) - std::bit_cast<double>(asked.first)
                           : asked.from_first(asked.logit_of(key));
}

/// Asks for bins of the keys from first to last.
template <typename Rows>
void ask_keys(Rows& divided, Index r) {
  auto& asked = divided.asked[r];
  const double width = distance_of_key(asked, asked.last);
  asked.per_unit = width > 0 ? problem::ShardKeys::bins / width : 0.0;
  ask_shards(divided, r, problem::ShardQuestion::keys);
}

template <typename Rows>
void take_bounds(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& asked = divided.asked[r];
  std::uint64_t least = asked.last, most = asked.first;
  for (int rank = 0; rank < divided.ranks(); ++rank) {
    const auto key = [&](Index number) {
      return static_cast<std::uint64_t>(answers.of(rank, r, number)) << 32 |
             static_cast<std::uint64_t>(answers.of(rank, r, number + 1));
    };
    least = (std::min)(least, key(0));
    most = (std::max)(most, key(2));
  }
  asked.first = least, asked.last = most;
  // of numbers so large or close that no bins divide them
  const double width = distance_of_key(asked, most);
  if (least != most && !(width > 1e-290 && width < 1e300)) return send_all_in_play(divided, r);
  ask_keys(divided, r);
}

/// Of the `equals` tokens of logit asked.value, which divided.counts has of each rank, `taken` stay.
template <typename Rows>
void end_band_at(Rows& divided, Index r, Index taken, Index equals) {
  auto& asked = divided.asked[r];
  if (taken == equals) {
    if (asked.value > asked.band.lo) asked.band.lo_end = divided.sampling.vocab;
    asked.band.lo = asked.sure = asked.value;
    return finish_band(divided, r);
  }
  asked.nth = last_of_rank(taken, divided.communicator.rank(),
                           [&](int rank) { return divided.counts[r * divided.ranks() + rank]; });
  ask_shards(divided, r, problem::ShardQuestion::place);
}

template <typename Rows>
void take_place(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& asked = divided.asked[r];
  asked.band.lo = asked.sure = asked.value;
  asked.band.lo_end = static_cast<Index>(answers.sum(r, 0));
  finish_band(divided, r);
}

/// How many of the tokens equal to the last one stay; 0 where that is open.
inline Index taken_of(const PrefixSearch& search) {
  const Index taken =
      problem::equals_taken(search.above, search.each, search.equals, search.target);
  if (search.tokens == 0 && search.exact) return taken;
  const double before = search.above + static_cast<double>(taken - 1) * search.each;
  const bool is_first = search.tokens == 0 && taken == 1;  // which stays whatever it weighs
  const bool starts = is_first || before + search.margin < search.target,
             ends = (search.is_last && taken == search.equals) ||
                    search.above + static_cast<double>(taken) * search.each >=
                        search.target + search.margin;
  return starts && ends ? taken : 0;
}

/// Whether tokens of this sum come before the end; `open`: one cannot tell.
inline bool come_before(const PrefixSearch& search, double sum, bool is_last, bool& open) {
  const double reached = search.above + sum;
  if (!is_last && reached + search.margin < search.target) return true;
  open =
      (search.tokens > 0 && !(search.above + search.margin < search.target) && search.margin > 0) ||
      !(is_last || reached >= search.target + search.margin);
  return false;
}

/// The prefix ends with tokens of one key, of which asked.value is the logit where logits are keys.
template <typename Rows>
void end_search(Rows& divided, Index r, std::uint64_t key, double sum) {
  auto& asked = divided.asked[r];
  auto& search = divided.rows[static_cast<std::size_t>(r)].search;
  search.each = sum / static_cast<double>(search.equals);
  if (!asked.by_distance) {
    asked.value = asked.logit_of(key);
    search.each = asked.term_of(
        asked.value, token_weight(static_cast<double>(asked.value),
                                  static_cast<double>(asked.band.hi), asked.inverse_temperature));
  }
  asked.first = asked.by_distance ? 0 : asked.key(asked.band.hi);
  asked.last = key;
  finish_search(divided, r);
}

/// What the bin in which a prefix ends holds.
struct EndingBin {
  Index place;      // -1: one cannot tell
  double sum;       // of its terms
  double most;      // tokens of a rank
  bool lies_close;  // it has many of the tokens asked
};

template <typename Rows>
EndingBin find_bin(Rows& divided, Index r, const ShardAnswers& answers) {
  constexpr Index bins = problem::ShardKeys::bins;
  auto& search = divided.rows[static_cast<std::size_t>(r)].search;
  EndingBin bin{0, 0, 0, false};
  Index last = bins - 1;
  double all = 0;
  for (Index b = 0; b < bins; ++b) all += answers.sum(r, bins + b);
  while (last > 0 && answers.sum(r, bins + last) == 0) --last;
  bool open = false;
  for (; bin.place < last; ++bin.place) {
    const double tokens = answers.sum(r, bins + bin.place);
    if (tokens == 0) continue;
    const double sum = answers.sum(r, bin.place);
    if (!come_before(search, sum, false, open)) break;
    search.above += sum;
    search.tokens += tokens;
  }
  search.is_last = bin.place == last;
  if (search.is_last) come_before(search, 0, true, open);
  search.equals = 0;
  for (int rank = 0; rank < divided.ranks(); ++rank) {
    const double there = answers.of(rank, r, bins + bin.place);
    divided.counts[r * divided.ranks() + rank] = static_cast<Index>(there);
    search.equals += static_cast<Index>(there);
    bin.most = (std::max)(bin.most, there);
  }
  bin.sum = answers.sum(r, bin.place);
  bin.lies_close = 4 * static_cast<double>(search.equals) > all;
  if (open) bin.place = -1;
  return bin;
}

/// Goes on in a bin of the keys asked, of which bin_of(key) tells where it falls.
template <typename Rows, typename BinOf>
void search_bin(Rows& divided, Index r, const ShardAnswers& answers, BinOf&& bin_of) {
  auto& asked = divided.asked[r];
  const EndingBin bin = find_bin(divided, r, answers);
  if (bin.place < 0) return send_all_in_play(divided, r);
  const auto reaches = [&](Index place) {
    return
        [&bin_of, place](std::uint64_t key) { return bin_of(key) >= static_cast<double>(place); };
  };
  const std::uint64_t first = asked.first, last = asked.last;
  const bool is_last = bin.place + 1 == problem::ShardKeys::bins || !reaches(bin.place + 1)(last);
  const std::uint64_t new_first =
                          bin.place == 0 ? first : first_of(first, last, reaches(bin.place)),
                      new_last = is_last ? last : first_of(first, last, reaches(bin.place + 1)) - 1;
  const bool is_same = new_first == first && new_last == last && first != last;
  asked.first = new_first, asked.last = new_last;
  if (asked.first == asked.last) return end_search(divided, r, asked.first, bin.sum);
  if (bin.most <= static_cast<double>(problem::ShardKeys::listed))
    return ask_shards(divided, r, problem::ShardQuestion::listed);
  // what lies close is bounded, and an interval without an end
  if (is_same || bin.lies_close || !(distance_of_key(asked, asked.last) < 1e9))
    return ask_shards(divided, r, problem::ShardQuestion::bounds);
  ask_keys(divided, r);
}

/// Of bins by distance.
template <typename Rows>
void take_distances(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& asked = divided.asked[r];
  asked.first = asked.by_distance ? 0 : asked.key(asked.band.hi);
  asked.last = asked.by_distance
                   ? std::bit_cast<std::uint64_t>(std::numeric_limits<double>::infinity())
                   : asked.key(asked.band.lo);
  search_bin(divided, r, answers, [&](std::uint64_t key) {
    return asked.by_distance ? std::bit_cast<double>(key) * 2 : asked.distance(asked.logit_of(key));
  });
}

template <typename Rows>
void take_keys(Rows& divided, Index r, const ShardAnswers& answers) {
  const auto asked = divided.asked[r];  // as it was
  search_bin(divided, r, answers,
             [&](std::uint64_t key) { return distance_of_key(asked, key) * asked.per_unit; });
}

/// A logit that a rank has listed.
struct ListedLogit {
  std::uint64_t key;
  double term;
  int rank;
};

template <typename Rows>
void take_listed(Rows& divided, Index r, const ShardAnswers& answers) {
  using C = typename Rows::C;
  auto& asked = divided.asked[r];
  auto& search = divided.rows[static_cast<std::size_t>(r)].search;
  const int ranks = divided.ranks();
  Workspace::Frame frame(divided.workspace);
  ListedLogit* const listed = frame.take<ListedLogit>(search.equals);
  Index n = 0;
  for (int rank = 0; rank < ranks; ++rank)
    for (Index i = 0; i < divided.counts[r * ranks + rank]; ++i) {
      const C logit = static_cast<C>(answers.of(rank, r, i));
      const double weight =
          token_weight(static_cast<double>(logit), static_cast<double>(asked.band.hi),
                       asked.inverse_temperature);
      listed[n++] = {asked.key(logit), asked.term_of(logit, weight), rank};
    }
  std::sort(listed, listed + n,
            [](const ListedLogit& a, const ListedLogit& b) { return a.key < b.key; });
  for (Index begin = 0, end = 0; begin < n; begin = end) {
    double sum = 0;
    for (; end < n && listed[end].key == listed[begin].key; ++end) sum += listed[end].term;
    bool open = false;
    search.equals = end - begin;
    search.is_last = end == n;
    if (come_before(search, sum, search.is_last, open)) {
      search.above += sum;
      search.tokens += static_cast<double>(search.equals);
      continue;
    }
    if (open) return send_all_in_play(divided, r);
    std::fill_n(divided.counts + r * ranks, ranks, Index{0});
    for (Index i = begin; i < end; ++i) ++divided.counts[r * ranks + listed[i].rank];
    return end_search(divided, r, listed[begin].key, sum);
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
