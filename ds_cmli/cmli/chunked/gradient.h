// The gradient of one side's features, from the argmax positions.
#pragma once

#include <omp.h>

#include <algorithm>

#include "sides.h"

namespace {

constexpr int64_t NEAR = 1 << 19;  // bytes of features that stay in a core's cache while rows of them are added

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
    T of_a = entries[k].weight, of_b = entries[k + 1].weight, of_c = entries[k + 2].weight, of_e = entries[k + 3].weight;
#pragma GCC ivdep
    for (int64_t d = 0; d < D; ++d) to[d] += (of_a * a[d] + of_b * b[d]) + (of_c * c[d] + of_e * e[d]);
  }
  for (; k < count; ++k) {
    const T *a = row(k), of_a = entries[k].weight;
#pragma GCC ivdep
    for (int64_t d = 0; d < D; ++d) to[d] += of_a * a[d];
  }
}

// Add to the gradient of one side's features, for pairs of which a gradient is not 0.
//
// A row of it is the sum of what it won, a row of each sequence of the other side, and of the rows that won it. Groups
// of the other side's sequences are taken one after the other, whose rows are sorted by the own row by counting.
template <class T>
void gradient(bool of_image, const Side& own, const Side& other, Range owns, Range others, const Pairs& own_pairs,
              const Pairs& other_pairs, const Indices& indices, T* out, int64_t entries, char* scratch, int64_t each,
              int threads) {
  const Side &image = of_image ? own : other, &text = of_image ? other : own;
  int64_t longest = 0;
  for (int64_t o = owns.first; o < owns.stop; ++o) longest = std::max(longest, own.length(o));
  for (int64_t begin = others.first, end; begin < others.stop; begin = end) {
    int64_t rows = 0;
    for (end = begin; end < others.stop; ++end) {
      int64_t more = rows + other.length(end), all = (end + 1 - begin) * longest + more;
      if (end > begin && (all > entries || more * own.D * int64_t(sizeof(T)) > NEAR)) break;
      rows = more;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t o = owns.first; o < owns.stop; ++o) {
      auto* list = reinterpret_cast<Entry<T>*>(scratch + omp_get_thread_num() * each);
      auto* next = reinterpret_cast<int32_t*>(list + entries);  // [P + 1], the end of each row's part so far
      int64_t P = own.length(o);
      if (!P) continue;
      std::fill(next, next + P + 1, 0);
      auto each_pair = [&](auto use) {
        for (int64_t x = begin; x < end; ++x) {
          int64_t i = of_image ? o : x, j = of_image ? x : o;
          T of_own = at<T>(own_pairs, image, text, i, j), of_other = at<T>(other_pairs, image, text, i, j);
          if (!other.length(x) || (of_own == 0 && of_other == 0)) continue;
          int64_t tokens = indices.of_patches(image, i, j), patches = indices.of_tokens(text, i, j);
          use(x, of_own * static_cast<const T*>(own.scale)[o], of_other * static_cast<const T*>(other.scale)[x],
              of_image ? tokens : patches, of_image ? patches : tokens);
        }
      };
      const void *won = of_image ? indices.tokens : indices.patches, *lost = of_image ? indices.patches : indices.tokens;
      int64_t won_bytes = of_image ? indices.token_bytes : indices.patch_bytes;
      int64_t lost_bytes = of_image ? indices.patch_bytes : indices.token_bytes;
      int32_t pairs = 0;
      each_pair([&](int64_t x, T, T, int64_t, int64_t at) {
        ++pairs;
        for (int64_t k = 0; k < other.length(x); ++k) ++next[get(lost, lost_bytes, at + k) + 1];
      });
      if (!pairs) continue;
      for (int64_t p = 0; p < P; ++p) next[p + 1] += next[p] + pairs;
      each_pair([&](int64_t x, T of_own, T of_other, int64_t of_won, int64_t of_lost) {
        int32_t first = static_cast<int32_t>(other.first(x));
        for (int64_t p = 0; p < P; ++p)
          list[next[p]++] = {first + static_cast<int32_t>(get(won, won_bytes, of_won + p)), of_own};
        for (int64_t k = 0; k < other.length(x); ++k)
          list[next[get(lost, lost_bytes, of_lost + k)]++] = {first + static_cast<int32_t>(k), of_other};
      });
      for (int64_t p = 0, from = 0; p < P; from = next[p++])
        add_rows(out + own.place(own.first(o) + p), list + from, next[p] - from, other);
    }
  }
}

}  // namespace
