/// \file
/// Beam search: the `beams` most likely continuations of every sequence, kept step by step (Graves,
/// "Sequence Transduction with Recurrent Neural Networks", 2012; length normalisation of Wu et al.,
/// "Google's Neural Machine Translation System", 2016, in the form of Hugging Face transformers,
/// whose results these are, up to its rounding of sums in float). Each step, for each sequence:
///
///   candidates   (beam, token): s = score of the beam + log p(token | beam); the best
///                max(2, 1 + end tokens) * beams of them, best first
///   finished     of the first `beams` candidates those that end, by an end token or by being
///                max_new_tokens long: score s / length^length_penalty, the end token counts; the
///                best `beams` of all steps are kept, the earlier of equals
///   next beams   the first `beams` candidates that do not end
///   done         when `beams` are finished, and BeamStopping says so
///
///   ef::BeamSearch search(batch, {.beams = 4, .max_new_tokens = 100, .end_tokens = {2}});
///   while (!search.done()) {
///     ef::log_softmax_into(device, scores, logits);   // (batch * beams, vocab): row b * beams + i
///     search.step(device, scores);                    // is beam i of sequence b
///     cache.select(search.parents());                 // KvCache: the rows that live on
///     logits = model(search.tokens(), cache);         // one token each
///   }
///   std::vector<ef::Hypothesis> best = search.hypotheses(b);
///
/// At the first step all beams of a sequence are one: the scores may then have `batch` rows, of
/// which parents() speaks, or batch * beams with the same rows `beams` times. Processors and
/// penalties of the caller's change the scores before step; rows need not sum to 1.
///
/// Candidates of one score: lower beam first, then as top_k orders its row (lowest token). Sums are
/// doubles. A candidate at -infinity is none; where fewer than `beams` are left, the other beams
/// have score -infinity and any token. Beams of a sequence that is done are such, too.
///
/// The scores are float, double, bfloat16 or half, memory of the device; all else is the host's.
/// Costs top_k of every row (on the device; the host waits for beams * (1 + end tokens) numbers of
/// each row) and O(log) for each candidate; a beam is kept as its last token and a link.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "core/values.h"
#include "top_k.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// When a sequence that has `beams` finished hypotheses is done. In brackets transformers'
/// early_stopping.
enum class BeamStopping : std::uint8_t {
  heuristic,  ///< when the best beam, ended now, would score no better than the worst (False)
  early,      ///< at once (True)
  /// when no beam can score better at any length to come; as heuristic at length_penalty <= 0
  /// ("never")
  never
};

struct BeamSearchOptions {
  Index beams = 4;
  double length_penalty = 1;  ///< above 0 it favours long sequences, below 0 short ones
  Index max_new_tokens = 128;
  Values<std::int32_t> end_tokens = {};
  BeamStopping stopping = BeamStopping::heuristic;
};

/// A finished continuation.
struct Hypothesis {
  std::vector<std::int32_t> tokens;  ///< the end token, where there is one, is the last
  double log_probability;            ///< sum over its tokens
  double score;                      ///< log_probability / length^length_penalty
};

class BeamSearch {
 public:
  /// Throws std::invalid_argument for options out of range.
  explicit BeamSearch(Index batch, const BeamSearchOptions& options = {})
      : batch_(batch),
        beams_(options.beams),
        max_new_tokens_(options.max_new_tokens),
        length_penalty_(options.length_penalty),
        stopping_(options.stopping),
        end_tokens_(options.end_tokens.begin(), options.end_tokens.end()) {
    const auto at_least = [](std::string_view argument, Index value, Index least) {
      detail::require_that(value >= least, kName, argument, " is ", value, ", expected ", least,
                           " or more");
    };
    at_least("batch", batch, 0);
    at_least("beams", beams_, 1);
    at_least("max_new_tokens", max_new_tokens_, 1);
    detail::require_that(std::isfinite(length_penalty_), kName, "length_penalty is ",
                         length_penalty_, ", expected a finite number");
    for (const std::int32_t token : end_tokens_) at_least("an end token", token, 0);
    const auto rows =
        static_cast<std::size_t>(detail::checked_product(batch, beams_, kName, "batch * beams"));
    parents_.resize(rows);
    tokens_.resize(static_cast<Index>(rows));
    scores_.resize(rows);
    next_.resize(rows);
    groups_.resize(static_cast<std::size_t>(batch));
    for (Group& group : groups_) group.finished.reserve(static_cast<std::size_t>(beams_) + 1);
    history_.reserve((std::min)(rows * static_cast<std::size_t>(max_new_tokens_), kReserved));
    for (std::size_t i = 0; i < rows; ++i)
      scores_[i] = i % static_cast<std::size_t>(beams_) == 0 ? 0.0 : kNone;
  }

