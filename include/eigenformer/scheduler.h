/// \file
/// Continuous batching (Yu et al., "Orca: A Distributed Serving System for Transformer-Based
/// Generative Models", OSDI 2022): a sequence that finishes leaves the batch at once, and the next
/// request takes its place. No model inside: batches out, tokens in, the same calls give the same
/// batches.
///
///   ef::ContinuousBatchScheduler scheduler(max_batch_size, max_seq_length);
///   scheduler.add_request("a", prompt);
///   while (scheduler.active_count() > 0) {
///     const ef::Batch batch = scheduler.get_batch();              // run the model on batch.input_ids
///     for (...) scheduler.update_batch(batch.request_ids[i], token, token == end_of_sequence);
///   }
///   std::vector<std::int32_t> text = scheduler.take_finished("a");   // prompt and everything generated
///
/// The batch is a row of slots. A request added while there is room stands behind the active ones;
/// otherwise it waits, first come first served. A request finishes when update_batch says so, or
/// when its text reaches max_seq_length, the last token included either way. Then, in the same
/// call, the first waiting request takes its very slot; where nobody waits, the requests behind it
/// close up. No other request moves, so active requests keep their order: [1, 2, 3, 4] with 5
/// waiting becomes [1, 5, 3, 4] when 2 finishes.
///
/// An id is in use from add_request until its text is taken. Errors change nothing:
/// std::invalid_argument for an id in use, an empty prompt, a prompt of max_seq_length tokens or
/// more, an update of a request that waits or has finished; std::out_of_range for an unknown id.
/// Every call is O(1) in the number of requests waiting and finished; get_batch is O(its output),
/// an update that closes a gap O(batch). For one thread at a time. Movable, not copyable; what was
/// moved from has no requests.
///
/// Token budgets, chunked prefill, pages, preemption, priorities and cancellation are
/// StepScheduler's: scheduler/step_scheduler.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <list>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/tensor.h"
#include "scheduler/step_scheduler.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// What the model is to run: row i belongs to request_ids[i].
struct Batch {
  std::vector<std::string> request_ids;
  Tensor<std::int32_t, 2>
      input_ids;  ///< (batch, longest): prompt and generated tokens, 0 past a row's length
  Tensor<std::int32_t, 2> attention_mask;  ///< (batch, longest): 1 within a row's length, 0 past it
  std::vector<Index> sequence_lengths;     ///< (batch)
};

class ContinuousBatchScheduler {
 public:
  /// Throws std::invalid_argument where a size is below 1.
  ContinuousBatchScheduler(Index max_batch_size, Index max_seq_length)
      : max_batch_size_(max_batch_size), max_seq_length_(max_seq_length) {
    detail::require_that(max_batch_size >= 1, kName, "max_batch_size is ", max_batch_size,
                         ", expected 1 or more");
    detail::require_that(max_seq_length >= 1, kName, "max_seq_length is ", max_seq_length,
                         ", expected 1 or more");
  }
  ContinuousBatchScheduler(ContinuousBatchScheduler&&) = default;
  ContinuousBatchScheduler& operator=(ContinuousBatchScheduler&& other) {
    if (this == &other) return *this;  // members moved to themselves would lose what others name
    max_batch_size_ = other.max_batch_size_;
    max_seq_length_ = other.max_seq_length_;
    waiting_ = std::move(other.waiting_);
    active_ = std::move(other.active_);
    finished_ = std::move(other.finished_);
    slots_ = std::move(other.slots_);
    requests_ = std::move(other.requests_);
    return *this;
  }

  /// Adds a request to the batch, or to the queue where the batch is full. The tokens are copied.
  void add_request(std::string_view request_id, std::span<const std::int32_t> prompt_tokens) {
    detail::require_that(requests_.find(request_id) == requests_.end(), kName, "request ",
                         request_id, " exists already");
    detail::require_that(!prompt_tokens.empty(), kName, "the prompt of request ", request_id,
                         " is empty");
    detail::require_that(std::cmp_less(prompt_tokens.size(), max_seq_length_), kName,
                         "the prompt of request ", request_id, " has ", prompt_tokens.size(),
                         " tokens, max_seq_length is ", max_seq_length_);
    const bool joins = can_add_more_requests();
    if (joins && slots_.size() == slots_.capacity()) slots_.reserve(slots_.size() * 2 + 8);
    std::list<Request> fresh;
    fresh.push_back(
        {std::string(request_id), {prompt_tokens.begin(), prompt_tokens.end()}, State::waiting, 0});
    const auto request = fresh.begin();
    requests_.emplace(request->id, request);  // the last that may throw
    waiting_.splice(waiting_.end(), fresh);
    if (joins) {
      slots_.push_back(request);
      activate(slots_.size() - 1);
    }
  }
  void add_request(std::string_view request_id, std::initializer_list<std::int32_t> prompt_tokens) {
    add_request(request_id,
                std::span<const std::int32_t>(prompt_tokens.begin(), prompt_tokens.size()));
  }

