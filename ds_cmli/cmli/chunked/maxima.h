// The maxima of a pair's similarities, in both directions or of each token alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "sides.h"
#include "vectors.h"

namespace {

// The maxima of a pair's similarities [M, N] and their positions: the lowest of equal ones; if
// NANS, the first NaN. Without NANS there must be none. Those of patches only if BOTH.
template <class T, bool NANS, bool BOTH>
struct Maxima : Vectors<T> {
  using typename Vectors<T>::Values;
  using typename Vectors<T>::Integers;
  using typename Vectors<T>::Integer;
  using Vectors<T>::L;

  T* best_token;    // [N], and a vector more, like the next
  Integer* token;   // [N]
  T* best_patch;    // [M]
  Integer* patch;   // [M]
  Values all = {};  // the sum of all similarities, in lanes

  Maxima(char* scratch, int64_t N, int64_t M) {
    best_token = reinterpret_cast<T*>(scratch);
    token = reinterpret_cast<Integer*>(best_token + N + L);
    best_patch = reinterpret_cast<T*>(token + N + L);
    patch = reinterpret_cast<Integer*>(best_patch + M);
  }

  void find(const T* S, int64_t stride, int64_t N, int64_t M) {
    for (int64_t n = 0; BOTH && n < N; n += L) {
      store(best_token + n, this->lowest());
      store(token + n, Integers{});
    }
    // What is at the end of a row, or the last rows, may be taken twice, which changes nothing.
    if (N < L)
      for (int64_t m = 0; m < M; ++m) few_patches(S + m * stride, N, m);
    else if (M < 4)
      for (int64_t m = 0; m < M; ++m) rows<1>(S, stride, N, m);
    else
      for (int64_t m = 0; m < M; m += 4) rows<4>(S, stride, N, std::min(m, M - 4));
  }

  void keep(const Indices& to, int64_t of_patches, int64_t N, int64_t of_tokens, int64_t M) const {
    if (BOTH) put(to.tokens, to.token_bytes, of_patches, token, N);
    put(to.patches, to.patch_bytes, of_tokens, patch, M);
  }

 private:
  // Whether `value` takes the place of `best` at a lower position.
  static Integers larger(Values value, Values best) {
    Integers found = value > best;
    if (NANS) found |= (value != value) & (best == best);
    return found;
  }

  static void take(Values value, Integers index, Values& best, Integers& where) {
    Integers found = larger(value, best);
    best = found ? value : best;
    where = found ? index : where;
  }

  template <int R>
  void rows(const T* S, int64_t stride, int64_t N, int64_t m) {
    Values best[R];
    Integers where[R], lane = this->lane();
    for (int r = 0; r < R; ++r) best[r] = this->lowest(), where[r] = Integers{};
    for (int64_t n = 0; n < N; n += L) {
      int64_t at = std::min(n, N - L);
      Values of_patch = {};
      Integers which = {};
      if (BOTH) of_patch = load<Values>(best_token + at), which = load<Integers>(token + at);
      for (int r = 0; r < R; ++r) {
        Values value = load<Values>(S + (m + r) * stride + at);
        all += value;
        if (BOTH) take(value, Integers{} + static_cast<Integer>(m + r), of_patch, which);
        take(value, lane + static_cast<Integer>(at), best[r], where[r]);
      }
      if (BOTH) store(best_token + at, of_patch), store(token + at, which);
    }
    // Rows share a vector, then lanes are compared, until the first R lanes are those of the rows.
    for (int bit = 1, left = R; bit < L; bit *= 2, left = (left + 1) / 2) {
      for (int r = 0; r < (left + 1) / 2; ++r) {
        int a = bit < R ? 2 * r : r, b = bit < R ? 2 * r + 1 : r;
        Values value = best[a], other = best[b];
        Integers index = where[a], next = where[b];
        this->exchange(value, other, bit);
        this->exchange(index, next, bit);
        Integers found = larger(other, value), same = other == value;
        if (NANS) same |= (other != other) & (value != value);
        found |= same & (next < index);
        where[r] = found ? next : index;
        best[r] = found ? other : value;
      }
    }
    std::memcpy(best_patch + m, &best[0], R * sizeof(T));
    std::memcpy(patch + m, &where[0], R * sizeof(Integer));
  }

  void few_patches(const T* row, int64_t N, int64_t m) {
    T best = -std::numeric_limits<T>::infinity();
    Integer where = 0;
    auto over = [](T value, T other) {
      return value > other || (value != value && other == other);
    };
    for (int64_t n = 0; n < N; ++n) {
      all[0] += row[n];
      if (over(row[n], best)) best = row[n], where = n;
      if (BOTH && over(row[n], best_token[n])) best_token[n] = row[n], token[n] = m;
    }
    best_patch[m] = best, patch[m] = where;
  }
};

}  // namespace
