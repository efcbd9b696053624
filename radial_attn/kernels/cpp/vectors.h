// Defines float32 vectors with compiler extensions, so one source serves AVX-512, AVX2 and NEON.
#pragma once

#include <cstdint>
#include <utility>

namespace radial {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, MOST = 3;  // accumulators: ROWS x MOST panels in 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4, MOST = 1;
#else
constexpr int LANES = 4, ROWS = 4, MOST = 1;
#endif
constexpr int PANEL = 16, PARTS = PANEL / LANES;  // numbers in a panel's row, and vectors that hold them

using Index = std::int64_t;
typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef std::int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }
inline Vector all(float x) { return x - Vector{}; }

// returns 2 ** x for x <= 127, within 2e-7; the value at -126 for lower x; NaN for NaN
inline Vector power_of_two(Vector x) {
    const Vector shift = all(12582912.0f);  // 1.5 * 2 ** 23: a sum with it is rounded to an integer
    Vector bounded = x < -126.0f ? all(-126.0f) : x;
    Vector rounded = bounded + shift;
    Vector rest = bounded - (rounded - shift);
    Vector y = all(1.540353039e-4f);  // ln(2) ** 6 / 6!, then the lower terms down to 1
    y = y * rest + 1.333355815e-3f;
    y = y * rest + 9.618129108e-3f;
    y = y * rest + 5.550410866e-2f;
    y = y * rest + 2.402265070e-1f;
    y = y * rest + 6.931471806e-1f;
    y = y * rest + 1.0f;
    y = (Vector)((Integers)y + ((Integers)rounded << 23));
    return x == x ? y : x;
}

inline float sum_of(Vector x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}

inline float largest_of(Vector x) {
    float largest = x[0];
    for (int i = 1; i < LANES; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// swaps x[i][j] and x[j][i]
template <int STEP, int... LANE>
inline void transpose(Vector (&x)[LANES], std::integer_sequence<int, LANE...> lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
        if (i & STEP) continue;
        Vector a = x[i], b = x[i + STEP];
        x[i] = SHUFFLE(a, b, (LANE & STEP ? LANES + LANE - STEP : LANE)...);
        x[i + STEP] = SHUFFLE(a, b, (LANE & STEP ? LANES + LANE : LANE + STEP)...);
    }
    if constexpr (STEP > 1) transpose<STEP / 2>(x, lanes);
}

}  // namespace radial
