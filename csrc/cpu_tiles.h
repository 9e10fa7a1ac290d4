// Small matrix products in registers, and their helpers: exponentials, rows interleaved in pairs, transposition.
#pragma once

#include "cpu.h"

#include <atomic>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16, most_vectors = 4;  // of a tile of 6 rows, so that all its sums stay in registers
#elif defined(__AVX2__)
constexpr int lanes = 8, most_vectors = 2;
#else
constexpr int lanes = 4, most_vectors = 4;
#endif
constexpr int most_rows = 6;

using vec = float __attribute__((vector_size(4 * lanes), aligned(4), may_alias));

inline vec load(const float* x) { return *reinterpret_cast<const vec*>(x); }
inline void store(float* x, vec value) { *reinterpret_cast<vec*>(x) = value; }

// the products' operand type: a pair's elements are adjacent along the summed dimension
#ifdef __AVX512BF16__
using item = bf16;
#else
using item = float;
#endif
constexpr int64_t pair = 4 / sizeof(item);

inline void put(bf16 x, bf16& out) { out = x; }
template <typename T>
void put(T x, float& out) { out = wide(x); }

// -- products ---------------------------------------------------------------------------------------------------------

// c[R, V * lanes] = or += a[R, steps * pair] times b[steps, V * lanes, pair]; strides in elements, ldb in columns.
template <int R, int V>
void tile(int64_t steps, const item* a, int64_t lda, const item* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  vec sums[R][V];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = vec{};
  for (int64_t s = 0; s < steps; ++s, a += pair, b += ldb * pair) {
#ifdef __AVX512BF16__
    __m512bh columns[V];
    for (int v = 0; v < V; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(b + v * lanes * pair);
    for (int i = 0; i < R; ++i) {
      int32_t both;
      std::memcpy(&both, a + i * lda, sizeof both);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
      for (int v = 0; v < V; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], x, columns[v]);
    }
#else
    vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * lanes);
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] += a[i * lda] * columns[v];
#endif
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) {
      float* to = c + i * ldc + v * lanes;
      store(to, add ? load(to) + sums[i][v] : sums[i][v]);  // many short sums err less than a long one
    }
}

template <int V>
void panel(int64_t rows, int64_t steps, const item* a, int64_t lda, const item* b, int64_t ldb, float* c, int64_t ldc,
           bool add) {
  for (; rows >= most_rows; rows -= most_rows, a += most_rows * lda, c += most_rows * ldc)
    tile<most_rows, V>(steps, a, lda, b, ldb, c, ldc, add);
  switch (rows) {
    case 5: return tile<5, V>(steps, a, lda, b, ldb, c, ldc, add);
    case 4: return tile<4, V>(steps, a, lda, b, ldb, c, ldc, add);
    case 3: return tile<3, V>(steps, a, lda, b, ldb, c, ldc, add);
    case 2: return tile<2, V>(steps, a, lda, b, ldb, c, ldc, add);
    case 1: return tile<1, V>(steps, a, lda, b, ldb, c, ldc, add);
  }
}

// As tile, for any number of rows; columns is a multiple of 16 and also b's stride.
inline void multiply(int64_t rows, int64_t columns, int64_t steps, const item* a, int64_t lda, const item* b,
                     float* c, bool add) {
  constexpr int64_t width = most_vectors * lanes;
  int64_t at = 0;
  for (; at + width <= columns; at += width)
    panel<most_vectors>(rows, steps, a, lda, b + at * pair, columns, c + at, columns, add);
  if constexpr (width > 16) {
    switch ((columns - at) / lanes) {
      case 3: return panel<3>(rows, steps, a, lda, b + at * pair, columns, c + at, columns, add);
      case 2: return panel<2>(rows, steps, a, lda, b + at * pair, columns, c + at, columns, add);
      case 1: return panel<1>(rows, steps, a, lda, b + at * pair, columns, c + at, columns, add);
    }
  }
}

// -- exponentials and pairs -------------------------------------------------------------------------------------------

using ints = int32_t __attribute__((vector_size(4 * lanes), aligned(4), may_alias));

// 2^t for t up to about 0, to 2 units in the last place; 0 below -126. The integer part goes into the exponent, a
// Taylor series on [-1/2, 1/2] gives the rest.
inline vec exp2_of(vec t) {
  const vec magic = vec{} + 12582912.f;  // 3 * 2^22: adding it rounds to an integer
  const vec whole = t + magic, r = t - (whole - magic);
  vec p = vec{} + 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.f;
  const ints power = reinterpret_cast<const ints&>(whole) << 23, bits = reinterpret_cast<const ints&>(p) + power;
  return t < -126.f ? vec{} : reinterpret_cast<const vec&>(bits);
}

// Stores `lanes` columns of two rows, as a row of B if `b` is given and as rows of A, `stride` apart, if `rows` is
// given; `high` is used only where B's rows are interleaved in pairs.
#ifdef __AVX512BF16__
inline void put(vec low, vec high, item* b, item* rows = nullptr, int64_t stride = 0) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  if (b) {
    // 0 and 16, 1 and 17, ...
    const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(16));
    const __m512i by_pairs = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    _mm512_storeu_si512(b, _mm512_permutexvar_epi16(by_pairs, both));
  }
  if (rows) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + stride), _mm512_extracti64x4_epi64(both, 1));
  }
}
// `lanes` adjacent elements of a row of A.
inline void put(vec x, item* row) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#else
inline void put(vec low, vec, item* b, item* rows = nullptr, int64_t = 0) {
  if (b) store(b, low);
  if (rows) store(rows, low);
}
inline void put(vec x, item* row) { store(row, x); }
#endif

inline float highest(vec x) {
  float found = x[0];
  for (int l = 1; l < lanes; ++l) found = std::max(found, x[l]);
  return found;
}

