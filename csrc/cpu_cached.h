// Attention of new tokens over cached keys and values: those of prompts, shared by the completions of a group, and of
// each completion's own tokens. A group's prompt is read once for all queries of its completions. bf16 or fp32 with
// fp32 sums; on processors that multiply pairs of bf16, softmax weights are rounded to bf16.
#pragma once

#include "cpu_tiles.h"

#include <memory>
#include <numeric>
#include <vector>

namespace {

// [groups or rows, heads, tokens, D]: one head's keys or values are contiguous.
template <typename T>
struct Cache {
  T* data;
  int64_t heads, tokens, size;

  T* at(int64_t row, int64_t head, int64_t token) const {
    return data + ((row * heads + head) * tokens + token) * size;
  }
};

// Completion tokens from `start` on, `tokens` per row.
template <typename T>
struct Chunk {
  int64_t start;
  Cache<T> keys, values;
};

// Online softmax of queries' scores over blocks of keys, and the weighted sums of values.
struct Sums {
  int64_t size;
  float factor, softcap, inner;
  std::unique_ptr<item[]> queries, weights, keys, values;
  std::unique_ptr<float[]> scores, sums, top, total;

  Sums(int64_t count, int64_t size, float scale, float softcap)
      : size(size), factor(softcap ? log2_e : scale * log2_e), softcap(softcap), inner(scale / softcap) {
    queries.reset(new item[count * size]), weights.reset(new item[count * most_keys]);
    keys.reset(new item[size * most_keys]), values.reset(new item[size * most_keys]);
    scores.reset(new float[count * most_keys]), sums.reset(new float[count * size]);
    top.reset(new float[count]), total.reset(new float[count]);
  }

  template <typename T>
  void start(int64_t query, const T* row) {
    item* to = &queries[query * size];
    for (int64_t d = 0; d < size; ++d) put(row[d], to[d]);
    std::fill_n(&sums[query * size], size, 0.f);
    top[query] = -HUGE_VALF, total[query] = 0;
  }

  // Queries from `first` on over `count` keys, at most most_keys. seen(query): the range of these keys that the query
  // sees; it may lie outside them.
  template <typename T, typename F>
  void add(int64_t first, int64_t rows, const T* key, const T* value, int64_t count, F seen) {
    const int64_t columns = (count + 15) / 16 * 16, pairs = (count + pair - 1) / pair;
    const auto row_of = [=](const T* x) { return [=](int64_t t) { return t < count ? x + t * size : nullptr; }; };
    across<T>(row_of(key), columns, size, keys.get());
    multiply(rows, columns, size / pair, &queries[first * size], size, keys.get(), scores.get(), false);
    for (int64_t i = 0; i < rows; ++i) {
      float* s = &scores[i * columns];
      if (softcap) {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) s[c] = softcap * tanh_of(inner * s[c]);
      }
      const auto [from, to] = seen(first + i);
      std::fill(s, s + std::clamp<int64_t>(from, 0, columns), -HUGE_VALF);
      std::fill(s + std::clamp<int64_t>(to, 0, count), s + columns, -HUGE_VALF);
      softmax(first + i, s, columns, &weights[i * columns]);
    }
    const item* by_pairs = values.get();
    if constexpr (std::is_same_v<T, item> && pair == 1)
      by_pairs = value;
    else
      along<T>(row_of(value), pairs * pair, size, values.get());
    multiply(rows, size, pairs, weights.get(), columns, by_pairs, &sums[first * size], true);
  }

  void softmax(int64_t query, const float* s, int64_t columns, item* to) {
    vec peaks = load(s);
    for (int64_t c = lanes; c < columns; c += lanes) {
      const vec x = load(s + c);
      peaks = x > peaks ? x : peaks;
    }
    // multiplied and rounded once, so that the rounding cancels
    const float old = top[query], peak = std::max(old, highest(peaks) * factor);
    if (peak == -HUGE_VALF) {  // the query has seen no key so far
      std::memset(to, 0, columns * sizeof(item));
      return;
    }
    const vec shift = vec{} + peak;
    vec part{};
    for (int64_t c = 0; c < columns; c += lanes) {
      const vec weight = exp2_of(load(s + c) * factor - shift);
      put(weight, to + c), part += weight;
    }
    float decay = 1;
    if (peak != old) {
      decay = exp2_of(vec{} + old - shift)[0];
      float* so_far = &sums[query * size];
#pragma omp simd
      for (int64_t d = 0; d < size; ++d) so_far[d] *= decay;
    }
    top[query] = peak, total[query] = total[query] * decay + sum(part);
  }

  template <typename T>
  void finish(int64_t query, T* row) const {
    const float inverse = 1.f / total[query], *x = &sums[query * size];
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) narrow(x[d] * inverse, row[d]);
  }
};

// Tokens that continue the same prompt: order[first] to order[last].
struct Block {
  int64_t group, first, last;
};

// New tokens and the cache. Token i sees the first seen[i] tokens of prompt group[i] and, if length[i] >= 0, the tokens
// of its own completion up to itself, token length[i]; otherwise it is prompt token seen[i] - 1. window: the number of
// most recent tokens it sees, itself included. order: the tokens sorted by group; shared: query heads per key head.
template <typename T>
struct Attention {
  RowsOf<T> queries;
  Cache<T> prompt_keys, prompt_values;
  std::vector<Chunk<T>> own;
  const int64_t *group, *seen, *length, *order;
  int64_t window, shared;

  // Where the key (or value) of token i is cached.
  T* place(int64_t i, int64_t head, bool is_key) const {
    if (length[i] < 0) return (is_key ? prompt_keys : prompt_values).at(group[i], head, seen[i] - 1);
    auto c = own.begin();
    while (length[i] >= c->start + c->keys.tokens) ++c;
    return (is_key ? c->keys : c->values).at(i, head, length[i] - c->start);
  }

