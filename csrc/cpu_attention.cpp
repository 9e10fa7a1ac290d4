// Attention over a shared prompt on a CPU, forward and backward, in blocks that fit a core's cache. Sums are fp32. On
// processors that multiply pairs of bf16 (AVX-512 BF16), inputs are bf16, and softmax weights and their gradients are
// rounded to bf16 for the products, as in flash attention; on others products are fp32 and inputs bf16 or fp32.
//
// Scores are transposed, one row per key and one column per query, so that a softmax runs down a column and its maximum
// and sum need no reduction across vector lanes. All seven products then have one form: rows of A in memory order times
// a B whose rows are interleaved in pairs.
//
// A block of queries is a range of tokens of one segment (a prompt or a completion) times heads that share a key head.
// Its keys are, for a completion, the whole prompt, and the segment's own keys up to the query.
#include "cpu_tiles.h"

#include <memory>

namespace {

// A row of `blocks`: tokens first to last of the segment from `own` on; keys before_start to before_end are the prompt.
// own_at and before_at: first columns of these segments in a transposed copy.
struct Block {
  int64_t first, last, own, own_at, before_start, before_end, before_at;
};

// Calls f(first key, number of keys, column, whether the causal mask applies) for the block's keys, in order.
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
  template <typename T>
  T* row(const RowsOf<T>& x, int64_t column) const {
    return x.at(head + column / tokens, first + column % tokens);
  }
  // These rows of x, in the layout of the products.
  template <typename T>
  auto of(const RowsOf<T>& x) const {
    return [this, &x](int64_t column) { return column < count ? static_cast<const T*>(row(x, column)) : nullptr; };
  }
};

// The inverse of across: sums [D, columns] to the queries' rows.
template <typename T>
void back_to_rows(const float* sums, const Queries& q, int64_t size, const RowsOf<T>& x) {
  float tile[lanes * lanes];
  for (int64_t d = 0; d < size; d += lanes)
    for (int64_t c = 0; c < q.columns; c += lanes) {
      const float* rows[lanes];
      for (int64_t i = 0; i < lanes; ++i) rows[i] = sums + (d + i) * q.columns + c;
      turn(rows, tile, lanes);
      for (int64_t i = 0; i < std::min<int64_t>(lanes, q.count - c); ++i) {
        T* row = q.row(x, c + i) + d;
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) narrow(tile[i * lanes + l], row[l]);
      }
    }
}

// A copy of the keys or values of all heads, in the layout of the products.
struct Copy {
  std::unique_ptr<item[]> items;
  int64_t by_head = 0, by_row = 0;

  const item* at(int64_t head, int64_t row) const { return items.get() + head * by_head + row * by_row; }
};

// [H, D, columns]: transposed; every segment starts at an even column, padded by a 0 after an odd number of tokens.
// segments [S, 3]: first token, last, column.
template <typename T>
Copy transposed(const RowsOf<T>& x, int64_t heads, int64_t size, const Tensor& segments) {
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
        for (int64_t d = 0; d < size; ++d) o[d * columns + last - first] = item{};
    }
  });
  return copy;
}

// Rows in memory order as A: the input itself if products support its dtype, else an fp32 copy [H, T, D].
template <typename T>
struct Operand {
  const item* data;
  int64_t by_head, by_token;
  std::unique_ptr<item[]> items;

  Operand(const RowsOf<T>& x, int64_t heads, int64_t tokens, int64_t size) {
    if constexpr (std::is_same_v<T, item>) {
      data = x.data, by_head = x.by_head, by_token = x.by_token;
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

// Sets scores [rows, columns] of keys from `key` on to -infinity where a query does not see the key. sees[column]: the
// number of keys of its segment that the query sees; `key` is relative to the segment's first.
void mask(float* scores, int64_t rows, int64_t columns, int64_t key, const int32_t* sees) {
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scores + r * columns;
    const int32_t at = int32_t(key + r);
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) s[c] = at < sees[c] ? s[c] : -HUGE_VALF;
  }
}

// Softmax weights 2^(factor * score - top) of a block of keys, as B of a product. top, total and shrink [columns]: the
// maximum of factor * score and the sum of weights so far, and the factor for older sums. Scores have one extra row, at
// -infinity.
void softmax(const float* scores, int64_t rows, int64_t columns, float factor, float* top, float* total, float* shrink,
             item* weights) {
  for (int64_t c = 0; c < columns; c += lanes) {
    vec peak = load(scores + c);
    for (int64_t r = 1; r < rows; ++r) {
      const vec s = load(scores + r * columns + c);
      peak = s > peak ? s : peak;
    }
    // rounded once and used in every weight and in lse, so that the rounding cancels
    const vec old = load(top + c), scaled = peak * factor, shift = scaled > old ? scaled : old;
    const vec decay = exp2_of(old - shift);
    vec sum = load(total + c) * decay;
    for (int64_t r = 0; r < rows; r += pair) {
      const float* s = scores + r * columns + c;
      const vec low = exp2_of(load(s) * factor - shift);
      vec high{};
      if constexpr (pair == 2) high = exp2_of(load(s + columns) * factor - shift);
      sum += low + high;
      put(low, high, weights + r * columns + c * pair);
    }
    store(top + c, shift), store(total + c, sum), store(shrink + c, decay);
  }
}

void scale_columns(float* x, int64_t rows, int64_t columns, const float* by) {
  for (int64_t r = 0; r < rows; ++r, x += columns) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) x[c] *= by[c];
  }
}