inline float sum(vec x) {
  float found = x[0];
  for (int l = 1; l < lanes; ++l) found += x[l];
  return found;
}

// -- transposition ----------------------------------------------------------------------------------------------------

// to[j * stride + i] = from[i][j]: lanes x lanes numbers of 32 bits.
inline void turn(const float* const* from, float* to, int64_t stride) {
  vec rows[lanes];
  for (int i = 0; i < lanes; ++i) rows[i] = load(from[i]);
#pragma GCC unroll 16
  for (int step = 1; step < lanes; step *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & step) continue;
      const vec low = rows[i], high = rows[i + step];
#ifdef __clang__
      for (int l = 0; l < lanes; ++l) {
        rows[i][l] = l & step ? high[l - step] : low[l];
        rows[i + step][l] = l & step ? high[l] : low[l + step];
      }
#else
      int32_t first __attribute__((vector_size(4 * lanes))), second __attribute__((vector_size(4 * lanes)));
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) {
        first[l] = l & step ? lanes + l - step : l;
        second[l] = l & step ? lanes + l : l + step;
      }
      rows[i] = __builtin_shuffle(low, high, first);
      rows[i + step] = __builtin_shuffle(low, high, second);
#endif
    }
  for (int i = 0; i < lanes; ++i) store(to + i * stride, rows[i]);
}

// -- attention's rows -------------------------------------------------------------------------------------------------

constexpr int64_t max_size = 256;                       // of a head
constexpr int64_t most_queries = 64, most_keys = 128;  // of a block of scores
constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

// Calls f with a value of the element's type, which the products must support.
template <typename F>
void dispatch_taken(const Tensor& x, F f) {
  dispatch(x, [&](auto element) {
    if constexpr (sizeof(element) > sizeof(item)) {
      STD_TORCH_CHECK(false, "fp32 is not taken where bf16 is multiplied");
    } else {
      f(element);
    }
  });
}

struct Sizes {
  int64_t heads, key_heads, tokens, size, shared;  // shared: query heads per key head
};

inline Sizes sizes_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Sizes n{q.size(0), k.size(0), q.size(1), q.size(2), q.size(0) / std::max<int64_t>(k.size(0), 1)};
  STD_TORCH_CHECK(k.size(1) == n.tokens && v.size(1) == n.tokens && k.size(2) == n.size && v.size(2) == n.size &&
                      v.size(0) == n.key_heads && n.shared && n.shared * n.key_heads == n.heads && n.size % 16 == 0 &&
                      n.size >= 32 && n.size <= max_size,
                  "q, k and v do not belong together, or the head's size is no multiple of 16 from 32 to 256");
  return n;
}

// [H, T, D] with dense rows.
template <typename T>
struct RowsOf {
  T* data;
  int64_t by_head, by_token;

  RowsOf(T* data, int64_t by_head, int64_t by_token) : data(data), by_head(by_head), by_token(by_token) {}
  explicit RowsOf(const Tensor& x) : data(const_cast<T*>(in<T>(x))), by_head(x.stride(0)), by_token(x.stride(1)) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type_of<T> && x.dim() == 3 && x.stride(2) == 1,
                    "expected ", std::is_same_v<T, bf16> ? "bf16" : "fp32", " [heads, tokens, size] with dense rows");
  }
  T* at(int64_t head, int64_t token) const { return data + head * by_head + token * by_token; }
};

// Rows as B of a sum over their elements: [size / pair, columns, pair]. row(c) is a pointer, or null for zeros.
template <typename T, typename F>
void across(F row, int64_t columns, int64_t size, item* to) {
  constexpr bool as_is = sizeof(T) * pair == 4;  // a row of pairs, or of fp32
  float wide_rows[as_is ? 1 : lanes][max_size];
  const T nothing[max_size] = {};
  for (int64_t c = 0; c < columns; c += lanes) {
    const float* rows[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      const T* x = row(c + i);
      if (!x) x = nothing;
      if constexpr (as_is) {
        rows[i] = reinterpret_cast<const float*>(x);
      } else {
        rows[i] = wide_rows[i];
#pragma omp simd
        for (int64_t d = 0; d < size; ++d) wide_rows[i][d] = wide(x[d]);
      }
    }
    auto* o = reinterpret_cast<float*>(to) + c;
    for (int64_t d = 0; d < size / pair; d += lanes) {
      const int64_t at = std::min(d, size / pair - lanes);  // may overlap the previous step at the end
      const float* from[lanes];
      for (int i = 0; i < lanes; ++i) from[i] = rows[i] + at;
      turn(from, o + at * columns, columns);
    }
  }
}

// Rows as B of a sum over rows: [count / pair, size, pair]; count a multiple of pair.
template <typename T, typename F>
void along(F row, int64_t count, int64_t size, item* to) {
  const T nothing[max_size] = {};
  for (int64_t c = 0; c < count; c += pair, to += size * pair) {
    const T* low = row(c);
    if (!low) low = nothing;
    if constexpr (pair == 2) {
      const T* high = row(c + 1);
      if (!high) high = nothing;
      auto* both = reinterpret_cast<uint32_t*>(to);
#pragma omp simd
      for (int64_t d = 0; d < size; ++d) both[d] = low[d].bits | uint32_t(high[d].bits) << 16;
    } else {
#pragma omp simd
      for (int64_t d = 0; d < size; ++d) to[d] = wide(low[d]);
    }
  }
}

// Calls work() once per thread, and its result with every i below count. Threads take the next i as they finish, so the
// result must not depend on which thread runs it.
template <typename F>
void share_out(int64_t count, F work) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    auto run = work();
    for (int64_t i; (i = next++) < count;) run(i);
  });
}

}  // namespace
