// Block-sparse products for the CPU.
//
//   dds:  Y[g,h] = X[g,h] @ op(S[g,h])   each tile of MR rows x NR columns stays in registers while the kept blocks of its column pass
//   sdd:  S[g,h] = A[g,h] @ B[g,h]       at the kept blocks only
//
// Four kernels for dds. `few` and `many` multiply whole blocks, by the number of tokens: the values are read where they stand, and tokens are packed across the lanes.
// `few` wants the values as (output, input); `many` takes them the other way, too (of bfloat16 a few blocks at a time are then brought into pairs of inputs). `direct` is
// for many tokens and few blocks: outputs run across the lanes, tokens are read where they stand, and the values are packed. `dds` takes the rest (batches, heads, odd
// sizes, other dtypes): it packs tokens into tiles and values into panels (transposed, converted, cleared beyond the edge). In the last three a thread takes a panel of
// tokens that stays in its second-level cache, and all columns past it. Every output element is summed in one fixed order: results do not depend on the schedule.
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

// S units at `from`, again and again in all VW lanes. Words are integers here: a compiler knows no sum with 0 of floats that it could leave out.
template <class U, int VW, int S> inline vec<U, VW> repeat(const void* from) {
  using Word = std::conditional_t<S * sizeof(U) == 8, uint64_t, uint32_t>;
  if constexpr (S == VW) return load<vec<U, VW>>(from);
  else if constexpr (S * sizeof(U) == sizeof(Word)) { Word word; std::memcpy(&word, from, sizeof(Word)); return (vec<U, VW>)(vec<Word, VW / S>{} + word); }
#if defined(__AVX512F__)
  else if constexpr (S == 4) return (vec<U, VW>)_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  else return (vec<U, VW>)_mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(__AVX__)
  else return (vec<U, VW>)_mm256_broadcast_ps(static_cast<const __m128*>(from));
#endif
}

// At most some tens of rows of X against the transposed matrix of whole blocks. The time is that of reading the values, so they are read where they stand, in the order
// in which they stand; the sums of a column of blocks wait in the first-level cache. Tokens run across the lanes, each in S of them: lane s of a token sums every S-th unit.
template <class T, int VW, int NV, int S, int ROWS>
void few(const T* x, int64_t M, int64_t K, int64_t xm, int64_t xk, const T* w, int64_t bk, int64_t bn, Side side, const T* bias, T* y, int64_t N, int threads) {
  using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc; using V = vec<Acc, VW>;
  constexpr int64_t chunk = S * Mode<T>::P, TOKENS = VW * NV / S, bytes = ROWS * S * int64_t(sizeof(U));
  constexpr int64_t window = 16384;  // bytes of values between two visits to the sums; the way to memory takes as long
  // The values of one token are through so soon that it counts to read them in order, page by page: then no more than a block lies between two visits.
  const int64_t line = bk * int64_t(sizeof(T));
  const bool by_block = S == 16 && bn * line >= 4096;
  const int64_t groups = (M + TOKENS - 1) / TOKENS, span = by_block ? 1 : std::max<int64_t>(1, window / (bn * line));
  Buffer<T> X(groups * TOKENS * K);  // element (token, k) of a group at ((k / chunk) * TOKENS + token) * chunk + k % chunk
  for (int64_t g = 0; g < groups; g++) {
    T* to = X.data + g * TOKENS * K;
    const T* from = x + g * TOKENS * xm;
    if constexpr (S == 1) pack_panel<T, T, Mode<T>::P, TOKENS>(to, from, K, K, M - g * TOKENS, xk, xm);
    else
      for (int64_t k = 0; k < K; k += chunk)
        for (int64_t t = 0; t < TOKENS; t++, to += chunk)
          if (t >= M) std::fill(to, to + chunk, T{});  // one group is all there is
          else if (xk == 1) std::memcpy(to, from + t * xm + k, chunk * sizeof(T));
          else for (int e = 0; e < chunk; e++) to[e] = from[t * xm + (k + e) * xk];
  }
  PRAGMA(omp parallel num_threads(threads) if (threads > 1))
  {
    Buffer<V> sums(bn * NV);
    PRAGMA(omp for schedule(dynamic, 1))
    for (int64_t c = 0; c < side.C; c++) {
      const int64_t first = side.offsets[c], n = side.offsets[c + 1] - first;
      for (int64_t g = 0; g < groups; g++) {
        std::fill(sums.data, sums.data + bn * NV, V{});
        for (int64_t begin = 0; begin < n; begin += span)
          for (int64_t row = 0; row < bn; row += ROWS) {
            V acc[ROWS][NV];
            UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) acc[i][j] = sums.data[(row + i) * NV + j]; }
            for (int64_t t = first + begin; t < first + std::min(n, begin + span); t++) {
              const char *values = reinterpret_cast<const char*>(w + (t * bn + row) * bk), *later = values + window, *soon = values + window / 4;
              const T* tokens = X.data + g * TOKENS * K + side.rows[t] * bk * TOKENS;
              for (int64_t k = 0; k < line; k += chunk * sizeof(T), tokens += TOKENS * chunk, later += bytes, soon += bytes) {
                const char* at[ROWS / 4];  // few addresses for many rows
                UNROLL for (int i = 0; i < ROWS / 4; i++) at[i] = values + 4 * i * line + k;
                UNROLL for (int e = 0; e < bytes; e += 64) __builtin_prefetch(later + e, 0, 2);  // to the second-level cache: far more can be on the way there than to the first
                if (line > 128) { UNROLL for (int e = 0; e < bytes; e += 64) __builtin_prefetch(soon + e); }  // rows so long that the machine cannot tell what comes next
                vec<U, VW> v[NV];
                UNROLL for (int j = 0; j < NV; j++) v[j] = load<vec<U, VW>>(tokens + j * VW * Mode<T>::P);
                UNROLL for (int i = 0; i < ROWS; i++) {
                  const vec<U, VW> u = repeat<U, VW, S>(at[i / 4] + (i % 4) * line);
                  UNROLL for (int j = 0; j < NV; j++) acc[i][j] = dot<Acc, VW>(acc[i][j], u, v[j]);
                }
              }
            }
            UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) sums.data[(row + i) * NV + j] = acc[i][j]; }
          }
        const int64_t tokens = std::min<int64_t>(TOKENS, M - g * TOKENS);
        for (int64_t i = 0; i < bn; i += VW)
          for (int j = 0; j < NV; j++) {  // turned, the sums of a lane stand side by side
            const int64_t rows = std::min<int64_t>(VW, bn - i);
            Acc lanes[VW][VW] = {};
            for (int64_t r = 0; r < rows; r++) std::memcpy(lanes[r], sums.data + (i + r) * NV + j, sizeof(V));
            if constexpr (sizeof(Acc) == 4) transpose_words<VW>(reinterpret_cast<uint32_t*>(lanes), VW, reinterpret_cast<uint32_t*>(lanes), VW);
            else for (int r = 0; r < VW; r++) for (int e = 0; e < r; e++) std::swap(lanes[r][e], lanes[e][r]);
            for (int64_t t = 0; t < std::min<int64_t>(VW / S, tokens - j * VW / S); t++) {
              const int64_t at = c * bn + i;
              Acc sum[VW] = {};
              if (bias) for (int64_t r = 0; r < rows; r++) sum[r] = widen(bias[at + r]);
              UNROLL for (int e = 0; e < S; e++) for (int r = 0; r < VW; r++) sum[r] += lanes[t * S + e][r];
              T out[VW];
              for (int r = 0; r < VW; r++) narrow(sum[r], out[r]);
              std::memcpy(y + (g * TOKENS + j * VW / S + t) * N + at, out, rows * sizeof(T));
            }
          }
      }
    }
  }
}

