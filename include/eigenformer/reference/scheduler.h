/// \file
/// Continuous batching as the notebook means it, and the rules of StepScheduler, in vectors and
/// linear searches: what the tests and a doubting user compare with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/error.h"
#include "../core/tensor.h"
#include "../scheduler/step_scheduler.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

struct ContinuousBatchScheduler {
  struct Request {
    std::string id;
    std::vector<std::int32_t> tokens;
  };
  Index max_batch_size, max_seq_length;
  std::vector<Request> active, waiting, finished;

  static Index position(const std::vector<Request>& list, const std::string& id) {
    for (std::size_t i = 0; i < list.size(); ++i)
      if (list[i].id == id) return static_cast<Index>(i);
    return -1;
  }
  bool known(const std::string& id) const {
    return position(active, id) + position(waiting, id) + position(finished, id) > -3;
  }
  bool can_add_more_requests() const { return static_cast<Index>(active.size()) < max_batch_size; }

  void add_request(const std::string& id, const std::vector<std::int32_t>& prompt) {
    if (known(id) || prompt.empty() || static_cast<Index>(prompt.size()) >= max_seq_length)
      eigenformer::detail::fail<std::invalid_argument>(id);
    (can_add_more_requests() ? active : waiting).push_back({id, prompt});
  }

  void update_batch(const std::string& id, std::int32_t token, bool is_finished) {
    if (!known(id)) eigenformer::detail::fail<std::out_of_range>(id);
    const Index at = position(active, id);
    if (at < 0) eigenformer::detail::fail<std::invalid_argument>(id);
    Request& request = active[static_cast<std::size_t>(at)];
    request.tokens.push_back(token);
    if (!is_finished && static_cast<Index>(request.tokens.size()) < max_seq_length) return;
    finished.push_back(request);
    if (waiting.empty()) {
      active.erase(active.begin() + at);
    } else {
      request = waiting.front();
      waiting.erase(waiting.begin());
    }
  }

  std::vector<std::int32_t> take_finished(const std::string& id) {
    if (!known(id)) eigenformer::detail::fail<std::out_of_range>(id);
    const Index at = position(finished, id);
    if (at < 0) eigenformer::detail::fail<std::invalid_argument>(id);
    const auto tokens = finished[static_cast<std::size_t>(at)].tokens;
    finished.erase(finished.begin() + at);
    return tokens;
  }
};

/// StepScheduler without lists, counts and ranks kept up to date: all requests ever submitted in
/// one vector, in order of ticket, and everything else found by looking through it. Arguments are
/// taken as good; `complete` says whether they are.
struct StepScheduler {
  enum class State { waiting, running, finished, cancelled, taken };
  struct Request {
    std::vector<std::int32_t> tokens;
    SubmitOptions options;
    Index prompt_length, limit, computed;
    State state = State::waiting;
    Index planned = 0, drafts = 0;
    Index pages = 0, draft_pages = 0;  // the former include the latter
    bool was_planned_and_cancelled = false;
    FinishReason reason = FinishReason::told;

    Index length() const { return static_cast<Index>(tokens.size()); }
    bool wants_token() const { return planned > 0 && computed + planned == length(); }
  };
  StepSchedulerOptions options;
  std::vector<Request> requests;  // [ticket]
  std::vector<RequestTicket> released;
  bool under_way = false;
  StepSchedulerStatistics counts;  // all but waiting, running and pages_used, which are recounted

  Request& at(RequestTicket ticket) { return requests[static_cast<std::size_t>(ticket)]; }
  const Request& at(RequestTicket ticket) const {
    return requests[static_cast<std::size_t>(ticket)];
  }
  RequestTicket end() const { return static_cast<RequestTicket>(requests.size()); }

