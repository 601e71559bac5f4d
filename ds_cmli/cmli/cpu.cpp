// All-pairs CMLI on a CPU: scores with argmax indices, and the gradients from these.
//
// Forward multiplies a block of images with a few texts at a time, and takes both maxima of each
// pair while its similarities are in the cache. In backward a gradient's row is a sum of rows of
// the other side, listed by counting. No padding is computed. Every number is written by one
// thread, which adds in a fixed order: any number of threads gives the same bits.
//
// Shapes: I images of N patches, J texts of M tokens, T tokens of all texts, D features.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// One side: the valid rows of B sequences.
struct Side {
  const float* features;  // [B * P, D]
  const int64_t* rows;    // [R] the place of each valid row
  const int32_t* ends;    // [B] the valid rows up to the end of each sequence
  int64_t D, B;

  int64_t first(int64_t b) const { return b ? ends[b - 1] : 0; }
  int64_t length(int64_t b) const { return ends[b] - first(b); }
  int64_t place(int64_t row) const { return rows[row] * D; }
};

// Numbers of pairs [I, J], and the argmax indices: tokens [I, J, N], patches [I, T]. Null: unused.
struct Pairs {
  float *i2t, *t2i;
  void *tokens, *patches;
  int64_t token_bytes, patch_bytes;  // of an index
};

