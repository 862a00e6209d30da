#define EIGENFORMER_PART(name) new_##name
#include "../part.inc"
