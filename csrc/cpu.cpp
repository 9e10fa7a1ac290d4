// The element-wise operations of a training step on a CPU, each in one pass over memory: RMSNorm, SwiGLU, rotary
// embeddings, the softmax in fp32 attention's backward, and the head's softmax. Built against PyTorch's stable ABI: one
// build works with every PyTorch from 2.11 on. setup.py compiles it once per instruction set; the compiler vectorizes
// the loops.
//
// Sums have a fixed order, independent of the number of threads. Intermediates are rounded to the tensor's dtype where
// PyTorch's composition rounds them, so that values match those of a transformers model.
#include "cpu.h"

namespace {

// -- RMSNorm ----------------------------------------------------------------------------------------------------------

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& normed, const Tensor& inverse) {
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = x.size(0), width = x.size(1);
    check(x, type_of<T>, rows * width, "x");
    check(weight, type_of<T>, width, "weight");
    check(normed, type_of<T>, rows * width, "normed");
    check(inverse, ScalarType::Float, rows, "inverse");
    const T *xs = in<T>(x), *w = in<T>(weight);
    T* ys = out<T>(normed);
    float* inverses = out<float>(inverse);
    parallel_for(0, rows, 16, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* row = xs + i * width;
        T* y = ys + i * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; ++j) sum += wide(row[j]) * wide(row[j]);
        const float scale = 1.f / std::sqrt(sum / float(width) + float(eps));
        inverses[i] = scale;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) narrow(rounded<T>(wide(row[j]) * scale) * wide(w[j]), y[j]);
      }
    });
  });
}

// of_blocks [ceil(N / 64), D]: the weight's gradient, one partial sum per block of rows.
void rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& inverse,
                       const Tensor& grad_x, const Tensor& of_blocks) {
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    constexpr int64_t block = 64;
    const int64_t rows = x.size(0), width = x.size(1), blocks = (rows + block - 1) / block;
    check(grad, type_of<T>, rows * width, "grad");
    check(x, type_of<T>, rows * width, "x");
    check(weight, type_of<T>, width, "weight");
    check(inverse, ScalarType::Float, rows, "inverse");
    check(grad_x, type_of<T>, rows * width, "grad_x");
    check(of_blocks, ScalarType::Float, blocks * width, "of_blocks");
    const T *gs = in<T>(grad), *xs = in<T>(x), *w = in<T>(weight);
    const float* inverses = in<float>(inverse);
    T* outs = out<T>(grad_x);
    float* sums = out<float>(of_blocks);
    parallel_for(0, blocks, 1, [=](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        float* __restrict of_weight = sums + b * width;
        std::fill(of_weight, of_weight + width, 0.f);
        for (int64_t i = b * block; i < std::min(rows, (b + 1) * block); ++i) {
          const T *g = gs + i * width, *row = xs + i * width, *v = w;  // local, or it does not vectorize
          T* o = outs + i * width;
          const float scale = inverses[i];
          float pull = 0;
#pragma omp simd reduction(+ : pull)
          for (int64_t j = 0; j < width; ++j) {
            const float product = wide(g[j]) * (wide(row[j]) * scale);
            of_weight[j] += product;
            pull += product * wide(v[j]);
          }
          pull = pull / float(width) * scale;
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) narrow((wide(g[j]) * wide(v[j]) - wide(row[j]) * pull) * scale, o[j]);
        }
      }
    });
  });
}

// -- SwiGLU -----------------------------------------------------------------------------------------------------------

void silu_mul(const Tensor& gate, const Tensor& up, const Tensor& product) {
  dispatch(gate, [&](auto element) {
    using T = decltype(element);
    const int64_t numel = gate.numel();
    check(gate, type_of<T>, numel, "gate");
    check(up, type_of<T>, numel, "up");
    check(product, type_of<T>, numel, "product");
    const T *gs = in<T>(gate), *us = in<T>(up);
    T* outs = out<T>(product);
    parallel_for(0, numel, 8192, [=](int64_t first, int64_t last) {
#pragma omp simd
      for (int64_t i = first; i < last; ++i) {
        const float g = wide(gs[i]);
        narrow(rounded<T>(g * sigmoid(g)) * wide(us[i]), outs[i]);
      }
    });
  });
}

