// Laws: a step never exceeds its budgets, and a cache driven by its plans never runs out of pages;
// every request ends with its own text, whatever the batch around it; everybody gets a first token
// within the stated bound; pages all return. Plan by plan against the plain model:
// step_scheduler_model_test.cpp.
#include <eigenformer/paged_kv_cache.h>
#include <eigenformer/scheduler.h>

#include <atomic>
#include <map>
#include <numeric>
#include <set>
#include <thread>

#include "compare.h"
#include "failing_allocations.h"

using namespace eigenformer_test;

namespace {

using Tokens = std::vector<std::int32_t>;

Tokens prompt_of(Index length, unsigned seed) {
  std::mt19937 random(seed);
  Tokens tokens(static_cast<std::size_t>(length));
  for (auto& token : tokens) token = static_cast<std::int32_t>(random() % 50);
  return tokens;
}
/// What requests that share a prefix begin with: its last page is never full, but for pages of 1
/// and 3.
const Tokens kSystemPrompt = prompt_of(9, 4711);

/// Carries plans out on a real paged cache, whose keys are the tokens themselves, and checks every
/// law a plan must keep.
struct Engine {
  explicit Engine(const ef::StepSchedulerOptions& options)
      : scheduler(options),
        cache({.layers = 1,
               .kv_heads = 1,
               .head_dim = 1,
               .page_size = std::max<Index>(1, options.page_size),
               .page_count = options.page_size == 0
                                 ? 10000
                                 : options.page_count + prefix_pages(options.page_size)}),
        prefix(cache.add_sequence()) {
    append(prefix, kSystemPrompt);
  }
  static Index prefix_pages(Index page_size) { return (9 + page_size - 1) / page_size; }

  ef::StepScheduler scheduler;
  ef::PagedKvCache<float> cache;
  ef::SequenceId prefix;
  std::map<ef::RequestTicket, ef::SequenceId> sequences;
  std::map<ef::RequestTicket, Index> shared;  // prefix of each request that has one
  std::mt19937 guess{1};                      // whether a draft is right
  int right = 0, wrong = 0;
  bool alone = true;  // no other thread cancels between a plan and a look at the figures
  ef::StepPlan plan;
  std::vector<ef::RequestTicket> first_tokens;  // of the last step

  void append(ef::SequenceId sequence, std::span<const std::int32_t> tokens) {
    ef::Tensor<float, 3> rows(static_cast<Index>(tokens.size()), 1, 1);
    std::copy(tokens.begin(), tokens.end(), rows.data());
    cache.append(sequence, 0, rows, rows);
  }

  bool plan_step() {
    const bool work = scheduler.next_step(plan);
    for (ef::RequestTicket ticket : plan.released) {
      cache.free(sequences.at(ticket));
      sequences.erase(ticket);
    }
    const auto& options = scheduler.options();
    EXPECT_LE(static_cast<Index>(plan.requests.size()), options.max_batch_size);
    EXPECT_LE(static_cast<Index>(plan.tokens.size()) +
                  std::accumulate(plan.drafts.begin(), plan.drafts.end(), Index{0}),
              options.token_budget);
    EXPECT_EQ(plan.offsets.size(), plan.requests.size() + 1);
    for (std::size_t i = 0; i < plan.requests.size(); ++i) {
      const Index n = plan.offsets[i + 1] - plan.offsets[i];
      EXPECT_GE(n, 1);
      EXPECT_LE(n, options.prefill_chunk > 0 ? options.prefill_chunk : options.token_budget);
      const auto [entry, fresh] = sequences.try_emplace(plan.requests[i], -1);
      if (fresh) {
        EXPECT_EQ(plan.positions[i], shared[plan.requests[i]]);
        entry->second = cache.fork(prefix, plan.positions[i]);
      }
      EXPECT_EQ(cache.length(entry->second), plan.positions[i]);
      // Throws where the plan promised pages that are not there.
      append(entry->second,
             std::span(plan.tokens)
                 .subspan(static_cast<std::size_t>(plan.offsets[i]), static_cast<std::size_t>(n)));
    }
    if (options.page_size > 0 && alone) {
      EXPECT_LE(cache.statistics().pages_used,
                scheduler.statistics().pages_used + prefix_pages(options.page_size));
    }
    return work;
  }

  /// The next token is a function of the cached text, so that recomputation must bring the same.
  std::int32_t next_token(ef::RequestTicket ticket) const {
    const auto text = cache.keys(sequences.at(ticket), 0);
    float sum = 1;
    for (Index j = 0; j < text.size(); ++j) sum += text.data()[j] * static_cast<float>(j % 3 + 1);
    return static_cast<std::int32_t>(sum) % 50;
  }

