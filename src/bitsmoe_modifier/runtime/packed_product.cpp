// A vector times packed factors on a CPU (packed_product.py has the layout of planes; native_product.py calls this).
//
// A row of a plane is read as 32-bit words. Shifting a vector of words by f, 2 f, ... brings digit after digit of every
// word to its lowest bits, which index a table of digit values held in a register; each lookup meets the elements of
// the vector that these digits belong to. They are brought into that order once per plane: it is the vector that is
// reordered, not the weights, so a 2-bit weight costs a shift, a lookup and a multiply-add per 16 (AVX-512) or 8 (AVX2).
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define SIMD 1
#endif

namespace {

// What an entry of `PlaneIndex` says, in its order.
struct Plane {
  int64_t quantum, step_row, worth, source, target;
};

float half(uint16_t bits) {
#ifdef SIMD
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 0) {  // zero and subnormal numbers
    const float small = float(mantissa) * 0x1p-24f;
    return sign ? -small : small;
  }
  const uint32_t word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
#endif
}

// Any sizes: sums[r] = row r times x. Rows of `bytes` bytes; digit j of byte i meets x[j * bytes + i].
template <int F>
void multiply_any(const uint8_t* tile, int rows, int bytes, const float* x, float* sums) {
  for (int r = 0; r < rows; ++r, tile += bytes) {
    float sum = 0;
    for (int j = 0; j < 8 / F; ++j)
      for (int i = 0; i < bytes; ++i) sum += float(2 * (tile[i] >> F * j & ((1 << F) - 1)) - ((1 << F) - 1)) * x[j * bytes + i];
    sums[r] = sum;
  }
}

#ifdef SIMD
#ifdef __AVX512F__
constexpr int LANES = 16;
using Floats = __m512;
using Words = __m512i;
inline Words load(const void* at) { return _mm512_loadu_si512(at); }
template <int BITS> inline Words shift(Words w) { return _mm512_srli_epi32(w, BITS); }
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats get(const float* at) { return _mm512_loadu_ps(at); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline __m256 lower(Floats a) { return _mm512_castps512_ps256(a); }
inline __m256 upper(Floats a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }
inline void put(float* at, Floats a) { _mm512_storeu_ps(at, a); }
template <int F> struct Table {  // the lookup reads the lowest 4 bits of a lane
  Floats values;
  Table() {
    float all[16];
    for (int i = 0; i < 16; ++i) all[i] = float(2 * (i & ((1 << F) - 1)) - ((1 << F) - 1));
    values = get(all);
  }
  Floats operator()(Words w) const { return _mm512_permutexvar_ps(w, values); }
};
#else
constexpr int LANES = 8;
using Floats = __m256;
using Words = __m256i;
inline Words load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
template <int BITS> inline Words shift(Words w) { return _mm256_srli_epi32(w, BITS); }
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats get(const float* at) { return _mm256_loadu_ps(at); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline void put(float* at, Floats a) { _mm256_storeu_ps(at, a); }
template <int F> struct Table {  // the lookup reads the lowest 3 bits of a lane; 16 values are computed
  Floats values;
  Table() {
    float all[8];
    for (int i = 0; i < 8; ++i) all[i] = float(2 * (i & ((1 << F) - 1)) - ((1 << F) - 1));
    values = get(all);
  }
  Floats operator()(Words w) const {
    if (F < 4) return _mm256_permutevar8x32_ps(values, w);
    const __m256 digit = _mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32(15)));
    return _mm256_fmadd_ps(digit, _mm256_set1_ps(2.f), _mm256_set1_ps(-15.f));
  }
};
#endif

// acc += digits C, C + 1, ... of the words times their elements of x; four sums, because one would wait for itself.
template <int F, int C>
inline void meet(Words w, const float* x, const Table<F>& table, Floats (&acc)[4]) {
  if constexpr (C < 32 / F) {
    acc[C & 3] = fused(table(shift<F * C>(w)), get(x + C * LANES), acc[C & 3]);
    meet<F, C + 1>(w, x, table, acc);
  }
}

