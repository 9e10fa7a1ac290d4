// The gradient norm and AdamW, each in one pass over memory, on every form of the state that
// kernels/optimizer/formats.py describes.
#include "cpu.h"

namespace {

// sums [ceil(numel / 65536)] fp64: sums of squares of blocks of x.
void square_sums(const Tensor& x, const Tensor& sums) {
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    constexpr int64_t block = 1 << 16, part = 1 << 10;
    const int64_t numel = x.numel(), blocks = (numel + block - 1) / block;
    check(x, type_of<T>, numel, "x");
    check(sums, ScalarType::Double, blocks, "sums");
    const T* xs = in<T>(x);
    double* totals = out<double>(sums);
    parallel_for(0, blocks, 1, [=](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        double total = 0;
        for (int64_t at = b * block; at < std::min(numel, (b + 1) * block); at += part) {
          const T* x = xs + at;  // local, or it does not vectorize
          const int64_t count = std::min(numel - at, part);
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < count; ++i) sum += wide(x[i]) * wide(x[i]);
          total += sum;
        }
        totals[b] = total;
      }
    });
  });
}

// -- 8-bit codes ------------------------------------------------------------------------------------------------------

// As formats.decades and formats.values: `count` decades of codes below the first one.
template <int count>
struct Codes {
  float limit[count + 1], slope[count + 1], start[count + 1], value[2 << count];

  Codes() {
    for (int d = 0; d <= count; ++d) {
      const double unit = d ? std::pow(2.0, d) / 0.9 : 1.0;
      limit[d] = float(std::pow(10.0, d - 1 - count));
      slope[d] = float(unit * std::pow(10.0, count - d));
      const double first = d ? std::pow(2.0, d) - 1 - 0.1 * unit : 0.0;
      start[d] = float(first) + 0.5f;
      for (int code = d ? 1 << d : 0; code < 2 << d; ++code)
        value[code] = float((code - first) / (unit * std::pow(10.0, count - d)));
    }
  }

  // codes of n magnitudes up to 1 / inverse
  void encode(const float* x, float inverse, int64_t n, int32_t* codes) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float share = std::fabs(x[i]) * inverse;
      float s = slope[0], t = start[0];
#pragma GCC unroll 8
      for (int d = 1; d <= count; ++d) {
        s = share > limit[d] ? slope[d] : s;
        t = share > limit[d] ? start[d] : t;
      }
      codes[i] = int32_t(share * s + t);
    }
  }
};

const Codes<6> of_signed;
const Codes<7> of_unsigned;

inline float largest(const float* x, int64_t n) {
  float found = 0;
#pragma omp simd reduction(max : found)
  for (int64_t i = 0; i < n; ++i) found = std::fabs(x[i]) > found ? std::fabs(x[i]) : found;
  return found;
}

inline float inverse_of(float scale) { return scale > 1e-37f ? 1 / scale : 0.f; }

// -- AdamW ------------------------------------------------------------------------------------------------------------

constexpr int64_t part = 1 << 10;   // elements that stay in the L1 cache between the loops
constexpr int64_t block = 1 << 8;  // elements that share a scale

