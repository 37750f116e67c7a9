// Block-sparse products for the CPU.
//
//   dds:  Y[g,h] = X[g,h] @ op(S[g,h])   each tile of MR rows x NR columns stays in registers while the kept blocks of its column pass
//   sdd:  S[g,h] = A[g,h] @ B[g,h]       at the kept blocks only
//
// The dense operand is packed once into tiles; the blocks of a column are packed (transposed, converted, cleared beyond the edge) by the thread that uses them.
// Threads take columns dynamically. Every output element is summed in one fixed order by one thread: results do not depend on the schedule.
#include "kernels.h"

namespace {

// The kept blocks of one side: block column c of head h owns entries offsets[h * cols + c] ... of `rows` (its block rows, counted over all heads) and `order` (where its values stand).
struct Side { const int32_t *offsets, *rows, *order; int64_t R, C; };  // order null: in place

template <class Acc, int VW> inline vec<Acc, VW> dot(vec<Acc, VW> c, vec<Acc, VW> a, vec<Acc, VW> b) { return c + a * b; }
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
template <class Acc, int VW> inline vec<float, VW> dot(vec<float, VW> c, vec<uint32_t, VW> a, vec<uint32_t, VW> b) {
  if constexpr (VW == 16) return (vec<float, VW>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  else return (vec<float, VW>)_mm256_dpbf16_ps((__m256)c, (__m256bh)a, (__m256bh)b);
}
#endif

// At most eight rows of X against the transposed matrix of whole blocks: the time is that of reading the values, so they are read once, where they stand.
template <class T, int VW, int TOKENS, int LINES>
void few(const T* x, int64_t M, int64_t K, int64_t xm, int64_t xk, const T* w, int64_t bk, int64_t bn, Side side, const T* bias, T* y, int64_t N, int threads) {
  using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc;
  constexpr int step = VW * Mode<T>::P;
  Buffer<T> X(TOKENS * K);
  for (int64_t t = 0; t < TOKENS; t++)
    for (int64_t k = 0; k < K; k++) X.data[t * K + k] = t < M ? x[t * xm + k * xk] : T{};
  PRAGMA(omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1))
  for (int64_t c = 0; c < side.C; c++) {
    const int64_t first = side.offsets[c], n = side.offsets[c + 1] - first;
    for (int64_t line = 0; line < bn; line += LINES) {
      vec<Acc, VW> acc[LINES][TOKENS];
      UNROLL for (int i = 0; i < LINES; i++) { UNROLL for (int j = 0; j < TOKENS; j++) acc[i][j] = vec<Acc, VW>{}; }
      for (int64_t t = 0; t < n; t++) {
        const T *values = w + ((first + t) * bn + line) * bk, *tokens = X.data + side.rows[first + t] * bk;
        for (int64_t k = 0; k < bk; k += step) {
          vec<U, VW> v[TOKENS];
          UNROLL for (int j = 0; j < TOKENS; j++) v[j] = load<vec<U, VW>>(tokens + j * K + k);
          UNROLL for (int i = 0; i < LINES; i++) {
            __builtin_prefetch(values + (bn + i) * bk + k);  // the same place of the next block
            const vec<U, VW> u = load<vec<U, VW>>(values + i * bk + k);
            UNROLL for (int j = 0; j < TOKENS; j++) acc[i][j] = dot<Acc, VW>(acc[i][j], u, v[j]);
          }
        }
      }
      for (int i = 0; i < LINES; i++)
        for (int j = 0; j < std::min<int>(TOKENS, M); j++) {
          Acc sum = bias ? Acc(widen(bias[c * bn + line + i])) : Acc(0);
          for (int e = 0; e < VW; e++) sum += acc[i][j][e];
          narrow(sum, y[j * N + c * bn + line + i]);
        }
    }
  }
}

// Takes the problem if it is one for `few`.
template <class T>
bool try_few(const T* x, int64_t G, int64_t H, int64_t M, int64_t K, int64_t xm, int64_t xk, const T* w, int64_t bk, int64_t bn, int64_t wk, Side side, const T* bias, T* y, int64_t N, int threads) {
  using E = typename Mode<T>::E;
  if constexpr (std::is_same<T, E>::value) {
    constexpr int full = kVectorBytes / int(sizeof(typename Mode<T>::Acc)), P = Mode<T>::P;
    if (G != 1 || H != 1 || M > 8 || wk != 1 || side.order || K != side.R * bk || N != side.C * bn) return false;
    auto run = [&](auto width) {
      constexpr int VW = width();
      if (M == 1) few<T, VW, 1, 8>(x, M, K, xm, xk, w, bk, bn, side, bias, y, N, threads);
      else if (M == 2) few<T, VW, 2, 8>(x, M, K, xm, xk, w, bk, bn, side, bias, y, N, threads);
      else if (M <= 4) few<T, VW, 4, 4>(x, M, K, xm, xk, w, bk, bn, side, bias, y, N, threads);
      else few<T, VW, 8, 2>(x, M, K, xm, xk, w, bk, bn, side, bias, y, N, threads);
      return true;
    };
    if (bk % (full * P) == 0) return run(std::integral_constant<int, full>{});
    if constexpr (full > 8) { if (bk % (8 * P) == 0) return run(std::integral_constant<int, 8>{}); }
  }
  return false;
}

template <class T, int VW, int NV>
void dds(const T* x, int64_t G, int64_t H, int64_t M, int64_t K, int64_t xg, int64_t xh, int64_t xm, int64_t xk,
         const T* w, int64_t wg, int64_t bk, int64_t bn, int64_t wk, int64_t wn, Side side, const T* bias, T* y, int64_t N, int threads) {
  using E = typename Mode<T>::E; using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc;
  constexpr int P = Mode<T>::P, NR = VW * NV;
  constexpr int64_t kResident = 16384;  // bytes of a panel that stay in the first-level cache while all tiles pass over it
  const int64_t tiles = (M + MR - 1) / MR, padded = side.R * bk, columns = G * H * side.C;
  const int64_t slice = std::max<int64_t>(1, kResident / int64_t(bk * NR * sizeof(E)));  // blocks per pass
  int64_t most = 0;
  for (int64_t c = 0; c < H * side.C; c++) most = std::max<int64_t>(most, side.offsets[c + 1] - side.offsets[c]);
  // A task is a block column for a range of tiles; tiles are split only where there are too few columns to keep the threads busy.
  const int64_t splits = std::min(tiles, std::max<int64_t>(1, (4 * threads - 1) / columns + 1)), group = (tiles + splits - 1) / splits;
  Buffer<E> X(G * H * tiles * padded * MR), W(threads * most * bk * bn);
  Buffer<Acc> S(threads * group * MR * NR);
  PRAGMA(omp parallel num_threads(threads) if (threads > 1)) {
    E* panel = W.data + thread_index() * most * bk * bn;
    Acc* sums = S.data + thread_index() * group * MR * NR;
    PRAGMA(omp for schedule(static))
    for (int64_t p = 0; p < G * H * tiles; p++) {
      int64_t gh = p / tiles, m = p % tiles * MR;
      pack_tile<T, E>(X.data + p * padded * MR, x + gh / H * xg + gh % H * xh + m * xm, std::min<int64_t>(MR, M - m), K, padded, xm, xk);
    }
    PRAGMA(omp for schedule(dynamic, 1))
    for (int64_t q = 0; q < columns * splits; q++) {
      const int64_t gh = q / splits / side.C, c = q / splits % side.C, begin = q % splits * group, end = std::min(tiles, begin + group);
      const int64_t column = gh % H * side.C + c, first = side.offsets[column], n = side.offsets[column + 1] - first;
      const int32_t* rows = side.rows + first;
      const int64_t base = gh % H * side.R;
      const T* values = w + gh / H * wg;
      const bool sparse = 4 * n <= side.R;
      for (int64_t strip = 0; strip < bn; strip += NR) {
        const int64_t n0 = c * bn + strip, valid = N - n0;
        if (valid <= 0) break;
        for (int64_t t = 0; t < n; t++)
          pack_panel<T, E, P>(panel + t * bk * NR, values + (side.order ? side.order[first + t] : first + t) * bk * bn + strip * wn, std::min(bk, K - (rows[t] - base) * bk), bk, valid, NR, wk, wn);
        for (int64_t t0 = 0; t0 == 0 || t0 < n; t0 += slice) {
          const bool last = t0 + slice >= n;
          const U* wp = reinterpret_cast<const U*>(panel + t0 * bk * NR);
          for (int64_t tile = begin; tile < end; tile++) {
            const U* xp = reinterpret_cast<const U*>(X.data + (gh * tiles + tile) * padded * MR);
            T* out = y + (gh * M + tile * MR) * N + n0;
            Acc* partial = sums + (tile - begin) * MR * NR;
            const int64_t left = M - tile * MR;
            if (sparse && tile + 1 < end)  // few blocks far apart: the hardware does not foresee where the next tile is read
              for (int64_t t = 0; t < std::min(slice, n - t0); t++) {
                const char* next = reinterpret_cast<const char*>(xp) + (padded + (rows[t0 + t] - base) * bk) * MR * sizeof(E);
                for (int64_t e = 0; e < int64_t(bk * MR * sizeof(E)); e += 64) __builtin_prefetch(next + e, 0, 2);
              }
            if (last)  // the lines to be written arrive while the products run
              for (int64_t i = 0; i < std::min<int64_t>(MR, left); i++)
                for (int64_t e = 0; e < NR; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(out + i * N + e, 1);
            micro<U, Acc, VW, MR, NV, kChunk / P>(
                std::min(slice, n - t0), bk / P, t0 ? partial : nullptr, NR,
                [&](int64_t t, const U*& a, const U*& b) { a = xp + (rows[t0 + t] - base) * (bk / P * MR); b = wp + t * (bk / P * NR); },
                [&](int i, int j, vec<Acc, VW> v) {
                  if (!last) { std::memcpy(partial + i * NR + j * VW, &v, sizeof(v)); return; }
                  if (i >= left) return;
                  if (bias) for (int e = 0; e < VW && j * VW + e < valid; e++) v[e] += widen(bias[n0 + j * VW + e]);
                  emit<Acc, T, VW>(out + i * N + j * VW, v, valid - j * VW);
                });
          }
        }
      }
    }
  }
}

template <class T, int VW, int NV, int ROWS>
void sdd(const T* a, const T* b, int64_t G, int64_t H, int64_t M, int64_t N, int64_t K, int64_t ag, int64_t ah, int64_t am, int64_t ak,
         int64_t bg, int64_t bh, int64_t bk, int64_t bn, int64_t block_m, int64_t block_n, const int32_t* rows, const int32_t* columns, int64_t kept,
         int64_t R, int64_t C, int reduce, T* out, int threads) {
  using E = typename Mode<T>::E; using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc;
  constexpr int P = Mode<T>::P, NR = VW * NV;
  constexpr int64_t kSlice = 512;  // tokens per pass: one panel of each operand stays in the second-level cache
  const int64_t padded = (K + P - 1) / P * P, mp = R * block_m, np = C * block_n;
  Buffer<E> A(G * H * mp * padded), B(G * H * np * padded);
  PRAGMA(omp parallel num_threads(threads) if (threads > 1)) {
    PRAGMA(omp for schedule(static) nowait)
    for (int64_t q = 0; q < G * H * (mp / ROWS); q++) {
      int64_t gh = q / (mp / ROWS), m = q % (mp / ROWS) * ROWS;
      pack_panel<T, E, P>(A.data + q * ROWS * padded, a + gh / H * ag + gh % H * ah + m * am, K, padded, M - m, ROWS, ak, am);
    }
    PRAGMA(omp for schedule(static))
    for (int64_t q = 0; q < G * H * (np / NR); q++) {
      int64_t gh = q / (np / NR), n = q % (np / NR) * NR;
      pack_panel<T, E, P>(B.data + q * NR * padded, b + gh / H * bg + gh % H * bh + n * bn, K, padded, N - n, NR, bk, bn);
    }
    Acc sums[128 * 128];
    PRAGMA(omp for schedule(dynamic, 1))
    for (int64_t q = 0; q < (reduce ? 1 : G) * kept; q++) {
      const int64_t p = q % kept, h = rows[p] / R, r = rows[p] % R, c = columns[p] % C;
      T* o = out + q * block_m * block_n;
      const int64_t g0 = reduce ? 0 : q / kept, g1 = reduce ? G : g0 + 1;
      std::fill(sums, sums + block_m * block_n, Acc(0));
      for (int64_t g = g0; g < g1; g++)
        for (int64_t k = 0; k < padded; k += kSlice) {
          const int64_t units = std::min(kSlice, padded - k) / P;
          for (int64_t n = 0; n < block_n; n += NR) {
            const U* bp = reinterpret_cast<const U*>(B.data + ((g * H + h) * np + c * block_n + n) * padded + k * NR);
            for (int64_t m = 0; m < block_m; m += ROWS) {
              const U* ap = reinterpret_cast<const U*>(A.data + ((g * H + h) * mp + r * block_m + m) * padded + k * ROWS);
              Acc* s = sums + m * block_n + n;
              micro<U, Acc, VW, ROWS, NV, 1>(1, units, s, block_n, [&](int64_t, const U*& x, const U*& z) { x = ap; z = bp; },
                                             [&](int i, int j, vec<Acc, VW> v) { std::memcpy(s + i * block_n + j * VW, &v, sizeof(v)); });
            }
          }
        }
      const int64_t rows_in = std::min(block_m, M - r * block_m), columns_in = std::min(block_n, N - c * block_n);
      if (rows_in < block_m || columns_in < block_n)  // an infinity times the padding would be NaN
        for (int64_t i = 0; i < block_m; i++) std::fill(sums + i * block_n + (i < rows_in ? columns_in : 0), sums + (i + 1) * block_n, Acc(0));
      for (int64_t i = 0; i < block_m * block_n; i++) narrow(sums[i], o[i]);
    }
  }
}
}  // namespace

extern "C" {
// strides in elements; wg = 0: one set of values for all G; order may be null. Returns 0, 1 (out of memory) or 2 (unknown dtype).
int onetorch_dds(int dtype, const void* x, const int64_t* xsize, const int64_t* xstride, const void* w, int64_t wg, int64_t bk, int64_t bn, int64_t wk, int64_t wn,
                 const int32_t* offsets, const int32_t* rows, const int32_t* order, int64_t R, int64_t C, const void* bias, void* y, int64_t N, int threads) {
  return dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    if (try_few<T>(static_cast<const T*>(x), xsize[0], xsize[1], xsize[2], xsize[3], xstride[2], xstride[3], static_cast<const T*>(w), bk, bn, wk, Side{offsets, rows, order, R, C},
                   static_cast<const T*>(bias), static_cast<T*>(y), N, threads)) return;
    widths<T>(bn, [&](auto vw, auto nv) {
      dds<T, vw(), nv()>(static_cast<const T*>(x), xsize[0], xsize[1], xsize[2], xsize[3], xstride[0], xstride[1], xstride[2], xstride[3],
                         static_cast<const T*>(w), wg, bk, bn, wk, wn, Side{offsets, rows, order, R, C}, static_cast<const T*>(bias), static_cast<T*>(y), N, threads);
    });
  });
}
int onetorch_sdd(int dtype, const void* a, const void* b, const int64_t* size, const int64_t* astride, const int64_t* bstride, int64_t block_m, int64_t block_n,
                 const int32_t* rows, const int32_t* columns, int64_t kept, int64_t R, int64_t C, int reduce, void* out, int threads) {
  return dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    widths<T>(block_n, [&](auto vw, auto nv) {
      auto run = [&](auto rows_per_tile) {
        sdd<T, vw(), nv(), rows_per_tile()>(static_cast<const T*>(a), static_cast<const T*>(b), size[0], size[1], size[2], size[3], size[4], astride[0], astride[1], astride[2], astride[3],
                                            bstride[0], bstride[1], bstride[2], bstride[3], block_m, block_n, rows, columns, kept, R, C, reduce, static_cast<T*>(out), threads);
      };
      if (kVectorBytes == 64 && nv() == 1 && block_m % 16 == 0) run(std::integral_constant<int, 16>{});
      else run(std::integral_constant<int, 8>{});
    });
  });
}
}