// The rows of `blocks` [B, 7], all within the tokens.
const Block* blocks_of(const Tensor& blocks, int64_t tokens) {
  const int64_t count = blocks.size(0);
  check(blocks, ScalarType::Long, count * 7, "blocks");
  const auto* all = reinterpret_cast<const Block*>(in<int64_t>(blocks));
  for (const Block* b = all; b < all + count; ++b)
    STD_TORCH_CHECK(0 <= b->before_start && b->before_start <= b->before_end && b->before_end <= b->own &&
                        b->own <= b->first && b->first < b->last && b->last <= tokens &&
                        b->last - b->first <= most_queries,
                    "blocks are not of these tokens");
  return all;
}

// lse is fp64 for fp32 inputs: for a peaked softmax, rounding lse to fp32 would dominate the error of the weights.
template <typename T>
using Lse = std::conditional_t<std::is_same_v<T, float>, double, float>;
template <typename T>
constexpr ScalarType type_of_lse = std::is_same_v<T, float> ? ScalarType::Double : ScalarType::Float;

template <typename T>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments, const Tensor& blocks,
            double scale, const Tensor& attended, const Tensor& lse) {
  const Sizes n = sizes_of(q, k, v);
  const int64_t count = blocks.size(0), size = n.size;
  check(segments, ScalarType::Long, segments.size(0) * 3, "segments");
  check(lse, type_of_lse<T>, n.heads * n.tokens, "lse");
  const RowsOf<T> queries(q), keys(k), values(v), outs(attended);
  const Operand<T> key_rows(keys, n.key_heads, n.tokens, size);
  const Copy value_columns = transposed(values, n.key_heads, size, segments);
  const Block* all = blocks_of(blocks, n.tokens);
  auto* lses = out<Lse<T>>(lse);
  const float factor = float(scale * log2_e);
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
        across<T>(own.of(queries), columns, size, across_size);
        bool is_first = true;
        for_keys(b, [&](int64_t j, int64_t rows, int64_t column, bool causal) {
          multiply(rows, columns, size / pair, key_rows.at(key_head, j), key_rows.by_token, across_size, scores, false);
          std::fill(scores + rows * columns, scores + (rows + 1) * columns, -HUGE_VALF);
          if (causal && j + rows > b.first + 1) mask(scores, rows, columns, j - b.own, sees);
          softmax(scores, rows, columns, factor, top, total, shrink, weights);
          if (!is_first) scale_columns(sums, size, columns, shrink);
          multiply(size, columns, (rows + pair - 1) / pair, value_columns.at(key_head, 0) + column,
                   value_columns.by_row, weights, sums, !is_first);
          is_first = false;
        });
        for (int64_t c = 0; c < columns; ++c) shrink[c] = 1.f / total[c];
        scale_columns(sums, size, columns, shrink);
        back_to_rows(sums, own, size, outs);
        for (int64_t c = 0; c < own.count; ++c)
          lses[(head + c / own.tokens) * n.tokens + b.first + c % own.tokens] =
              Lse<T>((top[c] + std::log2(double(total[c]))) * ln_2);
        head += own.heads;
      }
    };
  });
}

// Softmax weights and the gradients of q k^T from scores and the weights' gradients, both as rows of A, the latter also
// as B of a sum over keys. shift, rest and delta [columns]: lse * log2 e in two parts, and grad . attended. Scores have
// one extra row, at -infinity, and gradients one at 0.
void softmax_backward(const float* scores, const float* grad_weights, int64_t rows, int64_t columns, float scale,
                      float factor, const float* shift, const float* rest, const float* delta, item* weights,
                      item* grads, item* grads_as_b) {
  for (int64_t c = 0; c < columns; c += lanes) {
    const vec most = load(shift + c), least = load(rest + c), pull = load(delta + c);
    for (int64_t r = 0; r < rows; r += pair) {
      const int64_t at = r * columns + c;
      const vec low = exp2_of(load(scores + at) * factor - most - least);
      const vec low_grad = low * (load(grad_weights + at) - pull) * scale;
      vec high{}, high_grad{};
      if constexpr (pair == 2) {
        high = exp2_of(load(scores + at + columns) * factor - most - least);
        high_grad = high * (load(grad_weights + at + columns) - pull) * scale;
      }
      put(low, high, nullptr, weights + at, columns);
      put(low_grad, high_grad, grads_as_b + r * columns + c * pair, pair == 2 ? grads + at : nullptr, columns);
    }
  }
}

