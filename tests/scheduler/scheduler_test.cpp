// Laws: any history of calls gives what the plain model gives, errors change nothing; a step never
// exceeds its budgets, and a cache driven by its plans never runs out of pages; everybody gets a
// first token within the stated bound; pages all return.
#include <eigenformer/paged_kv_cache.h>
#include <eigenformer/reference/scheduler.h>
#include <eigenformer/scheduler.h>

#include "compare.h"
#include "failing_allocations.h"

using namespace eigenformer_test;

namespace {

using Tokens = std::vector<std::int32_t>;

void expect_equal(const ef::ContinuousBatchScheduler& scheduler,
                  const ef::reference::ContinuousBatchScheduler& model) {
  const ef::Batch batch = scheduler.get_batch();
  const Index rows = static_cast<Index>(model.active.size());
  ASSERT_EQ(batch.request_ids.size(), model.active.size());
  ASSERT_EQ(batch.sequence_lengths.size(), model.active.size());
  Index longest = 0;
  for (const auto& request : model.active)
    longest = std::max(longest, static_cast<Index>(request.tokens.size()));
  ASSERT_EQ(batch.input_ids.dimension(0), rows);
  ASSERT_EQ(batch.input_ids.dimension(1), longest);
  ASSERT_EQ(batch.attention_mask.dimension(0), rows);
  ASSERT_EQ(batch.attention_mask.dimension(1), longest);
  for (Index i = 0; i < rows; ++i) {
    const auto& request = model.active[static_cast<std::size_t>(i)];
    const Index length = static_cast<Index>(request.tokens.size());
    ASSERT_EQ(batch.request_ids[static_cast<std::size_t>(i)], request.id);
    ASSERT_EQ(batch.sequence_lengths[static_cast<std::size_t>(i)], length);
    for (Index j = 0; j < longest; ++j) {
      ASSERT_EQ(batch.input_ids(i, j),
                j < length ? request.tokens[static_cast<std::size_t>(j)] : 0);
      ASSERT_EQ(batch.attention_mask(i, j), j < length ? 1 : 0);
    }
  }
  ASSERT_EQ(scheduler.can_add_more_requests(), model.can_add_more_requests());
  ASSERT_EQ(scheduler.waiting_count(), static_cast<Index>(model.waiting.size()));
  std::vector<std::string> finished;
  for (const auto& request : model.finished) finished.push_back(request.id);
  ASSERT_EQ(scheduler.finished_ids(), finished);
}

enum class Outcome { fine, invalid_argument, out_of_range };
template <typename F>
Outcome outcome(F&& f) {
  try {
    f();
    return Outcome::fine;
  } catch (const std::invalid_argument&) {
    return Outcome::invalid_argument;
  } catch (const std::out_of_range&) {
    return Outcome::out_of_range;
  }
}

TEST(ContinuousBatchScheduler, RandomEventsEqualThePlainModel) {
  for (unsigned seed = 1; seed <= 5; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](unsigned n) { return static_cast<Index>(random() % n); };
    const auto one_of = [&](const auto& list) { return list[random() % list.size()].id; };
    const Index max_batch = seed == 1 ? 1 : static_cast<Index>(seed) * 2,
                max_length = seed == 2 ? 2 : 12;
    ef::ContinuousBatchScheduler scheduler(max_batch, max_length);
    ef::reference::ContinuousBatchScheduler model{max_batch, max_length, {}, {}, {}};
    int refused = 0, taken = 0;
    for (int event = 0; event < 8000; ++event) {
      const std::string id = std::to_string(pick(40));
      const Index kind = pick(10);
      Outcome ours, expected;
      if (kind < 3) {
        Tokens prompt(static_cast<std::size_t>(pick(static_cast<unsigned>(max_length) + 2)));
        for (auto& token : prompt) token = static_cast<std::int32_t>(random());
        ours = outcome([&] { scheduler.add_request(id, prompt); });
        expected = outcome([&] { model.add_request(id, prompt); });
      } else if (kind < 9) {
        const std::string target =
            !model.active.empty() && pick(8) != 0 ? one_of(model.active) : id;
        const std::int32_t token = static_cast<std::int32_t>(random());
        const bool finished = pick(5) == 0;
        ours = outcome([&] { scheduler.update_batch(target, token, finished); });
        expected = outcome([&] { model.update_batch(target, token, finished); });
      } else {
        const std::string target =
            !model.finished.empty() && pick(4) != 0 ? one_of(model.finished) : id;
        Tokens text, expected_text;
        ours = outcome([&] { text = scheduler.take_finished(target); });
        expected = outcome([&] { expected_text = model.take_finished(target); });
        ASSERT_EQ(text, expected_text);
        taken += ours == Outcome::fine ? 1 : 0;
      }
      ASSERT_EQ(ours, expected) << "event " << event;
      refused += ours != Outcome::fine ? 1 : 0;
      ASSERT_NO_FATAL_FAILURE(expect_equal(scheduler, model)) << "event " << event;
    }
    EXPECT_GT(refused, 500);
    EXPECT_GT(taken, 100);
  }
}

