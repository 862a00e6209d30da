#define EIGENFORMER_PART(name) baseline_##name
#include "part.inc"