// Takes the problem if it is one for `few`.
template <class T>
bool try_few(const T* x, int64_t G, int64_t H, int64_t M, int64_t K, int64_t xm, int64_t xk, const T* w, int64_t bk, int64_t bn, int64_t wk, Side side, const T* bias, T* y, int64_t N, int threads) {
  using E = typename Mode<T>::E; using Acc = typename Mode<T>::Acc;
  if constexpr (std::is_same<T, E>::value) {
    constexpr int VW = kVectorBytes / int(sizeof(Acc)), ROWS = kVectorBytes == 32 ? 8 : 16, P = Mode<T>::P;
    const bool all = kVectorBytes == 64 ? bn == ROWS : bn % ROWS == 0;  // eight rows are as many as the widest vectors need: the fewer, the more the values are read in the order in which they stand
    const int64_t most = bk * bn > 64 ? 64 : 512;  // tokens: for the smallest blocks `many` is no help
    if (G != 1 || H != 1 || M > most || wk != 1 || side.order || K != side.R * bk || N != side.C * bn) return false;
    auto run = [&](auto vectors, auto share) {
      constexpr int NV = vectors(), S = share();
      if (all) few<T, VW, NV, S, ROWS / NV>(x, M, K, xm, xk, w, bk, bn, side, bias, y, N, threads);
      else few<T, VW, NV, S, 8>(x, M, K, xm, xk, w, bk, bn, side, bias, y, N, threads);
      return true;
    };
    std::integral_constant<int, 1> one;
    if (M > VW) return run(std::integral_constant<int, 2>{}, one);
    if constexpr (sizeof(Acc) == 4) {  // lanes per token: as many as there are, and no more than the lines are long
      if constexpr (VW >= 16) { if (M <= VW / 16 && bk % (16 * P) == 0) return run(one, std::integral_constant<int, 16>{}); }
      if constexpr (VW >= 8) { if (M <= VW / 8 && bk % (8 * P) == 0) return run(one, std::integral_constant<int, 8>{}); }
      if (M <= VW / 4 && bk % (4 * P) == 0) return run(one, std::integral_constant<int, 4>{});
      if (M <= VW / 2 && bk % (2 * P) == 0) return run(one, std::integral_constant<int, 2>{});
    }
    return run(one, one);
  }
  return false;
}

// The blocks of X that are used, numbered from 0 in each head: `place[h * R + r]`, -1 where unused. Returns the most that a head uses.
inline int64_t number_used(const Side& side, int64_t H, int32_t* place) {
  std::fill(place, place + H * side.R, -1);
  for (int64_t t = 0; t < side.offsets[H * side.C]; t++) place[side.rows[t]] = 0;
  int64_t most = 0;
  for (int64_t h = 0; h < H; h++) {
    int32_t count = 0;
    for (int64_t r = h * side.R; r < (h + 1) * side.R; r++) if (place[r] == 0) place[r] = count++;
    most = std::max<int64_t>(most, count);
  }
  return most;
}

// Many rows of X against whole blocks: each value is multiplied with NV vectors of tokens. X is packed by groups of VW * NV tokens; a few blocks of a group stay in the
// first-level cache while the lines of a column pass over them. `values(t)` is where the units of block t stand: line after line, or (DOWN) unit k of all lines `ld` after
// unit k - 1. Meanwhile the blocks that come next, at `later(t)`, are asked for: `pitch` bytes a row, of which `across` cache lines are wanted.
template <class T, int VW, int NV, int ROWS, bool DOWN, class Values, class Later>
inline void lines_of_column(int64_t lines, int64_t n, Values values, int64_t ld, Later later, int64_t pitch, int64_t across, const int32_t* rows, const int32_t* place, int64_t bk, const T* packed,
                            typename Mode<T>::Acc* sums, bool begin) {
  using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc;
  const int64_t units = bk / Mode<T>::P;
  for (int64_t line = 0; line < lines; line += ROWS, sums += ROWS * VW * NV) {
    vec<Acc, VW> acc[ROWS][NV];
    if (begin) { UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) acc[i][j] = vec<Acc, VW>{}; } }
    else { UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) acc[i][j] = load<vec<Acc, VW>>(sums + (i * NV + j) * VW); } }
    const int64_t share = line / ROWS, part = share % across * 64 + share / across * (units / 2) * pitch;
    for (int64_t t = 0; t < n; t++) {
      const U *from = values(t) + (DOWN ? line : line * ld), *tokens = reinterpret_cast<const U*>(packed + place[rows[t]] * bk * (VW * NV));
      const char* soon = later(t) + part;
      for (int64_t k = 0; k < units; k++, tokens += VW * NV, from += DOWN ? ld : 1, soon += pitch / 2) {
        __builtin_prefetch(soon);
        const U* at[ROWS / 4];  // few addresses for many rows
        UNROLL for (int i = 0; i < ROWS / 4; i++) at[i] = from + 4 * i * (DOWN ? 1 : ld);
        vec<U, VW> v[NV];
        UNROLL for (int j = 0; j < NV; j++) v[j] = load<vec<U, VW>>(tokens + j * VW);
        UNROLL for (int i = 0; i < ROWS; i++) {
          const U s = at[i / 4][(i % 4) * (DOWN ? 1 : ld)];
          UNROLL for (int j = 0; j < NV; j++) acc[i][j] = fma<Acc, VW>(acc[i][j], s, v[j]);
        }
      }
    }
    UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) std::memcpy(sums + (i * NV + j) * VW, &acc[i][j], sizeof(acc[i][j])); }
  }
}

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
inline vec<uint32_t, 16> packed(vec<float, 16> first, vec<float, 16> second) {  // 32 numbers as bf16
  return (vec<uint32_t, 16>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
inline vec<uint32_t, 16> as_pairs(vec<float, 16> low, vec<float, 16> high) {  // two neighbouring outputs of each lane's token, as bf16 in one word
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vec<uint32_t, 16>)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#endif

// The sums of a group of tokens, which stand across the lanes (line, NV, VW), to Y, a token a row. What a row gets is written as whole cache lines: rows are often 4096
// bytes apart, one set of the first-level cache, and a line written in two halves would be fetched twice.
template <class T, int VW, int NV>
inline void write_tokens(const typename Mode<T>::Acc* sums, int64_t bn, const T* bias, T* y, int64_t N, int64_t left, bool past_cache) {
  using Acc = typename Mode<T>::Acc;
  constexpr int64_t P = sizeof(Acc) / sizeof(T);  // elements of Y in a word
  for (int64_t j = 0; j < NV && j * VW < left; j++)
    for (int64_t line = 0; line < bn; line += VW * P) {
      auto sum = [&](int64_t i) {
        const vec<Acc, VW> v = load<vec<Acc, VW>>(sums + ((line + i) * NV + j) * VW);
        return bias ? v + widen(bias[line + i]) : v;
      };
      const int64_t words = std::min<int64_t>(VW, (bn - line) / P), tokens = std::min<int64_t>(VW, left - j * VW);
      alignas(64) uint32_t tile[VW * VW];
      for (int64_t i = 0; i < words; i++) {
        vec<uint32_t, VW> word;
        if constexpr (P == 2) word = as_pairs(sum(2 * i), sum(2 * i + 1));
        else word = (vec<uint32_t, VW>)sum(i);
        std::memcpy(tile + i * VW, &word, sizeof(word));
      }
      T* to = y + j * VW * N + line;
      if (words == VW && tokens == VW) {
        if (past_cache) {
          transpose_words<VW>(tile, VW, tile, VW);
          for (int64_t t = 0; t < VW; t++) stream_line(to + t * N, tile + t * VW);
        } else transpose_words<VW>(reinterpret_cast<uint32_t*>(to), N / P, tile, VW);
        continue;
      }
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < words; i++) std::memcpy(to + t * N + i * P, tile + i * VW + t, 4);
    }
}

// Rows of values, `row` apart, each two as one of pairs: units that two rows share. 16 columns, which are whole rows, or a multiple of 32.
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
inline void pair_32(uint32_t* to, const bf16* one, const bf16* other) {  // 32 numbers of two rows
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i first = _mm512_loadu_si512(one), second = _mm512_loadu_si512(other);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(first, _mm512_add_epi16(low, _mm512_set1_epi16(16)), second));
}
inline void pair_rows(uint32_t* to, const bf16* from, int64_t rows, int64_t columns, int64_t row) {
  const __m512i both = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  if (columns == 16)
    for (int64_t r = 0; r < rows; r += 2, to += 16) _mm512_storeu_si512(to, _mm512_permutexvar_epi16(both, _mm512_loadu_si512(from + r * 16)));
  else
    for (int64_t r = 0; r < rows; r += 2, from += 2 * row)
      for (int64_t c = 0; c < columns; c += 32, to += 32) pair_32(to, from + c, from + row + c);
}
#endif

