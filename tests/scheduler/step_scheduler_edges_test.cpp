// Laws of both schedulers at their edges: sizes up to the largest there is give right answers or
// clear errors; while one thread is inside a member of StepScheduler, no other gets through one; a
// scheduler works to the very end of the program.
#include <eigenformer/scheduler.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "compare.h"
#include "failing_allocations.h"

using namespace eigenformer_test;

namespace {

using Tokens = std::vector<std::int32_t>;
constexpr Index kLargest = (std::numeric_limits<Index>::max)();

/// Runs a request to its end: every step brings `token`.
void run(ef::StepScheduler& scheduler) {
  ef::StepPlan plan;
  while (scheduler.next_step(plan)) {
    std::vector<ef::StepToken> sampled;
    for (std::size_t i = 0; i < plan.requests.size(); ++i)
      if (plan.wants_token[i] != 0) sampled.push_back({plan.requests[i], 5, false});
    scheduler.complete(sampled);
  }
}

// ---- sizes --------------------------------------------------------------------------------------

TEST(SchedulerSizes, NoLimitIsTheLargestIndexAndNothingOverflows) {
  for (Index budget : {Index{1}, Index{3}, kLargest - 1, kLargest})
    for (Index chunk : {Index{0}, Index{1}, kLargest}) {
      ef::StepScheduler scheduler({.max_batch_size = kLargest,
                                   .max_seq_length = kLargest,
                                   .token_budget = budget,
                                   .prefill_chunk = chunk});
      const Tokens prompt{1, 2, 3};
      const auto open = scheduler.submit(prompt);  // no limit
      const auto huge = scheduler.submit(prompt, {.max_new_tokens = kLargest});
      const auto drafts = scheduler.submit(prompt, {.max_new_tokens = 2, .draft_tokens = kLargest});
      const auto first = scheduler.submit(prompt, {.priority = 1, .max_new_tokens = 2});
      const Index c = std::min(budget, chunk == 0 ? budget : chunk);
      const auto steps_for = [&](Index tokens) { return tokens / c + (tokens % c != 0 ? 1 : 0); };
      const Index before = steps_for(5) + 2, own = steps_for(3);
      EXPECT_EQ(scheduler.first_token_bound(first), own);
      EXPECT_EQ(scheduler.first_token_bound(open), before + own);
      EXPECT_EQ(scheduler.first_token_bound(huge), kLargest);    // behind a text without a limit
      EXPECT_EQ(scheduler.first_token_bound(drafts), kLargest);  // behind two of them
      scheduler.cancel(open);
      scheduler.cancel(huge);
      EXPECT_EQ(scheduler.first_token_bound(drafts), before + own);
      run(scheduler);
      EXPECT_EQ(scheduler.take_finished(drafts).tokens, (Tokens{1, 2, 3, 5, 5}));
    }
}

TEST(SchedulerSizes, TheBoundIsExactUpToTheLargestIndex) {
  // Behind a 1-token prompt: ceil(limit / c) + limit - 1, and 1 of its own.
  const Index half = kLargest / 2 + 1;
  for (Index limit : {half - 1, half, half + 1}) {
    ef::StepScheduler scheduler({.max_seq_length = limit, .token_budget = 1});
    const Tokens prompt{1};
    scheduler.submit(prompt);
    const Index bound = scheduler.first_token_bound(scheduler.submit(prompt));
    EXPECT_EQ(bound, limit < half ? 2 * limit : kLargest) << limit;  // 2^63 - 2, then too much
  }
}

TEST(SchedulerSizes, LargePagesAndPageCounts) {
  for (Index page_size : {Index{1}, Index{2}, kLargest - 1, kLargest})
    for (Index page_count : {Index{5}, kLargest - 1, kLargest}) {
      ef::StepScheduler scheduler({.max_seq_length = kLargest,
                                   .token_budget = kLargest,
                                   .page_size = page_size,
                                   .page_count = page_count});
      const Tokens prompt{1, 2, 3};
      const auto a = scheduler.submit(prompt, {.max_new_tokens = 3, .draft_tokens = kLargest});
      const auto b = scheduler.submit(prompt, {.max_new_tokens = 1, .shared_prefix = 2});
      if (page_size <= 2 && page_count == 5)  // 2^63 positions do not fit in 5 such pages
        expect_throws<std::length_error>([&] { scheduler.submit(prompt); }, {"there are 5"});
      else
        scheduler.cancel(scheduler.submit(prompt));
      run(scheduler);
      EXPECT_EQ(scheduler.take_finished(a).tokens.size(), 6u);
      EXPECT_EQ(scheduler.take_finished(b).tokens.size(), 4u);
      EXPECT_EQ(scheduler.statistics().pages_used, 0);
      // 5 positions of a (2 for drafts), 1 of b, which copies the page of the prefix it writes to.
      const Index peak = page_size == 1 ? std::min<Index>(6, page_count) : page_size == 2 ? 4 : 2;
      EXPECT_EQ(scheduler.statistics().pages_peak, peak) << page_size << " " << page_count;
    }
}

TEST(SchedulerSizes, SmallestSizesAreRefusedByName) {
  constexpr Index kSmallest = (std::numeric_limits<Index>::min)();
  for (Index bad : {Index{-1}, kSmallest}) {
    const std::string text = std::to_string(bad);
    const auto refuse = [&](const ef::StepSchedulerOptions& options, const char* name) {
      expect_throws<std::invalid_argument>([&] { ef::StepScheduler scheduler(options); },
                                           {"StepScheduler", name, text});
    };
    refuse({.max_batch_size = bad}, "max_batch_size");
    refuse({.max_seq_length = bad}, "max_seq_length");
    refuse({.token_budget = bad}, "token_budget");
    refuse({.prefill_chunk = bad}, "prefill_chunk");
    refuse({.page_size = bad}, "page_size");
    refuse({.page_count = bad}, "page_count");
    ef::StepScheduler scheduler({});
    const Tokens prompt{1, 2};
    const auto refuse_request = [&](const ef::SubmitOptions& options, const char* name) {
      expect_throws<std::invalid_argument>([&] { scheduler.submit(prompt, options); },
                                           {"StepScheduler", name, text});
    };
    refuse_request({.max_new_tokens = bad}, "max_new_tokens");
    refuse_request({.shared_prefix = bad}, "shared_prefix");
    refuse_request({.draft_tokens = bad}, "draft_tokens");
    EXPECT_THROW(scheduler.submit(prompt, {.shared_prefix = kLargest}), std::invalid_argument);
    EXPECT_EQ(scheduler.statistics().submitted, 0);
    expect_throws<std::invalid_argument>([&] { ef::ContinuousBatchScheduler batches(bad, 4); },
                                         {"max_batch_size", text});
    expect_throws<std::invalid_argument>([&] { ef::ContinuousBatchScheduler batches(4, bad); },
                                         {"max_seq_length", text});
  }
}

TEST(SchedulerSizes, PrioritiesMayBeAnyInt) {
  ef::StepScheduler scheduler({});
  const Tokens prompt{1};
  std::vector<ef::RequestTicket> tickets;
  for (int priority : {(std::numeric_limits<int>::min)(), -1, 0, (std::numeric_limits<int>::max)()})
    tickets.push_back(scheduler.submit(prompt, {.priority = priority, .max_new_tokens = 1}));
  ef::StepPlan plan;
  ASSERT_TRUE(scheduler.next_step(plan));
  std::reverse(tickets.begin(), tickets.end());
  EXPECT_EQ(plan.requests, tickets);
}

TEST(SchedulerSizes, BatchesOfAnySizeAndTextsOfAnyLength) {
  ef::ContinuousBatchScheduler scheduler(kLargest, kLargest);
  scheduler.add_request("a", {1, 2});
  scheduler.add_request("b", {3});
  scheduler.update_batch("b", 4, false);
  const ef::Batch batch = scheduler.get_batch();
  EXPECT_EQ(batch.input_ids.dimension(1), 2);
  EXPECT_EQ(batch.input_ids(1, 1), 4);
  EXPECT_TRUE(scheduler.can_add_more_requests());
}

// ---- threads ------------------------------------------------------------------------------------

/// Holds a thread up inside `submit`, which allocates with the lock held, and says whether
/// `member`, called by another thread meanwhile, got through. A lock that is missing shows as a
/// member that gets through; the wait is for that and no longer.
template <typename Member>
bool gets_through(ef::StepScheduler& scheduler, Member&& member) {
  std::atomic<bool> inside{false}, called{false}, through{false}, go_on{false};
  std::function<void()> hold_up = [&] {
    inside = true;
    while (!go_on) std::this_thread::yield();
  };
  const Tokens prompt(100, 1);
  std::thread holder([&] {
    Allocations::before_next = &hold_up;
    scheduler.submit(prompt);
  });
  while (!inside) std::this_thread::yield();
  std::thread other([&] {
    called = true;
    member();
    through = true;
  });
  while (!called) std::this_thread::yield();
  for (int i = 0; i < 20 && !through; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const bool result = through;
  go_on = true;
  holder.join();
  other.join();
  return result;
}

TEST(StepSchedulerThreads, OneMemberAtATime) {
  ef::StepScheduler scheduler({});
  const Tokens prompt{1, 2, 3};
  const auto done = scheduler.submit(prompt, {.max_new_tokens = 1});
  run(scheduler);
  const auto victim = scheduler.submit(prompt), waiting = scheduler.submit(prompt);
  ef::StepPlan plan;
  const auto waits = [&](auto&& member) { return !gets_through(scheduler, member); };
  EXPECT_TRUE(waits([&] { scheduler.submit(prompt); }));
  EXPECT_TRUE(waits([&] { scheduler.cancel(victim); }));
  EXPECT_TRUE(waits([&] { scheduler.next_step(plan); }));
  EXPECT_TRUE(waits([&] { scheduler.discard_step(); }));
  EXPECT_TRUE(waits([&] { scheduler.is_finished(done); }));
  EXPECT_TRUE(waits([&] { scheduler.finished(); }));
  EXPECT_TRUE(waits([&] { scheduler.first_token_bound(waiting); }));
  EXPECT_TRUE(waits([&] { scheduler.statistics(); }));
  EXPECT_TRUE(waits([&] { scheduler.take_finished(done); }));
  ASSERT_TRUE(scheduler.next_step(plan));
  std::vector<ef::StepToken> sampled;
  for (std::size_t i = 0; i < plan.requests.size(); ++i)
    if (plan.wants_token[i] != 0) sampled.push_back({plan.requests[i], 1, true});
  EXPECT_TRUE(waits([&] { scheduler.complete(sampled); }));
  EXPECT_EQ(scheduler.statistics().steps, 2);
  EXPECT_FALSE(waits([&] { (void)scheduler.options(); }));  // never changes: no lock
}

// ---- memory that runs out -----------------------------------------------------------------------

TEST(StepSchedulerMemory, AfterAPlanThatFailedACancelIsWholeOrNotAtAll) {
  ef::StepScheduler scheduler({.max_batch_size = 40});
  const Tokens prompt{1, 2, 3};
  for (int i = 0; i < 40; ++i) scheduler.submit(prompt);
  std::vector<ef::RequestTicket> cancelled;
  cancelled.reserve(40);
  ef::StepPlan plan;
  plan.released.assign(1, 4711);
  const auto cancel = [&] {
    const auto before = scheduler.statistics();
    const auto ticket = static_cast<ef::RequestTicket>(cancelled.size());
    const int failures =
        with_failing_allocations([&] { EXPECT_TRUE(scheduler.cancel(ticket)); },
                                 [&] {
                                   EXPECT_EQ(scheduler.statistics().cancelled, before.cancelled);
                                   EXPECT_EQ(scheduler.statistics().running, before.running);
                                 });
    cancelled.push_back(ticket);
    return failures;
  };
  int failures = 0;
  const int plans =
      with_failing_allocations([&] { EXPECT_TRUE(scheduler.next_step(plan)); },
                               [&] {
                                 EXPECT_TRUE(plan.released.empty());
                                 EXPECT_THROW(scheduler.complete({}), std::invalid_argument);
                                 failures += cancel();
                               });
  EXPECT_GT(plans, 5);
  EXPECT_EQ(plan.released, cancelled);  // each of them once
  EXPECT_EQ(plan.requests.size(), 40 - cancelled.size());
  // Of the step under way, too.
  const std::size_t first = cancelled.size();
  plan.released.clear();
  failures += cancel() + cancel();
  EXPECT_GT(failures, 0);
  std::vector<ef::StepToken> sampled;
  for (ef::RequestTicket ticket : plan.requests) sampled.push_back({ticket, 5, false});
  scheduler.complete(sampled);
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_EQ(plan.released,
            std::vector<ef::RequestTicket>(cancelled.begin() + static_cast<std::ptrdiff_t>(first),
                                           cancelled.end()));
}

// ---- the end of the program ---------------------------------------------------------------------

/// Global objects work in their destructors, after main and after what came later was destroyed.
struct ToTheEnd {
  ef::StepScheduler steps{{.page_size = 4, .page_count = 10}};
  ef::ContinuousBatchScheduler batches{2, 4};
  ~ToTheEnd() {
    const Tokens prompt{1, 2, 3};
    const auto ticket = steps.submit(prompt, {.max_new_tokens = 2});
    run(steps);
    batches.add_request("a", prompt);
    batches.update_batch("a", 4, false);
    if (steps.take_finished(ticket).tokens != Tokens{1, 2, 3, 5, 5} ||
        batches.take_finished("a") != Tokens{1, 2, 3, 4})
      std::_Exit(1);
  }
} to_the_end;

}  // namespace