// product: silu(gate) * up, recomputed.
void silu_mul_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, const Tensor& product,
                       const Tensor& grad_gate, const Tensor& grad_up) {
  dispatch(gate, [&](auto element) {
    using T = decltype(element);
    const int64_t numel = gate.numel();
    check(grad, type_of<T>, numel, "grad");
    check(gate, type_of<T>, numel, "gate");
    check(up, type_of<T>, numel, "up");
    check(product, type_of<T>, numel, "product");
    check(grad_gate, type_of<T>, numel, "grad_gate");
    check(grad_up, type_of<T>, numel, "grad_up");
    const T *ds = in<T>(grad), *gs = in<T>(gate), *us = in<T>(up);
    T *products = out<T>(product), *of_gate = out<T>(grad_gate), *of_up = out<T>(grad_up);
    parallel_for(0, numel, 8192, [=](int64_t first, int64_t last) {
#pragma omp simd
      for (int64_t i = first; i < last; ++i) {
        const float d = wide(ds[i]), g = wide(gs[i]), u = wide(us[i]), s = sigmoid(g), silu = g * s;
        narrow(rounded<T>(silu) * u, products[i]);
        narrow(d * u * s * (1.f + g * (1.f - s)), of_gate[i]);
        narrow(d * silu, of_up[i]);
      }
    });
  });
}

// -- rotary embeddings ------------------------------------------------------------------------------------------------

// x and turned [H, T, D], turned contiguous; cos and sin [T, D]. back: the transposed map, for the backward.
void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back, const Tensor& turned) {
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const int64_t heads = x.size(0), tokens = x.size(1), width = x.size(2), half = width / 2;
    STD_TORCH_CHECK(x.is_cpu() && width % 2 == 0 && (x.stride(2) == 1 || width == 1), "x must have even, dense rows");
    check(cos, type_of<T>, tokens * width, "cos");
    check(sin, type_of<T>, tokens * width, "sin");
    STD_TORCH_CHECK(turned.scalar_type() == type_of<T> && turned.numel() == x.numel() && turned.stride(2) == 1,
                    "turned must be as x");
    const int64_t by_head = x.stride(0), by_token = x.stride(1);
    const int64_t out_by_head = turned.stride(0), out_by_token = turned.stride(1);
    const T *xs = in<T>(x), *coses = in<T>(cos), *sines = in<T>(sin);
    T* outs = out<T>(turned);
    parallel_for(0, tokens, 64, [=](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t h = 0; h < heads; ++h) {
          const T *low = xs + h * by_head + t * by_token, *high = low + half;
          const T *c = coses + t * width, *s = sines + t * width;
          T *low_out = outs + h * out_by_head + t * out_by_token, *high_out = low_out + half;
          // the transpose uses the other half's sine with the opposite sign
          const T *low_sine = back ? s + half : s, *high_sine = back ? s : s + half;
          const float sign = back ? 1.f : -1.f;
#pragma omp simd
          for (int64_t j = 0; j < half; ++j) {
            const float l = wide(low[j]), u = wide(high[j]);
            narrow(rounded<T>(l * wide(c[j])) + rounded<T>(sign * u * wide(low_sine[j])), low_out[j]);
            narrow(rounded<T>(u * wide(c[j + half])) + rounded<T>(-sign * l * wide(high_sine[j])), high_out[j]);
          }
        }
    });
  });
}

// -- attention's backward ---------------------------------------------------------------------------------------------

// In place on scores and grad_weights [.., N, M] fp32: the softmax weights of scale * scores, and the gradient of the
// scores. The N rows are the queries of the last N of the M keys, under a causal mask.
void causal_softmax_backward(const Tensor& scores, const Tensor& grad_weights, int64_t count, double scale) {
  const int64_t keys = scores.size(-1), rows = keys ? scores.numel() / keys : 0;
  check(scores, ScalarType::Float, rows * keys, "scores");
  check(grad_weights, ScalarType::Float, rows * keys, "grad_weights");
  STD_TORCH_CHECK(count > 0 && count <= keys && rows % count == 0, "there must be as many rows as the last keys");
  float *ss = out<float>(scores), *gs = out<float>(grad_weights), factor = float(scale);
  parallel_for(0, rows, 16, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t end = keys - count + i % count + 1;
      float *s = ss + i * keys, *g = gs + i * keys;
      float top = -HUGE_VALF, total = 0, pull = 0;
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < end; ++j) {
        s[j] *= factor;
        top = s[j] > top ? s[j] : top;
      }
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < end; ++j) total += s[j] = exp_of(s[j] - top);
      const float share = 1.f / total;