  /// The active requests in the order of their slots; all tensors (0, 0) where there are none.
  /// Throws std::invalid_argument where a padded tensor overflows, std::bad_alloc.
  Batch get_batch() const {
    const Index batch = active_count();
    Index longest = 0;
    for (const auto& request : slots_)
      longest = (std::max)(longest, static_cast<Index>(request->tokens.size()));
    detail::checked_product(batch, longest, kName, "input_ids (batch, longest)");
    Batch result;
    result.request_ids.reserve(slots_.size());
    result.sequence_lengths.reserve(slots_.size());
    result.input_ids = Tensor<std::int32_t, 2>(batch, longest);
    result.attention_mask = Tensor<std::int32_t, 2>(batch, longest);
    for (Index row = 0; row < batch; ++row) {
      const Request& request = *slots_[static_cast<std::size_t>(row)];
      const Index length = static_cast<Index>(request.tokens.size());
      std::int32_t* ids = result.input_ids.data() + row * longest;
      std::int32_t* mask = result.attention_mask.data() + row * longest;
      std::fill(std::copy(request.tokens.begin(), request.tokens.end(), ids), ids + longest, 0);
      std::fill(std::fill_n(mask, length, 1), mask + longest, 0);
      result.request_ids.push_back(request.id);
      result.sequence_lengths.push_back(length);
    }
    return result;
  }

  /// Appends the new token, the last one of a finished request included; who finishes makes room in
  /// this call.
  void update_batch(std::string_view request_id, std::int32_t new_token, bool is_finished) {
    const auto request = find(request_id);
    detail::require_that(request->state == State::active, kName, "request ", request_id,
                         request->state == State::waiting ? " is waiting, not in the batch"
                                                          : " has finished already");
    request->tokens.push_back(new_token);
    if (is_finished || static_cast<Index>(request->tokens.size()) >= max_seq_length_)
      finish(request);
  }

  /// A request added now would join the batch at once.
  bool can_add_more_requests() const { return active_count() < max_batch_size_; }

  /// The whole text of a finished request, which is then forgotten: its id is free again. Throws
  /// std::out_of_range for an unknown id, std::invalid_argument where it has not finished.
  std::vector<std::int32_t> take_finished(std::string_view request_id) {
    const auto request = find(request_id);
    detail::require_that(request->state == State::finished, kName, "request ", request_id,
                         " has not finished");
    std::vector<std::int32_t> tokens = std::move(request->tokens);
    requests_.erase(request_id);
    finished_.erase(request);
    return tokens;
  }

  /// The text so far, in any state; valid until the scheduler is next changed. Throws
  /// std::out_of_range.
  std::span<const std::int32_t> tokens(std::string_view request_id) const {
    return find(request_id)->tokens;
  }

  /// Finished and not yet taken; false for an unknown id.
  bool is_finished(std::string_view request_id) const {
    const auto found = requests_.find(request_id);
    return found != requests_.end() && found->second->state == State::finished;
  }
  /// Ids of finished requests that were not taken, in the order in which they finished.
  std::vector<std::string> finished_ids() const {
    std::vector<std::string> ids;
    for (const Request& request : finished_) ids.push_back(request.id);
    return ids;
  }

  Index active_count() const { return static_cast<Index>(slots_.size()); }
  Index waiting_count() const { return static_cast<Index>(waiting_.size()); }
  Index finished_count() const { return static_cast<Index>(finished_.size()); }
  Index max_batch_size() const { return max_batch_size_; }
  Index max_seq_length() const { return max_seq_length_; }

 private:
  static constexpr const char* kName = "ContinuousBatchScheduler";
  enum class State { waiting, active, finished };
  struct Request {
    std::string id;
    std::vector<std::int32_t> tokens;
    State state;
    std::size_t slot;
  };
  // A request is a list node that moves between three lists by splicing, which neither allocates
  // nor throws.
  using Handle = std::list<Request>::iterator;

  Handle find(std::string_view request_id) const {
    const auto found = requests_.find(request_id);
    detail::require_known(found != requests_.end(), kName, "no request ", request_id);
    return found->second;
  }

  /// slots_[slot] holds a waiting request: it becomes active.
  void activate(std::size_t slot) {
    const Handle request = slots_[slot];
    request->state = State::active;
    request->slot = slot;
    active_.splice(active_.end(), waiting_, request);
  }

  void finish(Handle request) {
    const std::size_t slot = request->slot;
    request->state = State::finished;
    finished_.splice(finished_.end(), active_, request);
    if (!waiting_.empty()) {
      slots_[slot] = waiting_.begin();
      activate(slot);
    } else {
      slots_.erase(slots_.begin() + static_cast<std::ptrdiff_t>(slot));
      for (std::size_t i = slot; i < slots_.size(); ++i) slots_[i]->slot = i;
    }
  }

  Index max_batch_size_, max_seq_length_;
  std::list<Request> waiting_, active_, finished_;
  std::vector<Handle> slots_;                              // the batch, in order
  std::unordered_map<std::string_view, Handle> requests_;  // keys are the ids in the nodes
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
