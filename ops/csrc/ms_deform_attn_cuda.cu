// Multi-scale deformable attention on CUDA devices, forward and backward, from locations and
// weights or from offsets and logits (fused).
//
// Plain functions over plain pointers: no header of PyTorch or Python, so the library does not
// depend on the version of either. ops/cuda.py calls them. They only launch: nothing is allocated,
// nothing waits, so they can be recorded into CUDA graphs.
//
// B images   Q queries   H heads   L levels   P points   S pixels of all levels   D channels
//   value      B S H D          shapes     L 2, (height, width), on the host
//   locations  B Q H L P 2      weights    B Q H L P              output  B Q H D
//   references B Q L R          (fused: locations are offsets and weights are logits)

#include "cuda_samples.cuh"

namespace {

constexpr int MAX_SHARED_BYTES = 48 * 1024;  // what a block gets without asking
constexpr int MAX_THREADS = 256;

template <typename T>
struct Gradients {
  const T* output;         // B Q H D
  void* value;             // B S H D, zeros to add to: Arithmetic<T>, or fixed-point integers
  Either<T, 2> locations;  // or offsets
  Either<T, 1> weights;    // or logits
  const double* bound;     // no addend of `value` is larger; null without fixed point
};

// The address of a pixel. Both factors are positive; so it is one instruction.
template <typename N>
__device__ N* pixel_address(N* first, int pixel, int numbers_per_pixel) {
  using Byte = std::conditional_t<std::is_const_v<N>, const char, char>;
  const unsigned pixel_bytes = unsigned(numbers_per_pixel) * unsigned(sizeof(N));
  Byte* const address = reinterpret_cast<Byte*>(first) + uint64_t(unsigned(pixel)) * pixel_bytes;
  return reinterpret_cast<N*>(address);
}

// Reads the four pixels around a sample: all of them, before anything is done with the first.
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

// LANES lanes with VECTOR channels each make up a row. LANES = 0: as many as n.lanes says, which
// take the channels in turns if there are too many. 4 blocks a multiprocessor: at most 64 registers.
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
  const T* values;    // of the image and head
  Sum* sums;          // likewise
  const T* gradient;  // of the row
  A to_dot[VECTOR];   // channels first + lane·VECTOR …
  A to_add[VECTOR];   // those channels that make neighbouring lanes add to neighbouring places

  // The j-th channel that this lane adds up.
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

  // Adds the i-th noted sample to the gradient of the value, and takes its dot products over this
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

  // Visits COUNT samples from the i-th on. Lane l gets the dots of sample i + l % COUNT, summed
  // over the lanes that differ from it in l % COUNT alone. With COUNT = lanes that is all of them,
  // for fewer shuffles than summing sample after sample.
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

