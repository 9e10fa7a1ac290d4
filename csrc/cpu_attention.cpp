// Attention over a shared prompt on a CPU, forward and backward, block by block within a core's cache. Inputs are bf16,
// sums fp32. Where the processor multiplies pairs of bf16 (AVX-512 BF16), softmax weights and their gradients are
// rounded to bf16 for the products, as flash attention rounds them; elsewhere products are of fp32.
//
// Scores stand transposed, a row for each key and a column for each query, so that every softmax is a column's: its
// maximum and sum need no step across a vector's lanes. Then all seven products are of one form, rows of A in memory
// order times a B whose rows are interleaved by pairs.
//
// A block of queries is some tokens of one segment, a prompt or a completion, times some heads that share a key head.
// Its keys are the prompt before it, if it is a completion's, all of them, and its own segment's, up to the query.
#include "cpu.h"

#include <atomic>
#include <memory>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16, most_vectors = 4;  // of a tile of 6 rows, that all its sums stay in registers
#elif defined(__AVX2__)
constexpr int lanes = 8, most_vectors = 2;
#else
constexpr int lanes = 4, most_vectors = 4;
#endif
constexpr int most_rows = 6;
constexpr int64_t most_queries = 64, most_keys = 128;  // of a block
constexpr int64_t max_size = 256;                       // of a head

using vec = float __attribute__((vector_size(4 * lanes), aligned(4), may_alias));

// what products take: a pair's elements are neighbours along the sum
#ifdef __AVX512BF16__
using item = bf16;
#else
using item = float;
#endif
constexpr int64_t pair = 4 / sizeof(item);

inline void put(bf16 x, bf16& out) { out = x; }
inline void put(bf16 x, float& out) { out = wide(x); }

// -- products ---------------------------------------------------------------------------------------------------------

// c[R, V * lanes] = or += a[R, steps * pair] times b[steps, V * lanes, pair]; strides in elements, ldb in columns.
template <int R, int V>
void tile(int64_t steps, const item* a, int64_t lda, const item* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  vec sums[R][V];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = add ? *reinterpret_cast<const vec*>(c + i * ldc + v * lanes) : vec{};
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
    for (int v = 0; v < V; ++v) columns[v] = *reinterpret_cast<const vec*>(b + v * lanes);
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] += a[i * lda] * columns[v];
#endif
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) *reinterpret_cast<vec*>(c + i * ldc + v * lanes) = sums[i][v];
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

// As tile, of any number of rows; columns, a multiple of 16, are also b's stride.
void multiply(int64_t rows, int64_t columns, int64_t steps, const item* a, int64_t lda, const item* b, float* c,
              bool add) {
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

// -- transposition ----------------------------------------------------------------------------------------------------

// to[j * stride + i] = from[i][j]: lanes x lanes numbers of 32 bits.
inline void turn(const float* const* from, float* to, int64_t stride) {
  vec rows[lanes];
  for (int i = 0; i < lanes; ++i) rows[i] = *reinterpret_cast<const vec*>(from[i]);
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
  for (int i = 0; i < lanes; ++i) *reinterpret_cast<vec*>(to + i * stride) = rows[i];
}

// -- operands ---------------------------------------------------------------------------------------------------------

// bf16 [H, T, D] with dense rows.
struct Rows {
  bf16* data;
  int64_t by_head, by_token;

  explicit Rows(const Tensor& x) : data(const_cast<bf16*>(in<bf16>(x))), by_head(x.stride(0)), by_token(x.stride(1)) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::BFloat16 && x.dim() == 3 && x.stride(2) == 1,
                    "expected bf16 [heads, tokens, size] with dense rows");
  }
  bf16* at(int64_t head, int64_t token) const { return data + head * by_head + token * by_token; }
};

// A row of `blocks`: tokens first to last of the segment from `own` on; keys before_start to before_end are the prompt.
// own_at and before_at: where these segments' columns start in a transposed copy.
struct Block {
  int64_t first, last, own, own_at, before_start, before_end, before_at;
};

