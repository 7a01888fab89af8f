// The backward kernel, and the kernel that converts fixed-point sums to floating-point numbers.
//
// Only the gradient of the value needs atomic additions: each sample belongs to one group, which
// sums over its lanes and writes the gradients of locations and weights once. Fixed point adds
// integers, whose sum is the same in any order.
//
// B images   Q queries   H heads   L levels   P points   S pixels of all levels   D channels

#pragma once

#include "cuda_forward.cuh"

namespace {

template <typename T>
struct Gradients {
  const T* output;         // B Q H D
  void* value;             // B S H D, initially zero: Arithmetic<T>, or fixed-point integers
  Either<T, 2> locations;  // or offsets
  Either<T, 1> weights;    // or logits
  const double* bound;     // upper bound of the addends of `value`; null without fixed point
};

// Dot products of the gradient of the output with the four pixels around a sample.
template <typename A>
struct Dots {
  A corner[4];
};

// One lane's part of the backward pass of its row.
template <typename T, int VECTOR, int LANES, bool FIXED_POINT>
struct Backward {
  using A = Arithmetic<T>;
  using Sum = std::conditional_t<FIXED_POINT, long long, A>;
  static constexpr bool IN_FOURS = VECTOR % 4 == 0 && !FIXED_POINT;

  const Row& row;
  const Notes<A>& notes;
  const int lanes, channels, numbers_per_pixel, exponent;
  const T* values;    // of this image and head
  Sum* sums;          // of this image and head
  const T* gradient;  // of this row
  A to_dot[VECTOR];   // channels first + lane·VECTOR …
  A to_add[VECTOR];   // channels chosen so that neighbouring lanes add to neighbouring places

  // Returns the j-th channel that this lane adds.
  __device__ int channel_to_add(int first, int j) const {
    return first + (IN_FOURS ? (j / 4 * lanes + row.lane) * 4 + j % 4 : j * lanes + row.lane);
  }

  __device__ void read_gradient(int first) {
    const int channel = first + row.lane * VECTOR;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) to_dot[j] = to_add[j] = 0;
    if (row.query < 0) return;
    if (channel < channels) read(gradient + channel, to_dot);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const int own = channel_to_add(first, j);
      if (own < channels) to_add[j] = widen(gradient[own]);
      if (FIXED_POINT) to_add[j] = scalbn(to_add[j], exponent);
    }
  }

  __device__ void add(int first, int pixel, A share) {
    Sum* const to = pixel_address(sums, pixel, numbers_per_pixel);
#pragma unroll
    for (int j = 0; j < VECTOR; j += IN_FOURS ? 4 : 1) {
      const int own = channel_to_add(first, j);
      if (own >= channels) continue;
      if constexpr (IN_FOURS) {
        add_four(to + own, share * to_add[j], share * to_add[j + 1], share * to_add[j + 2],
                 share * to_add[j + 3]);
      } else if constexpr (FIXED_POINT) {
        add_integer(to + own, round_to_integer(share * to_add[j]));
      } else {
        atomicAdd(to + own, share * to_add[j]);
      }
    }
  }

  // Adds the i-th noted sample to the gradient of the value. Returns its dot products over this
  // lane's channels.
  __device__ Dots<A> visit(int i) {
    Dots<A> dots = {};
    const int4 at = notes.pixels[i];
    if (at.x < 0) return dots;
    const int step = lanes * VECTOR;
    for (int first = 0; first < channels; first += step) {
      if (LANES == 0 && channels > step) read_gradient(first);
      const int channel = first + row.lane * VECTOR;
      if (channel < channels) {
        const Corners<T, VECTOR> corners(values + channel, at, numbers_per_pixel);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          A numbers[VECTOR];
          unpack<T>(corners.words[corner], numbers);
#pragma unroll
          for (int j = 0; j < VECTOR; ++j) dots.corner[corner] += numbers[j] * to_dot[j];
        }
      }
      const Shares<A> share = notes.shares[i];
      const int pixel[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (share.corner[corner] != 0) add(first, pixel[corner], share.corner[corner]);
      }
    }
    return dots;
  }

  // Visits COUNT samples, starting with the i-th. Lane l gets the dots of sample i + l % COUNT,
  // summed over the lanes that differ from it only in l % COUNT. With COUNT = lanes these are all
  // lanes, with fewer shuffles than a sum per sample.
  template <int COUNT>
  __device__ Dots<A> visit_together(int i) {
    if constexpr (COUNT == 1) {
      return visit(i);
    } else {
      constexpr int HALF = COUNT / 2;
      const Dots<A> low = visit_together<HALF>(i), high = visit_together<HALF>(i + HALF);
      const bool keeps_high = row.lane & HALF;
      Dots<A> dots;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const A kept = keeps_high ? high.corner[corner] : low.corner[corner];
        const A given = keeps_high ? low.corner[corner] : high.corner[corner];
        dots.corner[corner] = kept + __shfl_xor_sync(WHOLE_WARP, given, HALF);
      }
      return dots;
    }
  }

  // Visits all noted samples. Each lane gets the dots of its own sample.
  __device__ Dots<A> visit_all(int noted) {
    if constexpr (LANES > 0) {
      return visit_together<LANES>(0);
    } else {
      Dots<A> own = {};
      for (int i = 0; i < noted; ++i) {
        const Dots<A> dots = visit(i);
        for (int corner = 0; corner < 4; ++corner) {
          const A whole = sum_over(lanes, dots.corner[corner]);
          if (row.lane == i) own.corner[corner] = whole;
        }
      }
      return own;
    }
  }
};

