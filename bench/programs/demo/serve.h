/// \file
/// Step (d) of the main job: 16 requests through StepScheduler, which batches continuously. Every
/// rank runs the same loop on its part of the linear layers; rank 0 prints.
#pragma once

#include <algorithm>
#include <cstdio>
#include <map>
#include <span>
#include <string>
#include <vector>

#include <eigenformer/decoder.h>
#include <eigenformer/sampling.h>
#include <eigenformer/scheduler.h>

#include "progress.h"
#include "text.h"

namespace demo {

struct Request {
  std::string id;
  std::string prompt;
  Index new_tokens;
  ef::SamplingParams sampling;
  std::string how;
};

/// The prompts that are held against the text, greedily, and six that sample in other ways and
/// lengths.
inline std::vector<Request> make_requests(const std::string& text) {
  std::vector<Request> requests;
  for (Index p = 0; p < kPrompts; ++p)
    requests.push_back({"recall-" + std::to_string(p),
                        text.substr(static_cast<std::size_t>(prompt_start(text, p)),
                                    static_cast<std::size_t>(kPromptLength)),
                        kContinuation,
                        {.temperature = 0.0f},
                        "greedy"});
  const auto piece = [&](Index tenth, Index length) {
    return text.substr(static_cast<std::size_t>(static_cast<Index>(text.size() - 100) * tenth / 10),
                       static_cast<std::size_t>(length));
  };
  requests.push_back({"topk-0", piece(1, 20), 120, {.temperature = 0.8f, .top_k = 5}, "top-k 5"});
  requests.push_back({"topk-1", piece(3, 33), 90, {.temperature = 1.0f, .top_k = 20}, "top-k 20"});
  requests.push_back(
      {"topp-0", piece(5, 12), 150, {.temperature = 0.9f, .top_p = 0.9f}, "top-p 0.9"});
  requests.push_back(
      {"topp-1", piece(7, 64), 60, {.temperature = 1.0f, .top_p = 0.5f}, "top-p 0.5"});
  requests.push_back({"mixed-0",
                      piece(8, 8),
                      100,
                      {.temperature = 0.7f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f},
                      "top-k 40, top-p 0.95, min-p 0.05"});
  requests.push_back({"greedy-0", piece(9, 5), 80, {.temperature = 0.0f}, "greedy"});
  return requests;
}

/// Prints what the requests generate as it comes: a line for each request whenever 64 characters or
/// a line end are there.
class Stream {
 public:
  explicit Stream(bool enabled) : enabled_(enabled) {}
  void token(const std::string& id, char c, bool last) {
    if (!enabled_) return;
    std::string& pending = pending_[id];
    pending += c == '\n' || c == '\t' ? ' ' : (c >= 32 && c < 127 ? c : '?');
    if (pending.size() >= 64 || last) {
      std::printf("  %-9s| %s%s\n", id.c_str(), pending.c_str(), last ? "  [done]" : "");
      std::fflush(stdout);
      pending.clear();
    }
  }

 private:
  bool enabled_;
  std::map<std::string, std::string> pending_;
};

struct ServingResult {
  std::map<std::string, std::string> generated;  // by request id
  double prefill_seconds = 0, decode_seconds = 0;
  Index prefill_tokens = 0, decode_tokens = 0, steps = 0;
};

/// What one rank does until every request is finished. `Model` is a decoder of this rank. Every
/// rank plans for itself: the same calls give the same plans.
template <typename Model>
class Server {
 public:
  Server(Model& model, const std::vector<Request>& requests, Index max_batch, bool prints,
         ef::OperatorProfile* profile)
      : model_(model),
        scheduler_({.max_batch_size = max_batch,
                    .max_seq_length = kLongest,
                    .token_budget = max_batch * kLongest,
                    .page_size = kPageSize,
                    .page_count = max_batch * kPagesEach}),
        profile_(profile),
        stream_(prints),
        cache_({.layers = model.config().layers,
                .kv_heads = model.config().kv_heads,
                .head_dim = model.config().head_dim,
                .page_size = kPageSize,
                .page_count = max_batch * kPagesEach}) {
    for (std::size_t r = 0; r < requests.size(); ++r) {
      const std::string& prompt = requests[r].prompt;
      std::vector<std::int32_t> tokens(prompt.size());
      for (std::size_t i = 0; i < prompt.size(); ++i)
        tokens[i] = static_cast<unsigned char>(prompt[i]);
      const ef::RequestTicket ticket = timed("scheduler", [&] {
        return scheduler_.submit(tokens, {.max_new_tokens = requests[r].new_tokens});
      });
      state_.emplace(ticket, State{&requests[r], ef::Philox(1000 + r), ef::SequenceId{}});
    }
  }