// Calls f(first key, number of keys, column, whether the mask is causal there) for the block's keys, in order.
template <typename F>
void for_keys(const Block& b, F f) {
  for (int64_t j = b.before_start; j < b.before_end; j += most_keys)
    f(j, std::min(most_keys, b.before_end - j), b.before_at + j - b.before_start, false);
  for (int64_t j = b.own; j < b.last; j += most_keys)
    f(j, std::min(most_keys, b.last - j), b.own_at + j - b.own, true);
}

// The queries of a block as columns: `heads` from `head` on, each with the block's tokens; padded to a multiple of 16.
struct Queries {
  int64_t first, tokens, head, heads, count, columns;

  Queries(const Block& b, int64_t head, int64_t end) : first(b.first), tokens(b.last - b.first), head(head) {
    heads = std::min(end - head, std::max<int64_t>(1, most_queries / tokens));
    count = heads * tokens;
    columns = (count + 15) / 16 * 16;
  }
  bf16* row(const Rows& x, int64_t column) const {
    return x.at(head + column / tokens, first + column % tokens);
  }
};

// The queries' rows as B of a sum over the head's size: [D / pair, columns, pair].
void across(const Rows& x, const Queries& q, int64_t size, item* to) {
  float wide_rows[pair == 2 ? 1 : lanes][max_size];
  const bf16 nothing[max_size] = {};
  for (int64_t c = 0; c < q.columns; c += lanes) {
    const float* rows[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      const bf16* row = c + i < q.count ? q.row(x, c + i) : nothing;
      if constexpr (pair == 2) {
        rows[i] = reinterpret_cast<const float*>(row);  // two at a time
      } else {
        rows[i] = wide_rows[i];
#pragma omp simd
        for (int64_t d = 0; d < size; ++d) wide_rows[i][d] = wide(row[d]);
      }
    }
    auto* o = reinterpret_cast<float*>(to) + c;
    for (int64_t d = 0; d < size / pair; d += lanes) {
      const int64_t at = std::min(d, size / pair - lanes);  // the last ones perhaps once more
      const float* from[lanes];
      for (int i = 0; i < lanes; ++i) from[i] = rows[i] + at;
      turn(from, o + at * q.columns, q.columns);
    }
  }
}

// The inverse of across, of sums [D, columns], into the queries' rows.
void back_to_rows(const float* sums, const Queries& q, int64_t size, const Rows& x) {
  float tile[lanes * lanes];
  for (int64_t d = 0; d < size; d += lanes)
    for (int64_t c = 0; c < q.columns; c += lanes) {
      const float* rows[lanes];
      for (int64_t i = 0; i < lanes; ++i) rows[i] = sums + (d + i) * q.columns + c;
      turn(rows, tile, lanes);
      for (int64_t i = 0; i < std::min<int64_t>(lanes, q.count - c); ++i) {
        bf16* row = q.row(x, c + i) + d;
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) narrow(tile[i * lanes + l], row[l]);
      }
    }
}

// The queries' rows as B of a sum over queries: [columns / pair, D, pair].
void along(const Rows& x, const Queries& q, int64_t size, item* to) {
  for (int64_t c = 0; c < q.columns; ++c) {
    const bf16* row = c < q.count ? q.row(x, c) : nullptr;
    item* o = to + c / pair * size * pair + c % pair;
    for (int64_t d = 0; d < size; ++d) put(row ? row[d] : bf16{0}, o[d * pair]);
  }
}

// A copy of keys or values as products take them, of all heads.
struct Copy {
  std::unique_ptr<item[]> items;
  int64_t by_head = 0, by_row = 0;

  const item* at(int64_t head, int64_t row) const { return items.get() + head * by_head + row * by_row; }
};

