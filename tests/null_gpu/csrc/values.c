// Numbers in memory, by their type.
#include "values.h"
#include <math.h>
#include <stdint.h>
#include <string.h>

const TypeInfo types[TYPES] = {
  [UNKNOWN] = {"", 1, -1}, [BOOL] = {"bool", 1, 11}, [UINT8] = {"unsigned char", 1, 0}, [INT8] = {"signed char", 1, 1},
  [INT16] = {"short", 2, 2}, [INT32] = {"int", 4, 3}, [INT64] = {"long", 8, 4}, [HALF] = {"c10::Half", 2, 5},
  [BFLOAT16] = {"c10::BFloat16", 2, 15}, [FLOAT] = {"float", 4, 6}, [DOUBLE] = {"double", 8, 7},
};

Type type_named(const char *text, size_t length) {
  for (int t = BOOL; t < TYPES; t++)
    if (strlen(types[t].name) == length && !strncmp(text, types[t].name, length)) return t;
  return UNKNOWN;
}
Type type_numbered(int scalar_type) {
  for (int t = BOOL; t < TYPES; t++)
    if (types[t].scalar_type == scalar_type) return t;
  return UNKNOWN;
}

long double load(const void *at, Type type) {
  switch (type) {
    case BOOL: return *(const uint8_t *)at != 0;
    case UINT8: return *(const uint8_t *)at;
    case INT8: return *(const int8_t *)at;
    case INT16: return *(const int16_t *)at;
    case INT32: return *(const int32_t *)at;
    case INT64: return *(const int64_t *)at;
    case HALF: return *(const _Float16 *)at;
    case BFLOAT16: {
      union { uint32_t bits; float value; } u = {(uint32_t)*(const uint16_t *)at << 16};
      return u.value;
    }
    case FLOAT: return *(const float *)at;
    case DOUBLE: return *(const double *)at;
    default: return 0;
  }
}
void store(void *at, Type type, long double value) {
  if (!isfinite(value)) value = 0;
  switch (type) {
    case BOOL: *(uint8_t *)at = value != 0; break;
    case UINT8: *(uint8_t *)at = (uint8_t)(int64_t)value; break;
    case INT8: *(int8_t *)at = (int8_t)(int64_t)value; break;
    case INT16: *(int16_t *)at = (int16_t)(int64_t)value; break;
    case INT32: *(int32_t *)at = (int32_t)(int64_t)value; break;
    case INT64: *(int64_t *)at = (int64_t)value; break;
    case HALF: *(_Float16 *)at = fabsl(value) > 65504 ? 0 : (_Float16)value; break;
    case BFLOAT16: {
      union { float value; uint32_t bits; } u = {(float)value};
      *(uint16_t *)at = u.bits >> 16;
      break;
    }
    case FLOAT: *(float *)at = (float)value; break;
    case DOUBLE: *(double *)at = (double)value; break;
    default: *(uint8_t *)at = 0;
  }
}
