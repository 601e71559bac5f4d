// All-pairs CMLI on a CPU: scores with argmax indices, and the gradients from these.
//
// Forward multiplies a block of images with a few texts at a time, and takes both maxima of each
// pair while its similarities are in the cache. In backward a row of a gradient is a sum of rows of
// the other side, listed by counting. Padding is not computed. One thread writes each number and
// adds in a fixed order: any number of threads gives the same bits.
//
// Shapes: I images of N patches, J texts of M tokens, T tokens of all texts, D features.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// Images or texts: B sequences of P positions, whose valid positions are listed as rows.
struct Side {
  const float* features;  // [B * P, D]
  const bool* mask;       // [B * P]; null: all positions are valid
  int64_t* positions;     // [B * P] the position of each row
  int32_t* ends;          // [B] the number of rows up to the end of each sequence
  int64_t B;
  int64_t P;
  int64_t D;

  void list_rows() const {
    int32_t count = 0;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t p = b * P; p < (b + 1) * P; ++p)
        if (!mask || mask[p]) positions[count++] = p;
      ends[b] = count;
    }
  }

  int64_t first(int64_t b) const { return b ? ends[b - 1] : 0; }
  int64_t length(int64_t b) const { return ends[b] - first(b); }
  const float* row(int64_t r) const { return features + positions[r] * D; }
};

// The arguments of forward and backward.
struct Call {
  Side image;
  Side text;
  float* i2t;          // [I, J] the scores; in backward their gradients, as in t2i
  float* t2i;          // [I, J]
  void* token_argmax;  // [I, J, N] the best token of each patch; null: not wanted
  void* patch_argmax;  // [I, T] the best patch of each token
  float* d_image;      // null in forward
  float* d_text;
  char* scratch;       // [threads, thread_bytes]
  int64_t token_bytes;  // of an index
  int64_t patch_bytes;
  int64_t thread_bytes;
  int64_t threads;
  int64_t block_rows;   // the patches of a thread's block of images, at most
  int64_t max_entries;  // the rows that a thread lists in backward

  char* thread_scratch() const { return scratch + omp_get_thread_num() * thread_bytes; }
};

namespace {

#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64;
constexpr int ROWS = 8;  // of features, that are multiplied together
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int ROWS = 4;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int ROWS = 4;
#endif
constexpr int L = VECTOR_BYTES / sizeof(float);
constexpr int MIN_TOKENS = 64;           // that are multiplied with a block of images
constexpr int64_t CACHE_BYTES = 1 << 19;  // of features that stay in a core's cache in backward

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

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

Integers lanes() {
  Integers out;
  for (int l = 0; l < L; ++l) out[l] = l;
  return out;
}

// Return the vector whose lane l is the lane l + by of another, which begins again after its last.
template <class V>
V rotated(V vector, int by) {
#ifdef __clang__
  V out;
  for (int l = 0; l < L; ++l) out[l] = vector[(l + by) % L];
  return out;
#else
  return __builtin_shuffle(vector, lanes() + by);
#endif
}

float sum(Floats vector) {
  for (int by = 1; by < L; by *= 2) vector += rotated(vector, by);
  return vector[0];
}

float sum(const float* values, int64_t count) {
  Floats sums = {};
  int64_t k = 0;
  for (; k + L <= count; k += L) sums += load<Floats>(values + k);
  float total = sum(sums);
  for (; k < count; ++k) total += values[k];
  return total;
}

// Take the next `count` elements of a thread's scratch memory.
template <class T>
T* take(char*& scratch, int64_t count) {
  T* taken = reinterpret_cast<T*>(scratch);
  scratch += count * sizeof(T);
  return taken;
}

void write_indices(void* to, int64_t bytes, int64_t first, const int32_t* indices, int64_t count) {
  if (bytes == 1)
    std::copy(indices, indices + count, static_cast<uint8_t*>(to) + first);
  else
    std::copy(indices, indices + count, static_cast<int16_t*>(to) + first);
}

// Write the products S [count, Q * L] of rows of features and Q vectors of patches [Q, D, L].
template <int Q>
void multiply(const float* const* rows, int64_t count, const float* patches, int64_t D, float* S,
              int64_t stride) {
  for (int64_t first = 0; first < count; first += ROWS) {
    const float* row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = rows[std::min(first + r, count - 1)];
    Floats sums[ROWS][Q] = {};
    for (int64_t d = 0; d < D; ++d) {
      Floats patch[Q];
      for (int q = 0; q < Q; ++q) patch[q] = load<Floats>(patches + (q * D + d) * L);
      for (int r = 0; r < ROWS; ++r)
        for (int q = 0; q < Q; ++q) sums[r][q] += row[r][d] * patch[q];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int q = 0; q < Q; ++q) store(S + (first + r) * stride + q * L, sums[r][q]);
  }
}

// The maxima of a pair's similarities [M, N] in both directions, with the lowest index of each.
struct Maxima {
  float* token_max;      // [N + L] over the tokens
  int32_t* token_index;  // [N + L]
  float* patch_max;      // [M] over the patches
  int32_t* patch_index;  // [M]

