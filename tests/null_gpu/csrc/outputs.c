// What kernels leave in memory. Those of three templates of torch, element by element and reductions, are known by their
// names. What a program's control flow hangs on is carried out: fills, copies, comparisons, logic, and sums of integers.
// Other results of theirs are 0. All other kernels, and those on more than MOST_COMPUTED elements, leave memory as it was.
// No infinity or NaN is ever stored, so that a run's numbers stay finite.
#include "null_gpu.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_COMPUTED = 1 << 16 };

typedef enum { UNKNOWN, BOOL, UINT8, INT8, INT16, INT32, INT64, HALF, BFLOAT16, FLOAT, DOUBLE } Type;
static const struct {
  const char *name;
  size_t bytes;
  int scalar_type; // c10::ScalarType
} types[] = {
  [UNKNOWN] = {"", 1, -1}, [BOOL] = {"bool", 1, 11}, [UINT8] = {"unsigned char", 1, 0}, [INT8] = {"signed char", 1, 1},
  [INT16] = {"short", 2, 2}, [INT32] = {"int", 4, 3}, [INT64] = {"long", 8, 4}, [HALF] = {"c10::Half", 2, 5},
  [BFLOAT16] = {"c10::BFloat16", 2, 15}, [FLOAT] = {"float", 4, 6}, [DOUBLE] = {"double", 8, 7},
};
enum { TYPES = sizeof types / sizeof *types };

static Type type_named(const char *text, size_t length) {
  for (Type t = BOOL; t < TYPES; t++)
    if (strlen(types[t].name) == length && !strncmp(text, types[t].name, length)) return t;
  return UNKNOWN;
}
static Type type_numbered(int scalar_type) {
  for (Type t = BOOL; t < TYPES; t++)
    if (types[t].scalar_type == scalar_type) return t;
  return UNKNOWN;
}
static int is_float(Type t) { return t >= HALF; }

