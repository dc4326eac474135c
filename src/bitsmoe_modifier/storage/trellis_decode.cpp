// Trellis codes to floats (docs/format.md, "Trellis codes"): a tile's words are read once, pair of columns by pair.
#include <cstdint>
#include <cstring>

// Decode some tiles of `rows` x `columns`, all of one width.
//   payload: bytes; offset [tiles]: where each tile begins in it
//   table [256]: values of the windows; scale [tiles][by_row ? rows : columns]
//   place [tiles][rows]: where each row begins in `out`; its columns follow one another there
extern "C" void bitsmoe_trellis_decode(const uint8_t* payload, const int64_t* offset, int64_t tiles, int width,
                                       int64_t rows, int64_t columns, const float* table, const float* scale,
                                       int by_row, const int64_t* place, float* out) {
  const int64_t words = rows * width / 16, lane = rows / 8;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const float* scales = scale + tile * (by_row ? rows : columns);
    const int64_t* places = place + tile * rows;
    for (int64_t pair = 0; pair < columns / 2; ++pair) {
      const uint8_t* words_at = payload + offset[tile] + pair * words * 4;
      const auto word = [&](int64_t n) {
        uint32_t value;
        std::memcpy(&value, words_at + 4 * (n == words ? 0 : n), 4);  // the stream is circular
        return value;
      };
      int64_t number = 0, position = 0;
      int shift = 0;
      uint32_t low = word(0), high = word(1);
      for (int64_t first = 0; first < 8; ++first)
        for (int64_t n = 0; n < lane; ++n, ++position) {
          const int64_t row = n * 8 + first;
          // 16 bits of each column from this word, and the next 16 above them
          const uint32_t even = (low & 0xFFFF) | high << 16, odd = low >> 16 | (high & 0xFFFF0000);
          float* to = out + places[row] + 2 * pair;
          to[0] = table[even >> shift & 0xFF] * (by_row ? scales[row] : scales[2 * pair]);
          to[1] = table[odd >> shift & 0xFF] * (by_row ? scales[row] : scales[2 * pair + 1]);
          shift += width;
          if (shift >= 16) {
            shift -= 16;
            ++number;
            low = high;
            if (number + 1 <= words) high = word(number + 1);
          }
        }
    }
  }
}
