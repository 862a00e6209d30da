// Schedulers: 1000 events per call, so events per second are 1000 / time. Limit: none
// (bookkeeping); the peer is the plain model of reference/scheduler.h, vectors and linear searches,
// at 1000 requests waiting.
#include <eigenformer/reference/scheduler.h>
#include <eigenformer/scheduler.h>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

/// 1000 updates, each request finishing after 50; a new one is queued for each that finishes, so
/// that 1000 wait throughout.
template <typename Scheduler>
struct Load {
  explicit Load(Scheduler made) : scheduler(std::move(made)) {
    for (int i = 0; i < 64 + 1000; ++i) add();
  }
  void add() {
    scheduler.add_request(std::to_string(next), std::vector<std::int32_t>(20, 7));
    active.size() < 64 ? active.push_back(next) : void();
    ++next;
  }
  void run() {
    for (int event = 0; event < 1000; ++event) {
      const std::size_t slot = static_cast<std::size_t>(event) % 64;
      const std::string id = std::to_string(active[slot]);
      const bool finished = ++updates % 50 == 0;
      scheduler.update_batch(id, 1, finished);
      if (!finished) continue;
      scheduler.take_finished(id);
      active[slot] = first_waiting++;
      add();
    }
  }
  Scheduler scheduler;
  std::vector<int> active;
  int next = 0, first_waiting = 64;
  long updates = 0;
};

void continuous_batching(bench::Suite& suite) {
  const auto ours = std::make_shared<Load<ef::ContinuousBatchScheduler>>(
      ef::ContinuousBatchScheduler(64, 1 << 30));
  const auto plain = std::make_shared<Load<ef::reference::ContinuousBatchScheduler>>(
      ef::reference::ContinuousBatchScheduler{64, 1 << 30, {}, {}, {}});
  suite.row("update_batch x 1000, batch 64, 1000 waiting", bench::Limit{})
      .ours([=](const auto&) { ours->run(); })
      .peer_one_thread("plain model", [=] { plain->run(); });
}

void get_batch(bench::Suite& suite) {
  const auto scheduler = std::make_shared<ef::ContinuousBatchScheduler>(64, 4096);
  const auto texts = std::make_shared<std::vector<std::vector<std::int32_t>>>();
  for (int i = 0; i < 64; ++i) {
    texts->emplace_back(static_cast<std::size_t>(1 + i * 32), i);
    scheduler->add_request(std::to_string(i), texts->back());
  }
  suite
      .row("get_batch (64, 2017)",
           bench::Limit::write_bytes(2.0 * 64 * 2017 * sizeof(std::int32_t)))
      .ours([=](const auto&) { scheduler->get_batch(); })
      .peer("Eigen by hand", [=](const auto& device) {
        ef::Tensor<std::int32_t, 2> ids(64, 2017), mask(64, 2017);
        ids.device(device) = ids.constant(0);
        mask.device(device) = mask.constant(0);
        for (std::size_t i = 0; i < 64; ++i)
          for (std::size_t j = 0; j < (*texts)[i].size(); ++j) {
            ids(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) = (*texts)[i][j];
            mask(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) = 1;
          }
      });
}

void stepping(bench::Suite& suite) {
  struct Stepping {
    ef::StepScheduler scheduler{{.max_batch_size = 64,
                                 .max_seq_length = 2048,
                                 .token_budget = 512,
                                 .page_size = 16,
                                 .page_count = 4096}};
    ef::StepPlan plan;
    std::vector<ef::StepToken> sampled;
    std::vector<std::int32_t> prompt = std::vector<std::int32_t>(100, 3);
  };
  const auto state = std::make_shared<Stepping>();
  suite.row("StepScheduler: 16 steps of 64 requests, paged", bench::Limit{}).ours([=](const auto&) {
    auto& scheduler = state->scheduler;
    for (int step = 0; step < 16; ++step) {
      for (ef::RequestTicket done : scheduler.finished()) scheduler.take_finished(done);
      while (scheduler.statistics().waiting < 64)
        scheduler.submit(state->prompt, {.max_new_tokens = 100});
      scheduler.next_step(state->plan);
      state->sampled.clear();
      for (std::size_t i = 0; i < state->plan.requests.size(); ++i)
        if (state->plan.wants_token[i] != 0)
          state->sampled.push_back({state->plan.requests[i], 5, false});
      scheduler.complete(state->sampled);
    }
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(continuous_batching)
EIGENFORMER_BENCHMARK(get_batch)
EIGENFORMER_BENCHMARK(stepping)
