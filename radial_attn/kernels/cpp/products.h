// Multiplies matrices for attention on panels: ROWS x MOST panels of sums stay in registers.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace radial {

constexpr int CHUNK = 24;  // panels of keys whose scores are held at once
constexpr int SCORES = CHUNK * PANEL;

template <int COUNT>
struct Sums {
    Vector of[ROWS][COUNT][PARTS] = {};

    // calls run(row, offset in it, vector) for all of them
    template <class Function>
    inline void each(Function run) {
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
            for (int p = 0; p < COUNT; ++p)
#pragma GCC unroll 4
                for (int i = 0; i < PARTS; ++i) run(m, p * PANEL + i * LANES, of[m][p][i]);
    }

    inline void read(const float* from, Index pitch) {
        each([=](int m, int at, Vector& x) { x = load(from + m * pitch + at); });
    }

    inline void write(float* to, Index pitch) {
        each([=](int m, int at, Vector& x) { store(to + m * pitch + at, x); });
    }

    // adds to of[m][p] the sum over k < depth of a[m along + k step] * b[p][k pitch ... + 16]
    inline void add(const float* a, Index along, Index step, const float* const (&b)[COUNT], Index pitch,
                    Index depth) {
        for (Index k = 0; k < depth; ++k) {
            Vector x[COUNT][PARTS];
#pragma GCC unroll 4
            for (int p = 0; p < COUNT; ++p)
#pragma GCC unroll 4
                for (int i = 0; i < PARTS; ++i) x[p][i] = load(b[p] + k * pitch + i * LANES);
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; ++m) {
                Vector factor = all(a[m * along + k * step]);
#pragma GCC unroll 4
                for (int p = 0; p < COUNT; ++p)
#pragma GCC unroll 4
                    for (int i = 0; i < PARTS; ++i) of[m][p][i] += factor * x[p][i];
            }
        }
    }
};

// calls run(first, constant number) over `count` panels, as many at once as registers can hold
template <class Function>
inline void by_panels(int count, Function run) {
    int i = 0;
    if constexpr (MOST >= 3) {
        for (; count - i >= 3 && count - i != 4; i += 3) run(i, std::integral_constant<int, 3>());
        for (; count - i >= 2; i += 2) run(i, std::integral_constant<int, 2>());
    }
    for (; i < count; ++i) run(i, std::integral_constant<int, 1>());
}

// scores [rows][16 count] = a [rows][wide] times the panels in `which`, [wide][16] each
inline void scores_of(float* scores, const float* a, int rows, const float* panels, const Index* which,
                      int count, Index wide) {
    by_panels(count, [&](int first, auto number) {
        constexpr int COUNT = decltype(number)::value;
        const float* b[COUNT];
        for (int p = 0; p < COUNT; ++p) b[p] = panels + which[first + p] * PANEL * wide;
        for (int m = 0; m < rows; m += ROWS) {
            Sums<COUNT> sums;
            sums.add(a + m * wide, wide, 1, b, PANEL, wide);
            sums.write(scores + m * SCORES + first * PANEL, SCORES);
        }
    });
}

// out [rows][wide] += weights [rows][16 count] times the rows of b in the panels of `which`
inline void add_weighted(float* out, const float* weights, int rows, const float* b, const Index* which,
                         int count, Index wide) {
    by_panels(static_cast<int>(wide / PANEL), [&](int first, auto number) {
        constexpr int COUNT = decltype(number)::value;
        for (int m = 0; m < rows; m += ROWS) {
            Sums<COUNT> sums;
            float* to = out + m * wide + first * PANEL;
            sums.read(to, wide);
            for (int i = 0; i < count; ++i) {
                const float* columns[COUNT];
                for (int p = 0; p < COUNT; ++p) columns[p] = b + (which[i] * wide + first + p) * PANEL;
                sums.add(weights + m * SCORES + i * PANEL, SCORES, 1, columns, wide, PANEL);
            }
            sums.write(to, wide);
        }
    });
}

// rows of out in the panels of `which` += weights [rows][16 count] transposed times b [rows][wide]
inline void add_transposed(float* out, const float* weights, int rows, const float* b, const Index* which,
                           int count, Index wide) {
    by_panels(static_cast<int>(wide / PANEL), [&](int first, auto number) {
        constexpr int COUNT = decltype(number)::value;
        const float* columns[COUNT];
        for (int p = 0; p < COUNT; ++p) columns[p] = b + (first + p) * PANEL;
        for (int i = 0; i < count; ++i)
            for (int m = 0; m < PANEL; m += ROWS) {
                Sums<COUNT> sums;
                float* to = out + (which[i] * PANEL + m) * wide + first * PANEL;
                sums.read(to, wide);
                sums.add(weights + i * PANEL + m, 1, SCORES, columns, wide, rows);
                sums.write(to, wide);
            }
    });
}

}  // namespace radial
