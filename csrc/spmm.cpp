// x S or x S^T for a sparse R x C matrix S, given by the sorted positions r * C + c of its entries.
//
// x (N, D) with any strides, out (N, O) contiguous. Tokens go in tiles, which are turned over into scratch memory of the
// caller, so that the tokens of a column are neighbours. An output column of a tile is then a sum of columns of x, each
// times an entry, in registers; a few output columns are turned back at once and written. For x S the entries are first
// put in the order of their columns. The sums go over the entries in one order, in parts of kPart, whatever thread or
// tile they belong to: results do not depend on the number of threads.
#include <algorithm>

#include "common.h"
#include "token_tiles.h"

namespace memsave {
namespace {

constexpr int64_t kMaxTile = 128;   // tokens
constexpr int64_t kOutputs = 32;    // columns of the result that are turned back at once
constexpr int64_t kPart = 32;       // entries that are summed before they are added to a total
constexpr int64_t kAhead = 6;       // entries
constexpr int64_t kGrainElements = 1 << 14, kGrainProducts = 1 << 16, kPieces = 64;
constexpr int64_t kOutputCost = 16;  // of writing an output, in entries

struct Job {
  Matrix x;
  void* out;
  int64_t outputs;
  const int32_t* starts;  // (O + 1,): entries [starts[o], starts[o + 1]) belong to output o
  const int32_t* inner;   // (K,): the column of x of an entry
  const void *values, *scratch;
};

MS_INLINE void narrow(float value, float& target) { target = value; }
MS_INLINE void narrow(double value, double& target) { target = value; }
template <class Half>
MS_INLINE void narrow(float value, Half& target) {
  target.bits = static_cast<uint16_t>(Half::narrow(value));
}

// sums[t] += the sum over entries [j, end) of value * column[t], for kGroups * kSide tokens. Written out so that compilers
// keep all lanes in registers. The columns of x lie anywhere in scratch memory, so each is asked for in advance: at a
// density of 5% everything together took 5 times as long without. `last` is the last entry of all.
template <int kGroups, class Wide>
MS_INLINE void add_part(const int32_t* inner, const Wide* values, int64_t j, int64_t end, int64_t last,
                        const Wide* tile, int64_t padded, Wide* sums) {
  Wide lanes[kGroups][kSide] = {};
  for (; j < end; ++j) {
    const Wide* column = tile + inner[j] * padded;
    const Wide* later = tile + inner[std::min(j + kAhead, last)] * padded;
    for (int64_t i = 0; i < kGroups * kSide; i += 64 / int64_t{sizeof(Wide)}) MS_PREFETCH(later + i);
    const Wide value = values[j];
    MS_NO_UNROLL
    for (int64_t i = 0; i < kSide; ++i) {
      lanes[0][i] += value * column[i];
      if constexpr (kGroups == 4) {
        lanes[1][i] += value * column[kSide + i];
        lanes[2][i] += value * column[2 * kSide + i];
        lanes[3][i] += value * column[3 * kSide + i];
      }
    }
  }
  for (int64_t g = 0; g < kGroups; ++g) {
    for (int64_t i = 0; i < kSide; ++i) sums[g * kSide + i] += lanes[g][i];
  }
}

// The sums of one output for all tokens of a tile.
template <class Wide>
MS_INLINE void sum_output(const Job& job, const Tile& tile, int64_t output, Wide* sums) {
  const Wide* columns = static_cast<const Wide*>(job.scratch) + tile.place;
  const Wide* values = static_cast<const Wide*>(job.values);
  const int64_t behind = job.starts[output + 1], last = job.starts[job.outputs] - 1;
  std::fill(sums, sums + tile.padded, Wide(0));
  for (int64_t j = job.starts[output]; j < behind; j += kPart) {
    const int64_t end = std::min(behind, j + kPart);
    int64_t t = 0;
    for (; t + 4 * kSide <= tile.padded; t += 4 * kSide) {
      add_part<4>(job.inner, values, j, end, last, columns + t, tile.padded, sums + t);
    }
    for (; t < tile.padded; t += kSide) {
      add_part<1>(job.inner, values, j, end, last, columns + t, tile.padded, sums + t);
    }
  }
}

// out[t][o] = sums[o][t] for a square, rounded.
template <class T, class Wide>
MS_INLINE void turn_square_back(const Wide* sums, int64_t padded, T* out, int64_t stride) {
  Wide square[kSide][kSide];
  for (int64_t o = 0; o < kSide; ++o) {
    for (int64_t t = 0; t < kSide; ++t) square[o][t] = sums[o * padded + t];
  }
  for (int64_t t = 0; t < kSide; ++t) {
    for (int64_t o = 0; o < kSide; ++o) narrow(square[o][t], out[t * stride + o]);
  }
}

// The same for `count` outputs from `first` on, and a tile's tokens.
template <class T, class Wide>
MS_INLINE void turn_back(const Job& job, const Tile& tile, int64_t first, int64_t count, const Wide* sums) {
  T* out = static_cast<T*>(job.out) + tile.first_token * job.outputs + first;
  const int64_t tokens = tile.tokens / kSide * kSide, whole = count / kSide * kSide;
  for (int64_t t = 0; t < tokens; t += kSide) {
    for (int64_t o = 0; o < whole; o += kSide) {
      turn_square_back(sums + o * tile.padded + t, tile.padded, out + t * job.outputs + o, job.outputs);
    }
  }
  for (int64_t t = 0; t < tile.tokens; ++t) {
    for (int64_t o = t < tokens ? whole : 0; o < count; ++o) {
      narrow(sums[o * tile.padded + t], out[t * job.outputs + o]);
    }
  }
}

// Blocks [begin, end) of kOutputs outputs.
template <class T, class Wide>
MS_INLINE void sum_blocks(const Job& job, const Tile& tile, int64_t begin, int64_t end) {
  alignas(64) Wide sums[kOutputs * kMaxTile];
  for (int64_t first = begin * kOutputs; first < std::min(job.outputs, end * kOutputs); first += kOutputs) {
    const int64_t count = std::min(kOutputs, job.outputs - first);
    for (int64_t o = 0; o < count; ++o) sum_output(job, tile, first + o, sums + o * tile.padded);
    turn_back<T>(job, tile, first, count, sums);
  }
}

enum class Step { kTurn, kSum };

// Columns [begin, end) of x turned over into scratch memory, or blocks [begin, end) of outputs summed.
template <class T, class Wide>
MS_INLINE void work(const Job& job, const Tile& tile, Wide* scratch, Step step, int64_t begin, int64_t end) {
  if (step == Step::kSum) return sum_blocks<T, Wide>(job, tile, begin, end);
  turn<T>(job.x, tile, begin, end, scratch + tile.place + begin * tile.padded);
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void work_float32(const Job& job, const Tile& tile, float* scratch, Step step, int64_t begin, int64_t end) {
  work<float>(job, tile, scratch, step, begin, end);
}
MS_CLONES void work_float64(const Job& job, const Tile& tile, double* scratch, Step step, int64_t begin, int64_t end) {
  work<double>(job, tile, scratch, step, begin, end);
}
MS_CLONES void work_float16(const Job& job, const Tile& tile, float* scratch, Step step, int64_t begin, int64_t end) {
  work<Float16>(job, tile, scratch, step, begin, end);
}
MS_CLONES void work_bfloat16(const Job& job, const Tile& tile, float* scratch, Step step, int64_t begin, int64_t end) {
  work<BFloat16>(job, tile, scratch, step, begin, end);
}

void work(const Job& job, const Tile& tile, int64_t dtype, void* scratch, Step step, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32: return work_float32(job, tile, static_cast<float*>(scratch), step, begin, end);
    case kFloat64: return work_float64(job, tile, static_cast<double*>(scratch), step, begin, end);
    case kFloat16: return work_float16(job, tile, static_cast<float*>(scratch), step, begin, end);
    default: return work_bfloat16(job, tile, static_cast<float*>(scratch), step, begin, end);
  }
}

// body(j, r, c) for each entry, in order.
template <class Body>
MS_INLINE void each_entry(const int32_t* indices, int64_t entries, int64_t columns, const Body& body) {
  int64_t row = 0;
  for (int64_t j = 0; j < entries; ++j) {
    while (indices[j] >= (row + 1) * columns) ++row;
    body(j, row, indices[j] - row * columns);
  }
}

// Where the entries of each row begin, and their columns.
void by_rows(const int32_t* indices, int64_t entries, int64_t rows, int64_t columns, int32_t* starts, int32_t* inner) {
  std::fill(starts, starts + rows + 1, 0);
  each_entry(indices, entries, columns, [&](int64_t j, int64_t r, int64_t c) {
    inner[j] = static_cast<int32_t>(c);
    ++starts[r + 1];
  });
  for (int64_t r = 0; r < rows; ++r) starts[r + 1] += starts[r];
}

// The entries in the order of their columns: where those of each column begin, their rows and their values.
template <class Wide>
void by_columns(const int32_t* indices, const Wide* values, int64_t entries, int64_t columns, int32_t* starts,
                int32_t* inner, Wide* sorted) {
  std::fill(starts, starts + columns + 1, 0);
  each_entry(indices, entries, columns, [&](int64_t, int64_t, int64_t c) { ++starts[c + 1]; });
  for (int64_t c = 0; c < columns; ++c) starts[c + 1] += starts[c];
  each_entry(indices, entries, columns, [&](int64_t j, int64_t r, int64_t c) {
    inner[starts[c]] = static_cast<int32_t>(r);
    sorted[starts[c]++] = values[j];
  });
  for (int64_t c = columns; c > 0; --c) starts[c] = starts[c - 1];  // each had become the end of its column
  starts[0] = 0;
}

// The first block of outputs of a piece, of `pieces` with about as much to do each.
int64_t first_block(const Job& job, int64_t piece, int64_t pieces) {
  const auto cost = [&](int64_t output) { return job.starts[output] + output * kOutputCost; };
  int64_t low = 0, high = (job.outputs + kOutputs - 1) / kOutputs;
  if (piece == pieces) return high;
  const int64_t wanted = cost(job.outputs) / pieces * piece;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost(middle * kOutputs) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Some tokens: all of their tiles are turned over, then the outputs of all of them summed.
void one_pass(const Job& job, int64_t dtype, void* scratch, int64_t token, int64_t tokens, int64_t tile) {
  const auto each_tile = [&](Step step, int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens; t += tile) {
      const int64_t count = std::min(tile, tokens - t), padded = (count + kSide - 1) / kSide * kSide;
      work(job, {token + t, count, padded, 0, job.x.columns, t * job.x.columns}, dtype, scratch, step, begin, end);
    }
  };
  parallel_for(job.x.columns, std::max(kSide, kGrainElements / tokens),
               [&](int64_t begin, int64_t end) { each_tile(Step::kTurn, begin, end); });
  const int64_t products = (job.starts[job.outputs] + job.outputs * kOutputCost) * tokens;
  const int64_t pieces = std::min<int64_t>(kPieces, 1 + products / kGrainProducts);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    each_tile(Step::kSum, first_block(job, begin, pieces), first_block(job, end, pieces));
  });
}

}  // namespace
}  // namespace memsave