// [H, D, columns]: transposed, every segment from its column on, which is even, with a 0 after an odd number of tokens.
// segments [S, 3]: first token, last, column.
Copy transposed(const Rows& x, int64_t heads, int64_t size, const Tensor& segments) {
  const int64_t count = segments.size(0), *at = in<int64_t>(segments);
  const int64_t columns = count ? at[3 * count - 1] + at[3 * count - 2] - at[3 * count - 3] + 1 : 0;
  Copy copy{std::unique_ptr<item[]>(new item[heads * size * columns]), size * columns, columns};
  item* to = copy.items.get();
  parallel_for(0, heads * count, 1, [=](int64_t from, int64_t until) {
    for (int64_t i = from; i < until; ++i) {
      const int64_t h = i / count, first = at[i % count * 3], last = at[i % count * 3 + 1];
      item* o = to + h * size * columns + at[i % count * 3 + 2];
      for (int64_t t = first; t < last; t += 16)  // a cache line of every row
        for (int64_t d = 0; d < size; ++d)
          for (int64_t u = t; u < std::min(last, t + 16); ++u) put(x.at(h, u)[d], o[d * columns + u - first]);
      if ((last - first) % 2)
        for (int64_t d = 0; d < size; ++d) put(bf16{0}, o[d * columns + last - first]);
    }
  });
  return copy;
}

// Rows in memory order as A: where products take bf16 the input itself will do, elsewhere a copy in fp32 [H, T, D].
struct Operand {
  const item* data;
  int64_t by_head, by_token;
  std::unique_ptr<item[]> items;

  Operand(const Rows& x, int64_t heads, int64_t tokens, int64_t size) {
    if constexpr (pair == 2) {
      data = reinterpret_cast<const item*>(x.data), by_head = x.by_head, by_token = x.by_token;
    } else {
      items.reset(new item[heads * tokens * size]);
      item* to = items.get();
      parallel_for(0, heads * tokens, 256, [=](int64_t from, int64_t until) {
        for (int64_t i = from; i < until; ++i)
          for (int64_t d = 0; d < size; ++d) put(x.at(i / tokens, i % tokens)[d], to[i * size + d]);
      });
      data = to, by_head = tokens * size, by_token = size;
    }
  }
  const item* at(int64_t head, int64_t token) const { return data + head * by_head + token * by_token; }
};

// One column of a row of B; `high` counts where rows are interleaved by pairs.
inline void put_pair(float low, float high, int64_t column, bf16* to) {
  bf16 x, y;
  narrow(low, x), narrow(high, y);
  const uint32_t both = uint32_t(y.bits) << 16 | x.bits;
  std::memcpy(to + column * 2, &both, sizeof both);
}
inline void put_pair(float low, float, int64_t column, float* to) { to[column] = low; }

// Calls work() once on every thread, and what it returned with every i below count; a thread that is done takes the
// next i, so that it must not matter which thread has it.
template <typename F>
void share_out(int64_t count, F work) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    auto run = work();
    for (int64_t i; (i = next++) < count;) run(i);
  });
}

// Scores [rows, columns] of keys from `key` on to what the softmax takes: scaled, and -infinity where a query does not
// see the key. sees[column]: how many keys of its segment the query sees; `key` counts from the segment's first.
void scale_and_mask(float* scores, int64_t rows, int64_t columns, float factor, int64_t key, const int32_t* sees) {
  for (int64_t j = 0; j < rows; ++j) {
    float* s = scores + j * columns;
    const int32_t at = int32_t(key + j);
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) s[c] = at < sees[c] ? s[c] * factor : -HUGE_VALF;
  }
}

// A block of keys' scores to softmax weights as B of a product; top, total and shrink [columns]: the highest score and
// the sum of weights so far, and what older sums are to be multiplied by. Scores have a row more, at -infinity.
void softmax(const float* scores, int64_t rows, int64_t columns, float* top, float* total, float* shrink,
             item* weights) {
  float peak[most_queries];
  std::copy(top, top + columns, peak);
  for (int64_t r = 0; r < rows; ++r) {
    const float* s = scores + r * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) peak[c] = s[c] > peak[c] ? s[c] : peak[c];
  }
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) {
    shrink[c] = exp_of(top[c] - peak[c]);
    total[c] *= shrink[c];
    top[c] = peak[c];
  }
  for (int64_t r = 0; r < rows; r += pair) {
    const float *low = scores + r * columns, *high = low + columns;
    item* w = weights + r * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const float x = exp_of(low[c] - top[c]), y = pair == 2 ? exp_of(high[c] - top[c]) : 0.f;
      total[c] += x + y;
      put_pair(x, y, c, w);
    }
  }
}

void scale_columns(float* x, int64_t rows, int64_t columns, const float* by) {
  for (int64_t r = 0; r < rows; ++r, x += columns) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) x[c] *= by[c];
  }
}