inline __m128 sums_of_four(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Rows of 32-bit words, `span` of them to a row: a vector holds LANES / span rows, or a row is span / LANES vectors.
template <int F>
void multiply_words(const uint8_t* tile, int rows, int span, const float* x, float* sums) {
  const Table<F> table;
  const int vectors = span > LANES ? span / LANES : 1, together = span < LANES ? LANES / span : 1;
  const auto dot = [&](const uint8_t* at) {
    Floats acc[4] = {zero(), zero(), zero(), zero()};
    for (int v = 0; v < vectors; ++v) meet<F, 0>(load(at + 4 * LANES * v), x + v * (32 / F) * LANES, table, acc);
    return add(add(acc[0], acc[1]), add(acc[2], acc[3]));
  };
  const int stride = 4 * LANES * vectors;  // bytes
  int r = 0;
#ifdef __AVX512F__
  if (span >= 16)
    for (; r + 4 <= rows; r += 4, tile += 4 * stride) {
      const Floats a = dot(tile), b = dot(tile + stride), c = dot(tile + 2 * stride), d = dot(tile + 3 * stride);
      _mm_storeu_ps(sums + r, sums_of_four(_mm256_add_ps(lower(a), upper(a)), _mm256_add_ps(lower(b), upper(b)),
                                           _mm256_add_ps(lower(c), upper(c)), _mm256_add_ps(lower(d), upper(d))));
    }
  else if (span == 8)
    for (; r + 4 <= rows; r += 4, tile += 2 * stride) {
      const Floats a = dot(tile), b = dot(tile + stride);
      _mm_storeu_ps(sums + r, sums_of_four(lower(a), upper(a), lower(b), upper(b)));
    }
#else
  if (span >= 8)
    for (; r + 4 <= rows; r += 4, tile += 4 * stride)
      _mm_storeu_ps(sums + r, sums_of_four(dot(tile), dot(tile + stride), dot(tile + 2 * stride), dot(tile + 3 * stride)));
#endif
  for (; r < rows; r += together, tile += stride) {
    float lanes[LANES];
    put(lanes, dot(tile));
    for (int t = 0; t < together; ++t) {
      float sum = 0;
      for (int i = 0, count = LANES / together; i < count; ++i) sum += lanes[t * count + i];
      sums[r + t] = sum;
    }
  }
}

// x in the order of `multiply_words`: [vector of a row][shift][lane].
template <int F>
void reorder(const float* x, int span, float* out) {
  const int vectors = span > LANES ? span / LANES : 1, bytes = 4 * span;
  for (int v = 0; v < vectors; ++v)
    for (int c = 0; c < 32 / F; ++c)
      for (int lane = 0; lane < LANES; ++lane)
        *out++ = x[c % (8 / F) * bytes + 4 * (v * LANES + lane % span) + c / (8 / F)];
}

template <int F>
bool in_words(int rows, int bytes) {
  const int span = bytes / 4;
  if (bytes % 4 || span == 0) return false;
  return span >= LANES ? span % LANES == 0 : LANES % span == 0 && rows % (LANES / span) == 0;
}
#endif

struct Scratch {  // ordered: a row, or LANES for each of at most 32 shifts
  std::vector<float> scaled, ordered, sums;
};

// Steps as they are stored: fp16 in format version 1, from then on bytes (storage/steps.py).
float value_of(uint16_t step) { return half(step); }
float value_of(uint8_t step) {
  const uint32_t word = (uint32_t(step) + (104u << 3)) << 20;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

template <int F, typename Step>
void run(const Plane* plane, const Plane* end, const uint8_t* codes, const Step* steps, int64_t quantum, int n, int m,
         bool inward, const float* v, float* y, Scratch& scratch) {
  const int bytes = n * F / 8;
  [[maybe_unused]] const float* last = nullptr;  // scratch.ordered holds these elements
  for (; plane < end; ++plane) {
    const uint8_t* tile = codes + plane->quantum * quantum;
    const Step* step = steps + plane->step_row * (inward ? n : m);
    const float *source = v + plane->source * n, worth = float(plane->worth);
    const float* x = source;
    if (inward) {
      for (int k = 0; k < n; ++k) scratch.scaled[k] = source[k] * (value_of(step[k]) * worth);
      x = scratch.scaled.data();
    }
#ifdef SIMD
    if (in_words<F>(m, bytes)) {
      if (inward || source != last) reorder<F>(x, bytes / 4, scratch.ordered.data());
      last = source;
      multiply_words<F>(tile, m, bytes / 4, scratch.ordered.data(), scratch.sums.data());
    } else
#endif
      multiply_any<F>(tile, m, bytes, x, scratch.sums.data());
    float* out = y + plane->target * m;
    if (inward)
      for (int r = 0; r < m; ++r) out[r] += scratch.sums[r];
    else
      for (int r = 0; r < m; ++r) out[r] += scratch.sums[r] * (value_of(step[r]) * worth);
  }
}

template <typename Step>
void product(const Plane* planes, const int64_t* spans, int64_t count, const uint8_t* codes, const Step* steps,
             int64_t quantum, int n, int m, bool inward, const float* v, int64_t v_size, float* y, int64_t y_size) {
  Scratch scratch{std::vector<float>(n), std::vector<float>(n + 512), std::vector<float>(m)};
  for (int64_t i = 0; i < count; ++i, spans += 6, v += v_size, y += y_size) {
    run<4>(planes + spans[0], planes + spans[1], codes, steps, quantum, n, m, inward, v, y, scratch);
    run<2>(planes + spans[2], planes + spans[3], codes, steps, quantum, n, m, inward, v, y, scratch);
    run<1>(planes + spans[4], planes + spans[5], codes, steps, quantum, n, m, inward, v, y, scratch);
  }
}

}  // namespace

// y[i] += the factor of expert i times v[i], for `count` experts.
//
// planes: all entries of the side. spans: [count][3][2], an expert's first and last + 1 entry for digits of 4, 2 and 1
// bits. step_bytes: 1 or 2, of a stored step. quantum: bytes. n: elements of a plane's row; m: its rows. inward: steps
// belong to the elements of v, not to the rows. v: [count][v_size]; y: [count][y_size].
extern "C" void packed_product(const Plane* planes, const int64_t* spans, int64_t count, const uint8_t* codes,
                               const void* steps, int64_t step_bytes, int64_t quantum, int64_t n, int64_t m,
                               int64_t inward, const float* v, int64_t v_size, float* y, int64_t y_size) {
  if (step_bytes == 1)
    product(planes, spans, count, codes, static_cast<const uint8_t*>(steps), quantum, int(n), int(m), inward, v, v_size,
            y, y_size);
  else
    product(planes, spans, count, codes, static_cast<const uint16_t*>(steps), quantum, int(n), int(m), inward, v,
            v_size, y, y_size);
}
