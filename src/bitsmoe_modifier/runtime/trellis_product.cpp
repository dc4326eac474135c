// A vector times factors in trellis codes on a CPU (docs/format.md, "Trellis codes"; trellis_product.py calls this).
//
// A sequence is eight segments of consecutive weights, row g, g + 8, ... in segment g. The eight segments are the lanes
// of a vector, those of the pair's other column eight more: a shift and a mask bring the windows of one position to all
// of them, a gather looks their values up, and a multiply-add follows. Nothing decoded is stored.
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define SIMD 1
#endif

namespace {

// What an entry of `TileIndex` says, in its order.
struct Tile {
  int64_t quantum, step_row, width, units, member, source, target;
};

float step_value(uint8_t byte) {
  const uint32_t bits = (uint32_t(byte) + 832) << 20;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Where each position's windows lie, for all eight segments: word, the word after it, and shift.
struct Positions {
  int rows = 0, width = 0;
  std::vector<int32_t> word, after, shift;
  std::vector<char> fresh;  // the words are others than those of the position before

  void prepare(int new_rows, int new_width) {
    if (rows == new_rows && width == new_width) return;
    rows = new_rows, width = new_width;
    const int length = rows / 8, words = rows * width / 16;
    word.resize(rows), after.resize(rows), shift.resize(rows), fresh.assign(length, 0);
    for (int i = 0; i < length; ++i)
      for (int g = 0; g < 8; ++g) {
        const int bit = (g * length + i) * width, at = 8 * i + g;
        word[at] = bit / 16, after[at] = (bit / 16 + 1) % words, shift[at] = bit % 16;
        if (i == 0 || word[at] != word[at - 8]) fresh[i] = 1;
      }
  }
};

#ifdef SIMD
// Both columns' next 32 bits of a stream from two words that follow one another.
inline void columns_of(__m256i low, __m256i high, __m256i& even, __m256i& odd) {
  even = _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA);
  odd = _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xAA);
}
#endif

// sums[row] += the tile's values times x: `pairs` pairs of columns.
void multiply(const uint8_t* codes, const Positions& at, int pairs, const float* table, const float* x, float* sums) {
  const int words = at.rows * at.width / 16, length = at.rows / 8;
#ifdef SIMD
  for (int pair = 0; pair < pairs; ++pair, codes += 4 * words, x += 2) {
    const int* stream = reinterpret_cast<const int*>(codes);
#ifdef __AVX512F__
    const __m512 factor = _mm512_insertf32x8(_mm512_set1_ps(x[0]), _mm256_set1_ps(x[1]), 1);
    __m512i both = _mm512_setzero_si512();
#else
    const __m256 first = _mm256_set1_ps(x[0]), second = _mm256_set1_ps(x[1]);
#endif
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (int i = 0; i < length; ++i) {
      if (at.fresh[i]) {
        const __m256i low = _mm256_i32gather_epi32(stream, _mm256_loadu_si256((const __m256i*)&at.word[8 * i]), 4);
        const __m256i high = _mm256_i32gather_epi32(stream, _mm256_loadu_si256((const __m256i*)&at.after[8 * i]), 4);
        columns_of(low, high, even, odd);
#ifdef __AVX512F__
        both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
#endif
      }
      const __m256i shift = _mm256_loadu_si256((const __m256i*)&at.shift[8 * i]);
#ifdef __AVX512F__
      const __m512i shifts = _mm512_inserti64x4(_mm512_castsi256_si512(shift), shift, 1);
      const __m512i window = _mm512_and_si512(_mm512_srlv_epi32(both, shifts), _mm512_set1_epi32(255));
      const __m512 value = _mm512_i32gather_ps(window, table, 4);
      float* sum = sums + 16 * i;
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(value, factor, _mm512_loadu_ps(sum)));
#else
      const __m256i mask = _mm256_set1_epi32(255);
      const __m256 a = _mm256_i32gather_ps(table, _mm256_and_si256(_mm256_srlv_epi32(even, shift), mask), 4);
      const __m256 b = _mm256_i32gather_ps(table, _mm256_and_si256(_mm256_srlv_epi32(odd, shift), mask), 4);
      float* sum = sums + 16 * i;
      _mm256_storeu_ps(sum, _mm256_fmadd_ps(a, first, _mm256_loadu_ps(sum)));
      _mm256_storeu_ps(sum + 8, _mm256_fmadd_ps(b, second, _mm256_loadu_ps(sum + 8)));
#endif
    }
  }
#else
  for (int pair = 0; pair < pairs; ++pair, codes += 4 * words, x += 2)
    for (int i = 0; i < length; ++i)
      for (int g = 0; g < 8; ++g) {
        uint32_t low, high;
        std::memcpy(&low, codes + 4 * at.word[8 * i + g], 4);
        std::memcpy(&high, codes + 4 * at.after[8 * i + g], 4);
        const uint32_t even = (low & 0xFFFF) | high << 16, odd = low >> 16 | (high & 0xFFFF0000);
        sums[16 * i + g] += table[even >> at.shift[8 * i + g] & 255] * x[0];
        sums[16 * i + 8 + g] += table[odd >> at.shift[8 * i + g] & 255] * x[1];
      }
#endif
}

}  // namespace

// y[i] += the factor of expert i times v[i], for `count` experts.
//
// tiles: all entries of the side. spans: [count][2], an expert's first and last + 1 entry. members: units of the chains.
// tables [9][256]. quantum: bytes. bs, gs: directions of a unit, columns of a group; groups: along I. inward: the rows of
// a tile are a group's, and steps belong to the elements of v. v: [count][v_size]; y: [count][y_size].
extern "C" void trellis_product(const Tile* tiles, const int64_t* spans, int64_t count, const int64_t* members,
                                const uint8_t* codes, const uint8_t* steps, const float* tables, int64_t quantum,
                                int64_t bs, int64_t gs, int64_t groups, int64_t inward, const float* v, int64_t v_size,
                                float* y, int64_t y_size) {
  Positions positions[9];
  std::vector<float> scaled(bs), sums;
  for (int64_t e = 0; e < count; ++e, spans += 2, v += v_size, y += y_size)
    for (const Tile* tile = tiles + spans[0]; tile < tiles + spans[1]; ++tile) {
      const int rows = int(inward ? gs : bs * tile->units), columns = int(inward ? bs : gs);
      Positions& at = positions[tile->width];
      at.prepare(rows, int(tile->width));
      const float* x = v + tile->source * columns;
      const uint8_t* step = steps + tile->step_row * bs;
      if (inward) {
        for (int c = 0; c < columns; ++c) scaled[c] = x[c] * step_value(step[c]);
        x = scaled.data();
      }
      sums.assign(2 * rows, 0.f);
      multiply(codes + tile->quantum * quantum, at, columns / 2, tables + 256 * tile->width, x, sums.data());
      for (int row = 0; row < rows; ++row) {  // row 8 i + g lies at 16 i + g, in two parts
        const float sum = sums[row / 8 * 16 + row % 8] + sums[row / 8 * 16 + 8 + row % 8];
        if (inward) {
          y[tile->target * gs + row] += sum;
        } else {
          const int64_t unit = row / bs, direction = row % bs;
          y[members[tile->member + unit] * bs + direction] += sum * step_value(step[unit * groups * bs + direction]);
        }
      }
    }
}
