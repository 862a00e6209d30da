/// \file
/// Continuous batching with a budget: how a server steps. One rule serves prefill and decode: a
/// request has tokens, some of them computed, and each step computes more of them, the best-ranked
/// request first, until the step's token budget is spent (chunked prefill: Agrawal et al.,
/// "Sarathi-Serve", OSDI 2024). No model inside: plans out, tokens in; the same calls give the same
/// plans.
///
///   ef::StepScheduler scheduler({.max_batch_size = 8, .token_budget = 512, .page_size = 16, .page_count = 1000});
///   const ef::RequestTicket ticket = scheduler.submit(prompt, {.max_new_tokens = 100});
///   while (scheduler.next_step(plan)) {
///     for (ef::RequestTicket t : plan.released) ...   // free what the cache holds for t
///     ...                                             // run plan.tokens through the model, append to the cache
///     scheduler.complete(sampled);                    // one StepToken for each plan row that ends its text
///   }
///   ef::FinishedRequest done = scheduler.take_finished(ticket);
///
/// Rank: higher priority first, then earlier submission. A request keeps its rank for life,
/// preempted or not. The queue is strict: nobody passes the best-ranked waiting request, and a
/// waiting request that outranks running ones takes their place where it needs it.
///
/// Pages. Where page_size > 0, a request holds the pages of its text from admission on, and one
/// more whenever it outgrows them; give the numbers of the PagedKvCache's config. Where pages run
/// out, the worst-ranked running request is preempted: it gives all of them back, waits at its rank
/// and computes its text again later. A request that could never fit alone is refused by submit. So
/// the best-ranked request always progresses, and with c = min(token_budget, prefill_chunk), a
/// request gets its first token within
///
///   ceil((prompt - prefix) / c) + sum over the better-ranked unfinished requests i of
///                                 (ceil((limit_i - prefix_i) / c) + limit_i - length_i)   steps,
///
/// limit_i the longest its text may grow, prefix what is shared: first_token_bound(ticket).
/// Better-ranked requests submitted later add theirs.
///
/// Shared prefix. Many requests begin with one system prompt, whose keys and values a sequence of
/// the cache holds already. Submit them with `shared_prefix` tokens: their rows begin at that
/// position, and pages that the prefix fills are not counted for them. Where a row's position is
/// shared_prefix and the cache holds nothing for it, fork the prefix's sequence at that length. The
/// prefix's own pages are the caller's: leave them out of page_count. Prompts that merely
/// happen to begin alike: PagedKvCache::share_prefix finds their pages; let a sequence of yours
/// hold them while the request lives, and submit with what it found as shared_prefix.
///
/// Speculative decoding. Where a row wants a token, plan.drafts says how many positions behind its
/// tokens have a page and a share of the token budget: so many draft tokens of it may be verified
/// in the same step (verify_speculative). complete() then takes the accepted tokens and the one
/// behind them, in order; truncate the cache to the accepted ones. More tokens than plan.drafts + 1
/// are taken too: those that the cache does not hold are computed by the next steps, like a prompt.
/// Drafts get, in order of rank, what budget and pages all rows of the step have left, for this
/// step only: nobody waits or is preempted for a guess.
///
/// Any thread may call any member; one thread steps. Submitting, cancelling and planning cost O(log
/// n) for each request touched.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "../core/check.h"
#include "step_plan.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

class StepScheduler {
 public:
  /// Throws std::invalid_argument for sizes below 1 (prefill_chunk, page_size, page_count: below
  /// 0).
  explicit StepScheduler(const StepSchedulerOptions& options) : options_(options) {
    const auto& o = options;
    detail::require_that(o.max_batch_size >= 1 && o.max_seq_length >= 1 && o.token_budget >= 1,
                         kName, "max_batch_size, max_seq_length, token_budget are ",
                         o.max_batch_size, ", ", o.max_seq_length, ", ", o.token_budget,
                         ", expected 1 or more each");
    detail::require_that(o.prefill_chunk >= 0 && o.page_size >= 0 && o.page_count >= 0, kName,
                         "prefill_chunk, page_size, page_count are ", o.prefill_chunk, ", ",
                         o.page_size, ", ", o.page_count, ", expected 0 or more each");
    chunk_ = o.prefill_chunk == 0 ? o.token_budget : (std::min)(o.prefill_chunk, o.token_budget);
  }

