// The operator of cpu_cached.h's attention: decode attention on a CPU over cached keys and values.
#include "cpu_cached.h"

namespace {

// q [Hq, N, D], k and v [Hkv, N, D] of N new tokens, whose keys and values are cached first; group, seen and length
// [N]: see above. prompt_k, prompt_v [G, Hkv, P, D]; completion_k, completion_v [R * Hkv * C, D] in chunks
// [R, Hkv, size, D] of tokens from start on, chunks [n, 2]: start, size. softcap: 0 for none. attended [N, Hq, D].
void cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prompt_k, const Tensor& prompt_v,
                      const Tensor& completion_k, const Tensor& completion_v, const Tensor& chunks, const Tensor& group,
                      const Tensor& seen, const Tensor& length, double scale, double softcap, int64_t window,
                      const Tensor& attended) {
  const Sizes of = sizes_of(q, k, v);
  const int64_t key_heads = of.key_heads, tokens = of.tokens, size = of.size, shared = of.shared;
  STD_TORCH_CHECK(prompt_k.dim() == 4 && prompt_k.size(1) == key_heads && prompt_k.size(3) == size,
                  "prompt_k does not belong to k");
  const Places places(group, seen, length, chunks, tokens);
  const Order order(places.group, tokens, std::max<int64_t>(1, most_queries / shared));
  dispatch_taken(q, [&](auto element) {
    using T = decltype(element);
    check(attended, type_of<T>, tokens * of.heads * size, "attended");
    const RowsOf<T> keys(k), values(v);
    const Attention<T> attention = places.attention(RowsOf<T>(q), shared, prompt_k, prompt_v, completion_k,
                                                    completion_v, order.tokens.data(), window);
    parallel_for(0, tokens * key_heads, 64, [&](int64_t from, int64_t until) {
      for (int64_t x = from; x < until; ++x) {
        const int64_t i = x / key_heads, head = x % key_heads;
        std::memcpy(attention.place(i, head, true), keys.at(head, i), size * sizeof(T));
        std::memcpy(attention.place(i, head, false), values.at(head, i), size * sizeof(T));
      }
    });
    T* to = out<T>(attended);
    share_out(int64_t(order.blocks.size()) * key_heads, [&] {
      return [&, sums = Sums(order.most_tokens * shared, size, float(scale), float(softcap))](int64_t x) mutable {
        attention.attend(order.blocks[x / key_heads], x % key_heads, sums, [&](int64_t i, int64_t head, const T* row) {
          std::memcpy(to + (i * of.heads + head) * size, row, size * sizeof(T));
        });
      };
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(strop, m) {
  m.def(
      "cpu_cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) prompt_k, Tensor(b!) prompt_v,"
      " Tensor(c!) completion_k, Tensor(d!) completion_v, Tensor chunks, Tensor group, Tensor seen, Tensor length,"
      " float scale, float softcap, int window, Tensor(e!) attended) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(strop, CPU, m) { m.impl("cpu_cached_attention", TORCH_BOX(&cached_attention)); }
