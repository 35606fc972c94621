// out[j] = sum over n of a[n, r_j] * b[n, c_j] for sorted positions (r_j, c_j) of an R x C matrix that is never made.
//
// a (N, R), b (N, C) with any strides; indices (K,) = r * C + c, ascending; out (K,). Tokens go in tiles and columns in
// blocks: both operands are turned over, so that the tokens of a column are neighbours and each entry is a short dot
// product. Those of b wait in scratch memory of the caller, which stays in the cache; those of a few rows of a on the
// stack. The sums of an entry are added tile by tile, whatever thread does it: results do not depend on their number.
#include <algorithm>

#include "row_blocks.h"
#include "token_tiles.h"

namespace memsave {
namespace {

constexpr int64_t kMaxTile = 256;      // tokens
constexpr int64_t kRows = 32;          // of a that are turned over at once
constexpr int64_t kGrainElements = 1 << 14, kGrainProducts = 1 << 16, kPieces = 64;

struct Job {
  Matrix a, b;
  const int32_t* indices;
  int64_t entries;
  void *sums, *scratch;
};

// sums[0] += the dot product of a row of `a` and a column of b, both turned over.
template <class Wide>
MS_INLINE void one_dot(const Wide* row, const Wide* column, int64_t padded, Wide* sums) {
  Wide lanes[kSide] = {}, eight[8], four[4];
  for (int64_t t = 0; t < padded; t += kSide) {
    for (int64_t i = 0; i < kSide; ++i) lanes[i] += row[t + i] * column[t + i];
  }
  for (int i = 0; i < 8; ++i) eight[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  sums[0] += (four[0] + four[2]) + (four[1] + four[3]);
}

// The same bits for four entries of a row, in half the time. Written out so that compilers keep all lanes in registers.
template <class Wide>
MS_INLINE void four_dots(const Wide* row, const Wide* const* columns, int64_t padded, Wide* sums) {
  const Wide *c0 = columns[0], *c1 = columns[1], *c2 = columns[2], *c3 = columns[3];
  Wide lanes[4][kSide] = {}, eight[4][8], four[4][4];
  for (int64_t t = 0; t < padded; t += kSide) {
    for (int64_t i = 0; i < kSide; ++i) {
      const Wide x = row[t + i];
      lanes[0][i] += x * c0[t + i];
      lanes[1][i] += x * c1[t + i];
      lanes[2][i] += x * c2[t + i];
      lanes[3][i] += x * c3[t + i];
    }
  }
  for (int i = 0; i < 8; ++i) {
    eight[0][i] = lanes[0][i] + lanes[0][i + 8];
    eight[1][i] = lanes[1][i] + lanes[1][i + 8];
    eight[2][i] = lanes[2][i] + lanes[2][i + 8];
    eight[3][i] = lanes[3][i] + lanes[3][i + 8];
  }
  for (int i = 0; i < 4; ++i) {
    four[0][i] = eight[0][i] + eight[0][i + 4];
    four[1][i] = eight[1][i] + eight[1][i + 4];
    four[2][i] = eight[2][i] + eight[2][i + 4];
    four[3][i] = eight[3][i] + eight[3][i + 4];
  }
  for (int e = 0; e < 4; ++e) sums[e] += (four[e][0] + four[e][2]) + (four[e][1] + four[e][3]);
}

// The entries [j, end) of one row.
template <class Wide>
MS_INLINE void sum_row(const Job& job, const Tile& tile, int64_t offset, const Wide* row, int64_t j, int64_t end) {
  const Wide* scratch = static_cast<const Wide*>(job.scratch) + tile.place;
  Wide* sums = static_cast<Wide*>(job.sums);
  const Wide* columns[4];
  for (; j + 4 <= end; j += 4) {
    for (int64_t e = 0; e < 4; ++e) columns[e] = scratch + (job.indices[j + e] - offset) * tile.padded;
    four_dots(row, columns, tile.padded, sums + j);
  }
  for (; j < end; ++j) one_dot(row, scratch + (job.indices[j] - offset) * tile.padded, tile.padded, sums + j);
}

// Blocks [begin, end) of kRows rows: their part of `a` turned over, then the entries that lie in the tile's columns.
template <class T, class Wide>
MS_INLINE void sum_blocks(const Job& job, const Tile& tile, int64_t begin, int64_t end) {
  alignas(64) Wide turned[kRows * kMaxTile];
  const int32_t* const last = job.indices + job.entries;
  const int64_t width = job.b.columns;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRows, behind = std::min(job.a.columns, first + kRows);
    const int32_t* entry = std::lower_bound(job.indices, last, first * width);
    if (entry == last || *entry >= behind * width) continue;
    turn<T>(job.a, tile, first, behind, turned);
    for (int64_t r = first; r < behind; ++r) {
      const int64_t offset = r * width + tile.first_column;
      if (tile.columns < width) entry = std::lower_bound(entry, last, offset);
      const int32_t* stop = entry;
      while (stop < last && *stop < offset + tile.columns) ++stop;
      sum_row<Wide>(job, tile, offset, turned + (r - first) * tile.padded, entry - job.indices, stop - job.indices);
      entry = stop;
    }
  }
}

enum class Step { kTurn, kSum };

// Columns [begin, end) of the tile turned over into scratch memory, or blocks [begin, end) of rows summed.
template <class T, class Wide>
MS_INLINE void work(const Job& job, const Tile& tile, Step step, int64_t begin, int64_t end) {
  if (step == Step::kSum) return sum_blocks<T, Wide>(job, tile, begin, end);
  Wide* target = static_cast<Wide*>(job.scratch) + tile.place + begin * tile.padded;
  turn<T>(job.b, tile, tile.first_column + begin, tile.first_column + end, target);
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void work_float32(const Job& job, const Tile& tile, Step step, int64_t begin, int64_t end) {
  work<float, float>(job, tile, step, begin, end);
}
MS_CLONES void work_float64(const Job& job, const Tile& tile, Step step, int64_t begin, int64_t end) {
  work<double, double>(job, tile, step, begin, end);
}
MS_CLONES void work_float16(const Job& job, const Tile& tile, Step step, int64_t begin, int64_t end) {
  work<Float16, float>(job, tile, step, begin, end);
}
MS_CLONES void work_bfloat16(const Job& job, const Tile& tile, Step step, int64_t begin, int64_t end) {
  work<BFloat16, float>(job, tile, step, begin, end);
}

void work(const Job& job, const Tile& tile, int64_t dtype, Step step, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32: return work_float32(job, tile, step, begin, end);
    case kFloat64: return work_float64(job, tile, step, begin, end);
    case kFloat16: return work_float16(job, tile, step, begin, end);
    default: return work_bfloat16(job, tile, step, begin, end);
  }
}

// The first block of rows of a piece, of `pieces` with about as many entries each.
int64_t first_block(const Job& job, int64_t piece, int64_t pieces) {
  if (piece == 0) return 0;
  if (piece == pieces) return (job.a.columns + kRows - 1) / kRows;
  return job.indices[job.entries * piece / pieces] / job.b.columns / kRows;
}

// Some tokens and a block of columns: all of their tiles are turned over, then all of them summed.
void one_pass(const Job& job, int64_t dtype, int64_t token, int64_t tokens, int64_t tile, int64_t column,
              int64_t columns) {
  const auto each_tile = [&](Step step, int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens; t += tile) {
      const int64_t count = std::min(tile, tokens - t), padded = (count + kSide - 1) / kSide * kSide;
      work(job, {token + t, count, padded, column, columns, t * columns}, dtype, step, begin, end);
    }
  };
  parallel_for(columns, std::max(kSide, kGrainElements / tokens),
               [&](int64_t begin, int64_t end) { each_tile(Step::kTurn, begin, end); });
  const int64_t pieces = std::min<int64_t>(kPieces, 1 + job.entries * tokens / kGrainProducts);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    each_tile(Step::kSum, first_block(job, begin, pieces), first_block(job, end, pieces));
  });
}

}  // namespace
}  // namespace memsave