// A long double holds every value of every type.
static long double load(const void *at, Type type) {
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
static void store(void *at, Type type, long double value) {
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

typedef enum { ELEMENTS, REDUCTION, CONCATENATION, NORMS, COUNT_NONZERO, SELECTION } Form;
typedef enum { ZERO, FILL, COPY, COMPARE, AND, OR, NOT, ADD, ADD_SCALAR } Operation;
struct Plan {
  Form form;
  int casts;                     // loads and stores that convert
  int inputs;                    // tensors, at most
  int bytes;                     // of an element that is only moved
  int scalar;                    // 1: the first operand is a number in the functor, 2: the second
  int equality;                  // of comparisons: == and !=, not >=, >, <= and <
  Operation operation;
  Type in, out;
};

// The `number`th template argument of the text behind "name<", and its length; NULL without one.
static const char *argument(const char *text, const char *name, int number, size_t *length) {
  const char *at = strstr(text, name);
  if (!at) return NULL;
  const char *start = at += strlen(name);
  for (int depth = 0; *at; at++) {
    if (!depth && (*at == ',' || *at == '>')) {
      if (!number--) return *length = at - start, start;
      if (*at == '>') return NULL;
      start = at + 2;
    }
    depth += *at == '<' || *at == '(' || *at == '{';
    depth -= *at == '>' || *at == ')' || *at == '}';
  }
  return NULL;
}
static Type type_argument(const char *text, const char *name, int number) {
  size_t length;
  const char *found = argument(text, name, number, &length);
  return found ? type_named(found, length) : UNKNOWN;
}

static void plan_functor(Plan *plan, const char *f) {
  static const char *two[] = {"at::native::BinaryFunctor<", "at::native::AUnaryFunctor<", "at::native::BUnaryFunctor<"};
  for (int i = 0; i < 3; i++)
    if (!strncmp(f, two[i], strlen(two[i]))) {
      plan->in = type_argument(f, two[i], 0), plan->out = type_argument(f, two[i], 2), plan->scalar = i;
    }
  if (!plan->out) { // a functor of one type, or a function of one: lambda(float)#1
    const char *lambda = NULL;
    for (const char *at = f; (at = strstr(at, "{lambda(")); at++) lambda = at + strlen("{lambda(");
    if (lambda) plan->in = plan->out = type_named(lambda, strcspn(lambda, ",)"));
    else plan->in = plan->out = type_argument(f, "<", 0);
  }
  if (strstr(f, "FillFunctor<")) plan->operation = FILL;
  else if (strstr(f, "direct_copy_kernel_cuda")) plan->operation = COPY;
  else if (strstr(f, "bfloat16_copy_kernel_cuda")) plan->operation = COPY, plan->out = BFLOAT16;
  else if (strstr(f, "float16_copy_kernel_cuda")) plan->operation = COPY, plan->out = HALF;
  else if (strstr(f, "CompareEqFunctor<")) plan->operation = COMPARE, plan->equality = 1;
  else if (strstr(f, "CompareFunctor<")) plan->operation = COMPARE;
  else if (strstr(f, "compare_scalar_kernel<")) plan->operation = COMPARE, plan->scalar = 2, plan->out = BOOL;
  else if (strstr(f, "logical_not_kernel")) plan->operation = NOT, plan->out = BOOL;
  else if (plan->out == BOOL && strstr(f, "bitwise_not")) plan->operation = NOT;
  else if (strstr(f, "logical_and_kernel") || (plan->out == BOOL && (strstr(f, "BitwiseAndFunctor") || strstr(f, "MulFunctor"))))
    plan->operation = AND;
  else if (strstr(f, "logical_or_kernel") || (plan->out == BOOL && (strstr(f, "BitwiseOrFunctor") || strstr(f, "CUDAFunctor_add"))))
    plan->operation = OR;
  else if (!is_float(plan->out) && strstr(f, "at::native::CUDAFunctor_add<") == f) plan->operation = ADD;
  else if (!is_float(plan->out) && strstr(f, "at::native::CUDAFunctorOnSelf_add<") == f) plan->operation = ADD_SCALAR;
  if (plan->scalar && plan->operation != COMPARE) plan->operation = ZERO;
}

Plan *plan_of(const char *mangled) {
  extern char *__cxa_demangle(const char *, char *, size_t *, int *);
  int status;
  char *name = __cxa_demangle(mangled, NULL, NULL, &status);
  if (!name) return NULL;
  Plan plan = {0}, *made = NULL;
  const char *array = strstr(name, "std::array<char*, ");
  int vectorized = strstr(name, "::vectorized_elementwise_kernel<") != NULL;
  if (array && (vectorized || strstr(name, "::unrolled_elementwise_kernel<"))) {
    size_t length;
    const char *f = argument(name, "elementwise_kernel<", vectorized, &length);
    plan.inputs = atoi(array + strlen("std::array<char*, ")) - 1;
    plan.casts = strstr(name, "StoreWithCast") != NULL;
    char *functor = strndup(f, length);
    plan_functor(&plan, functor);
    free(functor);
    made = malloc(sizeof plan);
  } else if (strstr(name, "::reduce_kernel<") && strstr(name, "ReduceOp<")) {
    plan.form = REDUCTION;
    plan.in = type_argument(name, "ReduceOp<", 0), plan.out = type_argument(name, "ReduceOp<", 3);
    if (strstr(name, "and_kernel_cuda")) plan.operation = AND;
    else if (strstr(name, "or_kernel_cuda")) plan.operation = OR;
    else if (strstr(name, "sum_functor<") && plan.out && !is_float(plan.out) && plan.in == plan.out) plan.operation = ADD;
    made = malloc(sizeof plan);
  } else if (strstr(name, "::CatArrayBatchedCopy") && (strstr(name, "_contig<") || strstr(name, "_vectorized<"))) {
    plan.form = CONCATENATION;
    plan.bytes = atoi(strstr(name, "OpaqueType<") + strlen("OpaqueType<"));
    size_t length;
    plan.inputs = atoi(argument(name, "CatArrInputTensorMetadata<", 2, &length));
    made = malloc(sizeof plan);
  } else if (strstr(name, "::lpnorm_cleanup<")) {
    plan.form = NORMS;
    plan.out = type_argument(name, "lpnorm_cleanup<", 4);
    made = malloc(sizeof plan);
  } else if (strstr(name, "::DeviceReduceSingleTileKernel<") && strstr(name, "policy_hub<int,")) {
    plan.form = COUNT_NONZERO;
    plan.in = type_argument(name, "NonZeroOp<", 0);
    made = malloc(sizeof plan);
  } else if (strstr(name, "::DeviceCompactInitKernel<")) {
    plan.form = SELECTION;
    plan.out = strstr(name, "long*>(") ? INT64 : INT32;
    made = malloc(sizeof plan);
  }
  free(name);
  if (made) *made = plan;
  return made;
}

static int compared(const Plan *plan, int relation, long double a, long double b) {
  if (plan->equality) return relation == 0 ? a == b : a != b;
  return relation == 0 ? a >= b : relation == 1 ? a > b : relation == 2 ? a <= b : a < b;
}

// (int N, functor, array of pointers: output and inputs), and where types are converted: ..., loads of (types), a store of type.
static void compute_elements(const Plan *plan, void **arguments) {
  int count = *(int *)arguments[0];
  if (count > MOST_COMPUTED) return;
  const char *functor = arguments[1];
  char **data = arguments[2];
  Type in = plan->in, out = plan->out;
  Type sources[2] = {in, in};
  if (plan->casts) {
    const uint8_t *loads = arguments[5]; // one byte a type, as c10::ScalarType has
    for (int i = 0; i < plan->inputs && i < 2; i++) sources[i] = type_numbered(loads[i]);
    out = type_numbered(*(const uint8_t *)arguments[6]);
  }
  int relation = *(const int *)functor;
  size_t alignment = in == INT64 || in == DOUBLE ? 8 : 4;
  long double scalar = plan->scalar ? load(functor + alignment, in == HALF || in == BFLOAT16 ? FLOAT : in) : 0;
  if (plan->operation == FILL) scalar = load(functor, in);
  for (int i = 0; i < count; i++) {
    long double a = plan->inputs > 0 && plan->scalar != 1 ? load(data[1] + i * types[sources[0]].bytes, sources[0]) : scalar;
    long double b = scalar;
    if (plan->scalar == 1) b = load(data[1] + i * types[sources[0]].bytes, sources[0]);
    else if (plan->inputs > 1) b = load(data[2] + i * types[sources[1]].bytes, sources[1]);
    long double result = 0;
    switch (plan->operation) {
      case FILL: result = scalar; break;
      case COPY: result = a; break;
      case COMPARE: result = compared(plan, relation, a, b); break;
      case AND: result = a && b; break;
      case OR: result = a || b; break;
      case NOT: result = !a; break;
      case ADD: result = a + load(functor, in) * b; break; // the functor holds alpha
      case ADD_SCALAR: result = a + load(functor, in) * load(functor + types[in].bytes, in); break;
      default: break;
    }
    store(data[0] + i * types[out].bytes, out, result);
  }
}

// The end of torch's ReduceOp, the one argument of a reduction, which begins with the operation itself and its identity.
typedef struct {
  int dimensions;
  struct { unsigned divisor, m, shift; } sizes[25];
  unsigned strides[25]; // bytes
} InputOffsets;
typedef struct {
  int dimensions;
  struct { unsigned divisor, m, shift; } sizes[25];
  unsigned strides[25][2];
} OutputOffsets;
typedef struct {
  int element_bytes, inputs, outputs, rest[13]; // ReduceConfig
  InputOffsets input;
  OutputOffsets output; // and, at the next multiple of 8, the source and the target
} Reduction;

// Where it begins: the first place at which everything is possible.
static Reduction *find_reduction(char *operation, char ***pointers) {
  for (size_t at = 4; at <= 64; at += 4) {
    Reduction *r = (Reduction *)(operation + at);
    int possible = r->element_bytes > 0 && r->element_bytes <= 16 && r->inputs > 0 && r->outputs > 0 && r->input.dimensions >= 0 &&
                   r->input.dimensions <= 25 && r->output.dimensions >= 0 && r->output.dimensions <= 25;
    *pointers = (char **)(((uintptr_t)(r + 1) + 7) / 8 * 8);
    if (possible && find_range((*pointers)[0]).kind == DEVICE && find_range((*pointers)[1]).kind == DEVICE) return r;
  }
  return NULL;
}
static void compute_reduction(const Plan *plan, void **arguments) {
  char **pointers;
  Reduction *r = find_reduction(arguments[0], &pointers);
  if (!r) return;
  char *source = pointers[0], *target = pointers[1];
  if (r->outputs > 1 || plan->operation == ZERO) { // in one piece, but for reductions into views
    for (int i = 0; i < r->outputs && r->outputs <= MOST_COMPUTED; i++) store(target + i * types[plan->out].bytes, plan->out, 0);
    return;
  }
  if (r->inputs > MOST_COMPUTED) return;
  long double result = plan->operation == AND;
  for (int i = 0; i < r->inputs; i++) {
    unsigned rest = i, offset = 0;
    for (int d = 0; d < r->input.dimensions; d++) {
      offset += rest % r->input.sizes[d].divisor * r->input.strides[d];
      rest /= r->input.sizes[d].divisor;
    }
    long double value = load(source + offset, plan->in);
    if (plan->operation == AND) result = result && value;
    else if (plan->operation == OR) result = result || value;
    else result += value;
  }
  store(target, plan->out, result);
}

// (output, metadata of inputs, strides, dimension, its stride), with a row of the grid for each input. Along the first
// dimension alone, where the inputs lie behind each other.
static void compute_concatenation(const Plan *plan, dim3 grid, void **arguments) {
  char *target = *(char **)arguments[0], **sources = arguments[1];
  const unsigned *offsets = (unsigned *)(sources + plan->inputs), *sizes = offsets + plan->inputs, *elements = sizes + plan->inputs;
  if (*(int *)arguments[3] != 0) return;
  for (unsigned i = 0; i < grid.y; i++) {
    if (!sizes[i] || (size_t)elements[i] * plan->bytes > MOST_COPIED) continue;
    size_t row = (size_t)elements[i] / sizes[i] * plan->bytes;
    memcpy(target + offsets[i] * row, sources[i], sizes[i] * row);
  }
}
// The last kernel of torch._foreach_norm: (partial sums, addresses of the outputs, ...), a block for each.
static void compute_norms(const Plan *plan, dim3 grid, void **arguments) {
  for (unsigned i = 0; i < grid.x; i++) store(((void **)arguments[1])[i], plan->out, 0);
}
// The number of values that are not zero, which says how much masked_select and nonzero return: (iterator, output, number of
// values). Of many, a kernel before this one has counted parts: then none are.
static void compute_count(const Plan *plan, void **arguments) {
  const char *source = *(char **)arguments[0];
  uint64_t count = *(uint64_t *)arguments[2];
  long double found = 0;
  for (uint64_t i = 0; plan->in && i < count && count <= MOST_COMPUTED; i++) found += load(source + i * types[plan->in].bytes, plan->in) != 0;
  store(*(void **)arguments[1], INT32, found);
}

void compute(const Plan *plan, dim3 grid, void **arguments) {
  switch (plan->form) {
    case ELEMENTS: compute_elements(plan, arguments); break;
    case REDUCTION: compute_reduction(plan, arguments); break;
    case CONCATENATION: compute_concatenation(plan, grid, arguments); break;
    case NORMS: compute_norms(plan, grid, arguments); break;
    case COUNT_NONZERO: compute_count(plan, arguments); break;
    case SELECTION: store(*(void **)arguments[2], plan->out, 0); break; // none, as in unique: (state, tiles, their number)
  }
}
