// Attention of new tokens over what a cache holds, on a CPU: keys and values of prompts, which the completions of a
// group share, and of each completion's own tokens. A group's prompt is read once for all queries that continue it.
// bf16 or fp32, sums fp32; where the processor multiplies pairs of bf16, softmax weights are rounded to bf16.
#include "cpu_tiles.h"

#include <memory>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t most_queries = 64, most_keys = 128;  // of a block

// [groups or rows, heads, tokens, D]: one head's keys or values lie in one piece.
template <typename T>
struct Cache {
  T* data;
  int64_t heads, tokens, size;

  Cache(T* data, int64_t heads, int64_t tokens, int64_t size) : data(data), heads(heads), tokens(tokens), size(size) {}
  T* at(int64_t row, int64_t head, int64_t token) const {
    return data + ((row * heads + head) * tokens + token) * size;
  }
};

// Completions' tokens from `start` on, `tokens` of them a row.
template <typename T>
struct Chunk {
  int64_t start;
  Cache<T> keys, values;
};

// Softmax of some queries' scores over keys that come block by block, and the sums of values that it weights.
struct Sums {
  int64_t size;
  float factor, softcap, inner;
  std::unique_ptr<item[]> queries, weights, keys, values;
  std::unique_ptr<float[]> scores, sums, top, total;

  Sums(int64_t count, int64_t size, float scale, float softcap)
      : size(size), factor(softcap ? log2_e : scale * log2_e), softcap(softcap), inner(2 * scale / softcap) {
    queries.reset(new item[count * size]), weights.reset(new item[count * most_keys]);
    keys.reset(new item[size * most_keys]), values.reset(new item[size * most_keys]);
    scores.reset(new float[count * most_keys]), sums.reset(new float[count * size]);
    top.reset(new float[count]), total.reset(new float[count]);
  }

  template <typename T>
  void start(int64_t query, const T* row) {
    for (int64_t d = 0; d < size; ++d) put(row[d], queries[query * size + d]);
    std::fill_n(&sums[query * size], size, 0.f);
    top[query] = -HUGE_VALF, total[query] = 0;
  }

  // Queries from `first` on over `count` keys, at most most_keys. seen(query): from which of these keys to which it
  // looks; the pair may lie outside of them.
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
        for (int64_t c = 0; c < columns; ++c) s[c] = softcap - 2 * softcap / (1.f + exp_of(inner * s[c]));  // tanh
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
    float peak = top[query];
    for (int l = 0; l < lanes; ++l) peak = std::max(peak, peaks[l]);
    if (peak == -HUGE_VALF) {  // it sees none of these keys, and saw none before
      std::memset(to, 0, columns * sizeof(item));
      return;
    }
    const vec shift = vec{} + peak * factor;
    vec part{};
    for (int64_t c = 0; c < columns; c += lanes) {
      float exact[lanes];
      const vec weight = exp2_of(load(s + c) * factor - shift);
      store(exact, weight), part += weight;
      for (int l = 0; l < lanes; ++l) narrow(exact[l], to[c + l]);
    }
    const float decay = peak == top[query] ? 1.f : exp2_of(vec{} + top[query] * factor - shift)[0];
    float sum = total[query] * decay;
    for (int l = 0; l < lanes; ++l) sum += part[l];
    if (decay != 1.f)
      for (int64_t d = 0; d < size; ++d) sums[query * size + d] *= decay;
    top[query] = peak, total[query] = sum;
  }

  template <typename T>
  void finish(int64_t query, T* row) const {
    const float inverse = 1.f / total[query];
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) narrow(sums[query * size + d] * inverse, row[d]);
  }
};

// Tokens that go on from the same prompt, `first` to `last` of the tokens in the order of their groups.
struct Block {
  int64_t group, first, last;
};

