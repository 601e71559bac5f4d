// The similarities of images with texts, a block at a time, and what is taken from them.
#pragma once

#include <omp.h>

#include <vector>

#include "maxima.h"

namespace {

// Rows that are multiplied together, as many as registers hold.
#ifdef __AVX512F__
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif
constexpr int TOKENS = 64;  // that are multiplied with an image together, at the least

// S [count, Q vectors] of rows of features with Q vectors of patches, whose features follow each
// other.
template <class T, int Q>
void multiply(const T* const* rows, int64_t count, const T* patches, int64_t D, T* S,
              int64_t stride) {
  using V = typename Lanes<T>::Values;
  constexpr int L = BYTES / sizeof(T);
  for (int64_t first = 0; first < count; first += ROWS) {
    const T* of[ROWS];
    V sums[ROWS][Q] = {};
    for (int r = 0; r < ROWS; ++r) of[r] = rows[std::min(first + r, count - 1)];
    for (int64_t d = 0; d < D; ++d) {
      V patch[Q];
      for (int q = 0; q < Q; ++q) patch[q] = load<V>(patches + (d * Q + q) * L);
      for (int r = 0; r < ROWS; ++r)
        for (int q = 0; q < Q; ++q) sums[r][q] += of[r][d] * patch[q];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int q = 0; q < Q; ++q) store(S + (first + r) * stride + q * L, sums[r][q]);
  }
}

// What pairs are compared for; each may be null. Of one direction `i2t`, `indices->tokens` and
// `d_i2t` are.
struct Wanted {
  const Pairs *i2t, *t2i;      // the scores
  const Indices* indices;      // the argmax positions
  const Pairs *d_i2t, *d_t2i;  // only of pairs of which one of these gradients is not 0
};

// Compares a thread's images with texts: a block of their similarities at a time.
template <class T>
struct Comparison {
  static constexpr int L = BYTES / sizeof(T);

  const Side &text, &image;
  const Wanted& wanted;
  Range images;           // those of the block
  int64_t columns, most;  // patches of the block, filled up to whole vectors; tokens at the most
  int64_t tokens = 0, waiting = 0;
  const T** rows;  // [tokens], features
  int64_t* texts;  // [waiting]
  T* patches;      // [columns, D] in groups of up to three vectors, [D, vectors, L] each
  T* S;            // [tokens, columns]
  char* rest;      // for the maxima

  Comparison(const Side& text, const Side& image, const Wanted& wanted, Range images,
             int64_t longest, char* scratch)
      : text(text),
        image(image),
        wanted(wanted),
        images(images),
        most(std::max<int64_t>(TOKENS, longest)) {
    int64_t first = image.first(images.first), count = image.last[images.stop - 1] + 1 - first;
    columns = (count + L - 1) / L * L;
    rows = reinterpret_cast<const T**>(scratch);
    texts = reinterpret_cast<int64_t*>(rows + most);
    patches = reinterpret_cast<T*>(texts + most);
    S = patches + columns * image.D;
    rest = reinterpret_cast<char*>(S + columns * (most + ROWS));
    for_groups([&](int64_t from, int64_t wide) {
      for (int64_t n = from; n < from + wide; n += L) {
        const T* of[L];
        for (int64_t l = 0; l < L; ++l) of[l] = features(image, first + std::min(n + l, count - 1));
        pack(of, patches + from * image.D + n - from, wide);
      }
    });
  }

  void add(int64_t j) {
    int64_t M = text.length(j);
    if (!M || !counts(j)) return;
    if (tokens + M > most) compare();
    texts[waiting++] = j;
    for (int64_t m = 0; m < M; ++m) rows[tokens++] = features(text, text.first(j) + m);
  }

