// A step of a decoder of Llama's kind on a CPU in one call: embedding, layers, final norm and head for the new tokens
// of many completions and prompts over cached keys and values. bf16, fp32 sums.
//
// A step with few rows takes as long as reading the weights does, so nothing may interrupt that. The step is one
// sequence of items, each a few columns of a product, the attention of a head or a norm of 16 rows, and threads take
// the next item as they finish one. A phase's items need all of the phases before. A thread takes its next item before
// it runs the one it has, and fetches that one's weights meanwhile. An item's result depends neither on the thread nor
// on the other rows.
#include "cpu_unit_attention.h"

#include <optional>
#include <thread>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// Asks for pages of 2 MiB, with which reading a weight in sequence is not interrupted every 4 KiB. For fresh memory.
void use_huge_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + x.numel() * x.element_size()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // may be refused
#endif
}

#ifdef __AVX512BF16__

struct Layer {
  const bf16 *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *mlp_norm, *gate_up, *down;
  Attention<bf16> attention;
};

// Weights of a product; an item computes `per_item` panels for a block of rows.
struct Product {
  const bf16* weights;
  int64_t steps, panels, per_item, rows;

  int64_t items() const { return blocks_of(panels, per_item); }
  int64_t rows_per_block() const {  // so that they stay in the second-level cache
    return std::max<int64_t>(128, (1 << 20) / (steps * tile_width * int64_t(sizeof(bf16))) / 32 * 32);
  }
  int64_t panels_of(int64_t item) const { return std::min(per_item, panels - item % items() * per_item); }
  const bf16* weights_of(int64_t item) const { return weights + item % items() * per_item * steps * 2 * tile_size; }
};

enum Kind { norm, qkv, attend, project, mlp_norm, gate_up, down, last_norm, head };

struct Phase {
  Kind kind;
  int64_t layer, first;  // item
  Product product;       // of phases that are products
};

struct Decoder {
  int64_t tokens, width, heads, key_heads, size, hidden, vocab, kept;
  float eps, scale;
  const bf16 *embedding, *final_norm, *cos, *sin;
  const int64_t *ids, *keep;
  std::vector<Layer> layers;
  bf16 *x, *queries, *logits;
  TiledRows normed, attended, product;
  std::vector<Phase> phases;
  const Order* order;
  bool has_unit;

  int64_t shared() const { return heads / key_heads; }
  bool attends_on_unit() const { return has_unit && UnitAttention::takes(size, shared()); }
  int64_t tokens_per_block() const {
    return attends_on_unit() ? UnitAttention::most_tiles * UnitAttention::tokens_per_tile(shared())
                             : std::max<int64_t>(1, most_queries / shared());
  }

  // Appends the phase that follows all before.
  void then(Kind kind, int64_t layer, int64_t items, Product of = {}) {
    if (of.weights) items = of.items() * blocks_of(of.rows, of.rows_per_block());
    phases.back() = {kind, layer, phases.back().first, of};
    phases.push_back({kind, layer, phases.back().first + items, {}});  // the end, or the start of the next
  }

  void plan(const bf16* head_weights) {
    const int64_t row_tiles = blocks_of(tokens, tile_rows), panels = blocks_of(size, panel_width);
    const int64_t out_panels = blocks_of(width, panel_width);
    phases.assign(1, {});
    for (int64_t l = 0; l < int64_t(layers.size()); ++l) {
      const Layer& of = layers[l];
      then(norm, l, row_tiles);
      then(qkv, l, 0, {of.qkv, normed.steps, (heads + 2 * key_heads) * panels, panels, tokens});
      then(attend, l, int64_t(order->blocks.size()) * key_heads);
      then(project, l, 0, {of.out, attended.steps, out_panels, 1, tokens});
      then(mlp_norm, l, row_tiles);
      then(gate_up, l, 0, {of.gate_up, normed.steps, blocks_of(hidden, 16), 2, tokens});
      then(down, l, 0, {of.down, product.steps, out_panels, 1, tokens});
    }
    then(last_norm, 0, blocks_of(kept, tile_rows));
    then(head, 0, 0, {head_weights, normed.steps, blocks_of(vocab, panel_width), 4, kept});
  }