  void finish_step(std::int32_t end_token = -1) {
    std::vector<ef::StepToken> sampled;
    first_tokens.clear();
    for (std::size_t i = 0; i < plan.requests.size(); ++i)
      if (plan.wants_token[plan.wants_token.size() - 1 - i] != 0)  // any order of rows will do
        sample_row(plan.wants_token.size() - 1 - i, end_token, sampled);
    if (!plan.requests.empty()) scheduler.complete(sampled);
  }

  /// The row's next token, and one more for each draft that was right. Drafts fill all the room
  /// that the plan gives them.
  void sample_row(std::size_t row, std::int32_t end_token, std::vector<ef::StepToken>& sampled) {
    const ef::RequestTicket ticket = plan.requests[row];
    const ef::SequenceId sequence = sequences.at(ticket);
    first_tokens.push_back(ticket);
    for (Index room = plan.drafts[row];; --room) {
      const std::int32_t token = next_token(ticket);
      sampled.push_back({ticket, token, token == end_token});
      if (token == end_token || room == 0) return;
      if (guess() % 3 == 0) {
        ++wrong;
        const Index length = cache.length(sequence);
        append(sequence, Tokens(static_cast<std::size_t>(room), 99));
        cache.truncate(sequence, length);
        return;
      }
      ++right;
      append(sequence, Tokens{token});
    }
  }

