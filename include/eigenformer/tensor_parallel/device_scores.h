/// \file
/// Log-probabilities of divided rows that stay on a GPU (device_rows.h): sums of weights, the logit
/// of a token, tokens above it, and the best of every rank.
#pragma once

#include "device_rows.h"
#include "divided_scores.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Asks all rows of which asks(r) the same.
template <typename Rows, typename Asks>
ShardAnswers ask_rows(Rows& rows, problem::RowQuestion question, Workspace::Frame& frame,
                      Asks&& asks) {
  for (Index r = 0; r < rows.count(); ++r)
    rows.asked[r].question = asks(r) ? question : problem::RowQuestion::none;
  return rows.ask_all(frame);
}

/// The `n` best tokens of every good row by their logits as given, (rows, n), best first.
template <typename Rows>
const problem::VocabularyCandidate* best_on_device(Rows& rows, Index n, Workspace::Frame& frame) {
  using Candidate = problem::VocabularyCandidate;
  const auto gathered = gather_best_candidates(rows.device, rows.logits, rows.count(),
                                               rows.sampling.vocab, n, rows.communicator, frame);
  const auto of_all = static_cast<Index>(gathered.all.size());
  Candidate* const best = frame.take<Candidate>(rows.count() * n);
  Candidate* const row = frame.take<Candidate>(of_all / rows.count());
  for (Index r = 0; r < rows.count(); ++r) {
    if (rows.rows[r].status != SampleStatus::ok) continue;
    Candidate* end = row;
    gathered.for_each(r, [&](const Candidate& each) {
      if (each.token >= 0) *end++ = each;
    });
    std::partial_sort(row, row + n, end, [](const Candidate& a, const Candidate& b) {
      return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
    });
    std::copy_n(row, n, best + r * n);
  }
  return best;
}

/// Of a row, from the answers to `scores`, and whether all its numbers are certain.
template <typename C>
struct DeviceScores {
  const problem::RowAsked<C>& asked;
  LogTotal of_given, in_play;
  bool certain = true;

  DeviceScores(const problem::RowAsked<C>& row, const ShardAnswers& sums, Index r, double error)
      : asked(row),
        of_given(sums.sum(r, 0), sums.sum(r, 1), error),
        in_play(sums.sum(r, 2), sums.sum(r, 3), error) {}

  float raw(double logit) {
    return of_given.of(static_cast<C>(logit), asked.given_best, 1.0, certain);
  }
  float processed(double logit, Index token) {
    const auto own = static_cast<C>(logit);
    if (!asked.band.contains(own, token)) return -std::numeric_limits<float>::infinity();
    return in_play.of(own, asked.band.hi, asked.inverse_temperature, certain);
  }
};

/// Draws and scores rows on a device, as score_divided_draws does; false where they have to be
/// taken to the host.
template <typename D, typename T, typename C>
bool score_draws_on_device(const D& device, const problem::Sampling<T>& sampling, const T* logits,
                           const problem::LogProbabilityOutputs& out, C& communicator,
                           Workspace& workspace) {
  using S = compute_type<T>;
  using Question = problem::RowQuestion;
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  if (!stay_on_device(sampling)) return false;
  Workspace::Frame frame(workspace);
  DeviceRows<D, T, C> rows(device, sampling, logits, communicator, workspace, frame);
  if (!rows.settle()) return false;
  const Index n = out.best;
  const auto is_good = [&](Index r) { return rows.rows[r].status == SampleStatus::ok; };
  for (Index r = 0; r < rows.count(); ++r) rows.asked[r].token = rows.rows[r].token;
  const auto sums = ask_rows(rows, Question::scores, frame, is_good);
  const auto drawn = ask_rows(rows, Question::logit, frame, is_good);
  for (Index r = 0; r < rows.count(); ++r) rows.asked[r].value = static_cast<S>(drawn.sum(r, 0));
  const auto above = ask_rows(rows, Question::above, frame, is_good);
  const problem::VocabularyCandidate* const best = n > 0 ? best_on_device(rows, n, frame) : nullptr;
  bool certain = true;
  for (Index r = 0; r < rows.count(); ++r) {
    if (!is_good(r)) {
      sampling.ids[r] = out.rank[r] = -1;
      out.raw[r] = out.processed[r] = nan;
      std::fill(out.best_ids + r * n, out.best_ids + (r + 1) * n, -1);
      std::fill(out.best_raw + r * n, out.best_raw + (r + 1) * n, nan);
      std::fill(out.best_processed + r * n, out.best_processed + (r + 1) * n, nan);
      continue;
    }
    DeviceScores<S> scores(rows.asked[r], sums, r, rows.margin(1.0));
    sampling.ids[r] = rows.rows[r].token;
    out.rank[r] = static_cast<std::int32_t>(1 + above.sum(r, 0));
    out.raw[r] = scores.raw(drawn.sum(r, 0));
    out.processed[r] = scores.processed(drawn.sum(r, 0), rows.rows[r].token);
    for (Index i = r * n; i < (r + 1) * n; ++i) {
      out.best_ids[i] = static_cast<std::int32_t>(best[i].token);
      out.best_raw[i] = scores.raw(best[i].logit);
      out.best_processed[i] = scores.processed(best[i].logit, best[i].token);
    }
    certain = certain && scores.certain;
  }
  for (Index r = 0; r < rows.count() && sampling.statuses != nullptr; ++r)
    sampling.statuses[r] = rows.rows[r].status;
  return certain;
}

/// The same of given tokens, as score_divided_tokens.
template <typename D, typename T, typename C>
bool score_tokens_on_device(const D& device, const problem::Sampling<T>& sampling, const T* logits,
                            const std::int32_t* tokens, float* output, C& communicator,
                            Workspace& workspace) {
  using S = compute_type<T>;
  using Question = problem::RowQuestion;
  if (!stay_on_device(sampling)) return false;
  Workspace::Frame frame(workspace);
  DeviceRows<D, T, C> rows(device, sampling, logits, communicator, workspace, frame);
  if (!rows.settle()) return false;
  const auto is_scored = [&](Index r) {
    return rows.rows[r].status == SampleStatus::ok && tokens[r] >= 0;
  };
  for (Index r = 0; r < rows.count(); ++r) rows.asked[r].token = tokens[r];
  const auto sums = ask_rows(rows, Question::scores, frame, is_scored);
  const auto given = ask_rows(rows, Question::logit, frame, is_scored);
  bool certain = true;
  for (Index r = 0; r < rows.count(); ++r) {
    output[r] = tokens[r] < 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    sampling.finish(r, -1, tokens[r] < 0 ? SampleStatus::ok : rows.rows[r].status);
    if (!is_scored(r)) continue;
    DeviceScores<S> scores(rows.asked[r], sums, r, rows.margin(1.0));
    output[r] = scores.processed(given.sum(r, 0), tokens[r]);
    certain = certain && scores.certain;
  }
  return certain;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
