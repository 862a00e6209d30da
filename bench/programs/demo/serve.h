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
  // Of steps with a chunk of a prompt in them, and of steps of single tokens.
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
                    .token_budget = kBudget,
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

  // One step of the decoder computes all rows of the plan, chunks of prompts and single tokens side
  // by side. Then every row that wants a token is sampled in its own way.
  void step() {
    for (ef::RequestTicket ticket : plan_.released) cache_.free(state_.at(ticket).sequence);
    sequences_.clear();
    bool prompts = false;
    for (std::size_t row = 0; row < plan_.requests.size(); ++row) {
      State& state = state_.at(plan_.requests[row]);
      if (plan_.positions[row] == 0) state.sequence = cache_.add_sequence();
      sequences_.push_back(state.sequence);
      prompts = prompts || plan_.offsets[row + 1] - plan_.offsets[row] > 1;
    }
    const auto start = Clock::now();
    model_.step_into(logits_, plan_, cache_, sequences_);
    (prompts ? result_.prefill_seconds : result_.decode_seconds) += seconds_since(start);
    (prompts ? result_.prefill_tokens : result_.decode_tokens) += plan_.offsets.back();
    sample();
    timed("scheduler", [&] { scheduler_.complete(sampled_); });
    for (const ef::StepToken& token : sampled_)
      stream_.token(state_.at(token.request).request->id, static_cast<char>(token.token),
                    scheduler_.is_finished(token.request));
  }

  void sample() {
    sampled_.clear();
    params_.clear();
    random_.clear();
    for (std::size_t row = 0; row < plan_.requests.size(); ++row)
      if (plan_.wants_token[row] != 0) {
        const State& state = state_.at(plan_.requests[row]);
        params_.push_back(state.request->sampling);
        random_.push_back(state.random);
        sampled_.push_back({plan_.requests[row]});
      }
    const ef::Tensor<std::int32_t, 1> ids =
        timed("sampling", [&] { return ef::sample(logits_, params_, random_); });
    for (std::size_t i = 0; i < sampled_.size(); ++i) {
      state_.at(sampled_[i].request).random = random_[i];
      sampled_[i].token = ids(static_cast<Index>(i));
    }
  }

  template <typename Call>
  decltype(auto) timed(std::string_view name, Call&& call) {
    return ef::OperatorProfile::timed(profile_, name, std::forward<Call>(call));
  }

  static constexpr Index kLongest = 4096;  // tokens of a text
  static constexpr Index kBudget = 256;    // tokens of a step: a longer prompt comes in chunks
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
  std::vector<ef::SamplingParams> params_;
  std::vector<ef::Philox> random_;
  ef::Tensor<float, 2> logits_;
  ServingResult result_;
};

}  // namespace demo