  // Visits the noted samples; each lane gets the dots of the one that it noted.
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

// The number k for which x·2^k can be rounded to 64-bit integers and added up without overflow.
// Each of the Q·P samples of a level adds to a pixel once at most.
__device__ int fixed_point_exponent(double bound, int queries, int points) {
  if (!(bound > 0) || isinf(bound)) return 0;  // all zero, or without a result: see round_kernel
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
  // Of the weights: those of the logits need all of the row's first. A lane reads its own only.
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

  A total = 0;  // of weight times its gradient
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

// Fixed-point sums to numbers. Where an addend was infinite or not a number, no sum is a number.
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

// Everything about a call, filled in by ops/cuda.py: the two must agree. All fields are 8 bytes.
struct Call {
  int64_t images, pixels, heads, channels, queries, levels, points;
  int64_t reference_size;  // 0: not fused
  int64_t dtype;           // of value and output: 0 float64, 1 float32, 2 float16, 3 bfloat16
  int64_t is_narrow;       // weights, or offsets and logits, are of that dtype: not float32
  int64_t device;
  cudaStream_t stream;
  int64_t shapes[2 * MAX_LEVELS];  // height, width
  const void *value, *references, *locations, *weights;
  void* output;
  const void* grad_output;
  void *grad_value, *grad_locations, *grad_weights;
  const double* bound;  // of what is added to grad_value, for fixed point; or null
  void* rounded;        // fixed-point sums in grad_value as numbers
};

// What a call can return beside 0 and CUDA's own errors, which are positive.
enum Refusal { BAD_DTYPE = -1, TOO_LARGE = -2 };

struct Launch {
  Problem problem;
  dim3 blocks;
  int threads, shared_bytes;
};

// Fills in the problem and divides it into blocks, for lanes of `vector` channels and arithmetic
// in numbers of so many bytes. Returns 0 or a refusal.
int plan(const Call& call, int vector, int number_bytes, bool keeps_weight_gradients,
         Launch& launch) {
  constexpr int64_t LIMIT = INT32_MAX / 2;
  const int64_t samples = call.levels * call.points;
  if (call.levels > MAX_LEVELS || samples > 65535) return TOO_LARGE;
  if (call.pixels > LIMIT || call.queries > LIMIT) return TOO_LARGE;
  if (call.heads * call.channels > LIMIT / 8 || call.images > 65535) return TOO_LARGE;
  Problem& n = launch.problem;
  n.pixels = int(call.pixels);
  n.heads = int(call.heads);
  n.channels = int(call.channels);
  n.queries = int(call.queries);
  n.levels = int(call.levels);
  n.points = int(call.points);
  n.samples = int(samples);
  n.reciprocal = unsigned((0x100000000ull + n.points - 1) / n.points);
  n.is_tiled = n.queries == n.pixels;
  n.reference_size = int(call.reference_size);
  int64_t pixel = 0, position = 0;
  for (int l = 0; l < n.levels; ++l) {
    const int64_t height = call.shapes[2 * l], width = call.shapes[2 * l + 1];
    // In a level of negative size no place lies inside.
    const bool is_empty = height * width == 0;
    n.level[l] = {is_empty ? -1 : int(height), is_empty ? -1 : int(width), int(pixel),
                  int(position)};
    pixel += height * width;
    position += ((height + TILE - 1) / TILE) * ((width + TILE - 1) / TILE) * TILE * TILE;
    if (pixel > n.pixels || position > LIMIT) return TOO_LARGE;
  }
  n.positions = n.is_tiled ? int(position) : n.queries;

  // A feature map fills the device with large blocks; a few hundred queries only with small ones.
  launch.threads = n.is_tiled ? MAX_THREADS : 64;
  n.lanes = 1;
  while (n.lanes < 32 && n.lanes * vector < n.channels) n.lanes *= 2;
  for (;;) {
    const int groups = launch.threads / n.lanes;
    const int64_t notes = (launch.threads + groups) * (sizeof(int4) + 4 * int64_t(number_bytes));
    const int64_t kept = keeps_weight_gradients ? groups * samples * number_bytes : 0;
    launch.shared_bytes = int(notes + kept);
    launch.blocks = dim3(n.heads, (n.positions + groups - 1) / groups, unsigned(call.images));
    const bool is_too_small = launch.blocks.y > 65535;
    if (notes + kept <= MAX_SHARED_BYTES && !is_too_small) return 0;
    if (is_too_small) {
      if (launch.threads == MAX_THREADS) return TOO_LARGE;
      launch.threads *= 2;
    } else if (launch.threads > 32) {
      launch.threads /= 2;
    } else if (n.lanes < 32) {
      n.lanes *= 2;
    } else {
      return TOO_LARGE;
    }
  }
}

template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), const Launch& launch, cudaStream_t stream,
          const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.blocks;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();  // so that the next launch does not report it
  return error;
}

// Locations are float32 at least, offsets may be narrow.
bool has_narrow_locations(const Call& call) { return call.is_narrow && call.reference_size > 0; }

template <typename T>
Sampling<T> sampling_of(const Call& call) {
  return {static_cast<const Arithmetic<T>*>(call.references),
          {const_cast<void*>(call.locations), has_narrow_locations(call)},
          {const_cast<void*>(call.weights), call.is_narrow != 0},
          Arithmetic<T>(0.5) / Arithmetic<T>(call.points)};
}

