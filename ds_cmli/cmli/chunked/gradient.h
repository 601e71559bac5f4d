// The gradient of one side's features, from the argmax positions.
//
// A row of it is the sum of rows of the other side: of those that it won, one of each sequence, and
// of those that won it. Of one direction only one of the two kinds is there.
#pragma once

#include <omp.h>

#include <algorithm>

#include "sides.h"

namespace {

// Bytes of features that stay in a core's cache while rows of them are added.
constexpr int64_t NEAR = 1 << 19;

template <class T>
struct Entry {
  int32_t row;
  T weight;
};

// Add weighted rows of features to a row of a gradient.
template <class T>
void add_rows(T* __restrict to, const Entry<T>* entries, int64_t count, const Side& side) {
  const T* features = static_cast<const T*>(side.features);
  int64_t D = side.D, k = 0;
  auto row = [&](int64_t number) { return features + side.place(entries[number].row); };
  for (; k + 4 <= count; k += 4) {
    const T *a = row(k), *b = row(k + 1), *c = row(k + 2), *e = row(k + 3);
    const Entry<T>* of = entries + k;
    T of_a = of[0].weight, of_b = of[1].weight, of_c = of[2].weight, of_e = of[3].weight;
#pragma GCC ivdep
    for (int64_t d = 0; d < D; ++d)
      to[d] += (of_a * a[d] + of_b * b[d]) + (of_c * c[d] + of_e * e[d]);
  }
  for (; k < count; ++k) {
    const T *a = row(k), of_a = entries[k].weight;
#pragma GCC ivdep
    for (int64_t d = 0; d < D; ++d) to[d] += of_a * a[d];
  }
}

// A pair's gradients, over the lengths that scores average over, and where its positions begin.
template <class T>
struct Pair {
  int64_t sequence;  // of the other side
  T of_won, of_lost;
  int64_t won, lost;
};

// One side's gradient, to which a group of the other side's sequences is added at a time.
template <class T>
struct Gradient {
  bool of_image;
  const Side &own, &other;
  const Pairs *own_pairs, *other_pairs;  // null for the kind that is not there
  const Indices& indices;
  const void *won, *lost;  // positions of what own rows won, and of the own rows that others won
  int64_t won_bytes, lost_bytes;

  Gradient(bool of_image, const Side& own, const Side& other, const Pairs* own_pairs,
           const Pairs* other_pairs, const Indices& indices)
      : of_image(of_image),
        own(own),
        other(other),
        own_pairs(own_pairs),
        other_pairs(other_pairs),
        indices(indices),
        won(of_image ? indices.tokens : indices.patches),
        lost(of_image ? indices.patches : indices.tokens),
        won_bytes(of_image ? indices.token_bytes : indices.patch_bytes),
        lost_bytes(of_image ? indices.patch_bytes : indices.token_bytes) {}

  // The largest group that begins with a sequence: its features stay near, and with own sequences
  // of up to `longest` rows it lists no more than `entries`, unless it is one sequence.
  Range group(Range others, int64_t longest, int64_t entries) const {
    int64_t rows = 0, stop = others.first;
    for (; stop < others.stop; ++stop) {
      int64_t more = rows + other.length(stop);
      int64_t listed = own_pairs ? (stop + 1 - others.first) * longest : 0;
      if (other_pairs) listed += more;
      bool near = more * own.D * int64_t(sizeof(T)) <= NEAR;
      if (stop > others.first && (listed > entries || !near)) break;
      rows = more;
    }
    return {others.first, stop};
  }

  // Add a group to the rows of one sequence. What they add is listed, sorted by row, by counting.
  void add(int64_t sequence, Range group, T* out, Entry<T>* list, int32_t* next) const {
    int64_t P = own.length(sequence);
    if (!P) return;
    std::fill(next, next + P + 1, 0);  // [P + 1]: where each row's part goes on
    int32_t pairs = 0;
    for_pairs(sequence, group, [&](const Pair<T>& pair) {
      ++pairs;
      for (int64_t k = 0; other_pairs && k < other.length(pair.sequence); ++k)
        ++next[get(lost, lost_bytes, pair.lost + k) + 1];
    });
    if (!pairs) return;
    for (int64_t p = 0; p < P; ++p) next[p + 1] += next[p] + (own_pairs ? pairs : 0);
    for_pairs(sequence, group, [&](const Pair<T>& pair) {
      int32_t first = static_cast<int32_t>(other.first(pair.sequence));
      for (int64_t p = 0; own_pairs && p < P; ++p) {
        int32_t row = first + static_cast<int32_t>(get(won, won_bytes, pair.won + p));
        list[next[p]++] = {row, pair.of_won};
      }
      for (int64_t k = 0; other_pairs && k < other.length(pair.sequence); ++k) {
        int32_t row = first + static_cast<int32_t>(k);
        list[next[get(lost, lost_bytes, pair.lost + k)]++] = {row, pair.of_lost};
      }
    });
    for (int64_t p = 0, from = 0; p < P; from = next[p++])
      add_rows(out + own.place(own.first(sequence) + p), list + from, next[p] - from, other);
  }

 private:
  // Pairs of a sequence with a group, of which a gradient is not 0.
  template <class Use>
  void for_pairs(int64_t sequence, Range group, Use use) const {
    const Side &image = of_image ? own : other, &text = of_image ? other : own;
    T of_own_length = static_cast<const T*>(own.scale)[sequence];
    for (int64_t x = group.first; x < group.stop; ++x) {
      int64_t i = of_image ? sequence : x, j = of_image ? x : sequence;
      T of_own = own_pairs ? at<T>(*own_pairs, image, text, i, j) : 0;
      T of_other = other_pairs ? at<T>(*other_pairs, image, text, i, j) : 0;
      if (!other.length(x) || (of_own == 0 && of_other == 0)) continue;
      int64_t tokens = indices.of_patches(image, i, j), patches = indices.of_tokens(text, i, j);
      Pair<T> pair{x, of_own * of_own_length, of_other * static_cast<const T*>(other.scale)[x]};
      pair.won = of_image ? tokens : patches;
      pair.lost = of_image ? patches : tokens;
      use(pair);
    }
  }
};

// Add to the gradient of one side's features. A thread has `each` bytes of scratch.
template <class T>
void gradient(const Gradient<T>& of, Range owns, Range others, T* out, int64_t entries,
              char* scratch, int64_t each, int threads) {
  int64_t longest = 0;
  for (int64_t o = owns.first; o < owns.stop; ++o) longest = std::max(longest, of.own.length(o));
  while (others.first < others.stop) {
    Range group = of.group(others, longest, entries);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t o = owns.first; o < owns.stop; ++o) {
      auto* list = reinterpret_cast<Entry<T>*>(scratch + omp_get_thread_num() * each);
      of.add(o, group, out, list, reinterpret_cast<int32_t*>(list + entries));
    }
    others.first = group.stop;
  }
}

}  // namespace
