// generate for GPUs: one unit, as what the library hands from unit to unit is of one compiler's.
#include "loading.cpp"

#include "generate.cpp"
