// The part of CUDA that the kernels need, on the processor: g++ compiles them unchanged, runs them,
// and detects lanes that miss a shuffle. For tests on machines without a GPU.
//
// One block runs at a time. Each thread of the block is a fiber that runs until it calls a function
// of the whole warp. Threads and blocks take turns in an order drawn from a seed. A warp continues
// when all lanes of the mask have arrived at the same kind of call. A lane that arrives with another
// mask, or never, aborts the process with a message. Shared memory starts with invalid content.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

struct uint2 {
  unsigned x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }

template <typename T>
T* check_alignment(T* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    std::fprintf(stderr, "%s of %zu bytes at %p: misaligned\n", what, sizeof(T), (void*)address);
    std::abort();
  }
  return address;
}
template <typename T>
T __ldg(const T* address) {
  return *check_alignment(address, "read");
}
template <typename T>
T atomicAdd(T* address, T x) {
  const T before = *check_alignment(address, "atomic addition");
  *address = before + x;
  return before;
}
#if __CUDA_ARCH__ >= 900
inline float4 atomicAdd(float4* address, float4 x) {
  const float4 before = *check_alignment(address, "atomic addition");
  *address = {before.x + x.x, before.y + x.y, before.z + x.z, before.w + x.w};
  return before;
}
#endif

namespace emulation {

[[noreturn]] inline void fail(const char* message, int thread) {
  std::fprintf(stderr, "block %u %u %u, thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               thread, message);
  std::abort();
}

enum class Call { NONE, SHUFFLE, ALL, SYNC };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_finished, is_waiting;
  Call call;
  unsigned mask;
  int distance;
  uint64_t given, received;
};

constexpr size_t STACK_BYTES = 128 * 1024, SHARED_BYTES = 48 * 1024;
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline int current;
inline std::mt19937 order;
inline const std::function<void()>* kernel;

inline void run_kernel() {
  (*kernel)();
  threads[current].is_finished = true;
  swapcontext(&threads[current].context, &scheduler);
}

// Makes a thread wait at a function of the warp, and returns what the others gave.
inline uint64_t meet(Call call, unsigned mask, int distance, uint64_t given) {
  Thread& thread = threads[current];
  if (!(mask >> (current % 32) & 1)) fail("is not in its own mask", current);
  thread.call = call;
  thread.mask = mask;
  thread.distance = distance;
  thread.given = given;
  thread.is_waiting = true;
  swapcontext(&thread.context, &scheduler);
  return thread.received;
}

inline bool is_in(unsigned mask, int lane) { return mask >> lane & 1; }

// Releases the lanes of one mask if all of them wait. Returns whether it did.
inline bool release(int first_thread, int leader) {
  const Thread& example = threads[leader];
  const int end = std::min<int>(first_thread + 32, threads.size());
  for (int lane = 0; lane < 32; ++lane) {
    if (!is_in(example.mask, lane)) continue;
    const int i = first_thread + lane;
    if (i >= end) fail("has a lane in its mask that the block does not have", leader);
    if (threads[i].is_finished) fail("waits for a lane that has ended", leader);
    if (!threads[i].is_waiting) return false;
    if (threads[i].call != example.call || threads[i].mask != example.mask ||
        threads[i].distance != example.distance) {
      fail("has a lane in its mask that waits at another call", leader);
    }
  }
  bool all = true;
  for (int i = first_thread; i < end; ++i) {
    if (is_in(example.mask, i % 32)) all = all && threads[i].given;
  }
  const unsigned mask = example.mask;
  for (int i = first_thread; i < end; ++i) {
    if (!is_in(mask, i % 32)) continue;
    Thread& thread = threads[i];
    thread.is_waiting = false;
    if (thread.call == Call::ALL) thread.received = all;
    if (thread.call != Call::SHUFFLE) continue;
    const int other = i % 32 ^ thread.distance;
    if (!is_in(mask, other)) fail("shuffles with a lane outside of its mask", i);
    thread.received = threads[first_thread + other].given;
  }
  return true;
}

inline void run_block(int num_threads) {
  std::vector<int> turns;
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK_BYTES;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_kernel, 0);
    thread.is_finished = thread.is_waiting = false;
    turns.push_back(i);
  }
  for (;;) {
    bool has_moved = false, is_done = true;
    std::shuffle(turns.begin(), turns.end(), order);
    for (int i : turns) {
      if (threads[i].is_finished) continue;
      is_done = false;
      if (threads[i].is_waiting) continue;
      current = i;
      threadIdx = dim3(i, 0, 0);
      has_moved = true;
      swapcontext(&scheduler, &threads[i].context);
    }
    if (is_done) return;
    for (int i = 0; i < num_threads; ++i) {
      if (threads[i].is_waiting && release(i / 32 * 32, i)) has_moved = true;
    }
    if (!has_moved) fail("waits forever", turns[0]);
  }
}

}  // namespace emulation

alignas(128) inline int4 shared[emulation::SHARED_BYTES / sizeof(int4)];

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = emulation::meet(emulation::Call::SHUFFLE, mask, distance, bits);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}
inline bool __all_sync(unsigned mask, bool x) {
  return emulation::meet(emulation::Call::ALL, mask, 0, x);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::meet(emulation::Call::SYNC, mask, 0, 0);
}

// Functions that the host calls.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace emulation;
  const int num_threads = int(config->blockDim.x);
  const dim3 grid = config->gridDim;
  if (num_threads % 32 || num_threads > 1024 || config->dynamicSmemBytes > SHARED_BYTES ||
      !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  while (int(threads.size()) < num_threads) {
    threads.push_back({});
    threads.back().stack = std::make_unique<char[]>(STACK_BYTES);
  }
  const std::tuple<std::remove_const_t<Parameters>...> parameters(arguments...);
  const std::function<void()> call = [&] { std::apply(kernel, parameters); };
  emulation::kernel = &call;
  blockDim = config->blockDim;
  gridDim = grid;
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back(dim3(x, y, z));
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (const dim3& block : blocks) {
    blockIdx = block;
    std::memset(shared, 0xff, sizeof(shared));
    run_block(num_threads);
    for (size_t i = config->dynamicSmemBytes; i < sizeof(shared); ++i) {
      if (reinterpret_cast<unsigned char*>(shared)[i] != 0xff) {
        fail("wrote behind the shared memory that the launch requested", 0);
      }
    }
  }
  return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) void emulation_seed(unsigned seed) {
  emulation::order.seed(seed);
}
