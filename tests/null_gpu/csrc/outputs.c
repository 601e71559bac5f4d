// What kernels leave in memory. What a program's control flow hangs on is carried out: fills, copies, comparisons, logic,
// sums of integers, concatenations, counts. Other results of the kernels that plan.c knows are 0. All other kernels, and those
// on more than MOST_COMPUTED elements, leave memory as it was. No infinity or NaN is ever stored, so that a run's numbers stay
// finite.
#include "null_gpu.h"
#include "plan.h"
#include <string.h>

enum { MOST_COMPUTED = 1 << 16 };

static int compared(const Plan *plan, int relation, long double a, long double b) {
  if (plan->equality) return relation == 0 ? a == b : a != b;
  return relation == 0 ? a >= b : relation == 1 ? a > b : relation == 2 ? a <= b : a < b;
}

// Whether an array ends before the memory that it lies in does: the types of functors that no name tells are guesses.
static int fits(const char *array, size_t bytes) {
  Range range = find_range(array);
  return !range.kind || array + bytes <= range.start + range.bytes;
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
  // The inputs of other kernels may be of types that their names do not tell, and so shorter: a mask.
  int reads = plan->operation != ZERO && plan->operation != FILL;
  if (!fits(data[0], (size_t)count * types[out].bytes)) return;
  for (int i = 0; reads && i < plan->inputs && i < 2; i++)
    if (!fits(data[i + 1], (size_t)count * types[sources[i]].bytes)) return;
  for (int i = 0; i < count; i++) {
    long double a = scalar, b = scalar;
    if (reads && plan->inputs > 0 && plan->scalar != 1) a = load(data[1] + i * types[sources[0]].bytes, sources[0]);
    if (reads && plan->scalar == 1) b = load(data[1] + i * types[sources[0]].bytes, sources[0]);
    else if (reads && plan->inputs > 1) b = load(data[2] + i * types[sources[1]].bytes, sources[1]);
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
