// A processor's vectors of numbers, and of their positions.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#ifdef __AVX512F__
constexpr int BYTES = 64;  // of a vector
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef int32_t Integer;
  typedef float Values __attribute__((vector_size(BYTES)));
  typedef int32_t Integers __attribute__((vector_size(BYTES)));
};
template <>
struct Lanes<double> {
  typedef int64_t Integer;
  typedef double Values __attribute__((vector_size(BYTES)));
  typedef int64_t Integers __attribute__((vector_size(BYTES)));
};

template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

// Vectors of numbers and of their positions.
template <class T>
struct Vectors {
  using Values = typename Lanes<T>::Values;
  using Integers = typename Lanes<T>::Integers;
  using Integer = typename Lanes<T>::Integer;
  static constexpr int L = BYTES / sizeof(T);

  static Values lowest() { return Values{} - std::numeric_limits<T>::infinity(); }

  template <class V>
  static V shuffle(V a, V b, Integers from) {
#ifdef __clang__
    V found;
    for (int l = 0; l < L; ++l) found[l] = from[l] < L ? a[from[l]] : b[from[l] - L];
    return found;
#else
    return __builtin_shuffle(a, b, from);
#endif
  }

  static Integers lane() {
    Integers found;
    for (int l = 0; l < L; ++l) found[l] = l;
    return found;
  }

  // Let a have its own lanes and b's where a bit of the lane is 0, next to each other, and b those
  // where it is 1.
  template <class V>
  static void exchange(V& a, V& b, int bit) {
    Integers own = lane();
    Integers zeros = own & bit ? own + (L - bit) : own;
    Integers ones = own & bit ? own + L : own + bit;
    V low = shuffle(a, b, zeros);
    b = shuffle(a, b, ones);
    a = low;
  }

  static T sum(Values lanes) {
    for (int bit = 1; bit < L; bit *= 2) {
      Values other = lanes;
      exchange(lanes, other, bit);
      lanes += other;
    }
    return lanes[0];
  }

  static T sum(const T* values, int64_t count) {
    Values lanes = {};
    int64_t k = 0;
    for (; k + L <= count; k += L) lanes += load<Values>(values + k);
    T total = sum(lanes);
    for (; k < count; ++k) total += values[k];
    return total;
  }
};

}  // namespace
