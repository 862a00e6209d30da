/// \file
/// Where the tokens of top_p of the weight end in a divided row: what a rank is asked about its
/// shard, and how the answers of all are joined. Weights are floats, their sums have known errors,
/// and double sums decide what those leave open (cpu/sampling/nucleus.h is the same of one row).
#pragma once

#include "vocabulary_shard.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

enum class NucleusQuestion : std::uint8_t {
  none,
  sample,    // the weights below each of `ends`, estimated by a sample; how many tokens it has, 0
             // where the errors of floats are not known
  interval,  // the weights of logits from `lo` on, of the others, of those in [lo, hi]; how many
             // these are, which are listed where there is room
  exact      // in double: the weights of all, of logits above `lo`
};

struct ShardNucleus {
  static constexpr Index most_ends = 32;
  NucleusQuestion question;
  float lo, hi;
  float ends[most_ends];
};

EIGENFORMER_INLINE constexpr Index numbers_of(NucleusQuestion question) {
  switch (question) {
    case NucleusQuestion::none:
      return 0;
    case NucleusQuestion::sample:
      return ShardNucleus::most_ends + 1;
    case NucleusQuestion::interval:
      return 4;
    case NucleusQuestion::exact:
      return 2;
  }
  return 0;
}

/// Weights but those of `exact` are in a unit that all ranks share.
struct AskNucleus {
  ShardLogits<float> shard;
  const ShardRow<float>* rows;
  const ShardNucleus* nuclei;  // (rows)
  const Index* begin;          // (rows + 1) of the row's answer
  double* answers;
  float* listed;  // (rows, room) in token order
  Index room;
};

/// What all ranks have said of a row.
struct NucleusSums {
  double above, rest, inside;  // the answers to `interval`
};

/// The tokens of one logit at which the set ends.
struct NucleusEnd {
  float value;
  Index taken;   // of those of this logit, the first ones
  bool certain;  // whatever errors the sums have
};

/// From the logits listed by all ranks, which this narrows to the few around the end, best first.
struct NarrowNucleus {
  const ShardRow<float>& row;
  Index vocab;
  double p;
  NucleusSums sums;
  float lo, hi;   // of what is listed
  float* listed;  // room for 16 more
  Index& count;   // 0 after it where none were found
  NucleusEnd& end;
};

/// From what NarrowNucleus left of them and sums in double, that of all right to `error`.
struct EndNucleus {
  const ShardRow<float>& row;
  double p, above, total, error;
  const float* listed;
  Index count;
  NucleusEnd& end;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