struct Sizes {
  int64_t heads, key_heads, tokens, size, shared;  // shared: query heads of a key head
};

Sizes sizes_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Sizes n{q.size(0), k.size(0), q.size(1), q.size(2), q.size(0) / std::max<int64_t>(k.size(0), 1)};
  STD_TORCH_CHECK(k.size(1) == n.tokens && v.size(1) == n.tokens && k.size(2) == n.size && v.size(2) == n.size &&
                      v.size(0) == n.key_heads && n.shared * n.key_heads == n.heads && n.size % 16 == 0 &&
                      n.size >= 32 && n.size <= max_size,
                  "q, k and v do not belong together, or the head's size is no multiple of 16 from 32 to 256");
  return n;
}

// q [H, T, D], k and v [Hkv, T, D] bf16 to attended, as q, and lse [H, T] fp32. segments [S, 3], blocks [B, 7]: above.
void prefix_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments, const Tensor& blocks,
                      double scale, const Tensor& attended, const Tensor& lse) {
  const Sizes n = sizes_of(q, k, v);
  const int64_t count = blocks.size(0), size = n.size;
  check(segments, ScalarType::Long, segments.size(0) * 3, "segments");
  check(blocks, ScalarType::Long, count * 7, "blocks");
  check(lse, ScalarType::Float, n.heads * n.tokens, "lse");
  const Rows queries(q), keys(k), values(v), outs(attended);
  const Operand key_rows(keys, n.key_heads, n.tokens, size);
  const Copy value_columns = transposed(values, n.key_heads, size, segments);
  const auto* all = reinterpret_cast<const Block*>(in<int64_t>(blocks));
  float* lses = out<float>(lse);
  const float factor = float(scale);
  share_out(count * n.key_heads, [&] {
    constexpr int64_t width = most_queries;
    auto items = std::make_unique<item[]>((size + most_keys + 2) * width);
    auto floats = std::make_unique<float[]>((size + most_keys + 2) * width);
    return [&, items = std::move(items), floats = std::move(floats)](int64_t i) {
      const Block& b = all[i / n.key_heads];
      const int64_t key_head = i % n.key_heads, end = (key_head + 1) * n.shared;
      item *across_size = items.get(), *weights = across_size + size * width;
      float *sums = floats.get(), *scores = sums + size * width;
      for (int64_t head = end - n.shared; head < end;) {
        const Queries own(b, head, end);
        const int64_t columns = own.columns;
        float top[width], total[width], shrink[width];
        int32_t sees[width];
        for (int64_t c = 0; c < columns; ++c) {
          top[c] = -HUGE_VALF, total[c] = 0;
          sees[c] = int32_t(b.first - b.own + c % own.tokens + 1);
        }
        across(queries, own, size, across_size);
        bool is_first = true;
        for_keys(b, [&](int64_t j, int64_t rows, int64_t column, bool causal) {
          multiply(rows, columns, size / pair, key_rows.at(key_head, j), key_rows.by_token, across_size, scores, false);
          std::fill(scores + rows * columns, scores + (rows + 1) * columns, -HUGE_VALF);
          if (causal && j + rows > b.first + 1) {
            scale_and_mask(scores, rows, columns, factor, j - b.own, sees);
          } else {
#pragma omp simd
            for (int64_t x = 0; x < rows * columns; ++x) scores[x] *= factor;
          }
          softmax(scores, rows, columns, top, total, shrink, weights);
          if (!is_first) scale_columns(sums, size, columns, shrink);
          multiply(size, columns, (rows + pair - 1) / pair, value_columns.at(key_head, 0) + column,
                   value_columns.by_row, weights, sums, !is_first);
          is_first = false;
        });
        for (int64_t c = 0; c < columns; ++c) shrink[c] = 1.f / total[c];
        scale_columns(sums, size, columns, shrink);
        back_to_rows(sums, own, size, outs);
        for (int64_t c = 0; c < own.count; ++c)
          lses[(head + c / own.tokens) * n.tokens + b.first + c % own.tokens] = top[c] + std::log(total[c]);
        head += own.heads;
      }
    };
  });
}

