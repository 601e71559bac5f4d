// Loops of the chunked backend on a CPU, in fp32 and fp64. kernels.py compiles them at their first use and calls them.
//
// Every number is written by one thread, which adds in a fixed order: any number of threads gives the same bits.
//
// Shapes: N patches of an image, M tokens of a text, D features; J texts with T tokens in all.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int BYTES = 64, ROWS = 8;  // of a vector; rows that are multiplied together, as many as registers hold
#elif defined(__AVX2__)
constexpr int BYTES = 32, ROWS = 4;
#else
constexpr int BYTES = 16, ROWS = 4;
#endif
constexpr int64_t NEAR = 1 << 19;  // bytes of features that stay in a core's cache while rows of them are added
constexpr int TOKENS = 64;         // that are multiplied with an image together, at the least

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

}  // namespace

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

// The argmax positions of all texts and the images from number `image` on, the first of which begins at `row`.
struct Indices {
  void *tokens, *patches;             // best tokens of patches, best patches of tokens
  int64_t token_bytes, patch_bytes;   // of a position
  int64_t texts, rows;                // J, T
  int64_t image, row;

  int64_t of_patches(const Side& images, int64_t i, int64_t j) const {
    return texts * (images.first(i) - row) + j * images.length(i);
  }
  int64_t of_tokens(const Side& sides, int64_t i, int64_t j) const { return rows * (i - image) + sides.first(j); }
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
  return static_cast<T*>(pairs.values)[image.order[i] * pairs.of_image + text.order[j] * pairs.of_text];
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

