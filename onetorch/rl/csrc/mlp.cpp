// Forward and backward pass of a stack of MLPs with ReLU or tanh between the layers. Plain C++17 with GCC/Clang vector types and a C interface, no torch headers.
//
// Everything is one product C[m, n] = sum_k A[m, k] B[k, n]. B is packed panel by panel, NV vectors wide, so that it is read in order from the first-level
// cache; a tile of 12 rows by one panel stays in registers while k passes; bias, activation and the factor of its gradient are applied to the tile before it is
// stored. A is read where it stands. Layers between hidden layers may multiply bfloat16 with float32 sums (two products per lane); what enters and leaves
// the net is always float32. Every element is summed in one fixed order by one thread: results do not depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VW = 16, MR = 12;  // lanes; rows of a tile: 24 accumulators of the 32 registers
#elif defined(__AVX__)
constexpr int VW = 8, MR = 6;
#else
constexpr int VW = 4, MR = 12;
#endif
typedef float vf __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t Unit;  // what one lane multiplies: a float32, or two bfloat16 that stand together along k

inline float as_float(Unit u) { float f; std::memcpy(&f, &u, 4); return f; }
inline Unit as_unit(float f) { Unit u; std::memcpy(&u, &f, 4); return u; }
inline Unit rounded(float f) { Unit u = as_unit(f); return (u + 0x7fffu + ((u >> 16) & 1)) >> 16; }  // to bfloat16, ties to even; the nets hold no NaN
inline Unit pair(float low, float high) { return rounded(low) | rounded(high) << 16; }

template <bool BF> inline vf fma(vf c, Unit a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (BF) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
#endif
  return c + as_float(a) * b;
}

// One tile: R rows by NV vectors. ACROSS: the rows of A stand side by side and k is strided by s (a transposed A); else k is contiguous and rows are strided.
template <int R, int NV, bool ACROSS, bool BF> inline void tile(int64_t K, const Unit* a, int64_t s, const float* panel, vf (&acc)[R][NV]) {
  constexpr int G = R % 3 == 0 ? 3 : 1, Q = R / G;  // three rows to a pointer: base, base + s, base + 2 s are addresses the processor can form
  const Unit* row[Q];
  UNROLL for (int j = 0; j < Q; j++) row[j] = a + (ACROSS ? j * G : j * G * s);
  UNROLL for (int i = 0; i < R; i++) { UNROLL for (int v = 0; v < NV; v++) acc[i][v] = vf{}; }
  for (int64_t k = 0; k < K; k++, panel += NV * VW) {
    vf b[NV];
    UNROLL for (int v = 0; v < NV; v++) std::memcpy(&b[v], panel + v * VW, sizeof(vf));
    UNROLL for (int j = 0; j < Q; j++) {
      UNROLL for (int g = 0; g < G; g++) {
        const Unit x = row[j][ACROSS ? g : g * s];
        UNROLL for (int v = 0; v < NV; v++) acc[j * G + g][v] = fma<BF>(acc[j * G + g][v], x, b[v]);
      }
      row[j] += ACROSS ? s : 1;
    }
  }
}

typedef Unit vm __attribute__((vector_size(VW * 4)));  // units that are moved about
template <int... I> using Lanes = std::integer_sequence<int, I...>;

template <int... I> inline vm pick(vm a, vm b) {  // lane l is lane I_l of a and b one after the other
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, vm{I...});
#endif
}

// A square of units, transposed in registers in log2(VW) rounds: rows that stand APART exchange blocks of so many columns.
template <int APART, int... I> inline void transpose(vm (&row)[VW], Lanes<I...> lanes) {
  UNROLL for (int i = 0; i < VW; i++) {
    if (i & APART) continue;
    const vm a = row[i], b = row[i + APART];
    row[i] = pick<(I & APART ? VW + I - APART : I)...>(a, b);
    row[i + APART] = pick<(I & APART ? VW + I : I + APART)...>(a, b);
  }
  if constexpr (APART > 1) transpose<APART / 2>(row, lanes);
}

