// Law: any history of calls gives what the plain model gives: each plan with its requests, tokens,
// positions and releases, each refusal, each bound, each statistic. Beside it, small plans and
// bounds worked out by hand, so that the two cannot be wrong alike.
#include <eigenformer/reference/scheduler.h>
#include <eigenformer/scheduler.h>

#include <numeric>
#include <random>

#include "compare.h"

using namespace eigenformer_test;

namespace {

using Tokens = std::vector<std::int32_t>;
using Tickets = std::vector<ef::RequestTicket>;
using Model = ef::reference::StepScheduler;

void expect_equal(const ef::StepPlan& plan, const ef::StepPlan& expected) {
  ASSERT_EQ(plan.released, expected.released);
  ASSERT_EQ(plan.requests, expected.requests);
  ASSERT_EQ(plan.offsets, expected.offsets);
  ASSERT_EQ(plan.positions, expected.positions);
  ASSERT_EQ(plan.tokens, expected.tokens);
  ASSERT_EQ(plan.wants_token, expected.wants_token);
  ASSERT_EQ(plan.drafts, expected.drafts);
}

void expect_equal(const ef::StepSchedulerStatistics& a, const ef::StepSchedulerStatistics& b) {
  ASSERT_EQ(a.waiting, b.waiting);
  ASSERT_EQ(a.running, b.running);
  ASSERT_EQ(a.pages_used, b.pages_used);
  ASSERT_EQ(a.pages_peak, b.pages_peak);
  ASSERT_EQ(a.submitted, b.submitted);
  ASSERT_EQ(a.finished, b.finished);
  ASSERT_EQ(a.cancelled, b.cancelled);
  ASSERT_EQ(a.preempted, b.preempted);
  ASSERT_EQ(a.steps, b.steps);
  ASSERT_EQ(a.tokens_computed, b.tokens_computed);
  ASSERT_EQ(a.tokens_discarded, b.tokens_discarded);
}

template <typename Exception, typename F>
bool throws(F&& f) {
  try {
    f();
    return false;
  } catch (const Exception&) {
    return true;
  }
}

/// How often the rare things happened, over all histories: a load that never reaches them tests
/// nothing.
struct Reached {
  int steps = 0, preempted = 0, told = 0, length = 0, refused = 0, too_long = 0, discarded = 0,
      cancelled_in_flight = 0, several_tokens = 0, drafts = 0, outranked_after_discard = 0;
};

/// One scheduler and its model, fed with the same random calls.
struct History {
  History(unsigned seed, Reached& reached_so_far)
      : random(seed), options(random_options()), scheduler(options), reached(reached_so_far) {
    model.options = options;
  }

  std::mt19937 random;
  ef::StepSchedulerOptions options;
  ef::StepScheduler scheduler;
  Model model;
  Reached& reached;
  ef::StepPlan plan, expected;
  bool discarded_last = false;

  Index pick(Index n) { return static_cast<Index>(random() % static_cast<unsigned>(n)); }
  ef::RequestTicket any_ticket() { return pick(model.end() + 2) - 1; }  // some that never were

  ef::StepSchedulerOptions random_options() {
    ef::StepSchedulerOptions o;
    o.max_batch_size = 1 + pick(4);
    o.max_seq_length = 2 + pick(24);
    o.token_budget = 1 + pick(12);
    o.prefill_chunk = pick(2) == 0 ? 0 : pick(15);
    o.page_size = pick(4);
    // Now and then too few for the longest text, mostly too few for all texts at once.
    o.page_count = o.page_size == 0 ? pick(3) : pick(4) + o.max_seq_length / o.page_size;
    return o;
  }

