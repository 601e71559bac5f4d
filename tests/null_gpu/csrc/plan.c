// From a kernel's name to what its launches compute. The names are those of PyTorch's templates: kernels by element and their
// functors, reductions, concatenation, norms of lists, and CUB's counting.
#include "null_gpu.h"
#include "plan.h"
#include <stdlib.h>
#include <string.h>

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
  else if (strstr(f, "CompareEqFunctor<")) plan->operation = COMPARE, plan->equality = 1, plan->out = BOOL;
  else if (strstr(f, "CompareFunctor<")) plan->operation = COMPARE, plan->out = BOOL;
  else if (strstr(f, "compare_scalar_kernel<")) plan->operation = COMPARE, plan->scalar = 2, plan->out = BOOL;
  else if (strstr(f, "logical_not_kernel")) plan->operation = NOT, plan->out = BOOL;
  else if (plan->out == BOOL && strstr(f, "bitwise_not")) plan->operation = NOT;
  else if (strstr(f, "logical_and_kernel") || (plan->out == BOOL && (strstr(f, "BitwiseAndFunctor") || strstr(f, "MulFunctor"))))
    plan->operation = AND;
  else if (strstr(f, "logical_or_kernel") || (plan->out == BOOL && (strstr(f, "BitwiseOrFunctor") || strstr(f, "CUDAFunctor_add"))))
    plan->operation = OR;
  else if (strstr(f, "::masked_fill_kernel(")) plan->operation = MASK;
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
  } else if (strstr(name, "::elementwise_kernel<") && strstr(name, "::gpu_kernel_impl_nocast<")) {
    size_t length;
    const char *f = argument(name, "::gpu_kernel_impl_nocast<", 0, &length);
    char *functor = strndup(f, length);
    plan_functor(&plan, functor);
    free(functor);
    static const int operands[] = {[FILL] = 0, [COPY] = 1, [NOT] = 1, [ADD_SCALAR] = 1, [COMPARE] = 2, [AND] = 2, [OR] = 2, [ADD] = 2, [MASK] = 2};
    plan.strided = 1;
    plan.inputs = plan.operation == COMPARE && plan.scalar ? 1 : operands[plan.operation];
    if (plan.operation != ZERO && plan.in && plan.out) made = malloc(sizeof plan);
  } else if (strstr(name, "elementwise_kernel_with_index<int, at::native::arange_cuda_out") && strstr(name, "{lambda()#4}")) {
    plan.form = RANGE; // of int64, the fourth type
    made = malloc(sizeof plan);
  } else if (strstr(name, "::tensor_kernel_scan_innermost_dim<long, std::plus<long> >")) {
    plan.form = SUMS;
    made = malloc(sizeof plan);
  } else if (strstr(name, "::reduce_kernel<") && strstr(name, "ReduceOp<")) {
    plan.form = REDUCTION;
    plan.in = type_argument(name, "ReduceOp<", 0), plan.out = type_argument(name, "ReduceOp<", 3);
    if (strstr(name, "and_kernel_cuda")) plan.operation = AND;
    else if (strstr(name, "or_kernel_cuda")) plan.operation = OR;
    else if (strstr(name, "MaxNanFunctor<") && !is_float(plan.out) && plan.in == plan.out) plan.operation = MAX;
    else if (strstr(name, "sum_functor<") && plan.out && !is_float(plan.out) && plan.in == plan.out) plan.operation = ADD;
    made = malloc(sizeof plan);
  } else if (strstr(name, "::CatArrayBatchedCopy")) {
    plan.form = CONCATENATION;
    int vectors = strstr(name, "_vectorized<") != NULL;
    plan.contiguous = vectors || strstr(name, "_contig<");
    size_t of_number;
    const char *dimensions = argument(name, plan.contiguous ? "_contig<" : "CatArrayBatchedCopy<", 2, &of_number);
    plan.dimensions = vectors || !dimensions ? 0 : atoi(dimensions);
    plan.bytes = atoi(strstr(name, "OpaqueType<") + strlen("OpaqueType<"));
    size_t length;
    plan.inputs = atoi(argument(name, "CatArrInputTensorMetadata<", 2, &length));
    made = malloc(sizeof plan);
  } else if (strstr(name, "::lpnorm_cleanup<")) {
    plan.form = NORMS;
    plan.out = type_argument(name, "lpnorm_cleanup<", 4);
    made = malloc(sizeof plan);
  } else if ((strstr(name, "::DeviceReduceSingleTileKernel<") || strstr(name, "::DeviceReduceKernel<")) && strstr(name, "policy_hub<int,")) {
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
