// Multi-scale deformable attention on the CPU, forward and backward, in float and double.
//
// Plain functions over plain pointers: no header of PyTorch or Python, so the library builds in
// seconds and does not depend on the version of either. ops/compiled.py calls them. setup.py
// compiles this file once for each kind of processor, with INSTRUCTION_SET as part of the names.
//
// B images   Q queries   H heads   L levels   P points   S pixels of all levels   D channels
//   value      B S H D          shapes   L 2, (height, width)
//   locations  B Q H L P 2      weights  B Q H L P              output  B Q H D
//
// One thread at a time owns one (image, head), and it alone writes there. So sums are formed in
// the same order whatever the number of threads, and results can be reproduced.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#ifndef INSTRUCTION_SET
#define INSTRUCTION_SET base
#endif
#define JOIN_NAMES(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_NAMES(a, b, c)

namespace {

struct Sizes {
  int64_t images, pixels, heads, channels, queries, levels, points;
};

// The four pixels around a sample. One outside of the level has inside = 0 and, so that it can be
// read all the same, the place of a pixel that is there.
template <typename T>
struct Corners {
  int64_t offset[4];
  T inside[4], share[4];
  T right, below;  // how far the sample is on the way to the next column and row

  // False where no corner is a pixel, and so for a location that is not finite.
  bool place(T x, T y, int64_t height, int64_t width, int64_t stride) {
    x = x * width - T(0.5);
    y = y * height - T(0.5);
    if (!(x > T(-1) && y > T(-1) && x < T(width) && y < T(height))) return false;
    const T left = std::floor(x), top = std::floor(y);
    right = x - left;
    below = y - top;
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t row = int64_t(top) + corner / 2, column = int64_t(left) + corner % 2;
      inside[corner] = row >= 0 && row < height && column >= 0 && column < width;
      share[corner] = inside[corner] * (corner / 2 ? below : 1 - below) *
                      (corner % 2 ? right : 1 - right);
      offset[corner] = (std::clamp<int64_t>(row, 0, height - 1) * width +
                        std::clamp<int64_t>(column, 0, width - 1)) * stride;
    }
    return true;
  }
};

// Calls task(image, head) for all of them, on up to `threads` threads.
template <typename Task>
void for_each_head(const Sizes& n, int64_t threads, const Task& task) {
  const int64_t tasks = n.images * n.heads;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < tasks; i = next++) task(i / n.heads, i % n.heads);
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min(threads, tasks); ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
}

template <typename T>
void forward(const T* value, const int64_t* shapes, const T* locations, const T* weights,
             T* output, const Sizes& n, int64_t threads) {
  const int64_t stride = n.heads * n.channels, samples = n.levels * n.points;
  for_each_head(n, threads, [&](int64_t image, int64_t head) {
    const T* own_value = value + (image * n.pixels * n.heads + head) * n.channels;
    for (int64_t query = 0; query < n.queries; ++query) {
      const int64_t row = (image * n.queries + query) * n.heads + head;
      const T* weight = weights + row * samples;
      const T* location = locations + row * samples * 2;
      T* __restrict__ sum = output + row * n.channels;
      std::fill(sum, sum + n.channels, T(0));
      const T* level_value = own_value;
      for (int64_t level = 0; level < n.levels; ++level) {
        const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
        for (int64_t point = 0; point < n.points; ++point, ++weight, location += 2) {
          Corners<T> at;
          if (!at.place(location[0], location[1], height, width, stride)) continue;
          const T *p0 = level_value + at.offset[0], *p1 = level_value + at.offset[1],
                  *p2 = level_value + at.offset[2], *p3 = level_value + at.offset[3];
          const T w0 = *weight * at.share[0], w1 = *weight * at.share[1],
                  w2 = *weight * at.share[2], w3 = *weight * at.share[3];
#pragma omp simd
          for (int64_t d = 0; d < n.channels; ++d)
            sum[d] += w0 * p0[d] + w1 * p1[d] + w2 * p2[d] + w3 * p3[d];
        }
        level_value += height * width * stride;
      }
    }
  });
}

// Gradients must come in as zeros: a sample outside of its level writes none.
template <typename T>
void backward(const T* grad_output, const T* value, const int64_t* shapes, const T* locations,
              const T* weights, T* grad_value, T* grad_locations, T* grad_weights,
              const Sizes& n, int64_t threads) {
  const int64_t stride = n.heads * n.channels, samples = n.levels * n.points;
  for_each_head(n, threads, [&](int64_t image, int64_t head) {
    const int64_t first = (image * n.pixels * n.heads + head) * n.channels;
    for (int64_t query = 0; query < n.queries; ++query) {
      const int64_t row = (image * n.queries + query) * n.heads + head;
      const T* __restrict__ grad = grad_output + row * n.channels;
      int64_t sample = row * samples, level_start = first;
      for (int64_t level = 0; level < n.levels; ++level) {
        const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
        for (int64_t point = 0; point < n.points; ++point, ++sample) {
          Corners<T> at;
          if (!at.place(locations[2 * sample], locations[2 * sample + 1], height, width, stride))
            continue;
          T dots[4];  // of each corner's pixel with the gradient; 0 outside of the level
          for (int corner = 0; corner < 4; ++corner) {
            const int64_t pixel = level_start + at.offset[corner];
            const T* __restrict__ from = value + pixel;
            T* __restrict__ to = grad_value + pixel;
            const T scale = weights[sample] * at.share[corner];
            T dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < n.channels; ++d) {
              dot += from[d] * grad[d];
              to[d] += scale * grad[d];
            }
            dots[corner] = at.inside[corner] * dot;
          }
          const T across = (1 - at.below) * (dots[1] - dots[0]) + at.below * (dots[3] - dots[2]);
          const T down = (1 - at.right) * (dots[2] - dots[0]) + at.right * (dots[3] - dots[1]);
          grad_locations[2 * sample] = weights[sample] * across * width;
          grad_locations[2 * sample + 1] = weights[sample] * down * height;
          grad_weights[sample] =
              (1 - at.below) * ((1 - at.right) * dots[0] + at.right * dots[1]) +
              at.below * ((1 - at.right) * dots[2] + at.right * dots[3]);
        }
        level_start += height * width * stride;
      }
    }
  });
}

}  // namespace

#define DEFINE(T, name)                                                                           \
  extern "C" void JOIN(forward, name, INSTRUCTION_SET)(                                           \
      const T* value, const int64_t* shapes, const T* locations, const T* weights, T* output,     \
      const Sizes* sizes, int64_t threads) {                                                      \
    forward(value, shapes, locations, weights, output, *sizes, threads);                          \
  }                                                                                               \
  extern "C" void JOIN(backward, name, INSTRUCTION_SET)(                                          \
      const T* grad_output, const T* value, const int64_t* shapes, const T* locations,            \
      const T* weights, T* grad_value, T* grad_locations, T* grad_weights, const Sizes* sizes,    \
      int64_t threads) {                                                                          \
    backward(grad_output, value, shapes, locations, weights, grad_value, grad_locations,          \
             grad_weights, *sizes, threads);                                                      \
  }

DEFINE(float, float32)
DEFINE(double, float64)