  ServingResult run() {
    while (timed("scheduler", [&] { return scheduler_.next_step(plan_); })) {
      step();
      ++result_.steps;
    }
    for (auto& [ticket, state] : state_) {
      const ef::FinishedRequest done = scheduler_.take_finished(ticket);
      std::string& text = result_.generated[state.request->id];
      for (std::size_t i = static_cast<std::size_t>(done.prompt_length); i < done.tokens.size();
           ++i)
        text += static_cast<char>(done.tokens[i]);
    }
    return std::move(result_);
  }

 private:
  struct State {
    const Request* request;
    ef::Philox random;
    ef::SequenceId sequence;
  };
  using Rows = std::vector<std::size_t>;

  // The budget never cuts a row, so a row is either a whole text, which is prefilled, or one token
  // behind what the cache holds. Texts are padded to the longest of the step. Every row is sampled
  // in its own way.
  void step() {
    for (ef::RequestTicket ticket : plan_.released) cache_.free(state_.at(ticket).sequence);
    Rows fresh, running;
    for (std::size_t row = 0; row < plan_.requests.size(); ++row)
      (plan_.positions[row] == 0 ? fresh : running).push_back(row);
    sampled_.clear();
    if (!fresh.empty()) sample(fresh, prefill(fresh));
    if (!running.empty()) sample(running, decode(running));
    timed("scheduler", [&] { scheduler_.complete(sampled_); });
    for (const ef::StepToken& token : sampled_)
      stream_.token(state_.at(token.request).request->id, static_cast<char>(token.token),
                    scheduler_.is_finished(token.request));
  }

  State& state_of(std::size_t row) { return state_.at(plan_.requests[row]); }
  std::span<const std::int32_t> tokens_of(std::size_t row) const {
    const auto begin = static_cast<std::size_t>(plan_.offsets[row]),
               end = static_cast<std::size_t>(plan_.offsets[row + 1]);
    return std::span(plan_.tokens).subspan(begin, end - begin);
  }

  ef::Tensor<float, 2> prefill(const Rows& rows) {
    std::vector<Index> lengths;
    for (std::size_t row : rows) lengths.push_back(static_cast<Index>(tokens_of(row).size()));
    ef::Tensor<std::int32_t, 2> ids(static_cast<Index>(rows.size()),
                                    *std::max_element(lengths.begin(), lengths.end()));
    ids.setConstant(-1);  // padding is never read
    sequences_.clear();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto tokens = tokens_of(rows[i]);
      std::copy(tokens.begin(), tokens.end(), &ids(static_cast<Index>(i), 0));
      sequences_.push_back(state_of(rows[i]).sequence = cache_.add_sequence());
      result_.prefill_tokens += lengths[i];
    }
    const auto start = Clock::now();
    auto logits = model_.prefill(ids, lengths, cache_, sequences_);
    result_.prefill_seconds += seconds_since(start);
    return logits;
  }

  ef::Tensor<float, 2> decode(const Rows& rows) {
    ef::Tensor<std::int32_t, 1> ids(static_cast<Index>(rows.size()));
    sequences_.clear();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      ids(static_cast<Index>(i)) = tokens_of(rows[i]).front();
      sequences_.push_back(state_of(rows[i]).sequence);
    }
    result_.decode_tokens += static_cast<Index>(rows.size());
    const auto start = Clock::now();
    auto logits = model_.decode(ids, cache_, sequences_);
    result_.decode_seconds += seconds_since(start);
    return logits;
  }

  void sample(const Rows& rows, const ef::Tensor<float, 2>& logits) {
    std::vector<ef::SamplingParams> params;
    std::vector<ef::Philox> random;
    for (std::size_t row : rows) {
      params.push_back(state_of(row).request->sampling);
      random.push_back(state_of(row).random);
    }
    const ef::Tensor<std::int32_t, 1> ids = timed("sampling", [&] {
      return ef::sample(logits, std::span<const ef::SamplingParams>(params),
                        std::span<ef::Philox>(random));
    });
    for (std::size_t i = 0; i < rows.size(); ++i) {
      state_of(rows[i]).random = random[i];
      sampled_.push_back({plan_.requests[rows[i]], ids(static_cast<Index>(i))});
    }
  }

  template <typename Call>
  decltype(auto) timed(std::string_view name, Call&& call) {
    return ef::OperatorProfile::timed(profile_, name, std::forward<Call>(call));
  }

  static constexpr Index kLongest = 4096;  // tokens of a text
  static constexpr Index kPageSize = 32, kPagesEach = 32;

  Model& model_;
  ef::StepScheduler scheduler_;
  ef::OperatorProfile* profile_;
  Stream stream_;
  ef::PagedKvCache<float> cache_;
  std::map<ef::RequestTicket, State> state_;
  ef::StepPlan plan_;
  std::vector<ef::StepToken> sampled_;
  std::vector<ef::SequenceId> sequences_;
  ServingResult result_;
};

}  // namespace demo
