// What the CPU kernels share: vector types, 16-bit floats, the register-tiled inner product, and packing.
// Plain C++17 with GCC/Clang vector types and a C interface, without torch's headers: it builds in seconds and fits any version.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define PRAGMA(x) _Pragma(#x)

namespace {

inline int64_t thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, MR = 12;  // 24 accumulators and 2 panel vectors of the 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, MR = 6;   // 12 accumulators of the 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, MR = 12;
#else
constexpr int kVectorBytes = 16, MR = 6;
#endif
constexpr int kChunk = 8;  // elements of one row that stand together in a packed tile; every block size is a multiple

// 16-bit floats as they lie in memory
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, e = (x.bits >> 10) & 31, m = x.bits & 1023, u;
  if (e == 31) u = sign | 0x7f800000u | (m << 13);
  else if (e) u = sign | ((e + 112) << 23) | (m << 13);
  else { float f = float(m) * 5.9604644775390625e-8f; std::memcpy(&u, &f, 4); u |= sign; }
  float f; std::memcpy(&f, &u, 4); return f;
#endif
}
inline void narrow(float x, float& y) { y = x; }
inline void narrow(double x, double& y) { y = x; }
inline void narrow(float x, bf16& y) {
  uint32_t u; std::memcpy(&u, &x, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  y.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
inline void narrow(float x, f16& y) {
#if defined(__F16C__)
  y.bits = _cvtss_sh(x, 0);
#else
  uint32_t u; std::memcpy(&u, &x, 4);
  uint16_t sign = uint16_t((u >> 16) & 0x8000); u &= 0x7fffffffu;
  if (u > 0x7f800000u) { y.bits = sign | 0x7e00; return; }
  if (u >= 0x477ff000u) { y.bits = sign | 0x7c00; return; }                  // rounds to infinity
  if (u < 0x38800000u) {                                                     // subnormal: add 0.5, whose last place is 2^-24
    float f; std::memcpy(&f, &u, 4); f += 0.5f; std::memcpy(&u, &f, 4); y.bits = uint16_t(sign | (u - 0x3f000000u)); return;
  }
  y.bits = uint16_t(sign | ((u - 0x38000000u + 0xfffu + ((u >> 13) & 1)) >> 13));
#endif
}

template <class T, int N> struct Vector { typedef T type __attribute__((vector_size(sizeof(T) * N))); };
template <class T, int N> using vec = typename Vector<T, N>::type;
template <class V, class P> inline V load(const P* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }

// How a dtype is computed: E the packed element, U the unit one vector lane multiplies (two bf16 where the machine multiplies pairs), Acc the accumulator.
template <class T> struct Mode { using E = float; using U = float; using Acc = float; static constexpr int P = 1; };
template <> struct Mode<double> { using E = double; using U = double; using Acc = double; static constexpr int P = 1; };
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
template <> struct Mode<bf16> { using E = bf16; using U = uint32_t; using Acc = float; static constexpr int P = 2; };
#endif
inline void put(float x, float& y) { y = x; }
inline void put(double x, double& y) { y = x; }
inline void put(bf16 x, float& y) { y = widen(x); }
inline void put(f16 x, float& y) { y = widen(x); }
inline void put(bf16 x, bf16& y) { y = x; }

template <class Acc, int N> inline vec<Acc, N> fma(vec<Acc, N> c, Acc a, const Acc* b) { return c + load<vec<Acc, N>>(b) * a; }
template <class Acc, int N> inline vec<Acc, N> fma(vec<Acc, N> c, Acc a, vec<Acc, N> b) { return c + b * a; }
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
template <class Acc, int N> inline vec<float, N> fma(vec<float, N> c, uint32_t a, vec<uint32_t, N> b) {
  if constexpr (N == 16) return (vec<float, N>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  else return (vec<float, N>)_mm256_dpbf16_ps((__m256)c, (__m256bh)_mm256_set1_epi32(int(a)), (__m256bh)b);
}
#endif

// C (ROWS x VW*NV) += sum over n panels of A (ROWS x units) @ B (units x VW*NV), with the accumulators in registers throughout.
// A: unit (i, k) at (k / CH) * ROWS * CH + i * CH + k % CH; B: units x (VW*NV), contiguous. `next` yields the panels, `sums` (row-major, or null for zero) where the accumulators begin.
template <class U, class Acc, int VW, int ROWS, int NV, int CH, class Next, class Store>
inline __attribute__((always_inline)) void micro(int64_t n, int64_t units, const Acc* sums, int64_t ld, Next next, Store store) {
  vec<Acc, VW> acc[ROWS][NV];
  if (sums) { UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) acc[i][j] = load<vec<Acc, VW>>(sums + i * ld + j * VW); } }
  else { UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) acc[i][j] = vec<Acc, VW>{}; } }
  for (int64_t t = 0; t < n; t++) {
    const U *a, *b;
    next(t, a, b);
    for (int64_t k = 0; k < units; k += CH) {
      auto step = [&](int kk) __attribute__((always_inline)) {
        vec<U, VW> v[NV];
        UNROLL for (int j = 0; j < NV; j++) v[j] = load<vec<U, VW>>(b + j * VW);
        UNROLL for (int i = 0; i < ROWS; i++) {
          U s = a[i * CH + kk];
          UNROLL for (int j = 0; j < NV; j++) acc[i][j] = fma<Acc, VW>(acc[i][j], s, v[j]);
        }
        b += VW * NV;
      };
      if constexpr (CH <= 8) { UNROLL for (int kk = 0; kk < CH; kk++) step(kk); }
      else for (int kk = 0; kk < CH; kk++) step(kk);
      a += ROWS * CH;
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) store(i, j, acc[i][j]); }
}

