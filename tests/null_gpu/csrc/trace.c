// NULLGPU_TRACE=1: each launch by its name, and each copy to the host, on standard error.
#include "null_gpu.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

void trace(const char *format, ...) {
  static int on = -1;
  if (on < 0) on = getenv("NULLGPU_TRACE") != NULL;
  if (!on) return;
  va_list more;
  va_start(more, format);
  fputs("null GPU: ", stderr);
  vfprintf(stderr, format, more);
  fputc('\n', stderr);
  va_end(more);
}
