#define EIGENFORMER_PART(name) old_##name
#include "../part.inc"