// Packing. A tile holds MR rows: element (i, k) at (k / 8) * MR * 8 + i * 8 + k % 8, zeros beyond `rows` and `ks`.
template <class T, class E> void pack_tile(E* dst, const T* src, int64_t rows, int64_t ks, int64_t padded, int64_t row_stride, int64_t k_stride) {
  constexpr int64_t line = 64 / sizeof(T);  // rows are often 4096 bytes apart, one set of the first-level cache: a line is read as a whole, while it is there
  const E zero{};
  int64_t k = 0;
  if (rows == MR && k_stride == 1)
    for (; k + line <= std::min(ks, padded); k += line)
      for (int i = 0; i < MR; i++) {
        const T* s = src + i * row_stride + k;
        UNROLL for (int c = 0; c < line; c += kChunk) { UNROLL for (int e = 0; e < kChunk; e++) put(s[c + e], dst[(k + c) * MR + i * kChunk + e]); }
      }
  for (dst += k * MR; k < padded; k += kChunk, dst += MR * kChunk) {
    if (rows == MR && k + kChunk <= ks) {
      UNROLL for (int e = 0; e < kChunk; e++) {
        const T* s = src + (k + e) * k_stride;
        for (int i = 0; i < MR; i++) put(s[i * row_stride], dst[i * kChunk + e]);
      }
    } else {
      for (int i = 0; i < MR; i++)
        for (int e = 0; e < kChunk; e++)
          if (i < rows && k + e < ks) put(src[i * row_stride + (k + e) * k_stride], dst[i * kChunk + e]); else dst[i * kChunk + e] = zero;
    }
  }
}

