// Block-sparse attention for the CPU, forward and backward, without the S x S matrix.
//
// Scores are kept transposed, keys down and queries across: the softmax of a query then runs along the lanes of a vector, with no reduction inside one, and the
// probabilities (keys x queries) are at once the panel that the next product reads. A forward task is a strip of queries of one head. A backward task is one
// key-value head: five products per kept block, dK and dV summed in its own memory in a fixed order.
#include <cmath>

#include "kernels.h"

namespace {

template <int N> inline vec<float, N> exponential(vec<float, N> x) {  // to 1e-7, 0 below -87
  using F = vec<float, N>; using I = vec<int32_t, N>;
  const F low = F{} - 87.0f;
  const I under = x < low;
  x = under ? low : x;
  const F shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // round to an integer, which stands in the low bits
  F r = x - n * 0.693145751953125f;
  r -= n * 1.42860677e-6f;
  F p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I power = ((I)shifted << 23) + (127 << 23);  // multiplied and not added to the bits of p: a NaN stays one
  return under ? F{} : p * (F)power;
}
template <int N> inline vec<double, N> exponential(vec<double, N> x) {
  for (int e = 0; e < N; e++) x[e] = std::exp(x[e]);
  return x;
}

struct Problem {
  int64_t B, H, Hk, S, Sk, D, Dv;
  int64_t R, C, br, bc, layout_heads;
  const int32_t *offsets, *columns;
  double scale;
  int causal;
  const int32_t *position, *group;   // (S) of each token, or null: its index, one group
  const uint8_t *padding;            // (B, Sk) 1 where a key exists, or null
  const uint8_t *mask;               // (kept, br, bc) 1 where allowed, or null
  double dropout;                    // the share of the probabilities that is dropped; the others are scaled by 1 / (1 - dropout)
  const int64_t *seed;
  int threads;
};

// Dropout: whether a probability is kept is a hash of (seed, batch and head, query, key), so the backward pass finds it again. `_keep` of attention.py is the same.
inline uint32_t mix(uint32_t x) {
  x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
template <int NR> void dropout_rows(const Problem& p, int64_t batch_head, int64_t row0, uint32_t* rows) {
  if (p.dropout == 0) return;
  const uint32_t head = mix(mix(uint32_t(*p.seed) ^ mix(uint32_t(uint64_t(*p.seed) >> 32) + 0x9e3779b9u)) + uint32_t(batch_head));
  for (int e = 0; e < NR; e++) rows[e] = mix(head ^ (uint32_t(row0 + e) * 0x9e3779b1u));
}
template <class Acc, int NR> inline void keep_factors(const Problem& p, const uint32_t* rows, int64_t key, Acc* factor) {
  const uint32_t drop = uint32_t(std::min(4294967295.0, std::nearbyint(p.dropout * 4294967296.0))), column = mix(uint32_t(key) ^ 0xc2b2ae35u);
  const Acc scale = Acc(1 / (1 - p.dropout));
  UNROLL for (int e = 0; e < NR; e++) factor[e] = mix(rows[e] + column) < drop ? Acc(0) : scale;
}

// Sets the scores (bc x NR) that are not allowed to -infinity. Returns false where no score of the block is allowed.
template <class Acc, int NR> bool restrict_scores(const Problem& p, int64_t b, int64_t row0, int64_t c, int64_t block, Acc* scores) {
  const int64_t key0 = c * p.bc;
  const Acc none = -std::numeric_limits<Acc>::infinity();
  auto place = [&](int64_t i) { return p.position ? int64_t(p.position[i]) : i; };
  const int64_t queries = std::min<int64_t>(NR, p.S - row0);
  bool any = false;
  for (int64_t i = 0; i < p.bc; i++) {
    const int64_t key = key0 + i;
    Acc* s = scores + i * NR;
    if (key >= p.Sk || (p.padding && !p.padding[b * p.Sk + key])) { std::fill(s, s + NR, none); continue; }
    const int64_t at = p.causal ? place(key) : 0;
    if (!p.group && !p.mask && (!p.causal || (!p.position && at <= row0))) { any = true; continue; }
    for (int64_t q = 0; q < queries; q++) {
      const int64_t query = row0 + q;
      const bool allowed = (!p.causal || place(query) >= at) && (!p.group || p.group[query] == p.group[key]) && (!p.mask || p.mask[(block * p.br + query % p.br) * p.bc + i]);
      if (allowed) any = true; else s[q] = none;
    }
  }
  return any;
}
// Whether a block can be skipped (-1), needs no restriction (0) or some (1), told from its ends.
inline int restriction(const Problem& p, int64_t row0, int64_t row1, int64_t c) {
  const int64_t key0 = c * p.bc, key1 = std::min(p.Sk, key0 + p.bc);
  if (p.mask || p.padding || key1 < key0 + p.bc) return 1;
  bool partial = false;
  if (p.causal) {
    int64_t first_query = row0, last_query = row1 - 1, first_key = key0, last_key = key1 - 1;
    if (p.position) {
      first_query = *std::min_element(p.position + row0, p.position + row1), last_query = *std::max_element(p.position + row0, p.position + row1);
      first_key = *std::min_element(p.position + key0, p.position + key1), last_key = *std::max_element(p.position + key0, p.position + key1);
    }
    if (first_key > last_query) return -1;
    partial = last_key > first_query;
  }
  if (p.group) {
    const auto [q0, q1] = std::minmax_element(p.group + row0, p.group + row1);
    const auto [k0, k1] = std::minmax_element(p.group + key0, p.group + key1);
    if (*k0 > *q1 || *k1 < *q0) return -1;
    partial = partial || *q0 != *q1 || *k0 != *k1 || *q0 != *k0;
  }
  return partial;
}

template <class Acc> struct Size { static constexpr int64_t width = 2 * kVectorBytes / int64_t(sizeof(Acc)); static int64_t pad(int64_t d) { return (d + width - 1) / width * width; } };

constexpr int ROWS = 8;  // rows of a register tile: divides every block

// rows (count x depth) of src -> tiles of 8 rows, element (i, k) at (k / 8) * 64 + i * 8 + k % 8, zeros beyond
template <class T, class E> void pack_rows(E* dst, const T* src, int64_t rows, int64_t padded_rows, int64_t depth, int64_t padded_depth, int64_t stride) {
  for (int64_t r = 0; r < padded_rows; r += ROWS)
    for (int64_t k = 0; k < padded_depth; k += kChunk, dst += ROWS * kChunk)
      for (int i = 0; i < ROWS; i++) {
        if (r + i < rows && k + kChunk <= depth) { UNROLL for (int e = 0; e < kChunk; e++) put(src[(r + i) * stride + k + e], dst[i * kChunk + e]); }
        else for (int e = 0; e < kChunk; e++) if (r + i < rows && k + e < depth) put(src[(r + i) * stride + k + e], dst[i * kChunk + e]); else dst[i * kChunk + e] = E{};
      }
}
// the same rows with the tokens as the inner dimension: strips of `width` columns, unit (token, column)
template <class T, class E, int P, int width> void pack_columns(E* dst, const T* src, int64_t rows, int64_t padded_rows, int64_t depth, int64_t padded_depth, int64_t stride) {
  for (int64_t d = 0; d < padded_depth; d += width, dst += padded_rows * width) pack_panel<T, E, P, width>(dst, src + d, rows, padded_rows, depth - d, stride, 1);
}

// bc x NR accumulators as panel elements: pairs of keys where the machine multiplies pairs
template <class Acc, class E, int P, int NR> inline void to_panel(E* dst, const Acc* src, int64_t rows) {
  if constexpr (P == 2) {
    uint32_t* d = reinterpret_cast<uint32_t*>(dst);
    for (int64_t r = 0; r < rows; r += 2)
      for (int q = 0; q < NR; q++) {
        bf16 x, y;
        narrow(src[r * NR + q], x); narrow(src[(r + 1) * NR + q], y);
        d[r / 2 * NR + q] = uint32_t(x.bits) | uint32_t(y.bits) << 16;
      }
  } else (void)dst, (void)src, (void)rows;
}
template <class Acc, class E, int NR> inline void to_rows(E* dst, const Acc* src, int64_t rows) {
  for (int64_t e = 0; e < rows * NR; e++) narrow(src[e], dst[e]);
}

// (depth x NR) transposed accumulators -> rows of the tensor, times factor[q]
template <class Acc, class T, int NR> void write_rows(T* dst, const Acc* src, const Acc* factor, int64_t rows, int64_t depth, int64_t stride) {
  Acc turned[8 * NR];
  int64_t d = 0;
  if constexpr (sizeof(Acc) == 4) {
    for (; d + 8 <= depth; d += 8) {
      for (int q = 0; q < NR; q += 8) transpose_words<8>(reinterpret_cast<uint32_t*>(turned) + q * 8, 8, reinterpret_cast<const uint32_t*>(src + d * NR + q), NR);
      for (int64_t q = 0; q < rows; q++) { UNROLL for (int e = 0; e < 8; e++) narrow(turned[q * 8 + e] * factor[q], dst[q * stride + d + e]); }
    }
  }
  for (; d < depth; d++)
    for (int64_t q = 0; q < rows; q++) narrow(src[d * NR + q] * factor[q], dst[q * stride + d]);
}

template <class T, int VW, int NV>
void forward(const Problem& p, const T* q, const T* k, const T* v, const int64_t* qs, const int64_t* ks, const int64_t* vs, T* out, void* lse_out) {
  using E = typename Mode<T>::E; using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc; using V = vec<Acc, VW>;
  constexpr int P = Mode<T>::P, NR = VW * NV;
  const int64_t D = Size<Acc>::pad(p.D), Dv = Size<Acc>::pad(p.Dv), keys = p.C * p.bc, strips = p.R * p.br / NR;
  Acc* lse = static_cast<Acc*>(lse_out);
  Buffer<E> K(p.B * p.Hk * keys * D), W(p.B * p.Hk * keys * Dv);
  const int64_t each = p.bc * NR + Dv * NR + D * NR + p.bc * NR;
  Buffer<Acc> scratch(p.threads * each);
  const Acc none = -std::numeric_limits<Acc>::infinity();
  PRAGMA(omp parallel num_threads(p.threads) if (p.threads > 1)) {
    Acc* scores = scratch.data + thread_index() * each;
    Acc* o = scores + p.bc * NR;
    E* query = reinterpret_cast<E*>(o + Dv * NR);
    E* panel = P == 1 ? reinterpret_cast<E*>(scores) : reinterpret_cast<E*>(o + Dv * NR + D * NR);
    PRAGMA(omp for schedule(dynamic, 4))
    for (int64_t n = 0; n < p.B * p.Hk * p.C; n++) {
      const int64_t bh = n / p.C, first = n % p.C * p.bc, count = std::min(p.bc, p.Sk - first);
      const T *ksrc = k + bh / p.Hk * ks[0] + bh % p.Hk * ks[1] + first * ks[2], *vsrc = v + bh / p.Hk * vs[0] + bh % p.Hk * vs[1] + first * vs[2];
      pack_rows<T, E>(K.data + n * p.bc * D, ksrc, count, p.bc, p.D, D, ks[2]);
      pack_columns<T, E, P, ROWS>(W.data + n * p.bc * Dv, vsrc, count, p.bc, p.Dv, Dv, vs[2]);
    }
    PRAGMA(omp for schedule(dynamic, 1))
    for (int64_t n = 0; n < p.B * p.H * strips; n++) {
      // the last strips first: under a causal layout they are the longest
      const int64_t bh = n % (p.B * p.H), b = bh / p.H, h = bh % p.H, row0 = (strips - 1 - n / (p.B * p.H)) * NR, row1 = std::min(p.S, row0 + NR);
      if (row0 >= p.S) continue;
      const int64_t head = b * p.Hk + h / (p.H / p.Hk), line = (p.layout_heads > 1 ? h : 0) * p.R + row0 / p.br;
      pack_panel<T, E, P, NR>(query, q + b * qs[0] + h * qs[1] + row0 * qs[2], p.D, D, row1 - row0, 1, qs[2]);
      std::fill(o, o + Dv * NR, Acc(0));
      uint32_t row_hash[NR];
      dropout_rows<NR>(p, bh, row0, row_hash);
      V m[NV], l[NV];
      for (int j = 0; j < NV; j++) { m[j] = V{} + none; l[j] = V{}; }
      for (int64_t t = p.offsets[line]; t < p.offsets[line + 1]; t++) {
        const int64_t c = p.columns[t] % p.C;
        const int limit = restriction(p, row0, row1, c);
        if (limit < 0) continue;
        const E* kb = K.data + (head * p.C + c) * p.bc * D;
        const E* vb = W.data + (head * p.C + c) * p.bc * Dv;
        for (int64_t i = 0; i < p.bc; i += ROWS)
          micro<U, Acc, VW, ROWS, NV, kChunk / P>(1, D / P, nullptr, 0, [&](int64_t, const U*& x, const U*& y) { x = reinterpret_cast<const U*>(kb + i * D); y = reinterpret_cast<const U*>(query); },
                                                  [&](int r, int j, V s) { s *= Acc(p.scale); std::memcpy(scores + (i + r) * NR + j * VW, &s, sizeof(s)); });
        if (limit && !restrict_scores<Acc, NR>(p, b, row0, c, t, scores)) continue;
        V top[NV], keep[NV];
        for (int j = 0; j < NV; j++) {
          V x = m[j];
          for (int64_t i = 0; i < p.bc; i++) { V s = load<V>(scores + i * NR + j * VW); x = s > x ? s : x; }
          top[j] = x == none ? V{} : x;  // nothing seen so far: any finite number will do
          keep[j] = exponential<VW>(m[j] - top[j]);
          m[j] = x;
          l[j] *= keep[j];
          for (int64_t i = 0; i < p.bc; i++) {
            V s = exponential<VW>(load<V>(scores + i * NR + j * VW) - top[j]);
            l[j] += s;
            std::memcpy(scores + i * NR + j * VW, &s, sizeof(s));
          }
        }
        if (p.dropout > 0)  // after the sum: the probabilities are dropped, not the scores
          for (int64_t i = 0; i < p.bc; i++) {
            Acc factor[NR];
            keep_factors<Acc, NR>(p, row_hash, c * p.bc + i, factor);
            UNROLL for (int e = 0; e < NR; e++) scores[i * NR + e] *= factor[e];
          }
        to_panel<Acc, E, P, NR>(panel, scores, p.bc);
        for (int64_t d = 0; d < Dv; d += ROWS) {
          Acc* od = o + d * NR;
          for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < NV; j++) { V s = load<V>(od + r * NR + j * VW) * keep[j]; std::memcpy(od + r * NR + j * VW, &s, sizeof(s)); }
          micro<U, Acc, VW, ROWS, NV, 1>(1, p.bc / P, od, NR, [&](int64_t, const U*& x, const U*& y) { x = reinterpret_cast<const U*>(vb + d * p.bc); y = reinterpret_cast<const U*>(panel); },
                                         [&](int r, int j, V s) { std::memcpy(od + r * NR + j * VW, &s, sizeof(s)); });
        }
      }
      Acc factor[NR];
      for (int e = 0; e < NR; e++) {
        const Acc sum = l[e / VW][e % VW], most = m[e / VW][e % VW];
        factor[e] = sum == Acc(0) ? Acc(0) : Acc(1) / sum;  // 0: nothing was seen; scores that are all NaN have no maximum either, but their sum is NaN
        if (row0 + e < p.S) lse[(b * p.H + h) * p.S + row0 + e] = most + std::log(sum);
      }
      write_rows<Acc, T, NR>(out + ((b * p.H + h) * p.S + row0) * p.Dv, o, factor, row1 - row0, p.Dv, p.Dv);
    }
  }
}

template <class T, int VW, int NV>
void backward(const Problem& p, const T* q, const T* k, const T* v, const int64_t* qs, const int64_t* ks, const int64_t* vs, const T* out, const void* lse_in, const void* lse_grad, const T* grad,
              T* dq, T* dk, T* dv) {
  using E = typename Mode<T>::E; using U = typename Mode<T>::U; using Acc = typename Mode<T>::Acc; using V = vec<Acc, VW>;
  constexpr int P = Mode<T>::P, NR = VW * NV, WV = kVectorBytes / int(sizeof(Acc)), WR = 2 * WV;  // WR: columns of a strip of D
  const int64_t D = Size<Acc>::pad(p.D), Dv = Size<Acc>::pad(p.Dv), keys = p.C * p.bc, strips = p.R * p.br / NR;
  const Acc *lse = static_cast<const Acc*>(lse_in), *dlse = static_cast<const Acc*>(lse_grad);
  const int64_t sums = keys * (D + Dv), blocks = p.bc * NR, packed = keys * (2 * D + Dv) + 2 * NR * (D + Dv) + 3 * blocks;
  const int64_t each = sums + (p.dropout > 0 ? 3 : 2) * blocks + D * NR;
  Buffer<Acc> accumulators(p.threads * each);
  Buffer<E> packs(p.threads * packed);
  PRAGMA(omp parallel num_threads(p.threads) if (p.threads > 1)) {
    Acc* dkey = accumulators.data + thread_index() * each;
    Acc *dvalue = dkey + keys * D, *prob = dvalue + keys * Dv, *dscore = prob + blocks, *dquery = dscore + blocks, *factor = dquery + D * NR;
    E* krows = packs.data + thread_index() * packed;
    E *kcols = krows + keys * D, *vrows = kcols + keys * D, *query = vrows + keys * Dv, *query_cols = query + D * NR, *grads = query_cols + D * NR, *grad_cols = grads + Dv * NR;
    E *prob_rows = P == 1 ? reinterpret_cast<E*>(prob) : grad_cols + Dv * NR;
    E *score_rows = P == 1 ? reinterpret_cast<E*>(dscore) : grad_cols + Dv * NR + blocks;
    E *score_panel = P == 1 ? score_rows : grad_cols + Dv * NR + 2 * blocks;
    Acc one[NR];
    std::fill(one, one + NR, Acc(1));
    PRAGMA(omp for schedule(dynamic, 1))
    for (int64_t n = 0; n < p.B * p.Hk; n++) {
      const int64_t b = n / p.Hk, hk = n % p.Hk, repeat = p.H / p.Hk;
      const T *ksrc = k + b * ks[0] + hk * ks[1], *vsrc = v + b * vs[0] + hk * vs[1];
      pack_rows<T, E>(krows, ksrc, p.Sk, keys, p.D, D, ks[2]);
      pack_rows<T, E>(vrows, vsrc, p.Sk, keys, p.Dv, Dv, vs[2]);
      for (int64_t c = 0; c < p.C; c++)
        pack_columns<T, E, P, ROWS>(kcols + c * p.bc * D, ksrc + c * p.bc * ks[2], std::min(p.bc, p.Sk - c * p.bc), p.bc, p.D, D, ks[2]);
      std::fill(dkey, dkey + sums, Acc(0));
      for (int64_t h = hk * repeat; h < (hk + 1) * repeat; h++)
        for (int64_t strip = 0; strip < strips; strip++) {
          const int64_t row0 = strip * NR, row1 = std::min(p.S, row0 + NR), count = row1 - row0;
          if (count <= 0) break;
          const int64_t line = (p.layout_heads > 1 ? h : 0) * p.R + row0 / p.br, at = (b * p.H + h) * p.S + row0;
          const T *qsrc = q + b * qs[0] + h * qs[1] + row0 * qs[2], *gsrc = grad + at * p.Dv;
          pack_panel<T, E, P, NR>(query, qsrc, p.D, D, count, 1, qs[2]);
          pack_columns<T, E, P, WR>(query_cols, qsrc, count, NR, p.D, D, qs[2]);
          pack_panel<T, E, P, NR>(grads, gsrc, p.Dv, Dv, count, 1, p.Dv);
          pack_columns<T, E, P, WR>(grad_cols, gsrc, count, NR, p.Dv, Dv, p.Dv);
          Acc log_sum[NR], delta[NR];
          for (int64_t e = 0; e < NR; e++) {
            log_sum[e] = std::numeric_limits<Acc>::infinity(), delta[e] = 0;  // a query that sees nothing: its probabilities are 0
            if (e >= count) continue;
            if (lse[at + e] > -std::numeric_limits<Acc>::infinity() || lse[at + e] != lse[at + e]) log_sum[e] = lse[at + e];
            Acc dot = 0;
            for (int64_t d = 0; d < p.Dv; d++) dot += Acc(widen(out[(at + e) * p.Dv + d])) * Acc(widen(gsrc[e * p.Dv + d]));
            delta[e] = dot - (dlse ? dlse[at + e] : Acc(0));
          }
          std::fill(dquery, dquery + D * NR, Acc(0));
          uint32_t row_hash[NR];
          dropout_rows<NR>(p, b * p.H + h, row0, row_hash);
          for (int64_t t = p.offsets[line]; t < p.offsets[line + 1]; t++) {
            const int64_t c = p.columns[t] % p.C;
            const int limit = restriction(p, row0, row1, c);
            if (limit < 0) continue;
            for (int64_t i = 0; i < p.bc; i += ROWS)
              micro<U, Acc, VW, ROWS, NV, kChunk / P>(
                  1, D / P, nullptr, 0, [&](int64_t, const U*& x, const U*& y) { x = reinterpret_cast<const U*>(krows + (c * p.bc + i) * D); y = reinterpret_cast<const U*>(query); },
                  [&](int r, int j, V s) { s *= Acc(p.scale); std::memcpy(prob + (i + r) * NR + j * VW, &s, sizeof(s)); });
            if (limit && !restrict_scores<Acc, NR>(p, b, row0, c, t, prob)) continue;
            for (int64_t i = 0; i < p.bc; i++)
              for (int j = 0; j < NV; j++) {
                V s = exponential<VW>(load<V>(prob + i * NR + j * VW) - load<V>(log_sum + j * VW));
                std::memcpy(prob + i * NR + j * VW, &s, sizeof(s));
              }
            if (p.dropout > 0) for (int64_t i = 0; i < p.bc; i++) keep_factors<Acc, NR>(p, row_hash, c * p.bc + i, factor + i * NR);
            for (int64_t i = 0; i < p.bc; i += ROWS)
              micro<U, Acc, VW, ROWS, NV, kChunk / P>(
                  1, Dv / P, nullptr, 0, [&](int64_t, const U*& x, const U*& y) { x = reinterpret_cast<const U*>(vrows + (c * p.bc + i) * Dv); y = reinterpret_cast<const U*>(grads); },
                  [&](int r, int j, V s) {
                    const int64_t e = (i + r) * NR + j * VW;
                    V w = load<V>(prob + e);
                    if (p.dropout > 0) {
                      const V f = load<V>(factor + e);
                      s = f == Acc(0) ? V{} : s * f;  // the value of a dropped probability takes no part
                      const V dropped = w * f;
                      std::memcpy(prob + e, &dropped, sizeof(s));
                    }
                    s = w * (s - load<V>(delta + j * VW)) * Acc(p.scale);
                    s = w == Acc(0) ? V{} : s;  // what is not allowed takes no part, whatever stands in its value
                    std::memcpy(dscore + e, &s, sizeof(s));
                  });
            if constexpr (P == 2) {
              to_rows<Acc, E, NR>(prob_rows, prob, p.bc);
              to_rows<Acc, E, NR>(score_rows, dscore, p.bc);
              to_panel<Acc, E, P, NR>(score_panel, dscore, p.bc);
            }
            auto rows_product = [&](Acc* sum, int64_t width, const E* left, const E* right) {  // sum (bc x width) += left (bc x NR) @ right (NR x width)
              for (int64_t d = 0; d < width; d += WR)
                for (int64_t i = 0; i < p.bc; i += ROWS) {
                  Acc* s = sum + i * width + d;
                  micro<U, Acc, WV, ROWS, 2, NR / P>(1, NR / P, s, width, [&](int64_t, const U*& x, const U*& y) { x = reinterpret_cast<const U*>(left + i * NR); y = reinterpret_cast<const U*>(right + d * NR); },
                                                     [&](int r, int j, vec<Acc, WV> z) { std::memcpy(s + r * width + j * WV, &z, sizeof(z)); });
                }
            };
            rows_product(dvalue + c * p.bc * Dv, Dv, prob_rows, grad_cols);
            rows_product(dkey + c * p.bc * D, D, score_rows, query_cols);
            for (int64_t d = 0; d < D; d += ROWS) {
              Acc* s = dquery + d * NR;
              micro<U, Acc, VW, ROWS, NV, 1>(1, p.bc / P, s, NR, [&](int64_t, const U*& x, const U*& y) { x = reinterpret_cast<const U*>(kcols + (c * D + d) * p.bc); y = reinterpret_cast<const U*>(score_panel); },
                                             [&](int r, int j, V z) { std::memcpy(s + r * NR + j * VW, &z, sizeof(z)); });
            }
          }
          write_rows<Acc, T, NR>(dq + at * p.D, dquery, one, count, p.D, p.D);
        }
      for (int64_t i = 0; i < p.Sk; i++) {
        for (int64_t d = 0; d < p.D; d++) narrow(dkey[i * D + d], dk[(n * p.Sk + i) * p.D + d]);
        for (int64_t d = 0; d < p.Dv; d++) narrow(dvalue[i * Dv + d], dv[(n * p.Sk + i) * p.Dv + d]);
      }
    }
  }
}

Problem problem(const int64_t* s, const int32_t* offsets, const int32_t* columns, double scale, int causal, const int32_t* position, const int32_t* group, const uint8_t* padding, const uint8_t* mask, double dropout,
                const int64_t* seed, int threads) {
  return Problem{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], offsets, columns, scale, causal, position, group, padding, mask, dropout, seed, threads};
}
}  // namespace

