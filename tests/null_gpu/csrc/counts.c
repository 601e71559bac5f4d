// Counts of a process: `ctypes.c_long.in_dll(library, "nullgpu_launches")` and so on.
#include "null_gpu.h"

#define DEFINE(name) API long nullgpu_##name = 0;
COUNTS(DEFINE)