  // The first token that token i sees, counted over its prompt and then its completion.
  int64_t begin(int64_t i) const { return std::max<int64_t>(0, seen[i] + length[i] + 1 - window); }

  // write(i, query head, row): takes what token i attended to.
  template <typename F>
  void attend(const Block& b, int64_t head, Sums& sums, F write) const {
    int64_t first = prompt_keys.tokens, last = 0;  // of the prompt's keys
    for (int64_t n = b.first; n < b.last; ++n) {
      const int64_t i = order[n];
      first = std::min(first, begin(i)), last = std::max(last, seen[i]);
      for (int64_t s = 0; s < shared; ++s)
        sums.start((n - b.first) * shared + s, queries.at(head * shared + s, i));
    }
    // rounded down to a multiple, so that a token's bits do not depend on where others begin
    for (int64_t j = first / most_keys * most_keys; j < last; j += most_keys)
      sums.add(0, (b.last - b.first) * shared, prompt_keys.at(b.group, head, j), prompt_values.at(b.group, head, j),
               std::min(most_keys, last - j), [&](int64_t query) {
                 const int64_t i = order[b.first + query / shared];
                 return std::pair(begin(i) - j, seen[i] - j);
               });
    for (int64_t n = b.first; n < b.last; ++n) {
      const int64_t i = order[n], query = (n - b.first) * shared;
      for (const Chunk<T>& c : own) {
        const int64_t end = std::min(c.keys.tokens, length[i] + 1 - c.start);
        for (int64_t t = std::max<int64_t>(0, begin(i) - seen[i] - c.start); t < end; t += most_keys)
          sums.add(query, shared, c.keys.at(i, head, t), c.values.at(i, head, t), std::min(most_keys, end - t),
                   [](int64_t) { return std::pair(int64_t(0), most_keys); });
      }
      for (int64_t s = 0; s < shared; ++s) {
        T row[max_size];
        sums.finish(query + s, row);
        write(i, head * shared + s, row);
      }
    }
  }
};

// The tokens sorted by group, and blocks of at most most_tokens of them.
struct Order {
  std::vector<int64_t> tokens;
  std::vector<Block> blocks;
  int64_t most_tokens;

  Order(const int64_t* group, int64_t count, int64_t most_tokens) : tokens(count), most_tokens(most_tokens) {
    std::iota(tokens.begin(), tokens.end(), 0);
    std::stable_sort(tokens.begin(), tokens.end(), [=](int64_t i, int64_t j) { return group[i] < group[j]; });
    for (int64_t n = 0; n < count; ++n) {
      const int64_t g = group[tokens[n]];
      if (blocks.empty() || blocks.back().group != g || n - blocks.back().first == most_tokens)
        blocks.push_back({g, n, n});
      blocks.back().last = n + 1;
    }
  }
};

// Where new tokens are cached and what they see, checked.
struct Places {
  const int64_t *group, *seen, *length, *pairs;
  int64_t tokens, parts, capacity = 0;

  Places(const Tensor& of_group, const Tensor& sees, const Tensor& at, const Tensor& chunks, int64_t tokens)
      : tokens(tokens), parts(chunks.size(0)) {
    for (const Tensor* x : {&of_group, &sees, &at}) check(*x, ScalarType::Long, tokens, "group, seen or length");
    check(chunks, ScalarType::Long, parts * 2, "chunks");
    group = in<int64_t>(of_group), seen = in<int64_t>(sees), length = in<int64_t>(at), pairs = in<int64_t>(chunks);
    for (int64_t c = 0; c < parts; capacity += pairs[2 * c++ + 1])
      STD_TORCH_CHECK(pairs[2 * c] == capacity && pairs[2 * c + 1] > 0, "chunks do not follow one another");
  }

  template <typename T>
  Attention<T> attention(RowsOf<T> queries, int64_t shared, const Tensor& prompt_k, const Tensor& prompt_v,
                         const Tensor& completion_k, const Tensor& completion_v, const int64_t* order,
                         int64_t window) const {
    const int64_t groups = prompt_k.size(0), heads = prompt_k.size(1), room = prompt_k.size(2), size = prompt_k.size(3);
    const int64_t rows = capacity ? completion_k.size(0) / (heads * capacity) : 0;
    for (int64_t i = 0; i < tokens; ++i)
      STD_TORCH_CHECK(0 <= group[i] && group[i] < groups && 0 <= seen[i] && seen[i] <= room && length[i] < capacity &&
                          seen[i] + length[i] >= 0 && (length[i] < 0 || i < rows),
                      "a token's place is outside of the cache");
    check(prompt_k, type_of<T>, groups * heads * room * size, "prompt_k");
    check(prompt_v, type_of<T>, groups * heads * room * size, "prompt_v");
    check(completion_k, type_of<T>, rows * heads * capacity * size, "completion_k");
    check(completion_v, type_of<T>, rows * heads * capacity * size, "completion_v");
    const auto cache = [=](const Tensor& x, int64_t from, int64_t length) {
      return Cache<T>{out<T>(x) + from, heads, length, size};
    };
    std::vector<Chunk<T>> own;
    for (int64_t c = 0; c < parts; ++c) {
      const int64_t start = pairs[2 * c], from = rows * heads * start * size, length = pairs[2 * c + 1];
      own.push_back({start, cache(completion_k, from, length), cache(completion_v, from, length)});
    }
    return {queries, cache(prompt_k, 0, room), cache(prompt_v, 0, room), own, group, seen, this->length, order, window,
            shared};
  }
};

}  // namespace