namespace {

#ifdef __AVX512F__
constexpr int BYTES = 64, ROWS = 8;  // of a vector; rows that are multiplied together
#elif defined(__AVX2__)
constexpr int BYTES = 32, ROWS = 4;
#else
constexpr int BYTES = 16, ROWS = 4;
#endif
constexpr int L = BYTES / sizeof(float);
constexpr int TOKENS = 64;          // that are multiplied with a block of images, at the least
constexpr int64_t NEAR = 1 << 19;   // bytes of features that stay in a core's cache in backward

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Integers __attribute__((vector_size(BYTES)));
const Floats LOWEST = Floats{} - std::numeric_limits<float>::infinity();

template <class V, class T>
V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
void store(T* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

template <class V>
V shuffle(V a, V b, Integers from) {
#ifdef __clang__
  V out;
  for (int l = 0; l < L; ++l) out[l] = from[l] < L ? a[from[l]] : b[from[l] - L];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

Integers lane() {
  Integers out;
  for (int l = 0; l < L; ++l) out[l] = l;
  return out;
}

// Let a have its own lanes and b's where a bit of the lane is 0, next to each other, and b those
// where it is 1.
template <class V>
void exchange(V& a, V& b, int bit) {
  Integers own = lane();
  V low = shuffle(a, b, own & bit ? own + (L - bit) : own);
  b = shuffle(a, b, own & bit ? own + L : own + bit);
  a = low;
}

float sum(Floats lanes) {
  for (int bit = 1; bit < L; bit *= 2) {
    Floats other = lanes;
    exchange(lanes, other, bit);
    lanes += other;
  }
  return lanes[0];
}

float sum(const float* values, int64_t count) {
  Floats lanes = {};
  int64_t k = 0;
  for (; k + L <= count; k += L) lanes += load<Floats>(values + k);
  float total = sum(lanes);
  for (; k < count; ++k) total += values[k];
  return total;
}

void put(void* to, int64_t bytes, int64_t at, const int32_t* values, int64_t count) {
  if (bytes == 1)
    std::copy(values, values + count, static_cast<uint8_t*>(to) + at);
  else
    std::copy(values, values + count, static_cast<int16_t*>(to) + at);
}

// S [count, Q vectors]: rows of features by Q vectors of patches, [D, Q, L].
template <int Q>
void multiply(const float* const* rows, int64_t count, const float* patches, int64_t D, float* S,
              int64_t stride) {
  for (int64_t first = 0; first < count; first += ROWS) {
    const float* of[ROWS];
    Floats sums[ROWS][Q] = {};
    for (int r = 0; r < ROWS; ++r) of[r] = rows[std::min(first + r, count - 1)];
    for (int64_t d = 0; d < D; ++d) {
      Floats patch[Q];
      for (int q = 0; q < Q; ++q) patch[q] = load<Floats>(patches + (d * Q + q) * L);
      for (int r = 0; r < ROWS; ++r)
        for (int q = 0; q < Q; ++q) sums[r][q] += of[r][d] * patch[q];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int q = 0; q < Q; ++q) store(S + (first + r) * stride + q * L, sums[r][q]);
  }
}

// The maxima of a pair's similarities [M, N] and their indices, the lowest of equal ones.
struct Maxima {
  float* best_token;   // [N] and a vector more, like the next
  int32_t* token;      // [N]
  float* best_patch;   // [M]
  int32_t* patch;      // [M]

  Maxima(char* scratch, int64_t N, int64_t M) {
    best_token = reinterpret_cast<float*>(scratch);
    token = reinterpret_cast<int32_t*>(best_token + N + L);
    best_patch = reinterpret_cast<float*>(token + N + L);
    patch = reinterpret_cast<int32_t*>(best_patch + M);
  }

  void find(const float* S, int64_t stride, int64_t N, int64_t M) {
    begin(N);
    if (N >= L) {
      Floats all = {};
      // What is at the end of a row, or the last rows, may be taken twice, which changes nothing.
      if (M < 4)
        for (int64_t m = 0; m < M; ++m) rows<1>(S, stride, N, m, all);
      else
        for (int64_t m = 0; m < M; m += 4) rows<4>(S, stride, N, std::min(m, M - 4), all);
      float total = sum(all);
      if (total - total == 0) return;  // all are finite: above, a NaN wins no comparison
      begin(N);
    }
    for (int64_t m = 0; m < M; ++m) row(S + m * stride, N, m);
  }

 private:
  void begin(int64_t N) {
    for (int64_t n = 0; n < N; n += L) store(best_token + n, LOWEST), store(token + n, Integers{});
  }

  static void take(Floats value, Integers index, Floats& best, Integers& where) {
    Integers larger = value > best;
    best = larger ? value : best;
    where = larger ? index : where;
  }

  template <int R>
  void rows(const float* S, int64_t stride, int64_t N, int64_t m, Floats& all) {
    Floats best[R];
    Integers where[R];
    for (int r = 0; r < R; ++r) best[r] = LOWEST, where[r] = Integers{};
    for (int64_t n = 0; n < N; n += L) {
      int64_t at = std::min(n, N - L);
      Floats of_patch = load<Floats>(best_token + at);
      Integers which = load<Integers>(token + at);
      for (int r = 0; r < R; ++r) {
        Floats value = load<Floats>(S + (m + r) * stride + at);
        all += value;
        take(value, Integers{} + static_cast<int32_t>(m + r), of_patch, which);
        take(value, lane() + static_cast<int32_t>(at), best[r], where[r]);
      }
      store(best_token + at, of_patch), store(token + at, which);
    }
    // Rows share a vector, then lanes are compared, until the first R lanes are those of the rows.
    for (int bit = 1, left = R; bit < L; bit *= 2, left = (left + 1) / 2) {
      for (int r = 0; r < (left + 1) / 2; ++r) {
        int a = bit < R ? 2 * r : r, b = bit < R ? 2 * r + 1 : r;
        Floats value = best[a], other = best[b];
        Integers index = where[a], next = where[b];
        exchange(value, other, bit);
        exchange(index, next, bit);
        Integers taken = (other > value) | ((other == value) & (next < index));
        where[r] = taken ? next : index;
        best[r] = taken ? other : value;
      }
    }
    std::memcpy(best_patch + m, &best[0], R * sizeof(float));
    std::memcpy(patch + m, &where[0], R * sizeof(int32_t));
  }

  // Of two NaNs the first one is the maximum, as in `reference.py`.
  void row(const float* values, int64_t N, int64_t m) {
    auto larger = [](float value, float best) {
      return value > best || (value != value && best == best);
    };
    best_patch[m] = -std::numeric_limits<float>::infinity(), patch[m] = 0;
    for (int64_t n = 0; n < N; ++n) {
      if (larger(values[n], best_patch[m])) best_patch[m] = values[n], patch[m] = n;
      if (larger(values[n], best_token[n])) best_token[n] = values[n], token[n] = m;
    }
  }
};

// A thread's block of images [from, to) against texts, a few at a time.
struct Block {
  const Side &text, &image;
  const Pairs& out;
  int64_t from, to, most, columns, tokens = 0, waiting = 0;
  const float** rows;  // [tokens]
  int64_t* texts;      // [waiting]
  float* patches;      // [columns, D] in groups of up to three vectors, [D, vectors, L] each
  float* S;            // [tokens, columns]
  char* rest;          // for the maxima

  Block(const Side& text, const Side& image, const Pairs& out, int64_t from, int64_t to,
        int64_t longest, char* scratch)
      : text(text), image(image), out(out), from(from), to(to),
        most(std::max<int64_t>(TOKENS, longest)) {
    int64_t first = image.first(from), count = image.ends[to - 1] - first;
    columns = (count + L - 1) / L * L;
    rows = reinterpret_cast<const float**>(scratch);
    texts = reinterpret_cast<int64_t*>(rows + most);
    patches = reinterpret_cast<float*>(texts + most);
    S = patches + columns * image.D;
    rest = reinterpret_cast<char*>(S + columns * (most + ROWS));
    for_groups([&](int64_t at, int64_t wide) {
      for (int64_t n = at; n < at + wide; n += L) {
        const float* of[L];
        for (int64_t l = 0; l < L; ++l)
          of[l] = image.features + image.place(first + std::min(n + l, count - 1));
        transpose(of, patches + at * image.D + n - at, wide);
      }
    });
  }

  void add(int64_t j) {
    int64_t M = text.length(j);
    if (!M) return;
    if (tokens + M > most) compare();
    texts[waiting++] = j;
    for (int64_t m = 0; m < M; ++m)
      rows[tokens++] = text.features + text.place(text.first(j) + m);
  }

  void compare() {
    if (!tokens) return;
    for_groups([&](int64_t at, int64_t wide) {
      auto product = wide == L ? multiply<1> : wide == 2 * L ? multiply<2> : multiply<3>;
      product(rows, tokens, patches + at * image.D, image.D, S + at, columns);
    });
    Maxima maxima(rest, columns, most);
    const float* of_text = S;
    for (int64_t k = 0; k < waiting; ++k) {
      int64_t j = texts[k], M = text.length(j);
      for (int64_t i = from; i < to; ++i) {
        int64_t N = image.length(i), pair = i * text.B + j;
        if (!N) continue;
        maxima.find(of_text + image.first(i) - image.first(from), columns, N, M);
        out.i2t[pair] = sum(maxima.best_token, N) / N;
        out.t2i[pair] = sum(maxima.best_patch, M) / M;
        if (out.tokens) {
          put(out.tokens, out.token_bytes, image.first(i) * text.B + j * N, maxima.token, N);
          int64_t row = i * text.first(text.B) + text.first(j);
          put(out.patches, out.patch_bytes, row, maxima.patch, M);
        }
      }
      of_text += M * columns;
    }
    tokens = waiting = 0;
  }

  // Rows of features as columns, [D, L] with a stride.
  void transpose(const float* const* of, float* to, int64_t stride) const {
    int64_t d = 0;
    for (; d + L <= image.D; d += L) {
      Floats block[L];
      for (int l = 0; l < L; ++l) block[l] = load<Floats>(of[l] + d);
      for (int bit = 1; bit < L; bit *= 2)
        for (int l = 0; l < L; ++l)
          if (!(l & bit)) exchange(block[l], block[l | bit], bit);
      for (int l = 0; l < L; ++l) store(to + (d + l) * stride, block[l]);
    }
    for (; d < image.D; ++d)
      for (int l = 0; l < L; ++l) to[d * stride + l] = of[l][d];
  }

  template <class Use>
  void for_groups(Use use) const {
    int64_t vectors = columns / L, groups = (vectors + 2) / 3;
    for (int64_t g = 0; g < groups; ++g) {
      int64_t at = g * vectors / groups;
      use(at * L, ((g + 1) * vectors / groups - at) * L);
    }
  }
};

struct Entry {
  int32_t row;
  float weight;
};

// Add weighted rows of features to a row of a gradient.
void add_rows(float* __restrict to, const Entry* entries, int64_t count, const Side& side) {
  int64_t D = side.D, k = 0;
  auto row = [&](int64_t entry) { return side.features + side.place(entries[entry].row); };
  for (; k + 4 <= count; k += 4) {
    const float *a = row(k), *b = row(k + 1), *c = row(k + 2), *e = row(k + 3);
    float of_a = entries[k].weight, of_b = entries[k + 1].weight;
    float of_c = entries[k + 2].weight, of_e = entries[k + 3].weight;
#pragma GCC ivdep
    for (int64_t d = 0; d < D; ++d)
      to[d] += (of_a * a[d] + of_b * b[d]) + (of_c * c[d] + of_e * e[d]);
  }
  for (; k < count; ++k) {
    const float *a = row(k), of_a = entries[k].weight;
#pragma GCC ivdep
    for (int64_t d = 0; d < D; ++d) to[d] += of_a * a[d];
  }
}

// What the positions of one side have chosen in a pair, and the weight of each choice.
struct Choices {
  const void* indices;
  int64_t bytes, first;
  float weight;

  int32_t operator[](int64_t k) const {
    return bytes == 1 ? static_cast<const uint8_t*>(indices)[first + k]
                      : static_cast<const int16_t*>(indices)[first + k];
  }
};

// The gradient of one side (own). A row gets, of each sequence of the other side, the row that it
// has chosen (its argmax), and every row that has chosen it.
struct Gradient {
  bool of_image;
  const Side &own, &other;
  const Pairs& pairs;

  // The choices of own and of other rows. False if the pair's scores have no gradient.
  bool find(int64_t o, int64_t x, Choices& chosen, Choices& choosers) const {
    const Side &image = of_image ? own : other, &text = of_image ? other : own;
    int64_t i = of_image ? o : x, j = of_image ? x : o, pair = i * text.B + j;
    int64_t N = image.length(i), M = text.length(j), T = text.first(text.B);
    if (!N || !M || (pairs.i2t[pair] == 0 && pairs.t2i[pair] == 0)) return false;
    int64_t tokens = image.first(i) * text.B + j * N, patches = i * T + text.first(j);
    Choices of_patches{pairs.tokens, pairs.token_bytes, tokens, pairs.i2t[pair] / N};
    Choices of_tokens{pairs.patches, pairs.patch_bytes, patches, pairs.t2i[pair] / M};
    chosen = of_image ? of_patches : of_tokens;
    choosers = of_image ? of_tokens : of_patches;
    return true;
  }

  // Add the other side's sequences [from, to) to one of the own. What its rows add is listed by row.
  void add(int64_t o, int64_t from, int64_t to, float* out, Entry* list, int32_t* next) const {
    Choices chosen, choosers;
    int64_t P = own.length(o);
    int32_t count = 0;
    std::fill(next, next + P + 1, 0);  // where each row's part goes on
    for (int64_t x = from; x < to; ++x) {
      if (!find(o, x, chosen, choosers)) continue;
      ++count;
      for (int64_t k = 0; k < other.length(x); ++k) ++next[choosers[k] + 1];
    }
    if (!count) return;
    for (int64_t p = 0; p < P; ++p) next[p + 1] += next[p] + count;
    for (int64_t x = from; x < to; ++x) {
      if (!find(o, x, chosen, choosers)) continue;
      int32_t first = other.first(x), length = other.length(x);
      for (int64_t p = 0; p < P; ++p) list[next[p]++] = {first + chosen[p], chosen.weight};
      for (int32_t k = 0; k < length; ++k) list[next[choosers[k]]++] = {first + k, choosers.weight};
    }
    for (int64_t p = 0, at = 0; p < P; at = next[p++])
      add_rows(out + own.place(own.first(o) + p), list + at, next[p] - at, other);
  }
};

}  // namespace

extern "C" {

// List the valid rows of a mask [B, P], and where each sequence's end. Null: all are valid.
void cmli_rows(const bool* mask, int64_t B, int64_t P, int64_t* rows, int32_t* ends) {
  int32_t count = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t p = b * P; p < (b + 1) * P; ++p)
      if (!mask || mask[p]) rows[count++] = p;
    ends[b] = count;
  }
}

// Write the scores and, unless null, argmax indices: nothing of a pair without patches or tokens.
void cmli_forward(const Side* text, const Side* image, const Pairs* out, int64_t block_rows,
                  int64_t longest, char* scratch, int64_t bytes, int threads) {
  std::vector<int64_t> starts;  // of blocks of up to `block_rows` patches
  for (int64_t i = 0; i < image->B; ++i)
    if (starts.empty() || image->ends[i] - image->first(starts.back()) > block_rows)
      starts.push_back(i);
  starts.push_back(image->B);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < static_cast<int64_t>(starts.size()) - 1; ++b) {
    if (image->ends[starts[b + 1] - 1] == image->first(starts[b])) continue;
    Block block(*text, *image, *out, starts[b], starts[b + 1], longest,
                scratch + omp_get_thread_num() * bytes);
    for (int64_t j = 0; j < text->B; ++j) block.add(j);
    block.compare();
  }
}

