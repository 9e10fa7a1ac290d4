// A transformer layer's operations on one row, shared by the operators that run one of them over all rows and by the
// decoder, which runs them between products. Intermediates are rounded to T where PyTorch's composition rounds them.
#pragma once

#include "cpu.h"

namespace {

// y = weight * (row / sqrt(mean(row^2) + eps)); returns the inverse root mean square.
template <typename T>
inline float norm_row(const T* row, const T* weight, int64_t width, float eps, T* y) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) sum += wide(row[j]) * wide(row[j]);
  const float scale = 1.f / std::sqrt(sum / float(width) + eps);
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) narrow(rounded<T>(wide(row[j]) * scale) * wide(weight[j]), y[j]);
  return scale;
}

// Rotates a head's row by the angles of cos and sin; back: the transposed map, for the backward.
template <typename T>
inline void rotate_row(const T* low, const T* cos, const T* sin, int64_t half, bool back, T* low_out) {
  const T* high = low + half;
  T* high_out = low_out + half;
  // the transpose uses the other half's sine with the opposite sign
  const T *low_sine = back ? sin + half : sin, *high_sine = back ? sin : sin + half;
  const float sign = back ? 1.f : -1.f;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    const float l = wide(low[j]), u = wide(high[j]);
    narrow(rounded<T>(l * wide(cos[j])) + rounded<T>(sign * u * wide(low_sine[j])), low_out[j]);
    narrow(rounded<T>(u * wide(cos[j + half])) + rounded<T>(-sign * l * wide(high_sine[j])), high_out[j]);
  }
}

template <typename T>
inline void silu_mul_row(const T* gate, const T* up, int64_t count, T* product) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const float g = wide(gate[j]);
    narrow(rounded<T>(g * sigmoid(g)) * wide(up[j]), product[j]);
  }
}

}  // namespace
