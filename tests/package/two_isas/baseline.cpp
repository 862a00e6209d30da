#define EIGENFORMER_PART(name) baseline_##name
#include "part.inc"

void make_mask(Mask& problem, float* mask) {
  problem = {mask, 1, 3, 5, 2, eigenformer::problem::Visibility::of(true, 2, 1), nullptr, 0};
}