  void compare() {
    for_groups([&](int64_t from, int64_t wide) {
      auto product = multiply<T, 1>;
      if (wide == 2 * L) product = multiply<T, 2>;
      if (wide == 3 * L) product = multiply<T, 3>;
      if (tokens) product(rows, tokens, patches + from * image.D, image.D, S + from, columns);
    });
    bool both = wanted.i2t || (wanted.indices && wanted.indices->tokens);
    if (!(both ? write<false, true>() : write<false, false>()))
      both ? write<true, true>() : write<true, false>();
    tokens = waiting = 0;
  }

 private:
  static const T* features(const Side& side, int64_t row) {
    return static_cast<const T*>(side.features) + side.place(row);
  }

  bool counts(int64_t j) const {
    return !wanted.d_t2i || at<T>(*wanted.d_t2i, image, text, images.first, j) != 0 ||
           (wanted.d_i2t && at<T>(*wanted.d_i2t, image, text, images.first, j) != 0);
  }

  // Write rows of features as columns, [D, L] with a stride.
  void pack(const T* const* of, T* to, int64_t stride) const {
    using V = typename Vectors<T>::Values;
    int64_t d = 0;
    for (; d + L <= image.D; d += L) {
      V block[L];
      for (int l = 0; l < L; ++l) block[l] = load<V>(of[l] + d);
      for (int bit = 1; bit < L; bit *= 2)
        for (int l = 0; l < L; ++l)
          if (!(l & bit)) Vectors<T>::exchange(block[l], block[l | bit], bit);
      for (int l = 0; l < L; ++l) store(to + (d + l) * stride, block[l]);
    }
    for (; d < image.D; ++d)
      for (int l = 0; l < L; ++l) to[d * stride + l] = of[l][d];
  }

  template <class Use>
  void for_groups(Use use) const {
    int64_t vectors = columns / L, groups = (vectors + 2) / 3;
    for (int64_t group = 0; group < groups; ++group) {
      int64_t from = group * vectors / groups, to = (group + 1) * vectors / groups;
      use(from * L, (to - from) * L);
    }
  }

  // Write what is wanted; false if a similarity may be NaN, which only NANS knows how to treat.
  template <bool NANS, bool BOTH>
  bool write() {
    Maxima<T, NANS, BOTH> found(rest, columns, most);
    const T* of_text = S;
    for (int64_t k = 0; k < waiting; ++k) {
      int64_t j = texts[k], M = text.length(j);
      for (int64_t i = images.first; i < images.stop; ++i) {
        int64_t N = image.length(i);
        found.find(of_text + image.first(i) - image.first(images.first), columns, N, M);
        if (wanted.i2t)
          at<T>(*wanted.i2t, image, text, i, j) =
              found.sum(found.best_token, N) * static_cast<const T*>(image.scale)[i];
        if (wanted.t2i)
          at<T>(*wanted.t2i, image, text, i, j) =
              found.sum(found.best_patch, M) * static_cast<const T*>(text.scale)[j];
        if (wanted.indices)
          found.keep(*wanted.indices, wanted.indices->of_patches(image, i, j), N,
                     wanted.indices->of_tokens(text, i, j), M);
      }
      of_text += M * columns;
    }
    T all = found.sum(found.all);
    return all - all == 0;
  }
};

// Compare images, none of them empty, with texts: blocks of images with up to `patches` patches, or
// one where only pairs with a gradient are wanted.
template <class T>
void compare(const Side& text, const Side& image, Range texts, Range images, const Wanted& wanted,
             int64_t patches, int64_t longest, char* scratch, int64_t each, int threads) {
  std::vector<Range> blocks;
  for (int64_t i = images.first; i < images.stop; ++i) {
    bool more = !blocks.empty() && !wanted.d_t2i;
    if (more && image.last[i] + 1 - image.first(blocks.back().first) <= patches)
      blocks.back().stop = i + 1;
    else
      blocks.push_back({i, i + 1});
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (size_t block = 0; block < blocks.size(); ++block) {
    Comparison<T> comparison(text, image, wanted, blocks[block], longest,
                             scratch + omp_get_thread_num() * each);
    for (int64_t j = texts.first; j < texts.stop; ++j) comparison.add(j);
    comparison.compare();
  }
}

}  // namespace