  // Let a have its own lanes and b's where a bit of the lane is 0, next to each other, and b those where it is 1.
  template <class V>
  static void exchange(V& a, V& b, int bit) {
    Integers own = lane(), zeros = own & bit ? own + (L - bit) : own, ones = own & bit ? own + L : own + bit;
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

// The maxima of a pair's similarities [M, N] and their positions: the lowest of equal ones; if NANS, the first NaN. Without
// NANS there must be none.
template <class T, bool NANS>
struct Maxima : Vectors<T> {
  using typename Vectors<T>::Values;
  using typename Vectors<T>::Integers;
  using typename Vectors<T>::Integer;
  using Vectors<T>::L;

  T* best_token;   // [N], and a vector more, like the next
  Integer* token;  // [N]
  T* best_patch;   // [M]
  Integer* patch;  // [M]
  Values all = {};  // the sum of all similarities, in lanes

  Maxima(char* scratch, int64_t N, int64_t M) {
    best_token = reinterpret_cast<T*>(scratch);
    token = reinterpret_cast<Integer*>(best_token + N + L);
    best_patch = reinterpret_cast<T*>(token + N + L);
    patch = reinterpret_cast<Integer*>(best_patch + M);
  }

  void find(const T* S, int64_t stride, int64_t N, int64_t M) {
    for (int64_t n = 0; n < N; n += L) store(best_token + n, this->lowest()), store(token + n, Integers{});
    // What is at the end of a row, or the last rows, may be taken twice, which changes nothing.
    if (N < L)
      for (int64_t m = 0; m < M; ++m) few_patches(S + m * stride, N, m);
    else if (M < 4)
      for (int64_t m = 0; m < M; ++m) rows<1>(S, stride, N, m);
    else
      for (int64_t m = 0; m < M; m += 4) rows<4>(S, stride, N, std::min(m, M - 4));
  }

  void keep(const Indices& to, int64_t of_patches, int64_t N, int64_t of_tokens, int64_t M) const {
    put(to.tokens, to.token_bytes, of_patches, token, N);
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
      Values of_patch = load<Values>(best_token + at);
      Integers which = load<Integers>(token + at);
      for (int r = 0; r < R; ++r) {
        Values value = load<Values>(S + (m + r) * stride + at);
        all += value;
        take(value, Integers{} + static_cast<Integer>(m + r), of_patch, which);
        take(value, lane + static_cast<Integer>(at), best[r], where[r]);
      }
      store(best_token + at, of_patch);
      store(token + at, which);
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
    auto over = [](T value, T other) { return value > other || (value != value && other == other); };
    for (int64_t n = 0; n < N; ++n) {
      all[0] += row[n];
      if (over(row[n], best)) best = row[n], where = n;
      if (over(row[n], best_token[n])) best_token[n] = row[n], token[n] = m;
    }
    best_patch[m] = best, patch[m] = where;
  }
};

// S [count, Q vectors] of rows of features with Q vectors of patches, whose features follow each other.
template <class T, int Q>
void multiply(const T* const* rows, int64_t count, const T* patches, int64_t D, T* S, int64_t stride) {
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

// What pairs are compared for; each may be null.
struct Wanted {
  const Pairs *i2t, *t2i;        // the scores
  const Indices* indices;        // the argmax positions
  const Pairs *d_i2t, *d_t2i;    // only of pairs of which one of these gradients is not 0
};

// Compares a thread's images with texts: a block of their similarities at a time.
template <class T>
struct Comparison {
  static constexpr int L = BYTES / sizeof(T);

  const Side &text, &image;
  const Wanted& wanted;
  Range images;            // those of the block
  int64_t columns, most;   // patches of the block, filled up to whole vectors; tokens at the most
  int64_t tokens = 0, waiting = 0;
  const T** rows;          // [tokens], features
  int64_t* texts;          // [waiting]
  T *patches, *S;          // [columns, D] in groups of up to three vectors [D, vectors, L]; [tokens, columns]
  char* rest;              // for the maxima

  Comparison(const Side& text, const Side& image, const Wanted& wanted, Range images, int64_t longest, char* scratch)
      : text(text), image(image), wanted(wanted), images(images), most(std::max<int64_t>(TOKENS, longest)) {
    columns = (image.first(images.stop - 1) + image.length(images.stop - 1) - image.first(images.first) + L - 1) / L * L;
    rows = reinterpret_cast<const T**>(scratch);
    texts = reinterpret_cast<int64_t*>(rows + most);
    patches = reinterpret_cast<T*>(texts + most);
    S = patches + columns * image.D;
    rest = reinterpret_cast<char*>(S + columns * (most + ROWS));
    int64_t first = image.first(images.first), count = image.last[images.stop - 1] + 1 - first;
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
    for (int64_t m = 0; m < M; ++m)
      rows[tokens++] = features(text, text.first(j) + m);
  }

  void compare() {
    for_groups([&](int64_t from, int64_t wide) {
      auto product = wide == 3 * L ? multiply<T, 3> : wide == 2 * L ? multiply<T, 2> : multiply<T, 1>;
      if (tokens) product(rows, tokens, patches + from * image.D, image.D, S + from, columns);
    });
    if (!write<false>()) write<true>();
    tokens = waiting = 0;
  }

 private:
  static const T* features(const Side& side, int64_t row) {
    return static_cast<const T*>(side.features) + side.place(row);
  }

  bool counts(int64_t j) const {
    return !wanted.d_i2t || at<T>(*wanted.d_i2t, image, text, images.first, j) != 0 ||
           at<T>(*wanted.d_t2i, image, text, images.first, j) != 0;
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
  template <bool NANS>
  bool write() {
    Maxima<T, NANS> found(rest, columns, most);
    const T* of_text = S;
    for (int64_t k = 0; k < waiting; ++k) {
      int64_t j = texts[k], M = text.length(j);
      for (int64_t i = images.first; i < images.stop; ++i) {
        int64_t N = image.length(i);
        found.find(of_text + image.first(i) - image.first(images.first), columns, N, M);
        if (wanted.i2t) {
          at<T>(*wanted.i2t, image, text, i, j) = found.sum(found.best_token, N) * static_cast<const T*>(image.scale)[i];
          at<T>(*wanted.t2i, image, text, i, j) = found.sum(found.best_patch, M) * static_cast<const T*>(text.scale)[j];
        }
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

// Compare images, none of them empty, with texts: blocks of images with up to `patches` patches, or one where only pairs
// with a gradient are wanted.
template <class T>
void compare(const Side& text, const Side& image, Range texts, Range images, const Wanted& wanted, int64_t patches,
             int64_t longest, char* scratch, int64_t each, int threads) {
  std::vector<Range> blocks;
  for (int64_t i = images.first; i < images.stop; ++i) {
    bool more = !blocks.empty() && !wanted.d_i2t;
    if (more && image.last[i] + 1 - image.first(blocks.back().first) <= patches)
      blocks.back().stop = i + 1;
    else
      blocks.push_back({i, i + 1});
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (size_t block = 0; block < blocks.size(); ++block) {
    Comparison<T> comparison(text, image, wanted, blocks[block], longest, scratch + omp_get_thread_num() * each);
    for (int64_t j = texts.first; j < texts.stop; ++j) comparison.add(j);
    comparison.compare();
  }
}

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

#define FOR(T, NAME)                                                                                                  \
  void compare_##NAME(const Side* text, const Side* image, Range texts, Range images, const Pairs* i2t,               \
                      const Pairs* t2i, const Indices* indices, const Pairs* d_i2t, const Pairs* d_t2i,               \
                      int64_t patches, int64_t longest, char* scratch, int64_t each, int threads) {                   \
    compare<T>(*text, *image, texts, images, {i2t, t2i, indices, d_i2t, d_t2i}, patches, longest, scratch, each,      \
               threads);                                                                                              \
  }                                                                                                                   \
  void gradient_##NAME(int of_image, const Side* own, const Side* other, Range owns, Range others,                    \
                       const Pairs* own_pairs, const Pairs* other_pairs, const Indices* indices, T* out,              \
                       int64_t entries, char* scratch, int64_t each, int threads) {                                   \
    gradient<T>(of_image, *own, *other, owns, others, *own_pairs, *other_pairs, *indices, out, entries, scratch,      \
                each, threads);                                                                                       \
  }

extern "C" {
FOR(float, float32)
FOR(double, float64)
}
