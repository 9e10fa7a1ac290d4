// What a decoder does with one row of bf16 between its products, in vectors of 16. Intermediates are rounded to bf16
// where PyTorch's composition rounds them.
#pragma once

#include "cpu_matmul.h"

#ifdef __AVX512BF16__

namespace {

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline __m512 rounded(__m512 x) { return widened(narrowed(x)); }

inline __m512 load16(const bf16* x, __mmask16 lanes = 0xffff) { return widened(_mm256_maskz_loadu_epi16(lanes, x)); }
inline void store16(bf16* x, __m512 value, __mmask16 lanes = 0xffff) {
  _mm256_mask_storeu_epi16(x, lanes, narrowed(value));
}

// Calls f(first, lanes) for every 16 of `count` elements.
template <typename F>
inline void by_16(int64_t count, F f) {
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) f(j, __mmask16(0xffff));
  if (j < count) f(j, first_lanes(count - j));
}

// weight * (row / sqrt(mean(row^2) + eps)), the 16 elements from j on to to(j).
template <typename F>
inline void norm_row(const bf16* row, const bf16* weight, int64_t width, float eps, F to) {
  __m512 squares = _mm512_setzero_ps();
  by_16(width, [&](int64_t j, __mmask16 lanes) {
    const __m512 x = load16(row + j, lanes);
    squares = _mm512_fmadd_ps(x, x, squares);
  });
  const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / float(width) + eps));
  by_16(width, [&](int64_t j, __mmask16 lanes) {
    const __m512 x = rounded(_mm512_mul_ps(load16(row + j, lanes), scale));
    store16(to(j), _mm512_mul_ps(x, load16(weight + j, lanes)), lanes);
  });
}

// A head's row rotated by the angles of cos and sin, its two halves as pairs.
inline void rotate_row(const bf16* row, const bf16* cos, const bf16* sin, int64_t half, bf16* to) {
  by_16(half, [&](int64_t j, __mmask16 lanes) {
    const __m512 low = load16(row + j, lanes), high = load16(row + half + j, lanes);
    const auto turned = [&](__m512 x, __m512 y, int64_t at) {
      const __m512 straight = rounded(_mm512_mul_ps(x, load16(cos + at, lanes)));
      store16(to + at, _mm512_add_ps(straight, rounded(_mm512_mul_ps(y, load16(sin + at, lanes)))), lanes);
    };
    turned(low, _mm512_sub_ps(_mm512_setzero_ps(), high), j);
    turned(high, low, half + j);
  });
}

// silu(gate) * up
inline __m512 silu_mul(__m512 gate, __m512 up) {
  const __m512 g = rounded(gate), bound = _mm512_set1_ps(126);
  const __m512 power = (__m512)exp2_of((vec)_mm512_min_ps(_mm512_mul_ps(g, _mm512_set1_ps(-float(log2_e))), bound));
  const __m512 one = _mm512_set1_ps(1), below = _mm512_add_ps(one, power);
  const __m512 guess = _mm512_rcp14_ps(below);  // a division takes as long as all the rest
  const __m512 share = _mm512_fmadd_ps(_mm512_fnmadd_ps(below, guess, one), guess, guess);
  return _mm512_mul_ps(rounded(_mm512_mul_ps(g, share)), rounded(up));
}

}  // namespace

#endif