  /// Queues a request. Throws std::invalid_argument for an empty prompt, one of max_seq_length
  /// tokens or more, a negative max_new_tokens or draft_tokens, or a shared_prefix that is negative
  /// or leaves no token of the prompt; std::length_error where its longest text needs more pages
  /// than there are.
  RequestTicket submit(std::span<const std::int32_t> prompt, const SubmitOptions& options = {}) {
    detail::require_that(!prompt.empty(), kName, "the prompt is empty");
    detail::require_that(std::cmp_less(prompt.size(), options_.max_seq_length), kName,
                         "the prompt has ", prompt.size(), " tokens, max_seq_length is ",
                         options_.max_seq_length);
    detail::require_that(options.max_new_tokens >= 0, kName, "max_new_tokens is ",
                         options.max_new_tokens, ", expected 0 (no limit) or more");
    detail::require_that(options.draft_tokens >= 0, kName, "draft_tokens is ", options.draft_tokens,
                         ", expected 0 or more");
    const Index length = static_cast<Index>(prompt.size()), room = options_.max_seq_length - length,
                prefix = options.shared_prefix;
    detail::require_that(prefix >= 0 && prefix < length, kName, "shared_prefix is ", prefix,
                         ", expected 0 to ", length - 1, ": the prompt has ", length, " tokens");
    const Index limit =
        length + (options.max_new_tokens == 0 ? room : (std::min)(room, options.max_new_tokens));
    // The last token of a text is never computed, so it takes no room.
    const Index pages = pages_for(limit - 1, prefix);
    detail::require_capacity(pages <= options_.page_count || options_.page_size == 0, kName,
                             "a text of ", limit, " tokens needs ", pages, " pages, there are ",
                             options_.page_count);
    const std::lock_guard lock(mutex_);
    const Rank rank{-static_cast<std::int64_t>(options.priority), next_ticket_};
    std::set<Rank> queued{rank};
    requests_.try_emplace(next_ticket_, Request{rank,
                                                {prompt.begin(), prompt.end()},
                                                length,
                                                limit,
                                                prefix,
                                                options.draft_tokens,
                                                prefix});
    waiting_.merge(queued);
    ++statistics_.submitted;
    return next_ticket_++;
  }

  /// Ends a request that waits or runs; its text is dropped. False where there is no such request,
  /// or it has finished: cancelling twice, or too late, is no error. A step under way may still
  /// compute it; the token that step brings is ignored.
  bool cancel(RequestTicket ticket) {
    const std::lock_guard lock(mutex_);
    const auto found = requests_.find(ticket);
    if (found == requests_.end()) return false;
    const Rank rank = found->second.rank;
    if (running_.count(rank) > 0) {
      released_.push_back(ticket);
      // next_step has left room for every row of the step under way, so this cannot throw.
      if (under_way_ && found->second.wants_token()) excused_.push_back(ticket);
      give_back_pages(found->second);
      running_.erase(rank);
    } else {
      waiting_.erase(rank);
    }
    requests_.erase(found);
    ++statistics_.cancelled;
    return true;
  }

  /// Plans a step into `plan`, whose memory is reused. False where there is nothing to compute
  /// (plan.released may still name some). Throws std::invalid_argument while a step is under way.
  /// Where memory runs out, what `plan` holds is of no use, and all is as after discard_step:
  /// nothing is under way, no release is lost.
  bool next_step(StepPlan& plan) {
    const std::lock_guard lock(mutex_);
    detail::require_that(!under_way_, kName,
                         "next_step before the last one was completed or discarded");
    plan.released.clear();
    released_.reserve(released_.size() + running_.size());
    decide();
    excused_.clear();
    excused_.reserve(running_.size());
    write_plan(plan);
    plan.released.swap(released_);
    released_.clear();
    under_way_ = !plan.requests.empty();
    return under_way_;
  }