template <class T, int VW, int ROWS>
void many(const T* x, int64_t M, int64_t K, int64_t xm, int64_t xk, const T* w, int64_t bk, int64_t bn, Side side, const T* bias, T* y, int64_t N, int threads) {
  using E = typename Mode<T>::E; using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc;
  constexpr int64_t NV = 3, P = Mode<T>::P, TOKENS = VW * NV;
  constexpr int64_t kPanel = 640 << 10, kResident = 48 << 10;  // bytes of tokens in the second-level cache, for all columns, and of those that the lines of one pass over
  constexpr int64_t kLines = 64;  // at a time of a column that takes several passes: their sums, too, stay in the first-level cache
  Buffer<int32_t> place(side.R);
  const int64_t depth = std::max<int64_t>(1, number_used(side, 1, place.data)) * bk, vectors = (M + VW - 1) / VW;
  int64_t panels = (vectors - 1) / std::max<int64_t>(NV, kPanel / int64_t(depth * VW * sizeof(E))) + 1, splits = 1;
  if (panels < threads) splits = std::min(side.C, 2 * threads / panels);
  else while (panels % threads && panels < vectors) panels++;
  const int64_t unit = threads == 1 || panels >= 2 * threads ? NV : 1, units = (vectors + unit - 1) / unit;  // panels of whole groups, unless threads would then get unequal ones
  panels = std::min(panels, units);
  const int64_t most = ((units + panels - 1) / panels * unit + NV - 1) / NV, slice = std::max<int64_t>(1, kResident / int64_t(bk * TOKENS * sizeof(E)));
  const int64_t kept = side.offsets[side.C], joined = std::max<int64_t>(1, 64 / int64_t(bn * sizeof(T)));  // columns that share the cache lines of Y are written together
  const bool past_cache = streams(y, M * N, N, joined * bn);
  Buffer<E> X(threads * most * depth * TOKENS);
  Buffer<Acc> S(threads * most * joined * bn * TOKENS);
  Buffer<U> pairs(side.order && P == 2 ? threads * slice * bk / P * bn : 1);
  PRAGMA(omp parallel num_threads(threads) if (threads > 1)) {
    E* packed = X.data + thread_index() * most * depth * TOKENS;
    Acc* sums = S.data + thread_index() * most * joined * bn * TOKENS;
    U* paired = pairs.data + thread_index() * slice * bk / P * bn;
    PRAGMA(omp for schedule(dynamic, 1))
    for (int64_t q = 0; q < panels * splits; q++) {
      const int64_t panel = q / splits, split = q % splits, begin = panel * units / panels * unit, count = std::min(vectors, (panel + 1) * units / panels * unit) - begin, groups = (count + NV - 1) / NV;
      auto group = [&](int64_t g, auto f) {  // f(number of vectors, first token)
        const int64_t from = g * NV, n = std::min(NV, count - from), token = (begin + from) * VW;
        if (n == 3) f(std::integral_constant<int, 3>{}, token);
        else if (n == 2) f(std::integral_constant<int, 2>{}, token);
        else f(std::integral_constant<int, 1>{}, token);
      };
      for (int64_t g = 0; g < groups; g++)
        group(g, [&](auto nv, int64_t token) {
          for (int64_t r = 0; r < side.R; r++)
            if (place.data[r] >= 0)
              pack_panel<T, E, P, VW * nv()>(packed + g * depth * TOKENS + place.data[r] * bk * VW * nv(), x + token * xm + r * bk * xk, bk, bk, M - token, xk, xm);
        });
      auto edge = [&](int64_t s) { return s == splits ? side.C : s * side.C / splits / joined * joined; };
      for (int64_t c = edge(split); c < edge(split + 1); c++) {
        const int64_t first = side.offsets[c], n = side.offsets[c + 1] - first, waiting = c % joined;
        const int64_t lines = n > slice ? std::min<int64_t>(bn, kLines) : bn;
        const bool cut = side.order && lines < bn;  // blocks are not read as a whole
        const int64_t pitch = cut ? bn * sizeof(T) : 64, across = cut ? lines * sizeof(T) / 64 : 1;
        for (int64_t line = 0; line < bn; line += lines) {
          for (int64_t t = 0; t == 0 || t < n; t += slice) {
            const int64_t here = std::min(slice, n - t), now = first + t;
            const bool last = t + slice >= n, next_line = last && line + lines < bn;
            const int64_t next = next_line ? first : now + here, ahead = last ? (next_line ? line + lines : 0) : line;
            auto block = [&](int64_t at, int64_t from) { return side.order ? w + side.order[at] * bk * bn + from : w + (at * bn + from) * bk; };
            auto later = [&](int64_t e) { return reinterpret_cast<const char*>(block(std::min(next + e, kept - 1), ahead)); };
            if constexpr (P == 2) {
              if (side.order) for (int64_t e = 0; e < here; e++) pair_rows(paired + e * bk / P * lines, block(now + e, line), bk, lines, bn);
            }
            for (int64_t g = 0; g < groups; g++)
              group(g, [&](auto nv, int64_t) {
                auto run = [&](auto down, auto values, int64_t ld) {
                  lines_of_column<T, VW, nv(), ROWS, down()>(lines, here, values, ld, later, pitch, across, side.rows + now, place.data, bk,
                                                             packed + g * depth * TOKENS, sums + g * joined * lines * TOKENS + waiting * lines * VW * nv(), t == 0);
                };
                auto in_place = [&](int64_t e) { return reinterpret_cast<const U*>(block(now + e, line)); };
                if (!side.order) run(std::false_type{}, in_place, bk / P);
                else if constexpr (P == 1) run(std::true_type{}, in_place, bn);
                else run(std::true_type{}, [&](int64_t e) { return paired + e * bk / P * lines; }, lines);
              });
          }
          if (waiting + 1 < joined && c + 1 < side.C) continue;
          for (int64_t g = 0; g < groups; g++)
            group(g, [&](auto nv, int64_t token) {
              const int64_t n0 = (c - waiting) * bn + line;
              write_tokens<T, VW, nv()>(sums + g * joined * lines * TOKENS, (waiting + 1) * lines, bias ? bias + n0 : nullptr, y + token * N + n0, N, M - token, past_cache);
            });
        }
      }
    }
    stream_end();
  }
}