template <typename T, int VECTOR, int LANES>
int forward(const Call& call) {
  Launch launch;
  if (int refusal = plan(call, VECTOR, sizeof(Arithmetic<T>), false, launch)) return refusal;
  return start(forward_kernel<T, VECTOR, LANES>, launch, call.stream, launch.problem,
               sampling_of<T>(call), static_cast<const T*>(call.value),
               static_cast<T*>(call.output));
}

template <typename T, int VECTOR, int LANES, bool FIXED_POINT>
int backward(const Call& call) {
  Launch launch;
  if (int refusal = plan(call, VECTOR, sizeof(Arithmetic<T>), call.reference_size > 0, launch)) {
    return refusal;
  }
  const Gradients<T> gradients = {static_cast<const T*>(call.grad_output),
                                  call.grad_value,
                                  {call.grad_locations, has_narrow_locations(call)},
                                  {call.grad_weights, call.is_narrow != 0},
                                  call.bound};
  return start(backward_kernel<T, VECTOR, LANES, FIXED_POINT>, launch, call.stream,
               launch.problem, sampling_of<T>(call), static_cast<const T*>(call.value),
               gradients);
}

template <typename T>
int round(const Call& call) {
  const int64_t count = call.images * call.pixels * call.heads * call.channels;
  Launch launch = {};
  launch.threads = MAX_THREADS;
  const int64_t blocks = (count + 4 * MAX_THREADS - 1) / (4 * MAX_THREADS);
  launch.blocks = dim3(unsigned(blocks > INT32_MAX ? INT32_MAX : blocks));
  return start(round_kernel<T>, launch, call.stream, static_cast<const long long*>(call.grad_value),
               call.bound, int(call.queries), int(call.points), count,
               static_cast<T*>(call.rounded));
}

// The widest access that fits, and for the usual width of a head, 32 channels, its own kernel.
template <typename T>
int forward_any(const Call& call) {
  if constexpr (sizeof(T) < 8) {
    constexpr int VECTOR = 16 / sizeof(T);
    if (call.channels == 32) return forward<T, VECTOR, 32 / VECTOR>(call);
    if (call.channels % VECTOR == 0) return forward<T, VECTOR, 0>(call);
  }
  return forward<T, 1, 0>(call);
}

template <typename T>
int backward_any(const Call& call) {
  const bool is_fixed_point = call.bound != nullptr;
  if constexpr (sizeof(T) < 8) {
    constexpr int VECTOR = 16 / sizeof(T);
    if (call.channels == 32 && !is_fixed_point) {
      return backward<T, VECTOR, 32 / VECTOR, false>(call);
    }
    if (call.channels % VECTOR == 0) {
      return is_fixed_point ? backward<T, VECTOR, 0, true>(call)
                            : backward<T, VECTOR, 0, false>(call);
    }
  }
  return is_fixed_point ? backward<T, 1, 0, true>(call) : backward<T, 1, 0, false>(call);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The runtime inside this library has a current device of its own; it must be that of PyTorch.
#define DEFINE(name, function)                                                     \
  EXPORT int name(const Call* call) {                                              \
    if (const cudaError_t error = cudaSetDevice(int(call->device))) return error;  \
    switch (call->dtype) {                                                         \
      case 0: return function<double>(*call);                                      \
      case 1: return function<float>(*call);                                       \
      case 2: return function<__half>(*call);                                      \
      case 3: return function<__nv_bfloat16>(*call);                               \
    }                                                                              \
    return BAD_DTYPE;                                                              \
  }

DEFINE(ms_deform_attn_forward, forward_any)
DEFINE(ms_deform_attn_backward, backward_any)
DEFINE(ms_deform_attn_round, round)

EXPORT const char* ms_deform_attn_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// 0, or the error that says why a device cannot run what is in this library.
EXPORT int ms_deform_attn_probe(int device) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, reinterpret_cast<const void*>(forward_kernel<float, 4, 8>));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