// VW units that stand together along k, from src on: numbers as they are, or twice as many rounded to pairs of bfloat16.
template <bool BF, int... I> inline vm units_at(const float* src, Lanes<I...>) {
  vm low, high;
  std::memcpy(&low, src, sizeof(vm));
  if constexpr (BF) {
    std::memcpy(&high, src + VW, sizeof(vm));
    low = (low + 0x7fffu + ((low >> 16) & 1)) >> 16, high = (high + 0x7fffu + ((high >> 16) & 1)) >> 16;
    return pick<2 * I...>(low, high) | pick<2 * I + 1 ...>(low, high) << 16;
  }
  return low;
}

// B(k, n) is src[k * sk + n * sn], one of the strides 1. Columns beyond N and the odd k beyond K are zero.
template <bool BF> void pack(float* dst, const float* src, int64_t K, int64_t N, int width, int64_t sk, int64_t sn) {
  constexpr int64_t EACH = BF ? 2 : 1;  // numbers of a unit
  const int64_t units = (K + EACH - 1) / EACH;
  if (N < width) std::fill(dst, dst + units * width, 0.0f);
  int64_t squares = 0, wide = 0;  // units and columns that are packed square by square: where k is contiguous, one column after the other is read in vectors
  if (sn != 1) {
    squares = K / EACH / VW * VW, wide = N / VW * VW;
    const auto lanes = std::make_integer_sequence<int, VW>{};
    for (int64_t n = 0; n < wide; n += VW)
      for (int64_t u = 0; u < squares; u += VW) {
        vm row[VW];
        UNROLL for (int i = 0; i < VW; i++) row[i] = units_at<BF>(src + (n + i) * sn + u * EACH, lanes);
        transpose<VW / 2>(row, lanes);
        UNROLL for (int i = 0; i < VW; i++) std::memcpy(dst + (u + i) * width + n, &row[i], sizeof(vm));
      }
  }
  for (int64_t u = 0; u < units; u++, dst += width, src += EACH * sk) {
    const int64_t first = u < squares ? wide : 0;
    auto line = [&](auto one) {  // the compiler makes vectors of this where the stride is 1
      const int64_t stride = one ? 1 : sn;
      if constexpr (BF) {
        if (2 * u + 1 < K) { for (int64_t n = first; n < N; n++) dst[n] = as_float(pair(src[n * stride], src[sk + n * stride])); }
        else { for (int64_t n = first; n < N; n++) dst[n] = as_float(pair(src[n * stride], 0.0f)); }
      } else {
        for (int64_t n = first; n < N; n++) dst[n] = src[n * stride];
      }
    };
    if (sn == 1) line(std::true_type{}); else line(std::false_type{});
  }
}

struct Scratch {  // kept by each thread: fresh pages cost more than what is written into them
  std::vector<float> memory;
  float* take(int64_t n) { if (int64_t(memory.size()) < n + 16) memory.resize(n + 16); return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64); }
};

// finish(i, n, count, values): what becomes of `count` sums of row i from column n on, at `values` (a vector)
template <int NV, bool ACROSS, bool BF, class F>
void product(int64_t M, int64_t N, int64_t K, const Unit* a, int64_t s, const float* b, int64_t sk, int64_t sn, int threads, F finish) {
  constexpr int W = NV * VW;
  const int64_t units = BF ? (K + 1) / 2 : K, panels = (N + W - 1) / W;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < panels; p++) {
    static thread_local Scratch scratch;
    float* panel = scratch.take(units * W);
    const int64_t n0 = p * W, valid = std::min<int64_t>(W, N - n0);
    pack<BF>(panel, b + n0 * sn, K, valid, W, sk, sn);
    auto rows = [&](auto count, int64_t i) {
      constexpr int R = count();
      vf acc[R][NV];
      tile<R, NV, ACROSS, BF>(units, a + (ACROSS ? i : i * s), s, panel, acc);
      UNROLL for (int r = 0; r < R; r++) { UNROLL for (int v = 0; v < NV; v++) finish(i + r, n0 + v * VW, valid - v * VW, acc[r][v]); }
    };
    int64_t i = 0;
    for (; i + MR <= M; i += MR) rows(std::integral_constant<int, MR>{}, i);
    for (; i + 4 <= M; i += 4) rows(std::integral_constant<int, 4>{}, i);
    for (; i < M; i++) rows(std::integral_constant<int, 1>{}, i);
  }
}

