// cpu_cached.h's attention on the matrix unit, for heads of a multiple of 32: scores are computed with keys as rows, as
// they are cached, and 16 queries as columns, so that a softmax is over vectors and keys are not transposed. The
// columns of a tile are the queries of a few tokens: they read a prompt together, and what each reads of its own
// completion is computed for all columns and kept for the token's.
#pragma once

#include "cpu_cached.h"
#include "cpu_rows.h"

#ifdef __AVX512BF16__

namespace {

struct alignas(64) Line {
  char bytes[64];
};

// c [16 N, 16] = N tiles of rows, the next 16 below, times one of columns, [steps, 16 pairs, 16, 2]. size: of a row.
template <int N>
inline void multiply_rows(int64_t size, const bf16* a, const bf16* b, float* c) {
  constexpr int64_t line = 64;
  const int64_t stride = size * sizeof(bf16), tile = tile_rows * size;
  asm volatile("tilezero %%tmm0" ::);
  if (N > 1) asm volatile("tilezero %%tmm1" ::);
  if (N > 2) asm volatile("tilezero %%tmm2\n tilezero %%tmm3" ::);
  for (int64_t d = 0; d < size; d += tile_width, a += tile_width, b += tile_size) {
    asm volatile("tileloadd (%0,%1), %%tmm4\n tileloadd (%2,%3), %%tmm5\n tdpbf16ps %%tmm4, %%tmm5, %%tmm0" ::"r"(b),
                 "r"(line), "r"(a), "r"(stride)
                 : "memory");
    if (N > 1)
      asm volatile("tileloadd (%0,%1), %%tmm6\n tdpbf16ps %%tmm4, %%tmm6, %%tmm1" ::"r"(a + tile), "r"(stride)
                   : "memory");
    if (N > 2)
      asm volatile("tileloadd (%0,%2), %%tmm7\n tdpbf16ps %%tmm4, %%tmm7, %%tmm2\n"
                   "tileloadd (%1,%2), %%tmm5\n tdpbf16ps %%tmm4, %%tmm5, %%tmm3" ::"r"(a + 2 * tile),
                   "r"(a + 3 * tile), "r"(stride)
                   : "memory");
  }
  asm volatile("tilestored %%tmm0, (%0,%1)" ::"r"(c), "r"(line) : "memory");
  if (N > 1) asm volatile("tilestored %%tmm1, 1024(%0,%1)" ::"r"(c), "r"(line) : "memory");
  if (N > 2)
    asm volatile("tilestored %%tmm2, 2048(%0,%1)\n tilestored %%tmm3, 3072(%0,%1)" ::"r"(c), "r"(line) : "memory");
}

// c [16, 64] (or 32, for N = 2), rows `size` apart = weights in `steps` tiles times N tiles of values side by side.
template <int N>
inline void multiply_values(int64_t size, int64_t steps, const bf16* a, const bf16* b, float* c) {
  constexpr int64_t line = 64;
  const int64_t stride = size * sizeof(float);
  asm volatile("tilezero %%tmm0\n tilezero %%tmm1" ::);
  if (N > 2) asm volatile("tilezero %%tmm2\n tilezero %%tmm3" ::);
  for (int64_t s = 0; s < steps; ++s, a += tile_size, b += tile_width * size) {
    asm volatile(
        "tileloadd (%0,%2), %%tmm4\n tileloadd (%1,%2), %%tmm5\n tdpbf16ps %%tmm5, %%tmm4, %%tmm0\n"
        "tileloadd 1024(%1,%2), %%tmm6\n tdpbf16ps %%tmm6, %%tmm4, %%tmm1" ::"r"(a), "r"(b), "r"(line)
        : "memory");
    if (N > 2)
      asm volatile(
          "tileloadd 2048(%0,%1), %%tmm7\n tdpbf16ps %%tmm7, %%tmm4, %%tmm2\n"
          "tileloadd 3072(%0,%1), %%tmm5\n tdpbf16ps %%tmm5, %%tmm4, %%tmm3" ::"r"(b), "r"(line)
          : "memory");
  }
  asm volatile("tilestored %%tmm0, (%0,%1)\n tilestored %%tmm1, 64(%0,%1)" ::"r"(c), "r"(stride) : "memory");
  if (N > 2)
    asm volatile("tilestored %%tmm2, 128(%0,%1)\n tilestored %%tmm3, 192(%0,%1)" ::"r"(c), "r"(stride) : "memory");
}

// Memory that is read soon, in the order in which it is needed: a cache lies in many places, and where it goes on next
// the processor learns too late to read ahead by itself. It is fetched piece by piece: too many reads at once stop all
// others.
class Ahead {
 public:
  void add(const void* from, int64_t bytes) {
    const char* at = static_cast<const char*>(from);
    if (bytes > 0) ranges.push_back({at, at + bytes}), lines += bytes / 64 + 1;
  }
  // All of it is to be fetched by `count` calls of fetch_some.
  void divide(int64_t count) { each = blocks_of(lines, std::max<int64_t>(1, count)); }
  void clear() { ranges.clear(), next = 0, lines = 0; }

