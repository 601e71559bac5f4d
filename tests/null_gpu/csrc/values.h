// Numbers in memory, by their type.
#ifndef VALUES_H
#define VALUES_H
#include <stddef.h>

typedef enum { UNKNOWN, BOOL, UINT8, INT8, INT16, INT32, INT64, HALF, BFLOAT16, FLOAT, DOUBLE } Type;
enum { TYPES = DOUBLE + 1 };
typedef struct {
  const char *name;
  size_t bytes;
  int scalar_type; // c10::ScalarType
} TypeInfo;
extern const TypeInfo types[TYPES];

Type type_named(const char *text, size_t length);
Type type_numbered(int scalar_type);
static inline int is_float(Type type) { return type >= HALF; }

// A long double holds every value of every type. Infinities and NaN are stored as 0.
long double load(const void *at, Type type);
void store(void *at, Type type, long double value);
#endif
