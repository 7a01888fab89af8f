// The samples of a query: its place in the launch, its weights, and the pixels around each sample.
// The forward and the backward kernel share this file.
//
// B images   Q queries   H heads   L levels   P points   S pixels of all levels   D channels
// A row is one (image, query, head). A group of neighbouring lanes of one warp handles it: each
// lane has some of the channels, and places some of the samples for all lanes.

#pragma once

#include <math.h>

#include "cuda_numbers.cuh"

constexpr int MAX_LEVELS = 32;
constexpr int TILE = 8;  // queries of a feature map are processed in squares of this side
constexpr unsigned WHOLE_WARP = 0xffffffffu;

struct alignas(16) Level {
  int height, width;
  int first_pixel;     // index into S
  int first_position;  // in the order in which queries are processed
};

// The constants of a launch. They are passed by value, so they are in constant memory.
struct Problem {
  int pixels, heads, channels, queries, levels, points;
  int samples;          // per row: L·P
  unsigned reciprocal;  // 2^32 / P, rounded up: for dividing by P
  int lanes;            // per group, a power of two
  int positions;        // queries, plus the gaps in the last tiles
  bool is_tiled;        // the queries are the pixels of the levels
  int reference_size;   // 0: locations and weights; 2, 4: logits, and offsets from points, boxes
  Level level[MAX_LEVELS];
};

extern __shared__ int4 shared[];  // for its layout see Notes and backward_kernel

// The row of a thread.
struct Row {
  int lane, group;  // within the group, within the block
  int head, image;
  int query;  // -1: none

  __device__ bool has_sample(const Problem& n, int s) const { return query >= 0 && s < n.samples; }

  // The index in B Q H. Computed where needed: stored, it would always take two registers.
  __device__ int64_t index(const Problem& n) const {
    return (int64_t(image) * n.queries + query) * n.heads + head;
  }
};

// Where to sample, and with which weights: for a complete tensor, or for one row (`of_row`).
template <typename T>
struct Sampling {
  const Arithmetic<T>* references;  // B Q L R
  Either<T, 2> locations;           // B Q H L P 2: locations (never narrow), or offsets
  Either<T, 1> weights;             // B Q H L P: weights, or logits
  Arithmetic<T> box_unit;           // one offset in sizes of a reference box

  __device__ Sampling of_row(const Problem& n, const Row& row) const {
    const int64_t query = int64_t(row.image) * n.queries + row.query;
    const int64_t first = row.index(n) * n.samples;
    return {kept(references + query * n.levels * n.reference_size), locations.from(first),
            weights.from(first), box_unit};
  }
};

// Returns the query at a position of the launch, or -1. Neighbouring queries of a feature map
// sample much the same pixels, so a block takes a square of them. In row order it would be a strip.
__device__ inline int query_at(const Problem& n, int position) {
  if (position >= n.positions) return -1;
  if (!n.is_tiled) return position;
  int l = 0;
  while (l + 1 < n.levels && position >= n.level[l + 1].first_position) ++l;
  const Level& level = n.level[l];
  const unsigned in_level = position - level.first_position;
  const unsigned tile = in_level / (TILE * TILE), in_tile = in_level % (TILE * TILE);
  const unsigned tiles_across = unsigned(level.width + TILE - 1) / TILE;
  const int row = tile / tiles_across * TILE + in_tile / TILE;
  const int column = tile % tiles_across * TILE + in_tile % TILE;
  if (row >= level.height || column >= level.width) return -1;
  return level.first_pixel + row * level.width + column;
}

// Heads of the same queries run at about the same time, because they share cache lines of inputs.
__device__ inline Row row_of_thread(const Problem& n, int lanes) {
  Row row;
  row.lane = threadIdx.x % lanes;
  row.group = threadIdx.x / lanes;
  row.head = blockIdx.x;
  row.image = blockIdx.z;
  row.query = query_at(n, blockIdx.y * (blockDim.x / lanes) + row.group);
  return row;
}

// Sums over the lanes of a group. All lanes of the warp must call it.
template <typename A>
__device__ inline A sum_over(int lanes, A x) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(WHOLE_WARP, x, distance);
  }
  return x;
}