  void fetch_some() {
    for (int64_t n = each; n > 0 && next < ranges.size(); --n) {
      auto& [at, end] = ranges[next];
      _mm_prefetch(at, _MM_HINT_T1);
      if ((at += 64) >= end) ++next;
    }
  }

 private:
  std::vector<std::pair<const char*, const char*>> ranges;
  size_t next = 0;
  int64_t lines = 0, each = 0;
};

class UnitAttention {
 public:
  static constexpr int64_t columns = 16, most_tiles = 4;

  static bool takes(int64_t size, int64_t shared) { return size % 32 == 0 && shared <= columns; }
  static int64_t tokens_per_tile(int64_t shared) { return columns / shared; }

  UnitAttention(int64_t size, int64_t shared, float scale)
      : size(size), shared(shared), factor(scale * float(log2_e)), steps(size / 32) {
    queries = take<bf16>(most_tiles * steps * tile_size), values = take<bf16>(most_keys * size);
    weights = take<bf16>(most_keys * columns), padded = take<bf16>(tile_rows * size);
    scores = take<float>(most_keys * columns), of_token = take<float>(most_keys * columns);
    part = take<float>(columns * size), sums = take<float>(most_tiles * columns * size);
  }

  // write(i, query head, row): takes what token i attended to. The next call is for `coming` and `coming_head`, if
  // given.
  template <typename F>
  void attend(const Attention<bf16>& a, const Block& b, int64_t head, const Block* coming, int64_t coming_head,
              F write) {
    const int64_t per_tile = tokens_per_tile(shared), tiles = blocks_of(b.last - b.first, per_tile);
    std::memset(queries, 0, tiles * steps * tile_size * sizeof(bf16));
    std::fill_n(sums, tiles * columns * size, 0.f);
    int64_t first = a.prompt_keys.tokens, last = 0;  // of the prompt's keys
    for (int64_t n = b.first; n < b.last; ++n) {
      const int64_t i = a.order[n], tile = (n - b.first) / per_tile, column = (n - b.first) % per_tile * shared;
      first = std::min(first, a.begin(i)), last = std::max(last, a.seen[i]);
      for (int64_t s = 0; s < shared; ++s) put_query(tile, column + s, a.queries.at(head * shared + s, i));
    }
    for (int64_t t = 0; t < tiles; ++t) top[t] = _mm512_set1_ps(-HUGE_VALF), total[t] = _mm512_setzero_ps();

    // rounded down to a multiple, so that a token's bits do not depend on where others begin
    const int64_t start = first / most_keys * most_keys;
    ahead.clear();
    fetch_prompt(a, b, head, start + most_keys, last);
    for (int64_t n = b.first; n < b.last; ++n) fetch_own(a, a.order[n], head);
    if (coming) fetch_prompt(a, *coming, coming_head, 0, std::min(most_keys, a.seen[a.order[coming->first]]));
    ahead.divide(tiles * blocks_of(last - start, tile_width) * tile_rows);
    for (int64_t j = start; j < last; j += most_keys) {
      const int64_t count = std::min(most_keys, last - j);
      pair_values(a.prompt_values.at(b.group, head, j), count);
      for (int64_t t = 0; t < tiles; ++t) {
        Seen seen;
        each_token(a, b, t, [&](int64_t i, int64_t column) {
          seen.set(column, shared, a.begin(i) - j, a.seen[i] - j);
        });
        score(t, a.prompt_keys.at(b.group, head, j), a.prompt_keys.tokens - j, count, scores);
        add(t, softmax(t, count, seen), count, 0, columns);
      }
    }
    for (int64_t t = 0; t < tiles; ++t)
      for (const Chunk<bf16>& c : a.own) attend_own(a, b, head, t, c);

    for (int64_t t = 0; t < tiles; ++t) {
      alignas(64) float inverse[columns];
      _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1), total[t]));
      each_token(a, b, t, [&](int64_t i, int64_t column) {
        for (int64_t s = column; s < column + shared; ++s) {
          bf16 row[max_size];
          for (int64_t d = 0; d < size; d += 16)
            store16(row + d, _mm512_mul_ps(_mm512_load_ps(sums_of(t, s) + d), _mm512_set1_ps(inverse[s])));
          write(i, head * shared + s - column, row);
        }
      });
    }
  }

 private:
  // The range of a block's keys that each column sees; all where nothing was set.
  struct Seen {
    alignas(64) int32_t from[columns] = {}, to[columns];
    Seen() { std::fill_n(to, columns, int32_t(most_keys)); }

    void set(int64_t column, int64_t count, int64_t first, int64_t last) {
      std::fill_n(from + column, count, int32_t(std::clamp<int64_t>(first, 0, most_keys)));
      std::fill_n(to + column, count, int32_t(std::clamp<int64_t>(last, 0, most_keys)));
    }
    bool is_all(int64_t count) const {
      return *std::max_element(from, from + columns) == 0 && *std::min_element(to, to + columns) >= count;
    }
  };

  template <typename T>
  T* take(int64_t count) {
    memory.emplace_back((count * sizeof(T) + 63) / 64);
    return reinterpret_cast<T*>(memory.back().data());
  }

  float* sums_of(int64_t tile, int64_t column) const { return sums + (tile * columns + column) * size; }

  template <typename F>
  void each_token(const Attention<bf16>& a, const Block& b, int64_t tile, F f) const {
    const int64_t per_tile = tokens_per_tile(shared), first = b.first + tile * per_tile;
    for (int64_t n = first; n < std::min(b.last, first + per_tile); ++n) f(a.order[n], (n - first) * shared);
  }

  void put_query(int64_t tile, int64_t column, const bf16* row) {
    auto* to = reinterpret_cast<uint32_t*>(queries + tile * steps * tile_size) + column;
    for (int64_t p = 0; p < size / 2; ++p) std::memcpy(to + p * columns, row + 2 * p, sizeof(uint32_t));
  }

  // to [count rounded up to 16, 16] = scores of `count` keys; `there` rows can be read.
  void score(int64_t tile, const bf16* keys, int64_t there, int64_t count, float* to) {
    const bf16* columns_of = queries + tile * steps * tile_size;
    for (int64_t k = 0; k < count;) {
      const bf16* rows = keys + k * size;
      float* found = to + k * columns;
      if (k + 48 < count && k + 64 <= there) {
        multiply_rows<4>(size, rows, columns_of, found), k += 64;
      } else if (k + 16 < count && k + 32 <= there) {
        multiply_rows<2>(size, rows, columns_of, found), k += 32;
      } else {
        if (k + tile_rows > there) {
          std::memset(padded, 0, tile_rows * size * sizeof(bf16));
          std::memcpy(padded, rows, (there - k) * size * sizeof(bf16));
          rows = padded;
        }
        multiply_rows<1>(size, rows, columns_of, found), k += tile_rows;
      }
    }
  }

  // The weights of the scores' keys, and by what earlier sums of each column must be multiplied.
  __m512 softmax(int64_t tile, int64_t count, const Seen& seen) {
    const __m512 none = _mm512_set1_ps(-HUGE_VALF), by = _mm512_set1_ps(factor);
    __m512 peaks = none;
    if (seen.is_all(count)) {
      for (int64_t k = 0; k < count; ++k) peaks = _mm512_max_ps(peaks, _mm512_load_ps(scores + k * columns));
    } else {
      const __m512i from = _mm512_load_si512(seen.from), to = _mm512_load_si512(seen.to);
      for (int64_t k = 0; k < count; ++k) {
        const __m512i at = _mm512_set1_epi32(int32_t(k));
        const __mmask16 sees = _mm512_cmple_epi32_mask(from, at) & _mm512_cmplt_epi32_mask(at, to);
        const __m512 x = _mm512_mask_blend_ps(sees, none, _mm512_load_ps(scores + k * columns));
        _mm512_store_ps(scores + k * columns, x), peaks = _mm512_max_ps(peaks, x);
      }
    }
    const __m512 old = top[tile], peak = _mm512_max_ps(old, _mm512_mul_ps(peaks, by));
    // a column that has seen no key so far has weights of 0
    const __m512 shift = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(peak, none, _CMP_EQ_OQ), peak, _mm512_setzero_ps());
    const auto weight = [&](int64_t k) {
      return (__m512)exp2_of((vec)_mm512_fmsub_ps(_mm512_load_ps(scores + k * columns), by, shift));
    };
    __m512 part = _mm512_setzero_ps();
    alignas(64) float pairs[tile_rows * columns];
    const float* rows[tile_rows];
    for (int64_t i = 0; i < tile_rows; ++i) rows[i] = pairs + i * columns;
    for (int64_t k = 0; k < count; k += tile_width) {
      for (int64_t i = 0; i < tile_rows; ++i) {
        ahead.fetch_some();
        const int64_t at = k + 2 * i;
        const __m512 low = at < count ? weight(at) : _mm512_setzero_ps();
        const __m512 high = at + 1 < count ? weight(at + 1) : _mm512_setzero_ps();
        part = _mm512_add_ps(part, _mm512_add_ps(low, high));
        put((vec)low, (vec)high, reinterpret_cast<bf16*>(pairs + i * columns));
      }
      turn(rows, reinterpret_cast<float*>(weights + k * columns), columns);
    }
    const __m512 decay = (__m512)exp2_of((vec)_mm512_sub_ps(old, shift));
    top[tile] = peak, total[tile] = _mm512_fmadd_ps(total[tile], decay, part);
    return decay;
  }

  // Values in tiles of 32 keys and 16 elements, keys in pairs; zeros up to a multiple of 32 keys.
  void pair_values(const bf16* rows, int64_t count) {
    const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i first = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(32)), 16));
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t k = 0; k < blocks_of(count, tile_width) * tile_width; k += 2) {
      bf16* to = values + k / tile_width * tile_width * size + k % tile_width * 16;
      for (int64_t d = 0; d < size; d += 32, to += 2 * tile_size) {
        const __m512i low = k < count ? _mm512_loadu_si512(rows + k * size + d) : _mm512_setzero_si512();
        const __m512i high = k + 1 < count ? _mm512_loadu_si512(rows + (k + 1) * size + d) : _mm512_setzero_si512();
        _mm512_store_si512(to, _mm512_permutex2var_epi16(low, first, high));
        _mm512_store_si512(to + tile_size, _mm512_permutex2var_epi16(low, second, high));
      }
    }
  }

  // Adds the weighted values of `count` keys to the sums of columns [first, last), after their decay.
  void add(int64_t tile, __m512 decay, int64_t count, int64_t first, int64_t last) {
    alignas(64) float by[columns];
    _mm512_store_ps(by, decay);
    const int64_t key_steps = blocks_of(count, tile_width);
    for (int64_t d = 0; d < size; d += 64)
      if (d + 64 <= size)
        multiply_values<4>(size, key_steps, weights, values + d / 16 * tile_size, part + d);
      else
        multiply_values<2>(size, key_steps, weights, values + d / 16 * tile_size, part + d);
    for (int64_t c = first; c < last; ++c)
      for (int64_t d = 0; d < size; d += 16) {
        float* to = sums_of(tile, c) + d;
        const __m512 more = _mm512_load_ps(part + c * size + d);
        _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(to), _mm512_set1_ps(by[c]), more));
      }
  }

  void fetch_prompt(const Attention<bf16>& a, const Block& b, int64_t head, int64_t from, int64_t until) {
    for (int64_t j = from; j < until; j += most_keys)
      for (const Cache<bf16>& x : {a.prompt_keys, a.prompt_values})
        ahead.add(x.at(b.group, head, j), std::min(most_keys, until - j) * size * int64_t(sizeof(bf16)));
  }

  void fetch_own(const Attention<bf16>& a, int64_t i, int64_t head) {
    for (const Chunk<bf16>& c : a.own) {
      const int64_t first = std::max<int64_t>(0, a.begin(i) - a.seen[i] - c.start);
      const int64_t count = std::min(c.keys.tokens, a.length[i] + 1 - c.start) - first;
      if (count <= 0) continue;
      for (const Cache<bf16>& x : {c.keys, c.values})
        ahead.add(x.at(i, head, first), count * size * int64_t(sizeof(bf16)));
    }
  }

  void attend_own(const Attention<bf16>& a, const Block& b, int64_t head, int64_t tile, const Chunk<bf16>& c) {
    const auto begin = [&](int64_t i) { return std::max<int64_t>(0, a.begin(i) - a.seen[i] - c.start); };
    const auto end = [&](int64_t i) { return std::min(c.keys.tokens, a.length[i] + 1 - c.start); };
    int64_t first = c.keys.tokens, last = 0;
    each_token(a, b, tile, [&](int64_t i, int64_t) {
      first = std::min(first, begin(i)), last = std::max(last, end(i));
    });
    for (int64_t j = first / most_keys * most_keys; j < last; j += most_keys) {
      const int64_t count = std::min(most_keys, last - j);
      Seen seen;
      each_token(a, b, tile, [&](int64_t i, int64_t column) {
        seen.set(column, shared, begin(i) - j, end(i) - j);
        if (end(i) <= j) return;
        const int64_t own = std::min(count, end(i) - j);
        score(tile, c.keys.at(i, head, j), c.keys.tokens - j, own, of_token);
        const __mmask16 its = __mmask16(((1u << shared) - 1) << column);
        for (int64_t k = 0; k < own; ++k)
          _mm512_mask_store_ps(scores + k * columns, its, _mm512_load_ps(of_token + k * columns));
      });
      const __m512 decay = softmax(tile, count, seen);
      each_token(a, b, tile, [&](int64_t i, int64_t column) {
        if (end(i) <= j) return;
        pair_values(c.values.at(i, head, j), std::min(count, end(i) - j));
        add(tile, decay, std::min(count, end(i) - j), column, column + shared);
      });
    }
  }

  int64_t size, shared;
  float factor;
  int64_t steps;
  Ahead ahead;
  std::vector<std::vector<Line>> memory;
  bf16 *queries, *values, *weights, *padded;
  float *scores, *of_token, *part, *sums;
  __m512 top[most_tiles], total[most_tiles];
};

}  // namespace

#endif