  void run() const {
    const int64_t end = phases.back().first;
    alignas(64) std::atomic<int64_t> next{0};  // each in a line of the cache of its own
    alignas(64) std::atomic<int64_t> done{0};
    parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
      const MatrixUnit unit(has_unit);
      std::optional<UnitAttention> on_unit;
      std::optional<Sums> in_vectors;
      if (attends_on_unit())
        on_unit.emplace(size, shared(), scale);
      else
        in_vectors.emplace(order->most_tokens * shared(), size, scale, 0);
      int64_t phase = 0, coming_phase = 0;
      for (int64_t item = next++; item < end;) {
        const int64_t coming = next++;
        while (item >= phases[phase + 1].first) ++phase;
        const bf16* weights = phases[phase].product.weights;  // that come next; the old ones where there are none
        if (coming < end) {
          while (coming >= phases[coming_phase + 1].first) ++coming_phase;
          if (const Product& p = phases[coming_phase].product; p.weights)
            weights = p.weights_of(coming - phases[coming_phase].first);
        }
        for (int spins = 0; done.load(std::memory_order_acquire) < phases[phase].first; ++spins)
          if (spins < 20000)  // about 1 ms: who yields too soon loses the core to other processes
            _mm_pause();
          else  // the thread that is waited for may need this core
            std::this_thread::yield();
        run_item(phases[phase], item - phases[phase].first, unit, on_unit, in_vectors, weights,
                 coming_phase == phase ? coming - phases[phase].first : -1);
        done.fetch_add(1, std::memory_order_release);
        item = coming;
      }
    });
  }

  void run_item(const Phase& phase, int64_t item, const MatrixUnit& unit, std::optional<UnitAttention>& on_unit,
                std::optional<Sums>& in_vectors, const bf16* coming, int64_t coming_item) const {
    const Product& p = phase.product;
    if (!p.weights && coming) fetch_step(coming);
    const Layer* layer = phase.kind == last_norm || phase.kind == head ? nullptr : &layers[phase.layer];
    const auto multiply = [&](const TiledRows& rows, auto finish) {
      const int64_t block = item / p.items() * p.rows_per_block(), first_panel = item % p.items() * p.per_item;
      multiply_panels(rows, block, std::min(p.rows, block + p.rows_per_block()), p.weights_of(item), p.panels_of(item),
                      unit, coming, [&](int64_t at, int64_t count, int64_t panel, const float* c) {
                        for (int64_t i = 0; i < count; ++i)
                          finish(at + i, i, first_panel + panel, c + i * panel_width);
                      });
    };
    switch (phase.kind) {
      case norm:
      case mlp_norm:
        return normalize(item, phase.kind == norm ? layer->norm : layer->mlp_norm,
                         phase.kind == norm && phase.layer == 0);
      case last_norm:
        for (int64_t i = item * tile_rows; i < std::min(kept, (item + 1) * tile_rows); ++i)
          norm_row(x + keep[i] * width, final_norm, width, eps, [&](int64_t j) { return normed.at(i, j); });
        return;
      case attend: {
        const Block& block = order->blocks[item / key_heads];
        const auto write = [&](int64_t i, int64_t h, const bf16* found) { attended.put(i, h * size, found, size); };
        const Block* then = coming_item < 0 ? nullptr : &order->blocks[coming_item / key_heads];
        if (on_unit)
          return on_unit->attend(layer->attention, block, item % key_heads, then, coming_item % key_heads, write);
        return layer->attention.attend(block, item % key_heads, *in_vectors, write);
      }
      case qkv: {
        bf16 rows[2 * tile_rows][max_size];
        const int64_t panels = p.per_item, h = item % p.items();
        return multiply(normed, [&](int64_t i, int64_t slot, int64_t panel, const float* c) {
          const int64_t from = panel % panels * panel_width, count = std::min(panel_width, size - from);
          const bf16* bias = layer->qkv_bias ? layer->qkv_bias + h * size + from : nullptr;
          for (int64_t j = 0; j < count; j += 16) {
            const __m512 found = _mm512_load_ps(c + j);
            store16(rows[slot] + from + j, bias ? _mm512_add_ps(found, load16(bias + j)) : found);
          }
          if (from + count == size) place_head(*layer, i, h, rows[slot]);
        });
      }
      case project:
      case down:
        return multiply(phase.kind == down ? product : attended, [&](int64_t i, int64_t, int64_t panel, auto* c) {
          bf16* to = x + i * width + panel * panel_width;
          by_16(std::min(panel_width, width - panel * panel_width), [&](int64_t j, __mmask16 lanes) {
            store16(to + j, _mm512_add_ps(load16(to + j, lanes), rounded(_mm512_load_ps(c + j))), lanes);
          });
        });
      case gate_up:
        return multiply(normed, [&](int64_t i, int64_t, int64_t panel, const float* c) {
          store16(product.at(i, panel * 16), silu_mul(_mm512_load_ps(c), _mm512_load_ps(c + 16)));
        });
      case head:
        return multiply(normed, [&](int64_t i, int64_t, int64_t panel, const float* c) {
          bf16* to = logits + i * vocab + panel * panel_width;
          by_16(std::min(panel_width, vocab - panel * panel_width), [&](int64_t j, __mmask16 lanes) {
            store16(to + j, _mm512_load_ps(c + j), lanes);
          });
        });
    }
  }

  void normalize(int64_t tile, const bf16* weight, bool is_first) const {
    for (int64_t i = tile * tile_rows; i < std::min(tokens, (tile + 1) * tile_rows); ++i) {
      if (is_first) {
        std::memcpy(x + i * width, embedding + ids[i] * width, width * sizeof(bf16));
        normed.pad(i, width), attended.pad(i, heads * size), product.pad(i, blocks_of(hidden, 16) * 16);
      }
      norm_row(x + i * width, weight, width, eps, [&](int64_t j) { return normed.at(i, j); });
    }
  }

  // A token's query, key or value of head h, counted over all three: normed, rotated and put where attention reads it.
  void place_head(const Layer& layer, int64_t i, int64_t h, bf16* row) const {
    if (h >= heads + key_heads) {
      std::memcpy(layer.attention.place(i, h - heads - key_heads, false), row, size * sizeof(bf16));
      return;
    }
    if (const bf16* weight = h < heads ? layer.q_norm : layer.k_norm)
      norm_row(row, weight, size, eps, [=](int64_t j) { return row + j; });
    bf16* to = h < heads ? queries + (i * heads + h) * size : layer.attention.place(i, h - heads, true);
    rotate_row(row, cos + i * size, sin + i * size, size / 2, to);
  }
};