  /// a is served before b.
  bool outranks(RequestTicket a, RequestTicket b) const {
    if (at(a).options.priority != at(b).options.priority)
      return at(a).options.priority > at(b).options.priority;
    return a < b;
  }
  /// All requests in one state, the best ranked first.
  std::vector<RequestTicket> in_state(State state) const {
    std::vector<RequestTicket> tickets;
    for (RequestTicket t = 0; t < end(); ++t)
      if (at(t).state == state) tickets.push_back(t);
    std::sort(tickets.begin(), tickets.end(),
              [&](RequestTicket a, RequestTicket b) { return outranks(a, b); });
    return tickets;
  }
  Index pages_used() const {
    Index pages = 0;
    for (const Request& request : requests) pages += request.pages;
    return pages;
  }
  /// Pages of positions [0, length), counted one by one, that the shared prefix does not fill.
  Index pages_of(const Request& request, Index length) const {
    Index pages = 0;
    if (options.page_size == 0) return 0;
    for (Index first = 0; first < length; first += options.page_size)
      if (first + options.page_size > request.options.shared_prefix) ++pages;
    return pages;
  }
  void hold(Request& request, Index pages) {
    request.pages = pages;
    counts.pages_peak = (std::max)(counts.pages_peak, pages_used());
  }

  RequestTicket submit(const std::vector<std::int32_t>& prompt, const SubmitOptions& how) {
    const Index length = static_cast<Index>(prompt.size());
    Index limit = options.max_seq_length;
    if (how.max_new_tokens > 0 && length + how.max_new_tokens < limit)
      limit = length + how.max_new_tokens;
    requests.push_back({prompt, how, length, limit, how.shared_prefix});
    ++counts.submitted;
    return end() - 1;
  }

  bool cancel(RequestTicket ticket) {
    if (ticket < 0 || ticket >= end()) return false;
    Request& request = at(ticket);
    if (request.state != State::waiting && request.state != State::running) return false;
    if (request.state == State::running) released.push_back(ticket);
    request.was_planned_and_cancelled = under_way && request.wants_token();
    request.state = State::cancelled;
    request.pages = 0;
    ++counts.cancelled;
    return true;
  }

  void preempt(RequestTicket ticket) {
    Request& request = at(ticket);
    counts.tokens_discarded += request.computed - request.options.shared_prefix;
    ++counts.preempted;
    request.computed = request.options.shared_prefix;
    request.planned = request.drafts = request.pages = 0;
    request.state = State::waiting;
    released.push_back(ticket);
  }

  /// There is a place in the batch and there are `pages` for one more request.
  bool fits(Index pages) const {
    return static_cast<Index>(in_state(State::running).size()) < options.max_batch_size &&
           pages <= options.page_count - pages_used();
  }

  /// A waiting request starts to run, in place of the worst-ranked ones below it where it must.
  /// False, and nothing has changed, where it would not fit even if all of those went.
  bool admit(RequestTicket ticket) {
    const Index pages = pages_of(at(ticket), at(ticket).length());
    StepScheduler without = *this;
    for (RequestTicket other : in_state(State::running))
      if (outranks(ticket, other)) without.preempt(other);
    if (!without.fits(pages)) return false;
    while (!fits(pages)) preempt(in_state(State::running).back());
    at(ticket).state = State::running;
    hold(at(ticket), pages);
    return true;
  }

  /// Plans `ticket`, which runs. False where it had to give up its own place.
  bool plan(RequestTicket ticket, Index& budget) {
    Request& request = at(ticket);
    const Index chunk = options.prefill_chunk == 0 ? options.token_budget : options.prefill_chunk;
    Index count = request.length() - request.computed;
    if (count > budget) count = budget;
    if (count > chunk) count = chunk;
    const Index pages = (std::max)(request.pages, pages_of(request, request.computed + count));
    while (pages - request.pages > options.page_count - pages_used()) {
      const RequestTicket worst = in_state(State::running).back();
      preempt(worst);
      if (worst == ticket) return false;
    }
    hold(request, pages);
    request.planned = count;
    budget -= count;
    return true;
  }

  /// Room for drafts of `ticket`, which runs, out of what is left.
  void plan_drafts(RequestTicket ticket, Index& budget) {
    Request& request = at(ticket);
    while (request.wants_token() && request.drafts < request.options.draft_tokens && budget > 0 &&
           request.length() + request.drafts + 1 < request.limit) {  // one draft more
      const Index more = pages_of(request, request.length() + request.drafts + 1);
      if (more - request.pages > options.page_count - pages_used()) break;
      request.draft_pages += (std::max)(request.pages, more) - request.pages;
      hold(request, (std::max)(request.pages, more));
      ++request.drafts;
      --budget;
    }
  }

