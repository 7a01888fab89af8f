// Work shared among threads, on PyTorch's own thread pool if it is available.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "vectors.h"

namespace deta {
inline namespace INSTRUCTION_SET {

// PyTorch's `torch_parallel_for`, a plain C function since 2.10. Python passes in its address, so
// this library does not link PyTorch, but uses its number of threads and starts none of its own.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain_size,
                                void (*function)(int64_t begin, int64_t end, void* context),
                                void* context);

class Threads {
 public:
  Threads(ParallelFor parallel_for, int64_t count) : parallel_for_(parallel_for), count_(count) {}

  int64_t count() const { return count_; }

  // Calls work(next) on every thread. next() returns 0, 1, … `tasks` - 1, each to one thread, and
  // then -1. A thread may allocate what it needs before it calls next() the first time.
  template <typename Work>
  void share(int64_t tasks, const Work& work) const {
    std::atomic<int64_t> given{0};
    const auto next = [&]() -> int64_t {
      const int64_t task = given.fetch_add(1, std::memory_order_relaxed);
      return task < tasks ? task : -1;
    };
    const auto one_thread = [&] { work(next); };
    const int64_t threads = std::min(count_, tasks);
    if (threads <= 1) {
      one_thread();
    } else if (parallel_for_ != nullptr) {
      const auto call = [](int64_t, int64_t, void* context) {
        (*static_cast<decltype(&one_thread)>(context))();
      };
      parallel_for_(0, threads, 1, call, const_cast<void*>(static_cast<const void*>(&one_thread)));
    } else {
      std::vector<std::thread> others;
      for (int64_t i = 1; i < threads; ++i) others.emplace_back(one_thread);
      one_thread();
      for (auto& other : others) other.join();
    }
  }

 private:
  ParallelFor parallel_for_;
  int64_t count_;
};

}  // namespace INSTRUCTION_SET
}  // namespace deta