  void find(const float* S, int64_t stride, int64_t N, int64_t M) {
    reset(N);
    if (N >= L) {
      Floats sums = {};
      // The last rows, and the end of a row, may be compared twice, which changes nothing.
      if (M < 4)
        for (int64_t m = 0; m < M; ++m) compare_rows<1>(S, stride, N, m, sums);
      else
        for (int64_t m = 0; m < M; m += 4) compare_rows<4>(S, stride, N, std::min(m, M - 4), sums);
      float total = sum(sums);
      if (total - total == 0) return;  // all are finite: a NaN wins no comparison above
      reset(N);
    }
    for (int64_t m = 0; m < M; ++m) compare_row(S + m * stride, N, m);
  }

 private:
  void reset(int64_t N) {
    std::fill(token_max, token_max + N, LOWEST);
    std::fill(token_index, token_index + N, 0);
  }

  static void keep_larger(Floats value, Integers index, Floats& max, Integers& max_index) {
    Integers is_larger = value > max;
    max = is_larger ? value : max;
    max_index = is_larger ? index : max_index;
  }

  template <int R>
  void compare_rows(const float* S, int64_t stride, int64_t N, int64_t m, Floats& sums) {
    Floats max[R];
    Integers index[R] = {};
    for (int r = 0; r < R; ++r) max[r] = Floats{} + LOWEST;
    for (int64_t next = 0; next < N; next += L) {
      int64_t n = std::min(next, N - L);
      Floats column_max = load<Floats>(token_max + n);
      Integers column_index = load<Integers>(token_index + n);
      for (int r = 0; r < R; ++r) {
        Floats value = load<Floats>(S + (m + r) * stride + n);
        sums += value;
        keep_larger(value, Integers{} + static_cast<int32_t>(m + r), column_max, column_index);
        keep_larger(value, lanes() + static_cast<int32_t>(n), max[r], index[r]);
      }
      store(token_max + n, column_max);
      store(token_index + n, column_index);
    }
    for (int r = 0; r < R; ++r) {
      for (int by = 1; by < L; by *= 2) {
        Floats other = rotated(max[r], by);
        Integers other_index = rotated(index[r], by);
        Integers is_first = (other == max[r]) & (other_index < index[r]);
        Integers is_better = (other > max[r]) | is_first;
        max[r] = is_better ? other : max[r];
        index[r] = is_better ? other_index : index[r];
      }
      patch_max[m + r] = max[r][0];
      patch_index[m + r] = index[r][0];
    }
  }

  // Compare one row; the first NaN is the maximum.
  void compare_row(const float* values, int64_t N, int64_t m) {
    auto is_larger = [](float value, float max) {
      return value > max || (value != value && max == max);
    };
    patch_max[m] = LOWEST;
    patch_index[m] = 0;
    for (int64_t n = 0; n < N; ++n) {
      if (is_larger(values[n], patch_max[m])) {
        patch_max[m] = values[n];
        patch_index[m] = n;
      }
      if (is_larger(values[n], token_max[n])) {
        token_max[n] = values[n];
        token_index[n] = m;
      }
    }
  }
};

// A thread's block of images [begin, end), compared with texts, a few at a time.
struct Block {
  const Call& call;
  int64_t begin;
  int64_t end;
  int64_t max_tokens;
  int64_t columns;  // patches, with copies of the last one up to a whole vector
  float* patches;   // [columns / L, D, L]
  float* S;         // [tokens, columns]
  const float** tokens;
  int64_t* texts;
  Maxima maxima;
  int64_t num_tokens = 0;
  int64_t num_texts = 0;

  Block(const Call& call, int64_t begin, int64_t end) : call(call), begin(begin), end(end) {
    const Side& image = call.image;
    int64_t first = image.first(begin);
    int64_t count = image.ends[end - 1] - first;
    columns = (count + L - 1) / L * L;
    max_tokens = std::max<int64_t>(MIN_TOKENS, call.text.P);
    char* scratch = call.thread_scratch();
    tokens = take<const float*>(scratch, max_tokens);
    texts = take<int64_t>(scratch, max_tokens);
    patches = take<float>(scratch, columns * image.D);
    S = take<float>(scratch, columns * (max_tokens + ROWS));
    maxima.token_max = take<float>(scratch, columns + L);
    maxima.token_index = take<int32_t>(scratch, columns + L);
    maxima.patch_max = take<float>(scratch, max_tokens);
    maxima.patch_index = take<int32_t>(scratch, max_tokens);
    for (int64_t n = 0; n < columns; ++n) {
      const float* patch = image.row(first + std::min(n, count - 1));
      float* column = patches + n / L * image.D * L + n % L;
      for (int64_t d = 0; d < image.D; ++d) column[d * L] = patch[d];
    }
  }