// Add to the gradient of one side's features, given those of the scores and the argmax indices.
void cmli_backward(int of_image, const Side* own, const Side* other, const Pairs* pairs, float* out,
                   int64_t longest, int64_t entries, char* scratch, int64_t bytes, int threads) {
  Gradient gradient{of_image != 0, *own, *other, *pairs};
  // Sequences for which a thread goes through the other side's.
  int64_t each = threads == 1 ? own->B : (own->B + 4 * threads - 1) / (4 * threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t first = 0; first < own->B; first += each) {
    auto* list = reinterpret_cast<Entry*>(scratch + omp_get_thread_num() * bytes);
    auto* next = reinterpret_cast<int32_t*>(list + entries);
    for (int64_t from = 0, to = 0; from < other->B; from = to) {
      int64_t rows = 0;  // of a group that stays near and lists no more than `entries`
      for (; to < other->B; ++to) {
        int64_t more = rows + other->length(to), listed = (to + 1 - from) * longest + more;
        bool near = more * other->D * int64_t(sizeof(float)) <= NEAR;
        if (to > from && (listed > entries || !near)) break;
        rows = more;
      }
      for (int64_t o = first; o < std::min(first + each, own->B); ++o)
        gradient.add(o, from, to, out, list, next);
    }
  }
}
}