  void submit() {
    Tokens prompt(static_cast<std::size_t>(1 + pick(options.max_seq_length - 1)));
    for (auto& token : prompt) token = static_cast<std::int32_t>(random());
    const Index length = static_cast<Index>(prompt.size());
    ef::SubmitOptions how;
    how.priority = static_cast<int>(pick(3)) - 1;
    how.max_new_tokens = pick(9);
    if (pick(3) == 0) how.shared_prefix = pick(length);
    if (pick(3) == 0) how.draft_tokens = pick(5);
    Model after = model;
    const auto ticket = after.submit(prompt, how);
    const auto& request = after.at(ticket);
    if (options.page_size > 0 && after.pages_of(request, request.limit - 1) > options.page_count) {
      ASSERT_TRUE(throws<std::length_error>([&] { scheduler.submit(prompt, how); }));
      ++reached.too_long;
      return;
    }
    ASSERT_EQ(scheduler.submit(prompt, how), ticket);
    reached.outranked_after_discard += discarded_last && how.priority == 1;
    model = after;
  }

  void cancel() {
    const auto ticket = any_ticket();
    const bool was_there = model.cancel(ticket);
    ASSERT_EQ(scheduler.cancel(ticket), was_there);
    if (was_there) reached.cancelled_in_flight += model.at(ticket).was_planned_and_cancelled;
  }

  void next_step() {
    ASSERT_EQ(scheduler.next_step(plan), model.next_step(expected));
    ASSERT_NO_FATAL_FAILURE(expect_equal(plan, expected));
    for (Index drafts : plan.drafts) reached.drafts += drafts > 0;
    discarded_last = false;
  }

  /// Tokens that fit the plan, most of the time.
  std::vector<ef::StepToken> sample() {
    std::vector<std::vector<ef::StepToken>> rows;
    for (std::size_t i = 0; i < plan.requests.size(); ++i) {
      const auto ticket = plan.requests[i];
      const bool cancelled = model.at(ticket).state == Model::State::cancelled;
      if (plan.wants_token[i] == 0 || (cancelled && pick(2) == 0)) continue;
      const Index room = model.at(ticket).limit - model.at(ticket).length();
      const Index count = std::min(room, 1 + pick(plan.drafts[i] + (pick(6) == 0 ? 3 : 1)));
      reached.several_tokens += count > 1;
      std::vector<ef::StepToken> row;
      for (Index j = 0; j < count; ++j)
        row.push_back({ticket, static_cast<std::int32_t>(random()), false});
      row.back().is_finished = pick(8) == 0;
      rows.push_back(row);
    }
    std::shuffle(rows.begin(), rows.end(), random);
    std::vector<ef::StepToken> sampled;
    for (const auto& row : rows) sampled.insert(sampled.end(), row.begin(), row.end());
    if (pick(4) == 0) {  // and now a fault
      const auto at = sampled.begin() + pick(static_cast<Index>(sampled.size()) + 1);
      if (pick(3) == 0 && at != sampled.end())
        sampled.erase(at);
      else
        sampled.insert(at, {any_ticket(), 7, pick(2) == 0});
    }
    return sampled;
  }

  void complete() {
    const auto sampled = sample();
    Model after = model;
    const bool good = after.complete(sampled);
    ASSERT_EQ(throws<std::invalid_argument>([&] { scheduler.complete(sampled); }), !good);
    reached.refused += !good;
    if (!good) return;
    model = after;
    ++reached.steps;
  }

  void discard() {
    scheduler.discard_step();
    reached.discarded += model.under_way;
    discarded_last = model.under_way;
    model.under_way = false;
  }

  void take() {
    const auto ticket = any_ticket();
    const bool there =
        ticket >= 0 && ticket < model.end() && model.at(ticket).state == Model::State::finished;
    ASSERT_EQ(scheduler.is_finished(ticket), there);
    if (!there) {
      ASSERT_TRUE(throws<std::out_of_range>([&] { scheduler.take_finished(ticket); }));
      return;
    }
    const auto done = scheduler.take_finished(ticket);
    auto& request = model.at(ticket);
    ASSERT_EQ(done.tokens, request.tokens);
    ASSERT_EQ(done.prompt_length, request.prompt_length);
    ASSERT_EQ(done.reason, request.reason);
    request.state = Model::State::taken;
    (done.reason == ef::FinishReason::told ? reached.told : reached.length) += 1;
  }