#endif

// weights: all packed weights of the model, places [L + 1, 9] where in it each begins, -1 for none: norm, qkv,
// qkv_bias, q_norm, k_norm, out, mlp_norm, gate_up, down; last the final norm and the head. embedding [V, W]. sizes:
// heads, key heads, size of a head, width of the MLP, whether there is a matrix unit. windows [L]. T new tokens: ids,
// group, seen, length [T] as in cached_attention, cos and sin [T, D]. The caches of each layer as in cached_attention.
// keep [N]: the tokens whose logits [N, V] are wanted. scratch: memory, of which the step checks that it is enough.
void decoder_step(const Tensor& weights, const Tensor& places, const Tensor& embedding, std::vector<int64_t> sizes,
                  const Tensor& windows, double eps, double scale, const Tensor& ids, const Tensor& cos,
                  const Tensor& sin, std::vector<Tensor> prompt_k, std::vector<Tensor> prompt_v,
                  std::vector<Tensor> completion_k, std::vector<Tensor> completion_v, const Tensor& chunks,
                  const Tensor& group, const Tensor& seen, const Tensor& length, const Tensor& keep,
                  const Tensor& scratch, const Tensor& logits) {
#ifdef __AVX512BF16__
  constexpr int64_t slots = 9;
  STD_TORCH_CHECK(sizes.size() == 5 && embedding.dim() == 2 && logits.dim() == 2, "sizes, embedding or logits");
  const int64_t count = places.size(0) - 1, tokens = ids.numel();
  Decoder d{};
  d.tokens = tokens, d.vocab = embedding.size(0), d.width = embedding.size(1), d.kept = keep.numel();
  d.heads = sizes[0], d.key_heads = sizes[1], d.size = sizes[2], d.hidden = sizes[3], d.has_unit = sizes[4];
  d.eps = float(eps), d.scale = float(scale);
  STD_TORCH_CHECK(d.key_heads > 0 && d.heads % d.key_heads == 0 && d.size % 16 == 0 && d.size >= 32 &&
                      d.size <= max_size, "the head's size is no multiple of 16 from 32 to 256");
  check(embedding, ScalarType::BFloat16, d.vocab * d.width, "embedding");
  check(weights, ScalarType::BFloat16, weights.numel(), "weights");
  check(places, ScalarType::Long, (count + 1) * slots, "places");
  check(windows, ScalarType::Long, count, "windows");
  check(ids, ScalarType::Long, tokens, "ids");
  check(keep, ScalarType::Long, d.kept, "keep");
  check(cos, ScalarType::BFloat16, tokens * d.size, "cos");
  check(sin, ScalarType::BFloat16, tokens * d.size, "sin");
  check(logits, ScalarType::BFloat16, d.kept * d.vocab, "logits");
  for (const auto* x : {&prompt_k, &prompt_v, &completion_k, &completion_v})
    STD_TORCH_CHECK(int64_t(x->size()) == count, "there must be a cache for every layer");
  d.ids = in<int64_t>(ids), d.keep = in<int64_t>(keep);
  for (int64_t i = 0; i < tokens; ++i) STD_TORCH_CHECK(0 <= d.ids[i] && d.ids[i] < d.vocab, "an id is none");
  for (int64_t i = 0; i < d.kept; ++i) STD_TORCH_CHECK(0 <= d.keep[i] && d.keep[i] < tokens, "keep has no such token");
  d.embedding = in<bf16>(embedding), d.cos = in<bf16>(cos), d.sin = in<bf16>(sin), d.logits = out<bf16>(logits);

  const int64_t rows = blocks_of(tokens, tile_rows) * tile_rows;
  check(scratch, ScalarType::BFloat16, scratch.numel(), "scratch");
  int64_t taken = 0;
  const auto take = [&](int64_t elements) {
    bf16* found = out<bf16>(scratch) + taken;
    taken += elements;
    STD_TORCH_CHECK(taken <= scratch.numel(), "scratch is too small");
    return found;
  };
  const auto tiled = [&](int64_t columns) {
    const int64_t steps = blocks_of(columns, tile_width);
    return TiledRows{take(rows * steps * tile_width), steps};
  };
  d.normed = tiled(d.width), d.attended = tiled(d.heads * d.size), d.product = tiled(d.hidden);
  d.x = take(rows * d.width), d.queries = take(rows * d.heads * d.size);

  const Places of(group, seen, length, chunks, tokens);
  const Order order(of.group, tokens, d.tokens_per_block());
  d.order = &order;
  const bf16* base = in<bf16>(weights);
  const int64_t* place = in<int64_t>(places);
  const auto weight = [=](int64_t layer, int64_t slot) {
    const int64_t from = place[layer * slots + slot];
    return from < 0 ? nullptr : base + from;
  };
  const RowsOf<bf16> queries(d.queries, d.size, d.heads * d.size);
  for (int64_t l = 0; l < count; ++l) {
    STD_TORCH_CHECK(prompt_k[l].dim() == 4 && prompt_k[l].size(1) == d.key_heads && prompt_k[l].size(3) == d.size,
                    "a cache does not belong to the model");
    d.layers.push_back({weight(l, 0), weight(l, 1), weight(l, 2), weight(l, 3), weight(l, 4), weight(l, 5),
                        weight(l, 6), weight(l, 7), weight(l, 8),
                        of.attention<bf16>(queries, d.shared(), prompt_k[l], prompt_v[l], completion_k[l],
                                           completion_v[l], order.tokens.data(), in<int64_t>(windows)[l])});
  }
  d.final_norm = weight(count, 0);
  d.plan(weight(count, 1));
  d.run();
#else
  STD_TORCH_CHECK(false, "this build cannot multiply bf16");
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(strop, m) {
  m.def("cpu_use_huge_pages(Tensor(a!) x) -> ()");
  m.def(
      "cpu_decoder_step(Tensor weights, Tensor places, Tensor embedding, int[] sizes, Tensor windows, float eps,"
      " float scale, Tensor ids, Tensor cos, Tensor sin, Tensor(a!)[] prompt_k, Tensor(b!)[] prompt_v,"
      " Tensor(c!)[] completion_k, Tensor(d!)[] completion_v, Tensor chunks, Tensor group, Tensor seen, Tensor length,"
      " Tensor keep, Tensor(e!) scratch, Tensor(f!) logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(strop, CPU, m) {
  m.impl("cpu_use_huge_pages", TORCH_BOX(&use_huge_pages));
  m.impl("cpu_decoder_step", TORCH_BOX(&decoder_step));
}
