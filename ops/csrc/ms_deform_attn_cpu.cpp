// Multi-scale deformable attention on the CPU, forward and backward.
//
// Plain functions over plain pointers, without headers of PyTorch or Python, so the library builds
// in seconds and does not depend on the version of either. ops/cpu.py calls them. setup.py compiles
// this file once per instruction set, with INSTRUCTION_SET in the names of the functions.
//
// B images   Q queries   H heads   L levels   P points   S pixels of all levels   D channels
//   value      B S H D          shapes      L 2, (height, width)
//   places     B Q H L P 2      attention   B Q H L P            output  B Q H D
//   references B Q L 2 or 4, or none. With them `places` are offsets from the references and
//              `attention` are logits; without them, locations and weights.
//
// Work is divided so that one thread sums each number in a fixed order, for any number of threads.
// So results are reproducible to the last bit.

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "samples.h"
#include "vectors.h"

#define JOIN_NAMES(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_NAMES(a, b, c)
#define EXPORTED __attribute__((visibility("default")))

namespace {

using namespace deta;

constexpr int64_t kTile = 8;             // consecutive queries form square tiles of this side
constexpr int64_t kQueriesOfTask = 512;  // forward
constexpr int64_t kPixelsOfTask = 256;   // when heads are separated
constexpr int64_t kAhead = 4;            // inputs are prefetched this many queries ahead
// The reads per pixel from which on separating the heads is faster.
constexpr int64_t kReadsForward = 6, kReadsBackward = 2;

// Returns the order in which to process queries. If each pixel is a query, neighbours form tiles:
// they read the same pixels, which are then still in the cache.
std::vector<int32_t> query_order(const Sizes& n, const int64_t* shapes) {
  std::vector<int32_t> order;
  order.reserve(n.queries);
  if (n.queries != n.pixels) {
    for (int64_t query = 0; query < n.queries; ++query) order.push_back(int32_t(query));
    return order;
  }
  int64_t start = 0;
  for (int64_t level = 0; level < n.levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    for (int64_t top = 0; top < height; top += kTile)
      for (int64_t left = 0; left < width; left += kTile)
        for (int64_t row = top; row < std::min(top + kTile, height); ++row)
          for (int64_t column = left; column < std::min(left + kTile, width); ++column)
            order.push_back(int32_t(start + row * width + column));
    start += height * width;
  }
  return order;
}

// Prefetches memory that will be needed soon.
template <int kForWriting = 0>
void fetch(const void* begin, int64_t bytes) {
  const char* at = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, kForWriting, 2);
}

// Returns whether to separate the heads before reading them. The pixels of one head are a power of
// two apart, so only a few sets of the cache can hold them. If pixels are read often, a copy pays.
bool lays_apart(const Sizes& n, int64_t from_reads) {
  return n.heads > 1 && n.queries * n.samples() * 4 > from_reads * n.pixels;
}

// Separates the heads: value S H D -> apart H S D.
template <typename T, typename A>
void lay_apart(const T* value, A* apart, const Sizes& n, const Threads& threads) {
  const int64_t tasks = (n.pixels + kPixelsOfTask - 1) / kPixelsOfTask;
  threads.share(tasks, [&](const auto& next) {
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t end = std::min((task + 1) * kPixelsOfTask, n.pixels);
      for (int64_t head = 0; head < n.heads; ++head)
        for (int64_t pixel = task * kPixelsOfTask; pixel < end; ++pixel) {
          const T* __restrict__ from = value + (pixel * n.heads + head) * n.channels;
          A* __restrict__ to = apart + (head * n.pixels + pixel) * n.channels;
#pragma omp simd
          for (int64_t d = 0; d < n.channels; ++d) to[d] = to_float(from[d]);
        }
    }
  });
}