  bool step(std::int32_t end_token = -1) {
    const bool work = plan_step();
    finish_step(end_token);
    return work;
  }
};

/// The text a request must end with, whatever the batch around it.
Tokens text_of(Tokens tokens, Index limit, std::int32_t end_token) {
  while (static_cast<Index>(tokens.size()) < limit) {
    float sum = 1;
    for (std::size_t j = 0; j < tokens.size(); ++j)
      sum += static_cast<float>(tokens[j]) * static_cast<float>(j % 3 + 1);
    tokens.push_back(static_cast<std::int32_t>(sum) % 50);
    if (tokens.back() == end_token) break;
  }
  return tokens;
}

TEST(StepScheduler, RandomLoadsFinishWithTheirOwnTextsAndPagesReturn) {
  struct Case {
    ef::StepSchedulerOptions options;
    int priorities;
  };
  const std::vector<Case> cases{{{.max_batch_size = 4,
                                  .max_seq_length = 60,
                                  .token_budget = 16,
                                  .page_size = 4,
                                  .page_count = 20},
                                 1},  // pages are scarce
                                {{.max_batch_size = 4,
                                  .max_seq_length = 60,
                                  .token_budget = 16,
                                  .prefill_chunk = 5,
                                  .page_size = 4,
                                  .page_count = 16},
                                 3},
                                {{.max_batch_size = 8,
                                  .max_seq_length = 60,
                                  .token_budget = 7,
                                  .page_size = 1,
                                  .page_count = 70},
                                 1},
                                {{.max_batch_size = 3, .max_seq_length = 60, .token_budget = 1000},
                                 2},  // pages are not counted
                                {{.max_batch_size = 1,
                                  .max_seq_length = 60,
                                  .token_budget = 1,
                                  .page_size = 16,
                                  .page_count = 4},
                                 1}};
  std::int64_t preempted = 0;
  int right = 0, wrong = 0;
  for (std::size_t c = 0; c < cases.size(); ++c)
    for (unsigned seed = 1; seed <= 3; ++seed) {
      std::mt19937 random(seed);
      Engine engine(cases[c].options);
      std::map<ef::RequestTicket, Tokens> expected;
      std::set<ef::RequestTicket> cancelled;
      for (int round = 0; round < 400; ++round) {
        if (round < 200 && random() % 3 == 0) {
          Tokens prompt =
              prompt_of(1 + static_cast<Index>(random() % 30), static_cast<unsigned>(random()));
          const bool shares = prompt.size() > 9 && random() % 2 == 0;
          if (shares) std::copy(kSystemPrompt.begin(), kSystemPrompt.end(), prompt.begin());
          const Index limit =
              static_cast<Index>(prompt.size()) + 1 + static_cast<Index>(random() % 20);
          const auto ticket = engine.scheduler.submit(
              prompt,
              {.priority = static_cast<int>(random() % static_cast<unsigned>(cases[c].priorities)),
               .max_new_tokens = limit - static_cast<Index>(prompt.size()),
               .shared_prefix = shares ? 9 : 0,
               .draft_tokens = static_cast<Index>(random() % 4)});
          engine.shared[ticket] = shares ? 9 : 0;
          expected[ticket] = text_of(prompt, limit, 13);
        }
        const bool work = engine.plan_step();
        if (random() % 30 == 0 && !expected.empty()) {  // between plan and tokens
          const auto victim = static_cast<ef::RequestTicket>(random() % expected.size());
          const bool was_there = engine.scheduler.cancel(victim);
          EXPECT_FALSE(engine.scheduler.cancel(victim));
          if (was_there) cancelled.insert(victim);
        }
        if (random() % 20 == 0 && work) {  // the model failed: roll the cache back, plan again
          for (std::size_t i = 0; i < engine.plan.requests.size(); ++i)
            engine.cache.truncate(engine.sequences.at(engine.plan.requests[i]),
                                  engine.plan.positions[i]);
          engine.scheduler.discard_step();
        } else {
          engine.finish_step(13);
        }
        const auto figures = engine.scheduler.statistics();
        ASSERT_LE(figures.pages_used, cases[c].options.page_count);
        ASSERT_LE(figures.running, cases[c].options.max_batch_size);
      }
      for (int i = 0; i < 20000 && engine.step(13); ++i) {
      }
      EXPECT_FALSE(engine.step(13));
      const auto figures = engine.scheduler.statistics();
      EXPECT_EQ(figures.waiting + figures.running, 0);
      EXPECT_EQ(figures.pages_used, 0);
      EXPECT_EQ(figures.cancelled, static_cast<std::int64_t>(cancelled.size()));
      EXPECT_EQ(figures.finished + figures.cancelled, figures.submitted);
      preempted += figures.preempted;
      right += engine.right;
      wrong += engine.wrong;
      EXPECT_EQ(engine.cache.sequence_count(), 1);  // the prefix
      for (const auto& [ticket, text] : expected) {
        ASSERT_EQ(engine.scheduler.is_finished(ticket), cancelled.count(ticket) == 0);
        if (cancelled.count(ticket) > 0) continue;
        const auto done = engine.scheduler.take_finished(ticket);
        EXPECT_EQ(done.tokens, text) << ticket;
        EXPECT_EQ(
            done.reason == ef::FinishReason::told,
            text.back() == 13 && done.tokens.size() > static_cast<std::size_t>(done.prompt_length));
      }
      EXPECT_TRUE(engine.scheduler.finished().empty());
    }
  EXPECT_GT(preempted, 50);
  EXPECT_GT(right, 500);
  EXPECT_GT(wrong, 200);
}

TEST(StepScheduler, EverybodyGetsAFirstTokenWithinTheBound) {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    std::mt19937 random(seed);
    Engine engine({.max_batch_size = 4,
                   .max_seq_length = 60,
                   .token_budget = 8,
                   .prefill_chunk = seed % 2 == 0 ? 3 : 0,
                   .page_size = 4,
                   .page_count = 15});
    std::map<ef::RequestTicket, Index> due;
    Index step = 0;
    for (; step < 3000; ++step) {
      if (step < 300 && random() % 4 == 0) {
        const auto ticket =
            engine.scheduler.submit(prompt_of(1 + static_cast<Index>(random() % 40), seed),
                                    {.max_new_tokens = 1 + static_cast<Index>(random() % 15)});
        due[ticket] = step + engine.scheduler.first_token_bound(ticket);
      }
      const bool work = engine.step();
      for (ef::RequestTicket ticket : engine.first_tokens) due.erase(ticket);
      for (const auto& [ticket, last] : due) ASSERT_LT(step + 1, last) << "request " << ticket;
      if (!work && step > 300) break;
    }
    EXPECT_TRUE(due.empty());
    EXPECT_LT(step, 3000);
    EXPECT_GT(engine.scheduler.statistics().preempted, 0);
  }
}

