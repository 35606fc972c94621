// For kernels on sparse matrices: tiles of tokens, turned over so that the tokens of a column are neighbours in memory.
#pragma once

#include <algorithm>

#include "common.h"

namespace memsave {

constexpr int64_t kSide = 16;  // of the squares that are turned over in registers, and lanes of a sum

// The position of the first index outside [0, elements) or not above the one before; -1 if there is none.
inline int64_t first_wrong(const int32_t* indices, int64_t entries, int64_t elements) {
  for (int64_t j = 0; j < entries; ++j) {
    if (indices[j] < 0 || indices[j] >= elements || (j > 0 && indices[j] <= indices[j - 1])) return j;
  }
  return -1;
}

// One row for each token.
struct Matrix {
  const void* values;
  int64_t columns, token_stride, column_stride;
};

// The tokens and columns that are worked on: `padded` tokens, of which those behind the first `tokens` are zeros. Those
// that are turned over lie in scratch memory from element `place` on.
struct Tile {
  int64_t first_token, tokens, padded, first_column, columns, place;
};

MS_INLINE float widened(float value) { return value; }
MS_INLINE double widened(double value) { return value; }
MS_INLINE float widened(Float16 value) { return Float16::widen(value.bits); }
MS_INLINE float widened(BFloat16 value) { return BFloat16::widen(value.bits); }

// target[c][t] = source[t][c] for a square whose columns are neighbours in memory.
template <class T, class Wide>
MS_INLINE void turn_square(const T* source, int64_t token_stride, Wide* target, int64_t padded) {
  Wide square[kSide][kSide];
  for (int64_t t = 0; t < kSide; ++t) {
    for (int64_t c = 0; c < kSide; ++c) square[t][c] = widened(source[t * token_stride + c]);
  }
  for (int64_t c = 0; c < kSide; ++c) {
    for (int64_t t = 0; t < kSide; ++t) target[c * padded + t] = square[t][c];
  }
}

// target[c][t] for columns [begin, end) of a matrix, and the tile's tokens, in the type of the sums.
template <class T, class Wide>
MS_INLINE void turn(const Matrix& matrix, const Tile& tile, int64_t begin, int64_t end, Wide* target) {
  const T* source = static_cast<const T*>(matrix.values) + tile.first_token * matrix.token_stride;
  const int64_t squares = matrix.column_stride == 1 ? tile.tokens / kSide * kSide : 0;
  const int64_t whole = matrix.column_stride == 1 ? (end - begin) / kSide * kSide : 0;
  for (int64_t t = 0; t < squares; t += kSide) {
    for (int64_t c = 0; c < whole; c += kSide) {
      turn_square(source + t * matrix.token_stride + begin + c, matrix.token_stride, target + c * tile.padded + t,
                  tile.padded);
    }
  }
  for (int64_t c = 0; c < end - begin; ++c) {
    const T* column = source + (begin + c) * matrix.column_stride;
    Wide* row = target + c * tile.padded;
    for (int64_t t = c < whole ? squares : 0; t < tile.tokens; ++t) row[t] = widened(column[t * matrix.token_stride]);
    std::fill(row + tile.tokens, row + tile.padded, Wide(0));
  }
}

}  // namespace memsave
