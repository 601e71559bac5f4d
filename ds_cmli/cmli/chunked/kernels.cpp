// Loops of the chunked backend on a CPU, in fp32 and fp64. kernels.py compiles them at their first
// use and calls them.
//
// Every number is written by one thread, which adds in a fixed order: any number of threads gives
// the same bits.
//
// Shapes: N patches of an image, M tokens of a text, D features; J texts with T tokens in all.
#include "comparison.h"
#include "gradient.h"

#define FOR(T, NAME)                                                                               \
  void compare_##NAME(const Side* text, const Side* image, Range texts, Range images,              \
                      const Pairs* i2t, const Pairs* t2i, const Indices* indices,                  \
                      const Pairs* d_i2t, const Pairs* d_t2i, int64_t patches, int64_t longest,    \
                      char* scratch, int64_t each, int threads) {                                  \
    compare<T>(*text, *image, texts, images, {i2t, t2i, indices, d_i2t, d_t2i}, patches, longest,  \
               scratch, each, threads);                                                            \
  }                                                                                                \
  void gradient_##NAME(int of_image, const Side* own, const Side* other, Range owns, Range others, \
                       const Pairs* own_pairs, const Pairs* other_pairs, const Indices* indices,   \
                       T* out, int64_t entries, char* scratch, int64_t each, int threads) {        \
    Gradient<T> of(of_image, *own, *other, own_pairs, other_pairs, *indices);                      \
    gradient<T>(of, owns, others, out, entries, scratch, each, threads);                           \
  }

extern "C" {
FOR(float, float32)
FOR(double, float64)
}