TEST(StepScheduler, ChunksPrefillAndKeepsRank) {
  Engine engine({.max_batch_size = 2, .max_seq_length = 100, .token_budget = 10});
  const auto a = engine.scheduler.submit(prompt_of(25, 1), {.max_new_tokens = 3});
  const auto b = engine.scheduler.submit(prompt_of(4, 2), {.max_new_tokens = 3});
  const auto c = engine.scheduler.submit(prompt_of(4, 3), {.max_new_tokens = 3});
  using Tickets = std::vector<ef::RequestTicket>;
  engine.step();
  EXPECT_EQ(engine.plan.requests, Tickets{a});
  EXPECT_EQ(engine.plan.wants_token, std::vector<std::uint8_t>{0});
  engine.step();
  engine.step();  // the last 5 of a, and the 4 of b
  EXPECT_EQ(engine.plan.requests, (Tickets{a, b}));
  EXPECT_EQ(engine.plan.positions, (std::vector<Index>{20, 0}));
  EXPECT_EQ(engine.plan.offsets, (std::vector<Index>{0, 5, 9}));
  EXPECT_EQ(engine.plan.wants_token, (std::vector<std::uint8_t>{1, 1}));
  engine.step();
  const auto urgent =
      engine.scheduler.submit(prompt_of(2, 4), {.priority = 1, .max_new_tokens = 1});
  engine.step();  // outranks b, the worst running, and takes its place
  EXPECT_EQ(engine.plan.requests, (Tickets{urgent, a}));
  EXPECT_EQ(engine.plan.released, Tickets{b});
  engine.step();  // b computes its text again, before c
  EXPECT_EQ(engine.plan.requests, (Tickets{b, c}));
  EXPECT_EQ(engine.plan.positions, (std::vector<Index>{0, 0}));
  EXPECT_EQ(engine.plan.offsets[1], 6);  // 4 of the prompt and 2 generated
  EXPECT_EQ(engine.scheduler.take_finished(urgent).tokens.size(), 3u);
  EXPECT_EQ(engine.scheduler.statistics().tokens_discarded, 5);
}

TEST(StepScheduler, RefusalsChangeNothing) {
  ef::StepScheduler scheduler({.max_batch_size = 2,
                               .max_seq_length = 40,
                               .token_budget = 8,
                               .page_size = 4,
                               .page_count = 5});
  expect_throws<std::invalid_argument>([&] { scheduler.submit({}); }, {"prompt is empty"});
  expect_throws<std::invalid_argument>([&] { scheduler.submit(prompt_of(40, 1)); },
                                       {"40 tokens", "max_seq_length is 40"});
  expect_throws<std::invalid_argument>(
      [&] { scheduler.submit(prompt_of(3, 1), {.max_new_tokens = -1}); }, {"max_new_tokens is -1"});
  expect_throws<std::length_error>([&] { scheduler.submit(prompt_of(3, 1)); },
                                   {"40 tokens needs 10 pages", "there are 5"});
  // 21 tokens, of which 20 are ever stored
  const auto a = scheduler.submit(prompt_of(6, 1), {.max_new_tokens = 15});
  ef::StepPlan plan;
  EXPECT_THROW(scheduler.complete({}), std::invalid_argument);
  ASSERT_TRUE(scheduler.next_step(plan));
  EXPECT_THROW(scheduler.next_step(plan), std::invalid_argument);
  const auto refuse = [&](std::vector<ef::StepToken> sampled,
                          const std::vector<std::string>& text) {
    expect_throws<std::invalid_argument>([&] { scheduler.complete(sampled); }, text);
    EXPECT_EQ(scheduler.statistics().steps, 0);
  };
  refuse({}, {"tokens came for 0 requests, 1 wanted one"});
  refuse({{a, 1, true}, {a, 1, false}}, {"behind the last one of request 0"});
  refuse({{a, 1, false}, {-1, 1, false}}, {"request -1", "not running"});
  refuse({{a, 1, false}, {99, 1, false}}, {"request 99", "not running"});
  const auto b = scheduler.submit(prompt_of(2, 1), {.max_new_tokens = 1});
  refuse({{a, 1, false}, {b, 1, false}}, {"wanted none"});
  scheduler.complete(std::vector<ef::StepToken>{{a, 1, true}});
  EXPECT_EQ(scheduler.take_finished(a).tokens.size(), 7u);
  EXPECT_THROW(scheduler.take_finished(a), std::out_of_range);
  EXPECT_THROW(scheduler.take_finished(b), std::out_of_range);
  EXPECT_THROW(scheduler.first_token_bound(a), std::out_of_range);
  EXPECT_FALSE(scheduler.cancel(a));
  EXPECT_FALSE(scheduler.cancel(12345));
  EXPECT_TRUE(scheduler.cancel(b));
  EXPECT_THROW(ef::StepScheduler({.max_batch_size = 0}), std::invalid_argument);
  EXPECT_THROW(ef::StepScheduler({.token_budget = 0}), std::invalid_argument);
  EXPECT_THROW(ef::StepScheduler({.page_size = -1}), std::invalid_argument);
}