// Computes the weighted sum of all corners of one query's samples. D is the number of channels if
// there is a vectorised version for it, else 0.
template <int D, typename A, typename Out>
void gather(const A* value, int64_t stride, const Samples<A>& s, bool all_near, const Sizes& n,
            A* sum, Out* output) {
  const int64_t samples = n.samples();
  if constexpr (D > 0) {
    constexpr int kVectors = D / kLanes;
    Vector sums[4][kVectors] = {};  // one per corner, so that additions do not wait for each other
    for (int64_t i = 0; i < samples; ++i) {
      if (!all_near && !s.is_near[i]) continue;
      for (int corner = 0; corner < 4; ++corner) {
        const A* from = value + s.pixel[corner][i] * stride;
        const A weight = s.weight[corner][i];
        for (int v = 0; v < kVectors; ++v) sums[corner][v] += weight * load(from + v * kLanes);
      }
    }
    for (int v = 0; v < kVectors; ++v)
      store(output + v * kLanes, (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]));
  } else {
    std::fill(sum, sum + n.channels, A(0));
    for (int64_t i = 0; i < samples; ++i) {
      if (!all_near && !s.is_near[i]) continue;
      const A *p0 = value + s.pixel[0][i] * stride, *p1 = value + s.pixel[1][i] * stride,
              *p2 = value + s.pixel[2][i] * stride, *p3 = value + s.pixel[3][i] * stride;
      const A w0 = s.weight[0][i], w1 = s.weight[1][i], w2 = s.weight[2][i], w3 = s.weight[3][i];
#pragma omp simd
      for (int64_t d = 0; d < n.channels; ++d)
        sum[d] += w0 * p0[d] + w1 * p1[d] + w2 * p2[d] + w3 * p3[d];
    }
    for (int64_t d = 0; d < n.channels; ++d) store_rounded(output + d, sum[d]);
  }
}

// Computes one image. `stride` is the distance between pixels, `head_stride` that between heads.
template <int D, typename A, typename Out>
void forward_image(const A* value, int64_t stride, int64_t head_stride, const int64_t* shapes,
                   const A* references, const A* places, const A* attention, Out* output,
                   const Sizes& n, const std::vector<int32_t>& order, const Threads& threads) {
  const int64_t samples = n.samples();
  const int64_t tasks_of_head = (n.queries + kQueriesOfTask - 1) / kQueriesOfTask;
  threads.share(n.heads * tasks_of_head, [&](const auto& next) {
    Samples<A> s(n, shapes, 0, n.levels);
    Array<A> sum(n.channels);
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t head = task / tasks_of_head, first = task % tasks_of_head * kQueriesOfTask;
      const int64_t end = std::min(first + kQueriesOfTask, n.queries);
      for (int64_t i = first; i < end; ++i) {
        const int64_t query = order[i], row = query * n.heads + head;
        if (i + kAhead < end) {
          const int64_t ahead = order[i + kAhead], row_ahead = ahead * n.heads + head;
          fetch(places + row_ahead * samples * 2, samples * 2 * sizeof(A));
          fetch(attention + row_ahead * samples, samples * sizeof(A));
          fetch<1>(output + row_ahead * n.channels, n.channels * sizeof(Out));
        }
        if (references != nullptr) {
          s.set_references(references + query * n.levels * n.reference_size, n);
          s.set_logits(attention + row * samples);
        } else {
          s.set_weights(attention + row * samples);
        }
        const bool all_near = s.template place<false>(places + row * samples * 2);
        gather<D>(value + head * head_stride, stride, s, all_near, n, sum.data(),
                  output + row * n.channels);
      }
    }
  });
}

