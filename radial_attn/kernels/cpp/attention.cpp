// Computes block-sparse attention in float32 on a CPU: forward with log-sum-exp, and gradients.
//
// Keys are stored in panels of 16 tokens, transposed: one vector holds one feature of 16 keys. A task is a
// block of query rows of one head. It walks the panels that the mask keeps for it, a chunk at a time, with
// the online softmax of FlashAttention. No sum depends on the number of threads.

#include <cmath>
#include <limits>

#include "problem.h"
#include "products.h"

namespace {

using namespace radial;

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float INF = std::numeric_limits<float>::infinity();

// holds the working memory of one thread
struct Scratch {
    std::vector<float> scores, slopes, out, query, grad;
    std::vector<Index> panels, means;
    Scratch(const Problem& is, bool backward)
        : scores(TILE * SCORES), slopes(backward ? TILE * SCORES : 0), out(TILE * is.wide()),
          query(TILE * is.wide()), grad(backward ? TILE * is.wide() : 0) {
        panels.reserve(is.padded() / PANEL);
    }
};

// calls run(panels, count) for each chunk of a thread's panels
template <class Function>
void over_chunks(const std::vector<Index>& panels, Function run) {
    int all = static_cast<int>(panels.size());
    for (int i = 0; i < all; i += CHUNK) run(panels.data() + i, std::min(CHUNK, all - i));
}

// sets the scores of tokens that do not count, in the last panel, to -inf
void hide_padding(float* scores, int rows, const Index* which, int count, Index limit) {
    Index last = which[count - 1] * PANEL, valid = std::min<Index>(PANEL, limit - last);
    for (int r = 0; r < rows && valid < PANEL; ++r) {
        float* panel = scores + r * SCORES + (count - 1) * PANEL;
        std::fill(panel + valid, panel + PANEL, -INF);
    }
}

// turns scores of one row into weights, exp(score - the largest so far), and rescales earlier sums
void soften(float* scores, int columns, float& largest, float& total, float* out, Index wide) {
    Vector most = load(scores);
    for (int j = LANES; j < columns; j += LANES) {
        Vector x = load(scores + j);
        most = x > most ? x : most;
    }
    float top = std::max(largest, largest_of(most));
    float keep = largest == -INF ? 0.0f : std::exp(largest - top);
    Vector sum = {};
    for (int j = 0; j < columns; j += LANES) {
        Vector x = power_of_two((load(scores + j) - top) * LOG2E);
        store(scores + j, x);
        sum += x;
    }
    total = total * keep + sum_of(sum);
    largest = top;
    for (Index d = 0; d < wide && keep != 1.0f; d += LANES) store(out + d, load(out + d) * keep);
}

// holds the means of all key blocks, which stand for the blocks that a query drops
struct Far {
    Problem is;                  // its tokens are the blocks
    const float *keys, *values;  // panels and rows of all heads
    const float *bias;           // added to the scores, [samples or 1][heads or 1][query blocks][blocks]
    const float *first;          // first-order term of each query, [B, S, H, D], or null
    Index samples, heads;        // of the bias

    const float* bias_of(Index b, Index h, Index block) const {
        Index place = (samples == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
        return bias + (place * queries + block) * is.tokens;
    }
    Index queries;

    // lists the panels in which the query block drops any block
    void panels_of(const float* row, std::vector<Index>& panels) const {
        panels.clear();
        for (Index first = 0; first < is.tokens; first += PANEL) {
            const float* stop = row + std::min(first + PANEL, is.tokens);
            if (std::any_of(row + first, stop, [](float x) { return x != -INF; })) panels.push_back(first / PANEL);
        }
    }
};

struct Forward {
    const Problem& is;
    Strided query;
    const float *keys, *values;  // panels and rows of all heads
    float scale, *out, *lse;
    const Far* far;