  void add(int64_t j) {
    int64_t M = call.text.length(j);
    if (M == 0) return;
    if (num_tokens + M > max_tokens) compare();
    texts[num_texts++] = j;
    for (int64_t m = 0; m < M; ++m) tokens[num_tokens++] = call.text.row(call.text.first(j) + m);
  }

  void compare() {
    if (num_texts == 0) return;
    multiply_all();
    const float* text_S = S;
    for (int64_t k = 0; k < num_texts; ++k) {
      for (int64_t i = begin; i < end; ++i)
        if (call.image.length(i) > 0) score(i, texts[k], text_S);
      text_S += call.text.length(texts[k]) * columns;
    }
    num_tokens = 0;
    num_texts = 0;
  }

 private:
  void multiply_all() {
    int64_t D = call.image.D;
    int64_t vectors = columns / L;
    int64_t groups = (vectors + 2) / 3;  // of up to three vectors
    for (int64_t g = 0; g < groups; ++g) {
      int64_t first = g * vectors / groups;
      int64_t count = (g + 1) * vectors / groups - first;
      auto product = count == 1 ? multiply<1> : count == 2 ? multiply<2> : multiply<3>;
      product(tokens, num_tokens, patches + first * D * L, D, S + first * L, columns);
    }
  }

  void score(int64_t i, int64_t j, const float* text_S) {
    const Side& image = call.image;
    const Side& text = call.text;
    int64_t N = image.length(i);
    int64_t M = text.length(j);
    maxima.find(text_S + image.first(i) - image.first(begin), columns, N, M);
    call.i2t[i * text.B + j] = sum(maxima.token_max, N) / N;
    call.t2i[i * text.B + j] = sum(maxima.patch_max, M) / M;
    if (!call.token_argmax) return;
    int64_t patch = image.first(i) * text.B + j * N;
    int64_t token = i * text.first(text.B) + text.first(j);
    write_indices(call.token_argmax, call.token_bytes, patch, maxima.token_index, N);
    write_indices(call.patch_argmax, call.patch_bytes, token, maxima.patch_index, M);
  }
};

struct Entry {
  int32_t row;
  float weight;
};

// Add weighted rows of a side's features to a row of a gradient.
void add_rows(float* __restrict gradient, const Entry* entries, int64_t count, const Side& side) {
  int64_t D = side.D;
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const float* row[4];
    float weight[4];
    for (int e = 0; e < 4; ++e) {
      row[e] = side.row(entries[k + e].row);
      weight[e] = entries[k + e].weight;
    }
#pragma GCC ivdep
    for (int64_t d = 0; d < D; ++d)
      gradient[d] += (weight[0] * row[0][d] + weight[1] * row[1][d]) +
                     (weight[2] * row[2][d] + weight[3] * row[3][d]);
  }
  for (; k < count; ++k) {
    const float* row = side.row(entries[k].row);
    float weight = entries[k].weight;
#pragma GCC ivdep
    for (int64_t d = 0; d < D; ++d) gradient[d] += weight * row[d];
  }
}

// The rows of the other side that the positions of one side chose in a pair.
struct Choices {
  const void* indices;
  int64_t bytes;  // of an index
  int64_t first;
  float weight;  // of each choice

  int32_t operator[](int64_t k) const {
    return bytes == 1 ? static_cast<const uint8_t*>(indices)[first + k]
                      : static_cast<const int16_t*>(indices)[first + k];
  }
};

// The gradient of one side, the target. A row of it gets, of each sequence of the other side, the
// source, the row that it chose (its argmax), and every row that chose it.
struct Gradient {
  const Call& call;
  bool of_image;
  const Side& target = of_image ? call.image : call.text;
  const Side& source = of_image ? call.text : call.image;