TEST(StepScheduler, OutOfMemoryLosesNothing) {
  Engine engine({.max_batch_size = 3,
                 .max_seq_length = 60,
                 .token_budget = 16,
                 .page_size = 4,
                 .page_count = 10});
  ef::StepPlan plan;
  std::vector<ef::RequestTicket> tickets;
  tickets.reserve(5);
  for (unsigned i = 0; i < 5; ++i)
    with_failing_allocations(
        [&] {
          tickets.push_back(engine.scheduler.submit(prompt_of(9, i), {.max_new_tokens = 12}));
        },
        [&] { EXPECT_EQ(engine.scheduler.statistics().submitted, static_cast<std::int64_t>(i)); });
  int failures = 0;
  bool work = true;
  std::set<ef::RequestTicket> holding;
  while (work) {
    plan = {};  // so that its vectors must grow again
    failures += with_failing_allocations([&] { work = engine.scheduler.next_step(plan); }, [] {});
    for (ef::RequestTicket ticket : plan.released) EXPECT_EQ(holding.erase(ticket), 1u);
    std::vector<ef::StepToken> sampled;
    for (std::size_t i = 0; i < plan.requests.size(); ++i) {
      EXPECT_EQ(holding.insert(plan.requests[i]).second, plan.positions[i] == 0);
      if (plan.wants_token[i] != 0) sampled.push_back({plan.requests[i], 1, false});
    }
    if (work)
      failures += with_failing_allocations([&] { engine.scheduler.complete(sampled); }, [] {});
  }
  EXPECT_TRUE(holding.empty());
  EXPECT_GT(failures, 30);
  for (ef::RequestTicket ticket : tickets)
    EXPECT_EQ(engine.scheduler.take_finished(ticket).tokens.size(), 21u);
}

TEST(StepScheduler, CancellationAndSubmissionFromOtherThreads) {
  Engine engine({.max_batch_size = 4,
                 .max_seq_length = 60,
                 .token_budget = 16,
                 .page_size = 4,
                 .page_count = 20});
  engine.alone = false;
  std::atomic<bool> submitting{true};
  std::atomic<int> cancelled{0};
  std::thread submitter([&] {
    for (unsigned i = 0; i < 300; ++i) {
      engine.scheduler.submit(prompt_of(1 + i % 30, i),
                              {.max_new_tokens = 1 + static_cast<Index>(i % 20)});
      std::this_thread::yield();
    }
    submitting = false;
  });
  std::thread canceller([&] {
    std::mt19937 random(1);
    while (submitting) {
      cancelled += engine.scheduler.cancel(static_cast<ef::RequestTicket>(random() % 300)) ? 1 : 0;
      std::this_thread::yield();
    }
  });
  while (submitting ||
         engine.scheduler.statistics().waiting + engine.scheduler.statistics().running > 0)
    engine.step();
  submitter.join();
  canceller.join();
  while (engine.step()) {
  }
  const auto figures = engine.scheduler.statistics();
  EXPECT_EQ(figures.submitted, 300);
  EXPECT_EQ(figures.cancelled, cancelled);
  EXPECT_EQ(figures.finished, 300 - cancelled);
  EXPECT_EQ(figures.pages_used, 0);
  EXPECT_EQ(engine.cache.pages_free(), 20);  // of 23, 3 of which hold the prefix
  EXPECT_EQ(engine.cache.sequence_count(), 1);
  for (ef::RequestTicket ticket : engine.scheduler.finished()) {
    const auto done = engine.scheduler.take_finished(ticket);
    EXPECT_EQ(done.tokens, text_of(prompt_of(1 + ticket % 30, static_cast<unsigned>(ticket)),
                                   static_cast<Index>(done.tokens.size()), -1));
  }
}

TEST(StepScheduler, NobodyIsPreemptedForAGuess) {
  ef::StepScheduler scheduler({.max_batch_size = 2,
                               .max_seq_length = 64,
                               .token_budget = 64,
                               .page_size = 4,
                               .page_count = 4});
  const auto a = scheduler.submit(prompt_of(3, 1), {.max_new_tokens = 13, .draft_tokens = 8});
  const auto b = scheduler.submit(prompt_of(3, 2), {.max_new_tokens = 5});
  ef::StepPlan plan;
  for (Index drafts : {8, 8, 3, 2, 1}) {  // from the third step on, b has two pages of its own
    EXPECT_FALSE(scheduler.is_finished(b));
    ASSERT_TRUE(scheduler.next_step(plan));
    EXPECT_EQ(plan.requests, (std::vector<ef::RequestTicket>{a, b}));
    EXPECT_EQ(plan.drafts, (std::vector<Index>{drafts, 0}));
    scheduler.complete(std::vector<ef::StepToken>{{a, 1, false}, {b, 1, false}});  // all refused
  }
  EXPECT_TRUE(scheduler.is_finished(b));
  EXPECT_EQ(scheduler.statistics().preempted, 0);
}

}  // namespace
