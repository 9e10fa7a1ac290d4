// Shared by the CPU sources: element types, checks, and an exponential that vectorizes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

struct bf16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float wide(const float& x) { return x; }
inline float wide(const bf16& x) { return from_bits(uint32_t(x.bits) << 16); }

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x);
  out.bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

template <typename T>
inline float rounded(float x) {  // x rounded to T
  T value;
  narrow(x, value);
  return wide(value);
}

// e^x to 2 units in the last place, 0 below -87 and infinity above 88. Cody-Waite reduction and a Taylor series on
// [-ln 2 / 2, ln 2 / 2].
inline float exp_of(float x) {
  const float bounded = x < -87.f ? -87.f : (x > 88.f ? 88.f : x);
  const float n = std::nearbyint(bounded * 1.44269504f);
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const float power = from_bits(uint32_t(int32_t(n) + 127) << 23);
  return x < -87.f ? 0.f : (x > 88.f ? HUGE_VALF : p * power);
}

inline float sigmoid(float x) { return 1.f / (1.f + exp_of(-x)); }

// Taylor series near 0, where the other form cancels.
inline float tanh_of(float x) {
  const float s = x * x;
  const float near = x * (1.f + s * (-1.f / 3 + s * (2.f / 15 + s * (-17.f / 315 + s * (62.f / 2835)))));
  const float far = 1.f - 2.f / (1.f + exp_of(2 * x));
  return s < 0.0625f ? near : far;
}

// -- checks -----------------------------------------------------------------------------------------------------------

template <typename T>
constexpr ScalarType type_of = std::is_same_v<T, bf16> ? ScalarType::BFloat16 : ScalarType::Float;

inline void check(const Tensor& x, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.is_contiguous() && x.numel() == numel, name,
                  " has the wrong type or size, or is not contiguous");
}

template <typename T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls f with a value of the element's type.
template <typename F>
void dispatch(const Tensor& x, F f) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Float,
                  "expected bf16 or fp32");
  if (x.scalar_type() == ScalarType::BFloat16)
    f(bf16{});
  else
    f(float{});
}

}  // namespace