    // adds the far field to empty sums
    void add_far(Index b, Index h, Index first, int rows, Scratch& own, float* largest, float* total) const {
        Index wide = is.wide(), head = (b * is.heads + h) * far->is.per_head();
        const float* bias = far->bias_of(b, h, first / is.size);
        float* scores = own.scores.data();
        far->panels_of(bias, own.means);
        over_chunks(own.means, [&](const Index* which, int count) {
            scores_of(scores, own.query.data(), rows, far->keys + head, which, count, wide);
            alignas(64) float more[SCORES];
            for (int i = 0; i < count; ++i)
                for (Index j = 0, at = which[i] * PANEL; j < PANEL; ++j, ++at)
                    more[i * PANEL + j] = at < far->is.tokens ? bias[at] : -INF;
            for (int r = 0; r < rows; ++r) {
                float* row = scores + r * SCORES;
                for (int j = 0; j < count * PANEL; j += LANES) store(row + j, load(row + j) + load(more + j));
                soften(row, count * PANEL, largest[r], total[r], &own.out[r * wide], wide);
            }
            add_weighted(own.out.data(), scores, rows, far->values + head, which, count, wide);
        });
        for (int r = 0; far->first && r < rows && first + r < is.tokens; ++r) {
            const float* from = far->first + ((b * is.tokens + first + r) * is.heads + h) * is.width;
            for (Index d = 0; d < is.width; ++d) own.out[r * wide + d] += total[r] * from[d];
        }
    }

    void tile(Index b, Index h, Index first, int rows, Scratch& own) const {
        Index wide = is.wide(), head = (b * is.heads + h) * is.per_head();
        float largest[TILE], total[TILE] = {}, *scores = own.scores.data();
        std::fill(largest, largest + rows, -INF);
        std::fill(own.out.begin(), own.out.end(), 0.0f);
        pack_rows(own.query.data(), query, is, b, h, first, first + rows, scale);
        own.means.clear();
        if (far) add_far(b, h, first, rows, own, largest, total);
        over_chunks(own.panels, [&](const Index* which, int count) {
            scores_of(scores, own.query.data(), rows, keys + head, which, count, wide);
            hide_padding(scores, rows, which, count, is.limits[b]);
            for (int r = 0; r < rows; ++r)
                soften(scores + r * SCORES, count * PANEL, largest[r], total[r], &own.out[r * wide], wide);
            add_weighted(own.out.data(), scores, rows, values + head, which, count, wide);
        });
        for (int r = 0; r < rows && first + r < is.tokens; ++r) {
            Index place = (b * is.tokens + first + r) * is.heads + h;
            bool none = (own.panels.empty() && own.means.empty()) || first + r >= is.limits[b];
            float share = 1.0f / total[r], *to = out + place * is.width;
            for (Index d = 0; d < is.width; ++d) to[d] = none ? 0.0f : own.out[r * wide + d] * share;
            lse[place] = none ? -INF : largest[r] + std::log(total[r]);
        }
    }
};

struct Backward {
    const Problem& is;
    Strided grad, query, out;
    const float *lse, *keys, *values, *rows_of_keys;  // [B, S, H]; panels, panels and rows of all heads
    float scale, *to_query;