  /// Takes the tokens of the step under way: at least one for each row that wanted one, rows in any
  /// order, tokens of a row in the order of its text; those of requests cancelled meanwhile may be
  /// there or not. Throws std::invalid_argument with nothing changed: no token for a row that
  /// wanted one, one for another request, one behind a last token.
  void complete(std::span<const StepToken> sampled) {
    const std::lock_guard lock(mutex_);
    detail::require_that(under_way_, kName, "complete without a step under way");
    check_sampled(sampled);
    for (const Rank& rank : running_) {
      Request& request = request_of(rank);
      statistics_.tokens_computed += request.planned;
      request.computed += std::exchange(request.planned, 0);
    }
    for (const StepToken& result : sampled) take(result);
    ++statistics_.steps;
    under_way_ = false;
  }

  /// The step under way was not carried out: the next plan repeats it, so the cache must hold no
  /// position of it.
  void discard_step() {
    const std::lock_guard lock(mutex_);
    under_way_ = false;
  }

  bool is_finished(RequestTicket ticket) const {
    const std::lock_guard lock(mutex_);
    return finished_.count(ticket) > 0;
  }
  /// Finished and not taken, in order of submission.
  std::vector<RequestTicket> finished() const {
    const std::lock_guard lock(mutex_);
    std::vector<RequestTicket> tickets;
    for (const auto& [ticket, request] : finished_) tickets.push_back(ticket);
    return tickets;
  }
  /// Throws std::out_of_range where no finished request has this ticket.
  FinishedRequest take_finished(RequestTicket ticket) {
    const std::lock_guard lock(mutex_);
    const auto found = finished_.find(ticket);
    detail::require_known(found != finished_.end(), kName, "no finished request ", ticket);
    Request& request = found->second;
    FinishedRequest result{std::move(request.tokens), request.prompt_length, request.reason};
    finished_.erase(found);
    return result;
  }

  /// Steps within which a request that has no token yet gets one, counted from the next plan, were
  /// nobody better ranked submitted. The largest Index stands for all bounds above it: a request
  /// without a limit under a max_seq_length that is none. O(requests). Throws std::out_of_range.
  Index first_token_bound(RequestTicket ticket) const {
    const std::lock_guard lock(mutex_);
    const auto found = requests_.find(ticket);
    detail::require_known(found != requests_.end(), kName, "no request ", ticket);
    constexpr Index largest = (std::numeric_limits<Index>::max)();
    Index steps = 0;
    const auto add = [&](Index more) { steps = more > largest - steps ? largest : steps + more; };
    add(ceil_divide(found->second.prompt_length - found->second.prefix, chunk_));
    for (const auto& [other, request] : requests_)
      if (request.rank < found->second.rank) {
        add(ceil_divide(request.limit - request.prefix, chunk_));
        add(request.limit - request.length());
      }
    return steps;
  }

  StepSchedulerStatistics statistics() const {
    const std::lock_guard lock(mutex_);
    StepSchedulerStatistics result = statistics_;
    result.waiting = static_cast<Index>(waiting_.size());
    result.running = static_cast<Index>(running_.size());
    result.pages_used = pages_used_;
    return result;
  }
  const StepSchedulerOptions& options() const { return options_; }

 private:
  static constexpr const char* kName = "StepScheduler";
  struct Rank {
    std::int64_t inverse_priority;
    RequestTicket ticket;
    auto operator<=>(const Rank&) const = default;
  };
  struct Request {
    Rank rank;
    std::vector<std::int32_t> tokens;
    Index prompt_length, limit, prefix, draft_tokens;
    Index computed;                                             // prefix included
    Index planned = 0, drafts = 0, pages = 0, draft_pages = 0;  // of the last step; pages has both
    std::int64_t answered = 0;  // check that met its tokens last, and what it met
    Index answers = 0;
    bool answered_finally = false;
    FinishReason reason = FinishReason::told;

    Index length() const { return static_cast<Index>(tokens.size()); }
    bool wants_token() const { return planned > 0 && computed + planned == length(); }
  };