  // Add all sources to all targets.
  void add(float* gradient) const {
    int64_t threads = call.threads;
    // Targets for which a thread goes through the sources.
    int64_t num_targets = threads == 1 ? target.B : (target.B + 4 * threads - 1) / (4 * threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < target.B; first += num_targets) {
      char* scratch = call.thread_scratch();
      Entry* entries = take<Entry>(scratch, call.max_entries);
      int32_t* next = take<int32_t>(scratch, target.P + 1);
      int64_t end = 0;
      for (int64_t begin = 0; begin < source.B; begin = end) {
        end = end_of_group(begin);
        for (int64_t t = first; t < std::min(first + num_targets, target.B); ++t)
          add_to_target(t, begin, end, gradient, entries, next);
      }
    }
  }

 private:
  // Return the end of the sources from `begin` that stay in the cache and fit into the list.
  int64_t end_of_group(int64_t begin) const {
    int64_t end = begin;
    for (int64_t rows = 0; end < source.B; ++end) {
      rows += source.length(end);
      int64_t entries = (end + 1 - begin) * target.P + rows;
      bool is_cached = rows * source.D * int64_t(sizeof(float)) <= CACHE_BYTES;
      if (end > begin && (entries > call.max_entries || !is_cached)) break;
    }
    return end;
  }

  // Add the sources [begin, end) to a target. The entries of its rows are listed row after row.
  void add_to_target(int64_t t, int64_t begin, int64_t end, float* gradient, Entry* entries,
                     int32_t* next) const {
    Choices chosen;
    Choices choosers;
    int64_t length = target.length(t);
    int32_t num_sources = 0;
    std::fill(next, next + length + 1, 0);  // the place of each row's next entry
    for (int64_t s = begin; s < end; ++s) {
      if (!find(t, s, chosen, choosers)) continue;
      ++num_sources;
      for (int64_t k = 0; k < source.length(s); ++k) ++next[choosers[k] + 1];
    }
    if (num_sources == 0) return;
    for (int64_t p = 0; p < length; ++p) next[p + 1] += next[p] + num_sources;
    for (int64_t s = begin; s < end; ++s) {
      if (!find(t, s, chosen, choosers)) continue;
      int32_t first = source.first(s);
      int32_t count = source.length(s);
      for (int64_t p = 0; p < length; ++p) entries[next[p]++] = {first + chosen[p], chosen.weight};
      for (int32_t k = 0; k < count; ++k)
        entries[next[choosers[k]]++] = {first + k, choosers.weight};
    }
    int64_t place = 0;
    for (int64_t p = 0; p < length; ++p) {
      float* row = gradient + target.positions[target.first(t) + p] * target.D;
      add_rows(row, entries + place, next[p] - place, source);
      place = next[p];
    }
  }

  // Find what the rows of a target and of a source chose. False if the pair has no gradient.
  bool find(int64_t t, int64_t s, Choices& chosen, Choices& choosers) const {
    const Side& image = call.image;
    const Side& text = call.text;
    int64_t i = of_image ? t : s;
    int64_t j = of_image ? s : t;
    int64_t N = image.length(i);
    int64_t M = text.length(j);
    float d_i2t = call.i2t[i * text.B + j];
    float d_t2i = call.t2i[i * text.B + j];
    if (N == 0 || M == 0 || (d_i2t == 0 && d_t2i == 0)) return false;
    int64_t patch = image.first(i) * text.B + j * N;
    int64_t token = i * text.first(text.B) + text.first(j);
    Choices of_patches{call.token_argmax, call.token_bytes, patch, d_i2t / N};
    Choices of_tokens{call.patch_argmax, call.patch_bytes, token, d_t2i / M};
    chosen = of_image ? of_patches : of_tokens;
    choosers = of_image ? of_tokens : of_patches;
    return true;
  }
};

}  // namespace

extern "C" {

// Write the scores and, unless null, argmax indices: nothing of a pair without patches or tokens.
void cmli_forward(const Call* call) {
  const Side& image = call->image;
  image.list_rows();
  call->text.list_rows();
  std::vector<int64_t> begins;  // of blocks of images
  for (int64_t i = 0; i < image.B; ++i)
    if (begins.empty() || image.ends[i] - image.first(begins.back()) > call->block_rows)
      begins.push_back(i);
  begins.push_back(image.B);
#pragma omp parallel for schedule(dynamic) num_threads(call->threads)
  for (int64_t b = 0; b < static_cast<int64_t>(begins.size()) - 1; ++b) {
    if (image.ends[begins[b + 1] - 1] == image.first(begins[b])) continue;
    Block block(*call, begins[b], begins[b + 1]);
    for (int64_t j = 0; j < call->text.B; ++j) block.add(j);
    block.compare();
  }
}

// Add to the gradients of both sides, given those of the scores and the argmax indices.
void cmli_backward(const Call* call) {
  call->image.list_rows();
  call->text.list_rows();
  Gradient{*call, false}.add(call->d_text);
  Gradient{*call, true}.add(call->d_image);
}
}