// From scores and the weights' gradients: softmax weights and the gradients of q k^T, both as rows of A, and the
// gradients also as B of a sum over keys. lse and delta [columns]. Scores have a row more, at -infinity, gradients at 0.
void softmax_backward(const float* scores, const float* grad_weights, int64_t rows, int64_t columns, float factor,
                      const float* lse, const float* delta, item* weights, item* grads, item* grads_as_b) {
  for (int64_t r = 0; r < rows; r += pair) {
    const float *s = scores + r * columns, *g = grad_weights + r * columns;
    item *w = weights + r * columns, *a = grads + r * columns, *b = grads_as_b + r * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const float x = exp_of(s[c] - lse[c]), dx = x * (g[c] - delta[c]) * factor;
      narrow(x, w[c]), narrow(dx, a[c]);
      if constexpr (pair == 2) {
        const float y = exp_of(s[c + columns] - lse[c]), dy = y * (g[c + columns] - delta[c]) * factor;
        narrow(y, w[c + columns]), narrow(dy, a[c + columns]);
        put_pair(dx, dy, c, b);
      }
    }
  }
}

float dot(const bf16* x, const bf16* y, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += wide(x[i]) * wide(y[i]);
  return sum;
}

void add(float* total, const float* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) total[i] += x[i];
}

void narrow_row(const float* x, int64_t count, bf16* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(x[i], to[i]);
}

// A row of `slices`: blocks from first_block to last_block, which one thread takes, whose keys are rows first to last;
// from row `at` of the shares on it sums these rows' gradients. A group's slices follow each other, and the last has
// all rows: there `group` is the index of the first, elsewhere -1.
struct Slice {
  int64_t first_block, last_block, first, last, at, group;
};