  static Index ceil_divide(Index a, Index b) { return a / b + (a % b != 0 ? 1 : 0); }
  /// Pages of its own that a text needs: those that its shared prefix fills are another's.
  Index pages_for(Index length, Index prefix) const {
    const Index size = options_.page_size;
    return size == 0 ? 0 : ceil_divide(length, size) - prefix / size;
  }
  Index pages_for(const Request& request, Index length) const {
    return pages_for(length, request.prefix);
  }
  Index pages_free() const { return options_.page_count - pages_used_; }
  Request& request_of(const Rank& rank) { return requests_.find(rank.ticket)->second; }

  void hold_pages(Request& request, Index pages) {
    pages_used_ += pages - request.pages;
    request.pages = pages;
    request.draft_pages = 0;
    statistics_.pages_peak = (std::max)(statistics_.pages_peak, pages_used_);
  }
  void give_back_pages(Request& request) { hold_pages(request, 0); }

  /// Puts the worst-ranked running request back into the queue. released_ has room for it.
  void preempt_worst() {
    const auto worst = std::prev(running_.end());
    Request& request = request_of(*worst);
    statistics_.tokens_discarded += request.computed - request.prefix;
    ++statistics_.preempted;
    request.computed = request.prefix;
    request.planned = request.drafts = 0;
    give_back_pages(request);
    released_.push_back(request.rank.ticket);
    waiting_.insert(running_.extract(worst));
  }

  /// Walks running and waiting requests in order of rank and sets `planned`. Preempts only requests
  /// that come later in the walk.
  void decide() {
    for (const Rank& rank : running_) {
      Request& request = request_of(rank);
      request.planned = request.drafts = 0;
      // Refused drafts are no longer in the cache: their pages are free.
      hold_pages(request, (std::max)(request.pages - request.draft_pages,
                                     pages_for(request, request.computed)));
    }
    Index budget = options_.token_budget;
    bool admitting = true;
    auto next = running_.begin();
    while (budget > 0) {
      if (admitting && !waiting_.empty() && (next == running_.end() || *waiting_.begin() < *next)) {
        const auto admitted = admit_first();
        // Where not, nothing has changed, and nobody passes the one that does not fit.
        admitting = admitted != running_.end();
        if (!admitting) continue;
        next = admitted;
      }
      if (next == running_.end()) break;
      const Rank rank = *next;
      Request& request = request_of(rank);
      const Index count = (std::min)({request.length() - request.computed, budget, chunk_});
      const Index needed = (std::max)(request.pages, pages_for(request, request.computed + count));
      while (running_.count(rank) > 0 && needed - request.pages > pages_free()) preempt_worst();
      if (running_.count(rank) == 0) break;  // it was the worst itself: nobody is left behind it
      hold_pages(request, needed);
      request.planned = count;
      budget -= count;
      next = running_.upper_bound(rank);
    }
    plan_drafts(budget);
  }

  /// Gives rows that end their text room for drafts, out of what budget and pages all rows have
  /// left.
  void plan_drafts(Index budget) {
    for (const Rank& rank : running_) {
      Request& request = request_of(rank);
      if (!request.wants_token()) continue;
      const Index length = request.length();
      Index drafts = (std::min)({request.draft_tokens, budget, request.limit - length - 1});
      if (pages_for(request, length + drafts) > request.pages + pages_free())
        drafts = (request.pages + pages_free() + request.prefix / options_.page_size) *
                     options_.page_size -
                 length;
      const Index own = request.pages;
      hold_pages(request, (std::max)(own, pages_for(request, length + drafts)));
      request.draft_pages = request.pages - own;
      budget -= request.drafts = drafts;
    }
  }

  /// Moves the best waiting request to the running ones, in place of worse-ranked ones where it
  /// must; end() where it does not fit.
  std::set<Rank>::iterator admit_first() {
    const auto first = waiting_.begin();
    Request& request = request_of(*first);
    const Index needed = pages_for(request, request.length());
    const auto fits = [&](Index running, Index free) {
      return running < options_.max_batch_size && needed <= free;
    };
    Index running = static_cast<Index>(running_.size()), free = pages_free();
    for (auto worse = running_.upper_bound(*first); worse != running_.end(); ++worse) {
      --running;
      free += request_of(*worse).pages;
    }
    if (!fits(running, free)) return running_.end();
    auto node = waiting_.extract(first);
    while (!fits(static_cast<Index>(running_.size()), pages_free())) preempt_worst();
    hold_pages(request, needed);
    return running_.insert(std::move(node)).position;
  }