  /// One step, from the log-probabilities of the next token of every beam, (batch * beams, vocab),
  /// at the first step (batch, vocab) too. Throws std::invalid_argument, with nothing changed, for
  /// other shapes, a row that holds NaN or +infinity (of a sequence not done), and a search that is
  /// done.
  template <Device D, typename Scores>
  void step(const D& device, const Scores& log_probabilities,
            Workspace& workspace = thread_workspace()) {
    const auto input = input_view<2>(log_probabilities);
    using T = scalar_of<decltype(input)>;
    detail::checked_size(kName, "log_probabilities", input);
    const Index rows = input.dimension(0), vocab = input.dimension(1);
    check_step(rows, vocab);
    const Index most = candidates() < vocab ? candidates() : vocab;
    auto frame = detail::tensor_frame(device, workspace);
    T* values = frame.template take<T>(rows * most);
    std::int32_t* ids = frame.template take<std::int32_t>(rows * most);
    top_k_into(device, TensorView<T, 2>(values, rows, most),
               TensorView<std::int32_t, 2>(ids, rows, most), input, {}, {}, workspace);
    Workspace::Frame host(workspace);
    if constexpr (!CpuDevice<D>) {
      values = fetched(device, host, values, rows * most);
      ids = fetched(device, host, ids, rows * most);
    }
    step_by_best(TensorView<const T, 2>(values, rows, most),
                 TensorView<const std::int32_t, 2>(ids, rows, most), workspace);
  }

  /// How many of the best of a row a step looks at, where it has so many.
  Index candidates() const {
    return (std::max)(Index{2}, 1 + static_cast<Index>(end_tokens_.size())) * beams_;
  }
  /// Throws what step throws for these sizes.
  void check_step(Index rows, Index vocab) const {
    detail::require_that(!done(), kName, "the search is done after ", steps_, " steps");
    detail::require_that((steps_ == 0 && rows == batch_) || rows == batch_ * beams_, kName,
                         "log_probabilities has ", rows, " rows, expected ", batch_ * beams_,
                         ", one for each beam");
    detail::require_that(vocab >= 1, kName, "log_probabilities has no columns");
  }
  /// The step from what top_k gives for the log-probabilities, memory of the host:
  /// min(candidates(), vocab) of each row, best first, ids of -1 where a row holds NaN.
  template <typename Values, typename Ids>
  void step_by_best(const Values& values, const Ids& ids,
                    Workspace& workspace = thread_workspace()) {
    const auto best = input_view<2>(values);
    const auto places = input_view<2>(ids);
    const Index rows = best.dimension(0), most = best.dimension(1);
    detail::require_same_shape(kName, "ids", places, "values", best);
    check_step(rows, most);
    Workspace::Frame frame(workspace);
    const Index of_group = steps_ == 0 && rows == batch_ ? 1 : beams_;
    require_numbers(best.data(), places.data(), most, of_group);
    Candidate* const all = frame.take<Candidate>(of_group * most);
    for (Index b = 0; b < batch_; ++b)
      advance(b, best_candidates(b, best.data(), places.data(), most, of_group, all), all,
              b * of_group);
    finish_step();
  }

  bool done() const {
    return std::all_of(groups_.begin(), groups_.end(), [](const Group& g) { return g.done; });
  }
  bool done(Index sequence) const { return group(sequence).done; }
  Index steps() const { return steps_; }

  /// The row of the last step's scores that beam i goes on from, (batch * beams).
  std::span<const Index> parents() const { return parents_; }
  /// The token it goes on with, (batch * beams).
  const Tensor<std::int32_t, 1>& tokens() const { return tokens_; }
  /// The sum of its log-probabilities, (batch * beams); best first in each sequence.
  std::span<const double> scores() const { return scores_; }

  /// What is finished of a sequence, best first, at most `beams`. Allocates.
  std::vector<Hypothesis> hypotheses(Index sequence) const {
    std::vector<Hypothesis> result;
    for (const Finished& finished : group(sequence).finished) {
      Hypothesis hypothesis{{finished.token}, finished.sum, finished.score};
      for (Index at = finished.parent; at >= 0; at = history_[static_cast<std::size_t>(at)].parent)
        hypothesis.tokens.push_back(history_[static_cast<std::size_t>(at)].token);
      std::reverse(hypothesis.tokens.begin(), hypothesis.tokens.end());
      result.push_back(std::move(hypothesis));
    }
    return result;
  }

 private:
  static constexpr std::string_view kName = "beam_search";
  static constexpr double kNone = -std::numeric_limits<double>::infinity();
  static constexpr std::size_t kReserved = std::size_t{1} << 16;

  struct Candidate {
    double sum;
    Index beam, place;  // in the group; in the row of its beam
    std::int32_t token;
  };
  struct Token {
    Index parent;  // in the history, -1: none
    std::int32_t token;
  };
  struct Finished {
    Index parent;
    std::int32_t token;
    double sum, score;
  };
  struct Group {
    std::vector<Finished> finished;
    bool done = false;
  };