    // to_key, to_value: sums of one head and part, [padded][wide]
    void tile(Index b, Index h, Index first, int rows, Scratch& own, float* to_key, float* to_value) const {
        Index wide = is.wide(), head = (b * is.heads + h) * is.per_head();
        float shift[TILE], delta[TILE], *weights = own.scores.data(), *slopes = own.slopes.data();
        for (int r = 0; r < rows; ++r) prepare(b, h, first + r, shift[r], delta[r]);
        std::fill(own.out.begin(), own.out.end(), 0.0f);
        pack_rows(own.query.data(), query, is, b, h, first, first + rows, scale);
        pack_rows(own.grad.data(), grad, is, b, h, first, first + rows, 1.0f);
        over_chunks(own.panels, [&](const Index* which, int count) {
            scores_of(weights, own.query.data(), rows, keys + head, which, count, wide);
            hide_padding(weights, rows, which, count, is.limits[b]);
            scores_of(slopes, own.grad.data(), rows, values + head, which, count, wide);
            for (int r = 0; r < rows; ++r)
                for (int j = r * SCORES; j < r * SCORES + count * PANEL; j += LANES) {
                    Vector weight = power_of_two((load(weights + j) - shift[r]) * LOG2E);
                    store(weights + j, weight);
                    store(slopes + j, weight * (load(slopes + j) - delta[r]));
                }
            add_weighted(own.out.data(), slopes, rows, rows_of_keys + head, which, count, wide);
            add_transposed(to_value, weights, rows, own.grad.data(), which, count, wide);
            add_transposed(to_key, slopes, rows, own.query.data(), which, count, wide);
        });
        for (int r = 0; r < rows && first + r < is.tokens; ++r) {
            float* to = to_query + ((b * is.tokens + first + r) * is.heads + h) * is.width;
            for (Index d = 0; d < is.width; ++d) to[d] = own.out[r * wide + d] * scale;
        }
    }

