// One thread's share of a row, as functions for host and device, so that tests without a GPU run the kernels'
// arithmetic (tests/kernels/csrc_host.cpp).
//
// A row is read in packs of 16 bytes; elements before the first 16-byte boundary and after the last whole pack are read
// one by one. With an odd vocabulary, rows start at any alignment.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define STROP_HD __host__ __device__ __forceinline__
#else
#define STROP_HD inline
#endif

namespace strop {

// Packs that a thread has in flight at once: 64 bytes.
constexpr int kUnroll = 4;

// Words, not elements: the compiler then moves 16 bytes at once and extracts elements by shifts.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t word[4];

  STROP_HD float get(int i) const {
    T x;
    memcpy(&x, reinterpret_cast<const char*>(word) + i * sizeof(T), sizeof(T));
    return static_cast<float>(x);
  }
  STROP_HD void set(int i, float value) {
    const T x = static_cast<T>(value);
    memcpy(reinterpret_cast<char*>(word) + i * sizeof(T), &x, sizeof(T));
  }
};

// Columns [head, head + packs * kSize) of a row are packs, the others singles.
template <typename T>
struct Split {
  int head, packs, singles;

  STROP_HD int column_of_single(int i) const { return i < head ? i : i + packs * Pack<T>::kSize; }
};

// Rows read and written together are split the same way; if their alignments differ, into singles only.
template <typename T>
STROP_HD Split<T> split_row(const T* a, const T* b, int columns) {
  const unsigned past = reinterpret_cast<uintptr_t>(a) % 16;
  const int head = static_cast<int>((16 - past) % 16 / sizeof(T));
  if (past != reinterpret_cast<uintptr_t>(b) % 16) return {columns, 0, columns};
  const int packs = (columns - head) / Pack<T>::kSize;  // 0 for a row that ends within its head
  return {head, packs, columns - packs * Pack<T>::kSize};
}

// exp(d) as 2^(d log2 e). d is a difference already rounded: one fused x log2 e - m log2 e would lose digits of large
// logits, and the highest logit's own term would not be 1.
STROP_HD float exp_of(float d) {
  const float exponent = d * 1.4426950408889634f;
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
#else
  return exp2f(exponent);
#endif
}

// Online log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3): total = sum exp(x - highest).
// highest starts at the lowest finite number: with valid logits of -inf, -inf - -inf would be NaN. fmaxf ignores NaN,
// the sum propagates it.
struct Running {
  float highest = -FLT_MAX, total = 0.0f;
};

// The part with the highest logit is scaled by exactly 1, so that total >= 1 and no log-prob is above 0.
STROP_HD Running merge(const Running& a, const Running& b) {
  Running sum;
  sum.highest = fmaxf(a.highest, b.highest);
  sum.total = a.total * exp_of(a.highest - sum.highest) + b.total * exp_of(b.highest - sum.highest);
  return sum;
}

template <int kCount>
STROP_HD void add(Running& sum, const float (&x)[kCount]) {
  float highest = sum.highest;
#pragma unroll
  for (int i = 0; i < kCount; ++i) highest = fmaxf(highest, x[i]);
  sum.total *= exp_of(sum.highest - highest);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum.total += exp_of(x[i] - highest);
  sum.highest = highest;
}

template <typename T>
STROP_HD void add_pack(Running& sum, Pack<T> pack) {
  float x[Pack<T>::kSize];
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) x[i] = pack.get(i);
  add(sum, x);
}

// The sum over the columns of `thread` among `threads`.
template <typename T>
STROP_HD Running scan_part(const T* row, int columns, int thread, int threads) {
  const Split<T> split = split_row(row, row, columns);
  const auto* packs = reinterpret_cast<const Pack<T>*>(row + split.head);
  Running sum;
  int at = thread;
  for (; at + (kUnroll - 1) * threads < split.packs; at += kUnroll * threads) {
    Pack<T> pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) pack[u] = packs[at + u * threads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) add_pack(sum, pack[u]);
  }
#pragma unroll 1
  for (; at < split.packs; at += threads) add_pack(sum, packs[at]);
#pragma unroll 1
  for (int i = thread; i < split.singles; i += threads) {
    const float x[1] = {static_cast<float>(row[split.column_of_single(i)])};
    add(sum, x);
  }
  return sum;
}

// A target outside the vocabulary gives NaN.
template <typename T>
STROP_HD float logp_of(const T* row, int columns, int64_t target, const Running& sum) {
  return target < columns ? static_cast<float>(row[target]) - sum.highest - logf(sum.total) : NAN;
}

// -d logp / d logits times the upstream gradient: scale = -gradient / total, at_target is the target's.
struct Gradient {
  float highest, scale, at_target;
  int hit;  // the target's column, -1 if it is outside the vocabulary

  // exp_of rounds the exponent once more, which shows where the result has 32 bits.
  template <typename T>
  STROP_HD float at(int column, float x) const {
    const float e = sizeof(T) == 4 ? expf(x - highest) : exp_of(x - highest);
    return column == hit ? at_target : scale * e;
  }

  template <typename T>
  STROP_HD void apply(Pack<T>& pack, int column) const {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) pack.set(i, at<T>(column + i, pack.get(i)));
  }
};

template <typename T>
STROP_HD void gradient_part(const T* row, T* out, int columns, const Gradient& gradient, int thread, int threads) {
  const Split<T> split = split_row<T>(row, out, columns);
  const auto* packs = reinterpret_cast<const Pack<T>*>(row + split.head);
  auto* out_packs = reinterpret_cast<Pack<T>*>(out + split.head);
  int at = thread;
  for (; at + (kUnroll - 1) * threads < split.packs; at += kUnroll * threads) {
    Pack<T> pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) pack[u] = packs[at + u * threads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      gradient.apply(pack[u], split.head + (at + u * threads) * Pack<T>::kSize);
      out_packs[at + u * threads] = pack[u];
    }
  }
#pragma unroll 1
  for (; at < split.packs; at += threads) {
    Pack<T> pack = packs[at];
    gradient.apply(pack, split.head + at * Pack<T>::kSize);
    out_packs[at] = pack;
  }
#pragma unroll 1
  for (int i = thread; i < split.singles; i += threads) {
    const int column = split.column_of_single(i);
    out[column] = static_cast<T>(gradient.template at<T>(column, static_cast<float>(row[column])));
  }
}

template <typename T>
STROP_HD void zero_part(T* out, int columns, int thread, int threads) {
  const Split<T> split = split_row<T>(out, out, columns);
  auto* packs = reinterpret_cast<Pack<T>*>(out + split.head);
#pragma unroll 4
  for (int at = thread; at < split.packs; at += threads) packs[at] = Pack<T>{};
#pragma unroll 1
  for (int i = thread; i < split.singles; i += threads) out[split.column_of_single(i)] = static_cast<T>(0.0f);
}

// out = -grad * (exp(row - highest) / total, at_target in the target's column), and zeros where the target is negative or grad is
// 0, where row is not read. out may be row itself.
template <typename T>
STROP_HD void backward_part(const T* row, T* out, int columns, int64_t target, float grad, float at_target,
                            const Running& sum, int thread, int threads) {
  if (target < 0 || grad == 0.0f) {
    zero_part(out, columns, thread, threads);
    return;
  }
  const int hit = target < columns ? static_cast<int>(target) : -1;
  const Gradient gradient{sum.highest, -grad / sum.total, -grad * at_target, hit};
  gradient_part(row, out, columns, gradient, thread, threads);
}

}  // namespace strop