template <class F> inline void lanes(int64_t count, vf x, float* out, F f) {  // out[e] = f(x[e], e), whole vectors where they fit
  if (count >= VW) { vf y = f(x, 0); std::memcpy(out, &y, sizeof(vf)); return; }
  if (count <= 0) return;
  vf y = f(x, count);
  std::memcpy(out, &y, count * sizeof(float));
}
inline vf part(const float* p, int64_t count) {  // `count` floats, all of a vector where it is 0
  vf v{};
  if (count) std::memcpy(&v, p, count * sizeof(float)); else std::memcpy(&v, p, sizeof(vf));
  return v;
}

// A of a bfloat16 product: (M, K) as it stands, K even; transposed, (K, M) in pairs of rows.
const Unit* paired(Scratch& scratch, const float* a, int64_t M, int64_t K) {
  float* out = scratch.take(M * K / 2);
  uint16_t* halves = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < M * K; i++) halves[i] = uint16_t(rounded(a[i]));
  return reinterpret_cast<const Unit*>(out);
}
const Unit* paired_rows(Scratch& scratch, const float* a, int64_t K, int64_t M) {
  float* out = scratch.take(M * ((K + 1) / 2));
  pack<true>(out, a, K, M, int(M), M, 1);
  return reinterpret_cast<const Unit*>(out);
}

// C (M, N) from A (M, K), or ACROSS from A (K, M), contiguous.
template <bool ACROSS, class F>
void multiply(bool bf, int64_t M, int64_t N, int64_t K, const float* a, const float* b, int64_t sk, int64_t sn, int threads, F finish) {
  static thread_local Scratch scratch;
  const int used = M * N * K > 1000000 ? threads : 1;  // waking a thread costs as much as a million multiplications
#if defined(__AVX512BF16__)
  if (bf) {
    if (ACROSS) return product<2, true, true>(M, N, K, paired_rows(scratch, a, K, M), M, b, sk, sn, used, finish);
    return product<2, false, true>(M, N, K, paired(scratch, a, M, K), K / 2, b, sk, sn, used, finish);
  }
#endif
  const Unit* units = reinterpret_cast<const Unit*>(a);
  const int64_t s = ACROSS ? M : K;
  if (N <= VW) return product<1, ACROSS, false>(M, N, K, units, s, b, sk, sn, used, finish);
  product<2, ACROSS, false>(M, N, K, units, s, b, sk, sn, used, finish);
}

// tanh |x| = m / (m + 2) with m = exp(2 |x|) - 1 = 2^n (exp(r) - 1) + (2^n - 1), where 2 |x| = n log 2 + r and |r| <= log(2) / 2: no digits are lost near 0.
// Taylor's series of exp(r) - 1 to r^7 leaves 2e-8 of it. From |x| = 10 on the nearest float is 1. NaN stays NaN.
inline vf tanh(vf x) {
  const vu sign = (vu)x & 0x80000000u;
  vf y = 2 * (vf)((vu)x ^ sign);
  const vu big = (vu)(y > 20);
  y = (vf)(((vu)y & ~big) | ((vu)(vf{} + 20.0f) & big));
  const vi n = __builtin_convertvector(y * 1.44269504f + 0.5f, vi);
  const vf m = __builtin_convertvector(n, vf), r = y - m * 0.693359375f + m * 2.12194440e-4f;  // log 2 in two parts, the first with zeros at its end
  const vf p = r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f + r * (1 / 5040.0f)))))));
  const vf scale = (vf)((n + 127) << 23), e = scale * p + (scale - 1);
  return (vf)((vu)(e / (e + 2)) | sign);
}

enum Activation { RELU, TANH };
inline vf activation(int kind, vf x) { return kind == TANH ? tanh(x) : (vf)((vu)x & (vu)(x > 0)); }
inline vf chained(int kind, vf grad, vf y) { return kind == TANH ? grad * (1 - y * y) : (vf)((vu)grad & (vu)(y > 0)); }  // grad dy/dx, from y

