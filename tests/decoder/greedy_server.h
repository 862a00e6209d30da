/// \file
/// A scheduler's requests served to their ends: steps of a decoder over a paged cache.
#pragma once

#include <map>
#include <vector>

#include <eigenformer/paged_kv_cache.h>
#include <eigenformer/sampling.h>
#include <eigenformer/scheduler.h>

#include "compare.h"

namespace eigenformer_test {

/// Serves all that a scheduler has, by likeliest tokens: logits_of(plan, cache, sequences) is its
/// step.
template <typename Cache, typename Logits>
void serve_greedily(ef::StepScheduler& scheduler, Cache& cache, Logits&& logits_of) {
  std::map<ef::RequestTicket, ef::SequenceId> held;
  ef::StepPlan plan;
  while (scheduler.next_step(plan)) {
    for (const auto ticket : plan.released)
      if (const auto found = held.find(ticket); found != held.end()) {
        cache.free(found->second);
        held.erase(found);
      }
    std::vector<ef::SequenceId> sequences;
    for (const auto ticket : plan.requests) {
      if (held.count(ticket) == 0) held[ticket] = cache.add_sequence();
      sequences.push_back(held[ticket]);
    }
    const auto drawn = ef::greedy_sample(logits_of(plan, cache, sequences));
    std::vector<ef::StepToken> sampled;
    for (std::size_t i = 0; i < plan.requests.size(); ++i)
      if (plan.wants_token[i] != 0)
        sampled.push_back({plan.requests[i], drawn(static_cast<Index>(sampled.size())), false});
    scheduler.complete(sampled);
  }
}

}  // namespace eigenformer_test
