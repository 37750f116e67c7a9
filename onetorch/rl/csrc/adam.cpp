// One step of Adam on a vector of weights, in one pass through memory. Plain C++17 with GCC/Clang vector types and a C interface, as in mlp.cpp.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// std::sqrt may set errno, which keeps compilers from making vectors of it.
#if defined(__AVX512F__)
constexpr int VW = 16;
typedef float vf __attribute__((vector_size(VW * 4)));
inline vf root(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
#elif defined(__AVX__)
constexpr int VW = 8;
typedef float vf __attribute__((vector_size(VW * 4)));
inline vf root(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
#else
constexpr int VW = 4;
typedef float vf __attribute__((vector_size(VW * 4)));
inline vf root(vf x) {
  for (int i = 0; i < VW; i++) x[i] = std::sqrt(x[i]);
  return x;
}
#endif

}  // namespace

// m <- m + (1 - beta1) (g - m), s <- beta2 s + (1 - beta2) g^2, w <- w - rate lr m / (sqrt(s / two) + eps), with `toward` = 1 - beta1; lr is one number per weight, where `each` is
// null `all` for all of them.
extern "C" void onetorch_adam(int64_t P, float* weights, const float* grad, float* mean, float* square, const float* each, float all, float toward, float beta2, float eps, float rate, float two) {
  const float most = 1 - beta2, part = 1 / two;
  auto some = [&](int64_t i, auto bytes) {
    vf w{}, g{}, m{}, s{}, lr = all - vf{};
    std::memcpy(&w, weights + i, bytes);
    std::memcpy(&g, grad + i, bytes);
    std::memcpy(&m, mean + i, bytes);
    std::memcpy(&s, square + i, bytes);
    if (each) std::memcpy(&lr, each + i, bytes);
    m += (g - m) * toward;
    s = s * beta2 + g * g * most;
    w -= rate * lr * m / (root(s * part) + eps);
    std::memcpy(weights + i, &w, bytes);
    std::memcpy(mean + i, &m, bytes);
    std::memcpy(square + i, &s, bytes);
  };
  int64_t i = 0;
  for (; i + VW <= P; i += VW) some(i, std::integral_constant<size_t, sizeof(vf)>{});
  if (i < P) some(i, size_t(P - i) * sizeof(float));
}