#pragma omp simd reduction(+ : pull)
      for (int64_t j = 0; j < end; ++j) pull += (s[j] *= share) * g[j];
#pragma omp simd
      for (int64_t j = 0; j < end; ++j) g[j] = (g[j] - pull) * s[j] * factor;
      std::fill(s + end, s + keys, 0.f);
      std::fill(g + end, g + keys, 0.f);
    }
  });
}

// -- the head's softmax -------------------------------------------------------------------------------------------------

void check_rows(const Tensor& x, ScalarType type, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.dim() == 2 && x.size(0) == rows &&
                      x.size(1) == columns && (x.stride(1) == 1 || columns == 1),
                  name, " has the wrong type or size, or rows that are not dense");
}

// The sum of exp(x - shift); writes scale times each term to `to`, if given, which may be x.
template <typename T>
float exponentials(const T* x, int64_t count, float shift, float scale, T* to) {
  float sum = 0;
  if (to) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) {
      const float e = exp_of(wide(x[j]) - shift);
      sum += e;
      narrow(e * scale, to[j]);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += exp_of(wide(x[j]) - shift);
  }
  return sum;
}

// Columns whose exponentials are summed in fp32 before they are added to an fp64 sum.
constexpr int64_t part_of_sum = 256;

// Adds logits [N, C] to the running highest and total [N] fp32, total = sum exp(logit - highest). decay [N] receives
// the factor applied to older sums. weights, if not empty, receives exp(logit - highest); it may be logits.
void scan_logits(const Tensor& logits, const Tensor& highest, const Tensor& total, const Tensor& decay,
                 const Tensor& weights) {
  dispatch(logits, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = logits.size(0), columns = logits.size(1), by_row = logits.stride(0);
    const bool wanted = weights.numel() > 0;
    const int64_t out_by_row = wanted ? weights.stride(0) : 0;
    check_rows(logits, type_of<T>, rows, columns, "logits");
    if (wanted) check_rows(weights, type_of<T>, rows, columns, "weights");
    check(highest, ScalarType::Float, rows, "highest");
    check(total, ScalarType::Float, rows, "total");
    check(decay, ScalarType::Float, rows, "decay");
    const T* xs = in<T>(logits);
    T* outs = wanted ? out<T>(weights) : nullptr;
    float *tops = out<float>(highest), *totals = out<float>(total), *decays = out<float>(decay);
    parallel_for(0, rows, 4, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* x = xs + i * by_row;
        float top = tops[i];
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < columns; ++j) top = wide(x[j]) > top ? wide(x[j]) : top;
        double sum = 0;
        for (int64_t at = 0; at < columns; at += part_of_sum)
          sum += exponentials(x + at, std::min(columns - at, part_of_sum), top, 1.f,
                              outs ? outs + i * out_by_row + at : nullptr);
        decays[i] = std::exp(tops[i] - top);
        totals[i] = float(totals[i] * double(decays[i]) + sum);
        tops[i] = top;
      }
    });
  });
}

// gradient [N, C], which may be logits, = scale * exp(logit - lse), with scale and lse [N] fp32.
void softmax_of(const Tensor& logits, const Tensor& lse, const Tensor& scale, const Tensor& gradient) {
  dispatch(logits, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = logits.size(0), columns = logits.size(1);
    const int64_t by_row = logits.stride(0), out_by_row = gradient.stride(0);
    check_rows(logits, type_of<T>, rows, columns, "logits");
    check_rows(gradient, type_of<T>, rows, columns, "gradient");
    check(lse, ScalarType::Float, rows, "lse");
    check(scale, ScalarType::Float, rows, "scale");
    const T* xs = in<T>(logits);
    const float *lses = in<float>(lse), *scales = in<float>(scale);
    T* outs = out<T>(gradient);
    parallel_for(0, rows, 4, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        exponentials(xs + i * by_row, columns, lses[i], scales[i], outs + i * out_by_row);
    });
  });
}

