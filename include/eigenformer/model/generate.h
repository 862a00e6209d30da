/// \file
/// Texts that a model writes; model.h is the manual.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "../model.h"
#include "../sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct GenerateOptions {
  Index max_new_tokens = 128;
  /// Greedy; its history is the text, where it has none.
  SamplingParams sampling = {.temperature = 0};
  std::uint64_t seed = 0;
  /// Called with each new token; false ends the text.
  std::function<bool(std::int32_t)> on_token = {};
  Index chunk = 512;  ///< tokens of a prompt that go through the layers at once
  /// Called after each chunk with the tokens of the prompt that the cache has, and all of them;
  /// false ends the text, which has no new tokens then. What was read stays in the cache.
  std::function<bool(Index, Index)> on_prompt = {};
  /// Tokens of the whole text, at most: what is given and what is new. 0: as many as the model has
  /// positions in a table (GPT-2); where positions turn there is no end.
  Index max_length = 0;
};

/// generate() over texts that begin alike, such as the turns of a chat: positions that a text
/// shares with the one before it stay in the cache and are not computed again. The model must
/// outlive it.
///
///   ef::TextGenerator generator(model);
///   auto answer = generator.generate(ids, {.max_new_tokens = 64});
///   ids.insert(ids.end(), answer.begin(), answer.end());
///   ids.insert(ids.end(), question.begin(), question.end());
///   answer = generator.generate(ids);                        // computes the question alone
///
/// Memory: a cache that grows with the text, by half of itself at a time; a token of one sequence
/// takes none between two such steps, but for what a pool of threads takes.
template <typename T, typename D>
class TextGenerator {
 public:
  explicit TextGenerator(Model<T, D>& model) : model_(model), cache_(memory_of(model.device())) {}

  /// Throws std::invalid_argument for no ids and for ids outside the vocabulary, std::length_error
  /// for more ids than max_length or the model's table of positions; the cache then knows the text
  /// before.
  std::vector<std::int32_t> generate(std::span<const std::int32_t> ids,
                                     const GenerateOptions& options = {}) {
    const Index limit = checked_limit(ids, options);
    const Index most = (std::min)(options.max_new_tokens, limit - static_cast<Index>(ids.size()));
    std::vector<std::int32_t> text;
    reused_ = 0;
    if (most <= 0) return text;
    if (!read(ids, options)) return text;
    SamplingParams params = options.sampling;
    const bool history = params.prompt_tokens.empty() && params.output_tokens.empty();
    if (history) params.prompt_tokens = ids;
    Philox random(options.seed);
    const std::vector<std::int32_t>& ends = model_.tokenizer().eos();
    while (true) {
      if (history) params.output_tokens = text;
      const std::int32_t token = draw(params, random);
      text.push_back(token);
      const bool more = !options.on_token || options.on_token(token);
      if (!more || static_cast<Index>(text.size()) == most ||
          std::find(ends.begin(), ends.end(), token) != ends.end())
        return text;
      step({&text.back(), 1}, true);
    }
  }

  /// Tokens of the last text that were in the cache when it came.
  Index reused() const { return reused_; }

 private:
  static constexpr auto kName = "generate";

  /// Tokens that the text may have.
  Index checked_limit(std::span<const std::int32_t> ids, const GenerateOptions& options) const {
    detail::require_that(!ids.empty(), kName, "ids is empty, expected one token at least");
    detail::require_that(options.max_new_tokens >= 0, kName, "max_new_tokens is ",
                         options.max_new_tokens, ", expected 0 or more");
    detail::require_that(options.chunk >= 1, kName, "chunk is ", options.chunk,
                         ", expected 1 or more");
    detail::require_that(options.max_length >= 0, kName, "max_length is ", options.max_length,
                         ", expected 0 (no limit of its own) or more");
    detail::require_ids(kName, ids, model_.config().shape.vocabulary);
    constexpr Index none = (std::numeric_limits<Index>::max)();
    const Index table = model_.config().form.positions;
    const Index limit =
        (std::min)(options.max_length > 0 ? options.max_length : none, table > 0 ? table : none);
    detail::require_capacity(static_cast<Index>(ids.size()) <= limit, kName, "ids has ", ids.size(),
                             " tokens, the text may have ", limit);
    return limit;
  }

  /// The logits after `ids`. At least the last of them is computed. False: on_prompt ended it.
  bool read(std::span<const std::int32_t> ids, const GenerateOptions& options) {
    const auto known = std::mismatch(known_.begin(), known_.end(), ids.begin(), ids.end() - 1);
    reused_ = known.first - known_.begin();
    cache_.truncate(reused_);
    known_.resize(static_cast<std::size_t>(reused_));
    const auto count = static_cast<Index>(ids.size());
    for (Index begin = reused_; begin < count; begin += options.chunk) {
      const Index size = (std::min)(options.chunk, count - begin);
      step(ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(size)),
           begin + size == count);
      if (options.on_prompt && !options.on_prompt(begin + size, count)) return false;
    }
    return true;
  }

  void step(std::span<const std::int32_t> tokens, bool wanted) {
    const std::array<Index, 2> offsets{0, static_cast<Index>(tokens.size())};
    const std::array<Index, 1> last{offsets[1] - 1};
    const std::span<const Index> logits_of(last.data(), wanted ? 1 : 0);
    const std::size_t before = known_.size();
    known_.insert(known_.end(), tokens.begin(), tokens.end());
    detail::attempt_or_undo(
        [&] {
          model_.decoder().step_into(logits_, StepRows{tokens, offsets, logits_of}, cache_);
        },
        [&] { known_.resize(before); });
  }

  std::int32_t draw(const SamplingParams& params, Philox& random) {
    SampleStatus status = SampleStatus::ok;
    std::int32_t token = 0;
    const TensorView<std::int32_t, 1> drawn(&token, 1);
    const std::span<SampleStatus> statuses(&status, 1);
    if constexpr (CpuDevice<D>)
      sample_into(model_.device(), drawn, logits_, params, random, statuses);
    else  // a GPU's logits have come to the host
      sample_into(Eigen::DefaultDevice{}, drawn, logits_, params, random, statuses);
    detail::require_good_rows(kName, {&status, 1});
    return token;
  }

  Model<T, D>& model_;
  KvCache<T> cache_;
  std::vector<std::int32_t> known_;  // what the cache holds
  Tensor<float, 2> logits_;
  Index reused_ = 0;
};

/// The tokens that follow `ids`, until one that ends a text (which is returned), max_new_tokens, or
/// max_length. Throws what TextGenerator::generate throws.
template <typename T, typename D>
std::vector<std::int32_t> generate(Model<T, D>& model, std::span<const std::int32_t> ids,
                                   const GenerateOptions& options = {}) {
  return TextGenerator<T, D>(model).generate(ids, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
