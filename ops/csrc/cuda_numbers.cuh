// How the CUDA kernels read, add and write numbers.
//
// Values are double, float, half or bfloat16. Arithmetic is in double for double values and in
// float for all others.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__device__ inline Arithmetic<T> widen(T x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(x);
  } else {
    return x;
  }
}

template <typename T>
__device__ inline T narrow(Arithmetic<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// The type of one access to BYTES bytes.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Reads COUNT neighbours in one access, from memory that no kernel of this library is writing.
template <typename T, int COUNT>
__device__ inline auto read_word(const void* from) {
  return __ldg(static_cast<const typename Word<sizeof(T) * COUNT>::type*>(from));
}

template <typename T, int COUNT, typename Access>
__device__ inline void unpack(const Access& word, Arithmetic<T> (&to)[COUNT]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && COUNT % 2 == 0) {
    // A bfloat16 is the upper half of a float: this takes one instruction, CUDA's own function two.
    unsigned pairs[COUNT / 2];
    std::memcpy(pairs, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      to[i] = __uint_as_float(pairs[i / 2] << 16);
      to[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
    }
  } else {
    T numbers[COUNT];
    std::memcpy(numbers, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = widen(numbers[i]);
  }
}

template <typename T, int COUNT>
__device__ inline void read(const T* from, Arithmetic<T> (&to)[COUNT]) {
  unpack<T>(read_word<T, COUNT>(from), to);
}

// Writes COUNT neighbours in one access.
template <typename T, int COUNT>
__device__ inline void write(T* to, const Arithmetic<T> (&from)[COUNT]) {
  using Access = typename Word<sizeof(T) * COUNT>::type;
  T numbers[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) numbers[i] = narrow<T>(from[i]);
  Access word;
  std::memcpy(&word, numbers, sizeof(word));
  *reinterpret_cast<Access*>(to) = word;
}

// Makes the compiler keep an address in registers. Otherwise it recomputes some addresses for every
// use, which takes more instructions than the use itself.
template <typename Pointer>
__device__ inline Pointer kept(Pointer address) {
#ifdef __CUDACC__
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// Numbers that are either in the dtype T of the values or in that of the arithmetic. It is the same
// for a complete launch, so no warp diverges. Numbers are read early, and widened when needed.
template <typename T, int COUNT>
struct Either {
  using Raw = typename Word<sizeof(Arithmetic<T>) * COUNT>::type;

  void* numbers;
  bool is_narrow;  // in T

  __device__ void* at(int64_t i) const {
    const int bytes = COUNT * int(is_narrow ? sizeof(T) : sizeof(Arithmetic<T>));
    return static_cast<char*>(numbers) + i * bytes;
  }

  // Returns the same numbers, starting with the i-th.
  __device__ Either from(int64_t i) const { return {kept(at(i)), is_narrow}; }

  __device__ Raw get(int i) const {
    const void* const place = at(i);
    if (!is_narrow) return read_word<Arithmetic<T>, COUNT>(place);
    const auto word = read_word<T, COUNT>(place);
    Raw raw = {};
    std::memcpy(&raw, &word, sizeof(word));
    return raw;
  }

  __device__ void widen(const Raw& raw, Arithmetic<T> (&to)[COUNT]) const {
    if (!is_narrow) {
      unpack<Arithmetic<T>>(raw, to);
    } else {
      typename Word<sizeof(T) * COUNT>::type word;
      std::memcpy(&word, &raw, sizeof(word));
      unpack<T>(word, to);
    }
  }

  __device__ void set(int i, const Arithmetic<T> (&from)[COUNT]) const {
    if (is_narrow) {
      write(static_cast<T*>(at(i)), from);
    } else {
      write(static_cast<Arithmetic<T>*>(at(i)), from);
    }
  }
};

// Adds to four neighbours: one instruction since compute capability 9.0, four before.
__device__ inline void add_four(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(a, b, c, d));
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

__device__ inline long long round_to_integer(float x) { return __float2ll_rn(x); }
__device__ inline long long round_to_integer(double x) { return __double2ll_rn(x); }

// Sums of integers are the same in any order, unlike sums of floating-point numbers.
__device__ inline void add_integer(long long* to, long long x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
}