  const Group& group(Index sequence) const {
    detail::require_that(sequence >= 0 && sequence < batch_, kName, "sequence is ", sequence,
                         ", expected 0 to ", batch_ - 1);
    return groups_[static_cast<std::size_t>(sequence)];
  }
  bool ends(std::int32_t token) const {
    return std::find(end_tokens_.begin(), end_tokens_.end(), token) != end_tokens_.end();
  }
  double score(double sum, Index length) const {
    return sum / std::pow(static_cast<double>(length), length_penalty_);
  }

  template <Device D, typename V>
  static V* fetched(const D& device, Workspace::Frame& frame, const V* on_device, Index count) {
    V* const host = frame.take<V>(count);
    detail::to_host(device, kName.data(), host, on_device, count);
    return host;
  }

  template <typename T>
  void require_numbers(const T* values, const std::int32_t* ids, Index most, Index of_group) const {
    for (Index r = 0; r < batch_ * of_group; ++r) {
      if (groups_[static_cast<std::size_t>(r / of_group)].done) continue;
      detail::require_that(ids[r * most] >= 0, kName, "log_probabilities row ", r, " holds NaN");
      detail::require_that(static_cast<double>(values[r * most]) < -kNone, kName,
                           "log_probabilities row ", r, " holds +infinity");
    }
  }

  /// The best of a group into `all`, best first; how many there are.
  template <typename T>
  Index best_candidates(Index b, const T* values, const std::int32_t* ids, Index most,
                        Index of_group, Candidate* all) const {
    Index n = 0;
    for (Index beam = 0; beam < of_group; ++beam)
      for (Index place = 0; place < most; ++place) {
        const Index at = (b * of_group + beam) * most + place;
        const double sum =
            scores_[static_cast<std::size_t>(b * beams_ + beam)] + static_cast<double>(values[at]);
        if (sum > kNone) all[n++] = {sum, beam, place, ids[at]};
      }
    const Index best = (std::min)(n, candidates());
    std::partial_sort(all, all + best, all + n, [](const Candidate& x, const Candidate& y) {
      return x.sum != y.sum ? x.sum > y.sum
                            : (x.beam != y.beam ? x.beam < y.beam : x.place < y.place);
    });
    return best;
  }

  /// Finishes and goes on with the candidates of one group, whose scores begin at first_row.
  void advance(Index b, Index count, const Candidate* all, Index first_row) {
    Group& own = groups_[static_cast<std::size_t>(b)];
    const Index length = steps_ + 1;
    const bool last = length == max_new_tokens_;
    Index live = 0;
    for (Index i = 0; i < count && live < beams_ && !own.done; ++i) {
      const Index row = first_row + all[i].beam;
      if (!last && !ends(all[i].token)) {
        set_beam(b * beams_ + live++, row, all[i].token, all[i].sum);
      } else if (i < beams_) {
        const double scored = score(all[i].sum, length);
        const auto at = std::upper_bound(own.finished.begin(), own.finished.end(), scored,
                                         [](double s, const Finished& f) { return s > f.score; });
        own.finished.insert(at, {parent_of(b, all[i].beam), all[i].token, all[i].sum, scored});
        if (static_cast<Index>(own.finished.size()) > beams_) own.finished.pop_back();
      }
    }
    own.done = own.done || last || live == 0 || stops(b, own, length);
    if (own.done) live = 0;
    const std::int32_t none = end_tokens_.empty() ? 0 : end_tokens_[0];
    for (; live < beams_; ++live) set_beam(b * beams_ + live, first_row, none, kNone);
  }

  Index parent_of(Index b, Index beam) const {
    return steps_ == 0 ? -1 : (steps_ - 1) * batch_ * beams_ + b * beams_ + beam;
  }

  /// Whether a group that has `beams` finished is done, from the best of its next beams.
  bool stops(Index b, const Group& own, Index length) const {
    if (static_cast<Index>(own.finished.size()) < beams_) return false;
    if (stopping_ == BeamStopping::early) return true;
    const bool longest = stopping_ == BeamStopping::never && length_penalty_ > 0;
    return score(next_[static_cast<std::size_t>(b * beams_)], longest ? max_new_tokens_ : length) <=
           own.finished.back().score;
  }

  void set_beam(Index i, Index row, std::int32_t token, double sum) {
    parents_[static_cast<std::size_t>(i)] = row;
    tokens_(i) = token;
    next_[static_cast<std::size_t>(i)] = sum;
  }

  void finish_step() {
    const Index before = (steps_ - 1) * batch_ * beams_;
    const bool by_sequence = steps_ == 0;
    for (std::size_t i = 0; i < parents_.size(); ++i)
      history_.push_back({by_sequence ? -1 : before + parents_[i], tokens_(static_cast<Index>(i))});
    scores_.swap(next_);
    ++steps_;
  }

  Index batch_, beams_, max_new_tokens_, steps_ = 0;
  double length_penalty_;
  BeamStopping stopping_;
  std::vector<std::int32_t> end_tokens_;
  std::vector<Index> parents_;
  Tensor<std::int32_t, 1> tokens_;
  std::vector<double> scores_, next_;  // next_: of the step under way
  std::vector<Group> groups_;
  std::vector<Token> history_;  // (steps, batch * beams)
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