// x (N, C) and out (N, R) if `transposed`, else x (N, R) and out (N, C). `values`, `sorted` (K,) and `scratch` (D *
// min(pass, N to a multiple of 16),) are float, or double for float64; `starts` has O + 1 elements, `inner` K; `sorted`
// is for x S alone. tile is a multiple of 16, at most 128, and pass of tile. Returns -1, or the first position of an
// index that is outside [0, R * C) or not above the one before, with nothing written.
MS_EXPORT int64_t ms_spmm(const void* x, int64_t token_stride, int64_t column_stride, int64_t dtype, int64_t tokens,
                          const int32_t* indices, const void* values, int64_t entries, int64_t rows, int64_t columns,
                          int64_t transposed, int32_t* starts, int32_t* inner, void* sorted, int64_t tile, int64_t pass,
                          void* scratch, void* out) {
  using namespace memsave;
  if (const int64_t wrong = first_wrong(indices, entries, rows * columns); wrong >= 0) return wrong;
  const Matrix matrix{x, transposed ? columns : rows, token_stride, column_stride};
  if (transposed) {
    by_rows(indices, entries, rows, columns, starts, inner);
  } else if (dtype == kFloat64) {
    by_columns(indices, static_cast<const double*>(values), entries, columns, starts, inner,
               static_cast<double*>(sorted));
  } else {
    by_columns(indices, static_cast<const float*>(values), entries, columns, starts, inner,
               static_cast<float*>(sorted));
  }
  const Job job = transposed ? Job{matrix, out, rows, starts, inner, values, scratch}
                             : Job{matrix, out, columns, starts, inner, sorted, scratch};
  for (int64_t token = 0; token < tokens; token += pass) {
    one_pass(job, dtype, scratch, token, std::min(pass, tokens - token), tile);
  }
  return -1;
}
