// What the launches of one kernel compute, as its name says.
#ifndef PLAN_H
#define PLAN_H
#include "values.h"

typedef enum { ELEMENTS, REDUCTION, RANGE, SUMS, CONCATENATION, NORMS, COUNT_NONZERO, SELECTION } Form;
typedef enum { ZERO, FILL, COPY, COMPARE, AND, OR, NOT, ADD, ADD_SCALAR, MASK, MAX } Operation;
struct Plan {
  Form form;
  int casts; // loads and stores that convert
  int strided; // operands of elements do not lie in one piece
  int contiguous, dimensions; // of a concatenation: inputs in one piece; 0 dimensions: only along the first one
  int inputs; // tensors, at most
  int bytes; // of an element that is only moved
  int scalar; // 1: the first operand is a number in the functor, 2: the second
  int equality; // of comparisons: == and !=, not >=, >, <= and <
  Operation operation;
  Type in, out;
};
#endif
