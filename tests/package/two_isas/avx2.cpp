#define EIGENFORMER_PART(name) avx2_##name
#include "part.inc"
