// Float vectors of the width of this build's instruction set, as the compiler's own vector types:
// the same source becomes AVX-512, AVX2, SSE or NEON instructions.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef INSTRUCTION_SET
#define INSTRUCTION_SET base
#endif

// One namespace per instruction set. Otherwise the linker would use one version for all.
namespace deta {
inline namespace INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Indices __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));

// The upper half of a float32, which is how PyTorch stores a bfloat16.
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void store_rounded(float* to, float x) { *to = x; }
inline void store_rounded(double* to, double x) { *to = x; }
inline void store_rounded(BFloat16* to, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

inline Vector load(const float* from) {
  Vector result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof(x)); }

inline void store(BFloat16* to, Vector x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfWords halves = __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0, HalfWords);
  std::memcpy(to, &halves, sizeof(halves));
}

// Sums kLanes vectors at once, in about three instructions per vector. Lane 4·j + i of the result
// is the sum of all lanes of x[4·j + i].
inline Vector sums(const Vector (&x)[kLanes]) {
  constexpr int quads = kLanes / 4;
  Indices even, odd;  // in each 128 bits: lanes 0 and 2 of both operands; lanes 1 and 3
  for (int lane = 0; lane < kLanes; ++lane) {
    const int first = lane / 4 * 4 + lane % 2 * 2 + (lane % 4 / 2) * kLanes;
    even[lane] = first;
    odd[lane] = first + 1;
  }
  const auto fold = [&](Vector a, Vector b) {
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  };
  Vector quad[quads];  // in each 128 bits, the partial sums of four vectors
  for (int j = 0; j < quads; ++j)
    quad[j] = fold(fold(x[4 * j], x[4 * j + 1]), fold(x[4 * j + 2], x[4 * j + 3]));
  if constexpr (quads == 1) {
    return quad[0];
  } else if constexpr (quads == 2) {
    Indices low, high;
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane % 4 + lane / 4 * kLanes;
      high[lane] = low[lane] + 4;
    }
    return __builtin_shuffle(quad[0], quad[1], low) + __builtin_shuffle(quad[0], quad[1], high);
  } else {
    Indices low, high;  // the first and the second 128 bits of each 256, of both operands
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane % 4 + (lane / 4 % 2) * 8 + lane / 8 * kLanes;
      high[lane] = low[lane] + 4;
    }
    const auto halve = [&](Vector a, Vector b) {
      return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    };
    return halve(halve(quad[0], quad[1]), halve(quad[2], quad[3]));
  }
}

// Returns e^x to about one unit in the last place, in a form that compilers vectorise.
inline float exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // rounds x/ln 2 to an integer
  const float whole = shifted - 12582912.0f;
  const float rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float series = 1.9875691500e-4f;  // Cephes' minimax polynomial on ±ln 2 / 2
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  const float result = series * rest * rest + rest + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // the integer is in the lowest bits of `shifted`
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < -87.0f ? 0.0f : result * scale;
}

inline double exponential(double x) { return std::exp(x); }

}  // namespace INSTRUCTION_SET
}  // namespace deta