// Returns the number k for which x·2^k can be rounded to 64-bit integers and summed without
// overflow. Each of the Q·P samples of a level adds to a pixel at most once.
__device__ int fixed_point_exponent(double bound, int queries, int points) {
  if (!(bound > 0) || isinf(bound)) return 0;  // all zero, or no finite result: see round_kernel
  const int bound_bits = ilogb(bound) + 1;
  const int addend_bits = 64 - __clzll(static_cast<long long>(queries) * points);
  return 61 - bound_bits - addend_bits;
}

template <typename T, int VECTOR, int LANES, bool FIXED_POINT>
__global__ void __launch_bounds__(MAX_THREADS, 2)
    backward_kernel(const __grid_constant__ Problem n, const Sampling<T> whole_sampling,
                    const T* __restrict__ value, const Gradients<T> gradients) {
  using A = Arithmetic<T>;
  using Lane = Backward<T, VECTOR, LANES, FIXED_POINT>;
  const int lanes = LANES > 0 ? LANES : n.lanes;
  const int channels = LANES > 0 ? LANES * VECTOR : n.channels;
  const Row row = row_of_thread(n, lanes);
  if (__all_sync(WHOLE_WARP, row.query < 0)) return;
  const Notes<A> notes(row.group, lanes);
  // Gradients of the weights; the logits' gradients need all of a row. A lane reads only its own.
  char* const behind_notes =
      reinterpret_cast<char*>(shared) + Notes<A>::places(blockDim.x, lanes) * Notes<A>::BYTES;
  A* const weight_gradients = reinterpret_cast<A*>(behind_notes) + row.group * n.samples;
  const Sampling<T> sampling = whole_sampling.of_row(n, row);
  const Softmax<A> softmax = softmax_of(n, sampling, row, lanes);
  const int64_t own_values = (int64_t(row.image) * n.pixels * n.heads + row.head) * channels;
  const int exponent =
      FIXED_POINT ? fixed_point_exponent(*gradients.bound, n.queries, n.points) : 0;
  Lane lane = {row, notes, lanes, channels, n.heads * channels, exponent, kept(value + own_values),
               kept(static_cast<typename Lane::Sum*>(gradients.value) + own_values),
               gradients.output + row.index(n) * channels, {}, {}};
  lane.read_gradient(0);

  const Either<T, 2> gradient_locations = gradients.locations.from(row.index(n) * n.samples);
  const Either<T, 1> gradient_weights = gradients.weights.from(row.index(n) * n.samples);

  A total = 0;  // the sum of weight times its gradient
  Reading<T> next = read_sample(n, sampling, row, row.lane);
  for (int s = 0; s < n.samples; s += lanes) {
    const Sample<A> sample = place_sample(n, sampling, next, softmax);
    notes.put(row.lane, sample);
    __syncwarp();
    next = read_sample(n, sampling, row, s + lanes + row.lane);
    const Dots<A> visited = lane.visit_all(min(lanes, n.samples - s));
    __syncwarp();
    const int own = s + row.lane;
    if (!row.has_sample(n, own)) continue;

    A of_weight[1] = {0}, of_location[2] = {0, 0};
    if (sample.touches_pixels) {
      A dot[2][2];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const bool is_pixel = sample.has_row[corner / 2] && sample.has_column[corner % 2];
        dot[corner / 2][corner % 2] = is_pixel ? visited.corner[corner] : A(0);
      }
      const A* const down = sample.down;
      const A* const across = sample.across;
      of_weight[0] = down[0] * (across[0] * dot[0][0] + across[1] * dot[0][1]) +
                     down[1] * (across[0] * dot[1][0] + across[1] * dot[1][1]);
      total += sample.weight * of_weight[0];
      of_location[0] = sample.weight * sample.unit[0] *
                       (down[0] * (dot[0][1] - dot[0][0]) + down[1] * (dot[1][1] - dot[1][0]));
      of_location[1] = sample.weight * sample.unit[1] *
                       (across[0] * (dot[1][0] - dot[0][0]) + across[1] * (dot[1][1] - dot[0][1]));
    }
    gradient_locations.set(own, of_location);
    if (softmax.is_needed) {
      weight_gradients[own] = of_weight[0];
    } else {
      gradient_weights.set(own, of_weight);
    }
  }
  if (!softmax.is_needed) return;
  total = sum_over(lanes, total);
  for (int s = row.lane; row.has_sample(n, s); s += lanes) {
    A logit[1];
    sampling.weights.widen(sampling.weights.get(s), logit);
    const A of_logit[1] = {softmax.weight(logit[0]) * (weight_gradients[s] - total)};
    gradient_weights.set(s, of_logit);
  }
}

// Converts fixed-point sums to numbers. If any addend was infinite or NaN, all results are NaN.
template <typename T>
__global__ void __launch_bounds__(MAX_THREADS)
    round_kernel(const long long* __restrict__ sums, const double* bound, int queries, int points,
                 int64_t count, T* __restrict__ to) {
  const int exponent = fixed_point_exponent(*bound, queries, points);
  const bool is_finite = isfinite(*bound);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const double sum = is_finite ? scalbn(double(sums[i]), -exponent) : double(NAN);
    to[i] = narrow<T>(Arithmetic<T>(sum));
  }
}

}  // namespace