// `sums` (K,) and `scratch` (min(block, C) * min(pass, N to a multiple of 16),) are float, or double for float64; tile is a
// multiple of 16, at most 256, and pass of tile. Returns -1, or the first position of an index that is outside [0, R * C) or not above the one before, with nothing
// written.
MS_EXPORT int64_t ms_sddmm(const void* a, int64_t rows, int64_t a_token_stride, int64_t a_column_stride, const void* b,
                           int64_t columns, int64_t b_token_stride, int64_t b_column_stride, int64_t dtype,
                           int64_t tokens, const int32_t* indices, int64_t entries, int64_t tile, int64_t pass,
                           int64_t block, void* scratch, void* sums, void* out) {
  using namespace memsave;
  if (const int64_t wrong = first_wrong(indices, entries, rows * columns); wrong >= 0) return wrong;
  if (entries == 0) return -1;
  const Job job{{a, rows, a_token_stride, a_column_stride}, {b, columns, b_token_stride, b_column_stride}, indices,
                entries, sums, scratch};
  std::memset(sums, 0, static_cast<size_t>(entries) * (dtype == kFloat64 ? 8 : 4));
  for (int64_t token = 0; token < tokens; token += pass) {
    for (int64_t column = 0; column < columns; column += block) {
      one_pass(job, dtype, token, std::min(pass, tokens - token), tile, column, std::min(block, columns - column));
    }
  }
  if (sums != out) store(static_cast<const float*>(sums), out, dtype, 0, entries);
  return -1;
}