// The gradients of q, k and v, as these, from that of `attended`. slices [N, 6]: above; shares [2, Hkv, rows,
// D] fp32: scratch.
void prefix_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& attended, const Tensor& lse, const Tensor& segments, const Tensor& blocks,
                               const Tensor& slices, double scale, const Tensor& shares, const Tensor& grad_q,
                               const Tensor& grad_k, const Tensor& grad_v) {
  const Sizes n = sizes_of(q, k, v);
  const int64_t count = slices.size(0), size = n.size, rows_of_shares = shares.size(2);
  check(segments, ScalarType::Long, segments.size(0) * 3, "segments");
  check(blocks, ScalarType::Long, blocks.size(0) * 7, "blocks");
  check(slices, ScalarType::Long, count * 6, "slices");
  check(lse, ScalarType::Float, n.heads * n.tokens, "lse");
  check(shares, ScalarType::Float, 2 * n.key_heads * rows_of_shares * size, "shares");
  const Rows queries(q), keys(k), values(v), grads(grad), outs(attended), grad_queries(grad_q);
  const Operand key_rows(keys, n.key_heads, n.tokens, size), value_rows(values, n.key_heads, n.tokens, size);
  const Copy key_columns = transposed(keys, n.key_heads, size, segments);
  const auto* all = reinterpret_cast<const Block*>(in<int64_t>(blocks));
  const auto* slice = reinterpret_cast<const Slice*>(in<int64_t>(slices));
  const float *lses = in<float>(lse), factor = float(scale);
  float* sums = out<float>(shares);
  const int64_t by_kind = n.key_heads * rows_of_shares * size;
  share_out(count * n.key_heads, [&] {
    constexpr int64_t width = most_queries;
    auto items = std::make_unique<item[]>((4 * size + 3 * (most_keys + 2)) * width);
    auto floats = std::make_unique<float[]>((size + 2 * (most_keys + 2)) * width);
    return [&, items = std::move(items), floats = std::move(floats)](int64_t i) {
      const Slice& part = slice[i / n.key_heads];
      const int64_t key_head = i % n.key_heads, end = (key_head + 1) * n.shared;
      float* grad_keys = sums + (key_head * rows_of_shares + part.at) * size;
      float* grad_values = grad_keys + by_kind;
      std::fill(grad_keys, grad_keys + (part.last - part.first) * size, 0.f);
      std::fill(grad_values, grad_values + (part.last - part.first) * size, 0.f);
      item *q_across = items.get(), *g_across = q_across + size * width, *q_along = g_across + size * width;
      item *g_along = q_along + size * width, *weights = g_along + size * width;
      item *score_grads = weights + (most_keys + 2) * width, *score_grads_as_b = score_grads;
      if (pair == 2) score_grads_as_b += (most_keys + 2) * width;
      float *sums_q = floats.get(), *scores = sums_q + size * width, *weight_grads = scores + (most_keys + 2) * width;
      for (const Block* b = all + part.first_block; b < all + part.last_block; ++b)
        for (int64_t head = end - n.shared; head < end;) {
          const Queries own(*b, head, end);
          const int64_t columns = own.columns;
          float lse_of[width], delta[width];
          int32_t sees[width];
          for (int64_t c = 0; c < columns; ++c) {
            const bool is_there = c < own.count;
            sees[c] = int32_t(b->first - b->own + c % own.tokens + 1);
            lse_of[c] = is_there ? lses[(head + c / own.tokens) * n.tokens + b->first + c % own.tokens] : HUGE_VALF;
            delta[c] = is_there ? dot(own.row(grads, c), own.row(outs, c), size) : 0.f;
          }
          across(queries, own, size, q_across);
          across(grads, own, size, g_across);
          along(queries, own, size, q_along);
          along(grads, own, size, g_along);
          bool is_first = true;
          for_keys(*b, [&](int64_t j, int64_t rows, int64_t column, bool causal) {
            const int64_t to = (j - part.first) * size, pairs = columns / pair;
            multiply(rows, columns, size / pair, key_rows.at(key_head, j), key_rows.by_token, q_across, scores, false);
            multiply(rows, columns, size / pair, value_rows.at(key_head, j), value_rows.by_token, g_across,
                     weight_grads, false);
            std::fill(scores + rows * columns, scores + (rows + 1) * columns, -HUGE_VALF);
            std::fill(weight_grads + rows * columns, weight_grads + (rows + 1) * columns, 0.f);
            scale_and_mask(scores, rows, columns, factor, causal ? j - b->own : -most_keys, sees);
            softmax_backward(scores, weight_grads, rows, columns, factor, lse_of, delta, weights, score_grads,
                             score_grads_as_b);
            multiply(rows, size, pairs, weights, columns, g_along, grad_values + to, true);
            multiply(rows, size, pairs, score_grads, columns, q_along, grad_keys + to, true);
            multiply(size, columns, (rows + pair - 1) / pair, key_columns.at(key_head, 0) + column, key_columns.by_row,
                     score_grads_as_b, sums_q, !is_first);
            is_first = false;
          });
          back_to_rows(sums_q, own, size, grad_queries);
          head += own.heads;
        }
    };
  });
  const Rows to_keys(grad_k), to_values(grad_v);
  share_out(count * n.key_heads, [&] {
    return [&](int64_t i) {
      const Slice& whole = slice[i / n.key_heads];
      const int64_t key_head = i % n.key_heads;
      if (whole.group < 0) return;
      for (int kind = 0; kind < 2; ++kind) {
        float* total = sums + kind * by_kind + (key_head * rows_of_shares + whole.at) * size;
        for (const Slice* other = slice + whole.group; other < &whole; ++other)
          add(total, total + (other->at - whole.at) * size, (other->last - other->first) * size);
        for (int64_t t = whole.first; t < whole.last; ++t, total += size)
          narrow_row(total, size, (kind ? to_values : to_keys).at(key_head, t));
      }
    };
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(strop, m) {
  m.def(
      "cpu_prefix_attention(Tensor q, Tensor k, Tensor v, Tensor segments, Tensor blocks, float scale,"
      " Tensor(a!) attended, Tensor(b!) lse) -> ()");
  m.def(
      "cpu_prefix_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor attended, Tensor lse,"
      " Tensor segments, Tensor blocks, Tensor slices, float scale, Tensor(a!) shares, Tensor(b!) grad_q,"
      " Tensor(c!) grad_k, Tensor(d!) grad_v) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(strop, CPU, m) {
  m.impl("cpu_prefix_attention", TORCH_BOX(&prefix_attention));
  m.impl("cpu_prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}