inline uint32_t noise(uint32_t key, uint32_t index) {
  uint32_t x = index * 0x9E3779B1u + key;
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

// One AdamW step with gradient factor [1] fp32 * grad, bf16 or fp32. master: fp32, or int16 low halves of which weight
// has the high ones; exp_avg, exp_avg_sq: fp32, or bf16, rounded stochastically with `key` and indices from `first` on,
// or int8 and uint8 [rows, width] with fp32 scales [rows, ceil(width / 256)]. weight, if not empty, receives the master
// in bf16.
void adamw(const Tensor& master, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const Tensor& weight, const Tensor& factor, const Tensor& scale, const Tensor& scale_sq, double lr,
           double beta1, double beta2, double eps, double weight_decay, int64_t step, int64_t key, int64_t first) {
  dispatch(grad, [&](auto element) {
    using T = decltype(element);
    const int64_t numel = master.numel();
    const bool is_split = master.scalar_type() == ScalarType::Short, is_coded = scale.numel() > 0;
    const bool is_bf16 = exp_avg.scalar_type() == ScalarType::BFloat16;
    const int64_t width = is_coded ? grad.size(1) : numel, each = is_coded ? block : part;
    const int64_t rows = width ? numel / width : 0, parts = (width + each - 1) / each;
    const ScalarType mean_type = is_coded ? ScalarType::Char : is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
    check(master, is_split ? ScalarType::Short : ScalarType::Float, numel, "master");
    check(grad, type_of<T>, numel, "grad");
    check(exp_avg, mean_type, numel, "exp_avg");
    check(exp_avg_sq, is_coded ? ScalarType::Byte : mean_type, numel, "exp_avg_sq");
    check(factor, ScalarType::Float, 1, "factor");
    if (weight.numel() || is_split) check(weight, ScalarType::BFloat16, numel, "weight");
    if (is_coded) {
      check(scale, ScalarType::Float, rows * parts, "scale");
      check(scale_sq, ScalarType::Float, rows * parts, "scale_sq");
    }
    void *masters = master.mutable_data_ptr(), *means = exp_avg.mutable_data_ptr();
    void* squares = exp_avg_sq.mutable_data_ptr();
    const T* gs = in<T>(grad);
    bf16* ws = weight.numel() ? out<bf16>(weight) : nullptr;
    float *of_mean = is_coded ? out<float>(scale) : nullptr, *of_square = is_coded ? out<float>(scale_sq) : nullptr;
    const float gain = *in<float>(factor), kept = float(1 - lr * weight_decay);
    const float first_share = float(1 - beta1), second = float(beta2), second_share = float(1 - beta2);
    const float rate = float(lr / (1 - std::pow(beta1, double(step))));
    const float root = float(std::sqrt(1 - std::pow(beta2, double(step)))), tiny = float(eps);
    parallel_for(0, rows * parts, 8, [=](int64_t from, int64_t to) {
      float own_p[part], own_m[part], own_v[part];
      int32_t codes[block];
      for (int64_t b = from; b < to; ++b) {
        const int64_t column = b % parts * each, at = b / parts * width + column;
        const int64_t count = std::min(width - column, each);
        const T* g = gs + at;
        bf16* w = ws ? ws + at : nullptr;
        float *p = static_cast<float*>(masters) + at, *m = static_cast<float*>(means) + at;
        float* v = static_cast<float*>(squares) + at;
        int16_t* low = static_cast<int16_t*>(masters) + at;
        bf16 *m16 = static_cast<bf16*>(means) + at, *v16 = static_cast<bf16*>(squares) + at;
        int8_t* m8 = static_cast<int8_t*>(means) + at;
        uint8_t* v8 = static_cast<uint8_t*>(squares) + at;
        if (is_split) {
          p = own_p;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) p[i] = from_bits((uint32_t(w[i].bits) << 16) + uint32_t(int32_t(low[i])));
        }
        if (is_bf16) {
          m = own_m, v = own_v;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) m[i] = wide(m16[i]), v[i] = wide(v16[i]);
        }
        if (is_coded) {
          m = own_m, v = own_v;
          const float mean_unit = of_mean[b], square_unit = of_square[b];
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) {
            const int32_t code = m8[i];
            const float value = of_signed.value[code < 0 ? -code : code] * mean_unit;
            m[i] = code < 0 ? -value : value;
            v[i] = of_unsigned.value[v8[i]] * square_unit;
          }
        }
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const float d = wide(g[i]) * gain;
          m[i] += (d - m[i]) * first_share;
          v[i] = v[i] * second + d * d * second_share;
          p[i] = p[i] * kept - rate * m[i] / (std::sqrt(v[i]) / root + tiny);
        }
        if (is_split) {
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = bits_of(p[i]);
            w[i].bits = uint16_t((bits + 0x8000u) >> 16);
            low[i] = int16_t(uint16_t(bits));
          }
        } else if (w) {
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) narrow(p[i], w[i]);
        }
        if (is_bf16) {
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) {
            const uint32_t draw = noise(uint32_t(key), uint32_t(first + at + i));
            m16[i].bits = uint16_t((bits_of(m[i]) + (draw & 0xffffu)) >> 16);
            v16[i].bits = uint16_t((bits_of(v[i]) + (draw >> 16)) >> 16);
          }
        }
        if (is_coded) {
          of_mean[b] = largest(m, count);
          of_signed.encode(m, inverse_of(of_mean[b]), count, codes);
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) m8[i] = int8_t(m[i] < 0 ? -codes[i] : codes[i]);
          of_square[b] = largest(v, count);
          of_unsigned.encode(v, inverse_of(of_square[b]), count, codes);
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) v8[i] = uint8_t(codes[i] > 1 ? codes[i] : 1);
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(strop, m) {
  m.def("cpu_square_sums(Tensor x, Tensor(a!) sums) -> ()");
  m.def(
      "cpu_adamw(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) weight,"
      " Tensor factor, Tensor(e!) scale, Tensor(f!) scale_sq, float lr, float beta1, float beta2, float eps,"
      " float weight_decay, int step, int key, int first) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(strop, CPU, m) {
  m.impl("cpu_square_sums", TORCH_BOX(&square_sums));
  m.impl("cpu_adamw", TORCH_BOX(&adamw));
}