// Computes, for each corner of each sample, the dot product of its pixel with the gradient of the
// output, and adds to the gradient of that pixel.
template <int D, typename A>
void scatter(const A* value, int64_t stride, const A* grad, const Samples<A>& s, bool all_near,
             int64_t samples, int64_t channels, A* grad_value, int64_t grad_stride, A* const* dots) {
  if constexpr (D > 0) {
    constexpr int kVectors = D / kLanes, kCorners = kLanes / 4;
    Vector g[kVectors];
    for (int v = 0; v < kVectors; ++v) g[v] = load(grad + v * kLanes);
    for (int64_t i = 0; i < samples; i += 4) {
      for (int first = 0; first < 4; first += kCorners) {
        Vector products[kLanes];  // for four samples, corner after corner
        for (int corner = 0; corner < kCorners; ++corner)
          for (int j = 0; j < 4; ++j) {
            const A* from = value + s.pixel[first + corner][i + j] * stride;
            Vector product = load(from) * g[0];
            for (int v = 1; v < kVectors; ++v) product += load(from + v * kLanes) * g[v];
            products[4 * corner + j] = product;
          }
        const Vector found = sums(products);
        for (int corner = 0; corner < kCorners; ++corner)
          std::memcpy(dots[first + corner] + i, reinterpret_cast<const A*>(&found) + 4 * corner,
                      4 * sizeof(A));
      }
    }
    for (int64_t i = 0; i < samples; ++i) {
      if (!all_near && !s.is_near[i]) continue;
      for (int corner = 0; corner < 4; ++corner) {
        A* to = grad_value + s.pixel[corner][i] * grad_stride;
        const A weight = s.weight[corner][i];
        for (int v = 0; v < kVectors; ++v)
          store(to + v * kLanes, load(to + v * kLanes) + weight * g[v]);
      }
    }
  } else {
    for (int64_t i = 0; i < samples; ++i) {
      if (!all_near && !s.is_near[i]) continue;
      for (int corner = 0; corner < 4; ++corner) {
        const A* __restrict__ from = value + s.pixel[corner][i] * stride;
        A* __restrict__ to = grad_value + s.pixel[corner][i] * grad_stride;
        const A weight = s.weight[corner][i];
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < channels; ++d) {
          dot += from[d] * grad[d];
          to[d] += weight * grad[d];
        }
        dots[corner][i] = dot;
      }
    }
  }
}

// A thread's memory in the backward pass: one head's features and their gradients, separated from
// other heads, and the values of a single query.
template <typename A>
struct Workspace {
  Array<A> value, grad_value;  // S D, or empty if heads are not separated
  Array<A> grad_output;        // D
  Array<A> dots[4];            // one number per sample, see scatter

  Workspace(const Sizes& n, bool apart)
      : value(apart ? n.pixels * n.channels : 0, kUninitialised),
        grad_value(apart ? n.pixels * n.channels : 0, kUninitialised),
        grad_output(n.channels),
        dots{Array<A>(n.samples() + 16), Array<A>(n.samples() + 16), Array<A>(n.samples() + 16),
             Array<A>(n.samples() + 16)} {}
};

