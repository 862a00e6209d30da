/// \file
/// What a StepScheduler takes and gives: options, the plan of a step, its results.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Names a request of a StepScheduler; rises with every submission and is never used again.
using RequestTicket = std::int64_t;

struct StepSchedulerOptions {
  Index max_batch_size = 8;     ///< requests running at once
  Index max_seq_length = 2048;  ///< longest text, prompt included
  Index token_budget = 512;     ///< most tokens of a step, room for drafts included
  Index prefill_chunk = 0;      ///< most tokens of one request in a step; 0 means token_budget
  Index page_size = 0;          ///< positions in a page; 0 means that pages are not counted
  Index page_count = 0;
};

struct SubmitOptions {
  int priority = 0;          ///< higher goes first
  Index max_new_tokens = 0;  ///< 0 means up to max_seq_length
  Index shared_prefix = 0;   ///< first tokens of the prompt that the cache holds for all
  Index draft_tokens = 0;    ///< draft tokens that a step may verify at most
};

/// One step, ragged: row i computes tokens [offsets[i], offsets[i + 1]) of requests[i] at
/// positions[i] onwards. Offsets are those that variable_length_attention and PagedKvCache::append
/// take.
struct StepPlan {
  /// Preempted, finished or cancelled since the last plan: free what the cache holds for them
  /// first. After a discarded step a name may come for which it holds nothing.
  std::vector<RequestTicket> released;
  std::vector<RequestTicket> requests;  ///< in order of rank; position shared_prefix (0) begins one
  std::vector<Index> offsets;           ///< (rows + 1)
  std::vector<Index> positions;         ///< (rows) of the row's first token
  std::vector<std::int32_t> tokens;     ///< (offsets.back())
  /// (rows) 1 where the row ends its text, so that the next token is to be sampled
  std::vector<std::uint8_t> wants_token;
  std::vector<Index> drafts;  ///< (rows) draft tokens for which there is room behind the row's own
};

/// What was sampled for a row; several for one row stand in the order of the text.
struct StepToken {
  RequestTicket request = -1;
  std::int32_t token = 0;
  bool is_finished = false;
};

enum class FinishReason { told, length };

struct FinishedRequest {
  std::vector<std::int32_t> tokens;  ///< prompt and generated, the last token included
  Index prompt_length = 0;
  FinishReason reason = FinishReason::told;
};

struct StepSchedulerStatistics {
  Index waiting = 0, running = 0;
  Index pages_used = 0, pages_peak = 0;  ///< now, and the most that were ever held
  std::int64_t submitted = 0, finished = 0, cancelled = 0, preempted = 0;
  std::int64_t steps = 0, tokens_computed = 0;  ///< rejected drafts and cancelled rows left out
  std::int64_t tokens_discarded = 0;            ///< computed, then given up by preemption
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
