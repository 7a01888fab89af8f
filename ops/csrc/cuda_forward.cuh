// The forward kernel: each lane of a group sums some channels of a row over all its samples.
//
// B images   Q queries   H heads   D channels      value B S H D      output B Q H D

#pragma once

#include "cuda_samples.cuh"

namespace {

constexpr int MAX_THREADS = 256;  // per block

// Returns the address of a pixel. Both factors are positive, so this is one instruction.
template <typename N>
__device__ N* pixel_address(N* first, int pixel, int numbers_per_pixel) {
  using Byte = std::conditional_t<std::is_const_v<N>, const char, char>;
  const unsigned pixel_bytes = unsigned(numbers_per_pixel) * unsigned(sizeof(N));
  Byte* const address = reinterpret_cast<Byte*>(first) + uint64_t(unsigned(pixel)) * pixel_bytes;
  return reinterpret_cast<N*>(address);
}

// Reads all four pixels around a sample before the first is used.
template <typename T, int VECTOR>
struct Corners {
  typename Word<sizeof(T) * VECTOR>::type words[4];

  __device__ Corners(const T* first, const int4& at, int numbers_per_pixel) {
    const int pixel[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = read_word<T, VECTOR>(pixel_address(first, pixel[i], numbers_per_pixel));
    }
  }
};

// LANES lanes with VECTOR channels each cover a row. LANES = 0 means n.lanes lanes, which loop if
// there are more channels. With at most 64 registers per thread, four blocks fit.
template <typename T, int VECTOR, int LANES>
__global__ void __launch_bounds__(MAX_THREADS, 4)
    forward_kernel(const __grid_constant__ Problem n, const Sampling<T> whole_sampling,
                   const T* __restrict__ value, T* __restrict__ output) {
  using A = Arithmetic<T>;
  const int lanes = LANES > 0 ? LANES : n.lanes;
  const int channels = LANES > 0 ? LANES * VECTOR : n.channels;
  const Row row = row_of_thread(n, lanes);
  if (__all_sync(WHOLE_WARP, row.query < 0)) return;
  const Notes<A> notes(row.group, lanes);
  const Sampling<T> sampling = whole_sampling.of_row(n, row);
  const Softmax<A> softmax = softmax_of(n, sampling, row, lanes);
  const int64_t own_values = (int64_t(row.image) * n.pixels * n.heads + row.head) * channels;

  for (int first = 0; first < channels; first += lanes * VECTOR) {
    const int channel = first + row.lane * VECTOR;
    const bool has_channels = channel < channels;
    const T* const values = kept(value + own_values + channel);
    A sum[VECTOR] = {};
    Reading<T> next = read_sample(n, sampling, row, row.lane);
    for (int s = 0; s < n.samples; s += lanes) {
      notes.put(row.lane, place_sample(n, sampling, next, softmax));
      __syncwarp();
      next = read_sample(n, sampling, row, s + lanes + row.lane);
      const int noted = LANES > 0 ? LANES : min(lanes, n.samples - s);
#pragma unroll
      for (int i = 0; i < noted; ++i) {
        const int4 at = notes.pixels[i];
        if (at.x < 0 || !has_channels) continue;
        const Shares<A> share = notes.shares[i];
        const Corners<T, VECTOR> corners(values, at, n.heads * channels);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          A numbers[VECTOR];
          unpack<T>(corners.words[corner], numbers);
#pragma unroll
          for (int j = 0; j < VECTOR; ++j) sum[j] += share.corner[corner] * numbers[j];
        }
      }
      __syncwarp();
    }
    if (row.query >= 0 && has_channels) write(output + row.index(n) * channels + channel, sum);
  }
}

}  // namespace