// 32-bit transpose of W x W words, dst rows `ld` words apart
template <int W> inline void transpose_words(uint32_t* dst, int64_t ld, const uint32_t* src, int64_t src_ld) {
  using V = vec<uint32_t, W>;
  V r[W], s[W];
  UNROLL for (int i = 0; i < W; i++) r[i] = load<V>(src + i * src_ld);
  V lo, hi;  // riffle of two rows; log2(W) rounds of it transpose
  for (int i = 0; i < W; i++) { lo[i] = uint32_t(i / 2 + (i & 1) * W); hi[i] = uint32_t(W / 2 + i / 2 + (i & 1) * W); }
  UNROLL for (int round = 1; round < W; round *= 2) {
#if defined(__clang__)
    for (int i = 0; i < W / 2; i++)
      for (int e = 0; e < W; e++) { s[2 * i][e] = e & 1 ? r[i + W / 2][e / 2] : r[i][e / 2]; s[2 * i + 1][e] = e & 1 ? r[i + W / 2][W / 2 + e / 2] : r[i][W / 2 + e / 2]; }
#else
    UNROLL for (int i = 0; i < W / 2; i++) { s[2 * i] = __builtin_shuffle(r[i], r[i + W / 2], lo); s[2 * i + 1] = __builtin_shuffle(r[i], r[i + W / 2], hi); }
#endif
    UNROLL for (int i = 0; i < W; i++) r[i] = s[i];
  }
  UNROLL for (int i = 0; i < W; i++) std::memcpy(dst + i * ld, &r[i], sizeof(V));
}

// A panel holds `width` columns: unit (k, n) at k * width + n, where a unit is P consecutive k; zeros beyond `ks` and `ns`.
template <class T, class E, int P, int width> void pack_panel(E* dst, const T* src, int64_t ks, int64_t padded_k, int64_t ns, int64_t k_stride, int64_t n_stride) {
  const E zero{};
  if constexpr (sizeof(E) * P == 4 && sizeof(T) == sizeof(E)) {  // words: float, or a pair of bf16 that stands together along k
    if (k_stride == 1 && ns >= width && width % 8 == 0 && ks >= padded_k) {
      int64_t units = padded_k / P;
      if (n_stride % P == 0 && units % 8 == 0) {
        const uint32_t* s = reinterpret_cast<const uint32_t*>(src);
        for (int64_t k = 0; k < units; ) {
          for (int n = 0; n < width; n++) __builtin_prefetch(s + n * (n_stride / P) + k + 16);  // rows often lie a page apart, where the machine does not look ahead
          if (kVectorBytes == 64 && width % 16 == 0 && k + 16 <= units) {
            for (int n = 0; n < width; n += 16) transpose_words<16>(reinterpret_cast<uint32_t*>(dst) + k * width + n, width, s + n * (n_stride / P) + k, n_stride / P);
            k += 16;
          } else {
            for (int n = 0; n < width; n += 8) transpose_words<8>(reinterpret_cast<uint32_t*>(dst) + k * width + n, width, s + n * (n_stride / P) + k, n_stride / P);
            k += 8;
          }
        }
        return;
      }
    }
  }
  for (int64_t k = 0; k < padded_k; k += P, dst += width * P) {
    if (n_stride == 1 && ns >= width && k + P <= ks) {
      const T *s0 = src + k * k_stride, *s1 = s0 + (P - 1) * k_stride;
      if constexpr (P == 1) { for (int n = 0; n < width; n++) put(s0[n], dst[n]); }
      else {
        uint32_t* d = reinterpret_cast<uint32_t*>(dst);
        const uint16_t *u0 = reinterpret_cast<const uint16_t*>(s0), *u1 = reinterpret_cast<const uint16_t*>(s1);
        for (int n = 0; n < width; n++) d[n] = uint32_t(u0[n]) | uint32_t(u1[n]) << 16;
      }
    } else {
      for (int n = 0; n < width; n++)
        for (int e = 0; e < P; e++)
          if (n < ns && k + e < ks) put(src[(k + e) * k_stride + n * n_stride], dst[n * P + e]); else dst[n * P + e] = zero;
    }
  }
}