template <typename T>
float dot(const T* x, const T* y, int64_t count) {
  Lse<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += Lse<T>(wide(x[i])) * wide(y[i]);
  return float(sum);
}

void add(float* total, const float* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) total[i] += x[i];
}

template <typename T>
void narrow_row(const float* x, int64_t count, T* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(x[i], to[i]);
}

// A row of `slices`: blocks first_block to last_block, processed by one thread, with keys in rows first to last; their
// partial gradients start at row `at` of the shares. A group's slices are consecutive and the last covers all rows;
// there `group` is the index of the first slice, elsewhere -1.
struct Slice {
  int64_t first_block, last_block, first, last, at, group;
};

template <typename T>
void attend_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& attended,
                     const Tensor& lse, const Tensor& segments, const Tensor& blocks, const Tensor& slices,
                     double scale, const Tensor& shares, const Tensor& grad_q, const Tensor& grad_k,
                     const Tensor& grad_v) {
  const Sizes n = sizes_of(q, k, v);
  const int64_t count = slices.size(0), size = n.size, rows_of_shares = shares.size(2);
  check(segments, ScalarType::Long, segments.size(0) * 3, "segments");
  check(slices, ScalarType::Long, count * 6, "slices");
  check(lse, type_of_lse<T>, n.heads * n.tokens, "lse");
  check(shares, ScalarType::Float, 2 * n.key_heads * rows_of_shares * size, "shares");
  const RowsOf<T> queries(q), keys(k), values(v), grads(grad), outs(attended), grad_queries(grad_q);
  const Operand<T> key_rows(keys, n.key_heads, n.tokens, size), value_rows(values, n.key_heads, n.tokens, size);
  const Copy key_columns = transposed(keys, n.key_heads, size, segments);
  const Block* all = blocks_of(blocks, n.tokens);
  const auto* slice = reinterpret_cast<const Slice*>(in<int64_t>(slices));
  const auto* lses = in<Lse<T>>(lse);
  const float by = float(scale), factor = float(scale * log2_e);
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
          float shift[width], rest[width], delta[width];
          int32_t sees[width];
          for (int64_t c = 0; c < columns; ++c) {
            const bool is_there = c < own.count;
            sees[c] = int32_t(b->first - b->own + c % own.tokens + 1);
            const int64_t at = (head + c / own.tokens) * n.tokens + b->first + c % own.tokens;
            const double exact = is_there ? lses[at] / ln_2 : 0.;
            shift[c] = is_there ? float(exact) : HUGE_VALF, rest[c] = is_there ? float(exact - shift[c]) : 0.f;
            delta[c] = is_there ? dot(own.row(grads, c), own.row(outs, c), size) : 0.f;
          }
          across<T>(own.of(queries), columns, size, q_across);
          across<T>(own.of(grads), columns, size, g_across);
          along<T>(own.of(queries), columns, size, q_along);
          along<T>(own.of(grads), columns, size, g_along);
          bool is_first = true;
          for_keys(*b, [&](int64_t j, int64_t rows, int64_t column, bool causal) {
            const int64_t to = (j - part.first) * size, pairs = columns / pair;
            multiply(rows, columns, size / pair, key_rows.at(key_head, j), key_rows.by_token, q_across, scores, false);
            multiply(rows, columns, size / pair, value_rows.at(key_head, j), value_rows.by_token, g_across,
                     weight_grads, false);
            std::fill(scores + rows * columns, scores + (rows + 1) * columns, -HUGE_VALF);
            std::fill(weight_grads + rows * columns, weight_grads + (rows + 1) * columns, 0.f);
            if (causal && j + rows > b->first + 1) mask(scores, rows, columns, j - b->own, sees);
            softmax_backward(scores, weight_grads, rows, columns, by, factor, shift, rest, delta, weights,
                             score_grads, score_grads_as_b);
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
  const RowsOf<T> to_keys(grad_k), to_values(grad_v);
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

// q [H, T, D], k and v [Hkv, T, D] to attended, shaped as q, and lse [H, T] fp32 (fp64 for fp32 inputs). segments
// [S, 3], blocks [B, 7]: see above.
void prefix_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments, const Tensor& blocks,
                      double scale, const Tensor& attended, const Tensor& lse) {
  dispatch_taken(q, [&](auto element) { attend<decltype(element)>(q, k, v, segments, blocks, scale, attended, lse); });
}

// The gradients of q, k and v from that of `attended`. slices [N, 6]: see above; shares [2, Hkv, rows, D] fp32 is
// scratch.
void prefix_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& attended, const Tensor& lse, const Tensor& segments, const Tensor& blocks,
                               const Tensor& slices, double scale, const Tensor& shares, const Tensor& grad_q,
                               const Tensor& grad_k, const Tensor& grad_v) {
  dispatch_taken(q, [&](auto element) {
    attend_backward<decltype(element)>(grad, q, k, v, attended, lse, segments, blocks, slices, scale, shares, grad_q,
                                       grad_k, grad_v);
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