TEST(ContinuousBatchScheduler, NotebookTimeline) {
  ef::ContinuousBatchScheduler scheduler(4, 100);
  for (const char* id : {"Req1", "Req2", "Req3", "Req4", "Req5", "Req6"})
    scheduler.add_request(id, {1, 2, 3});
  using Ids = std::vector<std::string>;
  EXPECT_EQ(scheduler.get_batch().request_ids, (Ids{"Req1", "Req2", "Req3", "Req4"}));
  scheduler.update_batch("Req2", 7, true);
  EXPECT_EQ(scheduler.get_batch().request_ids, (Ids{"Req1", "Req5", "Req3", "Req4"}));
  scheduler.update_batch("Req3", 7, true);
  EXPECT_EQ(scheduler.get_batch().request_ids, (Ids{"Req1", "Req5", "Req6", "Req4"}));
  EXPECT_FALSE(scheduler.can_add_more_requests());
  scheduler.update_batch("Req1", 7, true);
  EXPECT_EQ(scheduler.get_batch().request_ids, (Ids{"Req5", "Req6", "Req4"}));
  EXPECT_TRUE(scheduler.can_add_more_requests());
  scheduler.add_request("Req7", {1});
  EXPECT_EQ(scheduler.get_batch().request_ids, (Ids{"Req5", "Req6", "Req4", "Req7"}));
  EXPECT_EQ(scheduler.take_finished("Req2"), (Tokens{1, 2, 3, 7}));
  EXPECT_EQ(scheduler.finished_ids(), (Ids{"Req3", "Req1"}));
}

TEST(ContinuousBatchScheduler, ContractCallsCompileAsWritten) {
  const Index max_batch_size = 2, max_seq_length = 4;
  const std::string request_id = "a";
  const Tokens prompt_tokens{5, 6};
  const std::int32_t new_token = 9;
  const bool is_finished = false;
  ef::ContinuousBatchScheduler scheduler(max_batch_size, max_seq_length);
  scheduler.add_request(request_id, prompt_tokens);  // std::string, std::span<const std::int32_t>
  // request_ids, input_ids (batch, longest), attention_mask, sequence_lengths
  ef::Batch batch = scheduler.get_batch();
  scheduler.update_batch(request_id, new_token, is_finished);
  // a request added now would join the batch at once
  bool room = scheduler.can_add_more_requests();
  EXPECT_TRUE(room);
  EXPECT_EQ(batch.input_ids(0, 1), 6);
  scheduler.add_request("span", std::span<const std::int32_t>(prompt_tokens));
  scheduler.add_request(std::string_view("array"), std::array<std::int32_t, 3>{1, 2, 3});
  scheduler.update_batch("a", 8, false);  // at max_seq_length: finishes by itself
  EXPECT_TRUE(scheduler.is_finished("a"));
  EXPECT_EQ(scheduler.get_batch().request_ids, (std::vector<std::string>{"array", "span"}));
  EXPECT_EQ(scheduler.tokens("array").size(), 3u);
  ef::ContinuousBatchScheduler moved = std::move(scheduler);
  EXPECT_EQ(moved.take_finished("a"), (Tokens{5, 6, 9, 8}));
  EXPECT_FALSE(moved.is_finished("a"));
  const ef::Batch none = ef::ContinuousBatchScheduler(3, 3).get_batch();
  EXPECT_EQ(none.input_ids.dimension(0), 0);
  EXPECT_EQ(none.attention_mask.dimension(1), 0);
}