// Computes one image. Sets its sums to zero first.
template <int D, typename T, typename A>
void backward_image(const T* value, const int64_t* shapes, const A* references, const A* places,
                    const A* weights, const T* grad_output, T* grad_value, A* grad_places,
                    A* grad_weights, const Sizes& n, bool apart, const std::vector<int32_t>& order,
                    const Threads& threads) {
  const int64_t samples = n.samples(), channels = n.channels, width = n.heads * n.channels;
  std::vector<int64_t> first_pixel(n.levels + 1, 0);  // of each level, and the end of the last one
  for (int64_t level = 0; level < n.levels; ++level)
    first_pixel[level + 1] = first_pixel[level] + shapes[2 * level] * shapes[2 * level + 1];
  // A task is one head on some levels: no other task writes to these pixels. All levels in one task
  // are fastest, as long as every thread has a few tasks.
  const int64_t groups = std::clamp<int64_t>(2 * threads.count() / n.heads, 1, n.levels);
  threads.share(n.heads * groups, [&](const auto& next) {
    const Workspace<A> space(n, apart);
    A* const dots[] = {space.dots[0].data(), space.dots[1].data(), space.dots[2].data(),
                       space.dots[3].data()};
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t head = task / groups, group = task % groups;
      const int64_t first_level = group * n.levels / groups;
      const int64_t last_level = (group + 1) * n.levels / groups;
      const int64_t first = first_level * n.points, count = (last_level - first_level) * n.points;
      const int64_t begin = first_pixel[first_level], end = first_pixel[last_level];
      Samples<A> s(n, shapes, first_level, last_level);

      const T* const from = value + head * channels;
      T* const to = grad_value + head * channels;
      const A* own_value = space.value.data();
      A* own_grad = space.grad_value.data();
      int64_t stride = channels;
      if (apart) {
        for (int64_t pixel = begin; pixel < end; ++pixel)
          for (int64_t d = 0; d < channels; ++d)
            space.value[pixel * channels + d] = to_float(from[pixel * width + d]);
      } else if constexpr (std::is_same_v<T, A>) {
        own_value = from;
        own_grad = to;
        stride = width;
      }
      for (int64_t pixel = begin; pixel < end; ++pixel)
        std::fill(own_grad + pixel * stride, own_grad + pixel * stride + channels, A(0));

      for (int64_t i = 0; i < n.queries; ++i) {
        const int64_t query = order[i], row = query * n.heads + head;
        if (i + kAhead < n.queries) {
          const int64_t row_ahead = int64_t(order[i + kAhead]) * n.heads + head;
          const int64_t ahead = row_ahead * samples + first;
          fetch(places + ahead * 2, count * 2 * sizeof(A));
          fetch(weights + ahead, count * sizeof(A));
          fetch(grad_output + row_ahead * channels, channels * sizeof(T));
          fetch<1>(grad_places + ahead * 2, count * 2 * sizeof(A));
          fetch<1>(grad_weights + ahead, count * sizeof(A));
        }
        if (references != nullptr)
          s.set_references(references + (query * n.levels + first_level) * n.reference_size, n);
        s.set_weights(weights + row * samples + first);
        for (int64_t d = 0; d < channels; ++d)
          space.grad_output[d] = to_float(grad_output[row * channels + d]);
        const bool all_near = s.template place<true>(places + (row * samples + first) * 2);
        scatter<D>(own_value, stride, space.grad_output.data(), s, all_near, count, channels,
                   own_grad, stride, dots);

        const A *right = s.right.data(), *below = s.below.data(), *weight = s.attention.data();
        const A *x_unit = s.x_unit.data(), *y_unit = s.y_unit.data();
        const A *in0 = s.inside[0].data(), *in1 = s.inside[1].data(), *in2 = s.inside[2].data(),
                *in3 = s.inside[3].data();
        A* __restrict__ to_places = grad_places + (row * samples + first) * 2;
        A* __restrict__ to_weights = grad_weights + row * samples + first;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const A d0 = in0[j] > 0 ? dots[0][j] : 0, d1 = in1[j] > 0 ? dots[1][j] : 0;
          const A d2 = in2[j] > 0 ? dots[2][j] : 0, d3 = in3[j] > 0 ? dots[3][j] : 0;
          const A r = right[j], b = below[j];
          to_places[2 * j] = weight[j] * ((1 - b) * (d1 - d0) + b * (d3 - d2)) * x_unit[j];
          to_places[2 * j + 1] = weight[j] * ((1 - r) * (d2 - d0) + r * (d3 - d1)) * y_unit[j];
          to_weights[j] = (1 - b) * ((1 - r) * d0 + r * d1) + b * ((1 - r) * d2 + r * d3);
        }
      }
      if (apart)
        for (int64_t pixel = begin; pixel < end; ++pixel)
          for (int64_t d = 0; d < channels; ++d)
            store_rounded(to + pixel * width + d, space.grad_value[pixel * channels + d]);
    }
  });
}

// Calls work(first, end) for consecutive ranges that cover all rows.
template <typename Work>
void for_rows(int64_t rows, const Threads& threads, const Work& work) {
  constexpr int64_t kRowsOfTask = 4096;
  threads.share((rows + kRowsOfTask - 1) / kRowsOfTask, [&](const auto& next) {
    for (int64_t task = next(); task >= 0; task = next())
      work(task * kRowsOfTask, std::min((task + 1) * kRowsOfTask, rows));
  });
}

template <int D, typename T, typename A>
void forward(const T* value, const int64_t* shapes, const A* references, const A* places,
             const A* attention, T* output, const Sizes& n, const Threads& threads) {
  const std::vector<int32_t> order = query_order(n, shapes);
  const int64_t width = n.heads * n.channels;
  constexpr bool is_rounded = !std::is_same_v<T, A>;  // the copy is also in full precision
  const bool apart = is_rounded || lays_apart(n, kReadsForward);
  Array<A> copy(apart ? n.pixels * width : 0, kUninitialised);
  for (int64_t image = 0; image < n.images; ++image) {
    if (apart) {
      lay_apart(value, copy.data(), n, threads);
      forward_image<D>(copy.data(), n.channels, n.pixels * n.channels, shapes, references, places,
                       attention, output, n, order, threads);
    } else if constexpr (!is_rounded) {
      forward_image<D>(value, width, n.channels, shapes, references, places, attention, output, n,
                       order, threads);
    }
    value += n.pixels * width;
    if (references != nullptr) references += n.queries * n.levels * n.reference_size;
    places += n.queries * n.heads * n.samples() * 2;
    attention += n.queries * n.heads * n.samples();
    output += n.queries * width;
  }
}

