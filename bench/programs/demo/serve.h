/// \file
/// Step (d) of the main job: 16 requests through the continuous-batching scheduler. Every rank runs
/// the same loop on its part of the linear layers; rank 0 prints.
#pragma once

#include <cstdio>
#include <map>
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

/// What one rank does until every request is finished. `Model` is a decoder of this rank.
template <typename Model>
class Server {
 public:
  Server(Model& model, const std::vector<Request>& requests, Index max_batch, bool prints,
         ef::OperatorProfile* profile)
      : model_(model),
        requests_(requests),
        scheduler_(max_batch, /*max_seq_length=*/4096),
        profile_(profile),
        stream_(prints),
        cache_({.layers = model.config().layers,
                .kv_heads = model.config().kv_heads,
                .head_dim = model.config().head_dim,
                .page_size = 32,
                .page_count = max_batch * 32}) {
    for (std::size_t r = 0; r < requests.size(); ++r) {
      const std::string& prompt = requests[r].prompt;
      std::vector<std::int32_t> tokens(prompt.size());
      for (std::size_t i = 0; i < prompt.size(); ++i)
        tokens[i] = static_cast<unsigned char>(prompt[i]);
      timed("scheduler", [&] { scheduler_.add_request(requests[r].id, tokens); });
      state_[requests[r].id] = {&requests[r], ef::Philox(1000 + r), 0, false, 0};
    }
  }

  ServingResult run() {
    for (;;) {
      const ef::Batch batch = timed("scheduler", [&] { return scheduler_.get_batch(); });
      if (batch.request_ids.empty()) break;
      step(batch);
      ++result_.steps;
    }
    return std::move(result_);
  }

 private:
  struct State {
    const Request* request;
    ef::Philox random;
    ef::SequenceId sequence;
    bool prefilled;
    Index generated;
  };

  // Newcomers are prefilled together, padded to the longest prompt; the others decode one token.
  // Then every row is sampled in its own way.
  void step(const ef::Batch& batch) {
    std::vector<Index> fresh, running;
    for (std::size_t r = 0; r < batch.request_ids.size(); ++r)
      (state_.at(batch.request_ids[r]).prefilled ? running : fresh)
          .push_back(static_cast<Index>(r));
    if (!fresh.empty()) sample(batch, fresh, prefill(batch, fresh));
    if (!running.empty()) sample(batch, running, decode(batch, running));
  }

  ef::Tensor<float, 2> prefill(const ef::Batch& batch, const std::vector<Index>& rows) {
    std::vector<Index> lengths;
    Index longest = 0;
    for (Index r : rows) {
      lengths.push_back(batch.sequence_lengths[static_cast<std::size_t>(r)]);
      longest = std::max(longest, lengths.back());
    }
    ef::Tensor<std::int32_t, 2> ids(static_cast<Index>(rows.size()), longest);
    ids.setConstant(-1);  // padding is never read
    sequences_.clear();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (Index t = 0; t < lengths[i]; ++t)
        ids(static_cast<Index>(i), t) = batch.input_ids(rows[i], t);
      State& state = state_.at(batch.request_ids[static_cast<std::size_t>(rows[i])]);
      state.sequence = cache_.add_sequence();
      state.prefilled = true;
      sequences_.push_back(state.sequence);
      result_.prefill_tokens += lengths[i];
    }
    const auto start = Clock::now();
    auto logits = model_.prefill(ids, lengths, cache_, sequences_);
    result_.prefill_seconds += seconds_since(start);
    return logits;
  }

  ef::Tensor<float, 2> decode(const ef::Batch& batch, const std::vector<Index>& rows) {
    ef::Tensor<std::int32_t, 1> ids(static_cast<Index>(rows.size()));
    sequences_.clear();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      ids(static_cast<Index>(i)) =
          batch.input_ids(rows[i], batch.sequence_lengths[static_cast<std::size_t>(rows[i])] - 1);
      sequences_.push_back(
          state_.at(batch.request_ids[static_cast<std::size_t>(rows[i])]).sequence);
    }
    result_.decode_tokens += static_cast<Index>(rows.size());
    const auto start = Clock::now();
    auto logits = model_.decode(ids, cache_, sequences_);
    result_.decode_seconds += seconds_since(start);
    return logits;
  }

  void sample(const ef::Batch& batch, const std::vector<Index>& rows,
              const ef::Tensor<float, 2>& logits) {
    std::vector<ef::SamplingParams> params;
    std::vector<ef::Philox> random;
    for (Index r : rows) {
      const State& state = state_.at(batch.request_ids[static_cast<std::size_t>(r)]);
      params.push_back(state.request->sampling);
      random.push_back(state.random);
    }
    const ef::Tensor<std::int32_t, 1> ids = timed("sampling", [&] {
      return ef::sample(logits, std::span<const ef::SamplingParams>(params),
                        std::span<ef::Philox>(random));
    });
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::string& id = batch.request_ids[static_cast<std::size_t>(rows[i])];
      State& state = state_.at(id);
      state.random = random[i];
      const bool finished = ++state.generated == state.request->new_tokens;
      const std::int32_t token = ids(static_cast<Index>(i));
      result_.generated[id] += static_cast<char>(token);
      timed("scheduler", [&] { scheduler_.update_batch(id, token, finished); });
      if (finished) cache_.free(state.sequence);
      stream_.token(id, static_cast<char>(token), finished);
    }
  }

  template <typename Call>
  decltype(auto) timed(std::string_view name, Call&& call) {
    return ef::OperatorProfile::timed(profile_, name, std::forward<Call>(call));
  }

  Model& model_;
  const std::vector<Request>& requests_;
  ef::ContinuousBatchScheduler scheduler_;
  ef::OperatorProfile* profile_;
  Stream stream_;
  ef::PagedKvCache<float> cache_;
  std::map<std::string, State> state_;
  std::vector<ef::SequenceId> sequences_;
  ServingResult result_;
};

}  // namespace demo
