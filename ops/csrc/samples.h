// The positions of the samples of one query and head, and the weights of their corners.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>

#include "vectors.h"

namespace deta {
inline namespace INSTRUCTION_SET {

struct Sizes {
  int64_t images, pixels, heads, channels, queries, levels, points;
  int64_t reference_size;  // numbers per reference, 2 or 4; 0 without references
  int64_t samples() const { return levels * points; }
};

struct Uninitialised {};
constexpr Uninitialised kUninitialised;

// An array that starts on a cache line, so that no vector crosses two. Zero unless kUninitialised.
template <typename T>
class Array {
 public:
  Array(int64_t size, Uninitialised)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
  explicit Array(int64_t size) : Array(size, kUninitialised) {
    std::fill(data_, data_ + size, T(0));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { ::operator delete(data_, std::align_val_t(64)); }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// One number per sample of a query, level after level. Arrays are padded, so that loops over them
// need no remainder; samples in the padding are never near their level.
template <typename A>
class Samples {
 public:
  // Results of `place`, for the four corners (top left, top right, bottom left, bottom right).
  Array<int32_t> pixel[4];
  Array<A> weight[4];      // of the corner in the output; zero outside of the level
  Array<A> inside[4];      // 1 for a corner that is a pixel, 0 for one outside of the level
  Array<A> right, below;   // fractions of the way to the next column and row
  Array<int32_t> is_near;  // whether any corner is a pixel
  Array<A> attention;      // the attention weights, after the softmax if they were logits
  // x in pixels = x_origin + given · x_unit, where `given` is the operator's location or offset.
  Array<A> x_origin, y_origin, x_unit, y_unit;

  // Holds the samples on the levels from `first_level` up to, but without, `last_level`.
  Samples(const Sizes& n, const int64_t* shapes, int64_t first_level, int64_t last_level)
      : Samples((last_level - first_level) * n.points) {
    int64_t start = 0;
    for (int64_t level = 0; level < first_level; ++level)
      start += shapes[2 * level] * shapes[2 * level + 1];
    for (int64_t level = first_level, i = 0; level < last_level; ++level) {
      const int64_t h = shapes[2 * level], w = shapes[2 * level + 1];
      for (int64_t point = 0; point < n.points; ++point, ++i) {
        // No number is both above and below -1, so no sample is near a level without pixels.
        const bool is_empty = h * w == 0;
        height_[i] = is_empty ? A(-1) : A(h);
        width_[i] = is_empty ? A(-1) : A(w);
        // Samples that are not near are read too, with weight zero, so they need a valid pixel.
        rows_[i] = is_empty ? 1 : int32_t(h);
        columns_[i] = is_empty ? 1 : int32_t(w);
        first_pixel_[i] = is_empty ? 0 : int32_t(start);
        x_origin[i] = y_origin[i] = A(-0.5);  // pixel centres are at integers
        x_unit[i] = A(w);
        y_unit[i] = A(h);
      }
      start += h * w;
    }
  }

  // Sets the references of one query, `reference_size` numbers for each of these levels.
  void set_references(const A* reference, const Sizes& n) {
    for (int64_t i = 0; i < count_; i += n.points, reference += n.reference_size) {
      repeat(x_origin.data() + i, reference[0] * width_[i] - A(0.5), n.points);
      repeat(y_origin.data() + i, reference[1] * height_[i] - A(0.5), n.points);
      if (n.reference_size == 2) {  // offsets are in pixels
        repeat(x_unit.data() + i, A(1), n.points);
        repeat(y_unit.data() + i, A(1), n.points);
      } else {  // offsets are in shares of the reference box
        repeat(x_unit.data() + i, reference[2] * (A(0.5) / n.points) * width_[i], n.points);
        repeat(y_unit.data() + i, reference[3] * (A(0.5) / n.points) * height_[i], n.points);
      }
    }
  }

  // Sets the attention weights of one query and head.
  void set_weights(const A* weights) { std::copy(weights, weights + count_, attention.data()); }

  // Sets the attention weights to the softmax of the logits of one query and head.
  void set_logits(const A* logits) {
    A* __restrict__ to = attention.data();
    std::copy(logits, logits + count_, to);
    // The padding must not count: its exponential is zero.
    std::fill(to + count_, to + padded_, -std::numeric_limits<A>::infinity());
    A largest = to[0], sum = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < padded_; ++i) largest = std::max(largest, to[i]);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < padded_; ++i) sum += to[i] = exponential(to[i] - largest);
    const A scale = A(1) / sum;
#pragma omp simd
    for (int64_t i = 0; i < padded_; ++i) to[i] *= scale;
  }

  // Places the samples of one query and head. Returns whether all of them are near their level.
  template <bool kForGradients>
  bool place(const A* given) {
    A *__restrict__ x = x_.data(), *__restrict__ y = y_.data();
    const A *x0 = x_origin.data(), *y0 = y_origin.data(), *dx = x_unit.data(), *dy = y_unit.data();
#pragma omp simd
    for (int64_t i = 0; i < count_; ++i) {
      x[i] = x0[i] + given[2 * i] * dx[i];
      y[i] = y0[i] + given[2 * i + 1] * dy[i];
    }
    const A *h = height_.data(), *w = width_.data(), *a = attention.data();
    const int32_t *hi = rows_.data(), *wi = columns_.data(), *start = first_pixel_.data();
    int32_t* __restrict__ near = is_near.data();
    A *__restrict__ to_right = right.data(), *__restrict__ to_below = below.data();
    int32_t *__restrict__ pixel0 = pixel[0].data(), *__restrict__ pixel1 = pixel[1].data(),
            *__restrict__ pixel2 = pixel[2].data(), *__restrict__ pixel3 = pixel[3].data();
    A *__restrict__ weight0 = weight[0].data(), *__restrict__ weight1 = weight[1].data(),
      *__restrict__ weight2 = weight[2].data(), *__restrict__ weight3 = weight[3].data();
    A *__restrict__ inside0 = inside[0].data(), *__restrict__ inside1 = inside[1].data(),
      *__restrict__ inside2 = inside[2].data(), *__restrict__ inside3 = inside[3].data();
    int32_t num_near = 0;
#pragma omp simd reduction(+ : num_near)
    for (int64_t i = 0; i < padded_; ++i) {
      // False for non-finite values. Padding has height and width 0, so it is never near.
      const bool is = (x[i] > A(-1)) & (y[i] > A(-1)) & (x[i] < w[i]) & (y[i] < h[i]);
      const A xi = is ? x[i] : A(0), yi = is ? y[i] : A(0);
      int32_t column = int32_t(xi), row = int32_t(yi);  // towards zero: one too high below zero
      column -= xi < A(column);
      row -= yi < A(row);
      const A r = xi - A(column), b = yi - A(row);
      const A left_in = is & (column >= 0) ? A(1) : A(0);
      const A top_in = row >= 0 ? A(1) : A(0);
      const A right_in = is & (column + 1 < wi[i]) ? A(1) : A(0);
      const A bottom_in = row + 1 < hi[i] ? A(1) : A(0);
      const A in0 = top_in * left_in, in1 = top_in * right_in;
      const A in2 = bottom_in * left_in, in3 = bottom_in * right_in;
      const A s0 = in0 * (1 - b) * (1 - r), s1 = in1 * (1 - b) * r;
      const A s2 = in2 * b * (1 - r), s3 = in3 * b * r;
      // A corner outside of the level reads its neighbour inside, with share zero.
      const int32_t left = std::max(column, 0), right_column = std::min(column + 1, wi[i] - 1);
      const int32_t top = start[i] + std::max(row, 0) * wi[i];
      const int32_t bottom = start[i] + std::min(row + 1, hi[i] - 1) * wi[i];
      near[i] = is;
      num_near += is;
      pixel0[i] = top + left;
      pixel1[i] = top + right_column;
      pixel2[i] = bottom + left;
      pixel3[i] = bottom + right_column;
      weight0[i] = a[i] * s0;
      weight1[i] = a[i] * s1;
      weight2[i] = a[i] * s2;
      weight3[i] = a[i] * s3;
      if constexpr (kForGradients) {
        to_right[i] = r;
        to_below[i] = b;
        inside0[i] = in0;
        inside1[i] = in1;
        inside2[i] = in2;
        inside3[i] = in3;
      }
    }
    return num_near == count_;
  }

 private:
  static void repeat(A* to, A x, int64_t points) {
    if (points == 4) {  // the usual number: a single store
      for (int i = 0; i < 4; ++i) to[i] = x;
    } else {
      for (int64_t i = 0; i < points; ++i) to[i] = x;
    }
  }

  int64_t count_, padded_;
  // The level of each sample, the same for all queries.
  Array<int32_t> rows_, columns_, first_pixel_;
  Array<A> height_, width_;
  Array<A> x_, y_;

  explicit Samples(int64_t count) : Samples(count, (count + 15) / 16 * 16) {}

  Samples(int64_t count, int64_t padded)
      : pixel{Array<int32_t>(padded), Array<int32_t>(padded), Array<int32_t>(padded),
              Array<int32_t>(padded)},
        weight{Array<A>(padded), Array<A>(padded), Array<A>(padded), Array<A>(padded)},
        inside{Array<A>(padded), Array<A>(padded), Array<A>(padded), Array<A>(padded)},
        right(padded), below(padded), is_near(padded), attention(padded),
        x_origin(padded), y_origin(padded), x_unit(padded), y_unit(padded),
        count_(count), padded_(padded), rows_(padded), columns_(padded), first_pixel_(padded),
        height_(padded), width_(padded), x_(padded), y_(padded) {
    std::fill(rows_.data(), rows_.data() + padded, 1);
    std::fill(columns_.data(), columns_.data() + padded, 1);
  }
};

}  // namespace INSTRUCTION_SET
}  // namespace deta
