// Calls the CPU kernels with random shapes and extreme locations. Every tensor is a separate
// allocation of its exact size, so that the address sanitizer detects any access beyond it.

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "ms_deform_attn_cpu.cpp"

std::mt19937 generator(0);

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

template <typename T>
std::vector<T> random_numbers(int64_t size, bool wild = false) {
  std::vector<T> numbers(size);
  for (T& number : numbers) {
    double x = std::normal_distribution<double>(0.5, 1)(generator);
    if (wild && between(0, 19) == 0) {
      const double all[] = {NAN, INFINITY, -INFINITY, 1e30, -1e30, 3e9, -1.0, 0.0, 1.0};
      x = all[between(0, 8)];
    }
    if constexpr (std::is_same_v<T, BFloat16>)
      store_rounded(&number, float(x));
    else
      number = T(x);
  }
  return numbers;
}

template <typename T, typename A, typename Forward, typename Backward>
void run(Forward forward, Backward backward) {
  const int64_t channel_choices[] = {1, 3, 16, 32, 64, 40};
  const int64_t reference_choices[] = {0, 2, 4};
  Sizes n{};
  n.images = between(1, 2);
  n.heads = between(1, 3);
  n.channels = channel_choices[between(0, 5)];
  n.levels = between(1, 4);
  n.points = between(1, 5);
  n.reference_size = reference_choices[between(0, 2)];
  std::vector<int64_t> shapes;
  for (int64_t level = 0; level < n.levels; ++level) {
    const int64_t height = between(level > 0 ? 0 : 1, 9), width = between(1, 9);
    shapes.insert(shapes.end(), {height, width});
    n.pixels += height * width;
  }
  n.queries = between(0, 1) ? n.pixels : between(1, 40);
  const int64_t rows = n.images * n.queries * n.heads;
  const auto value = random_numbers<T>(n.images * n.pixels * n.heads * n.channels);
  const auto references = random_numbers<A>(n.images * n.queries * n.levels * n.reference_size, true);
  const auto places = random_numbers<A>(rows * n.samples() * 2, true);
  const auto attention = random_numbers<A>(rows * n.samples());
  const auto grad_output = random_numbers<T>(rows * n.channels);
  std::vector<T> output(rows * n.channels), grad_value(value.size());
  std::vector<A> grad_places(places.size()), grad_attention(attention.size());
  const A* given_references = n.reference_size > 0 ? references.data() : nullptr;
  const int64_t threads = between(1, 5);
  forward(value.data(), shapes.data(), given_references, places.data(), attention.data(),
          output.data(), &n, threads, nullptr);
  backward(grad_output.data(), value.data(), shapes.data(), given_references, places.data(),
           attention.data(), grad_value.data(), grad_places.data(), grad_attention.data(), &n,
           threads, nullptr);
}

int main() {
  for (int i = 0; i < 200; ++i) {
    if (i % 4 == 0) run<double, double>(forward_float64_base, backward_float64_base);
    if (i % 4 == 1) run<BFloat16, float>(forward_bfloat16_base, backward_bfloat16_base);
    if (i % 4 >= 2) run<float, float>(forward_float32_base, backward_float32_base);
  }
  std::puts("200 cases");
}