  void check() {
    ASSERT_NO_FATAL_FAILURE(expect_equal(scheduler.statistics(), model.statistics()));
    auto finished = model.in_state(Model::State::finished);
    std::sort(finished.begin(), finished.end());
    ASSERT_EQ(scheduler.finished(), finished);
    const auto ticket = any_ticket();
    const bool there = ticket >= 0 && ticket < model.end() &&
                       (model.at(ticket).state == Model::State::waiting ||
                        model.at(ticket).state == Model::State::running);
    if (there)
      ASSERT_EQ(scheduler.first_token_bound(ticket), model.first_token_bound(ticket));
    else
      ASSERT_TRUE(throws<std::out_of_range>([&] { scheduler.first_token_bound(ticket); }));
  }

  void event() {
    const Index kind = pick(16);
    if (kind < 4)
      submit();
    else if (kind == 4)
      cancel();
    else if (kind == 5)
      take();
    else if (!model.under_way && kind == 6)  // without a step under way
      ASSERT_TRUE(throws<std::invalid_argument>([&] { scheduler.complete({}); }));
    else if (!model.under_way)
      next_step();
    else if (kind == 6)
      ASSERT_TRUE(throws<std::invalid_argument>([&] { scheduler.next_step(plan); }));
    else if (kind == 7)
      discard();
    else
      complete();
  }
};

TEST(StepSchedulerModel, RandomHistoriesEqualThePlainModelPlanByPlan) {
  Reached reached;
  for (unsigned seed = 1; seed <= 3000; ++seed) {
    History history(seed, reached);
    for (int i = 0; i < 100; ++i) {
      ASSERT_NO_FATAL_FAILURE(history.event()) << "history " << seed << ", event " << i;
      ASSERT_NO_FATAL_FAILURE(history.check()) << "history " << seed << ", event " << i;
    }
    reached.preempted += static_cast<int>(history.model.counts.preempted);
  }
  EXPECT_GT(reached.steps, 20000);
  EXPECT_GT(reached.preempted, 2000);
  EXPECT_GT(reached.told, 200);
  EXPECT_GT(reached.length, 200);
  EXPECT_GT(reached.refused, 2000);
  EXPECT_GT(reached.too_long, 200);
  EXPECT_GT(reached.discarded, 2000);
  EXPECT_GT(reached.outranked_after_discard, 100);
  EXPECT_GT(reached.cancelled_in_flight, 200);
  EXPECT_GT(reached.several_tokens, 2000);
  EXPECT_GT(reached.drafts, 2000);
}

// ---- by hand ------------------------------------------------------------------------------------

Tokens prompt_of(Index length) { return Tokens(static_cast<std::size_t>(length), 7); }

/// One step, each row that wants a token gets 1; what next_step said.
bool step(ef::StepScheduler& scheduler, ef::StepPlan& plan) {
  if (!scheduler.next_step(plan)) return false;
  std::vector<ef::StepToken> sampled;
  for (std::size_t i = 0; i < plan.requests.size(); ++i)
    if (plan.wants_token[i] != 0) sampled.push_back({plan.requests[i], 1, false});
  scheduler.complete(sampled);
  return true;
}

TEST(StepSchedulerPlans, NobodyIsPreemptedWherePagesJustSuffice) {
  ef::StepScheduler scheduler({.page_size = 1, .page_count = 4});
  for (int i = 0; i < 2; ++i) scheduler.submit(prompt_of(1), {.max_new_tokens = 2});
  ef::StepPlan plan;
  int steps = 0;
  while (step(scheduler, plan)) ++steps;
  EXPECT_EQ(steps, 2);
  EXPECT_EQ(scheduler.statistics().preempted, 0);
  EXPECT_EQ(scheduler.statistics().pages_peak, 4);
}

TEST(StepSchedulerPlans, RunningRequestsGoOnBelowOneThatDoesNotFit) {
  ef::StepScheduler scheduler({.page_size = 4, .page_count = 4});
  const auto a = scheduler.submit(prompt_of(5), {.priority = 5, .max_new_tokens = 4});
  const auto c = scheduler.submit(prompt_of(1), {.priority = 0, .max_new_tokens = 3});
  ef::StepPlan plan;
  step(scheduler, plan);
  EXPECT_EQ(scheduler.statistics().pages_used, 3);
  const auto b = scheduler.submit(prompt_of(12), {.priority = 3, .max_new_tokens = 1});
  step(scheduler, plan);  // b needs 3 pages; with those of c, 2 are free
  EXPECT_EQ(plan.requests, (Tickets{a, c}));
  step(scheduler, plan);
  EXPECT_EQ(plan.requests, (Tickets{a, c}));
  step(scheduler, plan);
  EXPECT_EQ(plan.requests, Tickets{a});
  step(scheduler, plan);
  EXPECT_EQ(plan.requests, Tickets{b});
  EXPECT_EQ(scheduler.statistics().preempted, 0);
}

TEST(StepSchedulerPlans, ANewcomerOutranksADiscardedStep) {
  ef::StepScheduler scheduler({.max_batch_size = 1, .page_size = 4, .page_count = 4});
  const auto a = scheduler.submit(prompt_of(5), {.max_new_tokens = 2});
  ef::StepPlan plan;
  ASSERT_TRUE(scheduler.next_step(plan));
  scheduler.discard_step();
  const auto b = scheduler.submit(prompt_of(2), {.priority = 1, .max_new_tokens = 1});
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_EQ(plan.requests, Tickets{b});
  EXPECT_EQ(plan.released, Tickets{a});  // though the cache holds nothing of it
  EXPECT_EQ(scheduler.statistics().tokens_discarded, 0);
  scheduler.discard_step();
  scheduler.discard_step();  // nothing is under way: nothing happens
  step(scheduler, plan);
  EXPECT_EQ(plan.requests, Tickets{b});
  step(scheduler, plan);
  EXPECT_EQ(plan.requests, Tickets{a});
  EXPECT_EQ(plan.positions, std::vector<Index>{0});
}

TEST(StepSchedulerPlans, FirstTokenBoundsAreTheseNumbers) {
  ef::StepScheduler scheduler({.token_budget = 4});
  const auto alone = scheduler.submit(prompt_of(5), {.max_new_tokens = 2});
  EXPECT_EQ(scheduler.first_token_bound(alone), 2);  // ceil(5 / 4)
  const auto first = scheduler.submit(prompt_of(3), {.priority = 1, .max_new_tokens = 2});
  EXPECT_EQ(scheduler.first_token_bound(first), 1);
  EXPECT_EQ(scheduler.first_token_bound(alone), 6);  // and ceil(5 / 4) + 2 of the better-ranked
  ef::StepPlan plan;
  step(scheduler, plan);
  EXPECT_EQ(scheduler.first_token_bound(alone), 5);  // a token less to come
  step(scheduler, plan);
  EXPECT_EQ(scheduler.first_token_bound(alone), 2);  // it has finished
  ef::StepScheduler chunked({.token_budget = 100, .prefill_chunk = 3});
  EXPECT_EQ(chunked.first_token_bound(chunked.submit(prompt_of(7))), 3);
  EXPECT_EQ(chunked.first_token_bound(chunked.submit(prompt_of(9), {.shared_prefix = 5})),
            2 + 683 + 2041);  // ceil(2048 / 3) + 2048 - 7
}

TEST(StepSchedulerPlans, TheBoundCountsFromTheNextPlan) {
  ef::StepScheduler scheduler({.token_budget = 4});
  const auto running = scheduler.submit(prompt_of(4), {.max_new_tokens = 1});
  ef::StepPlan plan;
  ASSERT_TRUE(scheduler.next_step(plan));
  const auto late = scheduler.submit(prompt_of(4), {.priority = 1, .max_new_tokens = 1});
  EXPECT_EQ(scheduler.first_token_bound(late), 1);
  scheduler.complete(std::vector<ef::StepToken>{{running, 1, false}});
  step(scheduler, plan);
  EXPECT_TRUE(scheduler.is_finished(late));
}

TEST(StepSchedulerPlans, TextsEndAtTheirLimitAndSayWhy) {
  ef::StepScheduler scheduler({.max_seq_length = 5});
  const auto cut = scheduler.submit(prompt_of(3), {.max_new_tokens = 100});
  const auto told = scheduler.submit(prompt_of(3), {.max_new_tokens = 1});
  const auto open = scheduler.submit(prompt_of(4));
  ef::StepPlan plan;
  ASSERT_TRUE(scheduler.next_step(plan));
  scheduler.complete(
      std::vector<ef::StepToken>{{cut, 1, false}, {told, 1, true}, {open, 1, false}});
  EXPECT_EQ(scheduler.finished(), (Tickets{told, open}));
  ASSERT_TRUE(scheduler.next_step(plan));
  const auto refuse = [&](const std::vector<ef::StepToken>& sampled, const std::string& text) {
    expect_throws<std::invalid_argument>([&] { scheduler.complete(sampled); }, {text});
  };
  refuse({{cut, 1, false}, {told, 1, false}}, "request 1, which is not running");
  EXPECT_EQ(scheduler.take_finished(told).reason, ef::FinishReason::told);  // at its limit, too
  EXPECT_EQ(scheduler.take_finished(open).reason, ef::FinishReason::length);
  refuse({{cut, 1, false}, {told, 1, false}}, "request 1, which is not running");  // nor taken
  scheduler.complete(std::vector<ef::StepToken>{{cut, 1, false}});
  const auto done = scheduler.take_finished(cut);
  EXPECT_EQ(done.tokens.size(), 5u);
  EXPECT_EQ(done.prompt_length, 3);
  EXPECT_EQ(done.reason, ef::FinishReason::length);
}

TEST(StepSchedulerPlans, OnlyRequestsCancelledInThisStepMayBringATokenStill) {
  ef::StepScheduler scheduler({});
  const auto a = scheduler.submit(prompt_of(3)), b = scheduler.submit(prompt_of(3)),
             c = scheduler.submit(prompt_of(3));
  ef::StepPlan plan;
  scheduler.cancel(b);  // before the step
  ASSERT_TRUE(scheduler.next_step(plan));
  scheduler.cancel(c);
  expect_throws<std::invalid_argument>(
      [&] {
        scheduler.complete(std::vector<ef::StepToken>{{a, 1, false}, {b, 1, false}});
      },
      {"request 1, which is not running"});
  scheduler.complete(std::vector<ef::StepToken>{{a, 1, false}, {c, 1, false}});
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_EQ(plan.released, Tickets{c});
  EXPECT_EQ(scheduler.statistics().tokens_computed, 3);
  expect_throws<std::invalid_argument>(
      [&] {
        scheduler.complete(std::vector<ef::StepToken>{{a, 1, false}, {c, 1, false}});
      },
      {"request 2, which is not running"});
}

TEST(StepSchedulerPlans, AStepBringsTheVerifiedDraftsOfARequest) {
  ef::StepScheduler scheduler({.token_budget = 8, .page_size = 4, .page_count = 3});
  const auto t = scheduler.submit(prompt_of(3), {.max_new_tokens = 9, .draft_tokens = 2});
  ef::StepPlan plan;
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_EQ(plan.drafts, std::vector<Index>{2});
  EXPECT_EQ(scheduler.statistics().pages_used, 2);  // for 5 positions
  const auto complete = [&](const Tokens& tokens, bool is_finished = false) {
    std::vector<ef::StepToken> sampled;
    for (std::int32_t token : tokens) sampled.push_back({t, token, false});
    sampled.back().is_finished = is_finished;
    scheduler.complete(sampled);
  };
  complete({10, 11, 12});  // both drafts were right
  EXPECT_EQ(scheduler.statistics().tokens_computed, 5);
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_EQ(plan.positions, std::vector<Index>{5});
  EXPECT_EQ(plan.tokens, Tokens{12});
  EXPECT_EQ(plan.drafts, std::vector<Index>{2});
  complete({13});  // the first was wrong
  EXPECT_EQ(scheduler.statistics().tokens_computed, 6);
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_EQ(plan.positions, std::vector<Index>{6});
  EXPECT_EQ(plan.tokens, Tokens{13});
  complete({14, 15, 16, 17});  // one more than was verified
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_EQ(plan.positions, std::vector<Index>{9});
  EXPECT_EQ(plan.tokens, (Tokens{16, 17}));
  EXPECT_EQ(plan.drafts, std::vector<Index>{0});  // the next token is the last
  expect_throws<std::invalid_argument>([&] { complete({18, 19}); }, {"behind the last one"});
  EXPECT_THROW(scheduler.complete(std::vector<ef::StepToken>{{t, 1, true}, {t, 1, false}}),
               std::invalid_argument);
  complete({18});
  EXPECT_EQ(scheduler.take_finished(t).tokens,
            (Tokens{7, 7, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18}));
  EXPECT_EQ(scheduler.statistics().pages_peak, 3);
}

TEST(StepSchedulerPlans, ASharedPrefixTakesNoPagesAndIsNotComputed) {
  ef::StepScheduler scheduler(
      {.max_batch_size = 8, .max_seq_length = 80, .page_size = 4, .page_count = 16});
  for (int i = 0; i < 8; ++i)
    scheduler.submit(prompt_of(68), {.max_new_tokens = 4, .shared_prefix = 64});
  ef::StepPlan plan;
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_EQ(plan.requests.size(), 8u);
  EXPECT_EQ(plan.tokens.size(), 32u);
  EXPECT_EQ(plan.positions, std::vector<Index>(8, 64));
  EXPECT_EQ(scheduler.statistics().pages_used, 8);
  // One page of the prefix is not full: each copies it when it writes. Preempted, a request begins
  // at its prefix again.
  ef::StepScheduler scarce({.page_size = 4, .page_count = 3});
  const auto a = scarce.submit(prompt_of(7), {.max_new_tokens = 3, .shared_prefix = 6});
  step(scarce, plan);
  EXPECT_EQ(scarce.statistics().pages_used, 1);
  const auto b = scarce.submit(prompt_of(9), {.priority = 1, .max_new_tokens = 1});
  step(scarce, plan);
  EXPECT_EQ(plan.requests, Tickets{b});
  EXPECT_EQ(plan.released, Tickets{a});
  EXPECT_EQ(scarce.statistics().tokens_discarded, 1);
  step(scarce, plan);
  EXPECT_EQ(plan.requests, Tickets{a});
  EXPECT_EQ(plan.positions, std::vector<Index>{6});
  expect_throws<std::invalid_argument>(
      [&] { scarce.submit(prompt_of(3), {.max_new_tokens = 1, .shared_prefix = 3}); },
      {"shared_prefix is 3", "0 to 2"});
  EXPECT_THROW(scarce.submit(prompt_of(3), {.shared_prefix = -1}), std::invalid_argument);
  EXPECT_THROW(scarce.submit(prompt_of(3), {.draft_tokens = -1}), std::invalid_argument);
  EXPECT_EQ(scarce.statistics().submitted, 2);
}

TEST(StepSchedulerPlans, RowsAreTheSameWithDraftsThatAreAllRefusedAndWithout) {
  Index drafts = 0, preempted = 0;
  for (unsigned seed = 1; seed <= 300; ++seed) {
    Reached reached;
    History with(seed, reached), without(seed, reached);
    std::mt19937& random = with.random;
    ef::StepPlan a, b;
    for (int i = 0; i < 60; ++i) {
      if (i < 30 && with.pick(2) == 0) {
        const Tokens prompt = prompt_of(1 + with.pick(with.options.max_seq_length - 1));
        ef::SubmitOptions how{.priority = static_cast<int>(random() % 2), .max_new_tokens = 1};
        how.max_new_tokens += with.pick(9);
        const bool fits =
            !throws<std::length_error>([&] { without.scheduler.submit(prompt, how); });
        how.draft_tokens = with.pick(9);
        if (fits) with.scheduler.submit(prompt, how);
      }
      step(with.scheduler, a);
      step(without.scheduler, b);
      drafts += std::accumulate(a.drafts.begin(), a.drafts.end(), Index{0});
      a.drafts = b.drafts;
      ASSERT_NO_FATAL_FAILURE(expect_equal(a, b)) << "seed " << seed << ", step " << i;
    }
    preempted += static_cast<Index>(with.scheduler.statistics().preempted);
  }
  EXPECT_GT(drafts, 1000);
  EXPECT_GT(preempted, 100);
}

}  // namespace