template <int D, typename T, typename A>
void backward(const T* grad_output, const T* value, const int64_t* shapes, const A* references,
              const A* places, const A* attention, T* grad_value, A* grad_places,
              A* grad_attention, const Sizes& n, const Threads& threads) {
  const std::vector<int32_t> order = query_order(n, shapes);
  const int64_t width = n.heads * n.channels, samples = n.samples();
  const int64_t rows = n.queries * n.heads;
  const bool apart = !std::is_same_v<T, A> || lays_apart(n, kReadsBackward);
  Array<A> weights_copy(references != nullptr ? rows * samples : 0, kUninitialised);
  for (int64_t image = 0; image < n.images; ++image) {
    const A* weights = attention;
    if (references != nullptr) {
      for_rows(rows, threads, [&](int64_t first, int64_t end) {
        Samples<A> s(n, shapes, 0, n.levels);
        for (int64_t row = first; row < end; ++row) {
          s.set_logits(attention + row * samples);
          std::copy(s.attention.data(), s.attention.data() + samples,
                    weights_copy.data() + row * samples);
        }
      });
      weights = weights_copy.data();
    }
    backward_image<D>(value, shapes, references, places, weights, grad_output, grad_value,
                      grad_places, grad_attention, n, apart, order, threads);
    if (references != nullptr) {  // through the softmax
      for_rows(rows, threads, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; ++row) {
          const A* __restrict__ weight = weights + row * samples;
          A* __restrict__ to = grad_attention + row * samples;
          A mean = 0;
#pragma omp simd reduction(+ : mean)
          for (int64_t i = 0; i < samples; ++i) mean += weight[i] * to[i];
#pragma omp simd
          for (int64_t i = 0; i < samples; ++i) to[i] = weight[i] * (to[i] - mean);
        }
      });
      references += n.queries * n.levels * n.reference_size;
    }
    grad_output += rows * n.channels;
    value += n.pixels * width;
    grad_value += n.pixels * width;
    places += rows * samples * 2;
    grad_places += rows * samples * 2;
    attention += rows * samples;
    grad_attention += rows * samples;
  }
}

// Calls `run` with the number of channels as a constant if it has a vectorised version, else 0.
template <typename A, typename Run>
int32_t with_channels(int64_t channels, const Run& run) {
  try {
    if constexpr (std::is_same_v<A, float>) {
      if (channels == 16) return run(std::integral_constant<int, 16>()), 0;
      if (channels == 32) return run(std::integral_constant<int, 32>()), 0;
      if (channels == 64) return run(std::integral_constant<int, 64>()), 0;
    }
    return run(std::integral_constant<int, 0>()), 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// All return 0, or 1 if there is not enough memory. No dimension may be zero.
#define DEFINE(T, A, name)                                                                        \
  extern "C" EXPORTED int32_t JOIN(forward, name, INSTRUCTION_SET)(                               \
      const T* value, const int64_t* shapes, const A* references, const A* places,                \
      const A* attention, T* output, const Sizes* sizes, int64_t threads,                         \
      ParallelFor parallel_for) {                                                                 \
    return with_channels<A>(sizes->channels, [&](auto channels) {                                 \
      forward<channels()>(value, shapes, references, places, attention, output, *sizes,           \
                          Threads(parallel_for, threads));                                        \
    });                                                                                           \
  }                                                                                               \
  extern "C" EXPORTED int32_t JOIN(backward, name, INSTRUCTION_SET)(                              \
      const T* grad_output, const T* value, const int64_t* shapes, const A* references,           \
      const A* places, const A* attention, T* grad_value, A* grad_places, A* grad_attention,      \
      const Sizes* sizes, int64_t threads, ParallelFor parallel_for) {                            \
    return with_channels<A>(sizes->channels, [&](auto channels) {                                 \
      backward<channels()>(grad_output, value, shapes, references, places, attention, grad_value, \
                           grad_places, grad_attention, *sizes, Threads(parallel_for, threads));  \
    });                                                                                           \
  }

DEFINE(float, float, float32)
DEFINE(double, double, float64)
DEFINE(deta::BFloat16, float, bfloat16)
