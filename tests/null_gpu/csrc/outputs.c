// What kernels leave in memory. What a program's control flow hangs on is carried out: fills, masks, copies, comparisons, logic,
// sums and maxima of integers, ranges, concatenations, counts. Other results of the kernels that plan.c knows are 0. All other kernels, and those
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

// torch's OffsetCalculator, with which the function of a kernel begins whose operands do not lie in one piece; their addresses
// and the functor follow.
typedef struct {
  int dimensions;
  struct { unsigned divisor, m, shift; } sizes[25];
  unsigned strides[]; // bytes: of each operand in the first dimension, then in the second
} Offsets;

static size_t offset_of(const Offsets *offsets, int operands, int operand, unsigned element) {
  size_t offset = 0;
  for (int d = 0; d < offsets->dimensions; d++) {
    offset += (size_t)(element % offsets->sizes[d].divisor) * offsets->strides[d * operands + operand];
    element /= offsets->sizes[d].divisor;
  }
  return offset;
}

// (int N, functor, array of pointers: output and inputs), and where types are converted: ..., loads of (types), a store of type.
// Where operands do not lie in one piece: (int N, function).
static void compute_elements(const Plan *plan, void **arguments) {
  int count = *(int *)arguments[0], operands = plan->inputs + 1;
  if (count < 1 || count > MOST_COMPUTED) return;
  const Offsets *offsets = plan->strided ? arguments[1] : NULL;
  char **data = offsets ? (char **)(((uintptr_t)(offsets->strides + 25 * operands) + 7) / 8 * 8) : arguments[2];
  const char *functor = offsets ? (const char *)(data + operands) : arguments[1];
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
  if (plan->operation == FILL || plan->operation == MASK) scalar = load(functor, in);
  if (plan->operation == MASK) sources[1] = BOOL;
  // The inputs of other kernels may be of types that their names do not tell, and so shorter: a mask.
  int reads = plan->operation == ZERO || plan->operation == FILL ? 0 : plan->inputs < 2 ? plan->inputs : 2;
  for (int operand = 0; operand <= reads; operand++) {
    size_t bytes = types[operand ? sources[operand - 1] : out].bytes;
    size_t last = offsets ? offset_of(offsets, operands, operand, count - 1) : (count - 1) * bytes;
    if (!fits(data[operand], last + bytes)) return;
  }
  for (int i = 0; i < count; i++) {
    char *at[3] = {0};
    for (int operand = 0; operand <= reads; operand++) {
      size_t bytes = types[operand ? sources[operand - 1] : out].bytes;
      at[operand] = data[operand] + (offsets ? offset_of(offsets, operands, operand, i) : i * bytes);
    }
    long double a = scalar, b = scalar;
    if (reads > 0 && plan->scalar != 1) a = load(at[1], sources[0]);
    if (reads > 0 && plan->scalar == 1) b = load(at[1], sources[0]);
    else if (reads > 1) b = load(at[2], sources[1]);
    long double result = 0;
    switch (plan->operation) {
      case FILL: result = scalar; break;
      case COPY: result = a; break;
      case COMPARE: result = compared(plan, relation, a, b); break;
      case AND: result = a && b; break;
      case MASK: result = b ? scalar : a; break;
      case OR: result = a || b; break;
      case NOT: result = !a; break;
      case ADD: result = a + load(functor, in) * b; break; // the functor holds alpha
      case ADD_SCALAR: result = a + load(functor, in) * load(functor + types[in].bytes, in); break;
      default: break;
    }
    store(at[0], out, result);
  }
}

// (int N, function: the first number and the step, output)
static void compute_range(void **arguments) {
  int count = *(int *)arguments[0];
  const int64_t *function = arguments[1];
  int64_t *output = *(int64_t **)arguments[2];
  for (int64_t i = 0; i < count && count <= MOST_COMPUTED; i++) output[i] = function[0] + i * function[1];
}