// q [Hq, N, D], k and v [Hkv, N, D]: new tokens, whose keys and values go into the cache first. Token i looks at the
// first seen[i] tokens of the prompt group[i] and, if length[i] is not negative, at its own completion's up to token
// number length[i], which it is; else it is the last of the tokens seen. window: how many tokens back it looks, itself
// among them; softcap: 0 for none. prompt_k, prompt_v [G, Hkv, P, D]; completion_k, completion_v [R * Hkv * C, D]
// in chunks [R, Hkv, size, D] of tokens from start on, chunks [N, 2]: start, size. attended [N, Hq, D].
void cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prompt_k, const Tensor& prompt_v,
                      const Tensor& completion_k, const Tensor& completion_v, const Tensor& chunks, const Tensor& group,
                      const Tensor& seen, const Tensor& length, double scale, double softcap, int64_t window,
                      const Tensor& attended) {
  const int64_t tokens = q.size(1), size = q.size(2), heads = q.size(0), key_heads = k.size(0);
  const int64_t shared = heads / std::max<int64_t>(key_heads, 1), groups = prompt_k.size(0), room = prompt_k.size(2);
  STD_TORCH_CHECK(k.size(1) == tokens && v.size(1) == tokens && k.size(2) == size && v.size(2) == size &&
                      v.size(0) == key_heads && shared * key_heads == heads && size % 16 == 0 && size >= 32 &&
                      size <= max_size,
                  "q, k and v do not belong together, or the head's size is no multiple of 16 from 32 to 256");
  for (const Tensor* x : {&group, &seen, &length}) check(*x, ScalarType::Long, tokens, "group, seen or length");
  check(chunks, ScalarType::Long, chunks.size(0) * 2, "chunks");
  const int64_t *of_group = in<int64_t>(group), *sees = in<int64_t>(seen), *at = in<int64_t>(length);
  const int64_t *pairs = in<int64_t>(chunks), parts = chunks.size(0);
  int64_t capacity = 0;
  for (int64_t c = 0; c < parts; capacity += pairs[2 * c++ + 1])
    STD_TORCH_CHECK(pairs[2 * c] == capacity && pairs[2 * c + 1] > 0, "chunks do not follow one another");
  const int64_t rows = capacity ? completion_k.size(0) / (key_heads * capacity) : 0;
  for (int64_t i = 0; i < tokens; ++i)
    STD_TORCH_CHECK(0 <= of_group[i] && of_group[i] < groups && 0 <= sees[i] && sees[i] <= room && at[i] < capacity &&
                        sees[i] + at[i] >= 0 && (at[i] < 0 || i < rows),
                    "a token's place is outside of the cache");

  std::vector<int64_t> order(tokens);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [=](int64_t i, int64_t j) { return of_group[i] < of_group[j]; });
  const int64_t most_tokens = std::max<int64_t>(1, most_queries / std::max<int64_t>(shared, 1));
  std::vector<Block> blocks;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t g = of_group[order[i]];
    if (blocks.empty() || blocks.back().group != g || i - blocks.back().first == most_tokens)
      blocks.push_back({g, i, i});
    blocks.back().last = i + 1;
  }

  dispatch(q, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < sizeof(item) || std::is_same_v<T, item>) {
      check(prompt_k, type_of<T>, groups * key_heads * room * size, "prompt_k");
      check(prompt_v, type_of<T>, groups * key_heads * room * size, "prompt_v");
      check(completion_k, type_of<T>, rows * key_heads * capacity * size, "completion_k");
      check(completion_v, type_of<T>, rows * key_heads * capacity * size, "completion_v");
      check(attended, type_of<T>, tokens * heads * size, "attended");
      const RowsOf<T> queries(q), keys(k), values(v);
      const Cache<T> prompt_keys(out<T>(prompt_k), key_heads, room, size);
      const Cache<T> prompt_values(out<T>(prompt_v), key_heads, room, size);
      std::vector<Chunk<T>> own;
      for (int64_t c = 0; c < parts; ++c) {
        const int64_t start = pairs[2 * c], offset = rows * key_heads * start * size;
        own.push_back({start, {out<T>(completion_k) + offset, key_heads, pairs[2 * c + 1], size},
                       {out<T>(completion_v) + offset, key_heads, pairs[2 * c + 1], size}});
      }
      T* to = out<T>(attended);

      parallel_for(0, tokens * key_heads, 64, [&](int64_t from, int64_t until) {
        for (int64_t x = from; x < until; ++x) {
          const int64_t i = x / key_heads, h = x % key_heads;
          auto c = own.begin();
          while (c != own.end() && at[i] >= c->start + c->keys.tokens) ++c;
          const bool in_prompt = at[i] < 0;
          const int64_t row = in_prompt ? of_group[i] : i, t = in_prompt ? sees[i] - 1 : at[i] - c->start;
          std::memcpy((in_prompt ? prompt_keys : c->keys).at(row, h, t), keys.at(h, i), size * sizeof(T));
          std::memcpy((in_prompt ? prompt_values : c->values).at(row, h, t), values.at(h, i), size * sizeof(T));
        }
      });

      share_out(int64_t(blocks.size()) * key_heads, [&] {
        return [&, sums = Sums(most_tokens * shared, size, float(scale), float(softcap))](int64_t x) mutable {
          const Block& b = blocks[x / key_heads];
          const int64_t h = x % key_heads;
          int64_t most = 0, least = room;  // of the prompt's tokens
          for (int64_t i = b.first; i < b.last; ++i) {
            const int64_t token = order[i];
            most = std::max(most, sees[token]);
            least = std::min(least, std::max<int64_t>(0, sees[token] + at[token] - window + 1));
            for (int64_t s = 0; s < shared; ++s)
              sums.start((i - b.first) * shared + s, queries.at(h * shared + s, token));
          }
          for (int64_t j = least; j < most; j += most_keys)
            sums.add(0, (b.last - b.first) * shared, prompt_keys.at(b.group, h, j), prompt_values.at(b.group, h, j),
                     std::min(most_keys, most - j), [&](int64_t query) {
                       const int64_t token = order[b.first + query / shared];
                       return std::pair(sees[token] + at[token] - window + 1 - j, sees[token] - j);
                     });
          for (int64_t i = b.first; i < b.last; ++i) {
            const int64_t token = order[i], first = std::max<int64_t>(0, at[token] - window + 1);
            for (const Chunk<T>& c : own) {
              const int64_t end = std::min(c.keys.tokens, at[token] - c.start + 1);
              for (int64_t t = std::max<int64_t>(0, first - c.start); t < end; t += most_keys)
                sums.add((i - b.first) * shared, shared, c.keys.at(token, h, t), c.values.at(token, h, t),
                         std::min(most_keys, end - t), [](int64_t) { return std::pair(int64_t(0), most_keys); });
            }
            for (int64_t s = 0; s < shared; ++s)
              sums.finish((i - b.first) * shared + s, to + (token * heads + h * shared + s) * size);
          }
        };
      });
    } else {
      STD_TORCH_CHECK(false, "fp32 is not taken where bf16 is multiplied");
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(strop, m) {
  m.def(
      "cpu_cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) prompt_k, Tensor(b!) prompt_v,"
      " Tensor(c!) completion_k, Tensor(d!) completion_v, Tensor chunks, Tensor group, Tensor seen, Tensor length,"
      " float scale, float softcap, int window, Tensor(e!) attended) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(strop, CPU, m) { m.impl("cpu_cached_attention", TORCH_BOX(&cached_attention)); }