// Of each row of logits [N, C]: the highest [N], lse [N], and sums [N, C / 256 rounded up] of exp((logit - highest) /
// temperature) over blocks of 256 columns, all fp32.
void softmax_sums(const Tensor& logits, double temperature, const Tensor& highest, const Tensor& lse,
                  const Tensor& sums) {
  dispatch(logits, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = logits.size(0), columns = logits.size(1), by_row = logits.stride(0);
    const int64_t blocks = (columns + part_of_sum - 1) / part_of_sum;
    check_rows(logits, type_of<T>, rows, columns, "logits");
    check(highest, ScalarType::Float, rows, "highest");
    check(lse, ScalarType::Float, rows, "lse");
    check(sums, ScalarType::Float, rows * blocks, "sums");
    const T* xs = in<T>(logits);
    float *tops = out<float>(highest), *lses = out<float>(lse), *parts = out<float>(sums);
    const float inverse = float(1 / temperature);
    parallel_for(0, rows, 1, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* x = xs + i * by_row;
        float top = -HUGE_VALF;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < columns; ++j) top = wide(x[j]) > top ? wide(x[j]) : top;
        double total = 0;
        for (int64_t b = 0; b < blocks; ++b) {
          const T* part = x + b * part_of_sum;
          const int64_t count = std::min(columns - b * part_of_sum, part_of_sum);
          const float sum = exponentials<T>(part, count, top, 1.f, nullptr);
          float tempered = 0;
          if (inverse != 1) {
#pragma omp simd reduction(+ : tempered)
            for (int64_t j = 0; j < count; ++j) tempered += exp_of((wide(part[j]) - top) * inverse);
          }
          total += sum, parts[i * blocks + b] = inverse != 1 ? tempered : sum;
        }
        tops[i] = top, lses[i] = top + float(std::log(total));
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(strop, m) {
  m.def("cpu_rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) normed, Tensor(b!) inverse) -> ()");
  m.def(
      "cpu_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, Tensor(a!) grad_x,"
      " Tensor(b!) of_blocks) -> ()");
  m.def("cpu_silu_mul(Tensor gate, Tensor up, Tensor(a!) product) -> ()");
  m.def(
      "cpu_silu_mul_backward(Tensor grad, Tensor gate, Tensor up, Tensor(a!) product, Tensor(b!) grad_gate,"
      " Tensor(c!) grad_up) -> ()");
  m.def("cpu_rotate(Tensor x, Tensor cos, Tensor sin, bool back, Tensor(a!) turned) -> ()");
  m.def(
      "cpu_causal_softmax_backward(Tensor(a!) scores, Tensor(b!) grad_weights, int count, float scale) -> ()");
  m.def(
      "cpu_scan_logits(Tensor logits, Tensor(a!) highest, Tensor(b!) total, Tensor(c!) decay, Tensor(d!) weights) -> ()");
  m.def(
      "cpu_softmax_sums(Tensor logits, float temperature, Tensor(a!) highest, Tensor(b!) lse, Tensor(c!) sums) -> ()");
  m.def("cpu_softmax_of(Tensor logits, Tensor lse, Tensor scale, Tensor(a!) gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(strop, CPU, m) {
  m.impl("cpu_rms_norm", TORCH_BOX(&rms_norm));
  m.impl("cpu_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("cpu_silu_mul", TORCH_BOX(&silu_mul));
  m.impl("cpu_silu_mul_backward", TORCH_BOX(&silu_mul_backward));
  m.impl("cpu_rotate", TORCH_BOX(&rotate));
  m.impl("cpu_causal_softmax_backward", TORCH_BOX(&causal_softmax_backward));
  m.impl("cpu_scan_logits", TORCH_BOX(&scan_logits));
  m.impl("cpu_softmax_sums", TORCH_BOX(&softmax_sums));
  m.impl("cpu_softmax_of", TORCH_BOX(&softmax_of));
}