    // reads log-sum-exp and sums gradient times output; exp(score - inf) is 0 for a row without keys
    void prepare(Index b, Index h, Index t, float& shift, float& delta) const {
        shift = INF, delta = 0;
        if (t >= is.limits[b]) return;
        float log = lse[(b * is.tokens + t) * is.heads + h];
        if (log != -INF) shift = log;
        const float *x = grad.at(b, t, h), *y = out.at(b, t, h);
        for (Index d = 0; d < is.width; ++d) delta += x[d] * y[d];
    }
};

// copies the keys of all heads to panels, and the values to rows
void pack_pair(const Problem& is, const Strided& key, const Strided& value, float* keys, float* values) {
    is.over_tokens([&](Index b, Index h, Index place, Index first, Index stop) {
        Index at = place * is.per_head() + first * is.wide();
        pack_panels(keys + at, key, is, b, h, first, stop);
        pack_rows(values + at, value, is, b, h, first, stop, 1.0f);
    });
}

// number of parts of the query rows that sum gradients of key and value separately; depends on length alone
Index parts_of(const Problem& is) { return std::max<Index>(1, std::min<Index>(4, is.tokens / 2048)); }

// adds the sums of all parts into gradients of key and value, [B, S, H, D]
void add_parts(const Problem& is, const float* sums, float* to_key, float* to_value) {
    Index each = is.per_head(), parts = parts_of(is);
    is.over_tokens([&](Index b, Index h, Index place, Index first, Index stop) {
        for (Index t = first; t < std::min(stop, is.tokens); ++t) {
            Index to = ((b * is.tokens + t) * is.heads + h) * is.width, from = t * is.wide();
            for (Index d = 0; d < is.width; ++d) {
                float by_key = 0, by_value = 0;
                for (Index part = place * parts; part < (place + 1) * parts && t < is.limits[b]; ++part) {
                    by_key += sums[2 * part * each + from + d];
                    by_value += sums[(2 * part + 1) * each + from + d];
                }
                to_key[to + d] = by_key;
                to_value[to + d] = by_value;
            }
        }
    });
}

}  // namespace

extern "C" {

// All functions take sizes batch, tokens, heads, width, block size, lists of blocks (1 or heads), threads;
// inputs [B, S, H, D] with a stride in numbers for sample, token and head each. Results are contiguous.

// returns how many float32 values of working memory a call needs
std::int64_t radial_workspace(const std::int64_t* sizes, int backward) {
    Problem is(sizes, nullptr, nullptr, nullptr);
    return is.batch * is.heads * is.per_head() * (backward ? 3 + 2 * parts_of(is) : 2);
}

// inputs: query, key, value. out [B, S, H, D], lse [B, S, H].
//
// With means the dropped blocks take part: their keys and values [B, K, H, D], the bias of Far and the
// first-order term, or null; far_sizes: K, and the samples and heads of the bias.
void radial_forward(const float* const* inputs, const std::int64_t* strides, const std::int64_t* sizes,
                    const std::int32_t* indptr, const std::int32_t* indices, const std::int64_t* limits,
                    float scale, float* work, float* out, float* lse, const float* const* means,
                    const std::int64_t* far_sizes) {
    Problem is(sizes, indptr, indices, limits);
    Index each = is.per_head(), blocks = is.blocks();
    float *keys = work, *values = work + is.batch * is.heads * each;
    Strided query(inputs[0], strides), key(inputs[1], strides + 3), value(inputs[2], strides + 6);
    pack_pair(is, key, value, keys, values);
    std::vector<float> pooled;
    std::vector<Index> counts;
    Far far{is, nullptr, nullptr, nullptr, nullptr, 1, 1, blocks};
    if (means) {
        far.is.tokens = far_sizes[0], far.samples = far_sizes[1], far.heads = far_sizes[2];
        counts.assign(is.batch, far.is.tokens);
        far.is.limits = counts.data();
        Index all = is.batch * is.heads * far.is.per_head();
        pooled.resize(2 * all);
        far.keys = pooled.data(), far.values = pooled.data() + all, far.bias = means[2], far.first = means[3];
        Index steps[3] = {far.is.tokens * is.heads * is.width, is.heads * is.width, is.width};
        pack_pair(far.is, {means[0], steps}, {means[1], steps}, pooled.data(), pooled.data() + all);
    }
    Forward forward{is, query, keys, values, scale, out, lse, means ? &far : nullptr};
    std::vector<Scratch> scratch(is.threads, Scratch(is, false));
    in_parallel(is.batch * is.heads * blocks, is.threads, [&](Index task, int thread) {
        Index place = task / blocks, block = task % blocks, b = place / is.heads, h = place % is.heads;
        is.panels_of(h, block, is.limits[b], scratch[thread].panels);
        is.over_tiles(block, [&](Index first, int rows) {
            forward.tile(b, h, first, rows, scratch[thread]);
        });
    });
}

// inputs: grad, query, key, value, out; lse of the forward. grads [B, S, H, D]: of query, key, value.
void radial_backward(const float* const* inputs, const std::int64_t* strides, const float* lse,
                     const std::int64_t* sizes, const std::int32_t* indptr, const std::int32_t* indices,
                     const std::int64_t* limits, float scale, float* work, float* const* grads) {
    Problem is(sizes, indptr, indices, limits);
    Index each = is.per_head(), all = is.batch * is.heads * each, blocks = is.blocks(), parts = parts_of(is);
    float *keys = work, *values = work + all, *rows_of_keys = work + 2 * all, *sums = work + 3 * all;
    Strided grad(inputs[0], strides), query(inputs[1], strides + 3), key(inputs[2], strides + 6);
    Strided value(inputs[3], strides + 9), out(inputs[4], strides + 12);
    is.over_tokens([&](Index b, Index h, Index place, Index first, Index stop) {
        Index at = place * each + first * is.wide();
        pack_panels(keys + at, key, is, b, h, first, stop);
        pack_panels(values + at, value, is, b, h, first, stop);
        pack_rows(rows_of_keys + at, key, is, b, h, first, stop, 1.0f);
    });
    Backward backward{is, grad, query, out, lse, keys, values, rows_of_keys, scale, grads[0]};
    std::vector<Scratch> scratch(is.threads, Scratch(is, true));
    in_parallel(is.batch * is.heads * parts, is.threads, [&](Index task, int thread) {
        Index place = task / parts, part = task % parts, b = place / is.heads, h = place % is.heads;
        float *to_key = sums + 2 * task * each, *to_value = to_key + each;
        std::fill(to_key, to_key + 2 * each, 0.0f);
        for (Index block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
            is.panels_of(h, block, is.limits[b], scratch[thread].panels);
            is.over_tiles(block, [&](Index first, int rows) {
                backward.tile(b, h, first, rows, scratch[thread], to_key, to_value);
            });
        }
    });
    add_parts(is, sums, grads[1], grads[2]);
}

}  // extern "C"
