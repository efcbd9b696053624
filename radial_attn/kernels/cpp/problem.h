// Holds the arguments of a call, reads its tensors, and shares its work among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "vectors.h"

namespace radial {

constexpr int TILE = 64;  // most query rows of a task at once

// calls run(task, thread) for every task, each on the next free thread
template <class Function>
void in_parallel(Index tasks, int threads, Function run) {
    threads = static_cast<int>(std::max<Index>(1, std::min<Index>(threads, tasks)));
    std::atomic<Index> next{0};
    auto work = [&](int thread) {
        for (Index task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task, thread);
    };
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) work(thread);
#else
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
#endif
}

struct Problem {
    Index batch, tokens, heads, width, size;  // size: tokens of a block
    Index lists;                              // 1, or as many as heads
    int threads;
    const std::int32_t *indptr, *indices;  // CSR of kept key blocks, ascending; offsets [lists][blocks + 1]
    const Index* limits;                   // tokens of each sample that count

    Problem(const Index* sizes, const std::int32_t* indptr, const std::int32_t* indices, const Index* limits)
        : batch(sizes[0]), tokens(sizes[1]), heads(sizes[2]), width(sizes[3]), size(sizes[4]),
          lists(sizes[5]), threads(static_cast<int>(sizes[6])), indptr(indptr), indices(indices),
          limits(limits) {}

    Index blocks() const { return (tokens + size - 1) / size; }
    Index padded() const { return (tokens + PANEL - 1) / PANEL * PANEL; }
    Index wide() const { return (width + PANEL - 1) / PANEL * PANEL; }
    Index per_head() const { return padded() * wide(); }

    // lists the panels with tokens that count, in the blocks that query block `row` keeps
    void panels_of(Index head, Index row, Index limit, std::vector<Index>& panels) const {
        panels.clear();
        Index at = (lists == 1 ? 0 : head * (blocks() + 1)) + row;
        for (Index i = indptr[at]; i < indptr[at + 1]; ++i) {
            Index first = indices[i] * size, end = std::min(first + size, limit);
            for (Index token = first; token < end; token += PANEL) panels.push_back(token / PANEL);
        }
    }

    // calls run(first, rows) for each tile of a block of query rows
    template <class Function>
    void over_tiles(Index block, Function run) const {
        Index stop = std::min((block + 1) * size, padded());
        for (Index first = block * size; first < stop; first += TILE)
            run(first, static_cast<int>(std::min<Index>(TILE, stop - first)));
    }

    // calls run(sample, head, index of both, first, stop) for each piece of the padded tokens of every head
    template <class Function>
    void over_tokens(Function run) const {
        constexpr Index piece = 256;
        Index pieces = (padded() + piece - 1) / piece;
        in_parallel(batch * heads * pieces, threads, [&](Index task, int) {
            Index place = task / pieces, first = task % pieces * piece;
            run(place / heads, place % heads, place, first, std::min(first + piece, padded()));
        });
    }
};

// reads a tensor [B, S, H, D] with a contiguous last dimension; strides in numbers
struct Strided {
    const float* data;
    Index sample, token, head;
    Strided(const float* data, const Index* strides)
        : data(data), sample(strides[0]), token(strides[1]), head(strides[2]) {}
    const float* at(Index b, Index t, Index h) const { return data + b * sample + t * token + h * head; }
};

// copies rows `first` to `stop` of one head, [stop - first][wide], times `factor`; zeros if not counted
inline void pack_rows(float* __restrict to, const Strided& from, const Problem& is, Index b, Index h,
                      Index first, Index stop, float factor) {
    for (Index t = first; t < stop; ++t, to += is.wide()) {
        Index end = t < is.limits[b] ? is.width : 0, d = 0;
        const float* __restrict row = end ? from.at(b, t, h) : nullptr;
        for (; d + LANES <= end; d += LANES) store(to + d, load(row + d) * factor);
        for (; d < end; ++d) to[d] = row[d] * factor;
        for (; d < is.wide(); ++d) to[d] = 0;
    }
}

// copies the same tokens transposed, panel by panel, [panels][wide][16]
inline void pack_panels(float* __restrict to, const Strided& from, const Problem& is, Index b, Index h,
                        Index first, Index stop) {
    Index wide = is.wide();
    for (Index t = first; t < stop; t += PANEL, to += wide * PANEL) {
        Index valid = std::max<Index>(0, std::min<Index>(PANEL, is.limits[b] - t)), done = 0;
        if (valid < PANEL || is.width < wide) std::memset(to, 0, sizeof(float) * wide * PANEL);
        for (; valid == PANEL && done + LANES <= is.width; done += LANES)
            for (int j = 0; j < PANEL; j += LANES) {
                Vector x[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) x[i] = load(from.at(b, t + j + i, h) + done);
                transpose<LANES / 2>(x, std::make_integer_sequence<int, LANES>());
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) store(to + (done + i) * PANEL + j, x[i]);
            }
        for (Index j = 0; j < valid; ++j)
            for (Index d = done; d < is.width; ++d) to[d * PANEL + j] = from.at(b, t + j, h)[d];
    }
}

}  // namespace radial