template <typename A>
__device__ inline A largest_over(int lanes, A x) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(WHOLE_WARP, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// Converts logits to weights. If the inputs are weights already, it returns them unchanged.
template <typename A>
struct Softmax {
  bool is_needed;
  A largest, scale;  // the largest as an exponent of 2: exp2 is cheaper than exp

  __device__ A raised(A x) const { return exp2(x * A(M_LOG2E) - largest); }
  __device__ A weight(A x) const { return is_needed ? raised(x) * scale : x; }
};

template <typename T, typename A = Arithmetic<T>>
__device__ inline Softmax<A> softmax_of(const Problem& n, const Sampling<T>& from, const Row& row,
                                        int lanes) {
  Softmax<A> softmax = {n.reference_size > 0, -INFINITY, 1};
  if (!softmax.is_needed) return softmax;
  A total = 0, logit[1];
#pragma unroll 4
  for (int s = row.lane; row.has_sample(n, s); s += lanes) {
    from.weights.widen(from.weights.get(s), logit);
    softmax.largest = logit[0] > softmax.largest ? logit[0] : softmax.largest;
  }
  softmax.largest = largest_over(lanes, softmax.largest) * A(M_LOG2E);
#pragma unroll 4
  for (int s = row.lane; row.has_sample(n, s); s += lanes) {
    from.weights.widen(from.weights.get(s), logit);
    total += softmax.raised(logit[0]);  // NaN, if a logit is NaN
  }
  softmax.scale = 1 / sum_over(lanes, total);
  return softmax;
}

// The raw inputs of one sample. The next sample is read before the current one is processed.
template <typename T>
struct Reading {
  int level;
  typename Either<T, 2>::Raw location;
  typename Either<T, 1>::Raw weight;
};

template <typename T>
__device__ inline Reading<T> read_sample(const Problem& n, const Sampling<T>& from, const Row& row,
                                         int s) {
  Reading<T> reading = {};
  reading.level = -1;
  if (!row.has_sample(n, s)) return reading;
  reading.level = n.points == 1 ? s : __umulhi(s, n.reciprocal);
  reading.location = from.locations.get(s);
  reading.weight = from.weights.get(s);
  return reading;
}

// One sample. The pixels around it are numbered 0 1 in the upper and 2 3 in the lower row. A pixel
// outside of the level has share 0 and the index of a neighbour inside, so that it can be read.
template <typename A>
struct Sample {
  bool touches_pixels;  // if false, only weight and unit are set
  int pixel[4];         // indices into S
  A across[2], down[2];  // shares of the two columns and rows
  bool has_column[2], has_row[2];
  A weight;
  A unit[2];  // pixels per unit of location or offset, in x and y
};

template <typename T, typename A = Arithmetic<T>>
__device__ inline Sample<A> place_sample(const Problem& n, const Sampling<T>& from,
                                         const Reading<T>& reading, const Softmax<A>& softmax) {
  Sample<A> sample;
  sample.touches_pixels = false;
  if (reading.level < 0) return sample;
  const Level level = n.level[reading.level];
  const A size[2] = {A(level.width), A(level.height)};
  A location[2], weight[1], centre[2] = {}, box[2] = {};
  const A* const reference = from.references + reading.level * n.reference_size;
  if (n.reference_size > 0) read(reference, centre);
  if (n.reference_size == 4) read(reference + 2, box);
  from.locations.widen(reading.location, location);
  from.weights.widen(reading.weight, weight);
  sample.weight = softmax.weight(weight[0]);
  A at[2];  // in pixels; the centre of the first pixel is 0
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sample.unit[i] = n.reference_size == 2 ? A(1) : size[i];
    if (n.reference_size == 4) sample.unit[i] *= box[i] * from.box_unit;
    at[i] = centre[i] * size[i] + location[i] * sample.unit[i] - A(0.5);
  }
  // Also false for NaN, and for coordinates that do not fit in an integer.
  if (!(at[0] > -1 && at[1] > -1 && at[0] < size[0] && at[1] < size[1])) return sample;
  sample.touches_pixels = true;
  const A left = floor(at[0]), top = floor(at[1]);
  const int column = int(left), row = int(top);
  sample.has_column[0] = column >= 0;
  sample.has_column[1] = column + 1 < level.width;
  sample.has_row[0] = row >= 0;
  sample.has_row[1] = row + 1 < level.height;
  sample.across[0] = sample.has_column[0] ? 1 - (at[0] - left) : A(0);
  sample.across[1] = sample.has_column[1] ? at[0] - left : A(0);
  sample.down[0] = sample.has_row[0] ? 1 - (at[1] - top) : A(0);
  sample.down[1] = sample.has_row[1] ? at[1] - top : A(0);
  const int upper = level.first_pixel + max(row, 0) * level.width;
  const int lower = level.first_pixel + min(row + 1, level.height - 1) * level.width;
  sample.pixel[0] = upper + max(column, 0);
  sample.pixel[1] = upper + min(column + 1, level.width - 1);
  sample.pixel[2] = lower + max(column, 0);
  sample.pixel[3] = lower + min(column + 1, level.width - 1);
  return sample;
}

// The samples that the lanes of a group share with each other, in shared memory.
template <typename A>
struct alignas(16) Shares {
  A corner[4];  // shares in the output, including the weight
};

template <typename A>
struct Notes {
  int4* pixels;
  Shares<A>* shares;

  // Groups are one place apart, so that simultaneous reads are in different banks.
  static constexpr int BYTES = sizeof(int4) + sizeof(Shares<A>);
  __host__ __device__ static int places(int threads, int lanes) {
    return threads + threads / lanes;
  }

  __device__ Notes(int group, int lanes) {
    pixels = shared + group * (lanes + 1);
    Shares<A>* const all = reinterpret_cast<Shares<A>*>(shared + places(blockDim.x, lanes));
    shares = all + group * (lanes + 1);
  }

  __device__ void put(int lane, const Sample<A>& sample) const {
    if (!sample.touches_pixels) {
      pixels[lane].x = -1;
      return;
    }
    pixels[lane] = make_int4(sample.pixel[0], sample.pixel[1], sample.pixel[2], sample.pixel[3]);
    const A upper = sample.weight * sample.down[0], lower = sample.weight * sample.down[1];
    shares[lane] = {upper * sample.across[0], upper * sample.across[1],
                    lower * sample.across[0], lower * sample.across[1]};
  }
};
