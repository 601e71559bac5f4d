// What kernels.py passes: texts and images, a matrix of their pairs, and the argmax positions.
#pragma once

#include <algorithm>
#include <cstdint>

// A `PackedBatch`.
struct Side {
  const void* features;   // [B * P, D]
  const int64_t* source;  // [R]; null: all rows are valid
  const int32_t* last;    // [B]
  const int64_t* order;   // [B]
  const void* scale;      // [B]
  int64_t D;

  int64_t first(int64_t b) const { return b ? last[b - 1] + 1 : 0; }
  int64_t length(int64_t b) const { return last[b] + 1 - first(b); }
  int64_t place(int64_t row) const { return (source ? source[row] : row) * D; }
};

// A matrix with a row for each image and a column for each text, in their own order.
struct Pairs {
  void* values;
  int64_t of_image, of_text;  // strides
};

struct Range {
  int64_t first, stop;
};

// The argmax positions of all texts and the images from number `image` on, the first of which
// begins at `row`.
struct Indices {
  void *tokens, *patches;            // best tokens of patches, best patches of tokens
  int64_t token_bytes, patch_bytes;  // of a position
  int64_t texts, rows;               // J, T
  int64_t image, row;

  int64_t of_patches(const Side& images, int64_t i, int64_t j) const {
    return texts * (images.first(i) - row) + j * images.length(i);
  }
  int64_t of_tokens(const Side& sides, int64_t i, int64_t j) const {
    return rows * (i - image) + sides.first(j);
  }
};

namespace {

template <class I>
void put(void* to, int64_t bytes, int64_t at, const I* values, int64_t count) {
  if (bytes == 1)
    std::copy(values, values + count, static_cast<uint8_t*>(to) + at);
  else
    std::copy(values, values + count, static_cast<int16_t*>(to) + at);
}

inline int64_t get(const void* from, int64_t bytes, int64_t at) {
  return bytes == 1 ? static_cast<const uint8_t*>(from)[at] : static_cast<const int16_t*>(from)[at];
}

template <class T>
T& at(const Pairs& pairs, const Side& image, const Side& text, int64_t i, int64_t j) {
  int64_t place = image.order[i] * pairs.of_image + text.order[j] * pairs.of_text;
  return static_cast<T*>(pairs.values)[place];
}

}  // namespace