// Scratch memory, 64-byte aligned, not initialised. Each thread that calls the kernels keeps its last few pieces: fresh pages cost more than what is written into them.
struct Scratch {
  static constexpr int kPieces = 4;
  static constexpr size_t kLargest = size_t(1) << 28;  // larger ones go back at once
  void* pieces[kPieces] = {};
  size_t sizes[kPieces] = {};
  ~Scratch() { for (void* p : pieces) std::free(p); }
  void* take(size_t bytes, size_t& got) {
    int best = -1;
    for (int i = 0; i < kPieces; i++)
      if (pieces[i] && sizes[i] >= bytes && (best < 0 || sizes[i] < sizes[best])) best = i;
    if (best >= 0) { void* p = pieces[best]; got = sizes[best]; pieces[best] = nullptr; return p; }
    got = bytes;
    return std::aligned_alloc(64, bytes);
  }
  void give(void* p, size_t bytes) {
    int least = 0;  // an empty place, or else the smallest piece
    for (int i = 1; i < kPieces; i++)
      if (pieces[least] && (!pieces[i] || sizes[i] < sizes[least])) least = i;
    if (bytes > kLargest || (pieces[least] && sizes[least] >= bytes)) { std::free(p); return; }
    std::free(pieces[least]);
    pieces[least] = p, sizes[least] = bytes;
  }
};
inline Scratch& scratch() { static thread_local Scratch s; return s; }
template <class T> struct Buffer {
  size_t bytes;
  T* data;
  explicit Buffer(int64_t n) : data(static_cast<T*>(scratch().take((size_t(n) * sizeof(T) + 127) / 64 * 64, bytes))) { if (!data) throw std::bad_alloc(); }
  ~Buffer() { scratch().give(data, bytes); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <class Acc, class T, int VW> inline void emit(T* dst, vec<Acc, VW> v, int64_t valid) {  // one vector to memory, at most `valid` elements
  if constexpr (sizeof(Acc) == sizeof(T)) {
    if (valid >= VW) { std::memcpy(dst, &v, sizeof(v)); return; }
  }
#if defined(__AVX512F__) && defined(__AVX512BF16__)
  if constexpr (VW == 16 && std::is_same<T, bf16>::value) {
    if (valid >= VW) { __m256bh packed = _mm512_cvtneps_pbh((__m512)v); std::memcpy(dst, &packed, 32); return; }
  }
#endif
#if defined(__AVX512F__)
  if constexpr (VW == 16 && std::is_same<T, f16>::value) {
    if (valid >= VW) { __m256i packed = _mm512_cvtps_ph((__m512)v, 0); std::memcpy(dst, &packed, 32); return; }
  }
#endif
  Acc x[VW];
  std::memcpy(x, &v, sizeof(v));
  if (valid >= VW) { UNROLL for (int e = 0; e < VW; e++) narrow(x[e], dst[e]); }
  else for (int e = 0; e < valid; e++) narrow(x[e], dst[e]);
}

// Whole lines that go past the caches: a result larger than the second-level cache is written without its old lines being fetched first. After the last of
// them a thread says `stream_end`, so that whoever waits for it sees them.
#if defined(__AVX512F__)
template <class T> bool streams(const T* y, int64_t size, int64_t row, int64_t columns) {
  return size * int64_t(sizeof(T)) > 1 << 20 && reinterpret_cast<uintptr_t>(y) % 64 == 0 && row * sizeof(T) % 64 == 0 && columns * sizeof(T) % 64 == 0;
}
inline void stream_line(void* to, const void* from) { _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from)); }
inline void stream_end() { _mm_sfence(); }
#else
template <class T> bool streams(const T*, int64_t, int64_t, int64_t) { return false; }
inline void stream_line(void* to, const void* from) { std::memcpy(to, from, 64); }
inline void stream_end() {}
#endif

template <class T, class F> void widths(int64_t bn, F f) {  // the widest panel that divides the block
  constexpr int full = kVectorBytes / int(sizeof(typename Mode<T>::Acc));
  if (bn % (2 * full) == 0) f(std::integral_constant<int, full>{}, std::integral_constant<int, 2>{});
  else if (bn % full == 0) f(std::integral_constant<int, full>{}, std::integral_constant<int, 1>{});
  else f(std::integral_constant<int, (full < 8 ? full : 8)>{}, std::integral_constant<int, 1>{});
}
template <class F> int dispatch(int dtype, F f) {
  try {
    switch (dtype) {
      case 0: f(float{}); return 0;
      case 1: f(double{}); return 0;
      case 2: f(bf16{}); return 0;
      case 3: f(f16{}); return 0;
    }
  } catch (const std::bad_alloc&) { return 1; }
  return 2;
}
}  // namespace