  bool next_step(StepPlan& result) {
    for (Request& request : requests) {
      request.planned = request.drafts = 0;
      // Refused drafts are no longer in the cache.
      if (request.state == State::running)
        request.pages =
            (std::max)(request.pages - request.draft_pages, pages_of(request, request.computed));
      request.draft_pages = 0;
    }
    Index budget = options.token_budget;
    bool queue_moves = true;
    RequestTicket last = -1;  // visited last: the walk goes down the ranks
    while (budget > 0) {
      RequestTicket next = -1;
      for (RequestTicket t = 0; t < end(); ++t) {
        const bool candidate =
            at(t).state == State::running || (at(t).state == State::waiting && queue_moves);
        if (candidate && (last < 0 || outranks(last, t)) && (next < 0 || outranks(t, next)))
          next = t;
      }
      if (next < 0) break;
      if (at(next).state == State::waiting && !admit(next)) {
        queue_moves = false;  // nobody passes it
        continue;
      }
      if (!plan(next, budget)) break;
      last = next;
    }
    for (RequestTicket t : in_state(State::running)) plan_drafts(t, budget);
    result = {};
    result.offsets.push_back(0);
    for (RequestTicket t : in_state(State::running)) {
      const Request& request = at(t);
      if (request.planned == 0) continue;
      result.requests.push_back(t);
      result.positions.push_back(request.computed);
      for (Index j = 0; j < request.planned; ++j)
        result.tokens.push_back(request.tokens[static_cast<std::size_t>(request.computed + j)]);
      result.offsets.push_back(static_cast<Index>(result.tokens.size()));
      result.wants_token.push_back(request.wants_token());
      result.drafts.push_back(request.drafts);
    }
    result.released = released;
    released.clear();
    under_way = !result.requests.empty();
    for (Request& request : requests) request.was_planned_and_cancelled = false;
    return under_way;
  }

  /// False where the tokens are refused.
  bool complete(std::span<const StepToken> sampled) {
    if (!under_way) return false;
    StepScheduler after = *this;
    std::vector<RequestTicket> unanswered;
    for (RequestTicket t : in_state(State::running))
      if (at(t).wants_token()) unanswered.push_back(t);
    for (Request& request : after.requests) {
      if (request.state != State::running) continue;
      after.counts.tokens_computed += request.planned;
      request.computed += request.planned;
    }
    for (const StepToken& token : sampled) {
      if (token.request < 0 || token.request >= end()) return false;
      if (at(token.request).was_planned_and_cancelled) continue;
      Request& request = after.at(token.request);
      if (request.state != State::running || !at(token.request).wants_token()) return false;
      std::erase(unanswered, token.request);
      // Tokens of this step so far: each but the last was a draft, computed if there was room for
      // it.
      const Index before = request.length() - at(token.request).length();
      if (before >= 1 && before <= request.drafts) {
        ++request.computed;
        ++after.counts.tokens_computed;
      }
      request.tokens.push_back(token.token);
      if (!token.is_finished && request.length() < request.limit) continue;
      request.reason = token.is_finished ? FinishReason::told : FinishReason::length;
      request.state = State::finished;
      request.pages = 0;
      after.released.push_back(token.request);
      ++after.counts.finished;
    }
    if (!unanswered.empty()) return false;
    after.under_way = false;
    ++after.counts.steps;
    *this = after;
    return true;
  }

  Index first_token_bound(RequestTicket ticket) const {
    const Index chunk = options.prefill_chunk == 0
                            ? options.token_budget
                            : (std::min)(options.prefill_chunk, options.token_budget);
    const auto steps_for = [&](Index tokens) { return (tokens + chunk - 1) / chunk; };
    Index steps = steps_for(at(ticket).prompt_length - at(ticket).options.shared_prefix);
    for (RequestTicket t = 0; t < end(); ++t) {
      const Request& better = at(t);
      if (better.state != State::waiting && better.state != State::running) continue;
      if (outranks(t, ticket))
        steps +=
            steps_for(better.limit - better.options.shared_prefix) + better.limit - better.length();
    }
    return steps;
  }

  StepSchedulerStatistics statistics() const {
    StepSchedulerStatistics result = counts;
    result.waiting = static_cast<Index>(in_state(State::waiting).size());
    result.running = static_cast<Index>(in_state(State::running).size());
    result.pages_used = pages_used();
    return result;
  }
};

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