extern "C" {
// sizes: B, H, Hk, S, Sk, D, Dv, R, C, br, bc, heads of the layout (1 or H). Strides: batch, head, token, in elements; the last dimension is contiguous. `out`, `grad` and
// the gradients are contiguous. lse is (B, H, S) in the accumulator's type. Returns as the products do.
int onetorch_attention(int dtype, const void* q, const void* k, const void* v, const int64_t* sizes, const int64_t* qs, const int64_t* ks, const int64_t* vs, const int32_t* offsets, const int32_t* columns,
                       double scale, int causal, const int32_t* position, const int32_t* group, const uint8_t* padding, const uint8_t* mask, double dropout, const int64_t* seed, void* out,
                       void* lse, int threads) {
  const Problem p = problem(sizes, offsets, columns, scale, causal, position, group, padding, mask, dropout, seed, threads);
  return dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    widths<T>(p.br, [&](auto vw, auto nv) { forward<T, vw(), nv()>(p, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), qs, ks, vs, static_cast<T*>(out), lse); });
  });
}
int onetorch_attention_backward(int dtype, const void* q, const void* k, const void* v, const int64_t* sizes, const int64_t* qs, const int64_t* ks, const int64_t* vs, const int32_t* offsets,
                                const int32_t* columns, double scale, int causal, const int32_t* position, const int32_t* group, const uint8_t* padding, const uint8_t* mask, double dropout, const int64_t* seed, const void* out, const void* lse,
                                const void* dlse, const void* grad, void* dq, void* dk, void* dv, int threads) {
  const Problem p = problem(sizes, offsets, columns, scale, causal, position, group, padding, mask, dropout, seed, threads);
  return dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    widths<T>(p.br, [&](auto vw, auto nv) {
      backward<T, vw(), nv()>(p, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), qs, ks, vs, static_cast<const T*>(out), lse, dlse, static_cast<const T*>(grad),
                              static_cast<T*>(dq), static_cast<T*>(dk), static_cast<T*>(dv));
    });
  });
}
}