// Which layers multiply bfloat16: between hidden layers, where nearly all the work is.
bool narrow(int bf, int64_t l, int64_t layers, const int64_t* sizes) {
  return bf && l > 0 && l < layers - 1 && sizes[l] % 2 == 0 && sizes[l + 1] % 2 == 0 && std::min(sizes[l], sizes[l + 1]) >= 64;
}

}  // namespace

extern "C" {

// 1 where bfloat16 products are in this build.
int onetorch_mlp_bf16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// x (B, sizes[0]) -> out (count, B, sizes[layers]); hidden: what the hidden layers gave, one after the other, net by net. `flat`: weights (out, in) and biases. kind: Activation.
void onetorch_mlp_forward(int bf, int kind, int64_t count, int64_t B, int64_t layers, const int64_t* sizes, const float* x, const float* flat, float* hidden, float* out, int threads) {
  for (int64_t net = 0; net < count; net++) {
    const float* in = x;
    for (int64_t l = 0; l < layers; l++) {
      const int64_t K = sizes[l], N = sizes[l + 1];
      const bool last = l == layers - 1;
      const float *weight = flat, *bias = flat + N * K;
      float* to = last ? out : hidden;
      multiply<false>(narrow(bf, l, layers, sizes), B, N, K, in, weight, 1, K, threads, [&](int64_t i, int64_t n, int64_t left, vf sum) {
        lanes(left, sum, to + i * N + n, [&](vf v, int64_t some) {
          v += part(bias + n, some);
          return last ? v : activation(kind, v);
        });
      });
      flat += N * K + N, in = to;
      (last ? out : hidden) += B * N;
    }
  }
}

// grad (count, B, sizes[layers]) -> grad_flat (null: not wanted) and grad_x (null: not wanted), the sum over the nets. work: 2 B max(sizes) floats.
void onetorch_mlp_backward(int bf, int kind, int64_t count, int64_t B, int64_t layers, const int64_t* sizes, const float* x, const float* flat, const float* hidden, const float* grad,
                           float* grad_flat, float* grad_x, float* work, int threads) {
  int64_t weights = 0, widths = 0, widest = 0;
  for (int64_t l = 0; l < layers; l++) weights += sizes[l] * sizes[l + 1] + sizes[l + 1], widths += l ? sizes[l] : 0, widest = std::max(widest, sizes[l]);
  for (int64_t net = 0; net < count; net++) {
    const float *w = flat + (net + 1) * weights, *h = hidden + (net + 1) * B * widths, *g = grad + net * B * sizes[layers];
    float* gw = grad_flat ? grad_flat + (net + 1) * weights : nullptr;
    for (int64_t l = layers - 1; l >= 0; l--) {
      const int64_t K = sizes[l], N = sizes[l + 1];
      const bool wide = narrow(bf, l, layers, sizes);
      w -= N * K + N;
      if (l) h -= B * K;
      const float* in = l ? h : x;
      if (gw) {
        gw -= N * K + N;
        multiply<true>(wide, N, K, B, g, in, K, 1, threads, [&](int64_t i, int64_t n, int64_t left, vf sum) {
          lanes(left, sum, gw + i * K + n, [](vf v, int64_t) { return v; });
        });
        float* bias = gw + N * K;
        std::fill(bias, bias + N, 0.0f);
        for (int64_t b = 0; b < B; b++)
          for (int64_t n = 0; n < N; n++) bias[n] += g[b * N + n];
      }
      if (!l && !grad_x) break;
      float* to = l ? work + (l % 2) * B * widest : grad_x;
      multiply<false>(wide, B, K, N, g, w, K, 1, threads, [&](int64_t i, int64_t n, int64_t left, vf sum) {
        lanes(left, sum, to + i * K + n, [&](vf v, int64_t some) {
          if (l) return chained(kind, v, part(h + i * K + n, some));
          return net ? v + part(to + i * K + n, some) : v;
        });
      });
      g = to;
    }
  }
}
}
