/// \file
/// A model on the threads of a program, whatever the scalar it is held in.
#pragma once

#include <eigenformer/model.h>

#include <cstdio>
#include <memory>

#include "options.h"

namespace programs {

namespace ef = eigenformer;

/// Multiply-adds of one token in linear layers, and of one row of logits.
struct TokenWork {
  double layers = 0, head = 0;
};

/// Compiled once for all programs.
class LoadedModel {
 public:
  virtual ~LoadedModel() = default;
  virtual const ef::ModelConfig& config() const = 0;
  virtual const ef::Tokenizer& tokenizer() const = 0;
  virtual ef::Tensor<float, 2> logits(std::span<const std::int32_t> ids) = 0;
  /// What a text shares with the one before it is not computed again: `reused` tokens.
  virtual std::vector<std::int32_t> generate(std::span<const std::int32_t> ids,
                                             const ef::GenerateOptions& options) = 0;
  virtual ef::Index reused() const = 0;
  /// Bytes of the weights that a step reads.
  virtual std::size_t step_bytes() const = 0;
  /// Multiply-adds of a token in linear layers, and of a row of logits; of no model with experts.
  virtual TokenWork work_of_token() const = 0;
  /// Seconds of `steps` steps one after another, each of `tokens` tokens for each of `sequences`
  /// sequences, which begin empty, and with one row of logits for each.
  virtual double seconds_of_steps(ef::Index sequences, ef::Index tokens, ef::Index steps) = 0;
};

/// Loads with a progress bar and says on `log` what was loaded. Throws what load_model throws.
std::unique_ptr<LoadedModel> load(const ModelOptions& options, std::FILE* log);

/// Throws std::invalid_argument for parameters that no draw takes: before a model is loaded for it.
void require_sampling(const ef::SamplingParams& params);

/// Packs the model into a file, with the same progress bar. Throws what pack_model throws.
void pack(const ModelOptions& options, const std::string& packed, std::FILE* log);

}  // namespace programs