// ROWS tokens against the n blocks of a column, whose panels of VW * NV outputs stand `step` apart: Y = X @ W + added. By itself, or else the compiler runs out of registers.
template <class T, int VW, int NV, int ROWS>
__attribute__((noinline)) void direct_tile(int64_t n, const T* w, int64_t step, const int32_t* rows, int64_t bk, const T* x, int64_t xm, const typename Mode<T>::Acc* added, T* y, int64_t N, bool past_cache) {
  using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc;
  constexpr int64_t P = Mode<T>::P, LINES = NV / P;
  vec<Acc, VW> acc[ROWS][NV];
  UNROLL for (int i = 0; i < ROWS; i++) { UNROLL for (int j = 0; j < NV; j++) acc[i][j] = vec<Acc, VW>{}; }
  const int64_t row = xm * int64_t(sizeof(T)), to[4] = {0, row, 2 * row, 3 * row};
  for (int64_t t = 0; t < n; t++, w += step) {
    const U* values = reinterpret_cast<const U*>(w);
    const char* at[(ROWS + 3) / 4];  // few addresses for many rows
    UNROLL for (int i = 0; i < (ROWS + 3) / 4; i++) at[i] = reinterpret_cast<const char*>(x + rows[t] * bk) + 4 * i * row;
    for (const U* end = values + bk / P * (VW * NV); values < end; values += VW * NV) {
      vec<U, VW> v[NV];
      UNROLL for (int j = 0; j < NV; j++) v[j] = load<vec<U, VW>>(values + j * VW);
      UNROLL for (int i = 0; i < ROWS; i++) {
        const U s = load<U>(at[i / 4] + to[i % 4]);
        UNROLL for (int j = 0; j < NV; j++) acc[i][j] = fma<Acc, VW>(acc[i][j], s, v[j]);
      }
      UNROLL for (int i = 0; i < (ROWS + 3) / 4; i++) at[i] += sizeof(U);
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) {
    vec<U, VW> line[LINES];
    auto sum = [&](int j) { return acc[i][j] + load<vec<Acc, VW>>(added + j * VW); };
    if constexpr (P == 2) { UNROLL for (int j = 0; j < LINES; j++) line[j] = packed(sum(2 * j), sum(2 * j + 1)); }
    else { UNROLL for (int j = 0; j < LINES; j++) line[j] = (vec<U, VW>)sum(j); }
    if (past_cache) { UNROLL for (int j = 0; j < LINES; j++) stream_line(y + i * N + j * VW * P, line + j); }
    else std::memcpy(y + i * N, line, sizeof(line));
  }
}

// Many rows of X against few blocks, where packing X would take as long as the products: tokens are read where they stand, one broadcast after the other, and the values
// are brought into panels of VW * NV outputs. A panel of tokens lies in the second-level cache for all columns; the next one is asked for meanwhile, some lines a tile.
template <class T, int VW, int NV, int ROWS>
void direct(const T* x, int64_t M, int64_t xm, const T* w, int64_t bk, int64_t bn, int64_t wk, int64_t wn, Side side, const T* bias, T* y, int64_t N, int threads) {
  using Acc = typename Mode<T>::Acc;
  constexpr int64_t P = Mode<T>::P, NR = VW * NV, kPanel = 192 << 10, kLine = 64 / sizeof(T);
  const int64_t kept = side.offsets[side.C], strips = bn / NR;
  Buffer<int32_t> place(side.R);
  number_used(side, 1, place.data);
  int64_t panels = std::min(M / ROWS, (M - 1) / std::max<int64_t>(ROWS, kPanel / int64_t(side.R * bk * sizeof(T))) + 1), splits = 1;
  if (panels < threads) splits = std::min(side.C, 2 * threads / panels);
  else while (panels % threads && panels < M / ROWS) panels++;
  const bool past_cache = streams(y, M * N, N, bn);
  Buffer<T> W(kept * bk * bn);
  PRAGMA(omp parallel num_threads(threads) if (threads > 1)) {
    PRAGMA(omp for schedule(static))
    for (int64_t t = 0; t < kept; t++) {
      const char* next = reinterpret_cast<const char*>(w + (side.order ? side.order[std::min(t + 1, kept - 1)] : std::min(t + 1, kept - 1)) * bk * bn);
      for (int64_t e = 0; e < bk * bn * int64_t(sizeof(T)); e += 64) __builtin_prefetch(next + e);
      const T* from = w + (side.order ? side.order[t] : t) * bk * bn;
      for (int64_t strip = 0; strip < strips; strip++)
        pack_panel<T, T, P, NR>(W.data + (t * strips + strip) * bk * NR, from + strip * NR * wn, bk, bk, NR, wk, wn);
    }
    PRAGMA(omp for schedule(static))
    for (int64_t q = 0; q < panels * splits; q++) {
      const int64_t panel = q / splits, split = q % splits, begin = panel * M / panels, end = (panel + 1) * M / panels;
      const bool more = panel + 1 < panels;
      for (int64_t c = split * side.C / splits; c < (split + 1) * side.C / splits; c++) {
        const int64_t first = side.offsets[c], n = side.offsets[c + 1] - first, ahead_begin = c * side.R / side.C, ahead_end = (c + 1) * side.R / side.C;
        for (int64_t strip = 0; strip < strips; strip++) {
          const int64_t n0 = c * bn + strip * NR;
          Acc added[NR] = {};
          if (bias) for (int j = 0; j < NR; j++) added[j] = widen(bias[n0 + j]);
          for (int64_t token = begin; token < end; token += ROWS) {
            const int64_t from = std::min(token, end - ROWS);  // the last tile overlaps the one before it
            if (more && strip == 0)
              for (int64_t r = ahead_begin; r < ahead_end; r++)
                if (place.data[r] >= 0)
                  for (int64_t e = 0; e < bk; e += kLine) { UNROLL for (int i = 0; i < ROWS; i++) __builtin_prefetch(x + (end + token - begin + i) * xm + r * bk + e, 0, 2); }
            direct_tile<T, VW, NV, ROWS>(n, W.data + (first * strips + strip) * bk * NR, strips * bk * NR, side.rows + first, bk, x + from * xm, xm, added, y + from * N + n0, N, past_cache);
          }
        }
      }
    }
    stream_end();
  }
}

template <class T, int VW, int NV>
void dds(const T* x, int64_t G, int64_t H, int64_t M, int64_t K, int64_t xg, int64_t xh, int64_t xm, int64_t xk,
         const T* w, int64_t wg, int64_t bk, int64_t bn, int64_t wk, int64_t wn, Side side, const T* bias, T* y, int64_t N, int threads) {
  using E = typename Mode<T>::E; using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc;
  constexpr int P = Mode<T>::P, NR = VW * NV;
  constexpr int64_t kPanel = 512 << 10;  // bytes of packed tokens that stay in the second-level cache while all columns pass over them
  constexpr int64_t kResident = 32768;   // bytes of packed values that stay in the first-level cache while the tiles of a panel pass over them
  const int64_t tiles = (M + MR - 1) / MR, kept = side.offsets[H * side.C], sets = wg ? G : 1;
  int64_t most = 0;  // blocks of a column
  for (int64_t c = 0; c < H * side.C; c++) most = std::max<int64_t>(most, side.offsets[c + 1] - side.offsets[c]);
  Buffer<int32_t> place(H * side.R);
  const int64_t depth = std::max<int64_t>(1, number_used(side, H, place.data)) * bk;  // of a packed tile
  // A task is a panel of tiles, for all columns; for some of them only where there are fewer panels than threads.
  int64_t panels = std::max<int64_t>(1, tiles / std::max<int64_t>(1, kPanel / int64_t(depth * MR * sizeof(E)))), splits = 1;
  if (G * H * panels < threads) splits = std::min(side.C, 2 * threads / (G * H * panels));
  else while (G * H * panels % threads && panels < tiles) panels++;
  const int64_t group = (tiles + panels - 1) / panels;
  const bool shared = G * panels > sets && sets * kept * bk * bn * sizeof(E) <= Scratch::kLargest;  // values packed once for all panels, or by each task
  const int64_t own = shared ? 0 : most * bk * bn;
  Buffer<E> X(threads * group * depth * MR), W(shared ? sets * kept * bk * bn : threads * own);
  Buffer<Acc> S(threads * group * MR * NR);
  auto pack_column = [&](E* to, int64_t set, int64_t column) {
    const int64_t first = side.offsets[column], n = side.offsets[column + 1] - first;
    for (int64_t strip = 0; strip < bn; strip += NR)
      for (int64_t t = 0; t < n; t++, to += bk * NR) {
        const int64_t block = side.order ? side.order[first + t] : first + t, k0 = side.rows[first + t] % side.R * bk, n0 = column % side.C * bn + strip;
        if (t + 1 < n) {  // the next block's values, which may be far from these
          const T* next = w + set * wg + (side.order ? side.order[first + t + 1] : first + t + 1) * bk * bn + strip * wn;
          const int64_t lines = wk == 1 ? 1 : bk, length = wk == 1 ? NR * wn : NR;
          for (int64_t k = 0; k < lines; k++)
            for (int64_t e = 0; e < length; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(next + k * wk + e);
        }
        if (n0 < N) pack_panel<T, E, P, NR>(to, w + set * wg + block * bk * bn + strip * wn, std::min(bk, K - k0), bk, N - n0, wk, wn);
      }
  };
  PRAGMA(omp parallel num_threads(threads) if (threads > 1)) {
    E* packed = X.data + thread_index() * group * depth * MR;
    Acc* sums = S.data + thread_index() * group * MR * NR;
    if (shared) {
      PRAGMA(omp for schedule(dynamic, 1))
      for (int64_t q = 0; q < sets * H * side.C; q++) pack_column(W.data + (q / (H * side.C) * kept + side.offsets[q % (H * side.C)]) * bk * bn, q / (H * side.C), q % (H * side.C));
    }
    PRAGMA(omp for schedule(dynamic, 1))
    for (int64_t q = 0; q < G * H * panels * splits; q++) {
      const int64_t gh = q / splits / panels, g = gh / H, h = gh % H, panel = q / splits % panels, split = q % splits;
      const int64_t begin = panel * tiles / panels, end = (panel + 1) * tiles / panels;
      for (int64_t tile = begin; tile < end; tile++)
        for (int64_t r = 0; r < side.R; r++)
          if (place.data[h * side.R + r] >= 0)
            pack_tile<T, E>(packed + ((tile - begin) * depth + place.data[h * side.R + r] * bk) * MR, x + g * xg + h * xh + tile * MR * xm + r * bk * xk,
                            std::min<int64_t>(MR, M - tile * MR), std::min(bk, K - r * bk), bk, xm, xk);
      for (int64_t c = split * side.C / splits; c < (split + 1) * side.C / splits; c++) {
        const int64_t column = h * side.C + c, first = side.offsets[column], n = side.offsets[column + 1] - first;
        const int32_t* rows = side.rows + first;
        const E* values = W.data + (shared ? ((wg ? g : 0) * kept + first) * bk * bn : thread_index() * own);
        if (!shared) pack_column(W.data + thread_index() * own, wg ? g : 0, column);
        const int64_t slice = std::max<int64_t>(1, kResident / int64_t(bk * NR * sizeof(E)));  // blocks per pass
        for (int64_t strip = 0; strip < bn; strip += NR, values += n * bk * NR) {
          const int64_t n0 = c * bn + strip, valid = N - n0;
          if (valid <= 0) break;
          for (int64_t t0 = 0; t0 == 0 || t0 < n; t0 += slice) {
            const bool last = t0 + slice >= n;
            const U* wp = reinterpret_cast<const U*>(values + t0 * bk * NR);
            for (int64_t tile = begin; tile < end; tile++) {
              const U* xp = reinterpret_cast<const U*>(packed + (tile - begin) * depth * MR);
              T* out = y + (gh * M + tile * MR) * N + n0;
              Acc* partial = sums + (tile - begin) * MR * NR;
              const int64_t left = M - tile * MR;
              micro<U, Acc, VW, MR, NV, kChunk / P>(
                  std::min(slice, n - t0), bk / P, t0 ? partial : nullptr, NR,
                  [&](int64_t t, const U*& a, const U*& b) { a = xp + place.data[rows[t0 + t]] * (bk / P * MR); b = wp + t * (bk / P * NR); },
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
}

constexpr int64_t kTokens = 16;  // that are packed at a time, so that whole lines of the source are used while they are near
// Tokens `begin` ... `end` - 1 of the `depth` of a block of an operand of sdd, as panels of WIDTH columns: panel p begins at p * WIDTH * padded.
template <class T, class E, int P, int WIDTH>
void pack_block(E* dst, const T* src, int64_t depth, int64_t padded, int64_t begin, int64_t end, int64_t columns, int64_t block, int64_t k_stride, int64_t n_stride) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  if constexpr (P == 2 && std::is_same<T, E>::value) {
    if (n_stride == 1 && columns >= block && block % 32 == 0 && end <= depth) {  // pairs of tokens from two rows at a time
      constexpr int part = std::min(WIDTH, 16);
      for (int64_t k = begin; k < end; k += 2)
        for (int64_t n = 0; n < block; n += 32) {
          const T* from = src + k * k_stride + n;
          __builtin_prefetch(from + kTokens * k_stride);  // rows often lie a page apart, where the machine does not look ahead
          __builtin_prefetch(from + (kTokens + 1) * k_stride);
          alignas(64) uint32_t pairs[32];
          pair_32(pairs, from, from + k_stride);
          UNROLL for (int e = 0; e < 32; e += part) {
            const vec<uint32_t, part> words = load<vec<uint32_t, part>>(pairs + e);
            std::memcpy(dst + (n + e) / WIDTH * WIDTH * padded + (k - begin) * WIDTH + (n + e) % WIDTH * 2, &words, sizeof(words));
          }
        }
      return;
    }
  }
#endif
  for (int64_t k = begin; k < end; k += kTokens)
    for (int64_t n = 0; n < block; n += WIDTH)
      pack_panel<T, E, P, WIDTH>(dst + (n * padded + (k - begin) * WIDTH), src + k * k_stride + n * n_stride, depth - k, std::min(kTokens, end - k), columns - n, k_stride, n_stride);
}

// The sums of a block to where they belong, zeros beyond the edge: an infinity times the padding would be NaN.
template <class T, int VW> inline void finish_block(typename Mode<T>::Acc* sums, T* out, int64_t block_m, int64_t block_n, int64_t rows, int64_t columns, bool past_cache) {
  using Acc = typename Mode<T>::Acc;
  if (rows < block_m || columns < block_n)
    for (int64_t i = 0; i < block_m; i++) std::fill(sums + i * block_n + (i < rows ? std::min(block_n, columns) : 0), sums + (i + 1) * block_n, Acc(0));
  if (!past_cache) {
    for (int64_t i = 0; i < block_m * block_n; i += VW) emit<Acc, T, VW>(out + i, load<vec<Acc, VW>>(sums + i), VW);
    return;
  }
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < block_m * block_n; i += line) {
    alignas(64) T to[line];
    UNROLL for (int e = 0; e < line; e += VW) emit<Acc, T, VW>(to + e, load<vec<Acc, VW>>(sums + i + e), VW);
    stream_line(out + i, to);
  }
}

// Few blocks and many tokens: each thread takes a part of the tokens for itself, packs all used blocks of some of them at a time, since they stand together, and adds their
// products to the part's own sums. Nothing that one thread packed is read by another, which would cost more than the packing. There are always kParts parts, added up in
// one order at the end: results do not depend on the number of threads.
constexpr int64_t kParts = 4, kSums = 64 << 20;  // bytes of all parts' sums: larger ones would come and go through memory
template <class T, int VW, int NV, int ROWS>
void sdd_few(const T* a, const T* b, int64_t M, int64_t N, int64_t K, int64_t am, int64_t ak, int64_t bk, int64_t bn, int64_t block_m, int64_t block_n, const int32_t* rows,
             const int32_t* columns, int64_t kept, int64_t R, int64_t C, T* out, int threads) {
  using E = typename Mode<T>::E; using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc;
  constexpr int P = Mode<T>::P, NR = VW * NV;
  const int64_t padded = (K + P - 1) / P * P, part = (padded - 1) / (kParts * kTokens) * kTokens + kTokens, sums = kept * block_m * block_n;
  const int64_t piece = sums * int64_t(sizeof(Acc)) <= 2 << 20 ? 128 : 512;  // tokens: sums come and go once a piece, so the more of them, the longer it is
  const int64_t left = R * block_m * piece, right = C * block_n * piece, splits = threads / std::gcd(int64_t(threads), kParts);  // of the blocks, so that all threads get as much
  Buffer<E> A(threads * left), B(threads * right);
  Buffer<Acc> S(kParts * sums);
  Buffer<uint8_t> needed(threads * (R + C));
  PRAGMA(omp parallel num_threads(threads) if (threads > 1)) {
    E *to_a = A.data + thread_index() * left, *to_b = B.data + thread_index() * right;
    uint8_t* used = needed.data + thread_index() * (R + C);
    PRAGMA(omp for schedule(static))
    for (int64_t q = 0; q < splits * kParts; q++) {
      const int64_t split = q / kParts, begin = q % kParts * part, end = std::min(padded, begin + part), first = split * kept / splits, last = (split + 1) * kept / splits;
      std::fill(used, used + R + C, uint8_t(0));
      for (int64_t p = first; p < last; p++) used[rows[p]] = used[R + columns[p]] = 1;
      for (int64_t k0 = begin; k0 < end; k0 += piece) {
        const int64_t size = std::min(piece, end - k0);
        for (int64_t k = k0; k < k0 + size; k += kTokens) {
          const int64_t to = std::min(k + kTokens, k0 + size);
          for (int64_t c = 0; c < C; c++)
            if (used[R + c]) pack_block<T, E, P, NR>(to_b + c * block_n * piece + (k - k0) * NR, b + c * block_n * bn, K, piece, k, to, N - c * block_n, block_n, bk, bn);
          for (int64_t r = 0; r < R; r++)
            if (used[r]) pack_block<T, E, P, ROWS>(to_a + r * block_m * piece + (k - k0) * ROWS, a + r * block_m * am, K, piece, k, to, M - r * block_m, block_m, ak, am);
        }
        for (int64_t p = first; p < last; p++)
          for (int64_t n = 0; n < block_n; n += NR)
            for (int64_t m = 0; m < block_m; m += ROWS) {
              const U *ap = reinterpret_cast<const U*>(to_a + (rows[p] * block_m + m) * piece), *bp = reinterpret_cast<const U*>(to_b + (columns[p] * block_n + n) * piece);
              Acc* s = S.data + q % kParts * sums + (p * block_m + m) * block_n + n;
              micro<U, Acc, VW, ROWS, NV, 1>(1, size / P, k0 > begin ? s : nullptr, block_n, [&](int64_t, const U*& x, const U*& z) { x = ap; z = bp; },
                                             [&](int i, int j, vec<Acc, VW> v) { std::memcpy(s + i * block_n + j * VW, &v, sizeof(v)); });
            }
      }
    }
    PRAGMA(omp for schedule(static))
    for (int64_t q = 0; q < kept * block_m; q++) {  // a row of a block
      const int64_t p = q / block_m;
      Acc* s = S.data + q * block_n;
      for (int64_t i = 0; i < block_n; i += VW) {
        auto of = [&](int64_t part) { return load<vec<Acc, VW>>(s + part * sums + i); };
        const vec<Acc, VW> v = (of(0) + of(1)) + (of(2) + of(3));
        std::memcpy(s + i, &v, sizeof(v));
      }
      finish_block<T, VW>(s, out + q * block_n, 1, block_n, M - rows[p] * block_m - q % block_m, N - columns[p] * block_n, false);
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
  const int64_t padded = (K + P - 1) / P * P, a_size = block_m * padded, b_size = block_n * padded, sums_of = reduce ? G : 1, blocks = (reduce ? 1 : G) * kept;
  // Kept blocks come row by row: a thread packs a block row of A when it comes to it. The columns of B are packed beforehand where each serves several blocks, else likewise.
  const bool share_a = sums_of > 1, share_b = share_a || kept > 2 * H * C;
  Buffer<E> A((share_a ? G * H * R : threads) * a_size), B((share_b ? G * H * C : threads) * b_size);
  const bool past_cache = streams(out, blocks * block_m * block_n, block_m * block_n, block_m * block_n);
  Buffer<uint8_t> used(H * C);
  std::fill(used.data, used.data + H * C, uint8_t(0));
  for (int64_t p = 0; p < kept; p++) used.data[rows[p] / R * C + columns[p] % C] = 1;
  auto pack_a = [&](E* to, int64_t g, int64_t h, int64_t r) { pack_block<T, E, P, ROWS>(to, a + g * ag + h * ah + r * block_m * am, K, padded, 0, padded, M - r * block_m, block_m, ak, am); };
  auto pack_b = [&](E* to, int64_t g, int64_t h, int64_t c) { pack_block<T, E, P, NR>(to, b + g * bg + h * bh + c * block_n * bn, K, padded, 0, padded, N - c * block_n, block_n, bk, bn); };
  PRAGMA(omp parallel num_threads(threads) if (threads > 1)) {
    if (share_a) {
      PRAGMA(omp for schedule(dynamic, 1) nowait)
      for (int64_t q = 0; q < G * H * R; q++) pack_a(A.data + q * a_size, q / R / H, q / R % H, q % R);
    }
    if (share_b) {
      PRAGMA(omp for schedule(dynamic, 1))
      for (int64_t q = 0; q < G * H * C; q++) if (used.data[q % (H * C)]) pack_b(B.data + q * b_size, q / C / H, q / C % H, q % C);
    }
    int64_t row_at = -1;
    Acc sums[128 * 128];
    PRAGMA(omp for schedule(dynamic, std::max<int64_t>(1, blocks / (threads * 16))))
    for (int64_t q = 0; q < blocks; q++) {
      const int64_t p = q % kept, h = rows[p] / R, r = rows[p] % R, c = columns[p] % C;
      T* o = out + q * block_m * block_n;
      for (int64_t g = q / kept; g < q / kept + sums_of; g++) {
        const int64_t row = g * H * R + rows[p], column = (g * H + h) * C + c;
        E *left = A.data + (share_a ? row : thread_index()) * a_size, *right = B.data + (share_b ? column : thread_index()) * b_size;
        if (!share_a && row != row_at) pack_a(left, g, h, r);
        if (!share_b) pack_b(right, g, h, c);
        row_at = row;
        for (int64_t k = 0; k < padded; k += kSlice) {
          const int64_t units = std::min(kSlice, padded - k) / P;
          for (int64_t n = 0; n < block_n; n += NR) {
            const U* bp = reinterpret_cast<const U*>(right + n * padded + k * NR);
            for (int64_t m = 0; m < block_m; m += ROWS) {
              const U* ap = reinterpret_cast<const U*>(left + m * padded + k * ROWS);
              Acc* s = sums + m * block_n + n;
              micro<U, Acc, VW, ROWS, NV, 1>(1, units, k > 0 || g > q / kept ? s : nullptr, block_n, [&](int64_t, const U*& x, const U*& z) { x = ap; z = bp; },
                                             [&](int i, int j, vec<Acc, VW> v) { std::memcpy(s + i * block_n + j * VW, &v, sizeof(v)); });
            }
          }
        }
      }
      finish_block<T, VW>(sums, o, block_m, block_n, M - r * block_m, N - c * block_n, past_cache);
    }
    stream_end();
  }
}

// The blocks of a layout as a dense matrix with zeros between them, or the blocks of a dense matrix, whose rows of `row` bytes are cut into runs of `run` bytes. Block
// after block; what lies a row apart is asked for a kilobyte ahead, since the machine does not look that far.
template <bool FILL, class Length> void move_blocks(char* values, char* dense, Length run, int64_t row, int64_t height, int64_t R, int64_t C, int64_t br, const int32_t* offsets, const int32_t* columns, int threads) {
  const int64_t ahead = std::max<int64_t>(1, 1024 / run);
  const bool past_cache = FILL ? streams(dense, height * row, row, run) : streams(values, offsets[R] * br * run, run, row);
  auto set = [&](char* to, const char* from, int64_t size) {  // from null: zeros
    alignas(64) static const char zeros[64] = {};
    if (past_cache) for (int64_t e = 0; e < size; e += 64) stream_line(to + e, from ? from + e : zeros);
    else if (from) std::memcpy(to, from, size);
    else std::memset(to, 0, size);
  };
  PRAGMA(omp parallel num_threads(threads) if (threads > 1)) {
    PRAGMA(omp for schedule(static))
    for (int64_t r = 0; r < R; r++) {
      const int64_t rows = std::min(br, height - r * br);
      int64_t p = offsets[r];
      for (int64_t c = 0; c < C; c++) {
        const bool kept = p < offsets[r + 1] && columns[p] % C == c;
        if (!kept && !FILL) continue;
        const int64_t length = std::min<int64_t>(run, row - c * run);
        char *line = dense + r * br * row + c * run, *block = values + p * br * run;
        p += kept;
        for (int64_t i = 0; i < rows; i++, line += row, block += run) {
          const char* later = i + ahead < rows ? line + ahead * row : line + (ahead - rows) * row + run;  // of this block or of the next
          for (int64_t e = 0; e < run; e += 64) if (!FILL) __builtin_prefetch(later + e);
          char* to = FILL ? line : block;
          const char* from = FILL ? (kept ? block : nullptr) : line;
          if (length == run) set(to, from, run);
          else {
            set(to, from, length);
            if (!FILL) set(to + length, nullptr, run - length);
          }
        }
        if (!FILL) for (int64_t i = rows; i < br; i++, block += run) set(block, nullptr, run);
      }
    }
    stream_end();
  }
}
// The blocks of a convolution's weight, (rows, columns, taps) each, as those of products, or these put back: block t * kept + k, of tap t, stands at `place` of its line of
// taps, as it is or transposed. Eight elements of one tap, then of the next: blocks are often a power of two apart, and of such lines the first-level cache keeps few.
template <bool PACK, class W> void move_taps(W* weight, W* const* lines, const int64_t* place, int64_t kept, int64_t rows, int64_t columns, int64_t taps, int64_t positions, bool turned, int threads) {
  constexpr int64_t n = 8;  // divides every block
  const int64_t width = turned ? rows : columns, height = turned ? columns : rows, step = turned ? columns * taps : taps, down = turned ? taps : columns * taps;
  PRAGMA(omp parallel for schedule(static) num_threads(threads) if (threads > 1))
  for (int64_t k = 0; k < kept; k++) {
    auto move = [&](int64_t r, int64_t c) {
      W* from = weight + k * rows * columns * taps + r * down + c * step;
      for (int64_t t = 0; t < taps; t++, from++) {
        W* block = lines[(turned ? taps - 1 - t : t) / positions] + place[t * kept + k] * rows * columns + r * width + c;
        UNROLL for (int i = 0; i < n; i++) { if (PACK) block[i] = from[i * step]; else from[i * step] = block[i]; }
      }
    };
    if (turned) for (int64_t c = 0; c < width; c += n) for (int64_t r = 0; r < height; r++) move(r, c);
    else for (int64_t r = 0; r < height; r++) for (int64_t c = 0; c < width; c += n) move(r, c);
  }
}
}  // namespace

extern "C" {
// size: R, C, rows of a block, bytes of a block's row, rows of the matrix, bytes of its row. `fill`: values to dense, or else dense to values.
void onetorch_move(void* values, void* dense, const int64_t* size, const int32_t* offsets, const int32_t* columns, int fill, int threads) {
  auto go = [&](auto run) {
    auto move = fill ? move_blocks<true, decltype(run)> : move_blocks<false, decltype(run)>;
    move(static_cast<char*>(values), static_cast<char*>(dense), run, size[5], size[4], size[0], size[1], size[2], offsets, columns, threads);
  };
  switch (size[3]) {  // short rows are moved by a few instructions
    case 32: return go(std::integral_constant<int64_t, 32>{});
    case 64: return go(std::integral_constant<int64_t, 64>{});
    case 128: return go(std::integral_constant<int64_t, 128>{});
    case 256: return go(std::integral_constant<int64_t, 256>{});
    default: return go(size[3]);
  }
}
// size: kept, rows and columns of a block, taps, taps of a line, bytes of an element. `pack`: the weight to lines, or else lines to the weight.
void onetorch_move_taps(void* weight, void* const* lines, const int64_t* place, const int64_t* size, int turned, int pack, int threads) {
  auto go = [&](auto word) {
    using W = decltype(word);
    auto move = pack ? move_taps<true, W> : move_taps<false, W>;
    move(static_cast<W*>(weight), reinterpret_cast<W* const*>(lines), place, size[0], size[1], size[2], size[3], size[4], turned != 0, threads);
  };
  if (size[5] == 4) go(uint32_t{}); else go(uint64_t{});
}
// strides in elements; wg = 0: one set of values for all G; order may be null. Returns 0, 1 (out of memory) or 2 (unknown dtype).
int onetorch_dds(int dtype, const void* x, const int64_t* xsize, const int64_t* xstride, const void* w, int64_t wg, int64_t bk, int64_t bn, int64_t wk, int64_t wn,
                 const int32_t* offsets, const int32_t* rows, const int32_t* order, int64_t R, int64_t C, const void* bias, void* y, int64_t N, int threads) {
  return dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    if (try_few<T>(static_cast<const T*>(x), xsize[0], xsize[1], xsize[2], xsize[3], xstride[2], xstride[3], static_cast<const T*>(w), bk, bn, wk, Side{offsets, rows, order, R, C},
                   static_cast<const T*>(bias), static_cast<T*>(y), N, threads)) return;
    if constexpr (std::is_same<T, typename Mode<T>::E>::value && sizeof(T) <= 4) {
      constexpr int full = kVectorBytes / 4;
      const bool whole = xsize[0] == 1 && xsize[1] == 1 && xsize[3] == R * bk && N == C * bn, as_they_stand = wk == 1 ? !order : wn == 1 && order;
      if constexpr (kVectorBytes == 64) {  // few blocks for that many tokens: how few was measured; panels of only two vectors and values that are packed across pay later
        const int64_t times = bn % (4 * full) ? 4 * Mode<T>::P : wk == 1 ? 2 * Mode<T>::P : 1;
        if (whole && xsize[2] > 64 && bn % (2 * full) == 0 && xstride[3] == 1 && times * offsets[C] * bk * bn <= xsize[2] * xsize[3]) {
          auto run = [&](auto nv, auto rows_per_tile) {
            direct<T, full, nv(), rows_per_tile()>(static_cast<const T*>(x), xsize[2], xstride[2], static_cast<const T*>(w), bk, bn, wk, wn, Side{offsets, rows, order, R, C},
                                                   static_cast<const T*>(bias), static_cast<T*>(y), N, threads);
          };
          if (bn % (4 * full) == 0) run(std::integral_constant<int, 4>{}, std::integral_constant<int, 6>{});
          else run(std::integral_constant<int, 2>{}, std::integral_constant<int, 12>{});
          return;
        }
      }
      if (whole && xsize[2] > 64 && bn % full == 0 && as_they_stand) {
        many<T, full, kVectorBytes == 64 ? 8 : 4>(static_cast<const T*>(x), xsize[2], xsize[3], xstride[2], xstride[3], static_cast<const T*>(w), bk, bn, Side{offsets, rows, order, R, C},
                                                  static_cast<const T*>(bias), static_cast<T*>(y), N, threads);
        return;
      }
    }
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
        const int64_t sums = kParts * kept * block_m * block_n * int64_t(sizeof(typename Mode<T>::Acc));
        if (size[0] == 1 && size[1] == 1 && size[4] >= 1024 && sums <= kSums && kept * block_m * 512 <= size[4] * (size[2] + size[3])) {
          sdd_few<T, vw(), nv(), rows_per_tile()>(static_cast<const T*>(a), static_cast<const T*>(b), size[2], size[3], size[4], astride[2], astride[3], bstride[2], bstride[3], block_m, block_n,
                                                  rows, columns, kept, R, C, static_cast<T*>(out), threads);
          return;
        }
        sdd<T, vw(), nv(), rows_per_tile()>(static_cast<const T*>(a), static_cast<const T*>(b), size[0], size[1], size[2], size[3], size[4], astride[0], astride[1], astride[2], astride[3],
                                            bstride[0], bstride[1], bstride[2], bstride[3], block_m, block_n, rows, columns, kept, R, C, reduce, static_cast<T*>(out), threads);
      };
      if (kVectorBytes == 64 && nv() == 1 && block_m % 16 == 0) run(std::integral_constant<int, 16>{});
      else run(std::integral_constant<int, 8>{});
    });
  });
}
}