// Sums of whole numbers along each row: (output, input, number of rows, numbers in a row, ...)
static void compute_sums(void **arguments) {
  int64_t *output = *(int64_t **)arguments[0];
  const int64_t *input = *(const int64_t **)arguments[1];
  unsigned rows = *(unsigned *)arguments[2], length = *(unsigned *)arguments[3];
  for (size_t i = 0; i < (size_t)rows * length && (size_t)rows * length <= MOST_COMPUTED; i++)
    output[i] = input[i] + (i % length ? output[i - 1] : 0);
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
// The values that become one result.
static long double reduced(const Plan *plan, const Reduction *r, const char *source) {
  long double result = plan->operation == AND;
  for (int i = 0; i < r->inputs; i++) {
    size_t offset = 0;
    for (int d = 0, rest = i; d < r->input.dimensions; rest /= r->input.sizes[d++].divisor)
      offset += (size_t)(rest % r->input.sizes[d].divisor) * r->input.strides[d];
    long double value = load(source + offset, plan->in);
    if (plan->operation == AND) result = result && value;
    else if (plan->operation == OR) result = result || value;
    else if (plan->operation == MAX) result = i && result > value ? result : value;
    else result += value;
  }
  return result;
}
static void compute_reduction(const Plan *plan, void **arguments) {
  char **pointers;
  Reduction *r = find_reduction(arguments[0], &pointers);
  if (!r) return;
  char *source = pointers[0], *target = pointers[1];
  if (plan->operation == ZERO) { // in one piece, but for reductions into views
    for (int i = 0; i < r->outputs && r->outputs <= MOST_COMPUTED; i++) store(target + i * types[plan->out].bytes, plan->out, 0);
    return;
  }
  if ((int64_t)r->inputs * r->outputs > MOST_COMPUTED) return;
  for (int o = 0; o < r->outputs; o++) {
    size_t into = 0, from = 0;
    for (int d = 0, rest = o; d < r->output.dimensions; rest /= r->output.sizes[d++].divisor) {
      into += (size_t)(rest % r->output.sizes[d].divisor) * r->output.strides[d][0];
      from += (size_t)(rest % r->output.sizes[d].divisor) * r->output.strides[d][1];
    }
    store(target + into, plan->out, reduced(plan, r, source + from));
  }
}

// Sizes and strides of at most four dimensions, in elements.
typedef struct { unsigned sizes[4], strides[4]; } Layout;

static size_t joined_offset(const Layout *layout, int dimensions, int along, unsigned length, unsigned element) {
  size_t offset = 0;
  for (int d = dimensions - 1; d > 0; d--) {
    unsigned size = d == along ? length : layout->sizes[d];
    offset += (size_t)(element % size) * layout->strides[d];
    element /= size;
  }
  return offset + (size_t)element * layout->strides[0];
}

// (output, metadata of inputs, its layout, dimension, stride of that), with a row of the grid for each input.
static void compute_concatenation(const Plan *plan, dim3 grid, void **arguments) {
  char *target = *(char **)arguments[0], **sources = arguments[1];
  const unsigned *offsets = (unsigned *)(sources + plan->inputs), *lengths = offsets + plan->inputs, *elements = lengths + plan->inputs;
  const char *in_one_piece = (const char *)(elements + plan->inputs);
  const Layout *of_output = arguments[2], *of_inputs = (const Layout *)(((uintptr_t)(in_one_piece + plan->inputs) + 3) / 4 * 4);
  int along = *(int *)arguments[3];
  unsigned stride = *(unsigned *)arguments[4];
  for (unsigned i = 0; i < grid.y; i++) {
    char *start = target + (size_t)offsets[i] * stride * plan->bytes;
    if (along == 0 && (plan->contiguous || in_one_piece[i])) {
      if ((size_t)elements[i] * plan->bytes <= MOST_COPIED) memcpy(start, sources[i], (size_t)elements[i] * plan->bytes);
      continue;
    }
    if (!plan->dimensions) continue;
    for (unsigned e = 0; e < elements[i] && elements[i] <= MOST_COMPUTED; e++) {
      size_t from = plan->contiguous || in_one_piece[i] ? e : joined_offset(&of_inputs[i], plan->dimensions, along, lengths[i], e);
      size_t to = joined_offset(of_output, plan->dimensions, along, lengths[i], e);
      memcpy(start + to * plan->bytes, sources[i] + from * plan->bytes, plan->bytes);
    }
  }
}
// The last kernel of torch._foreach_norm: (partial sums, addresses of the outputs, ...), a block for each.
static void compute_norms(const Plan *plan, dim3 grid, void **arguments) {
  for (unsigned i = 0; i < grid.x; i++) store(((void **)arguments[1])[i], plan->out, 0);
}
// The number of values that are not zero, which says how much masked_select and nonzero return: (iterator, output, number of
// values). Of many, a first kernel counts parts, here all in the first one, and a second one adds them up.
static void compute_count(const Plan *plan, void **arguments) {
  const char *source = *(char **)arguments[0];
  int32_t *target = *(int32_t **)arguments[1];
  if (!plan->in) {
    *target = find_range(source).kind ? *(const int32_t *)source : 0;
    return;
  }
  uint64_t count = *(uint64_t *)arguments[2];
  long double found = 0;
  for (uint64_t i = 0; i < count && count <= MOST_COMPUTED; i++) found += load(source + i * types[plan->in].bytes, plan->in) != 0;
  *target = found;
}

void compute(const Plan *plan, dim3 grid, void **arguments) {
  switch (plan->form) {
    case ELEMENTS: compute_elements(plan, arguments); break;
    case REDUCTION: compute_reduction(plan, arguments); break;
    case RANGE: compute_range(arguments); break;
    case SUMS: compute_sums(arguments); break;
    case CONCATENATION: compute_concatenation(plan, grid, arguments); break;
    case NORMS: compute_norms(plan, grid, arguments); break;
    case COUNT_NONZERO: compute_count(plan, arguments); break;
    case SELECTION: store(*(void **)arguments[2], plan->out, 0); break; // none, as in unique: (state, tiles, their number)
  }
}