  void write_plan(StepPlan& plan) {
    plan.requests.clear();
    plan.offsets.assign(1, 0);
    plan.positions.clear();
    plan.tokens.clear();
    plan.wants_token.clear();
    plan.drafts.clear();
    for (const Rank& rank : running_) {
      const Request& request = request_of(rank);
      if (request.planned == 0) continue;
      const auto first = request.tokens.begin() + request.computed;
      plan.requests.push_back(rank.ticket);
      plan.positions.push_back(request.computed);
      plan.tokens.insert(plan.tokens.end(), first, first + request.planned);
      plan.offsets.push_back(static_cast<Index>(plan.tokens.size()));
      plan.wants_token.push_back(request.wants_token() ? 1 : 0);
      plan.drafts.push_back(request.drafts);
    }
  }

  /// Everything that can go wrong with the tokens of a step, memory included.
  void check_sampled(std::span<const StepToken> sampled) {
    ++checks_;
    std::size_t wanted = 0, live = 0;
    for (const Rank& rank : running_) wanted += request_of(rank).wants_token() ? 1 : 0;
    for (const StepToken& result : sampled) {
      const auto found = requests_.find(result.request);
      if (found == requests_.end()) {
        detail::require_that(
            std::find(excused_.begin(), excused_.end(), result.request) != excused_.end(), kName,
            "a token came for request ", result.request, ", which is not running");
        continue;  // cancelled
      }
      Request& request = found->second;
      detail::require_that(request.wants_token(), kName, "a token came for request ",
                           result.request, ", which wanted none");
      if (std::exchange(request.answered, checks_) != checks_) {
        request.answers = 0;
        request.answered_finally = false;
        ++live;
      }
      detail::require_that(!request.answered_finally, kName,
                           "a token came behind the last one of request ", result.request);
      ++request.answers;
      request.answered_finally =
          result.is_finished || request.length() + request.answers == request.limit;
      const auto length = request.tokens.size() + static_cast<std::size_t>(request.answers);
      if (length > request.tokens.capacity())
        request.tokens.reserve((std::max)(length, request.tokens.size() * 2));
    }
    detail::require_that(live == wanted, kName, "tokens came for ", live, " requests, ", wanted,
                         " wanted one");
    released_.reserve(released_.size() + live);
  }

  void take(const StepToken& result) {
    const auto found = requests_.find(result.request);
    if (found == requests_.end()) return;  // cancelled
    Request& request = found->second;
    if (request.computed < request.length() && request.drafts > 0) {
      // A token follows, so the last one was a draft, and the step has computed it.
      ++request.computed;
      --request.drafts;
      ++statistics_.tokens_computed;
    }
    request.tokens.push_back(result.token);
    if (!result.is_finished && request.length() < request.limit) return;
    request.reason = result.is_finished ? FinishReason::told : FinishReason::length;
    give_back_pages(request);
    running_.erase(request.rank);
    released_.push_back(result.request);
    finished_.insert(requests_.extract(found));
    ++statistics_.finished;
  }

  StepSchedulerOptions options_;
  Index chunk_ = 0;
  mutable std::mutex mutex_;
  std::map<RequestTicket, Request> requests_;  // waiting and running
  std::map<RequestTicket, Request> finished_;
  // nodes move from one to the other, which neither allocates nor throws
  std::set<Rank> waiting_, running_;
  std::vector<RequestTicket> released_;
  std::vector<RequestTicket> excused_;  // wanted a token of the step under way and were cancelled
  bool under_way_ = false;
  Index pages_used_ = 0;
  RequestTicket next_ticket_ = 0;
  std::int64_t checks_ = 0;
  StepSchedulerStatistics statistics_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
