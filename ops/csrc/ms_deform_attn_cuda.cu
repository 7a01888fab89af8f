// Multi-scale deformable attention on CUDA devices, forward and backward, from locations and
// weights, or from offsets and logits (fused).
//
// Plain functions over plain pointers, without headers of PyTorch or Python, so the library does
// not depend on the version of either. ops/cuda.py calls them. They only launch kernels: they
// neither allocate nor wait, so CUDA graphs can record them.
//
// B images   Q queries   H heads   L levels   P points   S pixels of all levels   D channels
//   value      B S H D          shapes     L 2, (height, width), on the host
//   locations  B Q H L P 2      weights    B Q H L P              output  B Q H D
//   references B Q L R          (fused: locations are offsets and weights are logits)

#include "cuda_backward.cuh"
#include "cuda_forward.cuh"

namespace {

constexpr int MAX_SHARED_BYTES = 48 * 1024;  // available to a block by default

// All arguments of a call. ops/cuda.py fills them in, in the same order. All fields are 8 bytes.
struct Call {
  int64_t images, pixels, heads, channels, queries, levels, points;
  int64_t reference_size;  // 0: not fused
  int64_t dtype;           // of value and output: 0 float64, 1 float32, 2 float16, 3 bfloat16
  int64_t is_narrow;       // weights, or offsets and logits, are of that dtype, not float32
  int64_t device;
  cudaStream_t stream;
  int64_t shapes[2 * MAX_LEVELS];  // height, width
  const void *value, *references, *locations, *weights;
  void* output;
  const void* grad_output;
  void *grad_value, *grad_locations, *grad_weights;
  const double* bound;  // of the addends of grad_value, for fixed point; else null
  void* rounded;        // the fixed-point sums of grad_value as numbers
};

// Errors of a call, besides CUDA's own, which are positive. 0 is success.
enum Refusal { BAD_DTYPE = -1, TOO_LARGE = -2 };

struct Launch {
  Problem problem;
  dim3 blocks;
  int threads, shared_bytes;
};

// Fills in the problem and divides it into blocks, for lanes of `vector` channels and numbers of
// `number_bytes` bytes in the arithmetic. Returns 0 or a refusal.
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
    // No location is inside of a level of negative size.
    const bool is_empty = height * width == 0;
    n.level[l] = {is_empty ? -1 : int(height), is_empty ? -1 : int(width), int(pixel),
                  int(position)};
    pixel += height * width;
    position += ((height + TILE - 1) / TILE) * ((width + TILE - 1) / TILE) * TILE * TILE;
    if (pixel > n.pixels || position > LIMIT) return TOO_LARGE;
  }
  n.positions = n.is_tiled ? int(position) : n.queries;

  // A feature map fills the device with large blocks; a few hundred queries need small ones.
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
  if (error != cudaSuccess) cudaGetLastError();  // clears it, or the next launch would report it
  return error;
}

// Locations are at least float32; offsets may be narrow.
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

// Selects the widest access that fits. The usual head, of 32 channels, has its own kernel.
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

// The CUDA runtime in this library has its own current device. Set it to PyTorch's.
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

// Returns 0, or the error that explains why a device cannot run this library.
EXPORT int ms_deform_attn_probe(int device) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, reinterpret_cast<const void*>(forward_kernel<float, 4, 8>));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
