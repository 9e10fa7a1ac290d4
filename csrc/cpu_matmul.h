// Products of bf16 rows and packed weights, fp32 sums, for few rows: the time goes into reading the weights, so these
// lie in the order in which they are read.
//
// Rows come in tiles of 16 rows by 32 elements, 1 KiB each, a tile of rows after the other: [rows / 16, K / 32, 16,
// 32]. Weights come in panels of 32 outputs, [K / 32, 2, 16 pairs, 16 outputs, 2], as Intel's AMX and the instructions
// for pairs of bf16 read them. Both are padded with zeros. A sum's order is that of its elements, whatever the other
// rows.
#pragma once

#include "cpu_tiles.h"

#ifdef __AVX512BF16__

namespace {

constexpr int64_t tile_rows = 16, tile_width = 32, tile_size = tile_rows * tile_width, panel_width = 32;

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows in tiles, `steps` of them per 16 rows.
struct TiledRows {
  bf16* data;
  int64_t steps;

  bf16* at(int64_t row, int64_t column) const {
    return data + (row / tile_rows * steps + column / tile_width) * tile_size + row % tile_rows * tile_width +
           column % tile_width;
  }
  // count elements from `column` on, a multiple of 16 that ends at the row's end or at a multiple of 16
  void put(int64_t row, int64_t column, const bf16* x, int64_t count) const {
    for (int64_t last = column + count; column < last;) {
      const int64_t n = std::min(last - column, tile_width - column % tile_width);
      std::memcpy(at(row, column), x, n * sizeof(bf16));
      column += n, x += n;
    }
  }
  void pad(int64_t row, int64_t from) const {
    for (int64_t column = from; column < steps * tile_width; ++column) *at(row, column) = bf16{0};
  }
};

// Fetches a step of a panel, 2 KiB. One step ahead is best: it keeps the processor's own prefetching of the sequence
// going, which has more reads under way than instructions can; farther ahead the reads of rows have to wait.
inline void fetch_step(const bf16* at) {
  for (int64_t i = 0; i < 2 * tile_size; i += 32) _mm_prefetch(reinterpret_cast<const char*>(at + i), _MM_HINT_T1);
}

// The registers of a thread as 8 tiles of 16 rows of 64 bytes, for as long as this lives.
struct MatrixUnit {
  explicit MatrixUnit(bool wanted) : wanted(wanted) {
    if (!wanted) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  MatrixUnit(const MatrixUnit&) = delete;
  ~MatrixUnit() {
    if (wanted) asm volatile("tilerelease");
  }
  const bool wanted;
};

// c [16 R, 32] = R tiles of rows times a panel. next: what is read after it, null if the panel was read just now.
template <int R>
inline void multiply_on_unit(int64_t steps, const bf16* a, const bf16* b, float* c, const bf16* next) {
  constexpr int64_t stride = 64, c_stride = panel_width * sizeof(float);
  const bf16* a2 = a + steps * tile_size;
  asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n" ::);
  if (R == 2) asm volatile("tilezero %%tmm2\n tilezero %%tmm3\n" ::);
  for (int64_t s = 0; s < steps; ++s, a += tile_size, a2 += tile_size, b += 2 * tile_size) {
    if (next) fetch_step(s + 1 < steps ? b + 2 * tile_size : next);
    asm volatile(
        "tileloadd (%0,%2), %%tmm4\n tileloadd (%1,%2), %%tmm6\n tileloadd 1024(%1,%2), %%tmm7\n"
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n" ::"r"(a), "r"(b), "r"(stride)
        : "memory");
    if (R == 2)
      asm volatile(
          "tileloadd (%0,%1), %%tmm5\n tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3\n" ::"r"(a2),
          "r"(stride)
          : "memory");
  }
  asm volatile("tilestored %%tmm0, (%0,%1)\n tilestored %%tmm1, 64(%0,%1)\n" ::"r"(c), "r"(c_stride) : "memory");
  if (R == 2)
    asm volatile("tilestored %%tmm2, (%0,%1)\n tilestored %%tmm3, 64(%0,%1)\n" ::"r"(c + tile_rows * panel_width),
                 "r"(c_stride)
                 : "memory");
}

// c [N, 32] = N rows of a tile times a panel.
template <int N>
inline void multiply_in_vectors(int64_t steps, const bf16* a, const bf16* b, float* c, const bf16* next) {
  __m512 sums[N][2];
  for (int i = 0; i < N; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s, a += tile_size, b += 2 * tile_size) {
    if (next) fetch_step(s + 1 < steps ? b + 2 * tile_size : next);
    for (int64_t p = 0; p < tile_width / 2; ++p) {
      const __m512bh low = (__m512bh)_mm512_loadu_si512(b + p * 32);
      const __m512bh high = (__m512bh)_mm512_loadu_si512(b + tile_size + p * 32);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        int32_t both;
        std::memcpy(&both, a + i * tile_width + 2 * p, sizeof both);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, low), sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, high);
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    _mm512_storeu_ps(c + i * panel_width, sums[i][0]);
    _mm512_storeu_ps(c + i * panel_width + 16, sums[i][1]);
  }
}

// Rows [first, last), first a multiple of 16, times `panels` panels of weights. coming: the weights that the thread
// reads next. finish(row, rows, panel, c): takes the sums c [rows, 32] of at most 32 rows.
template <typename F>
void multiply_panels(const TiledRows& rows, int64_t first, int64_t last, const bf16* weights, int64_t panels,
                     const MatrixUnit& unit, const bf16* coming, F finish) {
  alignas(64) float c[2 * tile_rows * panel_width];
  const int64_t panel_size = rows.steps * 2 * tile_size;
  for (int64_t row = first; row < last; row += 2 * tile_rows)
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t count = std::min(last - row, 2 * tile_rows);
      const bf16 *a = rows.at(row, 0), *b = weights + p * panel_size;
      const bf16* next = row > first ? nullptr : p + 1 < panels ? b + panel_size : coming;
      if (!unit.wanted)
        for (int64_t i = 0; i < count; i += 8)
          multiply_in_vectors<8>(rows.steps, rows.at(row + i, 0), b, c + i * panel_width, i ? nullptr : next);
      else if (count > tile_rows)
        multiply_on_unit<2>(rows.steps, a, b, c, next);
      else
        multiply_on_unit<1>(rows.steps, a, b, c, next);
      if (next) fetch_step(next + 2 * tile_size);  // arrives while the sums are finished
      finish(row, count, p, c);
    }
}

}  // namespace

#endif