TEST(ContinuousBatchScheduler, ErrorsNameTheRequest) {
  ef::ContinuousBatchScheduler scheduler(1, 4);
  scheduler.add_request("a", {1});
  scheduler.add_request("b", {1});
  expect_throws<std::invalid_argument>([&] { scheduler.add_request("a", {1}); },
                                       {"request a exists already"});
  expect_throws<std::invalid_argument>([&] { scheduler.add_request("b", {1}); },
                                       {"request b exists already"});
  expect_throws<std::invalid_argument>([&] { scheduler.add_request("c", {}); },
                                       {"prompt of request c is empty"});
  expect_throws<std::invalid_argument>(
      [&] {
        scheduler.add_request("c", {1, 2, 3, 4});
      },
      {"4 tokens", "max_seq_length is 4"});
  expect_throws<std::out_of_range>([&] { scheduler.update_batch("z", 1, false); },
                                   {"no request z"});
  expect_throws<std::invalid_argument>([&] { scheduler.update_batch("b", 1, false); },
                                       {"request b is waiting"});
  expect_throws<std::invalid_argument>([&] { scheduler.take_finished("a"); },
                                       {"request a has not finished"});
  scheduler.update_batch("a", 2, true);
  expect_throws<std::invalid_argument>([&] { scheduler.update_batch("a", 1, false); },
                                       {"request a has finished already"});
  expect_throws<std::invalid_argument>([&] { scheduler.add_request("a", {1}); },
                                       {"request a exists already"});
  scheduler.take_finished("a");
  scheduler.add_request("a", {1});  // the id is free again
  EXPECT_THROW(ef::ContinuousBatchScheduler(0, 4), std::invalid_argument);
  EXPECT_THROW(ef::ContinuousBatchScheduler(4, 0), std::invalid_argument);
  EXPECT_EQ(scheduler.get_batch().request_ids, std::vector<std::string>{"b"});
}

TEST(ContinuousBatchScheduler, OutOfMemoryChangesNothing) {
  ef::ContinuousBatchScheduler scheduler(3, 50);
  ef::reference::ContinuousBatchScheduler model{3, 50, {}, {}, {}};
  int failures = 0;
  for (int i = 0; i < 6; ++i) {
    const std::string id =
        std::to_string(i) + ", a request whose name is too long for a small string";
    failures += with_failing_allocations(
        [&] {
          scheduler.add_request(id, {1, 2, 3});
        },
        [&] { expect_equal(scheduler, model); });
    model.add_request(id, {1, 2, 3});
    const std::string first = model.active.front().id;
    failures += with_failing_allocations([&] { scheduler.update_batch(first, i, i == 3); },
                                         [&] { expect_equal(scheduler, model); });
    model.update_batch(first, i, i == 3);
    expect_equal(scheduler, model);
  }
  EXPECT_GT(failures, 10);
}

TEST(ContinuousBatchScheduler, MovesWholeAlsoToItself) {
  ef::ContinuousBatchScheduler scheduler(1, 50);
  ef::reference::ContinuousBatchScheduler model{1, 50, {}, {}, {}};
  const auto add = [&](const std::string& id) {
    scheduler.add_request(id, {1, 2, 3});
    model.add_request(id, {1, 2, 3});
  };
  const auto finish = [&](const std::string& id) {
    scheduler.update_batch(id, 4, true);
    model.update_batch(id, 4, true);
  };
  add("a");
  add("b");
  finish("a");
  add("c");
  auto& same = scheduler;
  scheduler = std::move(same);
  expect_equal(scheduler, model);
  add("d");
  finish("b");
  expect_equal(scheduler, model);
  ef::ContinuousBatchScheduler other(7, 9);
  other.add_request("gone", {1});
  other = std::move(scheduler);
  expect_equal(other, model);
  EXPECT_EQ(other.max_batch_size(), 1);
  EXPECT_EQ(other.max_seq_length(), 50);
  EXPECT_EQ(scheduler.active_count() + scheduler.waiting_count() + scheduler.finished_count(), 0);
  scheduler = std::move(other);
  add("e");
  finish("c");
  expect_equal(scheduler, model);
}

}  // namespace
